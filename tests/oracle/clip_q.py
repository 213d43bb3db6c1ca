"""Tung, Mori 2018: clip by quantiles of each sign, cut what is left into even bins, replace by means."""

import numpy as np

from tests.oracle import Result, bounds, ste

OPTIONS = {"p": 0.25}
BITS = (4, 1.58, 2, 8)
ASYMMETRIC = False
UNMASKED = True


def partition(w, p, bits):
    """Bin of every weight, 0 to 2^b - 1 from left to right, and that of the pruned."""
    bins = bounds(bits)[1] - bounds(bits)[0]
    negative, positive = np.sort(w[w < 0])[::-1], np.sort(w[w > 0])  # both from 0 outwards
    negative, positive = negative[int(p * len(negative)) :], positive[int(p * len(positive)) :]
    left = negative[0] - negative[-1] if len(negative) else 0.0
    right = positive[-1] - positive[0] if len(positive) else 0.0
    zero = np.round(left * bins / (left + right) if left + right > 0 else bins / 2)
    zero = np.clip(zero, min(len(negative), 1), bins - min(len(positive), 1))
    if not len(negative):
        zero = 0
    elif not len(positive):
        zero = bins
    out = np.full(w.shape, zero)
    for i, v in enumerate(w):
        if len(negative) and v <= negative[0]:
            out[i] = min(np.floor((v - negative[-1]) * zero / left) if left else 0, zero - 1)
        elif len(positive) and v >= positive[0]:
            cut = np.floor((v - positive[0]) * (bins - zero) / right) if right else 0
            out[i] = zero + 1 + min(cut, bins - zero - 1)
    return out.astype(int), int(zero)


def compress(w, p, bits):
    bin_of, zero = partition(w, p, bits)
    out = np.zeros_like(w)
    for k in np.unique(bin_of):
        if k != zero:
            out[bin_of == k] = w[bin_of == k].mean()
    return out


def expected(case):
    if not case.is_weight:
        return ste.expected(case)
    rows = [compress(row, case.options["p"], case.bits) for row in case.blocks(case.x)]
    return Result(np.array(rows).reshape(case.x.shape), case.g, case.g)
