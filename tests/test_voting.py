"""Votes by hand: who is a member, who scores what unseen, and what strength says."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rmlib import voting

RUN = tiny.reward_run("preferences.parquet", "base", data_seed=10, head_seed=5)

# ---------------------------------------------------------------- members


def test_members_differ_in_name_and_data_seed_alone():
    members = voting.members(RUN, 3)
    assert [member.data_seed for member in members] == [10, 11, 12]
    assert [member.name for member in members] == ["toy-m0", "toy-m1", "toy-m2"]
    assert all(vars(replace(member, name=RUN.name, data_seed=RUN.data_seed)) == vars(RUN) for member in members)


def test_members_differ_in_their_head_on_request():
    members = voting.members(RUN, 3, vary_head=True)
    assert [(member.data_seed, member.head_seed) for member in members] == [(10, 5), (11, 6), (12, 7)]


# ---------------------------------------------------------------- folds

KINDS = ("pair", "group", "response")


@st.composite
def pair_graphs(draw) -> dict[str, np.ndarray]:
    """Random pairs of a few responses, each in a group, some of them rows to vote on."""
    edge = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda ends: ends[0] != ends[1])
    edges = np.array(draw(st.lists(edge, min_size=3, max_size=30)))
    group = draw(st.lists(st.sampled_from("abcdef"), min_size=len(edges), max_size=len(edges)))
    rows = draw(st.lists(st.sampled_from(range(len(edges))), min_size=1, unique=True))
    names = np.array([f"response {i}" for i in range(10)])
    return {
        "rows": np.array(rows),
        "chosen": names[edges[:, 0]],
        "rejected": names[edges[:, 1]],
        "group": np.array(group),
    }


def units(graph: dict[str, np.ndarray], rows: np.ndarray, by: str) -> set:
    """What a model must not have seen of ``rows``, or what it saw."""
    if by == "pair":
        return set(rows.tolist())
    names = ("group",) if by == "group" else ("chosen", "rejected")
    return {name for column in names for name in graph[column][rows].tolist()}


@pytest.mark.parametrize("by", KINDS)
@settings(max_examples=60, deadline=None, database=None)
@given(graph=pair_graphs(), n_folds=st.integers(2, 4), seed=st.integers(0, 99))
def test_every_row_is_scored_once_by_models_that_saw_nothing_of_it(by, graph, n_folds, seed):
    assume(len(units(graph, graph["rows"], by)) >= n_folds)
    plan = voting.fold_plan(**graph, by=by, n_folds=n_folds, seed=seed)
    assert sorted(np.concatenate([score for _, score in plan])) == sorted(graph["rows"])
    for train, score in plan:
        assert len(score) > 0
        assert set(train.tolist()) <= set(graph["rows"].tolist())
        assert units(graph, train, by).isdisjoint(units(graph, score, by))


def ring(n: int = 24) -> dict[str, np.ndarray]:
    """Each response stands in two pairs, groups hold three pairs: every kind of fold differs."""
    names = np.array([f"r{i}" for i in range(n)])
    return {"rows": np.arange(n), "chosen": names, "rejected": np.roll(names, 1), "group": np.arange(n) // 3}


@pytest.mark.parametrize(("by", "n_models"), [("pair", 4), ("group", 4)])
def test_folds_are_of_equal_size_and_train_on_all_the_rest(by, n_models):
    plan = voting.fold_plan(**ring(), by=by, n_folds=4, seed=0)
    assert len(plan) == n_models
    for train, score in plan:
        assert len(score) == 6
        assert sorted([*train, *score]) == list(range(24))


def test_folds_by_response_take_a_model_for_each_two_folds_and_hide_no_more_than_those():
    """Ten folds of six responses; two folds stand in 24 pairs of the ring at most, one fold in 12."""
    plan = voting.fold_plan(**ring(60), by="response", n_folds=10, seed=0)
    assert 10 < len(plan) <= 10 * 11 // 2
    assert min(len(train) for train, _ in plan) >= 60 - 24
    assert max(len(train) for train, _ in plan) <= 60 - 7  # six responses stand in seven pairs or more


def test_folds_by_pair_do_show_a_response_to_its_judge():
    """So that disjoint responses are no accident of these pairs."""
    graph = ring()
    shared = [
        units(graph, train, "response") & units(graph, score, "response")
        for train, score in voting.fold_plan(**graph, by="pair", n_folds=4, seed=0)
    ]
    assert all(shared)


@pytest.mark.parametrize("by", KINDS)
def test_the_seed_draws_the_folds(by):
    first, again, other = (
        [score.tolist() for _, score in voting.fold_plan(**ring(), by=by, n_folds=3, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_an_unknown_kind_of_fold_raises_and_lists_the_choices():
    with pytest.raises(ValueError, match="'debate'; choose from pair, response, group"):
        voting.fold_plan(**ring(), by="debate", n_folds=2, seed=0)


@pytest.mark.parametrize(("by", "n_units"), [("pair", 24), ("group", 8), ("response", 24)])
def test_more_folds_than_units_raise(by, n_units):
    voting.fold_plan(**ring(), by=by, n_folds=n_units, seed=0)
    with pytest.raises(ValueError, match=f"{n_units} units by {by} cannot fill {n_units + 1} folds"):
        voting.fold_plan(**ring(), by=by, n_folds=n_units + 1, seed=0)


def test_out_of_fold_runs_train_and_score_what_the_plan_says():
    plan = [(np.array([1, 2]), np.array([0])), (np.array([0]), np.array([1, 2]))]
    runs = voting.out_of_fold(RUN, plan, 2)
    assert [run.name for run in runs] == ["toy-fold0-m0", "toy-fold0-m1", "toy-fold1-m0", "toy-fold1-m1"]
    assert [run.data_seed for run in runs] == [10, 11, 10, 11]
    assert [(run.rows.tolist(), run.score_rows.tolist()) for run in runs[1:3]] == [([1, 2], [0]), ([0], [1, 2])]


# ---------------------------------------------------------------- rewards


def write_scores(folder: Path, rows: list[tuple[str, int, float, float]]) -> Path:
    folder.mkdir()
    columns = ["pair_id", "snapshot", "reward_chosen", "reward_rejected"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "scores.parquet")
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two members; the second one did not score pair *b*, and has a second snapshot and one with dropout."""
    first = write_scores(tmp_path / "m0", [("a", 0, 3.0, 1.0), ("b", 0, 0.0, 0.5), ("c", 0, 1.0, 1.0)])
    rows = [("c", 0, 4.0, 1.0), ("a", 0, 0.0, 2.0), ("a", 1, 9.0, 0.0), ("a", 1000, 5.0, 5.0)]
    second = write_scores(tmp_path / "m1", rows)
    return [first, second]


def margins(folders: list[Path], pair_ids: list[str]) -> np.ndarray:
    """Margins, shape (members, pairs)."""
    rewards = np.array([voting.read_rewards(folder, pair_ids, snapshot=0) for folder in folders])
    return rewards[..., 0] - rewards[..., 1]


def test_rewards_come_in_the_order_asked_for_and_are_nan_where_unscored(folders):
    rewards = voting.read_rewards(folders[1], ["b", "c", "a"], snapshot=0)
    assert rewards == pytest.approx(np.array([[np.nan, np.nan], [4.0, 1.0], [0.0, 2.0]]), nan_ok=True)
    assert margins(folders, ["c", "a", "b"]) == pytest.approx(
        np.array([[0.0, 2.0, -0.5], [3.0, -2.0, np.nan]]), nan_ok=True
    )


def test_rewards_are_those_of_the_snapshot_asked_for(folders):
    assert voting.read_rewards(folders[1], ["a"], snapshot=0).tolist() == [[0.0, 2.0]]
    assert voting.read_rewards(folders[1], ["a"], snapshot=1000).tolist() == [[5.0, 5.0]]


def test_rewards_are_those_of_the_finished_model_unless_a_snapshot_is_asked_for(folders):
    assert voting.read_rewards(folders[1], ["a"]).tolist() == [[9.0, 0.0]]
    assert voting.read_rewards(folders[0], ["a"]).tolist() == [[3.0, 1.0]]


def test_a_snapshot_that_was_not_taken_raises_and_lists_those_that_were(folders):
    with pytest.raises(ValueError, match=r"m1 holds no snapshot 2, only \[0, 1, 1000\]"):
        voting.read_rewards(folders[1], ["a"], snapshot=2)


# ---------------------------------------------------------------- strength


def test_strength_by_hand():
    margins = np.array([[1.0, -1.0], [2.0, -3.0], [6.0, -2.0]])
    table = voting.strength(margins, ["a", "b"])
    assert table["pair_id"].tolist() == ["a", "b"]
    assert table["mean"].tolist() == pytest.approx([3.0, -2.0])
    assert table["std"].tolist() == pytest.approx([np.sqrt(14 / 3), np.sqrt(2 / 3)])  # over M, not M - 1
    assert table["std"].tolist() != pytest.approx([np.sqrt(14 / 2), np.sqrt(2 / 2)])


def test_members_that_did_not_score_a_pair_do_not_count_for_it(folders):
    table = voting.strength(margins(folders, ["a", "b", "c"]), ["a", "b", "c"])
    assert table["mean"].tolist() == pytest.approx([0.0, -0.5, 1.5])
    assert table["std"].tolist() == pytest.approx([2.0, 0.0, 1.5])


def test_a_pair_that_nobody_scored_is_named(folders):
    ids = ["a", "forgotten", "c"]
    with pytest.raises(ValueError, match="no member scored pair 'forgotten'"):
        voting.strength(margins(folders, ids), ids)


# ---------------------------------------------------------------- slices


@settings(max_examples=60, deadline=None, database=None)
@given(mean=st.lists(st.floats(-5, 5), min_size=1, max_size=60), n=st.integers(1, 12))
def test_slices_part_the_pairs_in_equal_sizes_from_weak_to_strong(mean, n):
    mean = np.array(mean)
    slices = voting.slices(mean, n)
    assert sorted(np.concatenate(slices).tolist()) == list(range(len(mean)))
    sizes = [len(part) for part in slices]
    assert len(slices) == n
    assert max(sizes) - min(sizes) <= 1
    filled = [mean[part] for part in slices if len(part)]
    assert all(weak.max() <= strong.min() for weak, strong in pairwise(filled))


def test_slices_by_hand():
    mean = np.array([0.3, -2.0, 5.0, 0.1, 1.0, -0.5])
    assert [part.tolist() for part in voting.slices(mean, 3)] == [[1, 5], [0, 3], [2, 4]]


def test_strengths_of_other_labels_are_refused_by_the_first_pair(tmp_path):
    table = pd.DataFrame({"pair_id": ["a", "b", "c"], "mean": [1.0, -1.0, 0.5], "std": 1.0})
    table.assign(chosen_id=["a1", "b1", "c1"]).to_parquet(tmp_path / "named.parquet")
    same = voting.read_strength(tmp_path / "named.parquet", ["c", "a"], chosen_ids=["c1", "a1"])
    assert same["mean"].tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match=r"named\.parquet: 1 pairs are labelled otherwise than here, the first is 'b'"):
        voting.read_strength(tmp_path / "named.parquet", ["a", "b"], chosen_ids=["a1", "b2"])
    table.to_parquet(tmp_path / "plain.parquet")  # a table that does not say cannot be checked
    assert len(voting.read_strength(tmp_path / "plain.parquet", ["a"], chosen_ids=["other"])) == 1
