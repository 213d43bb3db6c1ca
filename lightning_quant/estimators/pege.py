"""Progressive element-wise gradient estimation with a learned surrogate per element, group or channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain, unknown
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, Settings, locate
from lightning_quant.estimators.compiled import kernels_for, one_pass
from lightning_quant.noise import seed, uniform
from lightning_quant.schedule import Schedule, as_schedule

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

THETA = ("element", "group", "channel")
THETA_DTYPES = ("uint8", "float32")
GROUP = 64
ADAM_BYTES = 16
SOFTEST, SHARPEST = 2.0, 8.0


@dataclass(frozen=True)
class Pege(Estimator):
    """PEGE with a learned surrogate F.

    In code units, with r in [-1/2, 1/2] the place between two levels, T = tanh(k/2), phi = tanh(k r)/(2T):
    ``F(u) = u + b * (phi - r)``, ``D = dF/du = 1 + b * (k sech^2(k r)/(2T) - 1)``; b = 0 is the
    straight-through estimator, b = 1 with k = ln(2/alpha - 1) is DSQ.  The forward is hard; backward, with
    e = scale * (F - Q), the error of the surrogate:
    ``g_x = (g + 2 lam(t) e) * D``, ``g_b = sum scale * (g + 2 lam(t) e) * (phi - r)``: the gradient of the
    task loss passed straight to F plus that of the progressive loss ``lam(t) * ||F(x) - Q(x)||^2``
    (sum over a weight's elements, mean over an activation's), in which Q and the scale are constants.
    A learned k has the same with ``dF/dk = b * (r sech^2(k r) T - tanh(k r) sech^2(k/2) / 2) / (2 T^2)``, which is 0
    as long as b is.

    Args:
        theta: What shares one b: ``element``, ``group`` (the scale's own group, or 64 elements of a row
            whose scale is per channel or tensor), ``channel``, or ``auto``: the finest whose bytes fit
            ``theta_bytes``.  Activations always hold one b per channel.
        theta_bytes: Bytes for all of Theta with its optimizer state (None: no limit); element counts 1
            byte per weight as uint8 and 16 as float32, groups and channels 16 per b.
        theta_dtype: ``uint8`` (b = q/255, updated with stochastic rounding and no optimizer state) or
            ``float32``; only for ``element``.
        initial: b at the start.
        sharpness: k: a number, the fields of a ``Schedule``, or ``"learned"``: a parameter of Theta's shape (one
            per channel where b has one per element, uint8 or not), kept in [2, 8].
        initial_sharpness: Where a learned k starts.
        lam: lam(t): a number, or the fields of a ``Schedule``.
        state_lr: Learning rate of b and of a learned k as a factor on their layer's; for uint8, the root mean
            square of the step of b itself is ``uint8_lr``.
        uint8_lr: See ``state_lr``.

    Source: the name and the progressive co-optimisation of discretization error are those of Zhao,
    arXiv:2509.00097 (abstract); see ``pege_replace`` for the
    replacement curriculum that abstract describes.
    Deviation: the form of F is our own construction.
    """

    about: ClassVar[About] = About("Zhao 2025 (the name; the surrogate is ours)", "2509.00097", "1-8", "scale, Theta")
    drawn: ClassVar[tuple[Mapping[str, Any], ...]] = ({"initial": 0.0}, {"initial": 0.5}, {"initial": 1.0})
    theta: str = "group"
    theta_bytes: int | None = None
    theta_dtype: str = "uint8"
    initial: float = 0.0
    sharpness: Any = 4.0
    lam: Any = field(default_factory=lambda: {"curve": "cosine", "start": 0.0, "end": 1e-3, "delay": 0.3})
    state_lr: float = 10.0
    uint8_lr: float = 0.01
    initial_sharpness: float = 4.0
    learns_scale: ClassVar[bool] = True
    _sharpness: Schedule = field(init=False, repr=False, default=Schedule())
    _lam: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        if self.theta not in (*THETA, "auto"):
            raise ValueError(unknown("theta", self.theta, (*THETA, "auto"), "pege.theta"))
        if self.theta_dtype not in THETA_DTYPES:
            raise ValueError(unknown("dtype", self.theta_dtype, THETA_DTYPES, "pege.theta_dtype"))
        if not 0 <= self.initial <= 1:
            raise ValueError(explain("pege.initial", "a number in [0, 1]", self.initial, "0 starts at STE."))
        object.__setattr__(self, "_lam", as_schedule(self.lam, "pege.lam"))
        if not SOFTEST <= self.initial_sharpness <= SHARPEST:
            got, expected = self.initial_sharpness, f"a number in [{SOFTEST:g}, {SHARPEST:g}]"
            raise ValueError(explain("pege.initial_sharpness", expected, got, "Use 4."))
        if self.learns_sharpness:
            return
        object.__setattr__(self, "_sharpness", as_schedule(self.sharpness, "pege.sharpness"))
        if min(self._sharpness.values) <= 0:
            raise ValueError(explain("pege.sharpness", "values above 0", self.sharpness, "Use 2 to 8, or 'learned'."))

    @property
    def learns_sharpness(self) -> bool:
        """Whether k is a parameter."""
        return isinstance(self.sharpness, str) and self.sharpness == "learned"

    @property
    def needs_bins(self) -> bool:
        """Always."""
        return True

    @property
    def holds_elements(self) -> bool:
        """The uint8 Theta."""
        return self.theta == "element" and self.theta_dtype == "uint8"

    def schedules(self) -> Mapping[str, Schedule]:
        """lam(t) and k(t), unless k is learned."""
        return {"lam": self._lam} if self.learns_sharpness else {"lam": self._lam, "sharpness": self._sharpness}

    def fit(self, rows: Mapping[str, tuple[int, int]], scales: Mapping[str, tuple[int, ...]]) -> Pege:
        """Choose the granularity of Theta under ``theta_bytes``; explicit choices that exceed it are refused."""
        if self.theta != "auto" and self.theta_bytes is None:
            return self
        weights = sum(math.prod(s) for s in rows.values())
        channels = ADAM_BYTES * sum(out for out, _ in rows.values())
        groups = ADAM_BYTES * sum(math.prod(_group_shape(rows[p], scales[p])) for p in rows)
        bytes_of = {
            "element": weights * (1 if self.theta_dtype == "uint8" else ADAM_BYTES),
            "group": groups,
            "channel": channels,
        }
        if self.learns_sharpness:
            for name, more in (("element", channels), ("group", groups), ("channel", channels)):
                bytes_of[name] += more
        for name in THETA if self.theta == "auto" else (self.theta,):
            if self.theta_bytes is None or bytes_of[name] <= self.theta_bytes:
                return replace(self, theta=name)
        sizes = ", ".join(f"{k} {v} bytes" for k, v in bytes_of.items())
        raise ValueError(
            explain(
                "pege.theta_bytes",
                f"at least what theta={self.theta!r} takes ({sizes})",
                self.theta_bytes,
                "Raise theta_bytes, choose theta='channel', or use method='ste', which keeps nothing.",
            )
        )

    def state(self, quantizer: FakeQuantizer) -> None:
        """Theta: a parameter, or a uint8 buffer together with the optimizer step; a learned k is a parameter."""
        if not quantizer.is_weight:
            b = torch.full((quantizer.channels,), self.initial)
        elif self.theta == "element":
            b = torch.full(quantizer.shape, self.initial)
        elif self.theta == "group":
            b = torch.full(_group_shape(quantizer.rows, quantizer.scale_shape), self.initial)
        else:
            b = torch.full((quantizer.rows[0], 1), self.initial)
        b = b.to(quantizer.device)
        if self._is_uint8(quantizer):
            quantizer.register_buffer("theta", (b * 255).round().to(torch.uint8))
            quantizer.track_turn()
        else:
            quantizer.register_parameter("theta", nn.Parameter(b.to(quantizer.dtype)))
        if self.learns_sharpness:
            shape = (quantizer.rows[0], 1) if quantizer.is_weight and self.theta == "element" else b.shape
            k = torch.full(shape, self.initial_sharpness, dtype=quantizer.dtype, device=quantizer.device)
            quantizer.register_parameter("sharpness", nn.Parameter(k))

    def _is_uint8(self, quantizer: FakeQuantizer) -> bool:
        return quantizer.is_weight and self.theta == "element" and self.theta_dtype == "uint8"

    def learned(self, quantizer: FakeQuantizer) -> Mapping[str, float]:
        """Theta, unless it is uint8, and a learned k."""
        names = ["theta"] * (not self._is_uint8(quantizer)) + ["sharpness"] * self.learns_sharpness
        return dict.fromkeys(names, self.state_lr)

    def view(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Rows cut into Theta's groups where the scale's blocks are coarser."""
        if not quantizer.is_weight or self.theta != "group":
            return x, scale
        groups = quantizer.theta.shape[1]
        if x.ndim == 3 and x.shape[1] == groups:
            return x, scale
        rows = x.reshape(quantizer.theta.shape[0], groups, -1)
        return rows, scale.reshape(-1, 1, 1) if scale.numel() > 1 else scale

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """B (or its uint8 code) and k, lifted to broadcast against ``x``, and the pull's factor."""
        k = quantizer.sharpness
        if self.learns_sharpness:
            k = self._lift(quantizer, k, x)
        return self._lift(quantizer, quantizer.theta, x), k, quantizer.pull_factor(x)

    def _lift(self, quantizer: FakeQuantizer, values: Tensor, x: Tensor) -> Tensor:
        if not quantizer.is_weight:
            return quantizer.per_channel(values, x)
        if self.theta == "group":
            return values.unsqueeze(-1)
        if self.theta == "element" and values.shape == quantizer.shape:
            return quantizer.granularity.view(values).reshape(x.shape)
        return values.reshape(values.shape[0], *(1,) * (x.ndim - 1))

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        b, sharpness, factor = inputs
        surrogate = _Surrogate.at(bins, b, sharpness, self.learns_sharpness)
        total = torch.addcmul(g, surrogate.error, bins.scale.to(g.dtype) * factor.to(g.dtype))
        task = g * surrogate.slope
        grad_b = _shared_sum(surrogate.gap.mul_(total), bins.scale, b) if b.is_floating_point() else None
        turn = surrogate.turn
        grad_k = None if turn is None else _shared_sum(turn.mul_(total), bins.scale, sharpness)
        return Gradient(total.mul_(surrogate.slope), task, (grad_b, grad_k, None))

    def penalty(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor | None:
        """lam(t) * ||F(x) - Q(x)||^2."""
        inputs = b, sharpness, factor = self.inputs(quantizer, x, scale)
        bins = quantizer.bins(x, scale, zero, inputs)
        error = _distance(bins, b, sharpness).mul_(bins.scale)
        total: Tensor = torch.linalg.vector_norm(error, dim=-1).square().sum() * factor / 2
        return total

    def project(self, quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
        """Keep b inside [0, 1] and a learned k inside [2, 8]."""
        if quantizer.theta.is_floating_point():
            quantizer.theta.data.clamp_(0.0, 1.0)
        if self.learns_sharpness:
            quantizer.sharpness.data.clamp_(SOFTEST, SHARPEST)

    def before_optimizer_step(self, quantizer: FakeQuantizer, weight: Tensor) -> None:
        """Step of a uint8 Theta: b -= uint8_lr * g_b / rms(g_b), rounded stochastically to 1/255.

        g_b comes from the weight's own, already reduced, gradient: (g + 2 lam e) = g_x / D.  Being
        normalised it does not see loss scaling, clipping or accumulation.  Kernels that compute it anyway make the step
        in backward, where nothing is accumulated: see ``FakeQuantizer.track_turn``.
        """
        if not self._is_uint8(quantizer) or weight.grad is None or quantizer.moved:
            return
        with torch.no_grad():
            view, scale, zero, _ = quantizer.blocks(self.transform(quantizer, weight.detach()))
            g = quantizer.granularity.view(weight.grad).reshape(view.shape)
            inputs = self.inputs(quantizer, view, scale)
            settings = Settings(quantizer.grid, quantizer.clips, True, quantizer.training, self)
            drawn = seed(quantizer.step, quantizer.salt)
            given = view, scale, zero, quantizer.table
            ours = kernels_for(settings, *given, *inputs) if quantizer.compiled else None
            body = partial(one_pass, stepped) if quantizer.compiled else stepped
            q = getattr(ours, "theta_step", body)(settings, g, *given, drawn, *inputs)
            flat = quantizer.granularity.view(quantizer.theta)
            if q.data_ptr() != flat.data_ptr():
                quantizer.theta.copy_(quantizer.granularity.unview(q.reshape(flat.shape), quantizer.theta.shape))

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """Mean and largest b, and mean k if it is learned."""
        theta, unit = quantizer.theta.detach(), 255 if quantizer.theta.dtype == torch.uint8 else 1
        out = {"theta": theta.float().mean() / unit, "theta_max": theta.amax().float() / unit}
        return {**out, "sharpness": quantizer.sharpness.detach().float().mean()} if self.learns_sharpness else out


def stepped(
    settings: Settings,
    g: Tensor,
    view: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    drawn: Tensor,
    *inputs: Tensor,
) -> Tensor:
    """A uint8 Theta after its step: see ``Pege.before_optimizer_step``.

    Args:
        settings: Of the weight's quantizer.
        g: The weight's gradient, in blocks.
        view: The weight, in blocks.
        scale: Scales, broadcastable.
        zero: Zero points, or one number.
        table: The codebook, or None.
        drawn: What ``noise.seed`` gives.
        inputs: As the rule reads them.
    """
    rule, (b, sharpness, _) = settings.rule, inputs
    assert isinstance(rule, Pege)
    u = torch.div(view.to(torch.promote_types(view.dtype, torch.float32)), scale)
    if isinstance(zero, Tensor) or zero:
        u = u.add_(zero)
    bins = locate(u, scale, table, settings.grid, rule, inputs, settings.training)
    surrogate = _Surrogate.at(bins, b, sharpness)
    grad = (g.float() / surrogate.slope.clamp(min=1e-3)).mul_(surrogate.gap).mul_(bins.scale).nan_to_num_(0.0, 0.0, 0.0)
    rms = grad.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    moved = b - grad.mul_(rule.uint8_lr * 255 / rms)
    return (moved + uniform(moved.shape, drawn)).floor_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class _Surrogate:
    """F at some inputs: D = dF/du, phi - r = dF/db, F - code, and dF/dk if it is wanted, all in code units."""

    slope: Tensor
    gap: Tensor
    error: Tensor
    turn: Tensor | None = None

    @staticmethod
    def at(bins: Bins, b: Tensor, sharpness: Tensor, turning: bool = False) -> _Surrogate:
        b, sharpness = _unit(b, bins.u.dtype), sharpness.to(bins.u.dtype)
        error = bins.error()
        r = bins.offset(error)
        top = torch.tanh(sharpness / 2)
        # tanh(z) = 2 sigmoid(2z) - 1 and sech^2(z) = 4 sigmoid(2z) (1 - sigmoid(2z)): a sixth of tanh's cost.
        sigmoid = torch.sigmoid_(r * (2 * sharpness))
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1)
        turn = 4 * r * slope if turning else None
        slope = slope.mul_(2 * sharpness / top * b).add_(1 - b)
        gap = sigmoid.sub_(0.5).mul_(1 / top).sub_(r)
        if turn is not None:  # phi = gap + r
            turn = turn.sub_((gap + r).mul_(1 - top * top)).mul_(b / (2 * top))
        # On a level, and so beyond the range, F is Q but for rounding: 0 there, or the pull would reach clipped values.
        error = torch.hardshrink(error.addcmul_(gap, b), 4 * torch.finfo(error.dtype).eps)
        return _Surrogate(slope, gap, error, turn)


def _distance(bins: Bins, b: Tensor, sharpness: Tensor) -> Tensor:
    """F - code alone, to rounding."""
    error, sharpness = bins.error(), sharpness.to(bins.u.dtype)
    r = bins.offset(error)
    gap = torch.sigmoid_(r * (2 * sharpness)).sub_(0.5).mul_(1 / torch.tanh(sharpness / 2)).sub_(r)
    return error.addcmul_(gap, _unit(b, error.dtype))


def _unit(b: Tensor, dtype: torch.dtype) -> Tensor:
    """B in [0, 1], whatever it is kept in."""
    return b.to(dtype) if b.is_floating_point() else b.to(dtype).mul_(1 / 255)


def _shared_sum(terms: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Sum of ``terms * scale`` over what shares an entry of ``like``; works in place."""
    if _is_shared(scale.shape, like.shape):
        return terms.sum_to_size(like.shape).mul_(scale).to(like.dtype)
    return terms.mul_(scale).sum_to_size(like.shape).to(like.dtype)


def _is_shared(scale: torch.Size, b: torch.Size) -> bool:
    """Whether all elements of one b share their scale."""
    return len(scale) <= len(b) and all(s in (1, n) for s, n in zip(reversed(scale), reversed(b), strict=False))


def _group_shape(rows: tuple[int, int], scales: tuple[int, ...]) -> tuple[int, int]:
    """Shape of a group Theta: the scale's groups, or 64 elements of a row, or the row."""
    if len(scales) == 2 and scales[1] > 1:
        return (scales[0], scales[1])
    out, row = rows
    return (out, row // GROUP if row % GROUP == 0 else 1)
