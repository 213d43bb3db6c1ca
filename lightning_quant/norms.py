"""Batch normalization folded into the layer before it: what integer runtimes compute, in training too.

A normalization over a layer's output is a factor and a shift per output channel, which the layer's own weight and bias
can hold:

    w_fold = gamma w / sigma,  b_fold = beta + gamma (b - mu) / sigma,  sigma = sqrt(var + eps)

Rounding ``w`` and normalizing afterwards trains another function than the one that ships, so ``w_fold`` is what is
rounded.  With running statistics ("frozen") that is all.  With those of the batch ("two_pass") the layer runs twice,

    mu_B, var_B = moments(w * x + b)                            a pass with float weights, through which gradients flow
    y = (sigma / sigma_B) Q(w_fold) * x + beta + gamma (b - mu_B) / sigma_B

where sigma follows the running variance, so that the grid does not jump with every batch, and the factor in front
makes the output what the batch's own statistics would give.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2 (folding, the two passes); Krishnamoorthi 2018,
arXiv:1806.08342, section 3.2.2 (running sigma inside the grid, corrected outside, then frozen).
**Deviation**: the first paper has no correction outside the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import AttachError, explain
from lightning_quant.integer import fold_batch_norm

if TYPE_CHECKING:
    from lightning_quant.layers import QuantLayer


class FoldedBatchNorm(nn.Module):
    """A normalization that the layer before it computes; it keeps its parameters, buffers and keys, and does nothing.

    Not a subclass of PyTorch's own, so that ``convert_sync_batchnorm`` and ``update_bn`` leave it alone.
    ``follows``: whether statistics follow the batches in training ("two_pass").  ``held``: they stay from now on.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    eps: float
    momentum: float | None
    follows = False
    held = False

    def train(self, mode: bool = True) -> FoldedBatchNorm:
        """As any module, unless statistics are held."""
        return super().train(mode and not self.held)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: the layer before has done it."""
        return x

    def fold(self, layer: QuantLayer) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer with the running statistics folded in, in the weight's dtype."""
        if hasattr(self.running_mean, "to_local") or hasattr(self.weight, "to_local"):
            cure = 'Shard the block that holds both as one unit, or leave batch_norm="keep".'
            raise AttachError(explain(type(self).__name__, "parameters whole in the layer's forward", "shards", cure))
        gamma, beta = self._affine()
        mean, var = _wide(self.running_mean), _wide(self.running_var)
        groups = int(getattr(layer, "groups", 1)) if layer.output_axis else 1
        weight, bias = fold_batch_norm(
            layer.weight, layer.bias, gamma, beta, mean, var, self.eps, layer.output_axis, groups
        )
        return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)

    def through(self, layer: QuantLayer, x: Tensor, *sizes: Any) -> Tensor:
        """The layer's output, normalized."""
        if not (self.training and self.follows):
            return layer.product(x, *layer.quant_terms(), *sizes)
        raw = _wide(layer.product(x, layer.weight, layer.bias, *sizes))
        axis = layer.channel_axis % raw.ndim
        if layer.channel_axis == -1 and raw.ndim != 2:
            got, cure = f"shape {tuple(raw.shape)}", 'Leave batch_norm="keep".'
            raise AttachError(explain("batch normalization after a Linear", "outputs of shape (N, C)", got, cure))
        var, mean = torch.var_mean(raw, [i for i in range(raw.ndim) if i != axis], correction=0)
        self._track(mean, var, raw.numel() // raw.shape[axis])
        gamma, beta = self._affine()
        weight, _ = layer.quant_terms()
        own = torch.rsqrt(var + self.eps)
        correction = torch.sqrt(_wide(self.running_var) + self.eps) * own
        shift = beta + gamma * own * ((0.0 if layer.bias is None else layer.bias) - mean)
        shape = [-1 if i == axis else 1 for i in range(raw.ndim)]
        y = layer.product(x, weight, None, *sizes)
        return torch.addcmul(shift.reshape(shape), _wide(y), correction.reshape(shape)).to(y.dtype)

    def sources(self) -> list[nn.Parameter]:
        """Its gamma."""
        return [self.weight] if isinstance(self.weight, nn.Parameter) else []

    def undo(self) -> None:
        """Become an ordinary normalization again."""
        self.__class__ = _born(self, FOLDED)  # type: ignore[assignment]
        for name in ("follows", "held"):
            self.__dict__.pop(name, None)

    def identity(self, bias: Tensor) -> dict[str, Tensor]:
        """Values under which the float normalization adds ``bias`` and does nothing else."""
        out = {"running_mean": torch.zeros_like(self.running_mean), "running_var": 1 - self.eps + 0 * self.running_var}
        if self.weight is not None:
            out["weight"] = torch.ones_like(self.weight)
        if self.bias is not None:
            out["bias"] = bias.to(self.bias.dtype)
        else:
            out["running_mean"] = -bias.to(self.running_mean.dtype)
        return out

    def _affine(self) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(_wide(self.running_var))
        return (
            one if self.weight is None else _wide(self.weight),
            torch.zeros_like(one) if self.bias is None else _wide(self.bias),
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics as PyTorch's normalization does, the variance over n - 1."""
        self.num_batches_tracked.add_(1)
        share: float | Tensor = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked
        for running, now in ((self.running_mean, mean), (self.running_var, var * (count / max(count - 1, 1)))):
            running.copy_(running + share * (now - running))


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which statistics are kept apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FoldedBatchNorm1d(FoldedBatchNorm):
    """``nn.BatchNorm1d`` folded into the layer before it."""


class FoldedBatchNorm2d(FoldedBatchNorm):
    """``nn.BatchNorm2d`` folded into the layer before it."""


class FoldedBatchNorm3d(FoldedBatchNorm):
    """``nn.BatchNorm3d`` folded into the layer before it."""


FOLDED: dict[type[nn.Module], type[FoldedBatchNorm]] = {
    nn.BatchNorm1d: FoldedBatchNorm1d,
    nn.BatchNorm2d: FoldedBatchNorm2d,
    nn.BatchNorm3d: FoldedBatchNorm3d,
}


class _Held(nn.Module):
    """Mixed into a normalization that keeps its running statistics: it stays in evaluation mode."""

    def train(self, mode: bool = True) -> _Held:
        """Stay."""
        return super().train(False)


class HeldBatchNorm1d(_Held, nn.BatchNorm1d):  # type: ignore[misc]
    """``nn.BatchNorm1d`` with fixed statistics."""


class HeldBatchNorm2d(_Held, nn.BatchNorm2d):  # type: ignore[misc]
    """``nn.BatchNorm2d`` with fixed statistics."""


class HeldBatchNorm3d(_Held, nn.BatchNorm3d):  # type: ignore[misc]
    """``nn.BatchNorm3d`` with fixed statistics."""


class HeldSyncBatchNorm(_Held, nn.SyncBatchNorm):  # type: ignore[misc]
    """``nn.SyncBatchNorm`` with fixed statistics."""


HELD: dict[type[nn.Module], type[_Held]] = {
    nn.BatchNorm1d: HeldBatchNorm1d,
    nn.BatchNorm2d: HeldBatchNorm2d,
    nn.BatchNorm3d: HeldBatchNorm3d,
    nn.SyncBatchNorm: HeldSyncBatchNorm,
}


def hold_statistics(model: nn.Module, on: bool) -> None:
    """Let every batch normalization of a model keep its running statistics, whatever ``train()`` says; or stop that.

    Args:
        model: Any model; normalizations change their class in place, keys stay.
        on: Keep them, or let them follow the batches again.
    """
    for module in model.modules():
        if isinstance(module, FoldedBatchNorm):
            module.held = on
            module.train(model.training)
        elif on and type(module) in HELD:
            module.__class__ = HELD[type(module)]
            module.train()
        elif not on and isinstance(module, _Held):
            module.__class__ = _born(module, HELD)  # type: ignore[assignment]
            module.train(model.training)


def _born(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> type[nn.Module]:
    return next(born for born, kind in classes.items() if kind is type(module))
