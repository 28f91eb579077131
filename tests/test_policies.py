"""Policies' worth by hand: best of n, distances, verdicts, critics, and the unit that trains one."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from rmlib import models, policies, ppo, world

# ---------------------------------------------------------------- best of n


def best_by_listing(proxy: np.ndarray, gold: np.ndarray, k: int) -> float:
    """Mean over prompts and over all subsets of size k of the gold of the one that proxy likes best."""
    picks = [
        row_gold[max(subset, key=lambda i: row_proxy[i])]
        for row_proxy, row_gold in zip(proxy, gold, strict=True)
        for subset in combinations(range(proxy.shape[1]), k)
    ]
    return float(np.mean(picks))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_best_of_k_is_the_mean_over_all_subsets(k):
    proxy, gold = np.random.default_rng(0).normal(size=(2, 4, 5))
    assert policies.best_of(proxy, gold, k) == pytest.approx(best_by_listing(proxy, gold, k))
    assert policies.best_of(proxy, gold, k) != pytest.approx(best_by_listing(-proxy, gold, k)) or k == 1


def test_best_of_one_is_the_mean_and_best_of_all_is_the_favourite():
    proxy, gold = np.array([[0.0, 2.0, 1.0]]), np.array([[5.0, -1.0, 2.0]])
    assert policies.best_of(proxy, gold, 1) == pytest.approx(2.0)
    assert policies.best_of(proxy, gold, 3) == pytest.approx(-1.0)


@pytest.mark.parametrize("k", [0, 4])
def test_more_than_there_are_cannot_be_drawn(k):
    with pytest.raises(ValueError, match=f"best of {k} among 3"):
        policies.best_of(np.zeros((1, 3)), np.zeros((1, 3)), k)


def test_the_distance_of_best_of_n_is_that_of_its_ranks():
    """Without ties the best of k has density k F^(k-1), so the KL is the integral of its logarithm."""
    ranks = (np.arange(200_000) + 0.5) / 200_000
    for k in (1, 2, 8):
        density = k * ranks ** (k - 1)
        assert policies.best_of_kl(k) == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)


# ---------------------------------------------------------------- over-optimisation and equal KL


@pytest.mark.parametrize(("kind", "shape"), [("rl", lambda d: d * np.log(d)), ("best_of_n", np.square)])
def test_the_fit_finds_the_curve_that_made_the_points(kind, shape):
    distance = np.linspace(0.3, 4, 12)
    gain = 1.7 * distance - 0.4 * shape(distance)
    assert policies.over_optimisation(distance, gain, kind) == pytest.approx((1.7, 0.4))
    other = "best_of_n" if kind == "rl" else "rl"
    assert policies.over_optimisation(distance, gain, other) != pytest.approx((1.7, 0.4), abs=0.05)


def test_an_unknown_form_of_over_optimisation_raises():
    with pytest.raises(ValueError, match="'ppo'; choose from rl, best_of_n"):
        policies.over_optimisation(np.ones(3), np.ones(3), "ppo")


def test_values_at_equal_kl_are_read_between_the_first_two_steps_around_it():
    kl, values = np.array([0.0, 1.0, 0.5, 3.0]), np.array([10.0, 20.0, 99.0, 40.0])
    assert policies.at_kl(kl, values, 0.25) == pytest.approx(12.5)
    assert policies.at_kl(kl, values, 1.0) == pytest.approx(20.0)
    assert policies.at_kl(kl, values, 1.75) == pytest.approx(99 - 59 / 2)
    assert policies.at_kl(kl, values, 0.0) == 10.0
    assert np.isnan(policies.at_kl(kl, values, 3.1))


# ---------------------------------------------------------------- judging, critics, answers


def test_wins_ties_and_losses_are_shares_with_a_tie_band():
    shares = policies.win_tie_lose(world.Judge(), np.array([1.0, 0.05, 0.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert shares == {"win": 0.5, "tie": 0.25, "lose": 0.25}


def test_a_critic_gives_the_rewards_on_the_common_scale_and_may_learn_a_bias():
    model, states = tiny.causal_reward_model(), torch.randn(5, 16)
    rewards = model.score(states)
    critic = policies.critic_of(model, mean=0.7, std=2.0)
    torch.testing.assert_close(critic.score(states), (rewards - 0.7) / 2.0)
    assert critic.score.bias.requires_grad
    assert critic.score.weight.requires_grad


def test_answers_stand_in_the_order_of_the_questions(tmp_path):
    """A greedy model answers each prompt as it would alone, whatever the batches."""
    folder = tiny.save_causal(tmp_path / "sft")
    model, words = models.load_language_model(folder), models.load_tokenizer(folder)
    prompts = ["one", "two three four five", "six", "seven eight one", "two"]
    greedy = {"max_new_tokens": 5, "temperature": 1e-4}
    together = policies.answer(model, words, prompts, seed=0, batch_size=2, **greedy)
    alone = [policies.answer(model, words, [prompt], seed=0, **greedy)[0] for prompt in prompts]
    assert together == alone
    assert len(set(alone)) > 1


@pytest.fixture
def run(tmp_path) -> policies.PolicyRun:
    sft, reward_model = tiny.save_llama(tmp_path / "sft"), tmp_path / "rm"
    models.save_reward_model(models.reward_model(sft, head_seed=0), reward_model)
    settings = ppo.Settings(steps=2, lr=1.0e-2, critic_lr=1.0e-2, max_new_tokens=6, batch_size=4)
    prompts = ("one two", "three", "four five six", "seven")
    return policies.PolicyRun("toy", sft, reward_model, prompts, prompts, settings, 0, reward_mean=0.5, reward_std=2.0)


def test_a_unit_leaves_its_log_its_samples_its_answers_and_a_checkpoint(run, tmp_path):
    policies.train_policy_run(run, tmp_path)
    log, answers = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("log", "answers"))
    assert log["step"].tolist() == [1, 2]
    assert answers["prompt"].tolist() == list(run.asked)
    words, policy = models.load_tokenizer(tmp_path / "model"), models.load_language_model(tmp_path / "model")
    rewards = ppo.reward_of_texts(models.load_reward_model(run.reward_model), words, mean=0.5, std=2.0)
    assert answers["reward"].tolist() == pytest.approx(rewards(list(run.asked), list(answers["response"])).tolist())
    before = models.load_language_model(run.policy).state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in policy.state_dict().items())


def test_no_two_policies_answer_from_the_same_random_numbers(run, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(policies, "answer", lambda *given, seed, **more: seeds.append(seed) or [""] * len(run.asked))
    for name in ("toy", "other"):
        policies.train_policy_run(policies.PolicyRun(**vars(run) | {"name": name}), tmp_path)
    assert len(set(seeds)) == 2
