"""Every measure by value, ties, unknown truths and missing classes included."""

import numpy as np
import pytest

from rmlib import evaluation

NAN = float("nan")


# ---------------------------------------------------------------- accuracy


def test_accuracy_counts_strictly_positive_margins():
    assert evaluation.accuracy(np.array([0.5, -0.5, 2.0, 1e-9])) == 0.75


def test_equal_rewards_are_no_success():
    assert evaluation.accuracy(np.array([0.0, 0.0, 1.0, -1.0])) == 0.25


def test_accuracy_of_no_margins_is_nan():
    assert np.isnan(evaluation.accuracy(np.array([])))


def test_accuracy_of_uneven_batches_weighs_pairs_not_batches():
    margins = np.array([1.0, 1.0, 1.0, -1.0])
    assert evaluation.accuracy(margins) == 0.75
    assert np.mean([evaluation.accuracy(margins[:3]), evaluation.accuracy(margins[3:])]) == 0.5


def test_gold_accuracy_follows_the_truth_and_leaves_out_its_ties():
    margins = np.array([1.0, -1.0, 1.0, -1.0, 5.0, 0.0])
    truth = np.array([2.0, -2.0, -0.1, 0.1, 0.0, 1.0])
    assert evaluation.gold_accuracy(margins, truth) == pytest.approx(
        2 / 5
    )  # right, right, wrong, wrong, tie of rewards


def test_gold_accuracy_of_equal_rewards_is_zero_whatever_the_truth():
    assert evaluation.gold_accuracy(np.zeros(2), np.array([1.0, -1.0])) == 0


def test_gold_accuracy_without_decided_truth_is_nan():
    assert np.isnan(evaluation.gold_accuracy(np.array([1.0]), np.array([0.0])))


def test_label_error_is_the_share_of_wrong_among_decided():
    assert evaluation.label_error(np.array([1.0, -1.0, 0.5, 2.0, 0.0, 0.0])) == 0.25


def test_label_error_without_decided_truth_is_nan():
    assert np.isnan(evaluation.label_error(np.array([0.0, 0.0])))


# ---------------------------------------------------------------- unknown truth

KNOWN = np.array([1.0, -1.0, 2.0, -0.5, 0.0])
STRENGTH = np.array([2.0, -2.0, -1.0, 1.0, 0.5])
MEASURES = {
    "gold_accuracy": evaluation.gold_accuracy,
    "label_error": lambda strength, truth: evaluation.label_error(truth),
    "wrong_label_auroc": evaluation.wrong_label_auroc,
    "wrong_label_precision_recall": lambda strength, truth: evaluation.wrong_label_precision_recall(
        strength < 0, truth
    ),
}


def test_neither_a_tie_nor_an_unknown_truth_decides():
    truth = np.array([0.5, -0.5, 0.0, -0.0, NAN, 1e-9])
    assert evaluation.decided(truth).tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("name", MEASURES)
def test_pairs_of_unknown_truth_count_in_no_share(name):
    measure = MEASURES[name]
    for strength in (-9.0, 9.0):
        mixed = np.append(STRENGTH, [strength, strength]), np.append(KNOWN, [NAN, NAN])
        assert measure(*mixed) == measure(STRENGTH, KNOWN)
    taken_for_right = np.append(STRENGTH, [-9.0, -9.0]), np.append(KNOWN, [1.0, 1.0])
    assert measure(*taken_for_right) != measure(STRENGTH, KNOWN)


def test_where_no_truth_is_known_every_share_is_unknown():
    nobody = np.full(5, NAN)
    assert np.isnan(evaluation.gold_accuracy(STRENGTH, nobody))
    assert np.isnan(evaluation.label_error(nobody))
    assert np.isnan(evaluation.wrong_label_auroc(STRENGTH, nobody))
    assert np.isnan(evaluation.confirmed_by_band(STRENGTH, nobody, 2)).all()


def test_pairs_of_unknown_truth_keep_their_band_and_leave_its_share():
    strength, truth = np.arange(6.0), np.array([-1.0, NAN, 1.0, NAN, NAN, 1.0])
    np.testing.assert_array_equal(evaluation.confirmed_by_band(strength, truth, 3), [0.0, 1.0, 1.0])
    np.testing.assert_array_equal(evaluation.confirmed_by_band(strength, truth, 2), [0.5, 1.0])


# ---------------------------------------------------------------- detection of wrong labels

TRUTH = np.array([1.0, -1.0, 1.0, -1.0, 0.0])


def test_auroc_of_a_perfect_and_of_an_inverted_detector():
    strength = np.array([2.0, -2.0, 1.0, -1.0, 0.0])
    assert evaluation.wrong_label_auroc(strength, TRUTH) == 1
    assert evaluation.wrong_label_auroc(-strength, TRUTH) == 0


def test_auroc_by_hand():
    strength = np.array([0.5, 0.0, -1.0, -2.0, 9.0])  # wrong below right in three of four comparisons
    assert evaluation.wrong_label_auroc(strength, TRUTH) == 0.75


def test_auroc_of_equal_strengths_is_one_half():
    assert evaluation.wrong_label_auroc(np.zeros(5), TRUTH) == 0.5


def test_auroc_of_a_random_detector_is_near_one_half():
    rng = np.random.default_rng(0)
    assert evaluation.wrong_label_auroc(rng.normal(size=4000), rng.normal(size=4000)) == pytest.approx(0.5, abs=0.03)


def test_auroc_ignores_the_strength_of_ties():
    strengths = np.array([2.0, -2.0, 1.0, -1.0, 0.0])
    for of_tie in (-100.0, 100.0):
        strengths[4] = of_tie
        assert evaluation.wrong_label_auroc(strengths, TRUTH) == 1


@pytest.mark.parametrize("truth", [[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
def test_auroc_is_nan_where_one_class_is_missing(truth):
    assert np.isnan(evaluation.wrong_label_auroc(np.arange(3.0), np.array(truth)))


def test_precision_and_recall_by_hand():
    truth = np.array([-1.0, -1.0, -1.0, 1.0, 1.0, 0.0])
    suspect = np.array([True, True, False, True, False, True])
    assert evaluation.wrong_label_precision_recall(suspect, truth) == pytest.approx((2 / 3, 2 / 3))
    suspect = np.array([True, False, False, False, False, True])
    assert evaluation.wrong_label_precision_recall(suspect, truth) == pytest.approx((1, 1 / 3))


def test_precision_and_recall_of_no_suspects_are_zero():
    assert evaluation.wrong_label_precision_recall(np.zeros(5, dtype=bool), TRUTH) == (0, 0)


# ---------------------------------------------------------------- bands


def test_bands_ascend_with_the_values():
    np.testing.assert_array_equal(evaluation.bands(np.array([30.0, 10.0, 40.0, 20.0]), 2), [1, 0, 1, 0])


def test_bands_are_of_equal_size_ties_or_not():
    for values in (np.random.default_rng(0).normal(size=103), np.zeros(103), np.repeat([1.0, 2.0], [100, 3])):
        sizes = np.bincount(evaluation.bands(values, 10))
        assert len(sizes) == 10
        assert sizes.max() - sizes.min() <= 1


def test_ties_between_bands_are_broken_by_position():
    np.testing.assert_array_equal(evaluation.bands(np.zeros(4), 2), [0, 0, 1, 1])


def test_band_means_by_value_and_nan_for_an_empty_band():
    means = evaluation.band_means(np.array([1.0, 3.0, 10.0]), np.array([0, 0, 2]), 3)
    np.testing.assert_array_equal(means, [2.0, NAN, 10.0])


def test_confirmed_by_band_by_value():
    strength = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    truth = np.array([-1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(evaluation.confirmed_by_band(strength, truth, 2), [0.5, 1.0])


def test_confirmed_by_band_is_nan_for_a_band_of_ties():
    shares = evaluation.confirmed_by_band(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 1.0, -1.0]), 2)
    np.testing.assert_array_equal(shares, [NAN, 0.5])


# ---------------------------------------------------------------- calibration and scale


def test_calibration_error_by_hand():
    right_in_three_of_four = np.log(3) * np.array([1.0, 1.0, 1.0, -1.0])  # confidence 3/4
    assert evaluation.calibration_error(right_in_three_of_four, n=1) == pytest.approx(0, abs=1e-12)
    always_right = np.log(3) * np.ones(4)
    assert evaluation.calibration_error(always_right, n=2) == pytest.approx(0.25)
    sure_and_half_right = np.array([50.0, -50.0, 50.0, -50.0])
    assert evaluation.calibration_error(sure_and_half_right, n=1) == pytest.approx(0.5)


def test_calibration_error_weighs_bands_by_their_size():
    margins = np.array([0.0, 0.0, 50.0])  # confidence 1/2, never right; confidence 1, always right
    assert evaluation.calibration_error(margins, n=2) == pytest.approx(0.5 * 2 / 3)


def test_calibration_error_is_near_zero_if_calibrated_and_large_if_overconfident():
    rng = np.random.default_rng(0)
    margins = rng.logistic(size=20_000)
    margins = np.abs(margins) * np.where(rng.random(20_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1)
    assert evaluation.calibration_error(margins) < 0.02
    assert evaluation.calibration_error(10 * margins) > 0.15


# ---------------------------------------------------------------- committees

MEMBERS = np.array([[0.0, 3.0, 1.0], [1.0, 3.0, 1.0], [5.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [
        ("mean", [2, 2, 1]),
        ("worst", [0, 0, 1]),
        ("mean - std", [2 - np.sqrt(14 / 3), 2 - np.sqrt(2), 1]),  # of three, not of three less one
    ],
)
def test_what_a_committee_gives_by_value(rule, by_hand):
    assert evaluation.agreed(MEMBERS, rule) == pytest.approx(by_hand)
    assert evaluation.agreed(MEMBERS[[2, 0, 1]], rule) == pytest.approx(by_hand)
    assert evaluation.agreed(MEMBERS[:1], rule) == pytest.approx(MEMBERS[0])


def test_an_unknown_rule_raises_and_lists_the_choices():
    with pytest.raises(ValueError, match="'best'; choose from mean, worst, mean - std"):
        evaluation.agreed(MEMBERS, "best")


# ---------------------------------------------------------------- spread

APART = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])


def test_the_spread_of_two_prompts_by_hand():
    """Differences 1, 3, 2 and 0, 0, 0; all six have mean 10/6 and mean square 22/6."""
    std = np.sqrt(22 / 6 - (10 / 6) ** 2)
    assert evaluation.spread(APART) == pytest.approx({"raw": 1.0, "scale-free": 1 / std})


def test_a_spread_follows_neither_the_order_of_responses_nor_what_all_share():
    for same in (APART[::-1], APART[:, [2, 0, 1]], APART + 7, -APART):
        assert evaluation.spread(same) == pytest.approx(evaluation.spread(APART))
    assert evaluation.spread(APART.T)["raw"] != pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("scale", [0.01, -3.0, 1e4])
def test_scaling_changes_the_raw_spread_and_not_the_scale_free_one(scale):
    plain, scaled = evaluation.spread(APART), evaluation.spread(scale * APART - 5)
    assert scaled["raw"] == pytest.approx(abs(scale) * plain["raw"])
    assert scaled["scale-free"] == pytest.approx(plain["scale-free"])


def test_prompts_that_move_apart_as_a_whole_have_less_of_the_spread_within():
    moved = evaluation.spread(APART + np.array([[0.0], [10.0]]))
    assert moved["raw"] == pytest.approx(1.0)
    assert moved["scale-free"] < 0.3


def test_equal_rewards_have_no_spread():
    assert evaluation.spread(np.full((2, 4), 0.1)) == pytest.approx({"raw": 0, "scale-free": 0})


# ---------------------------------------------------------------- resampling

CLUSTER = np.array(["b", "a", "c", "a", "b", "b"])


def test_resampling_draws_whole_clusters():
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.bincount(evaluation.resample_clusters(CLUSTER, rng), minlength=6)
        drawn = {name: set(times[name == CLUSTER]) for name in "abc"}
        assert all(len(counts) == 1 for counts in drawn.values())
        assert sum(counts.pop() for counts in drawn.values()) == 3


def test_resampling_draws_clusters_with_replacement_and_equal_chances():
    rng = np.random.default_rng(0)
    samples = [evaluation.resample_clusters(CLUSTER, rng) for _ in range(2000)]
    times_c = np.array([(sample == 2).sum() for sample in samples])
    assert times_c.mean() == pytest.approx(1, abs=0.06)
    assert (times_c == 0).mean() == pytest.approx((2 / 3) ** 3, abs=0.04)


def test_resampling_repeats_with_its_seed_only():
    drawn = [evaluation.resample_clusters(np.arange(30), np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
