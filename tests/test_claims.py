"""Verdicts: every rule can come out each way, and the intervals behind it are those of the textbook."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rmlib import claims
from rmlib.claims import RULES, Evidence, Rule, holm_levels, verdict, verdicts

ALL_RULES = [pytest.param(rule, id=f"{chapter}-{claim}") for chapter in RULES for claim, rule in RULES[chapter].items()]
DIRECTED = Rule("d", "a thing grows", "Fig 0", "growth", margin=0.1)
EQUIVALENT = Rule("e", "a thing stays", "Fig 0", "growth", margin=0.1, equivalence=True)


def around(centre: float, spread: float, seeds: int = 5) -> np.ndarray:
    """Effects of ``seeds`` seeds with this mean and (sample) standard deviation."""
    steps = np.linspace(-1, 1, seeds)
    return centre + spread * steps / np.std(steps, ddof=1)


def evidence(rule: Rule, centre: float, spread: float = 0.01, **kwargs) -> Evidence:
    """Effects with mean and spread given in units of the rule's own margin."""
    effects = around(centre * rule.margin, spread * rule.margin)
    return Evidence(effects, **({"n": rule.min_n} | kwargs))


# ---------------------------------------------------------------- verdicts


def effects_that_give(rule: Rule) -> dict[str, tuple[float, float]]:
    """Centre and spread, in margins, that must end in each verdict."""
    if rule.equivalence:
        return {"holds": (0.2, 0.01), "fails": (1.5, 0.01), "open": (0.2, 3.0)}
    return {"holds": (1.5, 0.01), "fails": (-1.5, 0.01), "open": (1.5, 5.0)}


@pytest.mark.parametrize("expected", ["holds", "fails", "open"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_every_rule_can_give_every_verdict(rule, expected):
    assert verdict(rule, evidence(rule, *effects_that_give(rule)[expected])) == expected


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_sign_of_the_effect_decides_a_directed_rule_and_not_an_equivalence(rule):
    pair = (verdict(rule, evidence(rule, 3.0)), verdict(rule, evidence(rule, -3.0)))
    assert pair == (("fails", "fails") if rule.equivalence else ("holds", "fails"))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_too_few_pairs_in_the_smallest_cell_leave_a_claim_open(rule):
    clear = 0.2 if rule.equivalence else 1.5
    assert verdict(rule, evidence(rule, clear, n=rule.min_n)) == "holds"
    assert verdict(rule, evidence(rule, clear, n=rule.min_n - 1)) == "open"


@pytest.mark.parametrize("rule", ALL_RULES)
def test_one_seed_leaves_a_claim_open(rule):
    for centre in (-3.0, 0.0, 3.0):
        one = Evidence(np.array([centre * rule.margin]), n=rule.min_n)
        assert one.interval(0.95) == (-np.inf, np.inf)
        assert one.p_value(rule) == 1.0
        assert verdict(rule, one) == "open"


@pytest.mark.parametrize("centre", [-0.5, 0.0, 0.5])
def test_an_effect_inside_the_margin_fails_even_where_its_sign_is_sure(centre):
    small = evidence(DIRECTED, centre)
    assert centre == 0 or small.p_value(DIRECTED) < 1e-4
    assert verdict(DIRECTED, small) == "fails"


def test_an_interval_across_the_margin_holds_and_one_across_zero_stays_open():
    low, high = evidence(DIRECTED, 0.9, spread=0.2).interval(0.95)
    assert 0 < low < DIRECTED.margin < high
    assert verdict(DIRECTED, evidence(DIRECTED, 0.9, spread=0.2)) == "holds"
    low, high = evidence(DIRECTED, 0.9, spread=1.0).interval(0.95)
    assert low < 0 < DIRECTED.margin < high
    assert verdict(DIRECTED, evidence(DIRECTED, 0.9, spread=1.0)) == "open"


def test_an_equivalence_across_its_margin_stays_open():
    across = evidence(EQUIVALENT, 0.9, spread=0.2)
    assert across.interval(0.95)[0] > 0  # the effect is sure to exist, but not to matter
    assert verdict(EQUIVALENT, across) == "open"


def test_the_level_decides_a_close_case():
    close = evidence(DIRECTED, 2.0, spread=1.4)
    assert 0.01 < close.p_value(DIRECTED) < 0.05
    assert verdict(DIRECTED, close, 0.95) == "holds"
    assert verdict(DIRECTED, close, 0.99) == "open"


# ---------------------------------------------------------------- intervals and p-values

FOUR = Evidence(np.array([1.0, 2.0, 3.0, 4.0]), n=100)


def test_the_interval_by_hand():
    half = 3.182446305 * np.sqrt(5 / 3) / 2  # t for 97.5 % and 3 degrees of freedom, times s over the root of 4
    assert FOUR.interval(0.95) == pytest.approx((2.5 - half, 2.5 + half))
    assert FOUR.interval(0.95) != pytest.approx((2.5 - 1.96 * half / 3.182446305, 2.5 + 1.96 * half / 3.182446305))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.995])
def test_the_interval_is_students(level):
    expected = stats.t.interval(level, 3, loc=2.5, scale=stats.sem(FOUR.effects))
    assert FOUR.interval(level) == pytest.approx(expected)


def test_the_p_value_of_a_directed_claim_is_that_of_students_test():
    for effects in (FOUR.effects, -FOUR.effects):
        expected = stats.ttest_1samp(effects, 0).pvalue
        assert Evidence(effects, n=100).p_value(DIRECTED) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rule", "centre", "end", "bound"),
    [(DIRECTED, 2.0, 0, 0.0), (DIRECTED, -2.0, 1, 0.0), (EQUIVALENT, 0.4, 1, 0.1), (EQUIVALENT, -0.4, 0, -0.1)],
)
def test_the_p_value_is_the_level_at_which_the_interval_touches_the_bound(rule, centre, end, bound):
    item = evidence(rule, centre, spread=0.5)
    p = item.p_value(rule)
    assert 0 < p < 0.5
    assert item.interval(1 - p)[end] == pytest.approx(bound, abs=1e-9)


# 0.1 and 0.07 are no sums of powers of two: their mean over three or ten seeds is off by a rounding error
AGREEING = {
    "four halves": np.full(4, 0.5),
    "two halves": np.full(2, 0.5),
    "noughts": np.zeros(4),
    "three of 0.1": np.full(3, 0.1),
    "ten of 0.07": np.full(10, 0.07),
    "three of -0.1": np.full(3, -0.1),
    "equal differences": np.array([0.9 - 0.6, 0.8 - 0.5, 0.7 - 0.4]),
}


@pytest.mark.parametrize("rule", [DIRECTED, EQUIVALENT], ids=["directed", "equivalent"])
@pytest.mark.parametrize("which", AGREEING)
def test_seeds_that_agree_exactly_say_nothing_of_their_spread_and_leave_a_claim_open(rule, which):
    agreeing = Evidence(AGREEING[which], n=100)
    assert agreeing.interval(0.95) == (-np.inf, np.inf)
    assert agreeing.p_value(rule) == 1.0
    assert verdict(rule, agreeing) == "open"
    assert np.isnan(agreeing.seeds_needed(0.05, 0.95))


@pytest.mark.parametrize(("rule", "centre"), [(DIRECTED, 0.5), (EQUIVALENT, 0.0625)], ids=["directed", "equivalent"])
def test_the_smallest_true_spread_decides_a_claim(rule, centre):
    nearly = Evidence(around(centre, 1e-6), n=100)
    low, high = nearly.interval(0.95)
    assert centre - 1e-5 < low < centre < high < centre + 1e-5
    assert nearly.p_value(rule) < 1e-6
    assert verdict(rule, nearly) == "holds"


def test_agreeing_seeds_do_not_ease_the_level_of_the_others(toy_chapter):
    close = evidence(DIRECTED, 2.0, spread=1.4)
    assert 0.025 < close.p_value(DIRECTED) < 0.05
    levels = {}
    for name, effects in {"agreeing": np.zeros(5), "spread": around(0.0, 1e-6)}.items():
        table = verdicts(toy_chapter, {"d": close, "e": Evidence(effects, n=100)}).set_index("claim")
        levels[name] = table["level"].tolist(), table["verdict"].tolist()
    assert levels["agreeing"] == (pytest.approx([0.975, 0.975]), ["open", "open"])
    assert levels["spread"] == (pytest.approx([0.95, 0.975]), ["holds", "holds"])


# ---------------------------------------------------------------- evidence from draws


def draws(low: float, high: float) -> Evidence:
    """One data set, so one effect, with 1000 bootstrap draws spread evenly from ``low`` to ``high``."""
    return Evidence(np.array([(low + high) / 2]), n=100, draws=np.linspace(low, high, 1000))


def test_few_clusters_decide_nothing_however_narrow_their_draws():
    """Four debates lie on one side by chance one time in eight; ten, one time in 512."""
    for clusters, level, expected in ((4, 0.95, "open"), (6, 0.95, "holds"), (6, 0.99, "open"), (10, 0.99, "holds")):
        sure = replace(draws(0.4, 0.5), clusters=clusters)
        assert verdict(DIRECTED, sure, level) == expected
        assert sure.p_value(DIRECTED) == pytest.approx(max(2 / 1000, 2 * 0.5**clusters))
        assert verdict(DIRECTED, replace(sure, clusters=None), level) == "holds"


def test_a_claim_of_several_comparisons_is_judged_by_the_one_that_fits_least_in_the_mean():
    effects = pd.DataFrame({"1": [9.0, 9.0], "10 | a": [3.0, -1.0], "10 | b": [0.0, 1.0], "2": [0.0, 0.0]})
    assert claims.weakest(effects, "10") == "10 | b"  # not a, which is the least in one seed
    assert claims.weakest(effects, "1") == "1"
    assert claims.weakest(effects.assign(**{"10 | c": np.nan}), "10") == "10 | c"  # what is unknown decides nothing


def test_choosing_by_the_mean_leans_less_to_failure_than_choosing_in_each_seed():
    """Three rivals as good as the arm: the least mean difference is nearer zero than the mean of the least."""
    rng = np.random.default_rng(0)
    by_mean, in_each = [], []
    for _ in range(400):
        arm, *rivals = rng.normal(size=(4, 8))
        effects = pd.DataFrame({f"8a | {k}": arm - rival for k, rival in enumerate(rivals)})
        by_mean.append(effects[claims.weakest(effects, "8a")].mean())
        in_each.append(effects.min(axis=1).mean())
    assert np.mean(in_each) < -0.75  # of a standard deviation
    assert -0.35 < np.mean(by_mean) < 0


def test_the_interval_of_draws_is_their_percentiles():
    assert draws(0.0, 1.0).interval(0.9) == pytest.approx((0.05, 0.95))


def test_the_p_value_of_draws_is_twice_the_share_beyond_zero_and_never_zero():
    assert draws(-0.1, 0.9).p_value(DIRECTED) == pytest.approx(2 * 0.1, abs=0.002)
    assert draws(-0.9, 0.1).p_value(DIRECTED) == pytest.approx(2 * 0.1, abs=0.002)
    assert draws(0.1, 0.2).p_value(DIRECTED) == pytest.approx(2 / 1000)
    assert draws(-1.0, 1.0).p_value(DIRECTED) == pytest.approx(1.0)
    assert draws(-0.05, 0.15).p_value(EQUIVALENT) == pytest.approx(2 * 0.25, abs=0.004)


@pytest.mark.parametrize(
    ("rule", "ends", "expected"),
    [
        (DIRECTED, (0.1, 0.5), "holds"),
        (DIRECTED, (-0.5, -0.1), "fails"),
        (DIRECTED, (-0.05, 0.05), "fails"),
        (DIRECTED, (-0.2, 0.5), "open"),
        (EQUIVALENT, (-0.05, 0.05), "holds"),
        (EQUIVALENT, (0.2, 0.5), "fails"),
        (EQUIVALENT, (-0.2, 0.5), "open"),
    ],
)
def test_draws_give_every_verdict_to_a_single_effect(rule, ends, expected):
    assert verdict(rule, draws(*ends)) == expected


def test_no_number_of_seeds_is_named_for_draws():
    assert np.isnan(draws(-0.1, 0.5).seeds_needed(0.2, 0.95))


# ---------------------------------------------------------------- effects that nobody knows

NAN = float("nan")
UNKNOWN = {
    "all effects": Evidence(np.full(3, NAN), n=100),
    "one effect": Evidence(np.array([0.5, 0.5, NAN]), n=100),
    "an endless effect": Evidence(np.array([0.5, 0.5, np.inf]), n=100),
    "all draws": Evidence(np.array([0.5]), n=100, draws=np.full(1000, NAN)),
    "one draw": Evidence(np.array([0.5]), n=100, draws=np.append(np.full(999, 0.5), NAN)),
    "the effect of known draws": Evidence(np.array([NAN]), n=100, draws=np.full(1000, 0.5)),
}


@pytest.mark.parametrize("rule", [DIRECTED, EQUIVALENT], ids=["directed", "equivalent"])
@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_effect_gives_no_evidence_and_leaves_its_claim_open(rule, what):
    assert UNKNOWN[what].p_value(rule) == 1.0
    assert verdict(rule, UNKNOWN[what]) == "open"


@pytest.mark.parametrize("what", ["all effects", "all draws"])
def test_an_unknown_effect_does_not_ease_the_level_of_the_others(toy_chapter, what):
    close = evidence(DIRECTED, 2.0, spread=1.4)
    assert 0.025 < close.p_value(DIRECTED) < 0.05
    table = verdicts(toy_chapter, {"d": close, "e": UNKNOWN[what]}).set_index("claim")
    assert table.loc["d", ["level", "verdict"]].tolist() == [pytest.approx(0.975), "open"]
    assert table.loc["e", "verdict"] == "open"
    assert np.isnan(table.loc["e", ["low", "high", "seeds_to_decide"]].astype(float)).all()


# ---------------------------------------------------------------- how many seeds would decide


@pytest.mark.parametrize("level", [0.95, 0.995])
@pytest.mark.parametrize("distance", [0.3, 1.0, 4.0])
def test_the_seeds_needed_are_the_fewest_whose_interval_is_narrow_enough(distance, level):
    def half_width(n: int) -> float:
        return stats.t.ppf((1 + level) / 2, n - 1) * np.std(FOUR.effects, ddof=1) / np.sqrt(n)

    n = int(FOUR.seeds_needed(distance, level))
    assert half_width(n) < distance
    assert half_width(n - 1) >= distance


def test_the_seeds_needed_are_unknown_for_one_seed_and_endless_for_no_effect():
    assert np.isnan(Evidence(np.array([1.0]), n=100).seeds_needed(0.5, 0.95))
    assert np.isnan(FOUR.seeds_needed(0.0, 0.95))
    assert FOUR.seeds_needed(1e-6, 0.95) == np.inf


# ---------------------------------------------------------------- Holm's correction


def test_holm_levels_by_hand():
    levels = holm_levels({"a": 0.04, "b": 0.001, "c": 0.5, "d": 0.016})
    # sorted b, d, a, c: 0.001 <= 0.05 / 4, 0.016 <= 0.05 / 3, 0.04 > 0.05 / 2, and there it stops
    assert levels == pytest.approx({"b": 1 - 0.05 / 4, "d": 1 - 0.05 / 3, "a": 1 - 0.05 / 2, "c": 1 - 0.05 / 2})


def test_holm_stops_at_the_first_claim_that_is_not_rejected():
    """0.03 would pass at 0.05 / 1, but 0.026 before it did not pass at 0.05 / 2."""
    levels = holm_levels({"a": 0.03, "b": 0.026, "c": 0.01})
    assert levels == pytest.approx({"c": 1 - 0.05 / 3, "b": 1 - 0.05 / 2, "a": 1 - 0.05 / 2})


def test_holm_reaches_the_plain_level_when_all_are_rejected_and_never_beyond():
    assert holm_levels({"a": 0.001, "b": 0.002}) == pytest.approx({"a": 0.975, "b": 0.95})
    assert holm_levels({"a": 0.04}) == pytest.approx({"a": 0.95})
    assert holm_levels({"a": 0.9}, alpha=0.1) == pytest.approx({"a": 0.9})


# ---------------------------------------------------------------- a chapter's table


@pytest.fixture
def toy_chapter(monkeypatch) -> str:
    monkeypatch.setitem(RULES, "99_toy", {"d": DIRECTED, "e": EQUIVALENT})
    return "99_toy"


def test_the_table_judges_each_claim_at_its_corrected_level(toy_chapter):
    """The same effects hold alone at 95 %, and are open beside an undecided claim, at 97.5 %."""
    close = evidence(DIRECTED, 2.0, spread=1.4)
    assert 0.025 < close.p_value(DIRECTED) < 0.05
    beside_open = verdicts(toy_chapter, {"d": close, "e": evidence(EQUIVALENT, 0.0, spread=9.0)}).set_index("claim")
    beside_sure = verdicts(toy_chapter, {"d": close, "e": evidence(EQUIVALENT, 0.0)}).set_index("claim")
    assert beside_open.loc["d", ["level", "verdict"]].tolist() == [pytest.approx(0.975), "open"]
    assert beside_sure.loc["d", ["level", "verdict"]].tolist() == [pytest.approx(0.95), "holds"]
    assert (beside_open.loc["d", "low"], beside_open.loc["d", "high"]) == pytest.approx(close.interval(0.975))


def test_the_table_names_the_seeds_that_would_decide_open_claims_alone(toy_chapter):
    unsure = evidence(EQUIVALENT, 0.4, spread=1.0)
    table = verdicts(toy_chapter, {"d": evidence(DIRECTED, 3.0), "e": unsure}).set_index("claim")
    assert np.isnan(table.loc["d", "seeds_to_decide"])
    assert table.loc["e", "seeds_to_decide"] == unsure.seeds_needed(0.06, table.loc["e", "level"])
    assert table.loc["e", "seeds_to_decide"] > 5


def test_the_table_repeats_its_rules_and_what_was_measured(toy_chapter):
    table = verdicts(toy_chapter, {"e": evidence(EQUIVALENT, 0.5, n=77), "d": evidence(DIRECTED, 3.0)})
    assert table["claim"].tolist() == ["d", "e"]
    assert table["says"].tolist() == ["a thing grows", "a thing stays"]
    assert table["estimate"].tolist() == pytest.approx([0.3, 0.05])
    assert table["seeds"].tolist() == [5, 5]
    assert table["n"].tolist() == [50, 77]


@pytest.mark.parametrize("given", [["d"], ["d", "e", "f"], []])
def test_a_rule_without_evidence_or_evidence_without_rule_raises(toy_chapter, given):
    odd = {"d", "e"} ^ set(given)
    with pytest.raises(KeyError, match=str(sorted(odd)).replace("[", r"\[").replace("]", r"\]")):
        verdicts(toy_chapter, {claim: evidence(DIRECTED, 3.0) for claim in given})


# ---------------------------------------------------------------- the rules themselves


@pytest.mark.parametrize("chapter", RULES)
def test_rules_are_listed_under_their_own_claim_and_have_a_margin_and_words(chapter):
    for claim, rule in RULES[chapter].items():
        assert rule.claim == claim
        assert rule.margin > 0
        assert rule.says and rule.source and rule.effect


def test_no_claim_is_judged_in_two_chapters():
    names = [claim for rules in RULES.values() for claim in rules]
    assert len(names) == len(set(names))
    assert claims.ALPHA == 0.05


# ---------------------------------------------------------------- the ledger


@pytest.fixture
def published(tmp_path, toy_chapter, monkeypatch) -> Path:
    """Two presets in which the toy chapter has run; in one of them only claim *d* was judged."""
    for preset, given in (("default", {"d": 3.0, "e": 0.0}), ("full", {"d": -3.0})):
        rules = {claim: rule for claim, rule in (("d", DIRECTED), ("e", EQUIVALENT)) if claim in given}
        monkeypatch.setitem(RULES, toy_chapter, rules)
        table = verdicts(toy_chapter, {claim: evidence(rule, given[claim]) for claim, rule in rules.items()})
        (tmp_path / preset / toy_chapter).mkdir(parents=True)
        table.sort_values("claim", ascending=False).to_csv(tmp_path / preset / toy_chapter / "claims.csv", index=False)
    monkeypatch.setitem(RULES, toy_chapter, {"e": EQUIVALENT, "d": DIRECTED})
    return tmp_path


def test_the_ledger_shows_each_verdict_by_preset_in_the_order_of_the_rules(published):
    table = claims.ledger(published)
    assert table.columns.tolist() == ["claim", "says", "default", "full"]
    assert table["claim"].tolist() == ["e", "d"]
    assert table["default"].str.split().str[0].tolist() == ["**holds**", "**holds**"]
    assert table["default"].str.split().str[1].tolist() == ["+0.000", "+0.300"]
    assert table["full"].str.split().str[0].tolist() == ["-", "**fails**"]


def test_the_ledger_says_what_a_preset_did_not_measure(published):
    (path,) = published.glob("full/*/claims.csv")
    table = pd.read_csv(path)
    assert "not measured" not in claims.ledger(published).to_string()
    table.assign(estimate=np.nan).to_csv(path, index=False)
    assert claims.ledger(published)["full"].tolist() == ["-", "not measured"]


def test_the_ledger_replaces_what_stands_between_its_marks_and_nothing_else(published):
    page = "# Title\n<!-- claims -->\nyesterday\n<!-- claims -->\nend\n"
    new = claims.with_ledger(page, published)
    assert new.startswith("# Title\n<!-- claims -->\n| claim | says | default | full |\n| --- | --- | --- | --- |\n")
    assert new.endswith(" |\n<!-- claims -->\nend\n")
    assert "yesterday" not in new
    assert claims.with_ledger(new, published) == new
