"""How compressed-tensors stores a weight matrix: one layout per kind of grid, trained codes in, named tensors out.

============================  =====================================================================================
pack-quantized                int32 words of b-bit codes + 2^(b-1), a scale per channel or group, asymmetric: zero
                              points, packed too, along the rows
int-quantized                 int8 codes beside quantized inputs
float-quantized               float8 (E4M3) codes
mxfp8-quantized               float8 codes, a power of two per block, stored as its exponent + 127
mxfp4-pack-quantized          two E2M1 codes to a byte, a power of two per block
nvfp4-pack-quantized          two E2M1 codes to a byte, an E4M3 scale per block and one float32 divisor of all
============================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.export.layout import Matrix
from lightning_quant.export.words import pack_words
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.scales import e4m3_divisor
from lightning_quant.scheme import TensorSpec

PACKED, PLAIN, EXPONENT_BIAS = "pack-quantized", "int-quantized", 127


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        format: Its name.
        tensors: ``tensors(matrix, quantizer, dtype)``, by suffix of the layer's path; the first one holds the codes.
        dtype: Of the scales, as config.json names it; None: the model's.
    """

    format: str
    tensors: Callable[[Matrix, FakeQuantizer, torch.dtype], dict[str, Tensor]]
    dtype: str | None = None


def layout_of(weight: FakeQuantizer, inputs: FakeQuantizer | None) -> Layout | None:
    """The layout of a layer; None where there is none for the weight's grid."""
    spec = weight.spec
    if spec.grid == "int":
        return LAYOUTS[PACKED if inputs is None else PLAIN]
    return LAYOUTS.get(FLOATS.get((spec.grid, spec.scale_format, spec.granularity == "group"), ""))


def arguments(spec: TensorSpec, dtype: str | None = None) -> dict[str, Any]:
    """What config.json says of a tensor.

    Args:
        spec: Resolved.
        dtype: Of its scales; None: the model's.
    """
    kinds = {"token": "token", "group": "group", "tensor": "tensor", "channel": "channel"}
    strategy = "tensor_group" if spec.scale_format == "e4m3" else kinds[spec.granularity]
    follows = bool(spec.dynamic) and spec.granularity in ("token", "group") and strategy != "tensor_group"
    return {
        "num_bits": int(spec.bits),
        "type": "int" if spec.grid == "int" else "float",
        "symmetric": bool(spec.symmetric),
        "strategy": strategy,
        "group_size": spec.group_size,
        "dynamic": follows,
    } | ({} if dtype is None else {"scale_dtype": dtype, "zp_dtype": dtype})


def _words(matrix: Matrix, quantizer: FakeQuantizer, dtype: torch.dtype) -> dict[str, Tensor]:
    bits = int(quantizer.spec.bits)
    found = {
        "weight_packed": pack_words(matrix.codes, bits),
        "weight_shape": torch.tensor(matrix.codes.shape, dtype=torch.int64),
        "weight_scale": matrix.scale.to(dtype),
    }
    if matrix.zero is not None:
        found["weight_zero_point"] = pack_words(matrix.zero.to(torch.int8).t(), bits).t().contiguous()
    return found


def _bytes(matrix: Matrix, quantizer: FakeQuantizer, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": matrix.codes, "weight_scale": matrix.scale.to(dtype)}


def _float8(matrix: Matrix, quantizer: FakeQuantizer, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": _levels(matrix, quantizer).to(torch.float8_e4m3fn), "weight_scale": matrix.scale.to(dtype)}


def _mx(pack: Callable[[Tensor], tuple[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def tensors(matrix: Matrix, quantizer: FakeQuantizer, dtype: torch.dtype) -> dict[str, Tensor]:
        name, codes = pack(_levels(matrix, quantizer))
        _, exponent = torch.frexp(matrix.scale.float())
        return {name: codes, "weight_scale": (exponent - 1 + EXPONENT_BIAS).to(torch.uint8)}

    return tensors


def _nvfp4(matrix: Matrix, quantizer: FakeQuantizer, dtype: torch.dtype) -> dict[str, Tensor]:
    divisor = e4m3_divisor(matrix.scale.float())
    return {
        "weight_packed": _nibbles(_levels(matrix, quantizer)),
        "weight_scale": (matrix.scale.float() * divisor).to(torch.float8_e4m3fn),
        "weight_global_scale": divisor.reshape(1),
    }


def _levels(matrix: Matrix, quantizer: FakeQuantizer) -> Tensor:
    """Real levels, at scale 1, of places on a codebook."""
    return quantizer.grid.dequantize(matrix.codes.float(), quantizer.table)


def _nibbles(levels: Tensor) -> Tensor:
    """E2M1 numbers as two codes to a byte, the first one low; a code is sign * 8 + the magnitude's place."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=levels.device)
    code = torch.bucketize(levels.abs(), magnitudes) + 8 * (levels < 0)
    return (code[:, ::2] | (code[:, 1::2] << 4)).to(torch.uint8)


LAYOUTS: dict[str, Layout] = {
    PACKED: Layout(PACKED, _words),
    PLAIN: Layout(PLAIN, _bytes),
    "float-quantized": Layout("float-quantized", _float8),
    "mxfp8-quantized": Layout(
        "mxfp8-quantized", _mx(lambda levels: ("weight", levels.to(torch.float8_e4m3fn))), "torch.uint8"
    ),
    "mxfp4-pack-quantized": Layout(
        "mxfp4-pack-quantized", _mx(lambda levels: ("weight_packed", _nibbles(levels))), "torch.uint8"
    ),
    "nvfp4-pack-quantized": Layout("nvfp4-pack-quantized", _nvfp4, "torch.float8_e4m3fn"),
}
FLOATS = {  # (grid, format of the scales, in groups)
    ("e4m3", "float", False): "float-quantized",
    ("e4m3", "e8m0", True): "mxfp8-quantized",
    ("e2m1", "e8m0", True): "mxfp4-pack-quantized",
    ("e2m1", "e4m3", True): "nvfp4-pack-quantized",
}
