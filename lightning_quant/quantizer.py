"""FakeQuantizer: granularity + grid + range + estimator, the only object with state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_quant import encoding, reuse
from lightning_quant.distributed import to_local
from lightning_quant.errors import explain
from lightning_quant.estimators import (
    Bins,
    CompiledFakeQuantize,
    Deferred,
    Estimator,
    FakeQuantize,
    Settings,
    locate,
    native,
    overrides,
)
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid, reader_scale
from lightning_quant.metrics import measure
from lightning_quant.noise import offset
from lightning_quant.observers import build_observer
from lightning_quant.ranges import build_range
from lightning_quant.scheme import TensorSpec
from lightning_quant.targets import TARGETS

ALONE, ACCUMULATES = 0, 1  # what ``turn`` is filled with: it moves state at the count of 1


class FakeQuantizer(nn.Module):
    """Computes, in float, what integer storage will compute.

    A weight is handed in at every call and never kept.  Persistent state: what the range registers (``scale``,
    a parameter or buffer, real, and ``zero``, in codes, on asymmetric grids; nothing when dynamic), ``running``
    (observed ends of a static activation range, real) and what the estimator registers.
    Scheduled scalars are 0-dim non-persistent buffers that a controller fills; ``now`` holds them as Python
    numbers, for what happens between forwards.

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

    table: Tensor | None
    _place: Tensor

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """What the range and the estimator registered."""

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
        self.range = build_range(spec.range, f"{where}: TensorSpec.range")
        symmetric = bool(spec.symmetric) and not self.range.affine  # two free ends have no zero point
        self.grid = Grid(spec.bits, symmetric, spec.grid, spec.scale_format, spec.narrow)
        self.is_weight = shape is not None
        self.shape = tuple(shape or ())
        self.rows = granularity.rows(self.shape) if self.is_weight else (0, 0)
        self.channels, self.channel_axis = channels, channel_axis
        self.target, self.salt = target, salt
        self.low, self.high = self.grid.low, self.grid.high
        self.scale_shape = granularity.scale_shape(self.shape, where)
        self.enabled = True  # see ``bypass``
        self.compiled = False  # see ``QuantConfig.compile``
        self.called = False
        self.observing = False
        self.delayed = False
        self.measuring = False
        self.ready = bool(spec.dynamic)
        self.noted: Tensor | None = None
        self.turn: Tensor | None = None  # see ``track_turn``
        self.measured: dict[str, Tensor] = {}
        self.register_buffer("_place", torch.empty(0, dtype=dtype, device=device), persistent=False)
        covered = self.observer.covers and self.grid.covers
        self.clips = not (spec.dynamic and spec.symmetric and covered)
        self.register_buffer("table", self.grid.table(), persistent=False)
        if self.table is not None:
            self.table = self.table.to(device)
        self.stateless = not self.is_weight and self._is_identity_backward()
        in_place = granularity.axis in (None, 0) and not granularity.stacked and granularity.kind != "pixel"
        self.simple = in_place and not overrides(estimator, "transform")
        if not spec.dynamic:
            self.range.state(self)
            if not self.is_weight:
                self.register_buffer("running", torch.zeros(2, dtype=dtype, device=device))
        for name, schedule in estimator.schedules().items():
            value = torch.tensor(schedule.first, dtype=torch.float32, device=device)
            self.register_buffer(name, value, persistent=False)
        self.memo: dict[str, float] = {}
        self.now = {name: schedule.first for name, schedule in estimator.schedules().items()}
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
        rule = self.estimator
        return not (
            self.clips or rule.needs_bins or overrides(rule, "inputs", "blend", "assign", "decode", "transform")
        )

    def track_step(self) -> None:
        """Keep the optimizer step as an int64 buffer that the controller fills."""
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.device), persistent=False)

    def track_turn(self) -> None:
        """Let a backward move state per element, which otherwise ``before_optimizer_step`` does.

        It does where the controller says that one backward is all of a step, and this quantizer was called once for it:
        ``turn`` holds how many calls there were since the controller filled it, or a number below 0 once the state has
        moved, and what ``noise.seed`` adds to the step; int64, in the processor's memory.
        """
        self.track_step()
        self.turn = torch.tensor([ACCUMULATES, offset(self.salt)], device="cpu")

    @property
    def moved(self) -> bool:
        """Whether a backward has moved state per element in this optimizer step."""
        return self.turn is not None and bool(self.turn.numpy()[0] < 0)

    def track_start(self) -> None:
        """Be the identity in training wherever the controller fills ``started`` with 0 (``QuantConfig.delay``).

        Evaluation is quantized whatever it holds, and so is training where no controller drives it.  A float, since
        callbacks that average weights average buffers as well.
        """
        if not self.delayed:
            self.delayed = True
            self.register_buffer("started", torch.ones((), device=self.device), persistent=False)

    def learned(self) -> Iterator[tuple[nn.Parameter, float | None]]:
        """Trained parameters with their learning-rate factor (None: the config's ``scale_lr``)."""
        for parameter in self.range_parameters():
            yield parameter, None
        for name, factor in self.estimator.learned(self).items():
            yield self._parameters[name], factor  # type: ignore[misc]

    def range_parameters(self) -> list[nn.Parameter]:
        """What is learned of the range."""
        if self.spec.dynamic:
            return []
        held = [self._parameters.get(name) for name in self.range.initial()]  # torch.compile breaks at a walrus here
        return [p for p in held if p is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``, keeping shape and dtype; the backward is the estimator's."""
        if not self.enabled:
            return x
        return self._once_started(self._quantize(x), x)

    def output(self, y: Tensor) -> Tensor:
        """The layer's output ``y``, with whatever the method does to the gradient that comes back through it."""
        out = self.estimator.output(self, y) if self.enabled else y
        return y if out is y else self._once_started(out, y)

    def _once_started(self, y: Tensor, x: Tensor) -> Tensor:
        """``y``, or in training before quantization starts ``x``.

        An operation of the same graph: nothing compiles twice, and learned parameters have a gradient, if one of 0.
        """
        return torch.where(self.started > 0, y, x) if self.delayed and self.training else y

    def _quantize(self, x: Tensor) -> Tensor:
        self._note_call()
        kind = (self.grid, self.granularity, self.target)
        sharing = self.stateless and not self.measuring and reuse.allowed(x)
        if sharing and (known := reuse.find(x, kind)) is not None:
            return known
        if (rounded := self._rounded_rows(x)) is not None:
            if sharing:
                reuse.remember(x, kind, rounded)
            return rounded
        mapped = self.estimator.transform(self, x)
        if self.observing:
            self.observe(mapped)
        view, scale, zero, offset = self.blocks(mapped)
        inputs = self.estimator.inputs(self, view, scale)
        factor = self._factor(mapped)
        constants = (self.table, self.grid, self.clips, factor, self._interior, self.training, self.estimator)
        function = CompiledFakeQuantize if self.compiled and not torch.compiler.is_compiling() else FakeQuantize
        y: Tensor = function.apply(view, scale, zero, *constants, *inputs)  # type: ignore[no-untyped-call]
        if self.measuring:
            self._measure(view.detach(), scale.detach(), zero, y.detach(), mapped.detach())
        if offset is not None:
            y = y + offset
        y = self.granularity.unview(y, x.shape).to(x.dtype)
        if sharing:
            reuse.remember(x, kind, y)
        return y

    def _note_call(self) -> None:
        if torch.compiler.is_compiling() or not self.called:  # a module takes long to set an attribute
            self.called = True

    def _rounded_rows(self, x: Tensor) -> Tensor | None:
        """Straight-through rounding with a scale per row, in one pass over memory; None where there is more to it."""
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not (eager and self.compiled and self.spec.dynamic and self.stateless) or self._joins_rows(x):
            return None
        if self.observing or self.measuring or TARGETS[self.target].reader_scale:
            return None
        rows = self.granularity.view(x)
        if not native.reads_rows(self.grid, rows):
            return None
        return self.granularity.unview(native.rounded_rows(self.grid, rows), x.shape)

    def deferred(self, x: Tensor) -> tuple[Deferred, tuple[Tensor | None, ...]] | None:
        """What rounds ``x`` inside another operation, with its tensors, and counts as a call of this module.

        None where there is more to a call than arithmetic on blocks: anything is noted or measured, hooks wait for the
        call, or ``x`` is mapped or moved before it is rounded.
        """
        if not (self.simple and self.enabled) or self.observing or self.measuring or (self.delayed and self.training):
            return None
        if self._forward_hooks or self._forward_pre_hooks:
            return None
        view, scale, zero, offset = self.blocks(x)
        if offset is not None:
            return None
        self._note_call()
        inputs = self.estimator.inputs(self, view, scale)
        settings = Settings(self.grid, self.clips, self._interior, self.training, self.estimator)
        number, own = (0.0, zero) if isinstance(zero, Tensor) else (zero, None)
        turn = (self.turn, self.step) if self.turn is not None and self.training else None
        way = Deferred(settings, view.shape, number, self._factor(x), self.compiled, len(inputs), turn)
        return way, (scale, own, self.table, *inputs)

    def _factor(self, x: Tensor) -> float:
        return 1.0 if self.spec.dynamic else self.range.factor(self, x)

    @property
    def _interior(self) -> bool:
        return self.spec.dynamic or self.range.interior

    def blocks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
        """``x`` viewed as blocks, less the offset, and the scale, zero point and offset that broadcast to it."""
        scale, zero, offset = self.scale_zero_offset(x)
        view, parts = self.granularity.view(x), [self.granularity.lift(scale)]
        parts += [self.granularity.lift(t) for t in (zero, offset) if isinstance(t, Tensor)]
        cut = [self.estimator.view(self, view, part) for part in parts]
        view, (scale, *rest) = cut[0][0], [part for _, part in cut]
        if isinstance(zero, Tensor):
            zero, *rest = rest
        if offset is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            offset = rest[0].to(wide)  # once, so that both parts of its gradient are summed before they are rounded
            view = view.to(wide) - offset
        return view, scale, zero, offset

    def scale_zero_offset(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """Scale, zero point and real offset in force for ``x``, in ``scale_shape`` (dynamic inputs: (..., 1))."""
        if self.spec.dynamic:
            with torch.no_grad():
                scale, zero = self._dynamic(x.detach())
        elif self.ready:
            offset = self.range.offset(self)
            if offset is not None:  # the value is unchanged, the gradient is multiplied
                fixed = offset.detach()
                offset = fixed + self.range.factor(self, x) * (offset - fixed)
            return self.range.scale(self), self.range.zero(self), offset
        elif self.is_weight:
            cure = "Load the quantizers' state, or call lightning_quant.calibration.fit_weights(model)."
            raise ValueError(explain("a weight's quantizer", "a range", "none: attached with fit=False", cure))
        else:
            with torch.no_grad():
                scale, zero = self._per_sample(x.detach())
            for parameter in self.range_parameters():  # DDP wants a gradient for each at every step
                scale = scale + 0 * parameter
        return scale, (self.grid.zero or 0.0) if zero is None else zero, None

    def _dynamic(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ranges of the tensor itself."""
        if self.is_weight:
            rows = self.granularity.flat(x)
            if self.spec.symmetric and self.observer.covers:
                return self._covering(rows).reshape(self.scale_shape), None
            return self._from_range(*self.observer.range(rows, self.grid))
        blocks = x.reshape(1, -1) if self._joins_rows(x) else self.granularity.view(x)
        if self.observer.covers:
            absmax = _absmax(blocks)
        else:
            low, high = self.observer.range(blocks.reshape(-1, blocks.shape[-1]), self.grid)
            absmax = torch.maximum(-low, high).reshape(*blocks.shape[:-1], 1)
        if TARGETS[self.target].reader_scale and self.spec.grid == "int":
            return reader_scale(absmax, self.spec.bits), None
        # vLLM's kernels keep these scales in float32 whatever the activations' dtype.
        return self.grid.scale(absmax.to(torch.promote_types(x.dtype, torch.float32))), None

    def _joins_rows(self, x: Tensor) -> bool:
        return TARGETS[self.target].joins_rows and x.ndim == 2 and self.granularity.kind == "token"

    def _covering(self, rows: Tensor) -> Tensor:
        """The scales that put each row between the outermost levels."""
        if self.compiled and native.reads_rows(self.grid, rows):
            return native.dynamic_scale(self.grid, rows)
        return self.grid.scale(_absmax(rows))

    def _per_sample(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Static ranges that no data has set yet: each sample's own, however a batch is cut."""
        rows = x.reshape(len(x), -1) if x.numel() else x.new_zeros(len(x), 1)
        own = Grid(self.spec.bits, False) if self.range.affine else self.grid
        scale, zero = own.scale_and_zero(*self.observer.range(rows, own))
        shape = (len(x), *(1,) * (x.ndim - 1))
        return scale.reshape(shape), None if zero is None else zero.reshape(shape)

    def _from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = self.grid.scale_and_zero(low, high)
        return (
            scale.reshape(self.scale_shape).to(self.dtype),
            None if zero is None else zero.reshape(self.scale_shape).to(self.dtype),
        )

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the grid to cover [low, high], each (number of scales,), real."""
        self.range.set(self, low, high)
        self.ready = True

    @torch.no_grad()
    def fit_range(self, x: Tensor) -> None:
        """Fix the grid to what the observer wants for ``x``."""
        if not self.spec.dynamic:
            rows = self.granularity.flat(self.estimator.transform(self, x.detach())).float()
            self.set_range(*self.observer.range(rows, self.grid))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Note the range of ``x`` for the current optimizer step; repeating a forward changes nothing."""
        if x.numel() == 0:  # an expert that got no token
            return
        rows = self.granularity.flat(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
        self.noted = self.observer.pooled(self.noted, rows, self.grid)

    @torch.no_grad()
    def commit(self) -> None:
        """Merge what the step's forwards noted into the range (the controller has reduced it over ranks)."""
        if self.noted is None:
            return
        low, high = (end.to(self.dtype) for end in self.observer.unpooled(self.noted))
        if self.ready:
            low, high = self.observer.merge((self.running[:1], self.running[1:]), (low, high))
        self.noted = None
        self.running.copy_(torch.cat([low, high]))
        self.set_range(low, high)

    @torch.no_grad()
    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
        """What an export stores: codes (the weight's shape), scale, zero point and offset (``scale_shape``).

        Codes are int8, on a codebook int16 places.  Sharded weights and scales are gathered first, which is a
        collective.
        """
        return encoding.stored(self, weight)

    @torch.no_grad()
    def on_grid(self, weight: Tensor) -> Tensor:
        """The weight as evaluation computes with it, in its own dtype; sharded ones are gathered."""
        return encoding.on_grid(self, weight)

    def real(
        self,
        code: Tensor,
        scale: Tensor,
        zero: Tensor | float,
        offset: Tensor | None,
        inputs: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Real values of codes in blocks (float), given the range as ``stored`` returns it."""
        level = (
            self.grid.dequantize(code, self.table) if self.table is not None else self.estimator.decode(code, inputs)
        )
        if isinstance(zero, Tensor):
            level = level - self.granularity.lift(zero)
        elif zero:
            level = level - zero
        y = level * self.granularity.lift(scale)
        return y if offset is None else y + self.granularity.lift(offset)

    def bins(self, view: Tensor, scale: Tensor, zero: Tensor | float, inputs: tuple[Tensor, ...]) -> Bins:
        """Position of blocked inputs on the grid."""
        u = torch.div(view.to(torch.promote_types(view.dtype, torch.float32)), scale)
        if isinstance(zero, Tensor) or zero:
            u = u.add_(zero)
        return locate(u, scale, self.table, self.grid, self.estimator, inputs, self.training)

    def per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """Values of shape (channels,) reshaped to broadcast against the blocks of an activation."""
        if self.granularity.kind == "group":
            return values.reshape(-1, self.granularity.group_size)
        return values.reshape(-1, *(1,) * (x.ndim - 1 - self.channel_axis % x.ndim))

    def pull_factor(self, x: Tensor) -> Tensor:
        """2 lam(t), divided by the number of elements for activations (their term is a mean)."""
        return self.lam * (2.0 if self.is_weight else 2.0 / max(x.numel(), 1))

    @torch.no_grad()
    def _measure(self, x: Tensor, scale: Tensor, zero: Tensor | float, y: Tensor, given: Tensor) -> None:
        self.measured = measure(self, x, scale, zero, y, given)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._restore()
        if self.spec.dynamic or self._place.is_meta:
            return
        if not self.is_weight and any(not to_local(p).numel() for p in self.range_parameters()):
            self.ready = self.observer.data_free or bool(self.running.any())  # another rank holds the scale
        else:
            self.ready = self.range.ready(self)

    @torch.no_grad()
    def _restore(self) -> None:
        """Make what no file holds anew: ``to_empty`` loses it, a load that assigns leaves it on the meta device."""
        kept = [t for n, t in self._buffers.items() if n not in self._non_persistent_buffers_set]
        held = next((t for t in (*self._parameters.values(), *kept) if t is not None and not t.is_meta), None)
        if self._place.is_meta and held is not None:
            for name in self._non_persistent_buffers_set:
                if (buffer := self._buffers[name]) is not None:
                    self._buffers[name] = torch.zeros_like(buffer, device=held.device)
        if self._place.is_meta:
            return
        if self.table is not None:
            self.table.copy_(self.grid.table())  # type: ignore[arg-type]
        for name in self.estimator.schedules():
            self._buffers[name].fill_(self.now[name])  # type: ignore[union-attr]
        if self.delayed:
            self.started.fill_(1.0)

    def extra_repr(self) -> str:
        """One line: grid, granularity and method."""
        sign = "" if self.spec.symmetric else ", asymmetric"
        sign += "" if self.spec.grid == "int" else f", {self.spec.grid}"
        size = f"({self.spec.group_size})" if self.spec.group_size else ""
        kind = "dynamic" if self.spec.dynamic else "learned" if self.spec.learn_scale else "fixed"
        kind += "" if self.spec.range == "scale" else f" {self.spec.range}"
        return (
            f"{self.spec.bits:g} bits{sign}, {self.granularity.kind}{size}, {kind} range, "
            f"{type(self.estimator).__name__.lower()}"
        )


def _absmax(x: Tensor) -> Tensor:
    """Largest magnitudes along the last dimension, which is kept: two reductions, no copy of ``x``."""
    return torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
