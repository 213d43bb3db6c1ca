"""Inputs of a layer as columns of a matrix product, and their second moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.layers import QuantConv1d, QuantConv2d, QuantLayer, is_convolution


def groups(layer: QuantLayer) -> int:
    """How many blocks of output channels read inputs of their own."""
    return int(layer.groups) if is_convolution(type(layer)) else 1  # type: ignore[arg-type]


def is_matrix(layer: QuantLayer) -> bool:
    """Whether the layer is a product of its weight's rows with columns that ``columns`` knows."""
    kinds = (QuantConv1d, QuantConv2d)
    plain = isinstance(layer, kinds) if is_convolution(type(layer)) else layer.weight.ndim == 2
    return plain and layer.weight_quant.granularity.kind != "pixel"


def columns(layer: QuantLayer, x: Tensor) -> Tensor:
    """What the weight's rows are multiplied with, (groups, places, columns), float32 or wider.

    Args:
        layer: Linear, or a convolution of one or two dimensions.
        x: Its (quantized) input.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not is_convolution(type(layer)):
        return x.reshape(1, -1, x.shape[-1])
    conv: nn.Conv2d = layer  # type: ignore[assignment]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if len(kernel) == 1:
        x = x.unsqueeze(-2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    unfolded = F.unfold(x, kernel, dilation, 0, stride)
    count = groups(layer)
    cut = unfolded.reshape(len(x), count, unfolded.shape[1] // count, -1)
    return cut.movedim(1, 0).movedim(2, -1).reshape(count, -1, cut.shape[2])


class Moments:
    """``H = 2/n sum x x^T`` of layers' inputs, each (groups, columns, columns)."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._places: dict[str, int] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    @torch.no_grad()
    def add(self, path: str, layer: QuantLayer, x: Tensor) -> None:
        """Take in one input of a layer, as it is before its input quantizer."""
        if x.numel() == 0:  # an expert that got no token
            return
        product, places = self._product(layer, x)
        self._totals[path] = self._totals[path].add_(product) if path in self._totals else product.clone()
        self._places[path] = self._places.get(path, 0) + places

    def _product(self, layer: QuantLayer, x: Tensor) -> tuple[Tensor, int]:
        """Computed once for layers that read the same tensor."""
        alike = layer.input_quant is None and not is_convolution(type(layer))
        last = self._last
        if alike and last is not None and _same(last[0], x) and last[1] == x._version:
            return last[2], x.numel() // x.shape[-1]
        part = columns(layer, layer.quant_input(x))
        product = part.mT @ part
        self._last = (x, x._version, product) if alike else None
        return product, part.shape[1]

    def hessian(self, path: str) -> Tensor | None:
        """``H`` of a layer; None where nothing reached it."""
        return self._totals[path] * (2 / self._places[path]) if path in self._totals else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs, ``tr(D H D^T)``, of weights that differ by these rows.

    Args:
        difference: (rows, columns).
        hessian: (groups, columns, columns).
    """
    cut = difference.reshape(len(hessian), -1, difference.shape[-1])
    return float(((cut @ hessian) * cut).sum())
