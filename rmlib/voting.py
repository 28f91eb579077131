r"""Preference strength: M reward models vote on every pair (paper section 2.2, Eq 4).

Members are trained on the same pairs in different orders; their margins $d_m$ give each pair the strength
$\hat\mu = \frac1M \sum_m d_m$ and the spread $\hat\sigma$ (population). In-sample voting scores the pairs
the members were trained on, as the paper does; out-of-fold voting scores pairs they never saw.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from rmlib import models
from rmlib.evaluation import bands
from rmlib.training import DROPOUT, RewardRun


def members(run: RewardRun, n_members: int, *, vary_head: bool = False) -> list[RewardRun]:
    """``n_members`` copies of ``run`` that differ in data order, and in their head if ``vary_head``.

    The paper varies the order only (its default); member ``m`` takes ``data_seed + m``.
    """
    return [
        replace(run, name=f"{run.name}-m{m}", data_seed=run.data_seed + m, head_seed=run.head_seed + m * vary_head)
        for m in range(n_members)
    ]


def averaged(folders: Sequence[Path]) -> nn.Module:
    """One reward model with the mean of the weights of those in ``folders`` (arXiv 2401.12187)."""
    weights = [models.load_reward_model(folder).state_dict() for folder in folders]
    model = models.load_reward_model(folders[0])
    model.load_state_dict({name: torch.stack([each[name] for each in weights]).mean(0) for name in weights[0]})
    return model


def fold_plan(
    rows: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, group: np.ndarray, *, by: str, n_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train rows, score rows) of every fold; each row is scored once, by models that never saw it.

    ``by="pair"`` hides the pair; ``"group"`` hides every pair of its prompt or debate (``group``);
    ``"response"`` hides every pair that shares a response with it, which takes one model for each
    combination of two folds. ``chosen, rejected, group`` hold the ids of all pairs, indexed by ``rows``.
    Raises ``ValueError`` for an unknown kind, or for fewer units than folds.
    """
    kinds = {"pair": [rows], "response": [chosen[rows], rejected[rows]], "group": [group[rows]]}
    if by not in kinds:
        raise ValueError(f"unknown kind of fold {by!r}; choose from {', '.join(kinds)}")
    units = kinds[by]  # one array of ids, or two, with a fold each
    names = np.unique(np.concatenate(units))
    if len(names) < n_folds:
        raise ValueError(f"{len(names)} units by {by} cannot fill {n_folds} folds")
    fold = dict(zip(np.random.default_rng(seed).permutation(names), np.arange(len(names)) % n_folds, strict=True))
    folds = np.sort([[fold[unit] for unit in row] for row in zip(*units, strict=True)], axis=1)
    return [
        (rows[~np.isin(folds, hidden).any(axis=1)], rows[(folds == hidden).all(axis=1)])
        for hidden in np.unique(folds, axis=0)
    ]


def out_of_fold(run: RewardRun, plan: Sequence[tuple[np.ndarray, np.ndarray]], n_members: int) -> list[RewardRun]:
    """Members of every fold of ``plan``: each trains on the fold's train rows and scores its score rows."""
    return [
        replace(member, rows=train, score_rows=score)
        for k, (train, score) in enumerate(plan)
        for member in members(replace(run, name=f"{run.name}-fold{k}"), n_members)
    ]


def read_rewards(folder: Path, pair_ids: Sequence[str], snapshot: int | None = None) -> np.ndarray:
    """Rewards (pairs, 2) that one unit, finished or at a ``snapshot``, gave to chosen and rejected of ``pair_ids``.

    NaN where it scored no such pair. Raises ``ValueError`` for a snapshot that it did not take.
    """
    scores = pd.read_parquet(folder / "scores.parquet")
    if snapshot is None:
        snapshot = scores["snapshot"][scores["snapshot"] < DROPOUT].max()
    taken = scores[scores["snapshot"] == snapshot].set_index("pair_id")
    if taken.empty:
        raise ValueError(f"{folder.name} holds no snapshot {snapshot}, only {sorted(set(scores['snapshot']))}")
    return taken[["reward_chosen", "reward_rejected"]].reindex(list(pair_ids)).to_numpy()


def strength(margins: np.ndarray, pair_ids: Sequence[str]) -> pd.DataFrame:
    """Strength table ``pair_id, mean, std`` (Eq 4, population standard deviation) of (members, pairs) margins.

    Members that did not score a pair do not count for it. Raises ``ValueError`` naming a pair nobody scored.
    """
    scored = (~np.isnan(margins)).sum(axis=0)
    if not scored.all():
        raise ValueError(f"no member scored pair {list(pair_ids)[int(np.argmin(scored))]!r}")
    return pd.DataFrame({"pair_id": list(pair_ids), "mean": np.nanmean(margins, 0), "std": np.nanstd(margins, 0)})


def read_strength(
    path: Path, pair_ids: Sequence[str], seed: int | None = None, chosen_ids: Sequence[str] | None = None
) -> pd.DataFrame:
    """The strength table in a Parquet or CSV file, in the order of ``pair_ids``; of ``seed``, if it tells seeds apart.

    Raises ``ValueError`` naming the file and the column, row or pair that is wrong: it must hold ``pair_id, mean,
    std``, each pair once, finite means, spreads of at least zero, and every pair asked for; where it holds
    ``chosen_id``, the same response must be the chosen one as in ``chosen_ids``. Other columns stay.
    """
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        as_text = {"converters": {"pair_id": str}}  # an id of digits, or one that reads NA, stays as it is
        table = pd.read_csv(path, **as_text) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a table ({error})") from None
    if lacking := {"pair_id", "mean", "std"} - set(table.columns):
        there = ", ".join(map(str, table.columns))
        raise ValueError(f"{path}: no column {', '.join(sorted(lacking))}; there are {there}")
    if table["pair_id"].isna().any():
        raise ValueError(f"{path}: row {int(np.argmax(table['pair_id'].isna())) + 1} has no pair_id")
    table["pair_id"] = table["pair_id"].astype(str)
    if seed is not None and "seed" in table:
        table = table[table["seed"] == seed]
    if words := [name for name in ("mean", "std") if not pd.api.types.is_numeric_dtype(table[name])]:
        raise ValueError(f"{path}: column {words[0]} holds no numbers")
    ids, good = table["pair_id"], np.isfinite(table[["mean", "std"]].astype(float)).all(axis=1) & (table["std"] >= 0)
    wrong = {"twice": ids[ids.duplicated()], "missing": sorted(set(pair_ids) - set(ids))}
    for problem, pairs in (wrong | {"with no finite mean and spread": ids[~good]}).items():
        if len(pairs):
            raise ValueError(f"{path}: {len(pairs)} pairs {problem}, the first is {next(iter(pairs))!r}")
    table = table.set_index("pair_id").loc[list(pair_ids)].reset_index()
    if chosen_ids is not None and "chosen_id" in table and (other := table["chosen_id"] != list(chosen_ids)).any():
        pair = table["pair_id"][other].iloc[0]
        raise ValueError(f"{path}: {other.sum()} pairs are labelled otherwise than here, the first is {pair!r}")
    return table


def slices(mean: np.ndarray, n: int) -> list[np.ndarray]:
    """Positions of the pairs in each of ``n`` equal slices of strength, weakest first (Fig 4)."""
    band = bands(mean, n)
    return [np.flatnonzero(band == k) for k in range(n)]
