r"""Ranking losses of reward models: pure functions of rewards, each with its equation in the paper.

Write $d = r(x, y_c) - r(x, y_r)$ for the reward difference of a pair and $\sigma$ for the logistic
function. Everything is computed in fp32 through ``softplus``, finite for any finite reward.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduction = Literal["mean", "none"]


def pairwise_loss(
    rewards_chosen: Float[Tensor, "pairs"],
    rewards_rejected: Float[Tensor, "pairs"],
    *,
    margin: Float[Tensor, "pairs"] | None = None,
    label_smoothing: float = 0.0,
    target: Float[Tensor, "pairs"] | None = None,
    flip_rate: float = 0.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*pairs"]:
    r"""Ranking loss of a batch of pairs, in nats (paper Eq 2).

    With $d' = d - \text{margin}$ and a weight $t$ on the chosen side the loss of a pair is
    $-t \log \sigma(d') - (1 - t) \log \sigma(-d')$, where

    - by default $t = 1$ (Eq 2), with ``margin`` the adaptive margin (Eq 6, read with the margin inside
      the logistic function: see ``docs/deviations.md``);
    - ``label_smoothing`` $\alpha \in [0, 0.5)$ sets $t = 1 - \alpha$ (Eq 5, the paper's "soft label");
    - ``target``, in [0, 1], sets $t$ pair by pair (for instance $\sigma(\hat\mu)$);
    - ``flip_rate`` $\epsilon \in [0, 0.5)$ sets $t = (1 - \epsilon) / (1 - 2\epsilon)$, which is unbiased
      when a known share $\epsilon$ of the labels is flipped (rDPO, arXiv 2403.00409).

    Returns a scalar, or one value a pair for ``reduction="none"``.

    Raises ``ValueError`` for shapes that differ, for options out of range, and for more than one way to
    set $t$.

    >>> pairwise_loss(torch.tensor([1.0]), torch.tensor([1.0])).item()  # log 2
    0.6931471824645996
    """
    given = {"rewards_chosen": rewards_chosen, "rewards_rejected": rewards_rejected, "margin": margin, "target": target}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    if sum((label_smoothing != 0.0, target is not None, flip_rate != 0.0)) > 1:
        raise ValueError("label_smoothing, target and flip_rate exclude one another")
    if target is not None and not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError("target must lie in [0, 1]")
    for name, rate in (("label_smoothing", label_smoothing), ("flip_rate", flip_rate)):
        if not 0.0 <= rate < 0.5:
            raise ValueError(f"{name} must lie in [0, 0.5), got {rate}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, none")
    logits = rewards_chosen.float() - rewards_rejected.float()
    if margin is not None:
        logits = logits - margin.float()
    weight = 1.0 - label_smoothing if target is None else target.float()
    if flip_rate:
        weight = (1.0 - flip_rate) / (1.0 - 2.0 * flip_rate)
    losses = weight * F.softplus(-logits) + (1.0 - weight) * F.softplus(logits)
    return losses.mean() if reduction == "mean" else losses


def lm_loss(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, in nats, averaged over the positions where ``mask`` is true.

    ``logits[:, t]`` predicts ``labels[:, t]`` (already shifted). As the imitation term of a reward model
    (Part I Eq 2, there with the opposite sign) the mask covers the chosen response. Raises ``ValueError``
    when the mask is empty.
    """
    if not bool(mask.any()):
        raise ValueError("lm_loss: the mask selects no position")
    return F.cross_entropy(logits[mask].float(), labels[mask])


def dpo_loss(
    logprobs_chosen: Float[Tensor, "pairs"],
    logprobs_rejected: Float[Tensor, "pairs"],
    ref_logprobs_chosen: Float[Tensor, "pairs"],
    ref_logprobs_rejected: Float[Tensor, "pairs"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    r"""Loss of direct preference optimisation in nats, the mean over pairs (arXiv 2305.18290 Eq 7).

    A policy's own reward of a response is $\beta$ times its log-probability less that under the reference; all
    arguments are log-probabilities of whole responses.
    """
    chosen, rejected = logprobs_chosen - ref_logprobs_chosen, logprobs_rejected - ref_logprobs_rejected
    return F.softplus(-beta * (chosen - rejected)).mean()
