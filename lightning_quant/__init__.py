"""Quantization-aware training for PyTorch Lightning and Hugging Face: what was trained is what ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_quant.attach import attach, detach
from lightning_quant.calibration import calibrate
from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.controller import QuantController
from lightning_quant.errors import AttachError, CheckpointError, CoverageError, explain
from lightning_quant.estimators import ESTIMATORS
from lightning_quant.observers import OBSERVERS
from lightning_quant.optim import param_groups
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.ranges import RANGES
from lightning_quant.report import Report
from lightning_quant.schedule import Schedule
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import LayerRule, QuantConfig
from lightning_quant.version import __version__

if TYPE_CHECKING:
    from lightning_quant.callback import QuantCallback


__all__ = [
    "CODEBOOKS",
    "ESTIMATORS",
    "OBSERVERS",
    "RANGES",
    "AttachError",
    "CheckpointError",
    "CoverageError",
    "FakeQuantizer",
    "LayerRule",
    "QuantCallback",
    "QuantConfig",
    "QuantController",
    "Report",
    "Schedule",
    "TensorSpec",
    "__version__",
    "attach",
    "calibrate",
    "detach",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    """``QuantCallback`` needs Lightning and is imported on first use."""
    if name == "QuantCallback":
        try:
            from lightning_quant.callback import QuantCallback
        except ModuleNotFoundError as error:
            cure = "pip install 'lightning-quant[lightning]'"
            raise ImportError(explain("QuantCallback", "the package lightning", str(error), cure)) from error
        return QuantCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
