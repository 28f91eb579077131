"""MetaRM: J by hand, the look-ahead against two explicit steps in float64, and meta sets that are refused."""

import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from rmlib import data, metarm, models, ppo, training
from rmlib.metarm import Meta, MetaSet


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def meta(eta: float = 0.1, ascent: str = "gradient", **changes) -> Meta:
    return Meta(Path("nowhere.parquet"), eta, ascent, **changes)


@pytest.mark.parametrize(
    "wrong", [{"eta": 0.0}, {"eta": math.nan}, {"ascent": "adam"}, {"batch_size": 0}, {"responses": 3}], ids=str
)
def test_an_option_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Meta(**{"responses": Path("x"), "eta": 0.1} | wrong)


# ---------------------------------------------------------------- the difference loss


@pytest.mark.parametrize(("k", "least"), [(2, 0.25), (5, 0.4), (10, 0.45)])
def test_j_lies_between_its_value_for_equal_rewards_and_twice_that(k, least):
    assert metarm.difference_loss(torch.zeros(3, k)).item() == pytest.approx(least)
    apart = torch.arange(k)[None] * 1000.0
    assert metarm.difference_loss(apart).item() == pytest.approx(2 * least)
    between = metarm.difference_loss(random(1, k)).item()
    assert least < between < 2 * least


def test_j_of_logistic_values_that_are_known():
    """Rewards 0, log 3 and log 12: gaps log 3, log 4 and log 12 have logistics 3/4, 4/5 and 12/13."""
    rewards = torch.tensor([[0.0, math.log(3), math.log(12)]])
    total = 3 / 4 + 4 / 5 + 12 / 13
    assert metarm.difference_loss(rewards).item() == pytest.approx(2 / 9 * total, abs=1e-6)
    assert 2 / 9 * total != pytest.approx(total / 3, abs=0.1)  # 2 / (k (k - 1)) would make a mean of it


def test_j_is_a_mean_over_prompts_against_loops():
    rewards = random(4, 3)
    by_hand = [
        2 / 9 * sum(logistic(abs(row[i] - row[j])) for i in range(3) for j in range(i + 1, 3))
        for row in rewards.tolist()
    ]
    assert metarm.difference_loss(rewards).item() == pytest.approx(np.mean(by_hand))
    assert metarm.difference_loss(rewards).item() != pytest.approx(np.sum(by_hand), abs=0.1)


@given(prompts=st.integers(1, 4), k=st.integers(2, 6), seed=st.integers(0, 99))
def test_j_does_not_change_with_the_order_of_responses_or_a_constant_for_each_prompt(prompts, k, seed):
    rewards, rng = random(prompts, k, seed=seed), np.random.default_rng(seed)
    value = metarm.difference_loss(rewards).item()
    assert metarm.difference_loss(rewards[:, rng.permutation(k)]).item() == pytest.approx(value)
    assert metarm.difference_loss(rewards + 5 * random(prompts, 1, seed=1)).item() == pytest.approx(value)
    assert metarm.difference_loss(-rewards).item() == pytest.approx(value)  # it has no direction
    assert metarm.difference_loss(2 * rewards).item() > value


def test_the_gradient_of_j_drives_apart_and_is_nothing_at_a_tie():
    rewards = torch.tensor([[0.0, 1.0], [2.0, 2.0], [3.0, 3.0 + 1e-4]], requires_grad=True)
    metarm.difference_loss(rewards).backward()
    slope = logistic(1) * logistic(-1) * 2 / 4 / 3
    assert rewards.grad[0].tolist() == pytest.approx([-slope, slope])
    assert rewards.grad[1].tolist() == [0, 0]
    assert rewards.grad[2].tolist() == pytest.approx([-1 / 24, 1 / 24], abs=1e-4)  # just off a tie it is a quarter


@pytest.mark.parametrize("k", [0, 1])
def test_one_response_a_prompt_has_no_differences(k):
    with pytest.raises(ValueError, match=f"at least two responses a prompt, got {k}"):
        metarm.difference_loss(torch.zeros(3, k))


# ---------------------------------------------------------------- up, and back


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(random(30, 4).float()), nn.Parameter(random(50, seed=1).float())]


def moved(gradients: list[Tensor], how: Meta) -> list[Tensor]:
    """How far each parameter stands from where it was, within."""
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    with metarm.ascended(weights, gradients, how):
        return [weight.detach() - start for weight, start in zip(weights, before, strict=True)]


GRADIENTS = [random(30, 4, seed=2).float(), 10 * random(50, seed=3).float()]


@pytest.mark.parametrize("ascent", ["gradient", "normalised", "random"])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_come_back_bit_for_bit(ascent, fails):
    weights = parameters()
    try:
        with metarm.ascended(weights, GRADIENTS, meta(0.3, ascent)):
            assert all(not torch.equal(*pair) for pair in zip(weights, parameters(), strict=True))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert all(torch.equal(*pair) for pair in zip(weights, parameters(), strict=True))
    plus_and_minus = [weight.detach() + 0.3 * g - 0.3 * g for weight, g in zip(weights, GRADIENTS, strict=True)]
    assert not all(torch.equal(*pair) for pair in zip(weights, plus_and_minus, strict=True))  # to step back is not it


def test_the_gradient_step_is_eta_times_the_gradient():
    with metarm.ascended(weights := parameters(), GRADIENTS, meta(0.3)):
        for weight, start, gradient in zip(weights, parameters(), GRADIENTS, strict=True):
            assert torch.equal(weight, start.add(gradient, alpha=0.3))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_normalised_step_is_eta_in_root_mean_square_along_the_gradient(size):
    step = torch.cat([part.flatten() for part in moved([size * g for g in GRADIENTS], meta(0.3, "normalised"))])
    gradient = torch.cat([g.flatten() for g in GRADIENTS])
    assert step.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)
    assert torch.cosine_similarity(step, gradient, dim=0).item() == pytest.approx(1, abs=1e-6)
    apart = [0.3 * g / g.square().mean().sqrt() for g in GRADIENTS]  # one scale for each tensor would turn it
    assert torch.cosine_similarity(torch.cat([g.flatten() for g in apart]), gradient, dim=0).item() < 0.9


@pytest.mark.parametrize("ascent", ["gradient", "normalised"])
def test_no_gradient_is_no_step(ascent):
    assert all((part == 0).all() for part in moved([torch.zeros_like(g) for g in GRADIENTS], meta(1.0, ascent)))


# ---------------------------------------------------------------- a whole step, in float64


class Numbers(MetaSet):
    """Responses that are rows of numbers, (prompts, k, features), rewarded in float64."""

    def __init__(self, numbers: Tensor):
        self.numbers, (self.size, self.k) = numbers, numbers.shape[:2]

    def rewards(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        return reward(model, self.numbers[rows])


def reward(model: nn.Module, numbers: Tensor) -> Tensor:
    return model(numbers)[..., 0]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()


CHOSEN, REJECTED, SAID = random(16, 4, seed=4), random(16, 4, seed=5), Numbers(random(6, 3, 4, seed=6))
BATCHES = [np.arange(start, start + 4) % 16 for start in range(0, 32, 4)]
FREE = training.Optimisation(lr=1e-2, batch_size=4, schedule="constant", warmup_ratio=0.0, max_grad_norm=1e9)


def batch_of(rows: np.ndarray) -> dict[str, Tensor]:
    return {"chosen": CHOSEN[rows], "rejected": REJECTED[rows]}


def ranking(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.softplus(reward(model, batch["rejected"]) - reward(model, batch["chosen"])).mean()


def trained(ahead: Meta | None, batches=BATCHES) -> tuple[Tensor, list[dict]]:
    """Weights and log of the loop, with the look-ahead or without."""
    net, record = model(), {"log": []}
    more = {} if ahead is None else {"ahead": metarm.look_ahead(ahead, SAID, 7)}
    training.fit(net, batches, batch_of, ranking, FREE, record=record, **more)
    return nn.utils.parameters_to_vector(net.parameters()).detach(), record["log"]


def drawn(step: int, n: int) -> np.ndarray:
    return np.random.default_rng([7, step]).permutation(6)[:n]


def in_two_steps(ahead: Meta, sign: float = 1.0) -> tuple[Tensor, list[dict]]:
    """The same by Algorithm 1, with a second model that stands at theta'; ``sign`` -1 would go down on J."""
    net, log = model(), []
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for step, rows in enumerate(BATCHES):
        there = copy.deepcopy(net)
        rewards = SAID.rewards(net, drawn(step, ahead.batch_size))
        objective = metarm.difference_loss(rewards)
        uphill = torch.autograd.grad(objective, net.parameters())
        size = torch.cat([g.flatten() for g in uphill]).square().mean().sqrt()
        with torch.no_grad():
            for weight, g in zip(there.parameters(), uphill, strict=True):
                weight += sign * ahead.eta * (g / size if ahead.ascent == "normalised" else g)
        loss = ranking(there, batch_of(rows))
        for weight, g in zip(net.parameters(), torch.autograd.grad(loss, there.parameters()), strict=True):
            weight.grad = g
        optimiser.step()
        seen = {"difference_loss": objective.item(), "spread": rewards.std(dim=1).mean().item()}
        log.append({"step": step + 1, "loss": loss.item()} | seen)
    return nn.utils.parameters_to_vector(net.parameters()).detach(), log


@pytest.mark.parametrize("ahead", [meta(0.5, batch_size=4), meta(0.05, "normalised", batch_size=4)], ids=str)
def test_a_training_is_that_of_two_explicit_steps_and_no_other(ahead):
    ours, log = trained(ahead)
    by_hand, logged = in_two_steps(ahead)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-12)
    assert [row.keys() for row in log] == [row.keys() for row in logged]
    for row, other in zip(log, logged, strict=True):
        assert row == pytest.approx(other, abs=1e-12)
    for wrong in (trained(None)[0], in_two_steps(ahead, sign=-1.0)[0]):
        assert (ours - wrong).abs().max() > 1e-4


def test_with_a_vanishing_eta_the_training_is_the_plain_one():
    plain, log = trained(None)
    assert [list(row) for row in log] == [["step", "loss"]] * 8
    far = [(trained(meta(eta, batch_size=4))[0] - plain).abs().max().item() for eta in (1e-9, 1e-2, 1.0)]
    assert far[0] < 1e-7
    assert far[0] < far[1] < far[2]


def test_the_step_starts_from_where_it_was_and_not_from_where_it_looked():
    """With a rate of nothing the weights stay, however far the look ahead goes."""
    net = model()
    still = training.Optimisation(lr=0.0, batch_size=4)
    training.fit(net, BATCHES, batch_of, ranking, still, ahead=metarm.look_ahead(meta(10.0), SAID, 7))
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), model().parameters(), strict=True))


def test_weights_that_need_no_gradient_take_no_part_in_the_look_ahead():
    net = model()
    net[0].weight.requires_grad_(False)
    training.fit(net, BATCHES[:1], batch_of, ranking, FREE, ahead=metarm.look_ahead(meta(), SAID, 7))
    assert torch.equal(net[0].weight, model()[0].weight)
    assert not torch.equal(net[2].weight, model()[2].weight)


# ---------------------------------------------------------------- the control that looks anywhere


def looked(seed: int, step: int, ascent: str = "random", eta: float = 0.3) -> Tensor:
    """How far every weight stands from the start where a step finds its gradient, flat."""
    net = model()
    with metarm.look_ahead(meta(eta, ascent), SAID, seed)(net, step, training.accelerator()):
        there = nn.utils.parameters_to_vector(net.parameters()).detach()
    return there - nn.utils.parameters_to_vector(model().parameters()).detach()


def alike(one: Tensor, other: Tensor) -> float:
    return abs(torch.cosine_similarity(one, other, dim=0).item())


def test_the_control_goes_as_far_as_the_look_ahead_and_nowhere_near_its_way():
    uphill = [looked(7, step, "normalised") for step in range(8)]
    anywhere = [looked(7, step) for step in range(8)]
    for one, other in zip(uphill, anywhere, strict=True):
        assert one.square().mean().sqrt().item() == pytest.approx(0.3)
        assert other.square().mean().sqrt().item() == pytest.approx(0.3)
    assert np.mean([alike(*pair) for pair in zip(uphill, anywhere, strict=True)]) < 0.3  # of 36 weights
    assert looked(7, 0).sign().unique().numel() == 2


def test_the_way_of_the_control_repeats_with_seed_and_step_and_differs_with_each():
    assert torch.equal(looked(7, 3), looked(7, 3))
    assert alike(looked(7, 3), looked(7, 4)) < 0.6
    assert alike(looked(7, 3), looked(8, 3)) < 0.6


def test_the_control_logs_what_it_saw_from_here_as_the_look_ahead_does():
    seen = [trained(meta(0.05, ascent, batch_size=4), BATCHES[:1])[1][0] for ascent in ("normalised", "random")]
    assert [list(row) for row in seen] == [["step", "loss", "difference_loss", "spread"]] * 2
    for name in ("difference_loss", "spread"):
        assert seen[0][name] == seen[1][name]
    assert seen[0]["loss"] != pytest.approx(seen[1]["loss"], abs=1e-6)


# ---------------------------------------------------------------- what first order leaves out


def first_order(eta: float) -> dict[str, Tensor]:
    """The gradient that a step of the loop takes."""
    net, still = model(), training.Optimisation(lr=0.0, batch_size=4, max_grad_norm=1e9)
    training.fit(net, BATCHES[:1], batch_of, ranking, still, ahead=metarm.look_ahead(meta(eta, batch_size=6), SAID, 7))
    return {name: weight.grad for name, weight in net.named_parameters()}


def through(eta: float) -> dict[str, Tensor]:
    """Gradient of the ranking loss at theta + eta grad J(theta) in theta itself, through the step."""
    net = model()
    weights = dict(net.named_parameters())
    uphill = torch.autograd.grad(
        metarm.difference_loss(reward(net, SAID.numbers)), list(weights.values()), create_graph=True
    )
    there = {name: weight + eta * g for (name, weight), g in zip(weights.items(), uphill, strict=True)}
    scored = [functional_call(net, there, (side[BATCHES[0]],))[..., 0] for side in (REJECTED, CHOSEN)]
    loss = nn.functional.softplus(scored[0] - scored[1]).mean()
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def uphill_at(way: dict[str, Tensor], length: float) -> Tensor:
    """Gradient of J at ``length`` along ``way`` from the start, flat."""
    net = model()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight += length * way[name]
    found = torch.autograd.grad(metarm.difference_loss(reward(net, SAID.numbers)), list(net.parameters()))
    return torch.cat([g.flatten() for g in found])


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def test_the_second_order_term_is_eta_times_the_curvature_of_j_along_the_gradient():
    """The exact gradient is (1 + eta H) g with g taken ahead; H g here by differences of J's gradient."""
    left_out = {}
    for eta in (0.01, 0.1, 1.0):
        taken = first_order(eta)
        curvature = (uphill_at(taken, 1e-4) - uphill_at(taken, -1e-4)) / 2e-4
        left_out[eta] = flat(through(eta)) - flat(taken)
        torch.testing.assert_close(left_out[eta], eta * curvature, rtol=1e-4, atol=1e-8)
        assert (left_out[eta] + eta * curvature).norm() > left_out[eta].norm()  # the other sign
    assert left_out[0.01].norm() < 0.02 * left_out[1.0].norm()
    assert left_out[0.01].norm() / 0.01 == pytest.approx((left_out[0.1].norm() / 0.1).item(), rel=0.1)
    assert left_out[1.0].norm() > 0.01 * flat(first_order(1.0)).norm()  # for a large eta it is something


# ---------------------------------------------------------------- which prompts a step sees


def prompts_seen(seed: int, steps: range, batch_size: int = 4) -> list[list[int]]:
    seen, machine = [], training.accelerator()

    class Noting(Numbers):
        def rewards(self, model: nn.Module, rows: np.ndarray) -> Tensor:
            seen.append(rows.tolist())
            return super().rewards(model, rows)

    ahead = metarm.look_ahead(meta(batch_size=batch_size), Noting(SAID.numbers), seed)
    for step in steps:
        with ahead(model(), step, machine):
            pass
    return seen


def test_the_prompts_of_a_step_follow_from_seed_and_step_alone():
    all_steps = prompts_seen(3, range(8))
    assert prompts_seen(3, range(5, 8)) == all_steps[5:]
    assert prompts_seen(4, range(8)) != all_steps
    assert len({tuple(rows) for rows in all_steps}) > 4
    assert all(len(set(rows)) == 4 for rows in all_steps)
    assert {i for rows in all_steps for i in rows} == set(range(6))


def test_a_batch_larger_than_the_meta_set_is_all_of_it():
    assert [sorted(rows) for rows in prompts_seen(0, range(3), batch_size=99)] == [[0, 1, 2, 3, 4, 5]] * 3


# ---------------------------------------------------------------- meta sets


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save_causal(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return tiny.save_features(tmp_path_factory.mktemp("features") / "features.safetensors")


def save(folder: Path, table: pd.DataFrame) -> Path:
    table.to_parquet(folder / "meta.parquet")
    return folder / "meta.parquet"


@torch.no_grad()
def alone(base: Path, table: pd.DataFrame) -> pd.Series:
    """Reward of each response by itself, in the order of the table."""
    net = models.reward_model(base, head_seed=0).eval()
    if models.is_features(base):
        known, ids = models.load_features(base)
        found = torch.cat([net.score(net(known[[ids.index(name)]]))[0] for name in table["response_id"]])
    else:
        found = ppo.reward_of_texts(net, tiny.tokenizer(), batch_size=1)(list(table["prompt"]), list(table["response"]))
    return pd.Series(found.numpy(), table.index)


@torch.no_grad()
@pytest.mark.parametrize("order", ["together", "apart"])
@pytest.mark.parametrize("base", ["llama", "features"])
def test_the_rewards_of_a_batch_are_those_of_each_response_by_itself(tmp_path, request, base, order):
    base, table = request.getfixturevalue(base), tiny.responses(6, k=3)
    if order == "apart":
        table = table.sample(frac=1, random_state=0).reset_index(drop=True)
    meta_set = MetaSet(save(tmp_path, table), base, 64)
    assert (meta_set.size, meta_set.k) == (6, 3)
    table["reward"] = alone(base, table)
    by_hand = np.stack(list(table.groupby("prompt", sort=False)["reward"].agg(list)))
    rows = np.array([4, 0, 3])
    ours = meta_set.rewards(models.reward_model(base, head_seed=0).eval(), rows)
    assert ours.numpy() == pytest.approx(by_hand[rows], abs=1e-5)
    assert ours.numpy() != pytest.approx(by_hand[rows].T, abs=1e-2)  # a batch has the first of each, then the second
    assert ours.numpy() != pytest.approx(by_hand[[0, 3, 4]], abs=1e-2)


def test_a_batch_of_texts_is_one_row_a_prompt(tmp_path, llama):
    table = tiny.responses(3, k=4)
    meta_set, words = MetaSet(save(tmp_path, table), llama, 64), tiny.tokenizer()
    batch = meta_set.collate(np.array([2]))
    asked, said = table["prompt"].iloc[-1], table["response"].iloc[-4:].to_list()
    ids = [*data.prompt_ids([asked], words), *data.response_ids(said, words)]
    assert batch["input_ids"].tolist() == [np.concatenate(ids).tolist()]
    assert batch["at"].shape == (1, 4)


def refused(folder: Path, table: pd.DataFrame, base: Path, message: str, max_length: int = 64) -> None:
    path = save(folder, table)
    with pytest.raises(ValueError, match=message) as error:
        MetaSet(path, base, max_length)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("base", ["llama", "features"])
def test_a_column_that_is_missing_is_named_with_its_file(tmp_path, request, base):
    needed = {"llama": "response", "features": "response_id"}[base]
    base, table = request.getfixturevalue(base), tiny.responses(4)
    refused(tmp_path, table.drop(columns=needed), base, rf"meta\.parquet: no column {needed}; there are prompt, ")
    MetaSet(save(tmp_path, table[["prompt", needed]]), base, 64)  # and none but these is needed
    refused(tmp_path, table[["response"]].rename(columns=str.upper), base, f"no column prompt, {needed}; .* RESPONSE")


@pytest.mark.parametrize("base", ["llama", "features"])
@pytest.mark.parametrize(
    ("left", "has"), [([0, 3, 6], "1 to 1"), ([0, 1, 2, 3, 4], "2 to 3"), ([0, 1, 2, 3], "1 to 3"), ([], "no")], ids=str
)
def test_a_prompt_with_another_number_of_responses_or_one_alone_is_refused(tmp_path, request, base, left, has):
    table = tiny.responses(3, k=3).iloc[left]
    refused(tmp_path, table, request.getfixturevalue(base), f"as many responses to each prompt, .* it has {has}")


def test_a_text_that_is_too_long_is_told_with_its_prompt_and_length(tmp_path, llama):
    """Beginning, two words, separator, ten words, end: 15 tokens."""
    table = tiny.responses(4, k=2)
    table.loc[4:5, "prompt"], table.loc[5, "response"] = "two eight", " ".join(["bad"] * 10)
    assert MetaSet(save(tmp_path, table), llama, 15).size == 4
    refused(tmp_path, table, llama, "'two eight' and a response: 15 tokens exceed 14", max_length=14)


def test_a_response_without_features_is_named(tmp_path, features):
    table = tiny.responses(4)
    table.loc[5, "response_id"] = "nobody"
    refused(tmp_path, table, features, "no features of response 'nobody'")
