"""int8 weights times int8 inputs: whole-number products, then the two scales.

On the CPU the weights are packed for oneDNN's kernel, which wants unsigned inputs: codes are shifted by 128 and the
kernel takes the shift back, so its sums are those of ``torch._int_mm``, which other devices use.  Nothing but the
final float32 products with the scales is rounded, and the output to the layer's dtype.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.runtime.base import LowBitLinear
from lightning_quant.runtime.stored import InputRule, StoredLinear

CUDA_ROWS = 17  # torch._int_mm on CUDA wants more than 16 rows
CUDA_ALIGNED = 8


class OneDnnWeight:
    """An int8 matrix (out, in) in the order that oneDNN's kernel reads.  Nothing changes it, so copies share it.

    Args:
        codes: int8, (out, in).
        scale: Real size of one code, float32, (out,).
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self.scale, self.zeros = scale, torch.zeros(len(codes), dtype=torch.int64)

    def product(self, codes: Tensor) -> Tensor:
        """Product with whole numbers in [-128, 127] (rows, in), times the weight's scales: float32, (rows, out)."""
        shifted = (codes + 128).to(torch.uint8)
        last: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        y: Tensor = torch.ops.onednn.qlinear_pointwise(shifted, 1.0, 128, self.packed, self.scale, self.zeros, *last)
        return y

    def __deepcopy__(self, memo: Any) -> OneDnnWeight:
        return self

    def __reduce__(self) -> NoReturn:
        cure = "Keep the export it was loaded from."
        raise TypeError(explain("W8A8Linear", "a model that stays in this process", "an attempt to save it", cure))


class W8A8Linear(LowBitLinear):
    """int8 weights with a scale per channel, int8 inputs with a scale per row or a fixed one.

    Args:
        stored: Symmetric, with one scale per row, and ``inputs``.
        device: Where it runs.
        dtype: Of the outputs.
    """

    weight_codes: Tensor | None
    input_scale: Tensor | None
    scale: Tensor
    kernel = "w8a8"

    def __init__(self, stored: StoredLinear, device: torch.device, dtype: torch.dtype) -> None:
        out, width = stored.codes.shape
        super().__init__(width, out, stored.bias, dtype)
        assert stored.inputs is not None, "the caller asks first"
        fixed = stored.inputs.scale
        self.register_buffer("input_scale", None if fixed is None else fixed.to(device))
        self.divisor = stored.inputs.divisor
        self.register_buffer("scale", stored.scale.to(device=device, dtype=torch.float32).flatten())
        packs = device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.packed = OneDnnWeight(stored.codes, self.scale) if packs else None
        self.register_buffer("weight_codes", None if packs else stored.codes.to(device).contiguous())

    def product(self, x: Tensor) -> Tensor:
        """As ``LowBitLinear.product``."""
        codes, scale = InputRule(self.input_scale, self.divisor).codes(x)
        return self._integer(codes).mul_(scale).to(self.dtype)

    def _integer(self, codes: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.product(codes)
        assert self.weight_codes is not None
        missing = max(0, CUDA_ROWS - len(codes)) if codes.device.type == "cuda" else 0
        padded = torch.nn.functional.pad(codes.to(torch.int8), (0, 0, 0, missing))
        return torch._int_mm(padded, self.weight_codes.t())[: len(codes)].float().mul_(self.scale)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """As ``LowBitLinear.codes``: a product with the unit matrix."""
        unit = torch.eye(self.in_features, device=self.scale.device)
        return (self._integer(unit) / self.scale).round().t().to(torch.int8)

    @property
    def weight(self) -> Tensor:
        """As ``LowBitLinear.weight``."""
        return StoredLinear(self.codes(), self.scale.unsqueeze(1), 8).dense(self.dtype)
