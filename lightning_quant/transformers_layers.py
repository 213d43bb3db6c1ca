"""Layers that only transformers has; imported when a model holds one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_quant.layers import QuantLayer


class QuantConv1D(QuantLayer, Conv1D):  # type: ignore[misc]
    """GPT-2's ``Conv1D``, a linear layer whose weight is (in, out), on the grid."""

    bias: Tensor
    output_axis = 1
    input_channels = "nx"

    def forward(self, x: Tensor) -> Tensor:
        """As ``Conv1D``."""
        size_out = (*x.size()[:-1], self.nf)
        x = self.quant_input(x)
        y = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.quant_weight())
        return self.quant_output(y.view(size_out))


TRANSFORMERS_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {Conv1D: QuantConv1D}
