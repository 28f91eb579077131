"""The intervals that figures draw: their values, and that arms are paired by seed."""

import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from rmlib import figures


def test_interval_over_seeds_is_students():
    mean, low, high = figures.over_seeds(np.array([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]]))
    np.testing.assert_allclose(mean, [2, 10])
    np.testing.assert_allclose(high - mean, [4.302653 / np.sqrt(3), 0], rtol=1e-6)  # t at .975, two degrees; std 1
    np.testing.assert_allclose(mean - low, high - mean)


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_a_mean_and_no_interval(seeds):
    mean, low, high = figures.over_seeds(np.arange(seeds, dtype=float)[:, None])
    assert mean == (seeds - 1) / 2
    assert np.isnan([low, high]).all()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What ``figures.save`` asks of a run, without a record."""
    monkeypatch.setattr(plt, "show", lambda: None)
    tables = {}
    yield types.SimpleNamespace(draft=tmp_path, id="made", files=[], table=tables.__setitem__, tables=tables)
    plt.close("all")


def test_gaps_are_paired_by_seed_whatever_the_order_of_rows(run):
    """Seeds differ by hundreds, arms by one: unpaired, the interval would be hundreds wide."""
    plain = {0: 0.0, 1: 100.0, 2: 200.0}
    rows = [{"paid": "KL", "arm": arm, "seed": s, "near": plain[s] + gap, "far": plain[s] + 2 * gap}
            for arm, gap in (("plain", 0), ("flip", 1)) for s in plain]  # fmt: skip
    shuffled = pd.DataFrame(rows).iloc[[4, 0, 2, 5, 1, 3]]
    figures.gaps(run, shuffled, "plain", "apart")
    drawn = run.tables["apart"]
    assert drawn[["paid", "arm", "level"]].to_numpy().tolist() == [["KL", "flip", "near"], ["KL", "flip", "far"]]
    np.testing.assert_allclose(drawn[["mean", "low", "high"]], [[1, 1, 1], [2, 2, 2]])
    assert {path.name for path in run.draft.iterdir()} == {"apart.png", "apart.pdf"}


def test_gaps_of_one_seed_are_points_without_intervals(run):
    rows = [{"paid": "KL", "arm": arm, "seed": 0, "near": gap} for arm, gap in (("plain", 0.5), ("flip", 0.2))]
    figures.gaps(run, pd.DataFrame(rows), "plain", "apart")
    drawn = run.tables["apart"].iloc[0]
    assert drawn["mean"] == pytest.approx(-0.3)
    assert np.isnan([drawn["low"], drawn["high"]]).all()
