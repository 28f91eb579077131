"""Contrastive objectives: by value, against naive loops, and with controls that a wrong formula fails."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rmlib import contrastive
from rmlib.contrastive import Contrast, Contraster

SWAV = Contrast("swav", n_prototypes=3, temperature=0.1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- items


def test_pairs_are_all_responses_and_differences_come_with_their_negatives():
    chosen, rejected = random(3, 2), random(3, 2, seed=1)
    assert torch.equal(contrastive.items_of(chosen, rejected, "pairs"), torch.cat([chosen, rejected]))
    both = contrastive.items_of(chosen, rejected, "differences")
    assert torch.equal(both[:3], chosen - rejected)
    assert torch.equal(both[3:], rejected - chosen)
    assert torch.equal(contrastive.items_of(chosen, rejected, "one_sided"), chosen - rejected)


@pytest.mark.parametrize(
    "wrong",
    [{"objective": "simcle"}, {"items": "triples"}, {"temperature": 0.0}, {"n_prototypes": 1}, {"queue_size": -1}],
    ids=str,
)
def test_an_option_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Contrast(**{"objective": "swav"} | wrong)


# ---------------------------------------------------------------- SimCSE


def test_simcse_is_the_cross_entropy_of_a_hand_made_similarity_matrix():
    """Unit vectors at 0, 60 and 90 degrees, second views at 0, 90 and 60: cosines by hand."""
    at = [torch.deg2rad(torch.tensor(angles)) for angles in ([0.0, 60.0, 90.0], [0.0, 90.0, 60.0])]
    first, second = (3.0 * torch.stack([angle.cos(), angle.sin()], dim=1) for angle in at)
    half, root = 0.5, math.sqrt(3) / 2
    cosines = torch.tensor([[1.0, 0.0, half], [half, root, 1.0], [0.0, 1.0, root]])
    expected = F.cross_entropy(cosines / 0.5, torch.arange(3)).item()
    assert contrastive.simcse_loss(first, second, 0.5).item() == pytest.approx(expected, abs=1e-6)
    assert F.cross_entropy(first @ second.T / 0.5, torch.arange(3)).item() != pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_simcse_of_orthogonal_items_that_two_views_share(temperature):
    expected = math.log(1 + 3 * math.exp(-1 / temperature))
    assert contrastive.simcse_loss(torch.eye(4), torch.eye(4), temperature).item() == pytest.approx(expected, abs=1e-6)


def test_simcse_pulls_the_views_together_and_the_other_items_apart():
    first, second = random(6, 4).requires_grad_(), random(6, 4, seed=1)
    contrastive.simcse_loss(first, second, 0.1).backward()
    moved = (first - 0.01 * first.grad).detach()

    def similarity(view: torch.Tensor) -> torch.Tensor:
        return F.normalize(view, dim=1) @ F.normalize(second, dim=1).T

    before, after = similarity(first.detach()), similarity(moved)
    others = ~torch.eye(6, dtype=torch.bool)
    assert after.diagonal().mean() > before.diagonal().mean()
    assert torch.logsumexp(after[others] / 0.1, 0) < torch.logsumexp(before[others] / 0.1, 0)


def test_the_exact_opposite_of_a_difference_teaches_simcse_nothing_its_other_negatives_do():
    """Each item's opposite adds next to nothing to the sum over negatives; those of the other items add something."""
    chosen, rejected = random(8, 16), random(8, 16, seed=1)
    one, both = (contrastive.items_of(chosen, rejected, kind) for kind in ("one_sided", "differences"))
    cosines = F.normalize(both, dim=1) @ F.normalize(both, dim=1).T
    assert cosines[:8, 8:].diagonal() == pytest.approx(torch.full((8,), -1.0), abs=1e-5)
    opposite = torch.eye(16, dtype=torch.bool).roll(8, dims=1)
    without = F.cross_entropy((cosines / 0.2).masked_fill(opposite, -torch.inf), torch.arange(16)).item()
    assert contrastive.simcse_loss(both, both, 0.2).item() == pytest.approx(without, abs=1e-4)
    assert contrastive.simcse_loss(one, one, 0.2).item() < 0.8 * without


# ---------------------------------------------------------------- Sinkhorn


@settings(max_examples=30)
@given(items=st.integers(2, 24), prototypes=st.integers(2, 6), seed=st.integers(0, 99))
def test_every_item_is_given_out_once_and_prototypes_end_in_equal_use(items, prototypes, seed):
    q = contrastive.sinkhorn(random(items, prototypes, seed=seed).clamp(-1, 1), 0.5, 60)
    assert q.sum(1) == pytest.approx(torch.ones(items), abs=1e-5)
    assert q.sum(0) == pytest.approx(torch.full((prototypes,), items / prototypes), rel=1e-2)


def test_sinkhorn_against_plain_scaling_of_the_matrix():
    scores = random(5, 3).double()
    q = (scores / 0.3).exp()
    for _ in range(4):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    assert contrastive.sinkhorn(scores, 0.3, 4) == pytest.approx(q.float(), abs=1e-5)


def test_sinkhorn_follows_permutations_of_items_and_of_prototypes():
    scores, items, prototypes = random(7, 4), torch.tensor([3, 1, 6, 0, 2, 5, 4]), torch.tensor([2, 0, 3, 1])
    q = contrastive.sinkhorn(scores, 0.1, 3)
    assert contrastive.sinkhorn(scores[items][:, prototypes], 0.1, 3) == pytest.approx(
        q[items][:, prototypes], abs=1e-6
    )


def test_sinkhorn_is_finite_for_a_tiny_epsilon():
    assert torch.isfinite(contrastive.sinkhorn(random(6, 3), 1e-3, 3)).all()


# ---------------------------------------------------------------- SwAV


def naive_swav(first, second, prototypes, contrast, earlier=((), ())) -> float:
    """Equations 7 and 8 in loops, in float64; assignments are those of the first rows of items and ``earlier`` ones."""
    unit = [[v / np.linalg.norm(v) for v in part.double().numpy()] for part in (first, second, prototypes)]
    scores = [np.array([[h @ c for c in unit[2]] for h in unit[k]]) for k in (0, 1)]
    past = [[v / np.linalg.norm(v) for v in np.asarray(view, dtype=float)] for view in earlier]
    wide = [np.array([[h @ c for c in unit[2]] for h in [*unit[k], *past[k]]]) for k in (0, 1)]
    q = [contrastive.sinkhorn(torch.from_numpy(s), contrast.epsilon, contrast.n_iterations).numpy() for s in wide]
    total = 0.0
    for i in range(len(first)):
        for q_of, p_of in ((0, 1), (1, 0)):
            e = np.exp(scores[p_of][i] / contrast.temperature)
            total -= sum(q[q_of][i, k] * math.log(e[k] / e.sum()) for k in range(len(prototypes)))
    return total / len(first)


def test_swav_against_loops():
    first, second, prototypes = random(5, 4), random(5, 4, seed=1), random(3, 4, seed=2)
    ours = contrastive.swav_loss(first, second, prototypes, SWAV).item()
    assert ours == pytest.approx(naive_swav(first, second, prototypes, SWAV), rel=1e-4)
    unswapped = naive_swav(first, first, prototypes, SWAV) / 2 + naive_swav(second, second, prototypes, SWAV) / 2
    assert ours != pytest.approx(unswapped, rel=0.05)


def test_no_gradient_flows_through_the_assignment():
    first, second, prototypes = random(5, 4).requires_grad_(), random(5, 4, seed=1), random(3, 4, seed=2)
    contrastive.swav_loss(first, second, prototypes, SWAV).backward()
    unit, c = F.normalize(second, dim=1), F.normalize(prototypes, dim=1)
    q = contrastive.sinkhorn(unit @ c.T, SWAV.epsilon, SWAV.n_iterations)
    assert not q.requires_grad
    alone = first.detach().clone().requires_grad_()
    log_p = (F.normalize(alone, dim=1) @ c.T / SWAV.temperature).log_softmax(1)
    (-(q * log_p).sum(1).mean()).backward()
    assert first.grad == pytest.approx(alone.grad, abs=1e-5)


def test_collapse_does_not_pay_and_is_seen():
    """Equal features get equal shares of every prototype; without Sinkhorn's balance they would cost nothing."""
    same, prototypes = random(1, 4).expand(6, 4), random(3, 4, seed=2)
    q = contrastive.sinkhorn(F.normalize(same, dim=1) @ F.normalize(prototypes, dim=1).T, 0.05, 3)
    assert q == pytest.approx(torch.full((6, 3), 1 / 3), abs=1e-5)
    aligned = contrastive.swav_loss(same, same, torch.cat([same[:1], -same[:1], -same[:1]]), SWAV).item()
    assert aligned > 2 * math.log(3)
    unbalanced = F.one_hot(torch.zeros(6, dtype=torch.long), 3).float()
    assert contrastive.prototypes_in_use(unbalanced) == pytest.approx(1.0)
    assert contrastive.prototypes_in_use(q) == pytest.approx(3.0, rel=1e-4)


def test_a_small_batch_cannot_fill_many_prototypes():
    q = contrastive.sinkhorn(F.normalize(random(32, 8), dim=1) @ F.normalize(random(50, 8, seed=1), dim=1).T, 0.05, 3)
    assert q.max(1).values.mean() < 0.9  # so it spreads each item over several
    few = contrastive.sinkhorn(F.normalize(random(32, 8), dim=1) @ F.normalize(random(4, 8, seed=1), dim=1).T, 0.05, 3)
    assert few.max(1).values.mean() > 0.9


# ---------------------------------------------------------------- state


def views(seed: int, n: int = 4) -> tuple:
    return tuple((random(n, 5, seed=seed + k), random(n, 5, seed=seed + k + 10)) for k in (0, 1))


def test_the_queue_holds_the_newest_items_first_and_takes_part_once_it_is_full():
    torch.manual_seed(0)
    contraster = Contraster(Contrast("swav", n_prototypes=3, temperature=0.1, queue_size=12), 5)
    plain = Contraster(Contrast("swav", n_prototypes=3, temperature=0.1), 5)
    plain.load_state_dict(
        {"prototypes": contraster.prototypes, "queue": torch.zeros(2, 0, 5), "n_queued": torch.tensor(0)}
    )
    assert contraster(*views(0)).item() == plain(*views(0)).item()
    assert contraster(*views(1)).item() == plain(*views(1)).item()  # 8 of 12: not yet
    newest, older = (contrastive.items_of(*views(seed)[0], "pairs") for seed in (1, 0))
    assert torch.equal(contraster.queue[0], torch.cat([newest, older[:4]]))
    assert not contraster.queue.requires_grad
    before = list(contraster.queue.clone())
    items = [contrastive.items_of(*view, "pairs") for view in views(2)]
    helped = naive_swav(*items, contraster.prototypes.detach(), contraster.contrast, before)
    assert contraster(*views(2)).item() == pytest.approx(helped, rel=1e-4)
    assert plain(*views(2)).item() != pytest.approx(helped, rel=1e-2)


def test_the_contrast_is_computed_in_fp32_where_training_is_in_half_precision():
    contraster, close = (
        Contraster(Contrast("simcse", temperature=0.05), 16),
        random(1, 16) + 0.05 * random(12, 16, seed=1),
    )
    view = tuple(close.chunk(2))
    exact = contraster(view, view).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contraster(view, view).item() == pytest.approx(exact, abs=1e-6)
        assert contrastive.simcse_loss(close, close, 0.05).item() != pytest.approx(exact, abs=1e-4)


def test_a_contraster_goes_on_exactly_from_its_saved_state():
    contrast = Contrast("swav", n_prototypes=3, queue_size=8)
    torch.manual_seed(0)
    one = Contraster(contrast, 5)
    one(*views(0))
    two = Contraster(contrast, 5)
    two.load_state_dict(one.state_dict())
    assert one(*views(1)).item() == two(*views(1)).item()
    assert torch.equal(one.queue, two.queue)


def test_the_control_contrasts_nothing():
    assert Contraster(Contrast("none"), 5)(*views(0)).item() == 0.0
    assert not list(Contraster(Contrast("none"), 5).parameters())


# ---------------------------------------------------------------- several processes


def train_on_a_part(rank: int, n: int, port: int, objective: str, out) -> None:
    """Loss, and gradient of this process's items averaged as DDP does, when ``n`` processes share the batch."""
    torch.set_num_threads(1)
    if n > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=n, rank=rank)
    first, second = ([part.chunk(n)[rank] for part in view] for view in views(0))
    weight = torch.eye(5, requires_grad=True)
    torch.manual_seed(0)
    contraster = Contraster(Contrast(objective, items="one_sided", n_prototypes=3), 5)
    loss = contraster(*([part @ weight for part in view] for view in (first, second)))
    loss.backward()
    if n > 1:
        torch.distributed.all_reduce(weight.grad)
        torch.distributed.destroy_process_group()
    out[rank] = (loss.item(), (weight.grad / n).tolist())


@pytest.mark.parametrize("objective", ["simcse", "swav"])
def test_one_process_and_two_give_the_same_loss_and_gradient(objective, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        alone, shared = manager.dict(), manager.dict()
        train_on_a_part(0, 1, port, objective, alone)
        mp.spawn(train_on_a_part, (2, port, objective, shared), nprocs=2)
        loss, gradient = alone[0]
        for rank in (0, 1):
            assert shared[rank][0] == pytest.approx(loss, abs=1e-6)
            assert np.array(shared[rank][1]) == pytest.approx(np.array(gradient), abs=1e-5)
