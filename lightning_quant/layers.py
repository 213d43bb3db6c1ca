"""Layers that quantize in their forward.  A module becomes one by changing its class in place."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.quantizer import FakeQuantizer


class QuantLayer(nn.Module):
    """What the quantized layers share: the two quantizers and the facts attach needs.

    Class attributes: ``output_axis``, the weight's output-channel dimension, and ``input_channels``, the
    attribute with the number of input channels, and ``channel_axis``, their dimension in the input.
    """

    weight: Tensor
    weight_quant: FakeQuantizer
    input_quant: FakeQuantizer | None
    output_axis = 0
    input_channels = "in_features"
    channel_axis = -1

    def quant_weight(self) -> Tensor:
        """The weight on its grid."""
        weight: Tensor = self.weight_quant(self.weight)
        return weight

    def quant_input(self, x: Tensor) -> Tensor:
        """The input on its grid, or as it is."""
        return x if self.input_quant is None else self.input_quant(x)

    def quant_output(self, y: Tensor) -> Tensor:
        """The output, with whatever the method does to the gradient that comes back through it."""
        return self.weight_quant.estimator.output(self.weight_quant, y)


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` on the grid."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return self.quant_output(F.linear(self.quant_input(input), self.quant_weight(), self.bias))


class _QuantConv(QuantLayer):
    input_channels = "in_channels"

    def forward(self, input: Tensor) -> Tensor:
        """As the float layer."""
        y: Tensor = self._conv_forward(self.quant_input(input), self.quant_weight(), self.bias)  # type: ignore[operator]
        return self.quant_output(y)


class QuantConv1d(_QuantConv, nn.Conv1d):  # type: ignore[misc]
    """``nn.Conv1d`` on the grid."""

    channel_axis = -2


class QuantConv2d(_QuantConv, nn.Conv2d):  # type: ignore[misc]
    """``nn.Conv2d`` on the grid."""

    channel_axis = -3


class QuantConv3d(_QuantConv, nn.Conv3d):  # type: ignore[misc]
    """``nn.Conv3d`` on the grid."""

    channel_axis = -4


class _QuantConvTranspose(QuantLayer):
    output_axis = 1
    input_channels = "in_channels"
    spatial = 0
    function: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the float layer."""
        sizes: Any = (output_size, self.stride, self.padding, self.kernel_size, self.spatial, self.dilation)
        extra = self._output_padding(input, *sizes)  # type: ignore[operator]
        x, weight = self.quant_input(input), self.quant_weight()
        y: Tensor = type(self).function(
            x, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )
        return self.quant_output(y)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """``nn.ConvTranspose1d`` on the grid; scales belong to output channels, dimension 1 of the weight."""

    spatial, channel_axis = 1, -2
    function = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """``nn.ConvTranspose2d`` on the grid; scales belong to output channels, dimension 1 of the weight."""

    spatial, channel_axis = 2, -3
    function = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """``nn.ConvTranspose3d`` on the grid; scales belong to output channels, dimension 1 of the weight."""

    spatial, channel_axis = 3, -4
    function = staticmethod(F.conv_transpose3d)


class QuantEmbedding(QuantLayer, nn.Embedding):  # type: ignore[misc]
    """``nn.Embedding`` on the grid; its input, indices, is never quantized."""

    input_channels = ""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding``."""
        return F.embedding(
            input,
            self.quant_weight(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Embedding: QuantEmbedding,
}


def layer_class(kind: type[nn.Module]) -> type[QuantLayer] | None:
    """The quantized class of exactly this class, or None.  Subclasses are not guessed at."""
    if kind not in LAYERS and kind.__module__ == "transformers.pytorch_utils":
        from lightning_quant.transformers_layers import TRANSFORMERS_LAYERS

        return TRANSFORMERS_LAYERS.get(kind)
    return LAYERS.get(kind)


def is_convolution(kind: type[nn.Module]) -> bool:
    """Whether this (float or quantized) class is a convolution of images, sound or volumes."""
    from torch.nn.modules.conv import _ConvNd

    return issubclass(kind, _ConvNd)


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class a quantized layer was born with."""
    kind = type(module)
    return next(base for base in kind.__mro__ if not issubclass(base, QuantLayer) and issubclass(base, nn.Module))
