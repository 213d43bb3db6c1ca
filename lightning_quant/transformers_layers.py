"""Layers that only transformers has; imported when a model holds one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lightning_quant.layers import QuantLayer, QuantLinear


class QuantConv1D(QuantLayer, Conv1D):  # type: ignore[misc]
    """GPT-2's ``Conv1D``, a linear layer whose weight is (in, out), on the grid."""

    bias: Tensor
    output_axis = 1
    input_channels = "nx"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product with a matrix."""
        y = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), weight)
        return y.view((*x.shape[:-1], y.shape[-1]))


class QuantFalconLinear(QuantLinear, FalconLinear):  # type: ignore[misc]
    """Falcon's ``Linear``, which adds its bias after rounding the product, on the grid."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product with a matrix."""
        y = x @ weight.T
        return y if bias is None else y + bias


TRANSFORMERS_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {Conv1D: QuantConv1D, FalconLinear: QuantFalconLinear}
