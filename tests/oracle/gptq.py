"""GPTQ in float64, column by column, with the whole inverse at every step, from the paper's equations 2 and 3."""

from __future__ import annotations

import numpy as np


def gptq(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, low: int, high: int, damping: float) -> np.ndarray:
    """Codes (out, in) on a symmetric grid with ``scale`` (out, in)."""
    w, h = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    h[np.diag_indices_from(h)] += damping * np.diag(h).mean()
    codes = np.empty_like(w)
    left = list(range(w.shape[1]))
    for column in range(w.shape[1]):
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        codes[:, column] = np.clip(np.rint(w[:, column] / scale[:, column]), low, high)
        error = (w[:, column] - codes[:, column] * scale[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return codes
