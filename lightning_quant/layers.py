"""Layers that quantize in their forward.  A module becomes one by changing its class in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.packed import CompactLinear, PackedLinear, recomputed
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.rounded_product import rounded_product


class Fold(Protocol):
    """What changes a layer's weight before it is rounded: a normalization after it, adapters beside it."""

    def fold(self, layer: QuantLayer) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that evaluation rounds and adds."""

    def sources(self) -> list[nn.Parameter]:
        """Parameters beside the layer's own weight that the rounded one is made of."""

    def through(self, layer: QuantLayer, x: Tensor, *sizes: Any) -> Tensor:
        """The layer's output for a quantized input."""

    def undo(self) -> None:
        """Be what it was before ``attach``."""


class QuantLayer(nn.Module):
    """What the quantized layers share: the two quantizers, the normalization folded in, the facts attach needs.

    Class attributes: ``output_axis``, the weight's output-channel dimension, ``stacked``, whether it is a stack of
    matrices, ``input_channels``, the attribute with the number of input channels, and ``channel_axis``, the dimension
    of channels in input and output.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quant: FakeQuantizer
    input_quant: FakeQuantizer | None
    output_axis = 0
    stacked = False
    input_channels = "in_features"
    channel_axis = -1
    folds: tuple[Fold, ...] = ()  # a tuple, so that what it holds stays a child of its own parent
    recomputes = False  # see ``QuantConfig.recompute``

    def forward(self, input: Tensor, *sizes: Any) -> Tensor:
        """As the float layer."""
        x = self.quant_input(input)
        y = self.folds[0].through(self, x, *sizes) if self.folds else self.product(x, *self.quant_terms(), *sizes)
        return self.quant_output(y)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
        """The float layer's operation with this weight and bias."""
        raise NotImplementedError

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The float weight and bias that evaluation rounds and adds."""
        return self.folds[0].fold(self) if self.folds else (self.weight, getattr(self, "bias", None))

    def sources(self) -> list[nn.Parameter]:
        """Parameters that the rounded weight is made of."""
        own = [self.weight] if isinstance(self.weight, nn.Parameter) else []
        return own + [p for folded in self.folds for p in folded.sources()]

    def weight_name(self, path: str) -> str:
        """The weight's name in the model, given this module's."""
        return f"{path}.weight" if path else "weight"

    def runs_in(self, path: str) -> str:
        """Path of the module whose output comes of the weight, given this module's."""
        return path

    def quant_terms(self) -> tuple[Tensor, Tensor | None]:
        """The weight on its grid, and the bias."""
        weight, bias = self.folded()
        return self.weight_quant(weight), bias

    def on_grid(self) -> Tensor:
        """The weight as evaluation computes with it; a sharded one is gathered."""
        return self.weight_quant.on_grid(self.folded()[0])

    def quant_input(self, x: Tensor) -> Tensor:
        """The input on its grid, or as it is."""
        return x if self.input_quant is None else self.input_quant(x)

    def quant_output(self, y: Tensor) -> Tensor:
        """The output, with whatever the method does to the gradient that comes back through it."""
        return self.weight_quant.output(y)


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` on the grid."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product with a matrix."""
        return F.linear(x, weight, bias)

    def forward(self, input: Tensor, *sizes: Any) -> Tensor:
        """As the float layer; where it recomputes, backward makes the rounded weight once more."""
        if self.folds or not self.recomputes:
            return super().forward(input)
        if (y := rounded_product(self, input)) is not None:
            return self.quant_output(y)
        own: tuple[Any, ...] = (self.weight, *self.weight_quant.parameters())
        trained = [p for p in own if p.requires_grad]
        return self.quant_output(recomputed(self, self.quant_input(input), trained))


class QuantCompactLinear(QuantLinear, CompactLinear):  # type: ignore[misc]
    """A base of QLoRA, whose dense weight (with its adapters in it) goes on the grid."""

    unpacked = QuantLinear

    def forward(self, input: Tensor, *sizes: Any) -> Tensor:
        """As the float layer; backward makes the weight once more."""
        if self.folds:
            return super().forward(input)
        trained = [p for p in self.weight_quant.parameters() if p.requires_grad]
        return self.quant_output(recomputed(self, self.quant_input(input), trained))


class QuantPackedLinear(QuantCompactLinear, PackedLinear):  # type: ignore[misc]
    """``PackedLinear`` on the grid."""


class _QuantConv(QuantLayer):
    input_channels = "in_channels"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolution."""
        y: Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y


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
        return super().forward(input, output_size)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None) -> Tensor:
        """Transposed convolution."""
        sizes: Any = (output_size, self.stride, self.padding, self.kernel_size, self.spatial, self.dilation)
        extra = self._output_padding(x, *sizes)  # type: ignore[operator]
        y: Tensor = type(self).function(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)
        return y


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
            self.weight_quant(self.weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    PackedLinear: QuantPackedLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Embedding: QuantEmbedding,
}


# Where transformers has layers of its own: see ``transformers_layers``.
FOREIGN = ("transformers.pytorch_utils", "transformers.models.falcon.modeling_falcon")
BNB = "bitsandbytes.nn.modules"  # see ``bnb``


def layer_class(kind: type[nn.Module]) -> type[QuantLayer] | None:
    """The quantized class of exactly this class, or None.  Subclasses are not guessed at."""
    if kind not in LAYERS and kind.__module__ in FOREIGN:
        from lightning_quant.transformers_layers import TRANSFORMERS_LAYERS

        return TRANSFORMERS_LAYERS.get(kind)
    if kind.__module__ == BNB:
        from lightning_quant.bnb import BNB_LAYERS

        return BNB_LAYERS.get(kind)
    return LAYERS.get(kind)


def is_compact(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in a few bits: ours or bitsandbytes', with quantizers or without."""
    return isinstance(module, CompactLinear) or (
        type(module).__module__ == BNB and layer_class(type(module)) is not None
    )


def dense_weight(module: nn.Module, where: str = "") -> Tensor | None:
    """A layer's weight in float, made anew where it is stored in a few bits; None if it has none.

    Raises:
        AttachError: A layer of bitsandbytes (at ``where``) whose weight has not been rounded yet.
    """
    if type(module).__module__ == BNB and is_compact(module):
        from lightning_quant.bnb import dense

        return dense(module, where)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def compact_keys(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Keys of the state dict that stand for weights stored in a few bits, with the layers and their paths."""
    for path, module in model.named_modules():
        if is_compact(module):
            for key in module.state_dict():
                if key != "bias" and not key.startswith(("weight_quant.", "input_quant.")):
                    yield f"{path}.{key}".lstrip("."), path, module


@contextmanager
def dense_bases(model: nn.Module, beside: Iterable[Any]) -> Iterator[None]:
    """While open, compact layers without quantizers compute with the very weight that an export holds of them.

    Those of bitsandbytes make it anew at every use, instead of their own kernels, some of which round further in
    evaluation.  What adapters are merged into is an ordinary layer.

    Args:
        model: The model.
        beside: PEFT's layers whose adapters are about to be merged by its own rule.
    """
    wrapped = [(lora, lora.base_layer, type(lora)) for lora in beside if is_compact(lora.base_layer)]
    own = [m for m in model.modules() if type(m).__module__ == BNB and is_compact(m)]
    kinds = [type(m) for m in own]
    try:
        for lora, base, kind in wrapped:
            values: Any = dense_weight(base)
            lora.base_layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            lora.base_layer.weight, lora.base_layer.bias = nn.Parameter(values, requires_grad=False), base.bias
            if kind.__module__ == "peft.tuners.lora.bnb":
                from lightning_quant.lora import as_linear

                as_linear(lora)
        for module in own:
            from lightning_quant.bnb import DENSE

            module.__class__ = DENSE[type(module)]
        yield
    finally:
        for module, kind in zip(own, kinds, strict=True):
            module.__class__ = kind
        for lora, base, kind in wrapped:
            lora.base_layer, lora.__class__ = base, kind


def unpack_all(model: nn.Module) -> nn.Module:
    """The model with ordinary layers in place of compact ones without quantizers, in place."""
    for module in list(model.modules()):
        if is_compact(module):
            values: Any = dense_weight(module)
            if type(module).__module__ == BNB:
                from lightning_quant.bnb import DENSE

                module.__class__ = DENSE[type(module)]
            module.unpack(values)  # type: ignore[operator]
    return model


def float_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the model's first ordinary floating-point parameter."""
    own = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    return next(own, torch.get_default_dtype())


def is_convolution(kind: type[nn.Module]) -> bool:
    """Whether this (float or quantized) class is a convolution of images, sound or volumes."""
    from torch.nn.modules.conv import _ConvNd

    return issubclass(kind, _ConvNd)


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class a quantized layer was born with."""
    kind = type(module)
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and not issubclass(base, QuantLayer)]
    return next(base for base in bases if base is not CompactLinear)
