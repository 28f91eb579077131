"""Policies' worth by hand: best of n, distances, verdicts, critics, and the unit that trains one."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from rmlib import models, policies, ppo, records, runs, world

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


# ---------------------------------------------------------------- committees and references


def members(folder: Path) -> tuple[tuple[Path, float, float], ...]:
    """Three reward models of large weights, each with a mean and a standard deviation of its own."""
    base, out = tiny.save_causal(folder / "base"), []
    for seed, mean, std in ((1, 0.3, 1.0), (2, -0.1, 2.0), (3, 0.0, 0.7)):
        models.save_reward_model(models.reward_model(base, head_seed=seed), folder / f"rm-{seed}")
        out.append((folder / f"rm-{seed}", mean, std))
    return tuple(out)


def paid_by_three(run: policies.PolicyRun, folder: Path, **changes) -> policies.PolicyRun:
    (path, mean, std), *others = members(folder)
    return replace(run, reward_model=path, reward_mean=mean, reward_std=std, committee=tuple(others), **changes)


def paid_by_each(run: policies.PolicyRun, said: list[str]) -> np.ndarray:
    """What every reward model gives to the answers of ``run``, on its own scale, shape (members, answers)."""
    everyone, out = ((run.reward_model, run.reward_mean, run.reward_std), *run.committee), []
    for path, mean, std in everyone:
        model, words = models.load_reward_model(path), models.load_tokenizer(run.policy)
        out.append([(v - mean) / std for v in ppo.reward_of_texts(model, words)(list(run.asked), said).tolist()])
    return np.array(out)


@pytest.mark.parametrize("rule", ["mean", "worst", "mean - std"])
def test_a_committee_pays_by_its_rule_each_member_on_its_own_scale(run, tmp_path, rule):
    asked = tuple(" ".join(words) for words in combinations(("one", "two", "three", "four", "five"), 2))
    run = paid_by_three(run, tmp_path, rule=rule, asked=asked)
    (tmp_path / "unit").mkdir()
    policies.train_policy_run(run, tmp_path / "unit")
    answers = pd.read_parquet(tmp_path / "unit" / "answers.parquet")
    paid = paid_by_each(run, list(answers["response"]))
    by_rule = {"mean": paid.mean(0), "worst": paid.min(0), "mean - std": paid.mean(0) - paid.std(0)}
    assert answers["reward"].to_numpy() == pytest.approx(by_rule.pop(rule), abs=1e-5)
    for wrong in (*paid, *by_rule.values()):
        assert answers["reward"].to_numpy() != pytest.approx(wrong, abs=1e-3)


def test_a_committee_pays_while_the_policy_trains(run, tmp_path):
    """Every logged reward is what the rule gives to that step's responses: here all members agree on a constant."""
    model = models.load_reward_model(run.reward_model)
    torch.nn.init.zeros_(model.score.weight)
    models.save_reward_model(model, tmp_path / "nothing")
    flat = replace(run, reward_model=tmp_path / "nothing", reward_mean=-4.0, reward_std=2.0)  # pays 2
    flat = replace(flat, committee=((tmp_path / "nothing", -5.0, 1.0),))  # pays 5
    for rule, paid in (("mean", 3.5), ("worst", 2.0), ("mean - std", 2.0)):
        policies.train_policy_run(replace(flat, rule=rule), tmp_path)
        assert pd.read_parquet(tmp_path / "log.parquet")["reward"].tolist() == pytest.approx([paid, paid])


def test_an_unknown_rule_of_a_committee_raises(run, tmp_path):
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        policies.train_policy_run(paid_by_three(run, tmp_path, rule="best"), tmp_path)


def test_divergence_counts_from_the_reference_that_is_named(run, tmp_path):
    other = tiny.save_causal(tmp_path / "other")
    first = {}
    for name, reference in (("none", None), ("same", run.policy), ("other", other)):
        policies.train_policy_run(replace(run, reference=reference), tmp_path)
        first[name] = pd.read_parquet(tmp_path / "log.parquet").drop(columns=["sampling", "learning"])
    pd.testing.assert_frame_equal(first["same"], first["none"])
    assert first["none"]["kl"][0] == pytest.approx(0, abs=1e-5)
    assert first["other"]["kl_k3"][0] > 0.03


def test_the_key_of_a_policy_follows_its_committee_its_rule_and_its_reference(run, tmp_path):
    committee = members(tmp_path)
    changes = [{}, {"committee": committee}, {"committee": committee[:1]}, {"committee": committee, "rule": "worst"}]
    changes += [{"reference": tiny.save_causal(tmp_path / "other")}]
    assert len({runs.content_key(replace(run, **change)) for change in changes}) == len(changes)


# ---------------------------------------------------------------- answers drawn once


@pytest.fixture
def drawn(tmp_path) -> policies.SampleRun:
    prompts = ("one two", "three", "one two", "four five six seven")
    return policies.SampleRun("said", tiny.save_llama(tmp_path / "sft"), prompts, 3, {"max_new_tokens": 8})


def sampled(run: policies.SampleRun, folder: Path) -> pd.DataFrame:
    policies.sample(run, folder)
    return pd.read_parquet(folder / "answers.parquet")


def test_samples_stand_by_draw_and_place_even_where_a_prompt_comes_twice(drawn, tmp_path):
    said = sampled(drawn, tmp_path)
    assert said["draw"].tolist() == [k for k in range(3) for _ in range(4)]
    assert said["place"].tolist() == [0, 1, 2, 3] * 3
    assert said["prompt"].tolist() == [drawn.prompts[i] for i in said["place"]]
    assert said["response"].nunique() > 8  # the same prompt is answered anew, and every draw differs


def test_samples_are_answers_to_the_prompt_beside_them(drawn, tmp_path):
    """A greedy model answers a prompt as it would alone."""
    base = tiny.save_causal(tmp_path / "base")
    greedy = {"max_new_tokens": 5, "temperature": 1e-4}
    said = sampled(replace(drawn, policy=base, sampling=greedy), tmp_path)
    model, words = models.load_language_model(base), models.load_tokenizer(base)
    alone = {prompt: policies.answer(model, words, [prompt], seed=0, **greedy)[0] for prompt in drawn.prompts}
    assert said["response"].tolist() == [alone[prompt] for prompt in said["prompt"]]
    assert len(set(alone.values())) > 1


def test_samples_repeat_and_another_seed_or_temperature_draws_others(drawn, tmp_path):
    first = sampled(drawn, tmp_path)
    torch.manual_seed(99)
    assert sampled(drawn, tmp_path).equals(first)
    assert sampled(replace(drawn, name="other"), tmp_path).equals(first)
    longer = sampled(replace(drawn, n_draws=4), tmp_path)
    assert longer[:12].equals(first)
    for change in ({"seed": 1}, {"sampling": {"max_new_tokens": 8, "temperature": 0.5}}):
        assert not sampled(replace(drawn, **change), tmp_path).equals(first)


# ---------------------------------------------------------------- what a chapter of policies shares


def save_prompts(path, splits: dict[str, int]) -> pd.DataFrame:
    rows = [(f"{split}-{i}", split) for split, n in splits.items() for i in range(n)]
    table = pd.DataFrame(rows, columns=["prompt", "split"]).assign(subset="helpful")
    table.to_parquet(path)
    return table


def test_policies_are_trained_on_prompts_of_their_own_and_asked_others(tmp_path):
    save_prompts(tmp_path / "prompts", {"train": 3, "policy": 5, "ood": 4})
    prompts, questions = policies.questions_of({"prompts": tmp_path / "prompts"}, 0, 2)
    assert prompts == ["policy-0", "policy-1", "policy-2"]
    assert questions["prompt"].tolist() == ["policy-3", "policy-4", "ood-0", "ood-1"]
    assert questions["kind"].tolist() == 2 * ["in distribution"] + 2 * ["out of distribution"]
    assert not set(prompts) & set(questions["prompt"])


def test_prompts_of_a_preference_set_are_taken_once(tmp_path):
    table = save_prompts(tmp_path / "set", {"train": 4, "validation": 3})
    pd.concat([table, table]).to_parquet(tmp_path / "set")
    prompts, questions = policies.questions_of({"preferences_7": tmp_path / "set"}, 7, 2)
    assert prompts == ["train-0", "train-1"]
    assert questions["prompt"].tolist() == ["train-2", "train-3", "validation-0", "validation-1"]


@pytest.mark.parametrize(("n_asked", "good"), [(4, True), (5, False), (6, False)])
def test_too_few_prompts_are_counted(tmp_path, n_asked, good):
    """Of five prompts of its own one at least must be left to train on; all of the others may be asked."""
    save_prompts(tmp_path / "prompts", {"policy": 5, "ood": 4})
    if good:
        assert len(policies.questions_of({"prompts": tmp_path / "prompts"}, 0, n_asked)[0]) == 1
        return
    with pytest.raises(ValueError, match=f"n_asked = {n_asked}, but there are 5 and 4 prompts"):
        policies.questions_of({"prompts": tmp_path / "prompts"}, 0, n_asked)


def test_the_scale_is_the_spread_within_a_prompt_in_distribution():
    kinds = ["in distribution"] * 4 + ["out of distribution"] * 2
    said = pd.DataFrame({"kind": kinds, "prompt": list("aabbcc"), "gold": [0.0, 1.0, 5.0, 4.0, 0.0, 9.0]})
    rewards = np.array([10.0, 12.0, 0.0, 2.0, 50.0, -50.0])
    row = policies.reward_scale(said, {(3, "margin"): rewards}).iloc[0]
    assert (row["seed"], row["arm"], row["mean"]) == (3, "margin", 6.0)
    assert row["std"] == pytest.approx(np.sqrt(2), abs=1e-4)  # of all four together it would be 5.9
    assert row["correlation"] == pytest.approx(-0.8)  # ranks 3 4 1 2 against 1 2 4 3
    assert row["within a prompt"] == pytest.approx(0.0)
    assert "correlation" not in policies.reward_scale(said.drop(columns="gold"), {(3, "margin"): rewards})


def test_tables_of_finished_policies_are_told_apart_and_their_answers_numbered(tmp_path):
    questions = pd.DataFrame({"kind": "in distribution", "subset": ["x", "y"], "prompt": ["a", "b"]})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for part in ("log", "samples"):
            pd.DataFrame({"step": [1, 2]}).to_parquet(tmp_path / name / f"{part}.parquet")
        table = pd.DataFrame({"prompt": list("abab"), "response": [f"{name}{k}" for k in range(4)]})
        table.to_parquet(tmp_path / name / "answers.parquet")
    keys = {("margin", "raw", 0): tmp_path / "one", ("margin", "raw", 1): tmp_path / "two"}
    parts = policies.read_runs(keys, questions)
    assert {name: len(table) for name, table in parts.items()} == {"log": 4, "answers": 8, "samples": 4}
    second = parts["answers"].query("seed == 1").set_index("response")
    assert second["draw"].to_dict() == {"two0": 0, "two1": 0, "two2": 1, "two3": 1}
    assert second["subset"].to_dict() == {"two0": "x", "two1": "y", "two2": "x", "two3": "y"}


def test_the_answers_of_the_first_model_are_drawn_once_and_differ_by_draw(tmp_path, monkeypatch):
    base = tiny.save_llama(tmp_path / "base")
    questions = pd.DataFrame({"kind": "in distribution", "subset": "x", "prompt": ["one two", "three"]})
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    run = records.Run("02b_policies", "tiny", {})
    said = policies.sft_answers(run, base, questions, 3, {"max_new_tokens": 8})
    assert said.groupby("draw")["prompt"].apply(list).tolist() == 3 * [["one two", "three"]]
    assert said["response"].nunique() > 2
    monkeypatch.setattr(policies, "answer", None)  # what stands is not drawn again
    assert policies.sft_answers(run, base, questions, 3, {"max_new_tokens": 8}).equals(said)
