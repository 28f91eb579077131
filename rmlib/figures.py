"""How figures look and where they go: one style, one palette, intervals over seeds, the paper beside ours."""

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
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.85)
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 75,
            "savefig.dpi": 160,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "pdf.fonttype": 42,
        }
    )


def save(run: Run, figure: Figure, name: str, table: pd.DataFrame) -> None:
    """Write ``figure`` as PNG and PDF, and the ``table`` it draws as CSV, then show it."""
    figure.savefig(run.draft / f"{name}.png", metadata={"Description": f"run {run.id}"})
    figure.savefig(run.draft / f"{name}.pdf", metadata={"CreationDate": None, "Subject": f"run {run.id}"})
    run.files += [f"{name}.png", f"{name}.pdf"]
    run.table(name, table)
    plt.show()


def over_seeds(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of a t interval over the first axis (seeds); no interval for one seed."""
    mean = np.mean(values, axis=0)
    if len(values) < 2:
        return mean, mean, mean
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values, axis=0)
    return mean, mean - half, mean + half


def line(ax: Axes, x: np.ndarray, values: np.ndarray, label: str, color: str, **kwargs) -> None:
    """Draw the mean over seeds of ``values`` (seeds, points) with its 95 % interval as a band."""
    mean, low, high = over_seeds(values)
    ax.plot(x, mean, label=label, color=color, **{"marker": "o", "markersize": 3} | kwargs)
    if len(values) > 1:
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def dots(ax: Axes, x: np.ndarray, values: np.ndarray, label: str, color: str, **kwargs) -> None:
    """Draw the mean over seeds of ``values`` (seeds, points) as dots with 95 % intervals as bars."""
    mean, low, high = over_seeds(values)
    bars = np.stack([mean - low, high - mean])
    ax.errorbar(x, mean, yerr=bars, label=label, color=color, **{"fmt": "o", "markersize": 4, "capsize": 2} | kwargs)


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
