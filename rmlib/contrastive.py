r"""Contrastive objectives for reward models: SimCSE and SwAV, on responses or on differences (paper section 3.1).

Two *views* of the same items, two passes with dropout, are compared. The total loss is the ranking loss on both views
plus $\beta$ times one of these. Where several processes train, each compares the items of all.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from rmlib.params import AtLeastTwo, Count, CountOrZero, Positive, PositiveOrZero

Items = Float[Tensor, "items features"]
Scores = Float[Tensor, "items prototypes"]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Contrast:
    r"""A contrastive objective, its items, its weight $\beta$ and its constants.

    ``items``: ``"pairs"``, the features of all chosen and rejected responses; ``"differences"``, chosen minus rejected
    and the negatives of these, as the paper's text has it; ``"one_sided"``, without the negatives: half as many items,
    none of which meets its exact opposite. ``"none"`` is the control: two views, no contrast. ``queue_size`` items of
    earlier steps take part in SwAV's assignment. Raises ``ValueError`` naming a field that is out of range.
    """

    objective: Literal["none", "simcse", "swav"]
    items: Literal["pairs", "differences", "one_sided"] = "pairs"
    beta: PositiveOrZero = 1.0
    temperature: Positive = 0.05
    n_prototypes: AtLeastTwo = 50
    epsilon: Positive = 0.05
    n_iterations: Count = 3
    queue_size: CountOrZero = 0


def items_of(chosen: Items, rejected: Items, kind: str) -> Items:
    """The items that are compared, from the features of chosen and rejected responses, each (pairs, features)."""
    if kind == "pairs":
        return torch.cat([chosen, rejected])
    difference = chosen - rejected
    return torch.cat([difference, -difference]) if kind == "differences" else difference


def gathered(items: Items) -> Items:
    """The items of all processes, in the order of their ranks; gradients flow back to each."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return torch.cat(all_gather(items)) if several else items


def simcse_loss(first: Items, second: Items, temperature: float) -> Float[Tensor, ""]:
    r"""Cross-entropy of finding an item's second view among all second views, by cosine over temperature (Eq 9)."""
    first, second = (F.normalize(view.float(), dim=1) for view in (first, second))
    return F.cross_entropy(first @ second.T / temperature, torch.arange(len(first), device=first.device))


@torch.no_grad()
def sinkhorn(scores: Scores, epsilon: float, n_iterations: int) -> Scores:
    """Soft assignments of items to prototypes, each item's summing to 1 and the prototypes in near equal use.

    Rows and columns of ``exp(scores / epsilon)`` are scaled in turn (SwAV, arXiv 2006.09882), here as logarithms.
    """
    log_q = scores.float() / epsilon
    for _ in range(n_iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)  # every prototype in equal use
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)  # every item given out once
    return log_q.exp()


def swav_loss(
    first: Items,
    second: Items,
    prototypes: Float[Tensor, "prototypes features"],
    contrast: Contrast,
    earlier: Sequence[Items] = (),
) -> Float[Tensor, ""]:
    """Swapped prediction: from one view's features the other's assignment, in nats, both ways summed (Eq 7-8).

    ``earlier`` holds the items of earlier steps, a tensor a view or none; they take part in the assignment alone.
    """
    prototypes = F.normalize(prototypes.float(), dim=1)
    scores = [F.normalize(view.float(), dim=1) @ prototypes.T for view in (first, second)]
    before = [F.normalize(view.float(), dim=1) @ prototypes.T for view in earlier] or [here[:0] for here in scores]
    q = [
        sinkhorn(torch.cat([here, past]), contrast.epsilon, contrast.n_iterations)[: len(here)]
        for here, past in zip(scores, before, strict=True)
    ]
    log_p = [(here / contrast.temperature).log_softmax(1) for here in scores]
    return -(q[0] * log_p[1] + q[1] * log_p[0]).sum(1).mean()


class Contraster(nn.Module):
    """The state of a contrastive objective: SwAV's prototypes, which are trained, and its queue of earlier items.

    The queue takes part once it is full. Where several processes train, their batches must be of one size.
    """

    def __init__(self, contrast: Contrast, n_features: int):
        super().__init__()
        self.contrast = contrast
        if contrast.objective == "swav":
            self.prototypes = nn.Parameter(F.normalize(torch.randn(contrast.n_prototypes, n_features), dim=1))
            self.register_buffer("queue", torch.zeros(2, contrast.queue_size, n_features))
            self.register_buffer("n_queued", torch.tensor(0))

    def forward(self, first: tuple[Items, Items], second: tuple[Items, Items]) -> Float[Tensor, ""]:
        """Loss of two views, each the features of chosen and of rejected responses, (pairs, features); in fp32."""
        if self.contrast.objective == "none":
            return first[0].new_zeros(())
        with torch.autocast(first[0].device.type, enabled=False):  # else it computes cosines in bf16
            return self._loss(first, second)

    def _loss(self, first: tuple[Items, Items], second: tuple[Items, Items]) -> Float[Tensor, ""]:
        views = [gathered(items_of(*view, self.contrast.items)) for view in (first, second)]
        if self.contrast.objective == "simcse":
            return simcse_loss(*views, self.contrast.temperature)
        earlier = list(self.queue) if self.n_queued >= self.contrast.queue_size else []
        loss = swav_loss(*views, self.prototypes, self.contrast, earlier)
        newest = torch.stack(views).detach().float()
        self.queue = torch.cat([newest, self.queue], dim=1)[:, : self.contrast.queue_size]
        self.n_queued += newest.shape[1]
        return loss


def prototypes_in_use(assignments: Scores) -> float:
    """Effective number of prototypes that the items share, exp of the entropy of their mean use; 1 is collapse."""
    return float(torch.special.entr(assignments.mean(0)).sum().exp())
