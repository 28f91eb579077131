"""PPO: functions by hand or against a loop, junk in padding, wrong forms that must fail, tasks to be learned."""

import copy
import functools
import importlib
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, install_import_hook
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import rmlib
from rmlib import data, models, ppo, training

WORDS = tiny.tokenizer()
PAD, EOS = WORDS.pad_token_id, WORDS.eos_token_id
PROMPTS = ["four five six", "three", "one two"]
JUNK = pytest.mark.parametrize("junk", [math.nan, 1e9], ids=["nan", "huge"])
LOG2 = math.log(2)


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor([values], requires_grad=grad)


def settings(**changes) -> ppo.Settings:
    usual = {"steps": 6, "lr": 1e-2, "critic_lr": 1e-2, "max_new_tokens": 4, "batch_size": 8, "num_ppo_epochs": 2}
    return ppo.Settings(**(usual | changes))


def actor_critic(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """An untrained policy, which says every word about equally often, and an untrained critic."""
    policy = models.small_llama(WORDS, hidden_size=16, layers=1, heads=2, max_length=32, seed=seed).eval()
    return policy, LlamaForSequenceClassification(LlamaConfig(**policy.config.to_dict() | {"num_labels": 1})).eval()


def says_good(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("good" in text.split()) for text in responses]


def begins_low(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(text.split()[:1] in (["one"], ["two"], ["three"], ["four"])) for text in responses]


def always_one(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


# ---------------------------------------------------------------- advantages


def sum_of_errors(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Advantages of one response, by their definition."""
    steps = range(len(values))
    errors = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in steps[t:]) for t in steps]


SHARES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), gamma=SHARES, lam=SHARES, seed=st.integers(0, 99))
def test_advantages_equal_a_loop_over_each_response(lengths, gamma, lam, seed):
    mask = mask_of(*lengths)
    rewards, values = normal(2, *mask.shape, seed=seed)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, n in enumerate(lengths):
        by_hand = sum_of_errors(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(by_hand, abs=1e-9)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_advantages_by_hand():
    rewards, values, mask = row(1.0, 2.0, 4.0), row(0.5, 1.0, 3.0), mask_of(3)
    monte_carlo = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)  # what is still to come, minus the value
    assert monte_carlo[0].tolist() == [[6.5, 5.0, 1.0]]
    assert monte_carlo[1].tolist() == [[7.0, 6.0, 4.0]]
    assert ppo.gae(rewards, values, mask, gamma=1.0, lam=0.0)[0].tolist() == [[1.5, 4.0, 1.0]]
    assert ppo.gae(rewards, values, mask, gamma=0.0, lam=1.0)[0].tolist() == [[0.5, 1.0, 1.0]]
    assert ppo.gae(rewards, values, mask, gamma=0.5, lam=0.5)[0].tolist() == [[1.6875, 2.75, 1.0]]


@JUNK
def test_advantages_ignore_what_stands_past_the_end(junk):
    mask = mask_of(3, 5, 1)
    rewards, values = normal(2, *mask.shape)
    clean = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    spoilt = [tensor.masked_fill(~mask, junk) for tensor in (rewards, values)]
    torch.testing.assert_close(ppo.gae(*spoilt, mask, gamma=0.9, lam=0.8), clean, rtol=0, atol=0)
    leaking = ppo.gae(*spoilt, torch.ones_like(mask), gamma=0.9, lam=0.8)[0]
    assert not torch.allclose(leaking[mask], clean[0][mask], atol=1.0)


# ---------------------------------------------------------------- rewards


def test_the_score_lands_on_the_last_real_token():
    scores, same = torch.tensor([5.0, -7.0, 2.0]), torch.zeros(3, 3)
    rewards = ppo.shape_rewards(scores, same, same, mask_of(3, 1, 2), kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 5], [-7, 0, 0], [0, 2, 0]]


def test_rewards_by_hand_cost_what_the_policy_is_surer_of_than_its_reference():
    logprobs, ref_logprobs = row(-1.0, -1.0 - LOG2, -2.0), row(-1.0 - LOG2, -1.0, -2.0)
    shape = functools.partial(ppo.shape_rewards, torch.tensor([3.0]), logprobs, ref_logprobs, mask_of(3))
    assert shape(kl_coef=0.1)[0].tolist() == pytest.approx([-0.1 * LOG2, 0.1 * LOG2, 3.0], abs=1e-6)
    k3 = [-0.1 * (0.5 - 1 + LOG2), -0.1 * (2 - 1 - LOG2), 3.0]
    assert shape(kl_coef=0.1, kl_estimator="k3")[0].tolist() == pytest.approx(k3, abs=1e-6)
    assert shape(kl_coef=0.0)[0].tolist() == [0, 0, 3]


@JUNK
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_rewards_ignore_junk_in_padding(junk, estimator):
    mask = mask_of(2, 4)
    logprobs, ref_logprobs = normal(2, *mask.shape)
    shape = functools.partial(ppo.shape_rewards, normal(2), mask=mask, kl_coef=0.5, kl_estimator=estimator)
    clean = shape(logprobs, ref_logprobs)
    assert torch.equal(shape(logprobs.masked_fill(~mask, junk), ref_logprobs), clean)
    assert torch.equal(shape(logprobs, ref_logprobs.masked_fill(~mask, junk)), clean)
    assert (clean[~mask] == 0).all()


# ---------------------------------------------------------------- statistics


def test_both_estimators_expect_the_divergence_and_the_wrong_forms_do_not():
    p, q = row(0.5, 0.3, 0.15, 0.05), row(0.2, 0.3, 0.25, 0.25)
    exact = 0.5 * math.log(2.5) + 0.15 * math.log(0.6) + 0.05 * math.log(0.2)
    assert exact == pytest.approx(0.3010, abs=1e-4)
    for estimator in ("k1", "k3"):
        each = ppo.kl_per_token(p.log(), q.log(), estimator)
        assert (p * each).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (each >= 0).all()  # k3
    delta = (p / q).log()
    wrong = {"|d|": delta.abs(), "max(d, 0)": delta.clamp(min=0), "other direction": delta.exp() - 1 - delta}
    for each in wrong.values():
        assert abs((p * each).sum().item() - exact) > 0.04


@JUNK
def test_masked_statistics_by_value(junk):
    mask = mask_of(3, 1)
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, junk, junk]])
    assert ppo.masked_mean(values, mask).item() == 3
    whitened = ppo.masked_whiten(values, mask)
    by_hand = [v / math.sqrt(3.5) for v in (-2, -1, 3, 0)]  # (4 + 1 + 9 + 0) / 4, not / 3
    assert whitened[mask].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert (whitened[~mask] == 0).all()


@JUNK
def test_explained_variance_by_value(junk):
    mask = mask_of(3, 1)
    returns = torch.tensor([[1.0, 2.0, 6.0], [3.0, junk, junk]])
    explained = functools.partial(ppo.explained_variance, returns=returns, mask=mask)
    assert explained(returns + 5) == pytest.approx(1)
    assert explained(torch.full_like(returns, 9.0)) == pytest.approx(0, abs=1e-6)
    assert explained(returns / 2) == pytest.approx(0.75)
    assert explained(-returns) == pytest.approx(-3)


# ---------------------------------------------------------------- losses

RATIOS, SIGNS = row(1.5, 1.5, 0.5, 0.5), row(1.0, -1.0, 1.0, -1.0)


def surrogate(logprobs: Tensor, advantages: Tensor, cliprange: float | None = 0.2) -> tuple[Tensor, dict]:
    return ppo.policy_loss(logprobs, torch.zeros(1, 4), advantages, mask_of(4), cliprange=cliprange)


def test_policy_loss_at_ratio_one_is_minus_the_mean_advantage():
    loss, seen = surrogate(torch.zeros(1, 4), row(1.0, -2.0, 3.0, 4.0))
    assert loss.item() == -1.5
    assert seen == {"clip_fraction": 0, "approx_kl": 0}


def test_policy_loss_is_clipped_where_that_is_worse():
    each = [surrogate(RATIOS.log(), SIGNS * chosen)[0].item() * 4 for chosen in torch.eye(4)[:, None]]
    assert each == pytest.approx([-1.2, 1.5, -0.5, 0.8], abs=1e-6)
    loss, seen = surrogate(RATIOS.log(), SIGNS)
    assert loss.item() == pytest.approx(0.15, abs=1e-6)
    assert seen["clip_fraction"] == 0.5
    k3 = (0.5 - math.log(1.5) + LOG2 - 0.5) / 2  # rho - 1 - log rho, a mean
    assert seen["approx_kl"] == pytest.approx(k3, abs=1e-6)


def test_policy_loss_without_a_clip_is_plain_importance_sampling():
    loss, seen = surrogate(RATIOS.log(), row(1.0, 2.0, 3.0, 4.0), cliprange=None)
    assert loss.item() == pytest.approx(-(1.5 + 3 + 1.5 + 2) / 4, abs=1e-6)
    assert seen["clip_fraction"] == 0


def test_the_gradient_follows_the_advantage_and_stops_where_the_clip_decides():
    logprobs = RATIOS.log().requires_grad_()
    surrogate(logprobs, SIGNS)[0].backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0], abs=1e-6)  # descent: - raises
    free = RATIOS.log().requires_grad_()
    surrogate(free, SIGNS, cliprange=None)[0].backward()
    assert (free.grad.sign() == -SIGNS).all()


def test_value_loss_by_hand():
    values = row(1.0, 0.1, -1.0, grad=True)  # beyond the clip, within it, beyond it on the wrong side
    targets = torch.zeros(1, 3), row(2.0, 2.0, 2.0), mask_of(3)
    loss = ppo.value_loss(values, *targets, cliprange_value=0.2)
    assert loss.item() == pytest.approx((1.8**2 + 1.9**2 + 3**2) / 6, abs=1e-6)
    loss.backward()
    assert values.grad[0].tolist() == pytest.approx([0, -1.9 / 3, -3 / 3], abs=1e-6)
    plain = ppo.value_loss(values, *targets, cliprange_value=None)
    assert plain.item() == pytest.approx((1 + 1.9**2 + 3**2) / 6, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "junk"),
    [("policy", math.nan), ("policy", 1e9), ("value", 1e9), ("value", math.nan)],
)
def test_losses_and_gradients_ignore_junk_in_padding(loss, junk):
    mask = mask_of(2, 4, 1)
    given = normal(3, *mask.shape)

    def run(new: Tensor, old: Tensor, goal: Tensor, mask: Tensor = mask) -> tuple[float, Tensor, dict]:
        new = new.clone().requires_grad_()
        if loss == "policy":
            value, seen = ppo.policy_loss(new, old, goal, mask, cliprange=0.2)
        else:
            value, seen = ppo.value_loss(new, old, goal, mask, cliprange_value=0.2), {}
        value.backward()
        return value.item(), new.grad, seen

    clean, spoilt = run(*given), run(*given.masked_fill(~mask, junk))
    assert spoilt[::2] == clean[::2]
    assert torch.equal(spoilt[1], clean[1])
    assert (clean[1][~mask] == 0).all()
    unmasked = run(*given, torch.ones_like(mask))
    assert abs(unmasked[0] - clean[0]) > 1e-3


# ---------------------------------------------------------------- shapes


@pytest.fixture(scope="module")
def checked():
    """The module with its annotations executed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "rmlib.ppo")
        patch.setattr(rmlib, "ppo", ppo)
        with install_import_hook("rmlib.ppo", "beartype.beartype"):
            return importlib.import_module("rmlib.ppo")


def test_other_shapes_than_annotated_raise(checked):
    values, mask = torch.zeros(2, 3), mask_of(3, 2)
    checked.gae(values, values, mask, gamma=1.0, lam=1.0)
    with pytest.raises(TypeCheckError):
        checked.gae(values, values[:, :1], mask, gamma=1.0, lam=1.0)
    with pytest.raises(TypeCheckError):
        checked.shape_rewards(torch.zeros(2, 1), values, values, mask, kl_coef=0.1)
    with pytest.raises(TypeCheckError):
        checked.policy_loss(values, values, torch.zeros(2), mask, cliprange=0.2)
    with pytest.raises(TypeCheckError):
        checked.value_loss(values, values, values, mask.long(), cliprange_value=0.2)


def test_a_training_keeps_to_all_annotations(checked):
    policy, critic = actor_critic()
    how = checked.Settings(steps=2, lr=0.1, critic_lr=0.1, max_new_tokens=3, batch_size=4, whiten_advantages=True)
    checked.train_policy(policy, critic, WORDS, PROMPTS, says_good, how, seed=0)


def test_rewards_of_texts_keep_to_all_annotations(checked):
    checked.reward_of_texts(actor_critic()[1], WORDS)(PROMPTS, ["one", "two", "three"])


# ---------------------------------------------------------------- responses and models


def responses(pad_id: int = PAD) -> data.Responses:
    """One that ends, a longer one, one that is only the end, and one that was cut before its end."""
    prompt = [[1, 5, 2], [1, 2], [1, 9, 10, 11, 2], [1, 5, 6, 2]]
    said = [[6, EOS], [7, 8, 12, EOS], [EOS], [13, 14, 13]]
    return data.Responses([np.array(ids) for ids in prompt], [np.array(ids) for ids in said], pad_id)


def test_a_batch_of_responses_by_hand():
    batch = responses().collate(np.array([0, 1, 2]))
    assert batch["input_ids"].tolist() == [[1, 5, 2, 6, 3, 0], [1, 2, 7, 8, 12, 3], [1, 9, 10, 11, 2, 3]]
    assert batch["response_ids"].tolist() == [[6, 3, 0, 0], [7, 8, 12, 3], [3, 0, 0, 0]]
    assert batch["mask"].tolist() == mask_of(2, 4, 1).tolist()
    assert batch["at"].tolist() == [[2, 3, 4, 4], [1, 2, 3, 4], [4, 5, 5, 5]]
    assert batch["end"].tolist() == [[4], [5], [5]]
    assert batch["position_ids"].tolist() == [list(range(6))] * 3
    assert torch.equal(batch["attention_mask"][2, 0], torch.ones(6, 6).tril().bool())
    assert responses().lengths.tolist() == [5, 6, 6, 7]


def saved_actor_critic(folder: Path, kind: str) -> tuple[nn.Module, nn.Module]:
    tiny.save_causal(folder, kind)
    return models.load_language_model(folder), models.reward_model(folder, head_seed=0).eval()


@pytest.fixture(scope="module", params=[*tiny.SHORTCUT, *tiny.GENERAL])
def shaken(tmp_path_factory, request) -> tuple[nn.Module, nn.Module]:
    """A policy and a critic of each kind with large random weights."""
    return saved_actor_critic(tmp_path_factory.mktemp("shaken"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    return saved_actor_critic(tmp_path_factory.mktemp("llama"), "llama")


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [PAD, EOS], ids=["pad", "pad is the end"])
def test_what_is_measured_of_a_batch_equals_single_texts_in_the_plain_model(shaken, pad_id):
    (policy, critic), texts = shaken, responses(pad_id)
    batch = texts.collate(np.arange(4))

    def measure(batch: dict[str, Tensor]) -> Tensor:
        spread = ppo.entropy(ppo.choices(policy, batch))
        return torch.stack([ppo.token_logprobs(policy, batch), spread, ppo.token_values(critic, batch)])

    measured, shifted = measure(batch), measure(batch | {"at": (batch["at"] + 1).minimum(batch["end"])})
    for i, (prompt, said) in enumerate(zip(texts.prompt, texts.response, strict=True)):
        ids, start, n = torch.from_numpy(np.concatenate([prompt, said])), len(prompt), len(said)
        log_p = policy(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        alone = [log_p[range(n), ids[start:]], -(log_p.exp() * log_p).sum(-1)]
        alone += [torch.stack([critic(input_ids=ids[None, :t]).logits[0, 0] for t in range(start, len(ids))])]
        torch.testing.assert_close(measured[:, i, :n], torch.stack(alone), atol=1e-4, rtol=1e-4)
        assert ((shifted[:, i, :n] - torch.stack(alone)).abs().amax(1) > 1e-3).all()
    assert batch["mask"].sum().item() == 10


@torch.no_grad()
def test_an_even_choice_has_the_entropy_of_the_vocabulary():
    policy = actor_critic()[0]
    policy.get_output_embeddings().weight.zero_()
    every = ppo.choices(policy, responses().collate(np.arange(4)))
    assert every.shape == (4, 4, len(WORDS))
    assert every.flatten().tolist() == pytest.approx([-math.log(15)] * 240, abs=1e-6)
    assert ppo.entropy(every).flatten().tolist() == pytest.approx([math.log(15)] * 16, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_rewards_of_texts_are_those_of_training(llama, monkeypatch, half):
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=half)
    monkeypatch.setattr(training, "accelerator", lambda: SimpleNamespace(autocast=autocast))
    model, said = llama[1], (["good", "", "bad one two three"], ["seven eight", "bad", "four"])
    rows = {"pair_id": ["a", "b", "c"], "prompt": PROMPTS, "chosen": said[0], "rejected": said[1]}
    pairs = data.causal_pairs(Dataset.from_dict(rows), WORDS, max_length=64)
    trained = training.score_pairs(model, pairs, np.arange(3))
    for side, texts in zip(("chosen", "rejected"), said, strict=True):
        for size in (1, 2, 64):
            ours = ppo.reward_of_texts(model, WORDS, batch_size=size)(PROMPTS, texts)
            assert ours.tolist() == pytest.approx(trained[f"reward_{side}"].tolist(), abs=1e-5)
    shifted = ppo.reward_of_texts(model, WORDS, mean=2.0, std=4.0)(PROMPTS, said[1])
    torch.testing.assert_close(shifted, (ours - 2) / 4)


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def greedy(policy: nn.Module, prompt: np.ndarray, n: int, penalty: float = 1.0) -> list[int]:
    ids = prompt.tolist()
    for _ in range(n):
        logits = policy(input_ids=torch.tensor([ids])).logits[0, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, torch.tensor(ids), True)
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        ids.append(int(logits.argmax()))
    said = ids[len(prompt) :]
    return said[: said.index(EOS)] if EOS in said else said


def sample(policy: nn.Module, prompts: list[np.ndarray], seed: int = 0, **changes) -> list[list[int]]:
    return models.generate(policy, prompts, max_new_tokens=6, eos_id=EOS, pad_id=PAD, seed=seed, **changes)


@pytest.mark.parametrize("narrow", [{"temperature": 1e-4}, {"top_p": 1e-6}], ids=str)
def test_sampling_without_chance_is_greedy(llama, narrow):
    prompts = data.prompt_ids(PROMPTS, WORDS)
    by_hand = [greedy(llama[0], prompt, 6) for prompt in prompts]
    assert sample(llama[0], prompts, **narrow) == by_hand
    assert sample(llama[0], prompts) != by_hand


def test_a_repetition_penalty_divides_the_logits_of_what_was_said(llama):
    prompts = data.prompt_ids(PROMPTS, WORDS)
    by_hand = [greedy(llama[0], prompt, 6, penalty=3.0) for prompt in prompts]
    assert sample(llama[0], prompts, temperature=1e-4, repetition_penalty=3.0) == by_hand
    assert by_hand != [greedy(llama[0], prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"repetition_penalty": 1.2}], ids=str)
def test_samples_repeat_with_their_seed(how):
    policy, prompts = actor_critic()[0], data.prompt_ids(PROMPTS, WORDS)
    assert sample(policy, prompts, **how) == sample(policy, prompts, **how)
    assert sample(policy, prompts, **how) != sample(policy, prompts, seed=1, **how)


# ---------------------------------------------------------------- rollout


def roll(reward_fn=says_good, tokenizer=WORDS, models=None, **changes) -> ppo.Experience:
    (policy, critic), reference = models or actor_critic(), actor_critic(1)[0]
    everything = (policy, reference, critic, tokenizer, PROMPTS, reward_fn, settings(**changes))
    return ppo.rollout(*everything, seed=0, micro_batch_size=2)


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_a_rollout_holds_the_end_token_where_it_was_said(monkeypatch, pad_token):
    said, texts, words = [[5, 6], [13, 14, 5], []], [], copy.deepcopy(WORDS)
    words.pad_token = pad_token
    monkeypatch.setattr(models, "generate", lambda *args, **kwargs: said)
    got = roll(lambda *given: texts.append(given) or [0.1, 0.2, 0.3], words, max_new_tokens=3)
    assert texts == [(PROMPTS, ["one two", "good bad one", ""])]
    assert (got.prompts, got.responses) == texts[0]
    assert got.ended.tolist() == [True, False, True]
    assert [ids.tolist() for ids in got.texts.response] == [[5, 6, EOS], [13, 14, 5], [EOS]]
    assert got.mask.tolist() == mask_of(3, 3, 1).tolist()
    assert got.scores.tolist() == pytest.approx([0.1, 0.2, 0.3])
    placed = ppo.shape_rewards(got.scores, got.logprobs, got.logprobs, got.mask, kl_coef=1.0)
    assert placed.flatten().tolist() == pytest.approx([0, 0, 0.1, 0, 0, 0.2, 0.3, 0, 0])


@torch.no_grad()
def test_a_rollout_measures_policy_reference_and_critic_whatever_way_it_samples():
    policy, critic = actor_critic()
    how = {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.5}
    got = roll(models=(policy, critic), max_new_tokens=6, **how)
    said = sample(policy, data.prompt_ids(PROMPTS, WORDS), **how)
    assert got.responses == WORDS.batch_decode(said, skip_special_tokens=True)
    assert got.responses != roll(models=(policy, critic), max_new_tokens=6).responses
    batch = got.texts.collate(np.arange(3))
    assert torch.equal(batch["mask"], got.mask)
    assert np.argsort(got.texts.lengths, kind="stable").tolist() != [0, 1, 2]  # measured in another order than asked
    logprobs, ref_logprobs = (ppo.token_logprobs(model, batch) for model in (policy, actor_critic(1)[0]))
    direct = torch.stack([logprobs, ref_logprobs, ppo.token_values(critic, batch)])[:, got.mask]
    ours = torch.stack([got.logprobs, got.ref_logprobs, got.values])[:, got.mask]
    torch.testing.assert_close(ours, direct, atol=1e-5, rtol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("scores", "shape"), [([1.0], r"\(1,\)"), (torch.zeros(3, 1), r"\(3, 1\)")])
def test_scores_of_another_shape_raise(scores, shape):
    with pytest.raises(ValueError, match=f"scores of shape {shape} for 3 responses"):
        roll(lambda prompts, responses: scores)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_not_finite_raises_with_its_prompt_and_response(monkeypatch, bad):
    monkeypatch.setattr(models, "generate", lambda *args, **kwargs: [[5], [13, 14], [6]])
    with pytest.raises(ValueError, match=f"gave {bad} to response 'good bad' to prompt 'three'"):
        roll(lambda prompts, responses: [1.0, bad, math.nan])


# ---------------------------------------------------------------- updates


@pytest.fixture
def answered(llama) -> tuple[nn.Module, nn.Module, data.Responses, dict[str, Tensor]]:
    """A policy, its critic, and 13 responses with made-up targets."""
    policy, critic = copy.deepcopy(llama)
    rng = np.random.default_rng(0)
    prompt, said = ([rng.integers(5, 15, rng.integers(1, 7)) for _ in range(13)] for _ in range(2))
    texts, mask = data.Responses(prompt, said, PAD), mask_of(*map(len, said))
    noise = normal(4, *mask.shape).float()
    with torch.no_grad():
        old = ppo.token_logprobs(policy, texts.collate(np.arange(13))) + 0.3 * noise[0]
    names = ("logprobs", "values", "advantages", "returns")
    return policy, critic, texts, {"mask": mask} | dict(zip(names, [old, *noise[1:]], strict=True))


def gradients(policy: nn.Module, critic: nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in [*policy.parameters(), *critic.parameters()]]


def step(answered, size: int = 64, rows=range(13), max_grad_norm: float | None = None) -> dict[str, float]:
    """Statistics of one step at rate 0 in micro-batches of ``size``; its gradients remain."""
    policy, critic, texts, target = answered
    optimiser = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=0.0)
    how = settings(entropy_coef=0.1, vf_coef=0.5, cliprange=0.15, cliprange_value=0.3, max_grad_norm=max_grad_norm)
    return ppo.ppo_step(policy, critic, optimiser, texts, target, np.array(rows), how, size)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole_loss(answered, size):
    policy, critic, texts, target = answered
    mask, batch = target["mask"], texts.collate(np.arange(13))
    logprobs, spread = ppo.token_logprobs(policy, batch), ppo.entropy(ppo.choices(policy, batch))[mask].mean()
    old = target["logprobs"], target["advantages"]
    actor, seen = ppo.policy_loss(logprobs, *old, mask, cliprange=0.15)
    old = target["values"], target["returns"]
    error = ppo.value_loss(ppo.token_values(critic, batch), *old, mask, cliprange_value=0.3)
    (actor + 0.5 * error - 0.1 * spread).backward()
    whole = gradients(policy, critic)
    seen |= {"policy_loss": actor.item(), "value_loss": error.item(), "entropy": spread.item()}
    assert step(answered, size) == pytest.approx(seen, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradients(policy, critic), whole, atol=1e-6, rtol=1e-5)
    assert 0 < seen["clip_fraction"] < 1


def test_a_mean_over_responses_would_be_another_loss(answered):
    apart = np.mean([step(answered, rows=[i])["policy_loss"] for i in range(13)])
    assert abs(apart - step(answered)["policy_loss"]) > 1e-2


def test_a_step_looks_at_its_rows_only(answered):
    some = step(answered, rows=[2, 5, 7])
    assert step(answered, 2, rows=[7, 2, 5]) == pytest.approx(some, rel=1e-5)
    assert abs(some["policy_loss"] - step(answered)["policy_loss"]) > 1e-2


def test_gradients_of_policy_and_critic_are_clipped_apart(answered):
    def norms(largest: float) -> list[float]:
        step(answered, max_grad_norm=largest)
        return [nn.utils.get_total_norm([w.grad for w in model.parameters()]).item() for model in answered[:2]]

    assert min(norms(None)) > 0.1
    assert norms(0.01) == pytest.approx([0.01, 0.01], rel=1e-3)


def experience() -> ppo.Experience:
    """What a policy said that differs from its reference; made-up values, scores 0, 1, 2."""
    got = roll(lambda prompts, responses: [0.0, 1.0, 2.0])
    got.values = torch.where(got.mask, normal(*got.mask.shape).float(), 0.0)
    return got


def spy_on_steps(monkeypatch, how: ppo.Settings) -> tuple[list[tuple], dict[str, float]]:
    """The arguments of every step that one round of learning makes, and what it says of itself."""
    (policy, critic), steps, rng = actor_critic(), [], np.random.default_rng(0)
    monkeypatch.setattr(ppo, "ppo_step", lambda *args: steps.append(args) or {"policy_loss": 0.0})
    stats = ppo.learn(policy, critic, torch.optim.SGD(policy.parameters()), experience(), how, rng, [])
    return steps, stats


def test_every_epoch_passes_once_over_all_responses_in_mini_batches(monkeypatch):
    steps, _ = spy_on_steps(monkeypatch, settings(num_ppo_epochs=4, num_mini_batches=2))
    rows = [args[5].tolist() for args in steps]
    assert [len(part) for part in rows] == [2, 1] * 4
    epochs = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_returns_come_from_the_advantages_before_they_are_whitened_and_clipped(monkeypatch):
    def target(**changes) -> dict[str, Tensor]:
        usual = {"kl_coef": 0.2, "kl_estimator": "k3", "gamma": 0.9, "lam": 0.7, "reward_clip": 1.5}
        (args, *_), stats = spy_on_steps(monkeypatch, settings(**usual, **changes))
        assert stats["explained_variance"] == ppo.explained_variance(got.values, returns, got.mask)
        return args[4]

    got = experience()
    given = got.scores.clamp(max=1.5), got.logprobs, got.ref_logprobs, got.mask
    rewards = ppo.shape_rewards(*given, kl_coef=0.2, kl_estimator="k3")
    advantages, returns = ppo.gae(rewards, got.values, got.mask, gamma=0.9, lam=0.7)
    plain, white = target(), target(whiten_advantages=True)
    both = target(whiten_advantages=True, advantage_clip=0.5)
    assert torch.equal(plain["advantages"], advantages)
    assert torch.equal(white["advantages"], ppo.masked_whiten(advantages, got.mask))
    assert torch.equal(both["advantages"], white["advantages"].clamp(-0.5, 0.5))
    for each in (plain, white, both):
        assert torch.equal(each["returns"], returns)
    assert not torch.allclose(white["advantages"] + got.values, returns, atol=1e-2)


# ---------------------------------------------------------------- scores as they are paid


@pytest.mark.parametrize(
    ("switches", "by_hand"),
    [
        ({}, [1, 2, 3, 6]),
        ({"missing_eos_penalty": 1.5}, [1, 0.5, 3, 6]),
        ({"reward_norm": True}, [(x - 3) / math.sqrt(3.5) for x in (1, 2, 3, 6)]),
        ({"reward_norm": True, "missing_eos_penalty": 4.0}, [(x - 2) / math.sqrt(8.5) for x in (1, -2, 3, 6)]),
        ({"reward_scaling": True}, [x / np.std([-4, 6, 1, 2, 3, 6]) for x in (1, 2, 3, 6)]),
        ({"reward_clip": 2.5}, [1, 2, 2.5, 2.5]),
        ({"reward_clip": 0.5, "reward_norm": True}, [-0.5, -0.5, 0, 0.5]),
    ],
    ids=str,
)
def test_scores_are_shaped_by_value(switches, by_hand):
    past = [-4.0, 6.0]
    ended = np.array([True, False, True, True])
    paid = ppo.shaped_scores(torch.tensor([1.0, 2.0, 3.0, 6.0]), ended, settings(**switches), past)
    assert paid.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert past == ([-4, 6, 1, 2, 3, 6] if "reward_scaling" in switches else [-4, 6])  # kept for its scale alone


@pytest.mark.parametrize("switch", ["reward_norm", "reward_scaling"])
@pytest.mark.parametrize("score", [0.1, 1.0, 1e4])
def test_equal_scores_stay_small_and_finite(switch, score):
    equal = torch.full((64,), score)
    paid = ppo.shaped_scores(equal, np.ones(64, dtype=bool), settings(**{switch: True}), [])
    assert paid.abs().max() <= max(score, 0.1)
    if switch == "reward_norm" and score < 2:
        assert paid.abs().max() < 1e-2


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator\\n.*'k1' or 'k3'"),
        ({"reward_norm": True, "reward_scaling": True}, "reward_norm and reward_scaling exclude"),
        ({"num_mini_batches": 9}, "num_mini_batches = 9"),
        ({"num_mini_batches": 0}, "num_mini_batches\\n.*greater than or equal to 1"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"steps": 0}, "steps\\n.*greater than or equal to 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs"),
        ({"rollouts_per_prompt": 0}, "rollouts_per_prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"cliprange": -1.0}, "cliprange"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"missing_eos_penalty": math.nan}, "missing_eos_penalty"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"lr": math.nan}, "lr"),
        ({"steps": 1.5}, "steps"),
    ],
    ids=str,
)
def test_settings_out_of_range_raise_with_their_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        settings(**wrong)


def test_mini_batches_are_counted_against_all_responses():
    assert settings(batch_size=2, rollouts_per_prompt=4, num_mini_batches=8).num_mini_batches == 8


def test_a_tokenizer_without_an_end_raises():
    words = copy.deepcopy(WORDS)
    words.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        ppo.check_policy(actor_critic()[0], words, PROMPTS, settings())


def test_a_prompt_whose_answer_may_not_fit_raises_with_the_prompt():
    policy = actor_critic()[0]
    fits = " ".join(["two"] * 26)  # 26 words, beginning, separator and 4 new tokens: 32
    ppo.check_policy(policy, WORDS, [*PROMPTS, fits], settings())
    with pytest.raises(ValueError, match=r"prompt 3 \('two two .*: 28 tokens and max_new_tokens 5 .* context of 32"):
        ppo.check_policy(policy, WORDS, [*PROMPTS, fits], settings(max_new_tokens=5))


# ---------------------------------------------------------------- training


def train(reward_fn=says_good, how: ppo.Settings | None = None, models=None, seed: int = 0, **more) -> tuple:
    """A policy after training, its critic, and the record."""
    policy, critic = models or actor_critic()
    record = ppo.train_policy(policy, critic, WORDS, PROMPTS, reward_fn, how or settings(), seed=seed, **more)
    return policy, critic, record


def untimed(record: dict) -> list[dict]:
    return [{name: row[name] for name in row.keys() - {"sampling", "learning"}} for row in record["log"]]


def same(a: tuple, b: tuple) -> bool:
    """Whether two trainings left the same logs, samples and weights."""
    weights = ([*policy.parameters(), *critic.parameters()] for policy, critic, _ in (a, b))
    alike = all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    return alike and untimed(a[2]) == untimed(b[2]) and a[2]["samples"] == b[2]["samples"]


def test_the_seed_alone_decides_a_training():
    first = train()
    torch.manual_seed(99)
    assert same(train(), first)
    other = train(seed=1)
    assert not same(other, first)
    assert untimed(other[2])[0] != untimed(first[2])[0]


def test_every_step_draws_anew(rollouts):
    train(how=settings(lr=0.0, critic_lr=0.0, steps=3))
    assert len({tuple(seen.responses) for seen in rollouts}) == 3


def test_what_is_looked_at_does_not_change_training():
    watched = train(gold_fn=begins_low, n_samples=1)
    for row in watched[2]["log"]:
        assert 0 <= row.pop("gold") <= 1
    assert untimed(watched[2]) == untimed(train()[2])


COLUMNS = {
    *("step", "reward", "reward_std", "gold", "kl", "kl_k3", "entropy", "length", "eos_rate", "perplexity"),
    *(
        "clip_fraction",
        "approx_kl",
        "explained_variance",
        "return",
        "policy_loss",
        "value_loss",
        "sampling",
        "learning",
    ),
}


@pytest.fixture
def rollouts(monkeypatch) -> list[ppo.Experience]:
    """What the policy says in every step, as it says it."""
    seen, real = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1])
    return seen


def test_the_log_tells_of_every_rollout(rollouts):
    record = train(gold_fn=begins_low)[2]
    assert [row["step"] for row in record["log"]] == [1, 2, 3, 4, 5, 6]
    for row, seen in zip(record["log"], rollouts, strict=True):
        assert row.keys() == COLUMNS
        assert all(math.isfinite(value) for value in row.values())
        lengths = [len(said) for said in seen.texts.response]
        foretold = [p[:n].sum() for p, n in zip(seen.ref_logprobs, lengths, strict=True)]
        gaps = [(a - b)[:n].double() for a, b, n in zip(seen.logprobs, seen.ref_logprobs, lengths, strict=True)]
        by_hand = {
            "reward": np.mean(says_good(PROMPTS, seen.responses)),
            "reward_std": np.std(says_good(PROMPTS, seen.responses)),
            "gold": np.mean(begins_low(PROMPTS, seen.responses)),
            "kl": np.mean([gap.sum() for gap in gaps]),
            "kl_k3": np.mean([(gap.neg().exp() - 1 + gap).sum() for gap in gaps]),
            "length": np.mean(lengths),
            "eos_rate": np.mean([said[-1] == EOS for said in seen.texts.response]),
            "perplexity": math.exp(-sum(foretold) / sum(lengths)),
        }
        assert {name: row[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-4)
    first, last = record["log"][0], record["log"][-1]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert last["kl_k3"] > 1e-3
    assert first["perplexity"] == pytest.approx(math.exp(first["entropy"]), rel=0.1)  # an untrained policy


def test_divergence_counts_from_the_reference_that_is_given(rollouts):
    far, one_step = actor_critic(1)[0], settings(steps=1)
    nn.init.normal_(far.get_output_embeddings().weight, std=0.5)
    before = copy.deepcopy(far).state_dict()
    log = train(how=settings(steps=2), reference=far)[2]["log"]
    batch = rollouts[0].texts.collate(np.arange(8))
    with torch.no_grad():
        gaps = ppo.token_logprobs(actor_critic()[0], batch) - ppo.token_logprobs(far, batch)
    assert log[0]["kl"] == pytest.approx(gaps[batch["mask"]].sum().item() / 8, abs=1e-4)
    assert log[0]["kl_k3"] > 0.1
    assert all(torch.equal(before[name], weight) for name, weight in far.state_dict().items())
    assert train(how=one_step, reference=actor_critic()[0])[2]["log"][0]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_reference_that_is_the_policy_changes_nothing_and_another_does():
    how = settings(steps=3, kl_coef=0.5)
    itself = actor_critic()
    plain = train(how=how)
    assert same(train(how=how, reference=actor_critic()[0]), plain)
    assert same(train(how=how, models=itself, reference=itself[0]), plain)  # it does not move with the policy
    assert not same(train(how=how, reference=actor_critic(1)[0]), plain)


def test_a_killed_training_with_a_reference_resumed_equals_a_straight_one(tmp_path):
    run = functools.partial(train, how=settings(steps=4, kl_coef=0.5), reference=actor_critic(1)[0])
    kept, calls = {"checkpoint": tmp_path / "state", "checkpoint_seconds": 0.0}, itertools.count(1)

    def mortal(prompts: list[str], responses: list[str]) -> list[float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return says_good(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        run(mortal, **kept)
    assert same(run(**kept), run())


def test_the_spread_is_the_standard_deviation_within_a_prompt(rollouts):
    """Two rollouts of each of four prompts: half their difference, whatever the prompts are worth."""
    paid, gold = [0.0, 1.0, 10.0, 13.0, 5.0, 5.0, -2.0, 0.0], [7.0, 7.0, 0.0, 4.0, 1.0, 1.0, 3.0, 3.0]
    how = settings(steps=2, batch_size=4, rollouts_per_prompt=2)
    log = train(lambda *texts: paid, how, gold_fn=lambda *texts: gold)[2]["log"]
    assert rollouts[0].prompts[::2] == rollouts[0].prompts[1::2]
    for row in log:
        assert row["spread"] == pytest.approx((0.5 + 1.5 + 0 + 1) / 4)
        assert row["gold_spread"] == pytest.approx((0 + 2 + 0 + 0) / 4)
        assert row["reward_std"] == pytest.approx(np.std(paid), rel=1e-5)
        assert row["spread"] != pytest.approx(np.reshape(paid, (2, 4)).std(axis=0).mean(), abs=0.1)  # of other prompts
    assert row.keys() == COLUMNS | {"spread", "gold_spread"}
    alone = train(lambda *texts: paid, settings(steps=1), gold_fn=lambda *texts: gold)[2]["log"][0]
    assert alone.keys() == COLUMNS  # a single rollout has none
    assert train(lambda *texts: paid, how)[2]["log"][0].keys() == COLUMNS - {"gold"} | {"spread"}


def test_samples_are_kept_from_the_first_to_the_last_step(rollouts):
    record = train(how=settings(steps=9), n_samples=2)[2]
    assert [sample["step"] for sample in record["samples"]] == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]
    last = rollouts[-1]
    kept = [(sample["prompt"], sample["response"], sample["reward"]) for sample in record["samples"][-2:]]
    assert kept == list(zip(last.prompts[:2], last.responses[:2], last.scores[:2].tolist(), strict=True))


def test_prompts_are_asked_as_often_as_told(rollouts):
    train(how=settings(steps=1, batch_size=3, rollouts_per_prompt=2))
    train(how=settings(steps=1, batch_size=7))
    asked = rollouts[0].prompts
    assert asked[::2] == asked[1::2]
    assert sorted(asked[::2]) == sorted(PROMPTS)  # each once, while there are enough
    assert len(rollouts[1].prompts) == 7


def test_the_rates_warm_up(monkeypatch):
    rates, real = [], ppo.ppo_step
    monkeypatch.setattr(ppo, "ppo_step", lambda *a: rates.append([g["lr"] for g in a[2].param_groups]) or real(*a))
    train(how=settings(steps=4, warmup_steps=2, lr=1e-2, critic_lr=4e-2, num_ppo_epochs=1))
    assert rates == [[0.005, 0.02], [0.01, 0.04], [0.01, 0.04], [0.01, 0.04]]


def test_dropout_is_off_while_a_policy_trains():
    policy, critic = actor_critic()
    policy.model.layers[0].self_attn.attention_dropout = 0.9
    batch = responses().collate(np.arange(4))
    policy.train()
    assert not torch.equal(ppo.token_logprobs(policy, batch), ppo.token_logprobs(policy, batch))
    assert train(how=settings(steps=1), models=(policy, critic))[2]["log"][0]["kl"] == pytest.approx(0, abs=1e-5)


def test_training_stops_after_a_step_whose_divergence_is_too_large(tmp_path):
    far = {"how": settings(lr=3e-2, steps=20, max_kl=0.5), "checkpoint": tmp_path / "state", "checkpoint_seconds": 0.0}
    stopped = train(**far)
    kl = [row["kl"] for row in stopped[2]["log"]]
    assert 1 < len(kl) < 20
    assert kl[-1] > 0.5 >= max(kl[:-1])
    assert same(train(**far), stopped)  # a rerun does not go on


# ---------------------------------------------------------------- killed and resumed

HOW = settings(steps=5, warmup_steps=3, reward_scaling=True, kl_coef=0.05)


@pytest.fixture(scope="module")
def straight() -> tuple:
    return train(how=HOW, gold_fn=begins_low)


def killed_and_resumed(path, step: int, where: str = "reward_fn") -> tuple:
    """Training that dies in the ``step``-th call of a function, and is run again."""
    calls = itertools.count(1)

    def mortal(score, name: str):
        def score_or_die(prompts, responses):
            if name == where and next(calls) == step:
                raise KeyboardInterrupt
            return score(prompts, responses)

        return score_or_die

    reward_fn, gold_fn = mortal(says_good, "reward_fn"), mortal(begins_low, "gold_fn")
    run = functools.partial(train, reward_fn, HOW, gold_fn=gold_fn, checkpoint=path, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert path.exists() == (step > 1)
    torch.manual_seed(99)
    again = run()
    assert next(calls) == 7  # five steps, and once more the one that died
    return again


@pytest.mark.parametrize("where", ["reward_fn", "gold_fn"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_training_resumed_equals_a_straight_one(tmp_path, straight, step, where):
    assert same(killed_and_resumed(tmp_path / "state", step, where), straight)


@pytest.mark.parametrize("lost", ["policy", "critic", "optimiser", "past_scores"])
def test_a_resume_that_lost_a_part_of_the_state_would_not_equal_it(tmp_path, straight, monkeypatch, lost):
    real, fresh = training.resume, dict(zip(("policy", "critic"), actor_critic(), strict=True))

    def forget(path, state, record):
        real(path, state, record)
        if lost == "past_scores":
            record[lost] = []
        elif lost == "optimiser":
            state[lost].state.clear()
        else:
            state[lost].load_state_dict(fresh[lost].state_dict())

    monkeypatch.setattr(training, "resume", forget)
    assert not same(killed_and_resumed(tmp_path / "state", 3), straight)


# ---------------------------------------------------------------- tasks


def learn(reward_fn, seed: int = 0, steps: int = 30, **changes) -> list[dict]:
    """The log of a policy trained on one task."""
    how = settings(batch_size=32, max_new_tokens=5, steps=steps, **changes)
    return train(reward_fn, how, actor_critic(seed), seed)[2]["log"]


learned = functools.cache(learn)


def start_and_end(log: list[dict], name: str = "reward") -> tuple[float, float]:
    return log[0][name], float(np.mean([row[name] for row in log[-5:]]))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_word_that_pays_is_learned(seed):
    start, end = start_and_end(learned(says_good, seed, steps=18))
    assert start < 0.5
    assert end > 0.8


def test_with_advantages_turned_around_the_word_is_unlearned(monkeypatch):
    real = ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda new, old, goal, *a, **k: real(new, old, -goal, *a, **k))
    start, end = start_and_end(learn(says_good, steps=18))
    assert start > 0.2
    assert end < 0.1


@pytest.mark.parametrize(("lam", "seed"), [(0.95, 0), (0.95, 1), (0.0, 1)])
def test_a_first_word_that_pays_at_the_end_is_learned(lam, seed):
    log = learn(begins_low, seed, lam=lam, steps=20 if lam else 45)
    start, end = start_and_end(log)
    assert start < 0.5
    assert end > 0.8
    assert start_and_end(log, "length")[1] > 2  # the reward comes later than the word


@pytest.mark.parametrize("seed", [0, 1])
def test_a_first_word_is_not_learned_where_its_credit_is_cut(seed):
    assert start_and_end(learn(begins_low, seed, lam=0.0, gamma=0.0))[1] < 0.5


def test_a_reward_of_nothing_moves_nothing():
    start, models = actor_critic()[0], actor_critic()
    nn.init.zeros_(models[1].score.weight)
    policy = train(lambda prompts, responses: [0.0] * len(prompts), settings(whiten_advantages=True), models)[0]
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), policy.parameters(), strict=True))


def test_a_constant_reward_leaves_the_policy_near_its_start():
    assert start_and_end(learned(always_one, lr=3e-3), "kl_k3")[1] < 0.3
    assert start_and_end(learned(says_good, lr=3e-3), "kl_k3")[1] > 1.0


def test_a_penalty_for_a_missing_end_teaches_to_end():
    start, end = start_and_end(learned(always_one, missing_eos_penalty=1.0), "eos_rate")
    assert start < 0.5
    assert end > 0.8


def test_the_penalty_holds_the_policy_near_its_start(monkeypatch):
    free, held = learned(says_good, steps=18), learned(says_good, steps=18, kl_coef=1.0)
    assert start_and_end(free, "kl_k3")[1] > 2
    assert start_and_end(held, "kl_k3")[1] < 0.4
    real = ppo.shape_rewards
    monkeypatch.setattr(ppo, "shape_rewards", lambda *a, kl_coef, **k: real(*a, kl_coef=-kl_coef, **k))
    assert start_and_end(learn(always_one, steps=18, kl_coef=1.0), "kl_k3")[1] > 1  # the wrong sign drives away
