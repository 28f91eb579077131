"""Claims of the paper, each with the rule that will judge it, fixed before the run it judges (``claims.yaml``).

A rule names one metric whose sign the paper predicts. An *effect* is that metric in one seed, which redraws
labels, ensemble and training. ``verdicts`` turns effects into *holds*, *fails* or *open*.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from rmlib.records import COMMITTED
from rmlib.runs import FIGURES, ROOT

ALPHA = 0.05
MARK = "<!-- claims -->"


@dataclass(frozen=True)
class Rule:
    """How one claim is judged.

    ``effect`` says what is measured, positive where the paper is right. An interval inside ± ``margin``
    counts as no effect. With ``equivalence`` the claim *is* that there is none. ``min_n``: pairs that the
    smallest cell must hold. ``by_construction`` says what would be true without any reward model.
    """

    claim: str
    says: str
    source: str
    effect: str
    margin: float
    equivalence: bool = False
    min_n: int = 50
    by_construction: str = ""


_WRITTEN = yaml.safe_load(files("rmlib").joinpath("claims.yaml").read_text(encoding="utf-8"))
RULES = {stem: {claim: Rule(claim, **rule) for claim, rule in rules.items()} for stem, rules in _WRITTEN.items()}


@dataclass(frozen=True)
class Evidence:
    """Effects of one claim: one value a seed, and bootstrap draws where the test data are drawn as well.

    ``n`` counts the pairs of the smallest cell; ``over`` says what the interval is taken over. ``clusters`` counts what
    was drawn (debates): all of G lie on one side by chance with probability $2^{1 - G}$, and no p-value can be smaller.
    """

    effects: np.ndarray
    n: int
    draws: np.ndarray | None = None
    over: str = "seeds"
    clusters: int | None = None

    @property
    def estimate(self) -> float:
        """Mean effect over seeds."""
        return float(np.mean(self.effects))

    @property
    def finest(self) -> float:
        """The smallest p-value that so many clusters allow."""
        return 0.0 if self.clusters is None else 2.0 ** (1 - self.clusters)

    @property
    def known(self) -> bool:
        """Whether every effect and every draw is a finite number."""
        return all(np.isfinite(values).all() for values in (self.effects, self.draws) if values is not None)

    @property
    def _spread(self) -> float:
        """Standard deviation over seeds; 0, from which nothing follows, for one seed or for seeds that agree."""
        spread = float(np.std(self.effects, ddof=1)) if len(self.effects) > 1 else 0.0
        return spread if spread > 1e-12 * max(1.0, abs(self.estimate)) else 0.0  # less is rounding

    def interval(self, level: float) -> tuple[float, float]:
        """Two-sided interval: Student's t over seeds, or percentiles of the draws; NaN for an unknown effect."""
        if not self.known:
            return np.nan, np.nan
        if self.draws is not None:
            return tuple(np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2]))
        if not self._spread:
            return -np.inf, np.inf
        return stats.t.interval(level, len(self.effects) - 1, self.estimate, stats.sem(self.effects))

    def p_value(self, rule: Rule) -> float:
        """Two-sided p-value: the smallest 1 - level at which the interval would decide for the claim.

        That is a test of no effect, or, for an equivalence claim, of an effect beyond ± the margin.
        """
        if not self.known:
            return 1.0
        bound, choose = (rule.margin, max) if rule.equivalence else (0.0, min)
        return max(self.finest, choose(self._beyond(-bound, below=True), self._beyond(bound, below=False)))

    def _beyond(self, bound: float, *, below: bool) -> float:
        """Twice the evidence that the effect lies ``below`` (or above) ``bound``."""
        if self.draws is not None:
            beyond = np.mean(self.draws <= bound) if below else np.mean(self.draws >= bound)
            return float(min(1.0, 2 * max(beyond, 1 / len(self.draws))))
        if not self._spread:
            return 1.0
        away = (self.estimate - bound) * (1 if below else -1)
        return float(min(1.0, 2 * stats.t.sf(away / stats.sem(self.effects), len(self.effects) - 1)))

    def seeds_needed(self, distance: float, level: float) -> float:
        """Seeds at which the interval's half width falls below ``distance``, from today's spread; NaN if unknown."""
        if self.draws is not None or not self._spread or not distance > 0:
            return np.nan
        n = np.arange(2, 1000)
        enough = n[stats.t.ppf((1 + level) / 2, n - 1) * self._spread / np.sqrt(n) < distance]
        return float(min(enough, default=np.inf))


def weakest(effects: pd.DataFrame, claim: str) -> str:
    """The column of ``effects`` (seeds, comparisons) named ``claim`` or ``claim | ...`` with the smallest mean.

    A claim with several comparisons holds if it holds in each, so the one that fits it least decides.
    """
    return effects.filter(regex=rf"^{re.escape(claim)}( \||$)").mean().fillna(-np.inf).idxmin()


def holm_levels(p_values: Mapping[str, float], alpha: float = ALPHA) -> dict[str, float]:
    """Confidence level of each claim's interval under Holm's step-down correction within a chapter.

    Sorted by p-value, claim k of m is judged at 1 - alpha / (m - k) until one is not rejected; from there
    on all keep that level.
    """
    levels, divisor = {}, len(p_values)
    for name in sorted(p_values, key=p_values.__getitem__):
        levels[name] = 1 - alpha / divisor
        if p_values[name] <= alpha / divisor and divisor > 1:
            divisor -= 1
    return levels


def verdict(rule: Rule, evidence: Evidence, level: float = 1 - ALPHA) -> str:
    """*holds*, *fails* or *open* for one claim, from its interval at ``level``."""
    low, high = evidence.interval(level)
    inside = -rule.margin < low and high < rule.margin
    if rule.equivalence:
        holds, fails = inside, low > rule.margin or high < -rule.margin
    else:
        holds, fails = low > 0 and not inside, high < 0 or inside
    if evidence.n < rule.min_n or evidence.finest > 1 - level or not (holds or fails):
        return "open"
    return "holds" if holds else "fails"


def verdicts(chapter: str, evidence: Mapping[str, Evidence]) -> pd.DataFrame:
    """The chapter's claims as a table: effect, interval at the corrected level, verdict, seeds that would decide.

    Raises ``KeyError`` when a rule has no evidence or evidence has no rule.
    """
    rules = RULES[chapter]
    if set(rules) != set(evidence):
        raise KeyError(f"claims without evidence or rule: {sorted(set(rules) ^ set(evidence))}")
    draws = min((len(item.draws) for item in evidence.values() if item.draws is not None), default=np.inf)
    if 2 / draws > ALPHA / len(rules):
        problem = f"{draws} draws cannot decide {len(rules)} claims at {ALPHA}; verdicts stay open"
        print(f"{chapter}: {problem}", file=sys.stderr)
    levels = holm_levels({claim: item.p_value(rules[claim]) for claim, item in evidence.items()})
    rows = []
    for claim, rule in rules.items():
        item, level = evidence[claim], levels[claim]
        low, high = item.interval(level)
        decision = verdict(rule, item, level)
        distance = abs(rule.margin - abs(item.estimate)) if rule.equivalence else abs(item.estimate)
        seeds = item.seeds_needed(distance, level) if decision == "open" and item.n >= rule.min_n else np.nan
        found = {"estimate": item.estimate, "low": low, "high": high, "level": level, "seeds": len(item.effects)}
        found |= {"over": item.over, "n": item.n, "verdict": decision, "seeds_to_decide": seeds}
        rows.append(vars(rule) | found)
    table = pd.DataFrame(rows).drop(columns="min_n")
    table["by_construction"] = table.pop("by_construction")  # goes last
    return table


def ledger(figures: Path) -> pd.DataFrame:
    """Every claim with its verdict and interval in each preset, from the committed ``claims.csv`` files."""
    paths = [path for preset in COMMITTED for path in sorted((figures / preset).glob("*/claims.csv"))]
    tables = [pd.read_csv(path, dtype={"claim": str}).assign(preset=path.parts[-3]) for path in paths]
    rows = pd.concat(tables, ignore_index=True)
    between = [f"[{r.low:+.3f}, {r.high:+.3f}]" if np.isfinite(r.high) else "(no interval)" for r in rows.itertuples()]
    effect = [f"**{r.verdict}** {r.estimate:+.3f} {b}" for r, b in zip(rows.itertuples(), between, strict=True)]
    effect = np.where(rows["estimate"].isna(), "not measured", effect)
    wide = rows.assign(effect=effect).pivot(index=["claim", "says"], columns="preset", values="effect").reset_index()
    order = [claim for chapter in RULES.values() for claim in chapter]
    wide = wide.sort_values("claim", key=lambda claims: claims.map(order.index), ignore_index=True).fillna("-")
    return wide[["claim", "says", *(preset for preset in COMMITTED if preset in wide)]]


def with_ledger(readme: str, figures: Path) -> str:
    """``readme`` with the ledger between its markers ``<!-- claims -->`` brought up to date."""
    table = ledger(figures)
    rows = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    before, _, after = readme.split(MARK)
    return "\n".join([before + MARK, *lines, MARK + after])


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_ledger(page.read_text(encoding="utf-8"), FIGURES), encoding="utf-8")
