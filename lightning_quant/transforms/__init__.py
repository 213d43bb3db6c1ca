"""What is done to a float model once, before it is quantized.

Most leave what it computes as it is; those that approximate say so, and by how much the output moved.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_quant.transforms.absorb_bias import absorb_bias
from lightning_quant.transforms.awq import awq
from lightning_quant.transforms.clip import clip_weights
from lightning_quant.transforms.correct_bias import correct_bias
from lightning_quant.transforms.correct_weights import correct_weights
from lightning_quant.transforms.equalize import equalize
from lightning_quant.transforms.ocs import ocs
from lightning_quant.transforms.pairs import Inputs
from lightning_quant.transforms.reestimate_bn import reestimate_bn
from lightning_quant.transforms.rescale import Applied, TransformReport
from lightning_quant.transforms.rotate import rotate
from lightning_quant.transforms.smoothquant import smoothquant
from lightning_quant.transforms.spinquant import spinquant

# By the names that QuantConfig.setup takes; each is called with the model and batches, and with the config if it has
# a parameter of that name.  Its other parameters are its options.
TRANSFORMS: dict[str, Callable[..., TransformReport]] = {
    "smoothquant": smoothquant,
    "awq": awq,
    "rotate": rotate,
    "spinquant": spinquant,
    "equalize": equalize,
    "absorb_bias": absorb_bias,
    "clip_weights": clip_weights,
    "correct_weights": correct_weights,
    "correct_bias": correct_bias,
    "reestimate_bn": reestimate_bn,
}

__all__ = [
    "TRANSFORMS",
    "Applied",
    "Inputs",
    "TransformReport",
    "absorb_bias",
    "awq",
    "clip_weights",
    "correct_bias",
    "correct_weights",
    "equalize",
    "ocs",
    "reestimate_bn",
    "rotate",
    "smoothquant",
    "spinquant",
]
