"""Measuring reward models and votes: accuracy, detection of wrong labels, strength bands, calibration.

A *margin* is the reward of chosen minus rejected; a *truth* the true margin of the label (positive where
the label is right, 0 for a tie, NaN where nobody knows). Ties and unknowns are left out of every share.
"""

import numpy as np
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score


def accuracy(margins: np.ndarray) -> float:
    """Share of strictly positive margins: a tie of rewards is no success. NaN for no margins."""
    return float(np.mean(margins > 0)) if len(margins) else float("nan")


def decided(truth: np.ndarray) -> np.ndarray:
    """Mask of the labels on which the truth decides."""
    return np.isfinite(truth) & (truth != 0)


def gold_accuracy(margins: np.ndarray, truth: np.ndarray) -> float:
    """Share of pairs that the reward model orders as the truth does, ties of the truth left out."""
    known = decided(truth)
    return accuracy(margins[known] * np.sign(truth[known]))


def label_error(truth: np.ndarray) -> float:
    """Share of wrong labels among the pairs whose truth is no tie."""
    return accuracy(-truth[decided(truth)])


def wrong_label_auroc(strength: np.ndarray, truth: np.ndarray) -> float:
    """AUROC of low ``strength`` as a detector of wrong labels; 0.5 is chance, NaN where one class is missing."""
    known = decided(truth)
    wrong = truth[known] < 0
    return float(roc_auc_score(wrong, -strength[known])) if wrong.any() and not wrong.all() else float("nan")


def wrong_label_precision_recall(suspect: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of the mask ``suspect`` for wrong labels, ties of the truth left out."""
    known = decided(truth)
    wrong, found = truth[known] < 0, suspect[known]
    precision, recall, *_ = precision_recall_fscore_support(wrong, found, average="binary", zero_division=0)
    return float(precision), float(recall)


def bands(values: np.ndarray, n: int) -> np.ndarray:
    """Band 0 to ``n`` - 1 of each value, ascending, in groups of equal size (ties broken by position)."""
    ranks = np.argsort(np.argsort(values, kind="stable"))
    return ranks * n // len(values)


def band_means(values: np.ndarray, band: np.ndarray, n: int) -> np.ndarray:
    """Mean of ``values`` in each of ``n`` bands, shape (n,); NaN for an empty band."""
    with np.errstate(invalid="ignore"):
        return np.bincount(band, weights=values, minlength=n) / np.bincount(band, minlength=n)


def confirmed_by_band(strength: np.ndarray, truth: np.ndarray, n: int) -> np.ndarray:
    """Share of labels that the truth confirms, by band of ``strength``, shape (n,) (paper Fig 3)."""
    band, known = bands(strength, n), decided(truth)
    return band_means((truth[known] > 0).astype(float), band[known], n)


def calibration_error(margins: np.ndarray, n: int = 10) -> float:
    """Expected calibration error of the predicted preference, on labels: mean |confidence - accuracy| over bands."""
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    band = bands(predicted, n)
    gap = band_means(predicted, band, n) - band_means((margins > 0).astype(float), band, n)
    return float(np.average(np.abs(gap), weights=np.bincount(band, minlength=n)))


def agreed(rewards: np.ndarray, rule: str) -> np.ndarray:
    """What a committee gives to each response, from its members' ``rewards`` (members, responses) on one scale.

    ``"mean"``, ``"worst"`` (the lowest), or ``"mean - std"`` (arXiv 2310.02743 has the variance). Raises
    ``ValueError`` for another rule.
    """
    rules = {"mean": rewards.mean, "worst": rewards.min, "mean - std": lambda axis: rewards.mean(0) - rewards.std(0)}
    if rule not in rules:
        raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(rules)}")
    return rules[rule](axis=0)


def spread(rewards: np.ndarray) -> dict[str, float]:
    """How far apart a reward model holds the responses to a prompt, from ``rewards`` (prompts, k).

    ``raw``: mean absolute difference of two; ``scale-free``: the same over the standard deviation of all rewards, which
    no scaling of the head changes.
    """
    if not len(rewards):
        return {"raw": float("nan"), "scale-free": float("nan")}
    first, second = np.triu_indices(rewards.shape[1], 1)
    raw = float(np.abs(rewards[:, first] - rewards[:, second]).mean())
    return {"raw": raw, "scale-free": raw / max(float(rewards.std()), 1e-12)}


def resample_clusters(cluster: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Row indices of one bootstrap sample that draws whole clusters (debates, prompts) with replacement."""
    order = np.argsort(cluster, kind="stable")
    _, starts = np.unique(cluster[order], return_index=True)
    members = np.split(order, starts[1:])
    return np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
