r"""MetaRM: every step looks ahead, to a reward model that tells unlabelled responses further apart (paper section 3.2).

A *meta set* holds $k$ responses of the present policy to each of some prompts, without labels. A step of training goes
up on their difference loss $J$, takes the ranking loss's gradient there, and steps from where it was (Algorithm 1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from jaxtyping import Float
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from rmlib import data, models
from rmlib.params import Count, Positive

Collate = Callable[[np.ndarray], dict[str, Tensor]]  # of prompts: the first response of each, then the second, ...


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Meta:
    r"""A look-ahead: the meta set, and the step on $J$, of length ``eta`` times its gradient ($\eta$ of Eq 11).

    ``responses`` (Parquet) has rows ``prompt, response``, or ``prompt, response_id`` where features are cached; each
    prompt as often, those of ``batch_size`` prompts a step. ``ascent``: ``"gradient"`` as Eq 11 is written;
    ``"normalised"`` scales the gradient to a root mean square of 1, so that ``eta`` is how far a weight moves, as the
    learning rate is in AdamW; ``"random"``, a control, goes as far in a direction drawn at random. Raises
    ``ValueError`` naming a field that is out of range.
    """

    responses: Path
    eta: Positive
    ascent: Literal["gradient", "normalised", "random"] = "normalised"
    batch_size: Count = 16


def difference_loss(rewards: Float[Tensor, "prompts k"]) -> Float[Tensor, ""]:
    r"""$J = \frac{2}{k^2} \sum_{i<j} \sigma(|r_i - r_j|)$, the mean over prompts (Eq 10).

    Between $(k - 1) / (2k)$, where all rewards of a prompt are equal, and twice that. Raises ``ValueError`` for fewer
    than two responses a prompt.

    >>> difference_loss(torch.zeros(1, 5)).item()
    0.4000000059604645
    """
    k = rewards.shape[1]
    if k < 2:
        raise ValueError(f"differences need at least two responses a prompt, got {k}")
    first, second = torch.triu_indices(k, k, 1)
    gaps = (rewards[:, first] - rewards[:, second]).abs()
    return 2 / k**2 * gaps.sigmoid().sum(1).mean()


@contextmanager
def ascended(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], meta: Meta) -> Iterator[None]:
    """Within, ``parameters`` stand one step up along ``gradients``; after it, bit for bit where they stood."""
    here = [parameter.detach().clone() for parameter in parameters]
    scale = meta.eta
    if meta.ascent != "gradient":
        count = sum(gradient.numel() for gradient in gradients)
        length = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
        scale *= count**0.5 / max(length, 1e-30)
    try:
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, here, strict=True):
                parameter.copy_(value)


class MetaSet:
    """The responses of a meta set, as batches of the kind that reward models on ``base`` read.

    Raises ``ValueError`` naming the file: for a column that is missing, a prompt with fewer than two responses or
    with more than another, texts longer than ``max_length``, or a response without cached features.
    """

    def __init__(self, path: Path, base: Path | str, max_length: int):
        table, kind = pd.read_parquet(path), "response_id" if models.is_features(base) else "response"
        if lacking := [column for column in ("prompt", kind) if column not in table]:
            raise ValueError(f"{path}: no column {', '.join(lacking)}; there are {', '.join(table.columns)}")
        if table[["prompt", kind]].isna().any(axis=None):
            raise ValueError(f"{path}: a row has no prompt or no {kind}")
        said = table.groupby("prompt", sort=False)[kind].agg(list)
        counts = sorted(set(said.map(len)))
        if len(counts) != 1 or counts[0] < 2:
            k = f"{counts[0]} to {counts[-1]}" if counts else "none"
            raise ValueError(f"{path}: a meta set needs as many responses to each prompt, at least two; it has {k}")
        self.size, self.k = len(said), counts[0]
        try:
            self.collate = _of_features(said, base) if kind == "response_id" else _of_texts(said, base, max_length)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def rewards(self, model: nn.Module, rows: np.ndarray) -> Float[Tensor, "prompts k"]:
        """Rewards of all responses to the prompts ``rows``."""
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate(rows).items()}
        return models.rewards(model, batch).unflatten(0, (self.k, len(rows))).T


def _of_texts(said: pd.Series, base: Path | str, max_length: int) -> Collate:
    tokenizer = models.load_tokenizer(base)
    responses = iter(data.response_ids([text for texts in said for text in texts], tokenizer))
    prompts = data.prompt_ids(list(said.index), tokenizer)
    groups = [(ids, *islice(responses, len(texts))) for ids, texts in zip(prompts, said, strict=True)]
    for prompt, ids in zip(said.index, groups, strict=True):
        if (longest := len(ids[0]) + max(map(len, ids[1:]))) > max_length:
            raise ValueError(f"{prompt[:60]!r} and a response: {longest} tokens exceed {max_length}")
    return lambda rows: data.grouped([groups[i] for i in rows], tokenizer.pad_token_id)


def _of_features(said: pd.Series, base: Path | str) -> Collate:
    features, ids = models.load_features(base)
    place = {name: i for i, name in enumerate(ids)}
    if unknown := [name for names in said for name in names if name not in place]:
        raise ValueError(f"no features of response {unknown[0]!r}")
    groups = np.array([[place[name] for name in names] for names in said])
    return lambda rows: {"features": features[groups[rows].T.flatten()]}


def look_ahead(meta: Meta, meta_set: MetaSet, seed: int):
    """The look-ahead as :func:`rmlib.training.fit` takes it: a context in which a step finds its gradient.

    Which prompts a step sees follows from ``seed`` and its number alone. Where several processes train, each takes its
    part of them, and all go up along the mean of their gradients.
    """

    @contextmanager
    def ahead(model: nn.Module, step: int, machine: Accelerator) -> Iterator[dict[str, float]]:
        n, rng = machine.num_processes, np.random.default_rng([seed, step])
        drawn = rng.permutation(np.arange(meta_set.size))[: meta.batch_size]
        if len(drawn) < n:
            raise ValueError(f"{len(drawn)} prompts a step cannot be shared by {n} processes")
        mine = drawn[machine.process_index :: n]
        share = len(mine) * n / len(drawn)  # of the mean over all prompts of the step
        with machine.autocast():  # its own: autocast keeps casts of the weights, which are about to change
            rewards = meta_set.rewards(model, mine)
        objective, spread = share * difference_loss(rewards), share * rewards.detach().std(dim=1).mean()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(objective, parameters, materialize_grads=True)
        if meta.ascent == "random":
            chance = torch.Generator().manual_seed(int(rng.integers(2**63)))
            found = [torch.randn(each.shape, generator=chance).to(each.device) for each in found]
        average = partial(machine.reduce, reduction="mean")
        with ascended(parameters, average(list(found)), meta):
            yield {"difference_loss": average(objective.detach()).item(), "spread": average(spread).item()}

    return ahead
