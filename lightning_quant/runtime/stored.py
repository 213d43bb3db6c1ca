"""One quantized matrix as a checkpoint stores it, and what its inputs are rounded to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputRule:
    """How a layer rounds its inputs to int8 before the product; symmetric.

    Attributes:
        scale: Real size of one code, shape (1,); None: taken from each row (token) of the input.
        divisor: With ``scale=None``: a row's scale is its largest magnitude over this number, 127 as vLLM's kernels
            have it, 127.5 as the reader of transformers does.
    """

    scale: Tensor | None = None
    divisor: float = 127.0

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round inputs.

        Args:
            x: Rows, (rows, in).

        Returns:
            Codes as whole float32 numbers in [-128, 127], (rows, in), and scales, (rows, 1) or (1,).
        """
        wide = x.float()
        if self.scale is not None:
            scale = self.scale.float()
        else:
            scale = x.abs().amax(dim=-1, keepdim=True)  # 127.5 divides in the inputs' own dtype, as that reader does
            scale = (scale if self.divisor == 127.5 else scale.float()) / self.divisor
            scale = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        return (wide / scale).round_().clamp_(-128, 127), scale


@dataclass(frozen=True)
class StoredLinear:
    """Integers and scales of a Linear layer, as the file has them.

    Attributes:
        codes: int8, (out, in).
        scale: (out, groups), real; one group is a scale per channel.
        bits: Width of a code.
        zero: Zero points in codes, (out, groups), or None for symmetric weights.
        bias: (out,) or None.
        inputs: How inputs are rounded; None: not at all.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    zero: Tensor | None = None
    bias: Tensor | None = None
    inputs: InputRule | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (code - zero) * scale, (out, in), computed in the scales' dtype as the formats' readers do."""
        level = self.codes.view(len(self.codes), self.scale.shape[1], -1).to(self.scale.dtype)
        if self.zero is not None:
            level = level - self.zero.to(level.dtype).unsqueeze(-1)
        return (level * self.scale.unsqueeze(-1)).flatten(1).to(dtype)
