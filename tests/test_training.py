"""The loop learns, repeats, resumes and stops; a reward model's tables say what was trained and when."""

import errno
import functools
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from rmlib import contrastive, data, denoising, metarm, models, runs, training
from rmlib.training import Optimisation

# ---------------------------------------------------------------- schedules


def rates(name: str, steps: int = 1000, warmup: int = 100) -> list[float]:
    return [training.SCHEDULES[name](step, steps, warmup) for step in range(steps)]


@pytest.mark.parametrize(
    ("name", "first", "middle", "warm", "last"),
    [
        ("linear", 0.01, 0.5, 1.0, 1 / 900),
        ("constant", 0.01, 0.5, 1.0, 1.0),
        ("inverse_sqrt", 0.1, 0.5, 1.0, np.sqrt(0.1)),
    ],
)
def test_schedules_by_value(name, first, middle, warm, last):
    rate = rates(name)
    assert [rate[step] for step in (0, 49, 99, 999)] == pytest.approx([first, middle, warm, last])
    assert max(rate) == pytest.approx(1.0)


def test_linear_falls_by_the_same_amount_each_step_after_its_warm_up():
    assert np.diff(rates("linear")[100:]) == pytest.approx(-1 / 900)


def test_inverse_sqrt_starts_from_a_floor_and_halves_in_four_times_the_steps():
    rate = rates("inverse_sqrt")
    assert rate[:10] == pytest.approx([0.1] * 10)
    assert rate[399] == pytest.approx(0.5)


@pytest.mark.parametrize("name", training.SCHEDULES)
def test_schedules_without_warm_up_start_at_the_full_rate(name):
    assert rates(name, steps=10, warmup=0)[0] == 1.0


def test_an_unknown_schedule_raises_and_lists_the_choices():
    with pytest.raises(ValueError, match="'cosine'; choose from linear, inverse_sqrt, constant"):
        Optimisation(lr=0.1, batch_size=4, schedule="cosine")


# ---------------------------------------------------------------- the loop, on a linear toy


N = 64
INPUTS = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [np.arange(start, start + 8) % N for start in range(0, 8 * 20, 8)]


def toy_model(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return models.FrozenRewardModel(6, hidden_size=16, dropout=dropout)


def toy_batch(rows: np.ndarray) -> dict[str, Tensor]:
    return {"features": INPUTS[rows]}


def toy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Which sign the first input has."""
    return F.softplus(-models.rewards(model, batch) * batch["features"][:, 0].sign()).mean()


def toy_fit(model: nn.Module, batches=BATCHES, lr: float = 1.0e-2, max_grad_norm: float = 1.0, **kwargs) -> nn.Module:
    optimisation = Optimisation(lr=lr, batch_size=8, max_grad_norm=max_grad_norm)
    return training.fit(model, batches, toy_batch, kwargs.pop("loss_fn", toy_loss), optimisation, **kwargs)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_fit_learns_a_separable_toy_and_returns_it_in_evaluation_mode():
    model = toy_fit(toy_model(), BATCHES * 5)
    right = models.rewards(model, {"features": INPUTS}).sign() == INPUTS[:, 0].sign()
    assert right.float().mean() > 0.95
    assert not model.training


def test_after_step_counts_from_one_and_sees_the_loss_before_the_step():
    seen = []
    first_loss = toy_loss(toy_model(), toy_batch(BATCHES[0])).item()
    toy_fit(toy_model(), after_step=lambda row: seen.append((row["step"], row["loss"])))
    assert [step for step, _ in seen] == list(range(1, 21))
    assert seen[0][1] == pytest.approx(first_loss)


def test_the_record_holds_a_row_a_step_and_what_after_step_adds_to_it():
    record = {"log": [], "seen": []}

    def after_step(row: dict) -> None:
        row["half"] = row["step"] / 2
        record["seen"].append(row["step"])

    toy_fit(toy_model(), BATCHES[:3], record=record, after_step=after_step)
    assert [sorted(row) for row in record["log"]] == [["half", "loss", "step"]] * 3
    assert [row["half"] for row in record["log"]] == [0.5, 1.0, 1.5]
    assert record["seen"] == [1, 2, 3]


def test_the_first_step_moves_every_weight_by_the_rate_that_the_schedule_gives():
    """Adam's first step is the learning rate in size, here half of it: step 1 of a warm-up of 2."""
    start, moved, model = weights(toy_model()), [], toy_model()
    toy_fit(model, after_step=lambda row: moved.append((weights(model) - start).abs().max().item()))
    assert moved[0] == pytest.approx(0.5e-2, rel=1e-3)


def gradient_norms(max_grad_norm: float) -> list[float]:
    model, norms = toy_model(), []

    def after_step(row: dict) -> None:
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())

    toy_fit(model, after_step=after_step, max_grad_norm=max_grad_norm)
    return norms


def test_gradients_are_clipped_to_the_largest_norm_allowed():
    free = gradient_norms(1000.0)
    assert min(free) > 0.05
    assert gradient_norms(0.05) == pytest.approx([0.05] * 20, rel=1e-3)


def test_a_loss_that_is_not_finite_raises_with_its_step_and_rows():
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return toy_loss(model, batch) / (batch["features"] != INPUTS[21]).any(1).all()  # row 21 stands in batch 3

    with pytest.raises(FloatingPointError, match=r"inf at step 3, batch rows \[16, 17, 18, 19, 20, 21, 22, 23\]"):
        toy_fit(toy_model(), loss_fn=loss_fn)


def test_weights_that_need_no_gradient_stay_as_they_are():
    model = toy_model()
    model.hidden.weight.requires_grad_(False)
    before = model.hidden.weight.clone()
    toy_fit(model)
    assert torch.equal(model.hidden.weight, before)
    assert not torch.equal(model.score.weight, toy_model().score.weight)


def test_without_a_look_ahead_the_loop_is_the_plain_one_bit_for_bit():
    model, record = toy_model(), {"log": []}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, fused=True)
    for step, rows in enumerate(BATCHES):
        optimiser.param_groups[0]["lr"] = 1.0e-2 * training.linear(step, 20, 2)
        optimiser.zero_grad()
        loss = toy_loss(model, toy_batch(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        record["log"].append({"step": step + 1, "loss": loss.item()})
    ours, log = log_of(toy_model())
    assert torch.equal(ours, weights(model))
    assert log == record["log"]


# ---------------------------------------------------------------- the loop, in several processes


SHARED: dict[str, dict] = {
    "even": {},
    "odd": {"batches": [rows[:7] for rows in BATCHES]},
    "a last batch of one": {"batches": [*BATCHES[:9], BATCHES[9][:1]]},
    "ahead": {"ahead": 8},
    "ahead, odd": {"ahead": 5, "batches": [rows[:3] for rows in BATCHES]},
    "ahead at random": {"ahead": 5, "ascent": "random"},
    "ahead, a last batch of one": {"ahead": 2, "batches": [*BATCHES[:9], BATCHES[9][:1]]},
}


def toy_ahead(folder: Path, batch_size: int, ascent: str = "normalised"):
    """The look-ahead of the toy, to nine prompts with four responses each."""
    models.save_features(INPUTS, [str(i) for i in range(N)], folder / "toy.safetensors")
    table = pd.DataFrame(
        {"prompt": [f"prompt {i // 4}" for i in range(36)], "response_id": [str(i) for i in range(36)]}
    )
    table.to_parquet(folder / "toy.parquet")
    meta_set = metarm.MetaSet(folder / "toy.parquet", folder / "toy.safetensors", 64)
    return metarm.look_ahead(metarm.Meta(folder / "toy.parquet", 0.05, ascent, batch_size), meta_set, 3)


def toy_shared(
    folder: Path, ahead: int | None = None, ascent: str = "normalised", **kwargs
) -> tuple[Tensor, list[dict]]:
    """Weights and log of the toy, which do not depend on how many processes train it."""
    folder.mkdir(exist_ok=True)
    return log_of(toy_model(), **kwargs, **({"ahead": toy_ahead(folder, ahead, ascent)} if ahead else {}))


def train_as_one_of(rank: int, n: int, port: int, folder: Path) -> None:
    """What one of ``n`` processes is left with after every case, in a file of its own."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {
        "ACCELERATE_USE_CPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    mine = folder / f"of-{rank}"
    left = {name: toy_shared(mine, **case) for name, case in SHARED.items()}
    assert training.accelerator().num_processes == n
    kept = {"checkpoint": folder / "state.pt", "checkpoint_seconds": 0}
    with pytest.raises(Interrupted):
        toy_shared(mine, ahead=5, after_step=interrupt_at(13), **kept)
    torch.distributed.barrier()
    steps = []
    left["resumed"] = toy_shared(mine, ahead=5, after_step=lambda row: steps.append(row["step"]), **kept)
    assert steps == list(range(13, 21))
    with pytest.raises(ValueError, match="1 prompts a step cannot be shared by 2 processes"):
        toy_shared(mine, ahead=1)
    torch.save(left, folder / f"left-{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    """What each of two processes is left with; they start once for all cases."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train_as_one_of, (2, port, folder), nprocs=2)
    return [torch.load(folder / f"left-{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*SHARED, "resumed"])
def test_one_process_and_two_train_the_same_model_and_log_the_same_losses(of_two, tmp_path, name):
    alone, log = toy_shared(tmp_path, **SHARED.get(name, {"ahead": 5}))
    (first, first_log), (second, second_log) = (left[name] for left in of_two)
    assert torch.equal(first, second)
    assert first_log == second_log
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-6)
    assert [row.keys() for row in first_log] == [row.keys() for row in log]
    for row, other in zip(first_log, log, strict=True):
        assert row == pytest.approx(other, abs=1e-6)


def test_a_mean_of_the_means_of_two_uneven_parts_would_train_another_model(of_two):
    def mean_of_means(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        parts = [toy_loss(model, {"features": batch["features"][k::2]}) for k in (0, 1)]
        return sum(parts) / 2

    other = toy_fit(toy_model(), loss_fn=mean_of_means, **SHARED["odd"])
    assert (weights(other) - of_two[0]["odd"][0]).abs().max() > 1e-3
    halves = toy_fit(toy_model(), loss_fn=mean_of_means)  # of even parts it is the mean of all
    torch.testing.assert_close(weights(halves), of_two[0]["even"][0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- checkpoints


class Interrupted(Exception):
    """The run is killed."""


def interrupt_at(step: int):
    def after_step(row: dict) -> None:
        if row["step"] == step:
            raise Interrupted

    return after_step


def log_of(model: nn.Module, **kwargs) -> tuple[Tensor, list[dict]]:
    """Weights after training, and the log."""
    record = {"log": []}
    return weights(toy_fit(model, record=record, **kwargs)), record["log"]


@pytest.fixture
def every_step(tmp_path) -> dict:
    """A checkpoint at every step."""
    return {"checkpoint": tmp_path / "state.pt", "checkpoint_seconds": 0}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_interrupted_run_resumed_equals_a_straight_run_bit_for_bit(every_step, dropout):
    straight, log = log_of(toy_model(dropout=dropout))
    with pytest.raises(Interrupted):
        toy_fit(toy_model(dropout=dropout), after_step=interrupt_at(13), **every_step)
    steps = []
    resumed = log_of(toy_model(99, dropout), after_step=lambda row: steps.append(row["step"]), **every_step)
    assert steps == list(range(13, 21))
    assert torch.equal(resumed[0], straight)
    assert resumed[1] == log


def test_resuming_without_the_state_of_the_generator_would_not_repeat_dropout(every_step, monkeypatch):
    straight = toy_fit(toy_model(dropout=0.5))
    with pytest.raises(Interrupted):
        toy_fit(toy_model(dropout=0.5), after_step=interrupt_at(13), **every_step)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    resumed = toy_fit(toy_model(99, dropout=0.5), **every_step)
    assert not torch.equal(weights(resumed), weights(straight))


def test_an_interrupted_run_before_its_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted):
        toy_fit(toy_model(), after_step=interrupt_at(3), checkpoint=tmp_path / "state.pt", checkpoint_seconds=60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cost", "expected"), [(0, [5, 10, 15, 20]), (2.5, [5, 10, 15, 20]), (5, [5, 15])])
def test_checkpoints_are_as_far_apart_as_asked_or_twenty_times_what_one_costs(tmp_path, monkeypatch, cost, expected):
    """A clock of ten seconds a step, and ``cost`` seconds a checkpoint."""
    clock, saves = [0.0], []

    def save(path, state, record) -> None:
        saves.append(len(record["log"]))
        clock[0] += cost

    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "save_state", save)
    tick = {"after_step": lambda row: clock.__setitem__(0, clock[0] + 10)}
    toy_fit(toy_model(), checkpoint=tmp_path / "state.pt", checkpoint_seconds=50, **tick)
    assert saves == expected


@pytest.mark.parametrize("size", [0, 1, 2, 10, 100, 1000, -100, -1])
def test_a_checkpoint_cut_short_is_told_and_training_starts_anew(every_step, capsys, size):
    straight, log = log_of(toy_model(dropout=0.5))
    with pytest.raises(Interrupted):
        toy_fit(toy_model(dropout=0.5), after_step=interrupt_at(13), **every_step)
    path = every_step["checkpoint"]
    path.write_bytes(path.read_bytes()[:size])
    resumed = log_of(toy_model(dropout=0.5), **every_step)
    assert "state.pt: not readable" in capsys.readouterr().err
    assert torch.equal(resumed[0], straight)
    assert resumed[1] == log


@pytest.mark.parametrize("content", [b"no checkpoint", b"\0" * 5000, b"PK\x03\x04" + b"x" * 500])
def test_a_checkpoint_that_is_none_is_told_and_training_starts_anew(every_step, capsys, content):
    every_step["checkpoint"].write_bytes(content)
    assert torch.equal(log_of(toy_model(), **every_step)[0], weights(toy_fit(toy_model())))
    assert "state.pt: not readable" in capsys.readouterr().err


def test_a_checkpoint_on_a_full_disk_is_named_and_the_last_one_serves(small_disk):
    kept = {"checkpoint": small_disk / "state.pt", "checkpoint_seconds": 0}

    def fill(row: dict) -> None:
        if row["step"] == 6:
            tiny.fill(small_disk)

    with pytest.raises(OSError, match=r"the disk is full: .*state\.pt was not written"):
        toy_fit(toy_model(dropout=0.5), after_step=fill, **kept)
    assert tiny.names(small_disk) == ["ballast", "state.pt"]
    (small_disk / "ballast").unlink()
    steps = []
    resumed = toy_fit(toy_model(99, 0.5), after_step=lambda row: steps.append(row["step"]), **kept)
    assert steps == list(range(6, 21))
    assert torch.equal(weights(resumed), weights(toy_fit(toy_model(dropout=0.5))))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(every_step, monkeypatch):
    with pytest.raises(Interrupted):
        toy_fit(toy_model(), after_step=interrupt_at(3), **every_step)
    before = every_step["checkpoint"].read_bytes()

    def save(content: dict, path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"the disk is full: .*state\.pt was not written"):
        toy_fit(toy_model(), **every_step)
    assert every_step["checkpoint"].read_bytes() == before
    assert tiny.names(every_step["checkpoint"].parent) == ["state.pt"]


# ---------------------------------------------------------------- which pairs at which step


def batches_of(rows: np.ndarray, lengths: np.ndarray, **changes) -> list[np.ndarray]:
    return training.run_batches(tiny.reward_run("", "", rows=rows, **changes), lengths)


LENGTHS = np.random.default_rng(0).integers(5, 60, size=100)
ROWS = np.arange(10, 63)  # 53 rows: 7 batches of 8, the last one short


def test_each_row_is_seen_once_an_epoch():
    batches = batches_of(ROWS, LENGTHS, epochs=3)
    assert len(batches) == 3 * 7
    for epoch in range(3):
        assert sorted(np.concatenate(batches[7 * epoch : 7 * epoch + 7])) == ROWS.tolist()
    assert not np.array_equal(np.concatenate(batches[:7]), np.concatenate(batches[7:14]))


def test_half_an_epoch_sees_each_row_at_most_once():
    batches = batches_of(ROWS, LENGTHS, epochs=0.5)
    assert len(batches) == 4  # round(3.5), to even
    assert max(Counter(np.concatenate(batches).tolist()).values()) == 1


def test_steps_take_the_place_of_epochs_and_make_as_many_passes_as_they_need():
    batches = batches_of(ROWS, LENGTHS, epochs=1, steps=17)
    assert len(batches) == 17
    seen = Counter(np.concatenate(batches).tolist())
    assert set(seen) == set(ROWS.tolist())
    assert set(seen.values()) <= {2, 3}


def test_the_data_seed_alone_orders_the_batches():
    first, again, other = (batches_of(ROWS, LENGTHS, data_seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))
    assert np.array_equal(np.concatenate(first), np.concatenate(batches_of(ROWS, LENGTHS, data_seed=1, head_seed=9)))


# ---------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return tiny.save_preferences(tmp_path_factory.mktemp("pairs") / "preferences.parquet")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> str:
    """A Llama with large weights, and with output embeddings that are its input embeddings."""
    return tiny.save_causal(tmp_path_factory.mktemp("speaker"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> str:
    return tiny.save_features(tmp_path_factory.mktemp("features") / "features.safetensors")


@pytest.fixture
def train(tmp_path, pairs):
    """Train a toy run on a base; returns its score table and its log."""
    number = iter(range(100))

    def run(base: str, preferences: str = pairs, **changes) -> tuple[pd.DataFrame, pd.DataFrame]:
        folder = tmp_path / f"run-{next(number)}"
        folder.mkdir()
        training.train_reward_model(tiny.reward_run(preferences, base, **changes), folder)
        return pd.read_parquet(folder / "scores.parquet"), pd.read_parquet(folder / "log.parquet")

    return run


def accuracy(scores: pd.DataFrame, rows: slice = slice(None)) -> float:
    """Share of pairs ranked as labelled, among ``rows`` of the table."""
    return float((scores["reward_chosen"] > scores["reward_rejected"])[rows].mean())


def rewards(scores: pd.DataFrame, snapshot: int = 0) -> np.ndarray:
    return scores.loc[scores["snapshot"] == snapshot, ["reward_chosen", "reward_rejected"]].to_numpy()


UNSEEN = slice(32, 48)


@pytest.mark.parametrize("base", ["llama", "features"])
def test_a_separable_preference_set_is_learned_and_generalises(base, train, request):
    scores, log = train(request.getfixturevalue(base), epochs=15)
    assert accuracy(scores) > 0.95
    assert accuracy(scores, UNSEEN) > 0.9
    assert log["loss"].iloc[0] == pytest.approx(np.log(2), abs=0.3)
    assert log["loss"].iloc[-4:].mean() < 0.1


def test_an_encoder_is_read_through_cached_features_alone(train, tmp_path):
    with pytest.raises(ValueError, match="bert: an encoder is read through cached features"):
        train(tiny.save_encoder(tmp_path / "bert"))


def test_scores_hold_every_scored_pair_in_order_as_the_parameters_say(train, features):
    scores, log = train(features, epochs=2, score_rows=np.array([40, 3, 7]))
    assert list(scores.columns) == ["pair_id", "snapshot", "reward_chosen", "reward_rejected"]
    assert scores["pair_id"].tolist() == ["pair-40", "pair-3", "pair-7"]
    assert scores["snapshot"].tolist() == [0, 0, 0]
    assert rewards(scores) == pytest.approx(rewards(train(features, epochs=2)[0])[[40, 3, 7]], abs=1e-6)
    assert log["step"].tolist() == list(range(1, 9))


@pytest.mark.parametrize("base", ["llama", "features"])
def test_the_same_seeds_repeat_the_scores_and_each_seed_has_an_effect(base, train, request):
    run = functools.partial(train, request.getfixturevalue(base), epochs=2)
    first = rewards(run()[0])
    assert np.array_equal(first, rewards(run()[0]))
    for change in ({"data_seed": 1}, {"head_seed": 1}):
        assert np.abs(first - rewards(run(**change)[0])).max() > 1e-4, change


def test_label_smoothing_reaches_the_loss(train, features):
    plain, smooth = (train(features, epochs=15, label_smoothing=rate)[0] for rate in (0.0, 0.2))
    gap = {name: np.median(-np.diff(rewards(scores))) for name, scores in (("plain", plain), ("smooth", smooth))}
    assert gap["plain"] > 2 * np.log(4)
    assert gap["smooth"] == pytest.approx(np.log(4), abs=0.4)  # logit of 0.8, where the smoothed loss is least


# ---------------------------------------------------------------- flipped labels


@pytest.mark.parametrize("base", ["llama", "features"])
def test_flipping_every_label_negates_what_is_learned(base, train, request):
    run = functools.partial(train, request.getfixturevalue(base), epochs=15)
    straight, flipped = run()[0], run(flipped=np.arange(32))[0]
    assert accuracy(straight, UNSEEN) > 0.9
    assert accuracy(flipped, UNSEEN) == pytest.approx(1 - accuracy(straight, UNSEEN), abs=0.1)


def test_scores_stay_as_labelled_while_training_sees_flipped_pairs(train, features):
    scores, log = train(features, flipped=np.arange(32), epochs=15, score_rows=np.arange(32))
    assert log["loss"].iloc[-1] < 0.3  # against the flipped labels, which it fits
    assert accuracy(scores) < 0.05


def test_rows_flipped_but_not_trained_on_change_nothing(train, features):
    plain, other = train(features)[0], train(features, flipped=np.arange(32, 48))[0]
    assert np.array_equal(rewards(plain), rewards(other))


# ---------------------------------------------------------------- treatments, by value

STANDSTILL = Optimisation(lr=0.0, batch_size=8, schedule="constant", warmup_ratio=0.0)
RNG = np.random.default_rng(0)
MARGIN, TARGET = RNG.normal(0.5, 1.5, size=48), RNG.uniform(size=48)
FLIPPED = np.arange(0, 32, 3)

TREATMENTS: dict[str, dict] = {
    "none": {},
    "margin": {"margin": MARGIN},
    "target": {"target": TARGET},
    "label smoothing": {"label_smoothing": 0.2},
    "flip rate": {"flip_rate": 0.2},
    "margin and target": {"margin": MARGIN, "target": TARGET},
    "margin and label smoothing": {"margin": MARGIN, "label_smoothing": 0.2},
    "margin and flip rate": {"margin": MARGIN, "flip_rate": 0.2},
    "certain targets": {"target": np.ones(48)},
    "no margin": {"margin": np.zeros(48)},
}


def first_flipped(run: training.RewardRun) -> np.ndarray:
    """Mask over all pairs of those that are trained on swapped."""
    return np.isin(np.arange(48), [] if run.flipped is None else run.flipped)


def differences(run: training.RewardRun, rows: np.ndarray, model: nn.Module | None = None) -> np.ndarray:
    """Reward of the text that stands first less that of the other; by the model of ``run`` before any training."""
    pairs = training.tokenized(run.preferences, run.base, run.max_length)
    model = model or models.reward_model(run.base, head_seed=run.head_seed)
    with torch.no_grad():
        first, second = models.pair_rewards(model.eval(), pairs.collate(rows, first_flipped(run)))
    return (first - second).double().numpy()


def softplus(x: np.ndarray) -> np.ndarray:
    """Minus the logarithm of the logistic function of -x."""
    return np.logaddexp(0, x)


def weighed(d: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    return weight * softplus(-d) + (1 - weight) * softplus(d)


def by_hand(d: np.ndarray, rows: np.ndarray, margin=None, target=None, label_smoothing=0.0, flip_rate=0.0) -> float:
    """Mean loss of a batch, from the formulas of the paper and of rDPO."""
    d = d if margin is None else d - margin[rows]
    if flip_rate:
        return ((1 - flip_rate) * softplus(-d) - flip_rate * softplus(d)).mean() / (1 - 2 * flip_rate)
    return weighed(d, 1 - label_smoothing if target is None else target[rows]).mean()


def losses_by_hand(run: training.RewardRun, loss: Callable[[np.ndarray, np.ndarray], float]) -> list[float]:
    """Loss of every batch of ``run`` before any training."""
    batches = training.run_batches(run, training.tokenized(run.preferences, run.base, run.max_length).lengths)
    return [loss(differences(run, rows), rows) for rows in batches]


@pytest.mark.parametrize("flipped", [None, FLIPPED], ids=["as labelled", "flipped"])
@pytest.mark.parametrize("name", TREATMENTS)
@pytest.mark.parametrize("base", ["speaker", "features"])
def test_every_treatment_reaches_the_loss_of_every_batch(train, pairs, request, base, name, flipped):
    base, treatment = request.getfixturevalue(base), TREATMENTS[name]
    settings = {"optimisation": STANDSTILL, "flipped": flipped}
    run = tiny.reward_run(pairs, base, **settings)
    logged = train(base, **settings, **treatment)[1]["loss"].tolist()
    assert len(logged) == 4
    assert logged == pytest.approx(losses_by_hand(run, functools.partial(by_hand, **treatment)), abs=1e-5)
    changes = name not in ("none", "certain targets", "no margin")
    assert (logged != pytest.approx(losses_by_hand(run, by_hand), abs=1e-3)) is changes
    if flipped is not None:
        straight = tiny.reward_run(pairs, base, optimisation=STANDSTILL)
        as_labelled = losses_by_hand(straight, functools.partial(by_hand, **treatment))
        assert logged != pytest.approx(as_labelled, abs=1e-3)


WRONG_FORMULAS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "the margin outside the logistic function, as printed": (
        "margin",
        lambda d, rows: (softplus(-d) + MARGIN[rows]).mean(),
    ),
    "the margin added": ("margin", lambda d, rows: softplus(-d - MARGIN[rows]).mean()),
    "the size of the margin": ("margin", lambda d, rows: softplus(np.abs(MARGIN[rows]) - d).mean()),
    "the margin by place in the batch": ("margin", lambda d, rows: softplus(MARGIN[: len(d)] - d).mean()),
    "the target by place in the batch": ("target", lambda d, rows: weighed(d, TARGET[: len(d)]).mean()),
    "the target of the other side": ("target", lambda d, rows: weighed(d, 1 - TARGET[rows]).mean()),
    "smoothing by half as much": ("label smoothing", lambda d, rows: weighed(d, 0.9).mean()),
    "the flip rate as smoothing": ("flip rate", lambda d, rows: weighed(d, 0.8).mean()),
    "the margin on the right side alone": (
        "margin and label smoothing",
        lambda d, rows: (0.8 * softplus(MARGIN[rows] - d) + 0.2 * softplus(d)).mean(),
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_a_wrong_formula_would_show_in_the_log(train, pairs, features, wrong):
    name, formula = WRONG_FORMULAS[wrong]
    logged = train(features, optimisation=STANDSTILL, **TREATMENTS[name])[1]["loss"].tolist()
    run = tiny.reward_run(pairs, features, optimisation=STANDSTILL)
    assert logged == pytest.approx(losses_by_hand(run, functools.partial(by_hand, **TREATMENTS[name])), abs=1e-5)
    assert logged != pytest.approx(losses_by_hand(run, formula), abs=1e-2)


def test_with_rewards_near_zero_the_first_losses_are_those_of_the_margins_alone(train, llama):
    """As the paper's curves begin: mean softplus of the means, and more where flipped pairs have theirs turned."""
    mean = np.random.default_rng(1).normal(1.0, 1.5, size=32)
    strengths = denoising.Strengths(np.arange(32), mean, 48)
    below = denoising.weakest(mean)
    first = {}
    for name, changes in {"margin": strengths.margin(), "flip and margin": strengths.margin(below)}.items():
        first[name] = train(llama, optimisation=STANDSTILL, **changes)[1]["loss"].mean()
    assert first["margin"] == pytest.approx(softplus(mean).mean(), abs=0.03)
    assert first["flip and margin"] == pytest.approx(softplus(np.abs(mean)).mean(), abs=0.03)
    assert first["flip and margin"] - first["margin"] > 0.1


@pytest.mark.parametrize("base", ["speaker", "features"])
def test_flips_with_turned_margins_are_swapped_columns_with_margins_of_that_size(train, tmp_path, pairs, request, base):
    base, rows = request.getfixturevalue(base), np.random.default_rng(2).permutation(48)[:32]
    strengths = denoising.Strengths(rows, np.random.default_rng(3).normal(0.5, 1.5, size=32), 48)
    below = denoising.weakest(strengths.mean)
    assert 5 < len(below) < 27
    table, swapped = pd.read_parquet(pairs), tmp_path / "swapped.parquet"
    columns = ["chosen", "rejected", "chosen_id", "rejected_id"]
    turned = table.loc[rows[below], ["rejected", "chosen", "rejected_id", "chosen_id"]]
    table.loc[rows[below], columns] = turned.to_numpy()
    table.to_parquet(swapped)

    settings = {"rows": rows, "epochs": 2}
    scores, log = train(base, **settings, **strengths.margin(below))
    size = strengths.of_all(np.abs(strengths.mean))
    other_scores, other_log = train(base, preferences=swapped, **settings, margin=size)
    pd.testing.assert_frame_equal(log, other_log, rtol=1e-5)
    expected = rewards(other_scores).copy()
    expected[rows[below]] = expected[rows[below]][:, ::-1]
    assert rewards(scores) == pytest.approx(expected, abs=1e-4)
    unturned = train(base, **settings, **strengths.flip(below), **strengths.margin())[1]
    assert np.abs(log["loss"] - unturned["loss"]).max() > 0.1


def test_a_margin_of_rows_that_are_not_trained_on_may_be_anything(train, features):
    margin = MARGIN.copy()
    margin[32:] = np.nan
    margin[40] = np.inf
    told, clean = (train(features, epochs=2, margin=values) for values in (margin, MARGIN))
    assert np.array_equal(rewards(told[0]), rewards(clean[0]))
    pd.testing.assert_frame_equal(told[1], clean[1])


def test_scores_of_a_treated_run_are_plain(train, features):
    """The logged loss has the margin; the scores compare arms, so they have none."""
    still = {"optimisation": STANDSTILL}
    plain, treated = (train(features, **still, **TREATMENTS[name]) for name in ("none", "margin and target"))
    assert np.array_equal(rewards(plain[0]), rewards(treated[0]))
    assert plain[1]["loss"].tolist() != pytest.approx(treated[1]["loss"].tolist(), abs=1e-2)


# ---------------------------------------------------------------- imitation of the chosen response


def said_by_hand(run: training.RewardRun) -> list[Tensor]:
    """For every pair the cross-entropy of each token of prompt and first response, by the language model itself."""
    pairs, writer = training.tokenized(run.preferences, run.base, run.max_length), models.load_language_model(run.base)
    first = [pairs.rejected[i] if swap else pairs.chosen[i] for i, swap in enumerate(first_flipped(run))]
    return [hand_losses(writer, prompt, response) for prompt, response in zip(pairs.prompt, first, strict=True)]


@pytest.mark.parametrize("flipped", [None, FLIPPED], ids=["as labelled", "flipped"])
def test_the_imitation_term_is_the_cross_entropy_of_the_response_that_stands_first(train, pairs, speaker, flipped):
    settings = {"optimisation": STANDSTILL, "flipped": flipped, "margin": MARGIN}
    run = tiny.reward_run(pairs, speaker, **settings)
    logged = train(speaker, **settings, lm_coef=0.5)[1]["loss"].tolist()
    prompt = training.tokenized(pairs, speaker, 256).prompt

    def of_response(run: training.RewardRun) -> list[Tensor]:
        return [losses[len(ids) - 1 :] for losses, ids in zip(said_by_hand(run), prompt, strict=True)]

    def total(said: list[Tensor], coef: float = 0.5) -> list[float]:
        def loss(d: np.ndarray, rows: np.ndarray) -> float:
            return by_hand(d, rows, margin=MARGIN) + coef * torch.cat([said[i] for i in rows]).mean().item()

        return losses_by_hand(run, loss)

    right = of_response(run)
    assert logged == pytest.approx(total(right), abs=1e-4)
    wrong = {
        "with the prompt": said_by_hand(run),
        "each response alike": [losses.mean()[None] for losses in right],
        "the other response": of_response(
            replace(run, flipped=np.setdiff1d(np.arange(48), () if flipped is None else flipped))
        ),
        "without the end": [losses[:-1] for losses in right],
    }
    for said in wrong.values():
        assert logged != pytest.approx(total(said), abs=1e-3)
    assert logged != pytest.approx(total(right, coef=-0.5), abs=0.1)  # the sign that is printed
    assert logged != pytest.approx(total(right, coef=0.0), abs=0.1)


def test_the_imitation_term_teaches_the_trunk_to_say_the_chosen_words(tmp_path, pairs, speaker):
    """Cross-entropy of the chosen responses by the kept trunk, with and without the term."""
    said = {}
    for coef in (0.0, 1.0):
        run = tiny.reward_run(pairs, speaker, epochs=10, lm_coef=coef, keep_model=True)
        training.train_reward_model(run, tmp_path / str(coef))
        model = models.load_reward_model(tmp_path / str(coef) / "model")
        batch = training.tokenized(pairs, speaker, 256).collate(np.arange(32), np.zeros(48, dtype=bool))
        with torch.no_grad():
            logits = models.imitation_logits(model, batch)[:, :-1]
        mask = batch["imitated"][:, 1:]
        said[coef] = F.cross_entropy(logits[mask], batch["input_ids"][:, 1:][mask]).item()
    assert said[1.0] < said[0.0] - 0.5


@pytest.mark.parametrize("base", ["features", "untied"])
def test_the_imitation_term_is_refused_without_a_language_model_head(train, features, tmp_path, base):
    bases = {"features": lambda path: features, "untied": tiny.save_causal}
    base = bases[base](tmp_path / base)
    with pytest.raises(ValueError, match="a causal model whose input and output embeddings are tied"):
        train(base, lm_coef=0.1)
    train(base, lm_coef=0.0)


# ---------------------------------------------------------------- targets that move towards the model's own


def state_after(run: training.RewardRun, folder, steps: int) -> tuple[Tensor, nn.Module]:
    """Targets and model that a run of so many steps leaves; a constant rate makes them those of a longer run."""
    tiny.save_every_step(replace(run, steps=steps), folder / f"{steps}", folder / f"{steps}.pt")
    state = torch.load(folder / f"{steps}.pt", map_location="cpu", weights_only=True)
    model = models.reward_model(run.base, head_seed=99)
    model.load_state_dict(state["model"])
    return state["record"]["treatment"][0]["target"], model.eval()


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.fixture(params=["features", "llama"])
def smoothed(pairs, request) -> training.RewardRun:
    """Thirty rows, so epochs of four steps of which the last is short; some flipped, 18 not trained on."""
    rows = np.random.default_rng(5).permutation(48)[:30]
    changes = {"rows": rows, "self_smoothing": 0.3, "flipped": np.sort(rows[:10])}
    return tiny.reward_run(pairs, request.getfixturevalue(request.param), **changes)


def test_after_each_epoch_targets_move_towards_what_the_model_believes_then(tmp_path, smoothed):
    expected, unflipped, rows = np.ones(48), np.ones(48), smoothed.rows
    for steps in (4, 8, 12):
        target, model = state_after(smoothed, tmp_path, steps)
        expected[rows] = 0.7 * expected[rows] + 0.3 * logistic(differences(smoothed, rows, model))
        straight = replace(smoothed, flipped=None)
        unflipped[rows] = 0.7 * unflipped[rows] + 0.3 * logistic(differences(straight, rows, model))
        assert target.numpy() == pytest.approx(expected, abs=1e-5)
        assert target.numpy() != pytest.approx(unflipped, abs=1e-3)
    assert (target.numpy()[np.setdiff1d(np.arange(48), rows)] == 1.0).all()
    assert target.numpy()[rows].max() < 1.0


def test_targets_stay_within_an_epoch(tmp_path, smoothed):
    assert torch.equal(state_after(smoothed, tmp_path, 3)[0], torch.ones(48))
    assert torch.equal(state_after(smoothed, tmp_path, 4)[0], state_after(smoothed, tmp_path, 7)[0])


def test_the_next_epoch_is_trained_on_the_moved_targets(tmp_path, smoothed):
    """Its first loss by hand; and the first epoch is that of a plain run."""
    logs = {}
    for name, changes in {"smoothed": {}, "plain": {"self_smoothing": 0.0}}.items():
        training.train_reward_model(replace(smoothed, steps=5, **changes), tmp_path / name)
        logs[name] = pd.read_parquet(tmp_path / name / "log.parquet")["loss"].to_numpy()
    assert logs["smoothed"][:4].tolist() == logs["plain"][:4].tolist()
    target, model = state_after(smoothed, tmp_path, 4)
    pairs = training.tokenized(smoothed.preferences, smoothed.base, smoothed.max_length)
    rows = training.run_batches(replace(smoothed, steps=5), pairs.lengths)[4]
    d = differences(smoothed, rows, model)
    assert logs["smoothed"][4] == pytest.approx(weighed(d, target.double().numpy()[rows]).mean(), abs=1e-5)
    assert logs["plain"][4] == pytest.approx(softplus(-d).mean(), abs=1e-5)
    assert abs(logs["smoothed"][4] - logs["plain"][4]) > 1e-3


def test_no_self_smoothing_is_the_plain_run(train, features):
    plain, none = train(features, epochs=3), train(features, epochs=3, self_smoothing=0.0)
    pd.testing.assert_frame_equal(plain[1], none[1])
    assert np.array_equal(rewards(plain[0]), rewards(none[0]))


# ---------------------------------------------------------------- treatments that are refused


def toy_run(**changes) -> training.RewardRun:
    return tiny.reward_run("preferences.parquet", "base", **changes)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *((name, value, "0, 0.5") for name in ("label_smoothing", "flip_rate") for value in (0.5, -0.1, 1.0, np.nan)),
        *(("self_smoothing", value, "0, 1") for value in (1.0, -0.1, np.nan)),
        *(("lm_coef", value, "0, inf") for value in (-1.0, np.inf, np.nan)),
    ],
)
def test_a_rate_outside_its_range_raises_and_names_the_run(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^toy: {name} must lie in \[{allowed}\), got {value}$"):
        toy_run(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing", 0.49), ("flip_rate", 0.49), ("self_smoothing", 0.99), ("lm_coef", 10.0)]
)
def test_rates_up_to_their_bounds_are_taken(name, value):
    assert getattr(toy_run(**{name: value}), name) == value
    assert getattr(toy_run(**{name: 0.0}), name) == 0.0


def one_value(wrong: float, row: int, other: float = 0.5) -> np.ndarray:
    values = np.full(48, other)
    values[row] = wrong
    return values


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("margin", value) for value in (np.nan, np.inf, -np.inf)),
        *(("target", value) for value in (np.nan, np.inf, -0.1, 1.1)),
    ],
)
def test_a_margin_or_target_out_of_range_raises_with_its_row(name, wrong):
    rows = np.array([30, 7, 21, 4])
    with pytest.raises(ValueError, match=rf"^toy: the {name} of row 21 is {wrong}$"):
        toy_run(rows=rows, **{name: one_value(wrong, 21)})
    toy_run(rows=rows, **{name: one_value(wrong, 20)})  # which is not trained on


def test_the_first_row_that_is_out_of_range_in_the_order_of_the_rows_is_named():
    target = one_value(2.0, 7)
    target[4] = 3.0
    with pytest.raises(ValueError, match=r"the target of row 7 is 2\.0"):
        toy_run(rows=np.array([30, 7, 21, 4]), target=target)


def test_targets_at_their_bounds_and_margins_of_any_size_are_taken():
    toy_run(target=np.array([0.0, 1.0] * 24), margin=np.array([-1e9, 1e9] * 24))


EXCLUSIVE = {"label_smoothing": 0.1, "flip_rate": 0.1, "self_smoothing": 0.1, "target": np.ones(48)}


@pytest.mark.parametrize("names", list(combinations(EXCLUSIVE, 2)), ids=" and ".join)
def test_two_treatments_that_weigh_the_sides_exclude_one_another(names):
    first, second = names
    with pytest.raises(ValueError, match=f"^toy: {first} and {second} exclude one another$"):
        toy_run(**{name: EXCLUSIVE[name] for name in names})
    with pytest.raises(ValueError, match="exclude one another"):
        replace(toy_run(**{first: EXCLUSIVE[first]}), **{second: EXCLUSIVE[second]})


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_margins_flips_and_imitation_go_with_any_of_them(name):
    toy_run(margin=MARGIN, flipped=FLIPPED, lm_coef=0.1, **{name: EXCLUSIVE[name]})


# ---------------------------------------------------------------- snapshots, dropout passes


def test_snapshots_show_the_model_at_equal_intervals(train, features):
    """A constant rate makes the first steps of a long run those of a short one."""
    scores, _ = train(features, steps=12, snapshots=4)
    assert scores["snapshot"].unique().tolist() == [0, 1, 2, 3]
    assert np.array_equal(rewards(scores, 0), rewards(train(features, steps=3)[0]))
    assert np.array_equal(rewards(scores, 2), rewards(train(features, steps=9)[0]))
    assert np.array_equal(rewards(scores, 3), rewards(train(features, steps=12)[0]))
    assert not np.array_equal(rewards(scores, 0), rewards(scores, 1))


@pytest.mark.parametrize("base", ["llama", "features"])
def test_looking_at_a_model_does_not_change_its_training(base, train, request):
    base = request.getfixturevalue(base)
    plain, watched = (train(base, steps=6, dropout=0.3, snapshots=n)[0] for n in (1, 3))
    assert np.array_equal(rewards(plain, 0), rewards(watched, 2))


@pytest.mark.parametrize("base", ["llama", "features"])
def test_dropout_passes_differ_from_one_another_and_are_numbered_from_1000(base, train, request):
    run = functools.partial(train, request.getfixturevalue(base), steps=4)
    scores, again = (run(dropout=0.3, dropout_passes=2)[0] for _ in range(2))
    assert scores["snapshot"].unique().tolist() == [0, 1000, 1001]
    passes = [rewards(scores, snapshot) for snapshot in (0, 1000, 1001)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(passes[a] - passes[b]).max() > 1e-4
    assert np.array_equal(passes[2], rewards(again, 1001))
    without = run(dropout_passes=1)[0]
    assert rewards(without, 0) == pytest.approx(rewards(without, 1000), abs=1e-6)


def test_scoring_leaves_the_model_in_the_mode_it_was_in(pairs, features):
    model = models.reward_model(features, head_seed=0, dropout=0.5)
    batches = training.tokenized(pairs, features, 64)
    for mode in (True, False):
        model.train(mode)
        first, second = (training.score_pairs(model, batches, np.arange(5))["reward_chosen"] for _ in range(2))
        assert np.array_equal(first, second)
        assert model.training is mode


def test_scores_do_not_depend_on_the_batch_they_are_computed_in(pairs, llama):
    model, batches = models.reward_model(llama, head_seed=0), training.tokenized(pairs, llama, 64)
    rows = np.random.default_rng(0).permutation(48)[:20]
    large, small = (training.score_pairs(model, batches, rows, batch_size=size) for size in (64, 3))
    for side in ("reward_chosen", "reward_rejected"):
        assert large[side] == pytest.approx(small[side], abs=1e-6)


def test_the_kept_model_scores_as_the_table_says(tmp_path, pairs, llama):
    run = tiny.reward_run(pairs, llama, steps=4, keep_model=True)
    training.train_reward_model(run, tmp_path)
    model = models.load_reward_model(tmp_path / "model")
    again = training.score_pairs(model, training.tokenized(pairs, llama, 256), run.score_rows)
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table["reward_chosen"].to_numpy() == pytest.approx(again["reward_chosen"], abs=1e-5)
    assert table["reward_rejected"].to_numpy() == pytest.approx(again["reward_rejected"], abs=1e-5)


def test_more_snapshots_than_steps_raise(train, features):
    with pytest.raises(ValueError, match="snapshots"):
        train(features, steps=2, snapshots=4)


@pytest.mark.parametrize("base", ["llama", "features"])
def test_scores_have_full_precision_even_where_training_is_in_half(half_precision, tmp_path, pairs, base, request):
    run = tiny.reward_run(pairs, request.getfixturevalue(base), steps=4, keep_model=True)
    training.train_reward_model(run, tmp_path)
    scores = pd.read_parquet(tmp_path / "scores.parquet")["reward_chosen"].to_numpy(copy=True)
    model = models.load_reward_model(tmp_path / "model")
    again = training.score_pairs(model, training.tokenized(pairs, run.base, 256), run.score_rows)["reward_chosen"]
    assert scores == pytest.approx(again, abs=1e-6)
    assert not np.array_equal(scores, torch.from_numpy(scores).bfloat16().float().numpy())


# ---------------------------------------------------------------- reward models, killed and resumed

EVERYTHING = {
    "steps": 12,
    "snapshots": 3,
    "dropout": 0.3,
    "dropout_passes": 2,
    "flipped": np.arange(0, 32, 5),
}


def tables(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("scores.parquet", "log.parquet")]


@pytest.fixture(params=["features", "llama"])
def whole_run(pairs, request) -> training.RewardRun:
    return tiny.reward_run(pairs, request.getfixturevalue(request.param), **EVERYTHING)


@pytest.fixture
def killed(monkeypatch):
    """Kills a run right before or right after it has saved its n-th checkpoint of this start."""
    save = training.save_state

    def kill(run: training.RewardRun, folder, n: int, when: str) -> None:
        saved = []

        def save_and_stop(*args) -> None:
            saved.append(args)
            if when == "after" or len(saved) < n:
                save(*args)
            if len(saved) == n:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(training, "save_state", save_and_stop)
            tiny.save_every_step(run, folder, folder / "state.pt")

    return kill


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_a_killed_reward_model_resumed_leaves_the_tables_of_a_straight_run(tmp_path, whole_run, killed, step, when):
    """Step 4 takes a snapshot, 7 does not, 12 is the last: what follows it are the passes with dropout."""
    training.train_reward_model(whole_run, tmp_path / "straight")
    killed(whole_run, tmp_path, step, when)
    first = step + (when == "after")
    assert tiny.save_every_step(whole_run, tmp_path, tmp_path / "state.pt") == list(range(first, 13))
    assert tables(tmp_path) == tables(tmp_path / "straight")


def test_a_reward_model_killed_after_every_step_gets_there_all_the_same(tmp_path, whole_run, killed):
    training.train_reward_model(whole_run, tmp_path / "straight")
    for _ in range(12):
        killed(whole_run, tmp_path, 1, "after")
    assert tiny.save_every_step(whole_run, tmp_path, tmp_path / "state.pt") == []
    assert tables(tmp_path) == tables(tmp_path / "straight")


@pytest.fixture(params=["features", "speaker"])
def treated_run(pairs, request) -> training.RewardRun:
    """Targets that move after steps 4 and 8, margins and, where it can, imitation."""
    imitation = {"lm_coef": 0.1} if request.param == "speaker" else {}
    treatments = {"self_smoothing": 0.4, "margin": MARGIN} | imitation
    return tiny.reward_run(pairs, request.getfixturevalue(request.param), **EVERYTHING, **treatments)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [4, 5, 8, 12])
def test_a_killed_run_whose_targets_move_resumed_leaves_the_tables_of_a_straight_one(
    tmp_path, treated_run, killed, step, when
):
    training.train_reward_model(treated_run, tmp_path / "straight")
    killed(treated_run, tmp_path, step, when)
    first = step + (when == "after")
    assert tiny.save_every_step(treated_run, tmp_path, tmp_path / "state.pt") == list(range(first, 13))
    assert tables(tmp_path) == tables(tmp_path / "straight")


def test_a_resume_that_lost_the_moved_targets_would_leave_another_log(tmp_path, treated_run, killed):
    training.train_reward_model(treated_run, tmp_path / "straight")
    killed(treated_run, tmp_path, 5, "after")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["record"]["treatment"][0]["target"].fill_(1.0)
    torch.save(state, tmp_path / "state.pt")
    training.train_reward_model(treated_run, tmp_path, tmp_path / "state.pt")
    lost, straight = (pd.read_parquet(folder / "log.parquet")["loss"] for folder in (tmp_path, tmp_path / "straight"))
    assert lost[:5].tolist() == straight[:5].tolist()
    assert np.abs(lost[5:] - straight[5:]).max() > 1e-2


@pytest.mark.parametrize("lost", ["rng", "optimiser", "scheduler"])
def test_a_resume_that_lost_a_part_of_the_state_would_leave_other_scores(
    tmp_path, pairs, features, killed, lost, monkeypatch
):
    optimisation = Optimisation(lr=1.0e-2, batch_size=8, schedule="linear", warmup_ratio=0.5)
    run = tiny.reward_run(pairs, features, optimisation=optimisation, **EVERYTHING)
    training.train_reward_model(run, tmp_path / "straight")
    killed(run, tmp_path, 5, "after")
    owner, name = {
        "rng": (torch, "set_rng_state"),
        "optimiser": (AcceleratedOptimizer, "load_state_dict"),
        "scheduler": (torch.optim.lr_scheduler.LambdaLR, "load_state_dict"),
    }[lost]
    monkeypatch.setattr(owner, name, lambda *args: None)
    training.train_reward_model(run, tmp_path, tmp_path / "state.pt")
    first, last = (pd.read_parquet(folder / "scores.parquet") for folder in (tmp_path, tmp_path / "straight"))
    assert np.array_equal(rewards(first, 0), rewards(last, 0))  # taken at step 4, and kept
    assert not np.array_equal(rewards(first, 2), rewards(last, 2))


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_reward_model_with_a_broken_checkpoint_starts_anew(tmp_path, whole_run, killed, capsys, size):
    training.train_reward_model(whole_run, tmp_path / "straight")
    killed(whole_run, tmp_path, 7, "after")
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:size])
    assert tiny.save_every_step(whole_run, tmp_path, tmp_path / "state.pt") == list(range(1, 13))
    assert tables(tmp_path) == tables(tmp_path / "straight")
    assert "training starts anew" in capsys.readouterr().err


def test_a_worker_killed_by_the_system_is_resumed_by_a_rerun(tmp_path, whole_run):
    def run() -> list:
        settings = {"code": training.REWARD_RUN_CODE, "workers": 1}
        return runs.run_units([whole_run], tiny.die_in_training, tmp_path / "units", **settings)

    training.train_reward_model(whole_run, tmp_path / "straight")
    with pytest.raises(BrokenProcessPool):
        run()
    (folder,) = run()
    assert json.loads((folder / "steps.json").read_text()) == list(range(7, 13))
    assert tables(folder) == tables(tmp_path / "straight")
    assert not list(folder.parent.glob("*.pt"))


# ---------------------------------------------------------------- what decides a result


def test_the_key_of_a_run_follows_the_files_that_decide_it(tmp_path, pairs, llama):
    key = runs.content_key(tiny.reward_run(pairs, llama))
    other_pairs = tiny.save_preferences(tmp_path / "preferences.parquet", n=24)
    assert key != runs.content_key(tiny.reward_run(other_pairs, llama))
    other_base = tiny.save_causal(tmp_path / "base")
    assert key != runs.content_key(tiny.reward_run(pairs, other_base))


def test_the_key_of_a_run_follows_every_treatment(pairs, llama):
    changes = [*TREATMENTS.values(), {"self_smoothing": 0.2}, {"self_smoothing": 0.3}, {"lm_coef": 0.2}]
    changes += [{"margin": one_value(0.1, 40)}, {"margin": one_value(0.2, 40)}, {"target": one_value(0.1, 40)}]
    keys = [runs.content_key(tiny.reward_run(pairs, llama, **change)) for change in changes]
    assert len(set(keys)) == len(keys)
    assert keys[1] == runs.content_key(tiny.reward_run(pairs, llama, margin=MARGIN.copy()))


def test_the_key_of_a_run_on_a_hub_model_follows_its_name(pairs):
    one, other = (runs.content_key(tiny.reward_run(pairs, name)) for name in ("somebody/a-model", "somebody/b-model"))
    assert one != other


def test_the_key_of_a_run_on_features_follows_their_ids(pairs, tmp_path):
    base = tiny.save_features(tmp_path / "features.safetensors")
    key = runs.content_key(tiny.reward_run(pairs, base))
    features, ids = models.load_features(base)
    later = base.stat().st_mtime_ns + 10**9  # a file of the same size may have the same time, to a clock tick
    models.save_features(features, ids[::-1], base)
    os.utime(base, ns=(later, later))
    assert key != runs.content_key(tiny.reward_run(pairs, base))


# ---------------------------------------------------------------- what a run will cost


def counted(said: str) -> tuple[int, ...]:
    """Models, steps, tokens trained on, tokens scored, as a forecast says them."""
    pattern = r"(\d+) reward models, ([\d,]+) steps, ([\d,]+) \w+ to train on and ([\d,]+) to score: "
    return tuple(int(number.replace(",", "")) for number in re.match(pattern, said).groups())


def test_a_forecast_counts_steps_and_tokens(pairs, llama):
    looked = tiny.reward_run(pairs, llama, epochs=2, snapshots=2)
    passed = tiny.reward_run(pairs, llama, score_rows=np.arange(40, 48), dropout_passes=4)
    lengths = training.tokenized(pairs, llama, 256).lengths
    assert len(set(lengths)) > 3
    trained = 3 * lengths[:32].sum()  # two epochs and one
    scored = 2 * lengths.sum() + 5 * lengths[40:].sum()
    assert counted(training.forecast([looked, passed], 2)) == (2, 8 + 4, trained, scored)


def test_a_forecast_on_features_counts_pairs(pairs, features):
    said = training.forecast([tiny.reward_run(pairs, features, steps=7, snapshots=2)], 1)
    assert counted(said) == (1, 7, 7 * 8, 2 * 48)
    assert "pairs to train on" in said


@pytest.mark.parametrize(
    ("a_token", "workers", "about"),
    [(1.0, 1, "48 seconds"), (1.0, 2, "24 seconds"), (10.0, 1, "8 minutes"), (2.5, 1, "2 minutes"), (2.4, 1, "115")],
)
def test_a_forecast_is_told_in_seconds_or_minutes(pairs, features, monkeypatch, a_token, workers, about):
    """32 pairs to train on, and 48 to score at a third of the cost."""
    monkeypatch.setattr(training, "_seconds_a_token", lambda run: a_token)
    assert f"about {about}" in training.forecast([tiny.reward_run(pairs, features)], workers)


def test_a_forecast_times_one_thread_and_gives_the_others_back(pairs, llama, monkeypatch):
    threads, loss = [], models.pair_rewards

    def note(*args) -> tuple:
        threads.append(torch.get_num_threads())
        return loss(*args)

    monkeypatch.setattr(models, "pair_rewards", note)
    torch.set_num_threads(2)
    try:
        said = training.forecast([tiny.reward_run(pairs, llama)], 2)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(models, "pair_rewards", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training.forecast([tiny.reward_run(pairs, llama)], 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == [1] * 6
    assert re.search(r"about \d+ (seconds|minutes) \(2 side by side\)$", said)


# ---------------------------------------------------------------- supervised fine-tuning


def demonstrations(n: int = 24) -> data.Responses:
    """Every prompt is answered with *good one two*."""
    rows, tokenizer = tiny.preferences(n), tiny.tokenizer()
    prompts, answers = list(rows["prompt"]), ["good one two"] * n
    return data.Responses(
        data.prompt_ids(prompts, tokenizer), data.response_ids(answers, tokenizer), tokenizer.pad_token_id
    )


def small_llama() -> nn.Module:
    return models.small_llama(tiny.tokenizer(), hidden_size=16, layers=2, heads=2, max_length=64, seed=0)


def sft(epochs: int, **changes) -> tuple[nn.Module, pd.DataFrame]:
    settings = {"epochs": epochs, "seed": 0} | changes
    return training.train_sft(small_llama(), demonstrations(), Optimisation(lr=1.0e-2, batch_size=8), **settings)


def test_fine_tuning_lowers_the_loss_and_teaches_the_answer():
    model, log = sft(epochs=25)
    assert log["step"].tolist() == list(range(1, 76))
    assert log["loss"].iloc[0] > 2.0
    assert log["loss"].iloc[-1] < 0.2
    prompt, answer = (torch.from_numpy(part[0]) for part in (demonstrations().prompt, demonstrations().response))
    written = model.generate(prompt[None], max_new_tokens=4, do_sample=False)[0, len(prompt) :]
    assert written.tolist() == answer.tolist()


def hand_losses(model: nn.Module, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """Cross-entropy of each token of one unpadded text but the first."""
    ids = torch.from_numpy(np.concatenate([prompt, response]))
    with torch.no_grad():
        return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")


def test_the_loss_counts_the_response_tokens_alone():
    _, log = sft(epochs=1, seed=3)
    texts, model = demonstrations(), small_llama()
    rows = data.length_batches(texts.lengths, np.arange(24), 8, np.random.default_rng(3))[0]
    by_token = [hand_losses(model, texts.prompt[i], texts.response[i]) for i in rows]
    of_response = [losses[len(texts.prompt[i]) - 1 :] for losses, i in zip(by_token, rows, strict=True)]
    assert log["loss"].iloc[0] == pytest.approx(torch.cat(of_response).mean().item(), abs=1e-5)
    assert log["loss"].iloc[0] != pytest.approx(torch.cat(by_token).mean().item(), abs=1e-3)


def test_the_mask_of_a_demonstration_leaves_out_prompt_and_padding():
    texts = demonstrations()
    batch = texts.collate(np.arange(3))
    for i in range(3):
        said, start = batch["mask"][i], len(texts.prompt[i])
        assert batch["at"][i, said].tolist() == list(range(start - 1, start - 1 + len(texts.response[i])))
        assert batch["response_ids"][i, said].tolist() == texts.response[i].tolist()
        assert batch["input_ids"][i, batch["at"][i, said] + 1].tolist() == texts.response[i].tolist()


def test_the_seed_of_fine_tuning_orders_the_demonstrations():
    losses = [sft(epochs=1, seed=seed)[1]["loss"].tolist() for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_resumed_fine_tuning_logs_every_step_as_a_straight_one_does(tmp_path, monkeypatch):
    straight = sft(epochs=4)[1]
    checkpoint = {"checkpoint": tmp_path / "state.pt", "checkpoint_seconds": 0}
    save = training.save_state

    def save_and_stop(*args) -> None:
        save(*args)
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "save_state", save_and_stop)
        sft(epochs=4, **checkpoint)
    pd.testing.assert_frame_equal(sft(epochs=4, **checkpoint)[1], straight)


# ---------------------------------------------------------------- two views and a contrast

SIMCSE = contrastive.Contrast("simcse", beta=0.7, temperature=0.5)
QUEUED = contrastive.Contrast("swav", n_prototypes=4, queue_size=24)


def contrasted(pairs: str, base: str, contrast: contrastive.Contrast = SIMCSE, **changes) -> training.RewardRun:
    return tiny.reward_run(pairs, base, dropout=0.3, contrast=contrast, **changes)


def views_of(run: training.RewardRun, model: nn.Module, batch: dict[str, Tensor]) -> list:
    """States and rewards of two passes with dropout, from seed 7."""
    torch.manual_seed(7)
    states = [models.pair_states(model, batch) for _ in range(2)]
    return [(view, [model.score(side)[:, 0] for side in view]) for view in states]


@pytest.mark.parametrize("base", ["llama", "features"])
def test_the_loss_is_the_mean_over_two_views_and_the_weighted_contrast(pairs, request, base):
    run = contrasted(pairs, request.getfixturevalue(base), label_smoothing=0.1)
    model = training._new_model(run).train()
    batch = training.tokenized(pairs, run.base, 256).collate(np.arange(6), np.zeros(48, dtype=bool))
    (first, of_first), (second, of_second) = views_of(run, model, batch)
    ranking = [-0.9 * F.logsigmoid(c - r).mean() - 0.1 * F.logsigmoid(r - c).mean() for c, r in (of_first, of_second)]
    items = [F.normalize(torch.cat(view), dim=1) for view in (first, second)]
    contrast = F.cross_entropy(items[0] @ items[1].T / 0.5, torch.arange(12))
    torch.manual_seed(7)
    loss = training._reward_loss(run, model, dict(batch)).item()
    assert loss == pytest.approx((sum(ranking) / 2 + 0.7 * contrast).item(), abs=1e-5)
    for wrong in (ranking[0] + 0.7 * contrast, sum(ranking) + 0.7 * contrast, sum(ranking) / 2 + contrast):
        assert loss != pytest.approx(wrong.item(), abs=1e-5)


def test_the_control_sees_two_views_of_which_neither_is_the_one_view(train, features):
    control, plain = (train(features, dropout=0.3, contrast=c)[1] for c in (contrastive.Contrast("none"), None))
    assert control["loss"].iloc[0] != pytest.approx(plain["loss"].iloc[0], abs=1e-6)


@pytest.mark.parametrize("changes", [{"dropout": 0.0}, {"dropout": 0.1, "lm_coef": 0.5}], ids=str)
def test_two_views_need_dropout_and_exclude_the_imitation_term(pairs, features, changes):
    with pytest.raises(ValueError, match="toy: two views need dropout, and exclude lm_coef"):
        tiny.reward_run(pairs, features, contrast=SIMCSE, **changes)


@pytest.mark.parametrize("base", ["llama", "features"])
@pytest.mark.parametrize("contrast", [SIMCSE, QUEUED], ids=lambda contrast: contrast.objective)
def test_a_contrasted_model_is_kept_without_its_contrast(pairs, request, tmp_path, base, contrast):
    run = contrasted(pairs, request.getfixturevalue(base), contrast, keep_model=True)
    training.train_reward_model(run, tmp_path)
    model, scores = models.load_reward_model(tmp_path / "model"), pd.read_parquet(tmp_path / "scores.parquet")
    assert not [name for name in model.state_dict() if "contraster" in name]
    found = training.score_pairs(model, training.tokenized(pairs, run.base, 256), run.score_rows)
    assert found["reward_chosen"] == pytest.approx(scores["reward_chosen"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_killed_run_with_a_queue_resumed_leaves_the_tables_of_a_straight_one(tmp_path, pairs, features, killed, step):
    """Batches of 8 pairs are 16 items: the queue of 24 is full after step 2, and takes part from step 3 on."""
    run = contrasted(pairs, features, QUEUED, epochs=3)
    training.train_reward_model(run, tmp_path / "straight")
    killed(run, tmp_path, step, "after")
    assert tiny.save_every_step(run, tmp_path, tmp_path / "state.pt") == list(range(step + 1, 13))
    assert tables(tmp_path) == tables(tmp_path / "straight")


def test_the_states_of_pairs_stand_in_the_order_asked_and_give_their_rewards(pairs, llama):
    model, batches = models.reward_model(llama, head_seed=0).eval(), training.tokenized(pairs, llama, 256)
    rows = np.array([40, 3, 7, 21])
    states = training.pair_states(model, batches, rows, batch_size=2)
    assert states.shape == (2, 4, 16)
    scored = training.score_pairs(model, batches, rows)
    found = model.score(torch.from_numpy(states))[..., 0].detach().numpy()
    assert found[0] == pytest.approx(scored["reward_chosen"], abs=1e-5)
    assert found[1] == pytest.approx(scored["reward_rejected"], abs=1e-5)


def test_a_forecast_counts_both_views_and_a_key_follows_the_contrast(pairs, features):
    said = training.forecast([contrasted(pairs, features, steps=7)], 1)
    assert counted(said) == (1, 7, 2 * 7 * 8, 48)
    contrasts = [None, contrastive.Contrast("none"), SIMCSE, QUEUED, replace(QUEUED, queue_size=25)]
    assert len({runs.content_key(contrasted(pairs, features, contrast)) for contrast in contrasts}) == len(contrasts)


# ---------------------------------------------------------------- a look ahead


def looking(folder: Path, eta: float = 0.05, ascent: str = "normalised", batch_size: int = 5) -> metarm.Meta:
    """A look-ahead to four responses for each of twelve prompts."""
    folder.mkdir(exist_ok=True)
    tiny.responses(12).to_parquet(folder / "meta.parquet")
    return metarm.Meta(folder / "meta.parquet", eta, ascent, batch_size)


def seen_ahead(run: training.RewardRun, sign: float = 1.0) -> list[dict]:
    """The log of ``run`` at a standstill, from its formulas; ``sign`` -1 would look the other way."""
    meta_set = metarm.MetaSet(run.meta.responses, run.base, run.max_length)
    start = models.reward_model(run.base, head_seed=run.head_seed).train()
    pairs, log = training.tokenized(run.preferences, run.base, run.max_length), []
    for step, rows in enumerate(training.run_batches(run, pairs.lengths)):
        drawn = np.random.default_rng([run.data_seed, step]).permutation(12)[: run.meta.batch_size]
        said = meta_set.rewards(start, drawn)
        gaps = torch.stack([(said[:, i] - said[:, j]).abs() for i, j in combinations(range(4), 2)])
        j = 2 / 16 * gaps.sigmoid().sum(0).mean()
        uphill = torch.autograd.grad(j, list(start.parameters()))
        size = torch.cat([g.flatten() for g in uphill]).square().mean().sqrt()
        there = models.reward_model(run.base, head_seed=run.head_seed)
        with torch.no_grad():
            for weight, g in zip(there.parameters(), uphill, strict=True):
                weight += sign * run.meta.eta * (g / size if run.meta.ascent == "normalised" else g)
        loss = softplus(-differences(run, rows, there)).mean()
        log.append({"loss": loss, "difference_loss": j.item(), "spread": said.std(dim=1).mean().item()})
    return log


@pytest.mark.parametrize(("ascent", "eta"), [("normalised", 0.05), ("gradient", 2.0)])
@pytest.mark.parametrize("base", ["llama", "features"])
def test_the_log_of_a_look_ahead_is_the_loss_there_and_what_it_saw_from_here(
    train, pairs, request, tmp_path, base, ascent, eta
):
    base, how = request.getfixturevalue(base), {"optimisation": STANDSTILL, "data_seed": 3}
    run = tiny.reward_run(pairs, base, meta=looking(tmp_path / "meta", eta, ascent), **how)
    log = train(base, meta=run.meta, **how)[1]
    assert list(log.columns) == ["step", "loss", "difference_loss", "spread"]
    by_hand = pd.DataFrame(seen_ahead(run))
    for name in by_hand:
        assert log[name].tolist() == pytest.approx(by_hand[name].tolist(), abs=1e-5)
    plain = train(base, **how)[1]
    assert list(plain.columns) == ["step", "loss"]
    other_way = pd.DataFrame(seen_ahead(run, sign=-1.0))
    for wrong in (plain, other_way):
        assert np.abs(log["loss"] - wrong["loss"]).max() > 1e-4
    assert log["difference_loss"].nunique() > 1  # every step sees other prompts


@pytest.mark.parametrize("base", ["llama", "features"])
def test_a_tiny_eta_is_hardly_a_look_ahead_and_a_large_one_is(train, request, tmp_path, base):
    run = functools.partial(train, request.getfixturevalue(base), epochs=2)
    plain = rewards(run()[0])
    near, far = (rewards(run(meta=looking(tmp_path / "meta", eta))[0]) - plain for eta in (1e-6, 0.3))
    assert np.abs(far).max() > 0.1
    assert np.abs(near).mean() < 0.02 * np.abs(far).mean()


def test_a_run_that_does_not_look_ahead_asks_nothing_of_it(train, features, monkeypatch):
    expected = train(features, epochs=2)
    monkeypatch.setattr(metarm, "look_ahead", None)
    monkeypatch.setattr(metarm, "MetaSet", None)
    for ours, plain in zip(train(features, epochs=2), expected, strict=True):
        pd.testing.assert_frame_equal(ours, plain)


@pytest.mark.parametrize("base", ["llama", "features", "speaker with imitation", "features with a queue"])
@pytest.mark.parametrize(("step", "when"), [(1, "after"), (7, "before")])
def test_a_killed_run_that_looks_ahead_resumed_leaves_the_tables_of_a_straight_one(
    tmp_path, pairs, request, killed, base, step, when
):
    base, _, extra = base.partition(" ")
    changes = EVERYTHING | {"with imitation": {"lm_coef": 0.1}, "with a queue": {"contrast": QUEUED}, "": {}}[extra]
    run = tiny.reward_run(pairs, request.getfixturevalue(base), meta=looking(tmp_path / "meta"), **changes)
    training.train_reward_model(run, tmp_path / "straight")
    killed(run, tmp_path, step, when)
    first = step + (when == "after")
    assert tiny.save_every_step(run, tmp_path, tmp_path / "state.pt") == list(range(first, 13))
    assert tables(tmp_path) == tables(tmp_path / "straight")


@pytest.mark.parametrize("base", ["llama", "features"])
def test_in_half_precision_the_loss_is_computed_where_the_step_looks(half_precision, train, request, tmp_path, base):
    """Autocast keeps casts of the weights: those from before the step on J would give the plain loss."""
    base, still = request.getfixturevalue(base), {"optimisation": STANDSTILL}
    run = tiny.reward_run("", base, meta=looking(tmp_path / "meta", 0.03), **still)
    log, plain = train(base, meta=run.meta, **still)[1], train(base, **still)[1]
    exact = pd.DataFrame(seen_ahead(replace(run, preferences=tiny.save_preferences(tmp_path / "pairs.parquet"))))
    assert np.abs(exact["loss"] - plain["loss"]).mean() > 0.1
    assert np.abs(log["loss"] - exact["loss"]).mean() < 0.03
    assert log["difference_loss"].tolist() != exact["difference_loss"].tolist()


def test_a_meta_set_that_does_not_fit_is_told_before_training(train, features, tmp_path):
    meta = looking(tmp_path / "meta")
    tiny.responses(12).assign(response_id="nobody").to_parquet(meta.responses)
    with pytest.raises(ValueError, match=r"meta\.parquet: no features of response 'nobody'"):
        train(features, meta=meta)


def test_a_key_follows_the_look_ahead_and_the_responses_it_is_to(pairs, features, tmp_path):
    metas = [looking(tmp_path / "a"), looking(tmp_path / "a", 0.06), looking(tmp_path / "a", ascent="gradient")]
    metas += [looking(tmp_path / "a", ascent="random")]
    metas += [looking(tmp_path / "a", batch_size=6), looking(tmp_path / "b")]
    tiny.responses(11).to_parquet(metas[-1].responses)
    keys = [runs.content_key(tiny.reward_run(pairs, features, meta=meta)) for meta in [None, *metas]]
    assert len(set(keys)) == 7
    tiny.responses(12).to_parquet(metas[-1].responses)  # the same content in another place
    assert runs.content_key(tiny.reward_run(pairs, features, meta=metas[-1])) == keys[1]
