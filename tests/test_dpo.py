"""DPO: first losses from plain passes, margins that grow and shrink, runs that repeat and resume."""

import functools
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from rmlib import data, dpo, models, policies, ppo, runs, training
from rmlib.training import Optimisation

ASKED = ("one two", "three")
ROWS = np.arange(16)
EVERY_ROW = {"lr": 3e-3, "batch_size": 16, "schedule": "constant", "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model of large random weights."""
    return tiny.save_causal(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return tiny.save_preferences(tmp_path_factory.mktemp("pairs") / "preferences.parquet")


@pytest.fixture
def run(start, pairs) -> dpo.DPORun:
    settings = ppo.Settings(steps=1, lr=0.0, critic_lr=0.0, max_new_tokens=4)
    how = {"rows": ROWS, "optimisation": Optimisation(**EVERY_ROW), "beta": 0.5, "steps": 6, "seed": 0}
    return dpo.DPORun("toy", start, start, pairs, **how, asked=ASKED, settings=settings)


def train(run: dpo.DPORun, folder: Path, **kwargs) -> pd.DataFrame:
    """The log of a run."""
    folder.mkdir(exist_ok=True)
    dpo.train_dpo_run(run, folder, **kwargs)
    return pd.read_parquet(folder / "log.parquet")


@torch.no_grad()
def said(policy: Path, run: dpo.DPORun, side: str) -> np.ndarray:
    """Log-probability of every response of ``side`` with its end, one plain pass a text."""
    model, words, out = models.load_language_model(policy), models.load_tokenizer(policy), []
    for row in pd.read_parquet(run.preferences).iloc[run.rows].itertuples():
        prompt = f"{words.bos_token}{row.prompt}{words.sep_token}"
        n, ids = len(words(prompt)["input_ids"]), words(f"{prompt}{getattr(row, side)}{words.eos_token}")["input_ids"]
        each = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        out.append(each[n - 1 :].sum().item())
    return np.array(out)


def margins(policy: Path, run: dpo.DPORun) -> np.ndarray:
    return said(policy, run, "chosen") - said(policy, run, "rejected")


# ---------------------------------------------------------------- the loss


def test_a_policy_that_is_its_reference_starts_at_log_2(run, tmp_path):
    assert train(replace(run, steps=1), tmp_path)["loss"].tolist() == pytest.approx([math.log(2)], abs=1e-6)


def test_in_half_precision_policy_and_reference_are_measured_alike(half_precision, run, other, tmp_path, monkeypatch):
    """Else a policy that is its reference would seem to have moved."""
    run = replace(run, policy=other, reference=other, optimisation=Optimisation(lr=0.0, batch_size=4), steps=4)
    assert train(run, tmp_path)["loss"].tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    real = ppo.of_all
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "of_all", lambda *given: torch.autocast("cpu", enabled=False)(real)(*given))
        assert train(run, tmp_path)["loss"].tolist() != pytest.approx([math.log(2)] * 4, abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_first_loss_is_that_of_plain_passes_through_policy_and_reference(run, other, tmp_path, beta):
    run = replace(run, policy=other, steps=1, beta=beta)
    (first,) = train(run, tmp_path)["loss"]
    ours, known = margins(run.policy, run), margins(run.reference, run)
    assert first == pytest.approx(np.logaddexp(0, -beta * (ours - known)).mean(), rel=1e-4)
    for wrong in (ours, known - ours, ours + known):
        assert first != pytest.approx(np.logaddexp(0, -beta * wrong).mean(), rel=1e-2)


def test_the_response_and_its_end_are_counted_and_the_prompt_is_not(other):
    model, words = models.load_language_model(other), models.load_tokenizer(other)
    texts = data.Responses(
        data.prompt_ids(["one two three"] * 2, words), data.response_ids(["good", "bad six one"], words), 0
    )
    ours = dpo.response_logprobs(model, texts.collate(np.arange(2))).tolist()
    for value, prompt, response in zip(ours, texts.prompt, texts.response, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))
        each = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        of_response = each[len(prompt) - 1 :]
        assert value == pytest.approx(of_response.sum().item(), abs=1e-4)
        for wrong in (each.sum(), of_response[:-1].sum(), of_response.mean()):
            assert value != pytest.approx(wrong.item(), abs=1e-2)


# ---------------------------------------------------------------- what is learned


def test_the_margin_of_chosen_over_rejected_grows_and_with_swapped_pairs_shrinks(run, tmp_path):
    table = pd.read_parquet(run.preferences)
    table[["chosen", "rejected"]] = table[["rejected", "chosen"]].to_numpy()
    table.to_parquet(tmp_path / "swapped.parquet")
    log = train(run, tmp_path / "straight")
    train(replace(run, preferences=tmp_path / "swapped.parquet"), tmp_path / "turned")
    before = margins(run.policy, run)
    assert (margins(tmp_path / "straight" / "model", run) - before).mean() > 1
    assert (margins(tmp_path / "turned" / "model", run) - before).mean() < -1
    assert log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (np.diff(log["loss"]) < 0).all()


def test_a_larger_beta_stays_nearer_to_the_reference(run, tmp_path):
    moved = {}
    for beta in (0.1, 5.0):
        train(replace(run, beta=beta, steps=20), tmp_path / str(beta))
        moved[beta] = (margins(tmp_path / str(beta) / "model", run) - margins(run.policy, run)).mean()
    assert 0 < moved[5.0] < 0.7 * moved[0.1]


def test_only_its_rows_are_learned_from(run, tmp_path):
    table = pd.read_parquet(run.preferences)
    table.loc[16:, ["chosen", "rejected"]] = "eight"
    table.to_parquet(tmp_path / "other.parquet")
    expected = train(run, tmp_path / "a")
    pd.testing.assert_frame_equal(train(replace(run, preferences=tmp_path / "other.parquet"), tmp_path / "b"), expected)
    assert not train(replace(run, rows=ROWS + 1), tmp_path / "c").equals(expected)


def test_the_seed_orders_the_pairs_and_passes_are_made_as_needed(run, tmp_path):
    run = replace(run, optimisation=Optimisation(**EVERY_ROW | {"batch_size": 5}), steps=9)  # 4 batches a pass
    logs = [train(replace(run, seed=seed), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    assert len(logs[0]) == 9
    pd.testing.assert_frame_equal(logs[0], logs[1])
    assert not logs[0]["loss"][1:].equals(logs[2]["loss"][1:])


# ---------------------------------------------------------------- what it leaves


def test_a_unit_leaves_answers_of_the_model_beside_them(run, tmp_path):
    train(run, tmp_path)
    answers = pd.read_parquet(tmp_path / "answers.parquet")
    assert list(answers.columns) == ["prompt", "response"]
    assert answers["prompt"].tolist() == list(ASKED)
    policy, words = models.load_language_model(tmp_path / "model"), models.load_tokenizer(tmp_path / "model")
    seed = zlib.crc32(b"toy")
    assert answers["response"].tolist() == policies.answer(policy, words, ASKED, seed=seed, **run.settings.sampling)
    before = models.load_language_model(run.policy).state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in policy.state_dict().items())


class Interrupted(Exception):
    """The run is killed."""


def content(folder: Path) -> list[bytes]:
    names = ("log.parquet", "answers.parquet", "model/model.safetensors")
    return [(folder / name).read_bytes() for name in names]


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_run_resumed_equals_a_straight_one(run, other, tmp_path, monkeypatch, step):
    run = replace(run, policy=other, optimisation=Optimisation(lr=1e-3, batch_size=5))
    train(run, tmp_path / "straight")
    fit, save, saved = training.fit, training.save_state, []

    def save_and_stop(*args) -> None:
        save(*args)
        saved.append(args)
        if len(saved) == step:
            raise Interrupted

    monkeypatch.setattr(training, "fit", functools.partial(fit, checkpoint_seconds=0))
    monkeypatch.setattr(training, "save_state", save_and_stop)
    kept = {"checkpoint": tmp_path / "state.pt"}
    with pytest.raises(Interrupted):
        train(run, tmp_path / "killed", **kept)
    train(run, tmp_path / "killed", **kept)
    assert len(saved) == 6  # the second start made the other steps alone
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


def test_a_prompt_whose_answer_may_not_fit_is_named_before_training(run, tmp_path):
    fits, long = (" ".join(["two"] * n) for n in (58, 59))  # 58 words, beginning, separator and 4 new tokens: 64
    train(replace(run, asked=(*ASKED, fits), steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"prompt 2 \('two two .*: 61 tokens and max_new_tokens 4 .* context of 64"):
        dpo.train_dpo_run(replace(run, asked=(*ASKED, long)), tmp_path)


def test_the_key_of_a_run_follows_what_decides_it(run, other):
    changes = [{}, {"beta": 0.6}, {"rows": ROWS + 1}, {"reference": other}, {"seed": 1}, {"steps": 7}]
    assert len({runs.content_key(replace(run, **change)) for change in changes}) == len(changes)
