r"""Direct preference optimisation, the rival of MetaRM's policies that needs no reward model (arXiv 2305.18290)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rmlib import data, losses, models, policies, ppo, runs, training


@dataclass(frozen=True)
class DPORun:
    """One policy: it starts as ``policy`` and learns from the ``rows`` of a preference set.

    ``beta`` weighs its distance from ``reference``. A ``seed`` orders the pairs; training lasts ``steps``. In the end
    it answers the prompts ``asked``, sampled as ``settings`` say.
    """

    name: str
    policy: Path
    reference: Path
    preferences: Path
    rows: np.ndarray
    optimisation: training.Optimisation
    beta: float
    steps: int
    seed: int
    asked: tuple[str, ...]
    settings: ppo.Settings
    has_gold: bool = False


DPO_RUN_CODE = ("dpo", *policies.POLICY_RUN_CODE)


def response_logprobs(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each response with its end, shape (responses,)."""
    return torch.where(batch["mask"], ppo.token_logprobs(policy, batch), 0.0).sum(1)


def train_dpo_run(run: DPORun, folder: Path, checkpoint: Path | None = None) -> None:
    """Train one policy by DPO; write ``log.parquet``, ``answers.parquet`` and ``model`` to ``folder``.

    The log: ``step, loss``. Raises ``ValueError`` for what :func:`rmlib.ppo.check_policy` refuses, and for a pair that
    is longer than the context.
    """
    tokenizer, policy = models.load_tokenizer(run.policy), models.load_language_model(run.policy)
    ppo.check_policy(policy, tokenizer, list(run.asked), run.settings)
    pairs = pd.read_parquet(run.preferences).iloc[run.rows]
    prompts, n = data.prompt_ids(pairs["prompt"].to_list(), tokenizer), len(pairs)
    said = data.response_ids([*pairs["chosen"], *pairs["rejected"]], tokenizer)
    texts = data.Responses(prompts + prompts, said, tokenizer.pad_token_id)
    context = getattr(policy.config, "max_position_embeddings", np.inf)
    if texts.lengths[longest := int(np.argmax(texts.lengths))] > context:
        pair = pairs["pair_id"].iloc[longest % n]
        raise ValueError(f"pair {pair!r}: {texts.lengths[longest]} tokens exceed the context of {context}")
    reference = models.load_language_model(run.reference).to(training.accelerator().device)
    with training.accelerator().autocast():
        known = ppo.of_all(lambda *given: response_logprobs(*given)[:, None], reference, texts, (2 * n, 1), 64)[:, 0]

    def collate(rows: np.ndarray) -> dict[str, Tensor]:
        both = np.concatenate([rows, rows + n])
        return texts.collate(both) | {"ref_logprobs": known[both]}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ours = response_logprobs(model, batch).chunk(2)
        return losses.dpo_loss(*ours, *batch["ref_logprobs"].chunk(2), beta=run.beta)

    rng, size, lengths = np.random.default_rng(run.seed), run.optimisation.batch_size, texts.lengths[:n]
    batches: list[np.ndarray] = []
    while len(batches) < run.steps:
        batches += data.length_batches(lengths, np.arange(n), size, rng)
    record: dict[str, list] = {"log": []}
    keep = {"record": record, "checkpoint": checkpoint}
    training.fit(policy, batches[: run.steps], collate, loss_fn, run.optimisation, **keep)
    runs.write_table(pd.DataFrame(record["log"]), folder / "log.parquet")
    policies.leave(policy, tokenizer, run, folder)
