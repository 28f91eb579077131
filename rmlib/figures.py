"""How figures look and where they go: one style, one palette, intervals over seeds, the paper beside ours."""

import textwrap
from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from rmlib.records import Run

# Wong's palette, safe for colour-blind readers; the paper is always drawn in black.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
PAPER = {"color": "black", "linestyle": "none", "marker": "x", "markersize": 5, "label": "paper"}


def use_style() -> None:
    """Set the book's style for every figure of a notebook."""
    rc = {"figure.constrained_layout.use": True, "figure.dpi": 75, "savefig.dpi": 120, "pdf.fonttype": 42}
    rc |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium", "legend.frameon": False}
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.85, rc=rc)


def save(run: Run, figure: Figure, name: str, table: pd.DataFrame) -> None:
    """Write ``figure`` as PNG and PDF, and the ``table`` it draws as CSV, then show it."""
    figure.savefig(run.draft / f"{name}.png", metadata={"Description": f"run {run.id}"})
    figure.savefig(run.draft / f"{name}.pdf", metadata={"CreationDate": None, "Subject": f"run {run.id}"})
    run.files += [f"{name}.png", f"{name}.pdf"]
    run.table(name, table)
    plt.show()


def over_seeds(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of a t interval over the first axis (seeds); the ends are NaN for fewer than three."""
    mean = np.mean(values, axis=0)
    if len(values) < 3:  # of two seeds it would be six times as wide as they lie apart
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values, axis=0)
    return mean, mean - half, mean + half


def line(ax: Axes, x: np.ndarray, values: np.ndarray, label: str, color: str, **kwargs) -> None:
    """Draw the mean over seeds of ``values`` (seeds, points) with its 95 % interval as a band."""
    mean, low, high = over_seeds(values)
    ax.plot(x, mean, label=label, color=color, **{"marker": "o", "markersize": 3} | kwargs)
    if len(values) > 2:
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def forest(run: Run, verdicts: pd.DataFrame, name: str) -> None:
    """Draw a chapter's verdicts: every effect with its interval, in units of its rule's margin."""
    unit = verdicts["margin"].to_numpy()
    center, low, high = (verdicts[column].to_numpy() / unit for column in ("estimate", "low", "high"))
    place = np.arange(len(verdicts))
    labels = [textwrap.fill(f"{row.claim}: {row.says}", 52) for row in verdicts.itertuples()]
    figure, ax = plt.subplots(figsize=(9, 0.42 * len(verdicts) + 0.6))
    ax.axvspan(-1, 1, color="lightgrey", alpha=0.5, label="makes no difference")
    for decision, color in (("holds", PALETTE[0]), ("fails", PALETTE[1]), ("open", "black")):
        part = (verdicts["verdict"] == decision).to_numpy()
        bars = np.stack([(center - low)[part], (high - center)[part]])
        bars = np.where(np.isfinite(bars), bars, 0)  # one seed has no interval
        ax.errorbar(center[part], place[part], xerr=bars, fmt="o", color=color, capsize=2, label=decision)
    for at in place[~np.isfinite(center)]:
        ax.text(0, at, "not measured here", va="center", ha="center", fontsize=7.5, backgroundcolor="white")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(yticks=place, yticklabels=labels, ylim=(len(verdicts) - 0.5, -0.5))
    ends = np.abs(np.concatenate([low, high, center]))
    if ends[np.isfinite(ends)].max(initial=0) > 4:
        ax.set_xscale("symlog")
        left, right = ax.get_xlim()
        ax.set_xticks([tick for tick in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if left < tick < right])
        ax.xaxis.set_major_formatter("{x:g}")
    equal = ", ".join(verdicts["claim"][verdicts["equivalence"]])
    ax.set_xlabel("effect / margin (right: as the paper says" + f"; {equal}: inside the grey" * bool(equal) + ")")
    ax.tick_params(axis="y", labelsize=7.5)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(run, figure, name, verdicts)


def gaps(run: Run, table: pd.DataFrame, rival: str, name: str) -> None:
    """Draw arms of ``table`` (paid, arm, seed, one column a level) less ``rival``, paired by seed, with intervals."""
    wide = table.set_index(["paid", "arm", "seed"]).sort_index()
    arms = [arm for arm in table["arm"].unique() if arm != rival]
    figure, axes = plt.subplots(
        1, table["paid"].nunique(), figsize=(13, 0.5 * len(arms) + 1.2), sharex=True, sharey=True, squeeze=False
    )
    rows = []
    for ax, paid in zip(axes[0], table["paid"].unique(), strict=True):
        for place, arm in enumerate(arms):
            apart = (wide.loc[(paid, arm)] - wide.loc[(paid, rival)]).to_numpy()
            rows.append(summary(apart, paid=paid, arm=arm, level=wide.columns))
            for k, row in enumerate(rows[-1].itertuples()):
                style = {"color": PALETTE[k], "label": row.level if place == 0 else None}
                at = place + 0.22 * (k - (len(wide.columns) - 1) / 2)
                ax.plot(row.mean, at, "o", markersize=4, **style)
                ax.hlines(at, row.low, row.high, color=PALETTE[k])
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set(title=paid, yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5))
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel(f"true reward less that of {rival}", fontsize=10)
    save(run, figure, name, pd.concat(rows))


def summary(values: np.ndarray, **columns: object) -> pd.DataFrame:
    """``columns`` with the mean over seeds of ``values`` (seeds, points) and its 95 % interval, as a table."""
    mean, low, high = over_seeds(values)
    return pd.DataFrame(columns | {"mean": mean, "low": low, "high": high})


def paper(figure: str, series: str) -> pd.DataFrame:
    """Points ``x, y`` that the paper prints or that were read off its figure. Raises ``KeyError`` if there are none."""
    table = pd.read_csv(files("rmlib").joinpath("paper.csv"), comment="#", dtype={"figure": str})
    found = table[(table["figure"] == figure) & (table["series"] == series)]
    if found.empty:
        raise KeyError(f"no numbers of the paper for {figure!r}, {series!r}")
    return found[["x", "y"]].reset_index(drop=True)
