"""Ready-made lists of set-up steps, by how much of the data they ask for.

``data_free``: what looks at weights and batch normalization only; the first batch shows who reads whom, no statistic of
    it is used.  Where weights alone are rounded: ``rotate``, ``equalize``, ``correct_bias(analytic)``; where inputs are
    too, also ``absorb_bias`` before the last, which narrows the ranges of activations.
``light``: factors between layers, searched by the error of each block on a few batches, and ``correct_bias``: ``awq``
    for weights alone, ``smoothquant(alpha="search")`` where inputs are rounded too.
``advanced``: the same factors, then a rounding: ``gptq`` for weights alone, ``adaround`` where inputs are rounded too.
    No ``correct_bias``: it takes off what rounding to nearest would add.

What steps find no place for, such as rotations around batch normalization, is listed in the report and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ANALYTIC = {"name": "correct_bias", "analytic": True}
SEARCHED = {"name": "smoothquant", "alpha": "search"}

# Name -> (steps where only weights are rounded, steps where inputs are rounded too).
PRESETS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "data_free": (("rotate", "equalize", ANALYTIC), ("rotate", "equalize", "absorb_bias", ANALYTIC)),
    "light": (("awq", "correct_bias"), (SEARCHED, "correct_bias")),
    "advanced": (("awq", "gptq"), (SEARCHED, "adaround")),
}


def resolved(steps: Iterable[str | Mapping[str, Any]], weights_only: bool) -> tuple[str | Mapping[str, Any], ...]:
    """Steps with what each preset among them stands for in its place.

    Args:
        steps: Names, or mappings with a name.
        weights_only: Whether inputs of layers stay in float.

    >>> resolved(["light"], weights_only=True), resolved(["gptq"], weights_only=True)
    (('awq', 'correct_bias'), ('gptq',))
    """
    found: list[str | Mapping[str, Any]] = []
    for step in steps:
        found += PRESETS[step][0 if weights_only else 1] if isinstance(step, str) and step in PRESETS else [step]
    return tuple(found)
