"""A temperature for each exit, fitted on labels.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; of exits, Schwartz et al., "The Right Tool
for the Job", ACL 2020.
"""

from __future__ import annotations

import numpy as np

from badge_peft.early_exit.history import ExitHistory

Array = np.ndarray
LARGEST = 32.0  # of a temperature; its inverse is the smallest
_STEPS = 40


def fitted_temperatures(history: ExitHistory, labels: Array) -> list[float]:
    """[E]: the temperature of each exit with the least cross-entropy on these rows.

    The cross-entropy is convex in the inverse temperature, so bisection of its derivative finds it. It lies in
    [1 / 32, 32], which it reaches where an exit is always right, or knows nothing.

    Args:
        history: All exits seen.
        labels: [n] class numbers, of which any outside of 0..K-1 are left out, or [n, K] targets of 0 and 1.
    """
    low, high = np.full(len(history.exits), 1 / LARGEST), np.full(len(history.exits), LARGEST)
    for _ in range(_STEPS):
        middle = np.sqrt(low * high)
        rises = _slope(history, labels, middle) > 0
        low, high = np.where(rises, low, middle), np.where(rises, middle, high)
    return [float(f"{1 / x:.6g}") for x in np.sqrt(low * high)]


def _slope(history: ExitHistory, labels: Array, inverse: Array) -> Array:
    """[E]: the derivative of the cross-entropy's sum by the inverse temperature."""
    logits = history.logits.astype(np.float64)  # [E, n, K]
    scaled = logits * inverse[:, None, None]
    if history.problem.many_labels:
        probabilities, targets = 0.5 * (1 + np.tanh(scaled / 2)), labels.astype(np.float64)
    else:
        known = (labels >= 0) & (labels < history.num_labels)
        logits, scaled = logits[:, known], scaled[:, known]
        weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        probabilities = weights / weights.sum(axis=-1, keepdims=True)
        targets = np.eye(history.num_labels)[labels[known]]
    return ((probabilities - targets) * logits).sum(axis=(1, 2))
