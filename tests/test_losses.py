"""The losses: values worked out by hand, invariances, gradients in closed form, and wrong forms that must fail."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

from rmlib import losses

REWARDS = (torch.tensor([0.3, -1.2, 2.0, 0.0, -4.0, 1.5]), torch.tensor([0.1, 0.4, -1.0, 0.0, 3.0, 1.4]))
LOG2 = math.log(2)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def loss_at(difference: float, **options) -> float:
    """Loss of one pair whose rewards differ by ``difference``."""
    return losses.pairwise_loss(torch.tensor([difference]), torch.tensor([0.0]), **options).item()


def slope_at(difference: float, loss=losses.pairwise_loss, **options) -> float:
    """Derivative of one pair's loss in the chosen reward."""
    chosen = torch.tensor([difference], requires_grad=True)
    loss(chosen, torch.zeros(1), **options).backward()
    return chosen.grad.item()


@pytest.fixture(scope="module")
def plain_losses():
    """The losses as they run outside tests, their annotations not executed."""
    spec = importlib.util.spec_from_file_location("plain_losses", losses.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- values


def test_equal_rewards_cost_log_2():
    assert loss_at(0.0) == pytest.approx(LOG2, abs=1e-7)


def test_difference_of_log_3_costs_log_of_four_thirds():
    assert loss_at(math.log(3)) == pytest.approx(math.log(4 / 3), abs=1e-7)  # sigmoid(log 3) = 3/4
    assert loss_at(-math.log(3)) == pytest.approx(math.log(4), abs=1e-7)


def test_margin_is_taken_from_the_difference():
    chosen, rejected, margin = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.0]), torch.tensor([0.4, -0.7])
    by_hand = [-log_sigmoid(0.6), -log_sigmoid(1.2)]
    ours = losses.pairwise_loss(chosen, rejected, margin=margin, reduction="none").tolist()
    assert ours == pytest.approx(by_hand, abs=1e-6)
    reversed_sign = losses.pairwise_loss(chosen, rejected, margin=-margin, reduction="none").tolist()
    assert reversed_sign != pytest.approx(by_hand, abs=1e-2)


def test_margin_equal_to_the_difference_costs_log_2():
    loss = losses.pairwise_loss(*REWARDS, margin=REWARDS[0] - REWARDS[1])
    assert loss.item() == pytest.approx(LOG2, abs=1e-6)


def test_label_smoothing_by_hand():
    by_hand = -0.8 * log_sigmoid(1.5) - 0.2 * log_sigmoid(-1.5)
    assert loss_at(1.5, label_smoothing=0.2) == pytest.approx(by_hand, abs=1e-6)


def test_label_smoothing_is_least_at_its_log_odds_and_there_equals_the_entropy():
    best = math.log(0.8 / 0.2)
    assert loss_at(best, label_smoothing=0.2) == pytest.approx(0.5004, abs=1e-4)  # H(0.2)
    assert slope_at(best, label_smoothing=0.2) == pytest.approx(0.0, abs=1e-6)
    assert loss_at(best + 0.5, label_smoothing=0.2) > 0.51
    assert loss_at(best - 0.5, label_smoothing=0.2) > 0.51


def test_target_weighs_each_pair_by_hand():
    target = torch.tensor([1.0, 0.0, 0.5, 0.7, 0.2, 0.9])
    differences = (REWARDS[0] - REWARDS[1]).tolist()
    by_hand = [
        -t * log_sigmoid(d) - (1 - t) * log_sigmoid(-d) for t, d in zip(target.tolist(), differences, strict=True)
    ]
    ours = losses.pairwise_loss(*REWARDS, target=target, reduction="none").tolist()
    assert ours == pytest.approx(by_hand, abs=1e-6)


def test_flip_rate_by_hand():
    by_hand = (0.9 * -log_sigmoid(1.5) - 0.1 * -log_sigmoid(-1.5)) / 0.8
    assert loss_at(1.5, flip_rate=0.1) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_flip_rate_is_unbiased_under_flipped_labels(rate):
    def expected(**options):  # over labels that are flipped with probability `rate`
        kept = losses.pairwise_loss(*REWARDS, reduction="none", **options)
        flipped = losses.pairwise_loss(*REWARDS[::-1], reduction="none", **options)
        return (1 - rate) * kept + rate * flipped

    clean = losses.pairwise_loss(*REWARDS, reduction="none")
    torch.testing.assert_close(expected(flip_rate=rate), clean, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected(), clean, atol=1e-2)
    assert not torch.allclose(expected(label_smoothing=rate), clean, atol=1e-2)


def test_reduction_none_gives_one_value_a_pair_and_mean_their_mean():
    each = losses.pairwise_loss(*REWARDS, reduction="none")
    assert each.shape == (6,)
    by_hand = [-log_sigmoid(d) for d in (REWARDS[0] - REWARDS[1]).tolist()]
    assert each.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert losses.pairwise_loss(*REWARDS).item() == pytest.approx(sum(by_hand) / 6, abs=1e-6)


# ---------------------------------------------------------------- invariances

OPTIONS = [
    {},
    {"margin": torch.tensor([0.5, -0.5, 1.0, 0.0, 2.0, -1.0])},
    {"label_smoothing": 0.1},
    {"target": torch.tensor([1.0, 0.0, 0.5, 0.7, 0.2, 0.9])},
    {"flip_rate": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adding_a_constant_to_both_rewards_changes_nothing(options):
    shifted = losses.pairwise_loss(REWARDS[0] + 7.25, REWARDS[1] + 7.25, **options)
    torch.testing.assert_close(shifted, losses.pairwise_loss(*REWARDS, **options))


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_swapping_the_sides_with_the_other_weight_changes_nothing(alpha):
    smoothed = losses.pairwise_loss(*REWARDS, label_smoothing=alpha)
    swapped = losses.pairwise_loss(*REWARDS[::-1], target=torch.full((6,), alpha))
    torch.testing.assert_close(swapped, smoothed)
    assert not torch.allclose(losses.pairwise_loss(*REWARDS[::-1], label_smoothing=alpha), smoothed, atol=1e-2)


def test_swapping_the_sides_turns_the_margin_around():
    margin = torch.tensor([0.5, -0.5, 1.0, 0.0, 2.0, -1.0])
    ours = losses.pairwise_loss(*REWARDS, margin=margin)
    swapped = losses.pairwise_loss(*REWARDS[::-1], margin=-margin, target=torch.zeros(6))
    torch.testing.assert_close(swapped, ours)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shards_weighted_by_their_size_average_to_the_whole(options):
    def part(rows):
        inside = {name: value[rows] if torch.is_tensor(value) else value for name, value in options.items()}
        return losses.pairwise_loss(REWARDS[0][rows], REWARDS[1][rows], **inside)

    whole = losses.pairwise_loss(*REWARDS, **options)
    torch.testing.assert_close((2 * part(slice(0, 2)) + 4 * part(slice(2, 6))) / 6, whole)
    torch.testing.assert_close((part(slice(0, 3)) + part(slice(3, 6))) / 2, whole)


# ---------------------------------------------------------------- gradients


def test_gradient_equals_its_closed_form():
    chosen, rejected = (side.clone().requires_grad_() for side in REWARDS)
    losses.pairwise_loss(chosen, rejected, reduction="none").sum().backward()
    closed = -(1 - torch.sigmoid(REWARDS[0] - REWARDS[1]))
    torch.testing.assert_close(chosen.grad, closed, atol=1e-6, rtol=0)
    torch.testing.assert_close(rejected.grad, -closed, atol=1e-6, rtol=0)


def test_gradient_with_weight_is_the_predicted_preference_minus_the_weight():
    sigma = 1 / (1 + math.exp(-1.5))
    assert slope_at(1.5, label_smoothing=0.2) == pytest.approx(sigma - 0.8, abs=1e-6)
    assert slope_at(1.5, target=torch.tensor([0.3])) == pytest.approx(sigma - 0.3, abs=1e-6)
    assert slope_at(1.5, flip_rate=0.1) == pytest.approx(sigma - 0.9 / 0.8, abs=1e-6)


def test_gradient_of_a_badly_wrong_pair_stays_minus_one():
    assert slope_at(-15.0) == pytest.approx(-1, abs=1e-6)


def official(chosen, rejected):
    """The ranking loss of the authors' released code."""
    return -torch.log(torch.sigmoid(chosen - rejected) + 1e-5).mean()


def test_official_form_loses_the_gradient_of_a_badly_wrong_pair_and_ours_does_not():
    assert slope_at(-15.0, official) == pytest.approx(-0.030, abs=1e-3)
    assert slope_at(-15.0) == pytest.approx(-1, abs=1e-3)


def test_official_form_saturates_where_ours_keeps_growing():
    assert official(torch.tensor([-40.0]), torch.tensor([0.0])).item() == pytest.approx(-math.log(1e-5), abs=1e-3)
    assert loss_at(-40.0) == pytest.approx(40.0, abs=1e-4)


def test_official_form_agrees_with_ours_on_moderate_pairs():
    assert official(*REWARDS).item() == pytest.approx(losses.pairwise_loss(*REWARDS).item(), abs=0.02)


def test_margin_moves_the_gradient_only_inside_the_sigmoid():
    margin = torch.tensor([2.0])
    inside = slope_at(0.5, margin=margin)
    assert inside == pytest.approx(-(1 - torch.sigmoid(torch.tensor(0.5 - 2.0)).item()), abs=1e-6)

    def outside(chosen, rejected):  # -(log sigmoid(d) - margin), the reading that we do not take
        return -(F.logsigmoid(chosen - rejected) - margin).mean()

    assert slope_at(0.5, outside) == pytest.approx(slope_at(0.5), abs=1e-6)
    assert abs(slope_at(0.5, outside) - inside) > 0.4


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"flip_rate": 0.1}], ids=str)
@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_loss_and_gradient_are_finite_for_huge_differences(difference, options):
    assert math.isfinite(loss_at(difference, **options))
    assert math.isfinite(slope_at(difference, **options))


def test_naive_form_is_infinite_for_huge_differences():
    assert torch.isinf(-torch.log(torch.sigmoid(torch.tensor(-1e4))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rewards_are_compared_in_fp32(dtype):
    rewards = (torch.tensor([-60_000.0], dtype=dtype), torch.tensor([60_000.0], dtype=dtype))
    loss = losses.pairwise_loss(*rewards, margin=torch.tensor([1.0], dtype=dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == rewards[1].item() - rewards[0].item() + 1


# ---------------------------------------------------------------- refusals


def test_annotated_shapes_are_executed():
    with pytest.raises(TypeCheckError):
        losses.pairwise_loss(torch.zeros(3), torch.zeros(3, 1))


def test_pairs_against_a_column_of_pairs_raise(plain_losses):
    with pytest.raises(ValueError, match=r"shapes differ.*\(3,\).*\(3, 1\)"):
        plain_losses.pairwise_loss(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.parametrize("name", ["margin", "target"])
@pytest.mark.parametrize("shape", [(1,), (3, 1), ()])
def test_option_of_another_shape_raises(plain_losses, name, shape):
    with pytest.raises(ValueError, match=f"shapes differ.*{name}"):
        plain_losses.pairwise_loss(torch.zeros(3), torch.zeros(3), **{name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["label_smoothing", "flip_rate"])
@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0, float("nan")])
def test_rate_outside_zero_to_half_raises(name, value):
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        loss_at(0.0, **{name: value})


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_target_outside_zero_to_one_raises(value):
    with pytest.raises(ValueError, match="target must lie in"):
        loss_at(0.0, target=torch.tensor([value]))


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "flip_rate": 0.1},
        {"label_smoothing": 0.1, "target": torch.tensor([0.5])},
        {"flip_rate": 0.1, "target": torch.tensor([0.5])},
    ],
    ids=lambda options: " and ".join(options),
)
def test_two_ways_to_set_the_weight_raise(options):
    with pytest.raises(ValueError, match="exclude one another"):
        loss_at(0.0, **options)


def test_unknown_reduction_raises_with_the_choices(plain_losses):
    with pytest.raises(ValueError, match="'sum'; choose from mean, none"):
        plain_losses.pairwise_loss(torch.zeros(3), torch.zeros(3), reduction="sum")


# ---------------------------------------------------------------- imitation


@pytest.fixture
def language():
    """Logits, labels and mask of two short texts."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, generator=generator), torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    return logits, labels, torch.tensor([[False, True, True, False], [True, False, False, False]])


def test_lm_loss_equals_a_naive_loop(language):
    logits, labels, mask = language
    terms = []
    for text in range(2):
        for at in range(4):
            if mask[text, at]:
                row = logits[text, at].tolist()
                terms.append(math.log(sum(math.exp(x) for x in row)) - row[labels[text, at]])
    assert len(terms) == 3
    assert losses.lm_loss(logits, labels, mask).item() == pytest.approx(sum(terms) / 3, abs=1e-6)


def test_lm_loss_of_uniform_logits_is_the_log_of_the_vocabulary(language):
    logits, labels, mask = language
    assert losses.lm_loss(torch.zeros_like(logits), labels, mask).item() == pytest.approx(math.log(5), abs=1e-6)


def test_lm_loss_ignores_junk_in_masked_places(language):
    logits, labels, mask = language
    junk = logits.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    loss = losses.lm_loss(junk, labels.masked_fill(~mask, -10_000), mask)
    loss.backward()
    assert loss.item() == losses.lm_loss(logits, labels, mask).item()
    assert (junk.grad[~mask] == 0).all()
    assert (junk.grad[mask] != 0).all()


def test_lm_loss_depends_on_the_mask(language):
    logits, labels, mask = language
    unmasked = losses.lm_loss(logits, labels, torch.ones_like(mask))
    assert abs(unmasked - losses.lm_loss(logits, labels, mask)) > 1e-3


def test_lm_loss_of_half_precision_logits_is_fp32(language):
    logits, labels, mask = language
    loss = losses.lm_loss(logits.to(torch.bfloat16), labels, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.lm_loss(logits, labels, mask).item(), abs=0.02)


def test_lm_loss_with_an_empty_mask_raises(language):
    logits, labels, mask = language
    with pytest.raises(ValueError, match="mask selects no position"):
        losses.lm_loss(logits, labels, torch.zeros_like(mask))


# ---------------------------------------------------------------- DPO

OURS = torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -4.0])
THEIRS = torch.tensor([-1.5, -4.0]), torch.tensor([-1.0, -4.5])  # log-ratios 0.5, -1 and -1, 0.5


def test_dpo_loss_by_hand():
    gaps = [1.5, -1.5]
    for beta in (0.1, 2.0):
        by_hand = -sum(log_sigmoid(beta * gap) for gap in gaps) / 2
        assert losses.dpo_loss(*OURS, *THEIRS, beta=beta).item() == pytest.approx(by_hand, abs=1e-6)
    first = [part[:1] for part in (*OURS, *THEIRS)]
    assert losses.dpo_loss(*first, beta=2.0).item() == pytest.approx(-log_sigmoid(3.0), abs=1e-6)
    for wrong in (2.0 * 1.0, -3.0, 1.5):  # without the reference, the other way round, without beta
        assert losses.dpo_loss(*first, beta=2.0).item() != pytest.approx(-log_sigmoid(wrong), abs=1e-3)


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_dpo_of_a_policy_that_is_its_reference_costs_log_2(beta):
    assert losses.dpo_loss(*OURS, *OURS, beta=beta).item() == pytest.approx(LOG2, abs=1e-7)


def test_dpo_is_the_ranking_loss_of_the_policys_own_rewards():
    own = [0.7 * (ours - theirs) for ours, theirs in zip(OURS, THEIRS, strict=True)]
    assert losses.dpo_loss(*OURS, *THEIRS, beta=0.7).item() == pytest.approx(
        losses.pairwise_loss(*own).item(), abs=1e-7
    )
    doubled = [2 * part for part in (*OURS, *THEIRS)]
    twice, scaled = losses.dpo_loss(*OURS, *THEIRS, beta=1.4), losses.dpo_loss(*doubled, beta=0.7)
    assert twice.item() == pytest.approx(scaled.item(), abs=1e-7)


def test_dpo_raises_the_chosen_and_lowers_the_rejected_most_where_it_is_wrong():
    chosen, rejected = (part.clone().requires_grad_() for part in OURS)
    losses.dpo_loss(chosen, rejected, *THEIRS, beta=0.5).backward()
    by_hand = [-0.5 / (1 + math.exp(0.5 * gap)) / 2 for gap in (1.5, -1.5)]
    assert chosen.grad.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in by_hand], abs=1e-6)
    assert chosen.grad[1] < chosen.grad[0] < 0


def test_dpo_is_finite_for_responses_that_are_far_from_likely():
    far = torch.tensor([-1e6]), torch.tensor([0.0])
    assert losses.dpo_loss(*far, *far[::-1], beta=1.0).item() == pytest.approx(2e6)
    assert losses.dpo_loss(*far[::-1], *far, beta=1.0).item() == 0


def test_dpo_refuses_shapes_that_would_broadcast():
    with pytest.raises(TypeCheckError):
        losses.dpo_loss(*OURS, THEIRS[0][:1], THEIRS[1], beta=0.1)
