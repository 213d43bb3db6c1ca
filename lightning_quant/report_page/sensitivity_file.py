"""Figures that ``lightning-quant sensitivity --json`` wrote, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.sensitivity.result import UNITS, Sensitivity


def read_sensitivity(path: Path) -> Sensitivity:
    """The figures, without what only a recipe needs.

    Raises:
        CheckpointError: It is another file, or a damaged one.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data = {**data, "schemes": tuple(data["schemes"]), "groups": [tuple(group) for group in data["groups"]]}
        found = Sensitivity(**data, patterns={}, activations={})
        losses = [[float(x) for x in row] for row in found.losses]
        even = all(len(row) == len(found.schemes) for row in losses) and len(losses) == len(found.groups)
        if not even or not losses or found.measure not in UNITS or not all(found.groups):
            raise ValueError("a table with gaps, or an unknown measure")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        expected, cure = "figures of lightning-quant sensitivity --json", "Write them again."
        raise CheckpointError(explain(str(path), expected, f"{error!r:.200}", cure)) from error
    return found
