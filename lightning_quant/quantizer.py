"""FakeQuantizer: granularity + grid + range + estimator, the only object with state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import grid, reuse
from lightning_quant.distributed import to_local, whole
from lightning_quant.estimators import Bins, Estimator, FakeQuantize
from lightning_quant.granularity import Granularity
from lightning_quant.observers import build_observer
from lightning_quant.spec import TensorSpec


class FakeQuantizer(nn.Module):
    """Computes, in float, what integer storage will compute.

    A weight is handed in at every call and never kept.  Persistent state: ``scale`` (parameter or buffer,
    real; absent when dynamic), ``zero`` (codes; asymmetric grids only), ``running`` (observed ends of a static
    activation range, real) and what the estimator registers.
    Scheduled scalars are 0-dim non-persistent buffers that a controller fills.

    Args:
        spec: Resolved spec: no ``auto`` and no None in it.
        granularity: Which elements share a scale.
        estimator: Gradient rule.
        shape: The weight's shape; None for activations.
        channels: For activations: size of the channel dimension.
        channel_axis: For activations: the channel dimension.
        target: Runtime whose dynamic scale is followed (``QuantConfig.target``).
        salt: Tells this quantizer's noise from others'.
        where: Module path for error messages.
        dtype: Floating dtype of the state.
        device: Device of the state.
    """

    scale: Tensor
    zero: Tensor
    running: Tensor
    step: Tensor
    lam: Tensor
    share: Tensor
    sharpness: Tensor
    alpha: Tensor
    theta: Tensor
    _place: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        granularity: Granularity,
        estimator: Estimator,
        *,
        shape: tuple[int, ...] | None = None,
        channels: int = 0,
        channel_axis: int = -1,
        target: str = "vllm",
        salt: int = 0,
        where: str = "tensor",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.spec, self.granularity, self.estimator = spec, granularity, estimator
        self.observer = build_observer(spec.observer, f"{where}: TensorSpec.observer")
        self.is_weight = shape is not None
        self.shape = tuple(shape or ())
        self.rows = granularity.rows(self.shape) if self.is_weight else (0, 0)
        self.channels, self.channel_axis = channels, channel_axis
        self.target, self.salt = target, salt
        self.low, self.high = grid.code_bounds(spec.bits)
        self.scale_shape = granularity.scale_shape(self.shape, where)
        self.called = False
        self.observing = False
        self.measuring = False
        self.ready = bool(spec.dynamic)
        self.stateless = not self.is_weight and self._is_identity_backward()
        self.pending: tuple[Tensor, Tensor] | None = None
        self.measured: dict[str, Tensor] = {}
        if not spec.dynamic:
            start = torch.zeros(self.scale_shape, dtype=dtype, device=device)
            if spec.learn_scale:
                self.scale = nn.Parameter(start)
            else:
                self.register_buffer("scale", start)
            if not spec.symmetric:
                self.register_buffer("zero", torch.zeros_like(start))
            if not self.is_weight:
                self.register_buffer("running", torch.zeros(2, dtype=dtype, device=device))
        self.register_buffer("_place", torch.empty(0, dtype=dtype, device=device), persistent=False)
        for name, schedule in estimator.schedules().items():
            value = torch.tensor(schedule.first, dtype=torch.float32, device=device)
            self.register_buffer(name, value, persistent=False)
        estimator.state(self)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the state."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self._place.device

    def _is_identity_backward(self) -> bool:
        """Whether the value depends on the input alone and the gradient passes unchanged."""
        kind = type(self.estimator)
        plain = kind.inputs is Estimator.inputs and kind.blend is Estimator.blend and not self.estimator.needs_bins
        return bool(self.spec.dynamic and self.spec.symmetric and plain)

    def track_step(self) -> None:
        """Keep the optimizer step as an int64 buffer that the controller fills."""
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.device), persistent=False)

    def learned(self) -> Iterator[tuple[nn.Parameter, float | None]]:
        """Trained parameters with their learning-rate factor (None: the config's ``scale_lr``)."""
        if isinstance(self._parameters.get("scale"), nn.Parameter):
            yield self._parameters["scale"], None  # type: ignore[misc]
        for name, factor in self.estimator.learned(self).items():
            yield self._parameters[name], factor  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``, keeping shape and dtype; the backward is the estimator's."""
        self.called = True
        if self.observing:
            self.observe(x)
        kind = (self.spec.bits, self.granularity.kind, self.target)
        sharing = self.stateless and not self.measuring and reuse.allowed(x)
        if sharing and (known := reuse.find(x, kind)) is not None:
            return known
        view, scale, zero = self.blocks(x)
        inputs = self.estimator.inputs(self, view)
        clips = not (self.spec.dynamic and self.spec.symmetric)
        y: Tensor = FakeQuantize.apply(  # type: ignore[no-untyped-call]
            view, scale, zero, (self.low, self.high), clips, self._factor(x), self.training, self.estimator, *inputs
        )
        if self.measuring:
            self._measure(view.detach(), scale.detach(), zero, y.detach())
        if sharing:
            reuse.remember(x, kind, y)
        return self.granularity.unview(y, x.shape)

    def blocks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """``x`` viewed as blocks, and the scale and zero point that broadcast against it."""
        view = self.granularity.view(x)
        scale, zero = self.scale_and_zero(x)
        scale = self.granularity.lift(scale)
        point: Tensor | float = grid.fixed_zero(self.spec.bits) if zero is None else self.granularity.lift(zero)
        cut, cut_scale = self.estimator.view(self, view, scale)
        if isinstance(point, Tensor) and cut.shape != view.shape:
            point = self.estimator.view(self, view, point)[1]
        return cut, cut_scale, point

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point in force for ``x``, in ``scale_shape`` (dynamic per token: (..., 1))."""
        if self.spec.dynamic:
            with torch.no_grad():
                return self._dynamic(x.detach())
        if self.ready:
            return self.scale, (None if self.spec.symmetric else self.zero)
        with torch.no_grad():
            scale, zero = self._per_sample(x.detach())
        if "scale" in self._parameters:  # DDP wants a gradient for every parameter at every step
            scale = scale + 0 * self.scale
        return scale, zero

    def _dynamic(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ranges of the tensor itself."""
        if self.granularity.kind == "token":
            whole = self.target == "transformers" and x.ndim == 2
            absmax = _absmax(x.reshape(1, -1) if whole else x)
            if self.target == "transformers":
                return grid.reader_scale(absmax, self.spec.bits), None
            # vLLM's kernels keep these scales in float32 whatever the activations' dtype.
            wide = torch.promote_types(x.dtype, torch.float32)
            return grid.symmetric_scale(absmax.to(wide), self.spec.bits), None
        if self.spec.symmetric and self.spec.observer == "minmax":
            absmax = _absmax(self.granularity.flat(x))
            return grid.symmetric_scale(absmax.reshape(self.scale_shape), self.spec.bits), None
        return self._from_range(
            *self.observer.range(self.granularity.flat(x), self.spec.bits, bool(self.spec.symmetric))
        )

    def _per_sample(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Static ranges that no data has set yet: each sample's own, however a batch is cut."""
        rows = x.reshape(len(x), -1) if x.numel() else x.new_zeros(len(x), 1)
        scale, zero = grid.scale_and_zero(rows.amin(dim=1), rows.amax(dim=1), self.spec.bits, bool(self.spec.symmetric))
        shape = (len(x), *(1,) * (x.ndim - 1))
        return scale.reshape(shape), None if zero is None else zero.reshape(shape)

    def _from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = grid.scale_and_zero(low, high, self.spec.bits, bool(self.spec.symmetric))
        return (
            scale.reshape(self.scale_shape).to(self.dtype),
            None if zero is None else zero.reshape(self.scale_shape).to(self.dtype),
        )

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the grid to cover [low, high], each (number of scales,), real."""
        scale, zero = self._from_range(low, high)
        self.scale.data.copy_(scale)
        if zero is not None:
            self.zero.copy_(zero)
        self.ready = True

    @torch.no_grad()
    def fit_range(self, x: Tensor) -> None:
        """Fix the grid to what the observer wants for ``x``."""
        if not self.spec.dynamic:
            rows = self.granularity.flat(x.detach()).float()
            self.set_range(*self.observer.range(rows, self.spec.bits, bool(self.spec.symmetric)))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Note the range of ``x`` for the current optimizer step; repeating a forward changes nothing."""
        if x.numel() == 0:  # an expert that got no token
            return
        rows = self.granularity.flat(x.detach()).float()
        low, high = self.observer.range(rows, self.spec.bits, bool(self.spec.symmetric))
        if self.pending is not None:
            low, high = torch.minimum(self.pending[0], low), torch.maximum(self.pending[1], high)
        self.pending = (low, high)

    @torch.no_grad()
    def commit(self) -> None:
        """Merge what the step's forwards noted into the range (the controller has reduced it over ranks)."""
        if self.pending is None:
            return
        low, high = (end.reshape(1).to(self.dtype) for end in self.pending)
        if self.ready:
            low, high = self.observer.merge((self.running[:1], self.running[1:]), (low, high))
        self.pending = None
        self.running.copy_(torch.cat([low, high]))
        self.set_range(low, high)

    @torch.no_grad()
    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What an export stores: codes (int8, the weight's shape), scale and zero point (``scale_shape``).

        Sharded weights and scales are gathered first, which is a collective.
        """
        x = whole(weight.detach())
        if self.spec.dynamic:
            scale, zero = self._dynamic(x)
        else:
            scale, zero = whole(self.scale.detach()), None if self.spec.symmetric else whole(self.zero)
        point = grid.fixed_zero(self.spec.bits) if zero is None else self.granularity.lift(zero)
        view = self.granularity.view(x).to(torch.promote_types(x.dtype, torch.float32))
        code = grid.encode(view, self.granularity.lift(scale), point, self.low, self.high)
        return self.granularity.unview(code, x.shape).to(torch.int8), scale, zero

    @torch.no_grad()
    def on_grid(self, weight: Tensor) -> Tensor:
        """The weight as evaluation computes with it, in its own dtype; sharded ones are gathered."""
        code, scale, zero = self.stored(weight)
        point = grid.fixed_zero(self.spec.bits) if zero is None else self.granularity.lift(zero)
        wide = torch.promote_types(weight.dtype, torch.float32)
        y = grid.decode(self.granularity.view(code).to(wide), self.granularity.lift(scale), point)
        return self.granularity.unview(y, weight.shape).to(weight.dtype)

    def bins(self, view: Tensor, scale: Tensor, zero: Tensor | float) -> Bins:
        """Position of blocked inputs on the grid."""
        u = torch.div(view.to(torch.promote_types(view.dtype, torch.float32)), scale)
        if isinstance(zero, Tensor) or zero:
            u = u.add_(zero)
        u = u.clamp_(self.low, self.high)
        return Bins(u, u.round(), self.low, self.high, scale)

    def pull_factor(self, x: Tensor) -> Tensor:
        """2 lam(t), divided by the number of elements for activations (their term is a mean)."""
        return self.lam * (2.0 if self.is_weight else 2.0 / max(x.numel(), 1))

    def _factor(self, x: Tensor) -> float:
        """LSQ's 1 / sqrt(N * high): N elements per weight scale, features of one sample for activations."""
        n = math.prod(self.shape) // math.prod(self.scale_shape) if self.is_weight else math.prod(x.shape[1:])
        return 1 / math.sqrt(max(n, 1) * max(self.high, 1))

    @torch.no_grad()
    def _measure(self, x: Tensor, scale: Tensor, zero: Tensor | float, y: Tensor) -> None:
        self.measured = {"error": (x - y).float().square().sum() / x.float().square().sum().clamp(min=1e-30)}
        term = self.estimator.penalty(self, x, scale, zero)
        if term is not None:
            self.measured["progressive_loss"] = term

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.spec.dynamic and not self.scale.is_meta:
            self.ready = bool((to_local(self.scale) > 0).all())

    def extra_repr(self) -> str:
        """One line: grid, granularity and method."""
        sign = "" if self.spec.symmetric else ", asymmetric"
        size = f"({self.spec.group_size})" if self.spec.group_size else ""
        kind = "dynamic" if self.spec.dynamic else "learned" if self.spec.learn_scale else "fixed"
        return (
            f"{self.spec.bits:g} bits{sign}, {self.granularity.kind}{size}, {kind} range, "
            f"{type(self.estimator).__name__.lower()}"
        )


def _absmax(x: Tensor) -> Tensor:
    """Largest magnitudes along the last dimension, which is kept: two reductions, no copy of ``x``."""
    return torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
