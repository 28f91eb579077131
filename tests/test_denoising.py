"""Treatments by hand: what strength flips, drops, smooths and widens, and how much noise it finds."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rmlib import denoising
from rmlib.denoising import Strengths

MEAN = np.array([0.4, -1.0, 2.0, -3.0, 0.1])

# ---------------------------------------------------------------- the weakest pairs


@pytest.mark.parametrize(("share", "expected"), [(0.0, []), (0.2, [3]), (0.6, [1, 3, 4]), (None, [1, 3])])
def test_the_weakest_pairs_are_found_by_share_or_by_a_mean_below_zero(share, expected):
    assert denoising.weakest(MEAN, share).tolist() == expected


def test_a_mean_of_zero_is_not_flipped():
    assert denoising.weakest(np.array([0.0, -1e-9])).tolist() == [1]


@pytest.mark.parametrize("share", [-0.1, 1.0, 20])
def test_a_share_outside_its_range_raises(share):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        denoising.weakest(MEAN, share)


# ---------------------------------------------------------------- the adaptive margin


def adaptive_margin(mean: np.ndarray, flipped: np.ndarray | None = None, scale: float = 1.0) -> np.ndarray:
    """Margins of a set that holds no other pairs."""
    return Strengths(np.arange(len(mean)), mean, len(mean)).margin(flipped, scale)["margin"]


def test_the_margin_is_the_raw_mean_turned_on_flipped_pairs_and_scaled():
    flipped = denoising.weakest(MEAN, 0.6)  # pairs 1, 3 and 4, the last with a positive mean
    margin = adaptive_margin(MEAN, flipped, scale=2.0)
    assert margin.tolist() == pytest.approx([0.8, 2.0, 4.0, 6.0, -0.2])
    # neither the unturned mean nor its size would do
    assert margin.tolist() != pytest.approx((2 * MEAN).tolist())
    assert margin.tolist() != pytest.approx((2 * np.abs(MEAN)).tolist())


def test_the_margin_leaves_the_means_as_they_are():
    mean = MEAN.copy()
    assert adaptive_margin(mean).tolist() == MEAN.tolist()
    adaptive_margin(mean, np.array([0, 1]))
    assert mean.tolist() == MEAN.tolist()


# ---------------------------------------------------------------- treatments

ROWS = np.array([7, 2, 5, 0, 8])  # neither sorted nor all: a position is no row
STRENGTHS = Strengths(ROWS, MEAN, n_pairs=10)
SUSPECTS = np.array([1, 3])  # positions of the means below zero: rows 2 and 0


def spread(elsewhere: float, **of_row: float) -> list[float]:
    """One value for each of the ten pairs: those given for rows ``r0``, ``r2``, ..., ``elsewhere`` for the rest."""
    return [of_row.get(f"r{i}", elsewhere) for i in range(10)]


def plain(changes: dict) -> dict:
    """Changes with lists for arrays, to compare."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in changes.items()}


def test_values_of_training_pairs_stand_at_their_rows():
    assert STRENGTHS.of_all(MEAN).tolist() == spread(0.0, r7=0.4, r2=-1.0, r5=2.0, r0=-3.0, r8=0.1)
    assert STRENGTHS.of_all(MEAN, 9.0).tolist() == spread(9.0, r7=0.4, r2=-1.0, r5=2.0, r0=-3.0, r8=0.1)


def test_flipping_names_the_rows_at_the_positions():
    assert plain(STRENGTHS.flip(SUSPECTS)) == {"flipped": [2, 0]}


def test_dropping_leaves_the_other_rows_in_their_order():
    assert plain(STRENGTHS.drop(SUSPECTS)) == {"rows": [7, 5, 8]}
    assert plain(STRENGTHS.drop(np.array([], dtype=int))) == {"rows": ROWS.tolist()}


def test_the_margin_of_labels_as_they_are_is_the_raw_mean():
    assert plain(STRENGTHS.margin()) == {"margin": spread(0.0, r7=0.4, r2=-1.0, r5=2.0, r0=-3.0, r8=0.1)}


def test_the_margin_of_flipped_labels_has_its_sign_turned():
    flipped = np.array([1, 3, 4])  # the last with a positive mean, whose margin becomes negative
    treated = plain(STRENGTHS.margin(flipped))
    assert treated == {"flipped": [2, 0, 8], "margin": spread(0.0, r7=0.4, r2=1.0, r5=2.0, r0=3.0, r8=-0.1)}
    assert treated["margin"] != STRENGTHS.margin()["margin"].tolist()
    assert treated["margin"] != np.abs(STRENGTHS.margin()["margin"]).tolist()


def test_a_scale_multiplies_every_margin_and_flips_nothing():
    halved = plain(STRENGTHS.margin(SUSPECTS, scale=0.5))
    assert halved == {"flipped": [2, 0], "margin": spread(0.0, r7=0.2, r2=0.5, r5=1.0, r0=1.5, r8=0.05)}
    assert STRENGTHS.margin(scale=0.0)["margin"].tolist() == [0.0] * 10


def test_flipping_nobody_says_so():
    nobody = STRENGTHS.margin(np.array([], dtype=int))
    assert plain(nobody) == {"flipped": []} | plain(STRENGTHS.margin())


def test_a_soft_target_is_what_the_vote_believes_and_certainty_elsewhere():
    target = STRENGTHS.soft_target()["target"]
    by_hand = spread(1.0, r7=0.598688, r2=0.268941, r5=0.880797, r0=0.047426, r8=0.524979)
    assert list(STRENGTHS.soft_target()) == ["target"]
    assert target.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert target[ROWS].tolist() != pytest.approx(1 - np.array(by_hand)[ROWS], abs=1e-2)


def test_soft_label_and_margin_as_the_text_says_smooth_where_the_mean_is_below_zero():
    treated = plain(STRENGTHS.soft_and_margin(0.2, "A"))
    assert treated == {"target": spread(1.0, r2=0.8, r0=0.8)} | plain(STRENGTHS.margin())


def test_soft_label_with_flips_smooths_all_and_has_no_margin():
    assert plain(STRENGTHS.soft_and_margin(0.2, "B")) == {"label_smoothing": 0.2, "flipped": [2, 0]}


def test_soft_label_with_flips_and_margin_has_the_size_of_the_mean_everywhere():
    treated = plain(STRENGTHS.soft_and_margin(0.2, "C"))
    size = spread(0.0, r7=0.4, r2=1.0, r5=2.0, r0=3.0, r8=0.1)
    assert treated == {"label_smoothing": 0.2, "flipped": [2, 0], "margin": size}
    assert treated["margin"] != plain(STRENGTHS.soft_and_margin(0.2, "A"))["margin"]  # there it is signed


def test_an_unknown_reading_raises_and_lists_the_choices():
    with pytest.raises(ValueError, match="unknown reading 'D'; choose from A, B, C"):
        STRENGTHS.soft_and_margin(0.2, "D")


TREATMENTS = {
    "flip": STRENGTHS.flip(SUSPECTS),
    "drop": STRENGTHS.drop(SUSPECTS),
    "margin": STRENGTHS.margin(),
    "flip and margin": STRENGTHS.margin(SUSPECTS, 0.5),
    "soft target": STRENGTHS.soft_target(),
    **{f"soft and margin {reading}": STRENGTHS.soft_and_margin(0.2, reading) for reading in "ABC"},
}


@pytest.mark.parametrize("name", TREATMENTS)
def test_every_treatment_is_a_change_of_a_run(name):
    run = replace(tiny.reward_run("preferences.parquet", "base", n=10, rows=ROWS), **TREATMENTS[name])
    assert set(TREATMENTS[name]) <= set(vars(run))
    assert all(vars(run)[key] is value for key, value in TREATMENTS[name].items())


def test_treatments_leave_the_strengths_as_they_are():
    rows, mean = ROWS.copy(), MEAN.copy()
    strengths = Strengths(rows, mean, n_pairs=10)
    strengths.drop(SUSPECTS), strengths.margin(SUSPECTS), strengths.soft_target()
    for reading in "ABC":
        strengths.soft_and_margin(0.2, reading)
    assert (rows.tolist(), mean.tolist()) == (ROWS.tolist(), MEAN.tolist())


MEANS = st.lists(st.floats(-5, 5).map(lambda x: x + 0.0), min_size=1, max_size=30).map(np.array)


@settings(max_examples=60)
@given(mean=MEANS, data=st.data())
def test_turning_margins_twice_gives_them_back(mean, data):
    some = np.array(data.draw(st.lists(st.integers(0, len(mean) - 1), unique=True)), dtype=int)
    turned = adaptive_margin(mean, some)
    np.testing.assert_array_equal(adaptive_margin(turned, some), mean)
    np.testing.assert_array_equal(np.abs(turned), np.abs(mean))


@settings(max_examples=60)
@given(mean=MEANS, share=st.floats(0, 0.99))
def test_flips_and_drops_part_the_rows_and_no_kept_mean_is_weaker(mean, share):
    strengths = Strengths(np.arange(len(mean)) * 3, mean, 3 * len(mean))
    weak = denoising.weakest(mean, share)
    flipped, kept = strengths.flip(weak)["flipped"], strengths.drop(weak)["rows"]
    assert sorted([*flipped, *kept]) == strengths.rows.tolist()
    assert len(flipped) == round(share * len(mean))
    if len(flipped) and len(kept):
        assert mean[flipped // 3].max() <= mean[kept // 3].min()


@settings(max_examples=60)
@given(mean=MEANS)
def test_flipping_every_mean_below_zero_leaves_no_negative_margin_and_no_other_flip_does(mean):
    strengths = Strengths(np.arange(len(mean)), mean, len(mean))
    treated = strengths.soft_and_margin(0.2, "C")
    np.testing.assert_array_equal(treated["margin"], np.abs(mean))
    assert (strengths.margin()["margin"] < 0).sum() == len(treated["flipped"])


# ---------------------------------------------------------------- how much noise there is

N_VOTES = 4000


def votes(kind: str, rate: float, seed: int = 0) -> tuple[np.ndarray, float]:
    """Means of unseen votes on labels of which about ``rate`` are wrong, and the very share of those."""
    rng = np.random.default_rng(seed)
    if kind == "ambiguous":  # people disagree by themselves; then labels are flipped
        mean, right = (strength := rng.normal(0, 4, N_VOTES)), rng.random(N_VOTES) < 1 / (1 + np.exp(-strength))
        flipped = rng.random(N_VOTES) < rate
        return np.where(right ^ flipped, mean, -mean), float(flipped.mean())
    wrong = rng.random(N_VOTES) < rate
    size = {
        "calibrated": np.log((1 - rate) / rate),  # as sure of a label as a share 1 - rate of right ones allows
        "overconfident": 3.0,
        "of many strengths": np.abs(rng.normal(2, 1, N_VOTES)),
        "timid": np.abs(rng.normal(0, 0.3, N_VOTES)),
    }[kind]
    return np.where(wrong, -1, 1) * size, float(wrong.mean())


def estimate(mean: np.ndarray, seed: int = 0) -> float:
    return denoising.noise_rate(mean, np.random.default_rng(seed))


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("kind", ["calibrated", "overconfident", "of many strengths", "timid"])
def test_the_share_of_wrong_labels_is_found_without_the_truth(kind, rate):
    mean, true = votes(kind, rate)
    assert true == pytest.approx(rate, abs=0.02)
    assert estimate(mean) == pytest.approx(true, abs=0.015)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
def test_ambiguous_pairs_are_taken_for_noise_in_part(rate):
    mean, true = votes("ambiguous", rate)
    assert true < estimate(mean) < true + 0.07


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_the_mistakes_of_weak_voters_are_taken_for_the_labels(rate):
    """Voters who know the right side of only three pairs in four: the estimate is an upper one, and far too high."""
    rng = np.random.default_rng(0)
    right, agrees = rng.random(N_VOTES) >= rate, rng.random(N_VOTES) < 0.75
    mean = np.where(right == agrees, 1, -1) * np.abs(rng.normal(0, 1, N_VOTES))
    assert estimate(mean) > rate + 0.1


def test_ambiguous_pairs_count_less_than_in_the_share_of_means_below_zero():
    mean, true = votes("ambiguous", 0.1)
    assert (mean < 0).mean() - true > 0.09
    assert estimate(mean) - true < 0.06


@pytest.mark.parametrize("kind", ["calibrated", "overconfident", "of many strengths", "timid", "ambiguous"])
def test_more_noise_gives_a_higher_estimate(kind):
    found = [estimate(votes(kind, rate)[0]) for rate in (0.05, 0.1, 0.2, 0.3, 0.4, 0.45)]
    assert np.diff(found).min() > 0.02


def test_votes_that_agree_with_every_label_find_no_noise():
    assert estimate(np.abs(votes("of many strengths", 0.1)[0])) == 0.0


def test_the_estimate_repeats_with_its_generator_and_depends_little_on_it():
    mean, _ = votes("of many strengths", 0.25)
    found = [estimate(mean, seed) for seed in range(6)]
    assert found == [estimate(mean, seed) for seed in range(6)]
    assert len(set(found)) > 1
    assert np.ptp(found) < 0.03


def test_the_estimate_leaves_the_votes_and_the_common_generator_as_they_are():
    mean, _ = votes("calibrated", 0.25)
    before, common = mean.copy(), np.random.get_state()[1].tolist()  # noqa: NPY002
    estimate(mean)
    np.testing.assert_array_equal(mean, before)
    assert np.random.get_state()[1].tolist() == common  # noqa: NPY002


def test_the_estimate_does_not_depend_on_the_scale_of_the_votes_but_on_their_sign():
    mean, true = votes("of many strengths", 0.25)
    assert estimate(mean / 3) == pytest.approx(true, abs=0.02)
    assert estimate(-mean) == pytest.approx(1 - true, abs=0.02)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
def test_with_chosen_always_first_there_is_one_class_and_no_noise_is_ever_found(rate):
    """Why pairs are shown in a random order: labels that all say *first* leave nothing to be mistaken for."""

    class Unshuffled:
        def permutation(self, first: np.ndarray) -> np.ndarray:
            return np.ones_like(first)

    mean, true = votes("calibrated", rate)
    assert denoising.noise_rate(mean, Unshuffled()) == 0.0
    assert true > 0.05
