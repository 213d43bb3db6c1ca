"""What the low-bit layers share: shapes, bias, dtype, and that they are for inference."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

CHUNK_BYTES = 2 << 20  # of dense weight made at a time for many rows: what a core's second-level cache holds


@cache
def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices in tiles, which makes dense copies worth it at fewer rows."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_tile"))


class LowBitLinear(nn.Module):
    """A Linear layer that holds integers.  For inference: no gradient passes, and there is no dense weight.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: (out,) or None.
        dtype: What it computes in; inputs of another dtype are converted, outputs have the inputs' dtype.
    """

    kernel = ""
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        rows = input.reshape(-1, self.in_features).to(self.dtype).contiguous()
        y = self.product(rows) if len(rows) else rows.new_empty(0, self.out_features)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Product of rows (rows, in) with the weight, (rows, out), without the bias."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        """The file's integers, int8 (out, in), out of what the kernel reads."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in), made anew at every call: for code that looks at it, not for computing."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and kernel."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, kernel={self.kernel}"
