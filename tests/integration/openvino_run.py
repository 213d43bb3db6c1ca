"""The first output of an ONNX file as OpenVINO computes it; runs where openvino is installed, on its own.

Usage: python openvino_run.py MODEL.onnx INPUTS.npz OUT.npy [plain]

``plain`` turns off what rounds further: half precision, and integers for inputs that the file has in float.
"""

from __future__ import annotations

import sys

import numpy as np
import openvino

PLAIN = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def main() -> None:
    path, inputs, out, *words = sys.argv[1:]
    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", PLAIN if "plain" in words else {})
    with np.load(inputs) as given:
        found = model({name: given[name] for name in given.files})
    np.save(out, found[model.output(0)])


main()
