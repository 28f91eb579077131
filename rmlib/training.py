"""One training loop for language models and reward models, and the unit of work built on it.

``fit`` drives any loss over any batches through ``accelerate``. ``RewardRun`` describes one reward model;
``train_reward_model`` trains it, and leaves its scores and its log as tables.
"""

import math
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from rmlib import contrastive, data, losses, metarm, models, runs

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
    record: dict[str, list] | None = None,
    after_step: Callable[[dict], None] = lambda row: None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
    progress: str | None = None,
    ahead: Callable[[nn.Module, int, Accelerator], AbstractContextManager] = lambda *_: nullcontext({}),
) -> nn.Module:
    """Train ``model`` on ``batches`` (row indices, one array a step) and return it.

    ``record["log"]`` gains a row ``{"step", "loss"}`` a step, counted from 1; ``after_step`` may add to that row
    and to the other lists of ``record``. With ``checkpoint`` model, optimiser, random state and record are
    saved every ``checkpoint_seconds`` (0: at every step; else more rarely where saving is slow) and found again by
    a rerun, which then equals an uninterrupted run. Where several processes train, given the same ``model`` and
    ``batches``, each takes its part of every batch, and all make the same step (for a loss that is a mean over rows).
    ``ahead`` is the place where a step finds its gradient (:func:`rmlib.metarm.look_ahead`), and what it yields joins
    the step's row.
    Raises ``FloatingPointError`` naming step and rows when the loss is not finite.
    """
    machine, steps = accelerator(), len(batches)
    mine = slice(machine.process_index, None, machine.num_processes)
    schedule, warmup = SCHEDULES[optimisation.schedule], round(optimisation.warmup_ratio * steps)
    model.to(machine.device)  # not prepared: a prepared model goes on computing in bf16 when it scores
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=optimisation.lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, steps, warmup))
    optimiser = machine.prepare(optimiser)  # not the schedule: it would step once for every process
    state = {"model": model, "optimiser": optimiser, "scheduler": scheduler}
    record = {"log": []} if record is None else record
    resume(checkpoint, state, record)
    saved, pause = time.monotonic(), checkpoint_seconds
    model.train()
    for step in tqdm(range(len(record["log"]), steps), desc=progress, disable=progress is None, mininterval=5):
        rows = batches[step][mine]
        share = len(rows) * machine.num_processes / len(batches[step])  # of the mean over the whole batch
        rows = rows if len(rows) else batches[step][:1]
        batch = {name: tensor.to(machine.device) for name, tensor in collate(rows).items()}
        optimiser.zero_grad()
        with ahead(model, step, machine) as seen:
            with machine.autocast():
                loss = share * loss_fn(model, batch)
            row = {"step": step + 1, "loss": machine.reduce(loss.detach(), "mean").item()} | seen
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"loss is {row['loss']} at step {step + 1}, batch rows {batches[step].tolist()}"
                )
            machine.backward(loss)
        if machine.num_processes > 1:
            for parameter in trainable:
                if parameter.grad is not None:
                    parameter.grad = machine.reduce(parameter.grad, "mean")
        machine.clip_grad_norm_(trainable, optimisation.max_grad_norm)
        optimiser.step()
        scheduler.step()
        record["log"].append(row)
        after_step(row)
        if checkpoint and machine.is_main_process and (started := time.monotonic()) - saved >= pause:
            save_state(checkpoint, state, record)
            saved = time.monotonic()
            pause = checkpoint_seconds and max(checkpoint_seconds, 20 * (saved - started))  # a twentieth of the time
    return model.eval()


def save_state(path: Path, state: dict, record: dict[str, list]) -> None:
    """Write the states of ``state``'s parts, the random state and ``record`` to ``path``, atomically."""
    with runs.atomic(path) as temporary:
        saved = {name: part.state_dict() for name, part in state.items()}
        rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        torch.save(saved | rng | {"record": record}, temporary)


def resume(path: Path | None, state: dict, record: dict[str, list]) -> None:
    """Bring ``state`` and ``record`` to where the checkpoint left them; one that cannot be read is told and passed."""
    if path is None or not path.exists():
        return
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        print(f"{path}: not readable ({error}); training starts anew", file=sys.stderr, flush=True)
        return
    for name, part in state.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    torch.cuda.set_rng_state_all(saved["cuda_rng"])
    record |= saved["record"]


# ---------------------------------------------------------------- supervised fine-tuning


def train_sft(
    model: nn.Module, demonstrations: data.Responses, optimisation: Optimisation, *, epochs: int, seed: int, **kwargs
) -> tuple[nn.Module, pd.DataFrame]:
    """Fine-tune a causal LM on the responses of ``demonstrations``; returns it with its log (step, loss)."""
    rng, lengths = np.random.default_rng(seed), demonstrations.lengths
    rows = np.arange(len(lengths))
    batches = [b for _ in range(epochs) for b in data.length_batches(lengths, rows, optimisation.batch_size, rng)]
    record: dict[str, list] = {"log": []}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model.get_output_embeddings()(models.states_at(model, batch))
        return losses.lm_loss(logits, batch["response_ids"], batch["mask"])

    models.check_head(model)
    model = fit(model, batches, demonstrations.collate, loss_fn, optimisation, record=record, **kwargs)
    return model, pd.DataFrame(record["log"])


# ---------------------------------------------------------------- reward models


@dataclass(frozen=True)
class RewardRun:
    """One reward model: the pairs it sees, their order, and how it is trained.

    ``base`` is a checkpoint folder, a hub name, or a file of cached features (``*.safetensors``). ``rows`` are
    rows of the preference set in ``preferences`` (Parquet); those also in ``flipped`` are trained with their
    labels swapped. ``data_seed`` orders the pairs, ``head_seed`` draws the head. Training
    lasts ``epochs``, or ``steps`` if given (more passes are made as needed). The pairs of ``score_rows`` are
    scored at ``snapshots`` equal intervals, the last at the end; ``dropout_passes`` adds as many scorings with
    dropout on.

    The treatments of :func:`rmlib.losses.pairwise_loss`: ``label_smoothing``, ``flip_rate``, and ``margin`` and
    ``target`` with one value for every pair of the set. ``self_smoothing`` moves each pair's target that share of
    the way to the model's own prediction after every epoch (iterative data smoothing, arXiv 2401.16335).
    ``lm_coef`` adds the imitation of the chosen response (Part I Eq 2). With ``contrast`` every batch is seen in two
    views, two passes with dropout, and its ranking loss is the mean over both (section 3.1). With ``meta`` every step
    looks ahead (section 3.2), and the log has ``difference_loss`` and ``spread``. Raises ``ValueError`` naming the
    first row with a margin or target out of range, and for treatments that exclude one another.
    """

    name: str
    preferences: Path
    base: Path | str
    optimisation: Optimisation
    rows: np.ndarray
    score_rows: np.ndarray
    data_seed: int
    head_seed: int
    epochs: float = 1.0
    steps: int | None = None
    flipped: np.ndarray | None = None
    margin: np.ndarray | None = None
    target: np.ndarray | None = None
    label_smoothing: float = 0.0
    flip_rate: float = 0.0
    self_smoothing: float = 0.0
    lm_coef: float = 0.0
    contrast: contrastive.Contrast | None = None
    meta: metarm.Meta | None = None
    dropout: float = 0.0
    max_length: int = 256
    snapshots: int = 1
    dropout_passes: int = 0
    keep_model: bool = False

    def __post_init__(self):
        rates = {"label_smoothing": 0.5, "flip_rate": 0.5, "self_smoothing": 1.0, "lm_coef": math.inf}
        for name, bound in rates.items():
            if not 0.0 <= getattr(self, name) < bound:
                raise ValueError(f"{self.name}: {name} must lie in [0, {bound:g}), got {getattr(self, name)}")
        if self.contrast and (self.lm_coef or not self.dropout):
            raise ValueError(f"{self.name}: two views need dropout, and exclude lm_coef")
        given = [name for name in ("label_smoothing", "flip_rate", "self_smoothing") if getattr(self, name)]
        if len(given := given + ["target"] * (self.target is not None)) > 1:
            raise ValueError(f"{self.name}: {' and '.join(given)} exclude one another")
        for name, low, high in (("margin", -math.inf, math.inf), ("target", 0.0, 1.0)):
            if (values := getattr(self, name)) is not None:
                good = np.isfinite(values[self.rows]) & (values[self.rows] >= low) & (values[self.rows] <= high)
                if not good.all():
                    row = self.rows[np.argmin(good)]
                    raise ValueError(f"{self.name}: the {name} of row {row} is {values[row]}")


DROPOUT = 1000  # the number of a unit's first scoring with dropout, counted as a snapshot
REWARD_RUN_CODE = ("losses", "contrastive", "metarm", "models", "data", "training")


def open_preferences(path: Path) -> Dataset:
    """The preference set in a Parquet file."""
    return Dataset.from_pandas(pd.read_parquet(path), preserve_index=False)


def tokenized(preferences: Path, base: Path | str, max_length: int):
    """The pairs of a preference set as batches of the kind that ``base`` reads."""
    changed = [Path(path).stat().st_mtime_ns for path in (preferences, base) if Path(path).exists()]
    return _tokenized(preferences, base, max_length, tuple(changed))


@lru_cache(maxsize=4)
def _tokenized(preferences: Path, base: Path | str, max_length: int, mtimes_ns: tuple[int, ...]):
    rows = open_preferences(preferences)
    if models.is_features(base):
        return data.feature_pairs(rows, *models.load_features(base))
    tokenizer = models.load_tokenizer(base)
    if data.is_encoder(tokenizer):
        raise ValueError(f"{base}: an encoder is read through cached features (models.encode, models.save_features)")
    return data.causal_pairs(rows, tokenizer, max_length)


def run_batches(run: RewardRun, lengths: np.ndarray) -> list[np.ndarray]:
    """Row indices of every training step, in the order that ``data_seed`` draws."""
    rng, size = np.random.default_rng(run.data_seed), run.optimisation.batch_size
    steps = run.steps or max(1, round(run.epochs * math.ceil(len(run.rows) / size)))
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        batches += data.length_batches(lengths, run.rows, size, rng)
    return batches[:steps]


def train_reward_model(run: RewardRun, folder: Path, checkpoint: Path | None = None) -> None:
    """Train one reward model; write ``scores.parquet`` and ``log.parquet`` (and the model) to ``folder``.

    Scores: ``pair_id, snapshot, reward_chosen, reward_rejected``, chosen and rejected as labelled; the last
    snapshot is the finished model, dropout passes count on from ``DROPOUT``. Log: ``step, loss``.
    """
    pairs = tokenized(run.preferences, run.base, run.max_length)
    pair_id = np.array(open_preferences(run.preferences)["pair_id"])
    model = _new_model(run)
    flipped = np.zeros(len(pair_id), dtype=bool)
    if run.flipped is not None:
        flipped[run.flipped] = True
    batches = run_batches(run, pairs.lengths)
    if run.snapshots > len(batches):
        raise ValueError(f"{run.name}: {run.snapshots} snapshots of only {len(batches)} steps")
    scored_at = {round(len(batches) * (k + 1) / run.snapshots): k for k in range(run.snapshots)}
    record: dict[str, list] = {"log": [], "scores": [], "treatment": [_treatment(run, len(pair_id))]}
    epoch_steps = math.ceil(len(run.rows) / run.optimisation.batch_size)

    def score(snapshot: int, dropout: bool = False) -> None:
        rewards = score_pairs(model, pairs, run.score_rows, dropout=dropout)
        record["scores"].append({"snapshot": snapshot} | {side: torch.from_numpy(r) for side, r in rewards.items()})

    def after_step(row: dict) -> None:
        if row["step"] in scored_at:
            score(scored_at[row["step"]])
        if run.self_smoothing and row["step"] % epoch_steps == 0:
            rewards = score_pairs(model, pairs, run.rows, flipped=flipped)
            believed = torch.from_numpy(rewards["reward_chosen"] - rewards["reward_rejected"]).sigmoid()
            target = record["treatment"][0]["target"]
            target[run.rows] = torch.lerp(target[run.rows], believed, run.self_smoothing)

    def collate(rows: np.ndarray) -> dict[str, Tensor]:
        return pairs.collate(rows, flipped) | {name: values[rows] for name, values in record["treatment"][0].items()}

    keep = {"record": record, "after_step": after_step, "checkpoint": checkpoint}
    if run.meta:
        meta_set = metarm.MetaSet(run.meta.responses, run.base, run.max_length)
        keep["ahead"] = metarm.look_ahead(run.meta, meta_set, run.data_seed)
    fit(model, batches, collate, partial(_reward_loss, run), run.optimisation, **keep)
    torch.manual_seed(run.data_seed)
    for k in range(run.dropout_passes):
        score(DROPOUT + k, dropout=True)
    scores = [pd.DataFrame({"pair_id": pair_id[run.score_rows]} | taken) for taken in record["scores"]]
    runs.write_table(pd.concat(scores), folder / "scores.parquet")
    runs.write_table(pd.DataFrame(record["log"]), folder / "log.parquet")
    if run.keep_model:
        if run.contrast:
            del model.contraster
        models.save_reward_model(model, folder / "model")
        if not models.is_features(run.base):  # so that the checkpoint stands alone
            models.load_tokenizer(run.base).save_pretrained(folder / "model")


def _new_model(run: RewardRun) -> nn.Module:
    """The reward model of ``run`` before training; what its contrast learns or remembers goes and is saved with it."""
    model = models.reward_model(run.base, head_seed=run.head_seed, dropout=run.dropout)
    if run.contrast:
        model.contraster = contrastive.Contraster(run.contrast, model.score.in_features)
    return model


def _treatment(run: RewardRun, n_pairs: int) -> dict[str, Tensor]:
    """What ``run`` says of single pairs: their margins and targets, each of shape (pairs,)."""
    given = {"margin": run.margin, "target": np.ones(n_pairs) if run.self_smoothing else run.target}
    for name, values in given.items():
        if values is not None and len(values) != n_pairs:
            raise ValueError(f"{run.name}: {name} has {len(values)} values, the set has {n_pairs} pairs")
    return {name: torch.tensor(values).float() for name, values in given.items() if values is not None}


def _reward_loss(run: RewardRun, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Ranking loss of a batch under the treatments of ``run``, and its imitation or contrastive term."""
    treatment = {name: batch.pop(name) for name in ("margin", "target") if name in batch}
    rank = partial(losses.pairwise_loss, **treatment, label_smoothing=run.label_smoothing, flip_rate=run.flip_rate)
    if run.contrast:
        views = [models.pair_states(model, batch) for _ in range(2)]
        ranked = [rank(*(models.rewards_of(model, states) for states in view)) for view in views]
        return sum(ranked) / 2 + run.contrast.beta * model.contraster(*views)
    loss = rank(*models.pair_rewards(model, batch))
    if run.lm_coef:
        logits, said = models.imitation_logits(model, batch), batch["imitated"]
        loss = loss + run.lm_coef * losses.lm_loss(logits[:, :-1], batch["input_ids"][:, 1:], said[:, 1:])
    return loss


def forecast(todo: Sequence[RewardRun], workers: int) -> str:
    """What these reward models will cost: models, steps, tokens, and minutes by a timing of a few steps of the first.

    Scoring a token is counted as a third of training on it; ``workers`` are taken not to disturb one another.
    """
    steps = trained = scored = 0
    for run in todo:
        lengths = tokenized(run.preferences, run.base, run.max_length).lengths
        batches = run_batches(run, lengths)
        steps += len(batches)
        tokens = sum(int(lengths[rows].sum()) for rows in batches)
        trained += tokens * (2 if run.lm_coef or run.contrast else 3 if run.meta else 1)
        scored += int(lengths[run.score_rows].sum()) * (run.snapshots + run.dropout_passes)
        scored += tokens * (run.self_smoothing > 0)
    minutes = (trained + scored / 3) * _seconds_a_token(todo[0]) / workers / 60
    about = f"{minutes:.0f} minutes" if minutes >= 2 else f"{max(60 * minutes, 10):.0f} seconds"
    kind = "pairs" if models.is_features(todo[0].base) else "tokens"
    return (
        f"{len(todo)} reward models, {steps:,} steps, {trained:,} {kind} to train on and {scored:,} to score: "
        f"about {about} ({workers} side by side)"
    )


def _seconds_a_token(run: RewardRun, n_steps: int = 4) -> float:
    """Seconds for a token of training, from ``n_steps`` steps after two to warm up, on one thread of a CPU."""
    pairs, threads, times = tokenized(run.preferences, run.base, run.max_length), torch.get_num_threads(), []
    batches = (run_batches(run, pairs.lengths) * (n_steps + 2))[: n_steps + 2]
    run = replace(run, lm_coef=0.0, contrast=None, meta=None)
    model, nobody, loss_fn = _new_model(run), np.zeros(len(pairs.chosen), bool), partial(_reward_loss, run)
    torch.set_num_threads(1)
    try:
        note = {"after_step": lambda row: times.append(time.perf_counter())}
        fit(model, batches, lambda rows: pairs.collate(rows, nobody), loss_fn, run.optimisation, **note)
    finally:
        torch.set_num_threads(threads)
        torch.cuda.empty_cache()  # for the workers
    return (times[-1] - times[1]) / sum(int(pairs.lengths[rows].sum()) for rows in batches[2:])


@torch.no_grad()
def pair_states(model: nn.Module, pairs, rows: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """What the head of ``model`` reads of chosen and rejected responses of ``rows``, shape (2, rows, hidden)."""
    nobody, device, out = np.zeros(len(pairs.chosen), dtype=bool), next(model.parameters()).device, {}
    for batch_rows in data.score_batches(pairs.lengths, rows, batch_size):
        batch = {name: tensor.to(device) for name, tensor in pairs.collate(batch_rows, nobody).items()}
        out |= dict(zip(batch_rows, torch.stack(models.pair_states(model, batch), dim=1).cpu().numpy(), strict=True))
    return np.stack([out[row] for row in rows], axis=1)


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
