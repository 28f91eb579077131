r"""From strength to treatment: which labels are flipped, dropped, smoothed or given a margin (paper section 2.4).

A treatment is a set of changes to a :class:`rmlib.training.RewardRun`: every arm is the same training call.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit


def weakest(mean: np.ndarray, share: float | None = None) -> np.ndarray:
    """Positions of the pairs to flip: the weakest ``share``, or every mean below zero (section 2.4).

    Raises ``ValueError`` for a share outside [0, 1).
    """
    if share is None:
        return np.flatnonzero(mean < 0)
    if not 0 <= share < 1:
        raise ValueError(f"the share to flip must lie in [0, 1), got {share}")
    return np.sort(np.argsort(mean, kind="stable")[: round(share * len(mean))])


def noise_rate(mean: np.ndarray, rng: np.random.Generator) -> float:
    r"""Share of wrong labels, estimated without the truth by confident learning (arXiv 1911.00068, ``cleanlab``).

    ``mean`` holds votes of models that did not see the pair. Each pair is shown in a random order, since with
    chosen always first there would be one class only; the vote says $\sigma(\pm\hat\mu)$.
    """
    from cleanlab.count import compute_confident_joint

    first = rng.permutation(np.arange(len(mean)) % 2)  # 1: chosen stands first; both classes in equal parts
    says_first = expit(np.where(first == 1, mean, -mean))
    joint = compute_confident_joint(first, np.stack([1 - says_first, says_first], axis=1))
    return float(1 - np.trace(joint) / joint.sum())


@dataclass(frozen=True)
class Strengths:
    """What is known of the training pairs at ``rows`` of a set of ``n_pairs``: the mean of their votes, in order."""

    rows: np.ndarray
    mean: np.ndarray
    n_pairs: int

    def of_all(self, values: np.ndarray, elsewhere: float = 0.0) -> np.ndarray:
        """``values`` of the training pairs as an array over all pairs of the set."""
        spread = np.full(self.n_pairs, elsewhere)
        spread[self.rows] = values
        return spread

    def flip(self, positions: np.ndarray) -> dict:
        """The labels at ``positions`` swapped."""
        return {"flipped": self.rows[positions]}

    def drop(self, positions: np.ndarray) -> dict:
        """The pairs at ``positions`` left out."""
        return {"rows": np.delete(self.rows, positions)}

    def margin(self, flipped: np.ndarray | None = None, scale: float = 1.0) -> dict:
        """The raw signed mean times ``scale`` as margin (Eq 6); labels at ``flipped`` swapped, their margins turned."""
        turned = np.isin(np.arange(len(self.mean)), [] if flipped is None else flipped)
        margin = {"margin": self.of_all(scale * np.where(turned, -self.mean, self.mean))}
        return margin if flipped is None else margin | self.flip(flipped)

    def soft_target(self) -> dict:
        r"""Each pair's target is what the vote believes, $\sigma(\hat\mu)$."""
        return {"target": self.of_all(expit(self.mean), 1.0)}

    def soft_and_margin(self, alpha: float, reading: str) -> dict:
        """Soft labels and margins together, in one of three readings (``docs/deviations.md``, R37).

        ``"A"``: the text, smoothing where the mean is below zero, the margin for all. ``"B"``: labels below zero
        flipped, all smoothed, no margin. ``"C"``: as B, with the margin.
        """
        below = weakest(self.mean)
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must lie in [0, 0.5), got {alpha}")
        if reading == "A":
            target = self.of_all(np.where(self.mean < 0, 1 - alpha, 1.0), 1.0)
            return {"target": target} | self.margin()
        if reading == "B":
            return {"label_smoothing": alpha} | self.flip(below)
        if reading == "C":
            return {"label_smoothing": alpha} | self.margin(below)
        raise ValueError(f"unknown reading {reading!r}; choose from A, B, C")
