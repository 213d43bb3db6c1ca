"""ONNX exports in OpenVINO, run by ``make test-runtimes``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quant import QuantConfig
from lightning_quant.export import export
from lightning_quant.export.onnx_inputs import drawn_inputs
from tests.integration.test_export import train_a_little
from tests.integration.test_onnx import FOLDING, samples, trained
from tests.integration.tiny import causal_lm

PYTHON = os.environ.get("OPENVINO_PYTHON")
pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.skipif(PYTHON is None, reason="make test-runtimes installs OpenVINO and says where it is"),
]


def openvino(out: Path, inputs: dict[str, Tensor], *words: str) -> Tensor:
    given, found = out.parent / "inputs.npz", out.parent / "found.npy"
    np.savez(given, **{name: value.numpy() for name, value in inputs.items()})
    script = Path(__file__).with_name("openvino_run.py")
    command = [str(PYTHON), str(script), str(out / "model.onnx"), str(given), str(found), *words]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return torch.from_numpy(np.load(found))


def gap(found: Tensor, model: nn.Module, **inputs: Tensor) -> tuple[float, float]:
    """Largest difference of an output, and the largest output."""
    with torch.no_grad():
        output = model(**inputs)
    expected = output if isinstance(output, Tensor) else output.logits
    return float((found - expected).abs().max()), float(expected.abs().max())


def test_convolutions_on_integers(tmp_path):
    """Its integer kernels round some values to another code; measured: 2e-3 of the largest output."""
    config = QuantConfig.parse("lsq", "w8a8", target="openvino", calibration=2, **FOLDING)
    model, x = trained("resnet", config), samples("resnet", 32, seed=9)
    export(model, tmp_path / "out", target="openvino", inputs={"x": samples("resnet", 2)})
    apart, largest = gap(openvino(tmp_path / "out", {"x": x}, "plain"), model, x=x)
    print(f"resnet w8a8: {apart:.3g} of {largest:.3g}")
    assert apart < 0.01 * largest


# Shares of the largest logit, plain and by default.  Measured: 7e-7, 2e-2; 7e-7, 2e-2; 3e-7, 6e-2.
LANGUAGE = {"w8a16": (1e-5, 0.06), "w4a16-g32": (1e-5, 0.06), "w8a8": (0.01, 0.15)}


@pytest.mark.parametrize("scheme", LANGUAGE)
def test_a_language_model(tmp_path, scheme):
    """Float error in plain arithmetic; by default it rounds inputs to 8 bits of its own, or to half precision."""
    config = QuantConfig.parse("lsq", scheme, target="openvino", calibration=2)
    model = train_a_little(causal_lm("llama"), config)
    export(model, tmp_path / "out", target="openvino")
    batch = drawn_inputs(model, 3, 24)
    for words, bound in zip((["plain"], []), LANGUAGE[scheme], strict=True):
        apart, largest = gap(openvino(tmp_path / "out", batch, *words), model, **batch)
        print(f"{scheme} {words}: {apart:.3g} of {largest:.3g}")
        assert apart < bound * largest
