"""One training loop for language models and reward models, and the unit of work built on it.

``fit`` drives any loss over any batches through ``accelerate``. ``RewardRun`` describes one reward model;
``train_reward_model`` trains it, and leaves its scores and its log as tables.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from rmlib import data, losses, models, runs

# ---------------------------------------------------------------- the loop


def linear(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero (the paper's SFT, App. B)."""
    return min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))


def inverse_sqrt(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up from a floor of 0.1, then inverse square root (the official reward-model code)."""
    return max(0.1, (step + 1) / warmup) if step < warmup else math.sqrt(max(warmup, 1) / (step + 1))


def constant(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then constant."""
    return min((step + 1) / max(warmup, 1), 1.0)


SCHEDULES = {"linear": linear, "inverse_sqrt": inverse_sqrt, "constant": constant}


@dataclass(frozen=True)
class Optimisation:
    """How a model is trained: AdamW without weight decay, gradient clipping, a named schedule."""

    lr: float
    batch_size: int
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose from {', '.join(SCHEDULES)}")


def accelerator() -> Accelerator:
    """An accelerator in bf16 where the device computes in it, else in fp32."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return Accelerator(mixed_precision="bf16" if bf16 else "no")


def fit(
    model: nn.Module,
    batches: Sequence[np.ndarray],
    collate: Callable[[np.ndarray], dict[str, Tensor]],
    loss_fn: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    optimisation: Optimisation,
    *,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    history: list[float] | None = None,
    progress: str | None = None,
) -> nn.Module:
    """Train ``model`` on ``batches`` (row indices, one array a step) and return it.

    ``after_step(step, loss)`` runs after each step, counted from 1. With ``checkpoint`` the state is saved
    every ``checkpoint_every`` steps and found again by a rerun, which then equals an uninterrupted run.
    The losses of all steps, those before an interruption included, are appended to ``history``.
    Raises ``FloatingPointError`` naming step and rows when the loss is not finite.
    """
    machine, steps = accelerator(), len(batches)
    if machine.num_processes != 1:
        raise RuntimeError(f"fit trains in one process, not in {machine.num_processes}: each would train its own copy")
    schedule, warmup = SCHEDULES[optimisation.schedule], round(optimisation.warmup_ratio * steps)
    model.to(machine.device)  # not prepared: a prepared model goes on computing in bf16 when it scores
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=optimisation.lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, steps, warmup))
    optimiser, scheduler = machine.prepare(optimiser, scheduler)
    state = {"model": model, "optimiser": optimiser, "scheduler": scheduler}
    history = [] if history is None else history
    history += _resume(checkpoint, state)
    model.train()
    for step in tqdm(range(len(history), steps), desc=progress, disable=progress is None, mininterval=5):
        batch = {name: tensor.to(machine.device) for name, tensor in collate(batches[step]).items()}
        with machine.autocast():
            loss = loss_fn(model, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step + 1}, batch rows {batches[step].tolist()}")
        optimiser.zero_grad()
        machine.backward(loss)
        machine.clip_grad_norm_(trainable, optimisation.max_grad_norm)
        optimiser.step()
        scheduler.step()
        history.append(loss.item())
        after_step(step + 1, history[-1])
        if checkpoint and (step + 1) % checkpoint_every == 0:
            _save_state(checkpoint, state, history)
    return model.eval()


def _save_state(path: Path, state: dict, history: list[float]) -> None:
    with runs.atomic(path) as temporary:
        saved = {name: part.state_dict() for name, part in state.items()}
        rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        torch.save(saved | rng | {"history": history}, temporary)


def _resume(path: Path | None, state: dict) -> list[float]:
    if path is None or not path.exists():
        return []
    saved = torch.load(path, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    torch.cuda.set_rng_state_all(saved["cuda_rng"])
    return saved["history"]


# ---------------------------------------------------------------- supervised fine-tuning


def train_sft(
    model: nn.Module,
    demonstrations: data.Demonstrations,
    optimisation: Optimisation,
    *,
    epochs: int,
    seed: int,
    **kwargs,
) -> tuple[nn.Module, pd.DataFrame]:
    """Fine-tune a causal LM on the responses of ``demonstrations``; returns it with its log (step, loss)."""
    rng, rows = np.random.default_rng(seed), np.arange(len(demonstrations.prompt))
    lengths = demonstrations.lengths
    batches = [b for _ in range(epochs) for b in data.length_batches(lengths, rows, optimisation.batch_size, rng)]
    history: list[float] = []

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return losses.lm_loss(logits[:, :-1], batch["input_ids"][:, 1:], batch["loss_mask"][:, 1:])

    model = fit(model, batches, demonstrations.collate, loss_fn, optimisation, history=history, **kwargs)
    return model, pd.DataFrame({"step": np.arange(1, len(history) + 1), "loss": history})


# ---------------------------------------------------------------- reward models


@dataclass(frozen=True)
class RewardRun:
    """One reward model: the pairs it sees, their order, and how it is trained.

    ``rows`` are rows of the preference set in ``preferences`` (Parquet); those also in ``flipped`` are
    trained with their labels swapped. ``data_seed`` orders the pairs, ``head_seed`` draws the head. Training
    lasts ``epochs``, or ``steps`` if given (more passes are made as needed). The pairs of ``score_rows`` are
    scored at the end, and at ``snapshots`` equal intervals before; a log is kept on ``eval_rows`` at
    ``evaluations`` equal intervals. ``dropout_passes`` > 0 adds that many scorings with dropout on.
    """

    name: str
    preferences: str
    base: str
    optimisation: Optimisation
    rows: np.ndarray
    score_rows: np.ndarray
    data_seed: int
    head_seed: int
    epochs: float = 1.0
    steps: int | None = None
    flipped: np.ndarray | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    max_length: int = 256
    eval_rows: np.ndarray | None = None
    evaluations: int = 0
    snapshots: int = 1
    dropout_passes: int = 0
    keep_model: bool = False

    def inputs(self) -> list[Path | str]:
        """Files whose content decides the result; a hub model stands there by its name."""
        if self.base.endswith(".safetensors"):
            return [Path(path) for path in (self.preferences, self.base, Path(self.base).with_suffix(".txt"))]
        source = models.source_folder(self.base)
        return [Path(self.preferences), Path(source) if Path(source).is_dir() else source]


REWARD_RUN_CODE = ("losses", "models", "data", "training")


@lru_cache(maxsize=4)
def open_preferences(path: str) -> Dataset:
    """The preference set in a Parquet file."""
    return Dataset.from_pandas(pd.read_parquet(path), preserve_index=False)


@lru_cache(maxsize=4)
def tokenized(preferences: str, base: str, max_length: int):
    """The pairs of a preference set as batches of the kind that ``base`` reads."""
    rows = open_preferences(preferences)
    if base.endswith(".safetensors"):
        ids = Path(base).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        return data.feature_pairs(rows, load_file(base)["features"], ids)
    tokenizer = models.load_tokenizer(base)
    build = data.encoder_pairs if tokenizer.eos_token_id is None else data.causal_pairs
    return build(rows, tokenizer, max_length)


def run_batches(run: RewardRun, lengths: np.ndarray) -> list[np.ndarray]:
    """Row indices of every training step, in the order that ``data_seed`` draws."""
    rng, size = np.random.default_rng(run.data_seed), run.optimisation.batch_size
    steps = run.steps or max(1, round(run.epochs * math.ceil(len(run.rows) / size)))
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        batches += data.length_batches(lengths, run.rows, size, rng)
    return batches[:steps]


def train_reward_model(run: RewardRun, folder: Path) -> None:
    """Train one reward model; write ``scores.parquet`` and ``log.parquet`` (and the model) to ``folder``.

    Scores: ``pair_id, snapshot, reward_chosen, reward_rejected``, chosen and rejected as labelled; the last
    snapshot is the finished model, dropout passes count on from 1000. Log: ``step, loss`` and, where
    evaluated, accuracy and loss on the evaluation rows and on as many of the pairs trained on.
    """
    pairs = tokenized(run.preferences, run.base, run.max_length)
    pair_id = np.array(open_preferences(run.preferences)["pair_id"])
    model = models.reward_model(run.base, head_seed=run.head_seed, dropout=run.dropout)
    flipped = np.zeros(len(pair_id), dtype=bool)
    if run.flipped is not None:
        flipped[run.flipped] = True
    batches = run_batches(run, pairs.lengths)
    if run.snapshots > len(batches):
        raise ValueError(f"{run.name}: {run.snapshots} snapshots of only {len(batches)} steps")
    scored_at = {round(len(batches) * (k + 1) / run.snapshots): k for k in range(run.snapshots)}
    evaluated_at = {round(len(batches) * (k + 1) / run.evaluations) for k in range(run.evaluations)}
    seen_rows = np.random.default_rng(0).permutation(run.rows)[
        : len(run.rows if run.eval_rows is None else run.eval_rows)
    ]
    scores: list[pd.DataFrame] = []
    log: list[dict] = []

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return losses.pairwise_loss(*models.pair_rewards(model, batch), label_smoothing=run.label_smoothing)

    def score(snapshot: int) -> None:
        rewards = score_pairs(model, pairs, run.score_rows)
        scores.append(pd.DataFrame({"pair_id": pair_id[run.score_rows], "snapshot": snapshot} | rewards))

    def after_step(step: int, loss: float) -> None:
        row = {"step": step, "loss": loss}
        if step in evaluated_at:
            row |= _evaluate(model, pairs, run.eval_rows, flipped & False, "eval_")
            row |= _evaluate(model, pairs, seen_rows, flipped, "train_")
        log.append(row)
        if step in scored_at:
            score(scored_at[step])

    fit(model, batches, lambda rows: pairs.collate(rows, flipped), loss_fn, run.optimisation, after_step=after_step)
    torch.manual_seed(run.data_seed)
    for k in range(run.dropout_passes):
        model.train()
        rewards = score_pairs(model, pairs, run.score_rows, dropout=True)
        scores.append(pd.DataFrame({"pair_id": pair_id[run.score_rows], "snapshot": 1000 + k} | rewards))
    runs.write_table(pd.concat(scores), folder / "scores.parquet")
    runs.write_table(pd.DataFrame(log), folder / "log.parquet")
    if run.keep_model:
        models.save_reward_model(model, folder / "model")


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    pairs,
    rows: np.ndarray,
    *,
    flipped: np.ndarray | None = None,
    dropout: bool = False,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """``reward_chosen`` and ``reward_rejected`` of ``rows``, in their order; dropout is off unless asked for."""
    training, device = model.training, next(model.parameters()).device
    model.train(dropout)
    flipped = np.zeros(len(pairs.chosen), dtype=bool) if flipped is None else flipped
    out = np.empty((2, len(pairs.chosen)), dtype=np.float32)
    for batch_rows in data.score_batches(pairs.lengths, rows, batch_size):
        batch = {name: tensor.to(device) for name, tensor in pairs.collate(batch_rows, flipped).items()}
        out[:, batch_rows] = torch.stack(models.pair_rewards(model, batch)).cpu().numpy()
    model.train(training)
    return {"reward_chosen": out[0, rows], "reward_rejected": out[1, rows]}


def _evaluate(model: nn.Module, pairs, rows: np.ndarray, flipped: np.ndarray, prefix: str) -> dict[str, float]:
    rewards = score_pairs(model, pairs, rows, flipped=flipped)
    gap = rewards["reward_chosen"] - rewards["reward_rejected"]
    return {
        f"{prefix}accuracy": float((gap > 0).mean()),
        f"{prefix}loss": float(np.logaddexp(0, -gap).mean()),
        f"{prefix}reward_chosen": float(rewards["reward_chosen"].mean()),
        f"{prefix}reward_rejected": float(rewards["reward_rejected"].mean()),
    }
