"""LAPQ: all ranges of a model together, so that its loss is least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.bypass import bypassed, evaluating
from lightning_quant.calibration import commit_ranges, open_observers
from lightning_quant.errors import AttachError, explain, unknown
from lightning_quant.observers.mse import Mse
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.rounding.unit import Call, first_tensor
from lightning_quant.transforms.pairs import as_batches

METRICS = ("loss", "kl", "mse")
POWERS = (2.0, 2.5, 3.0, 3.5, 4.0)
STEPS = (0.3, 0.1)  # of a range's logarithm: how far line searches look first, in one search after the other
SAMPLE = 2**15  # numbers of each activation that its own range is fitted to


@dataclass
class LapqReport:
    """What was found.

    Attributes:
        ranges: How many ranges were chosen.
        before: Loss with the ranges there were, those of activations calibrated.
        layerwise: Loss with each range by itself, of least error in the norm that is best for all.
        after: Loss at the end.
        power: That norm's.
        evaluations: How often the loss was measured.
        metric: What was measured.
    """

    ranges: int
    before: float
    layerwise: float
    after: float
    power: float
    evaluations: int
    metric: str

    def summary(self) -> str:
        """One line."""
        return (
            f"lapq: {self.ranges} ranges, {self.metric} {self.before:.4g} -> {self.layerwise:.4g} (each by itself, "
            f"L_{self.power:.2f}) -> {self.after:.4g} (together), {self.evaluations} evaluations"
        )


@torch.no_grad()
def lapq(
    model: nn.Module,
    batches: Iterable[Any],
    iterations: int = 2,
    evaluations: int = 500,
    metric: str | None = None,
    powers: Sequence[float] = POWERS,
) -> LapqReport:
    """Choose the static ranges of weights and activations together, by the loss of the whole model, in place.

        1. range_i(p) = argmin ||x_i - Q(x_i)||_p     for each tensor by itself, p in powers
        2. p* = argmin of the parabola through loss(range(p))
        3. min over t of loss(range_i = exp(t_i) range_i(p*)), by Powell's method from t = 0

    A local search: the loss jumps where codes change.  The result is the best of everything that was measured, the
    ranges there were among it.  Training then keeps the
    ranges of activations: calibration steps would move them again.

    Args:
        model: With quantizers; left in the mode it was in.
        batches: Calibration data.  Every evaluation runs all of them.
        iterations: Of Powell's method: each searches along a line per range.
        evaluations: How often the loss is measured at most; line searches take some ten each.
        metric: ``loss`` is the one in the model's output, for batches with labels; ``kl`` and ``mse`` compare the
            first tensor of the output (``kl`` its softmax over the last dimension) with the float model's.  None:
            ``loss`` where there is one, else ``mse``.
        powers: p of step 1, three at least.

    Raises:
        AttachError: No static range, or scipy is missing.
        ValueError: Bad settings, no batch, or a metric that the model does not have.

    Source: Nahshan et al., "Loss Aware Post-Training Quantization", Machine Learning 2021, arXiv:1911.07190.

    **Deviation**: a tensor with a scale per channel or group has one variable, a factor on all of them, and an
    asymmetric range one for both ends; variables are logarithms; Powell's method starts twice, the second time from the
    best point with shorter steps; biases are left to ``correct_bias``.
    """
    if iterations < 1 or evaluations <= len(powers) or len(powers) < 3:
        got = f"iterations={iterations}, evaluations={evaluations}, powers={tuple(powers)}"
        expected = "iterations >= 1, 3 powers or more, and more evaluations than powers"
        raise ValueError(explain("lapq", expected, got, "Leave them out."))
    calls = [Call.of(batch) for batch in as_batches(batches)]
    with evaluating(model):
        metric, loss = _objective(model, calls, metric)
        _calibrate(model, calls)
        samples = _samples(model, calls)
        if not samples:
            cure = "Write -static for the inputs, or fewer than 8 bits, or set dynamic=False on a spec."
            raise AttachError(explain("lapq", "a static range", "ranges that follow each tensor", cure))
        return _Search(samples, loss, evaluations).run(metric, powers, iterations)


class _Spent(Exception):
    """No evaluations are left."""


class _Search:
    """Measures, and remembers the best."""

    def __init__(self, samples: dict[FakeQuantizer, Tensor], loss: Callable[[], float], evaluations: int) -> None:
        self.samples, self.loss, self.budget = samples, loss, evaluations
        self.bar = iter(track(range(evaluations), "lapq"))
        self.evaluations = 0
        self.least, self.best = math.inf, self._states()

    def run(self, metric: str, powers: Sequence[float], iterations: int) -> LapqReport:
        """All three steps."""
        before = self._measure()
        losses = {p: self._at(self._by_itself(p)) for p in powers}
        start = _vertex(losses)
        if start not in losses and self.evaluations < self.budget:
            losses[start] = self._at(self._by_itself(start))
        start = min(losses, key=losses.__getitem__)
        self._powell(self._by_itself(start), iterations)
        for _ in self.bar:  # a search that needed fewer
            pass
        for q, state in self.best.items():
            q.load_state_dict(state)
        return LapqReport(len(self.samples), before, losses[start], self.least, start, self.evaluations, metric)

    def _powell(self, ranges: list[tuple[Tensor, Tensor]], iterations: int) -> None:
        try:
            import numpy as np
            from scipy.optimize import minimize
        except ModuleNotFoundError as error:
            cure = "pip install 'lightning-quant[mixed]'"
            raise AttachError(explain("lapq", "the package scipy", str(error), cure)) from error

        start, least = np.zeros(len(ranges)), math.inf

        def at(t: Any) -> float:
            nonlocal start, least
            factors = [math.exp(v) for v in t]
            value = self._at([(low * f, high * f) for (low, high), f in zip(ranges, factors, strict=True)])
            if value < least:
                start, least = t.copy(), value
            return value

        options = {"maxiter": iterations, "xtol": 1e-3, "ftol": 1e-4}
        try:
            for step in STEPS:
                directions = step * np.eye(len(ranges))
                minimize(at, start, method="Powell", options={**options, "direc": directions})
        except _Spent:
            return

    def _by_itself(self, power: float) -> list[tuple[Tensor, Tensor]]:
        rule = Mse(power=power)
        return [rule.range(rows, q.grid) for q, rows in self.samples.items()]

    def _at(self, ranges: list[tuple[Tensor, Tensor]]) -> float:
        if self.evaluations == self.budget:
            raise _Spent
        for q, (low, high) in zip(self.samples, ranges, strict=True):
            q.set_range(low, high)
            if not q.is_weight:
                q.running.copy_(torch.cat([low, high]))
        return self._measure()

    def _measure(self) -> float:
        next(self.bar, None)
        self.evaluations += 1
        value = self.loss()
        if value < self.least:
            self.least, self.best = value, self._states()
        return value if math.isfinite(value) else math.inf

    def _states(self) -> dict[FakeQuantizer, dict[str, Tensor]]:
        return {q: {k: v.clone() for k, v in q.state_dict().items()} for q in self.samples}


def _vertex(losses: dict[float, float]) -> float:
    """Where the parabola through these points is least, within them; the best point if it opens downwards.

    >>> round(_vertex({2.0: 1.0, 3.0: 0.0, 4.0: 1.0}), 6), _vertex({2.0: 0.0, 3.0: 2.0, 4.0: 3.0})
    (3.0, 2.0)
    """
    p = torch.tensor(list(losses), dtype=torch.float64)
    y = torch.tensor(list(losses.values()), dtype=torch.float64)
    best = min(losses, key=losses.__getitem__)
    if not torch.isfinite(y).all():
        return best
    a, b, _ = torch.linalg.lstsq(torch.stack([p * p, p, torch.ones_like(p)], dim=1), y).solution.tolist()
    return min(max(-b / (2 * a), min(losses)), max(losses)) if a > 0 else best


def _objective(model: nn.Module, calls: list[Call], metric: str | None) -> tuple[str, Callable[[], float]]:
    """The metric's name, and what measures its mean over the batches."""
    if metric is not None and metric not in METRICS:
        raise ValueError(unknown("metric", metric, METRICS, "lapq"))
    with bypassed(model):
        outputs = [call.run(model) for call in calls]
    labelled = all(getattr(y, "loss", None) is not None for y in outputs)
    metric = metric or ("loss" if labelled else "mse")
    if metric == "loss":
        if not labelled:
            cure = "Put labels into the batches, or use metric='kl'."
            raise ValueError(explain("lapq(metric='loss')", "a model that returns its loss", "none", cure))
        return metric, lambda: sum(float(call.run(model).loss) for call in calls) / len(calls)
    floats = [first_tensor(y).float() for y in outputs]
    kl = metric == "kl"

    def apart() -> float:
        found = [first_tensor(call.run(model)).float() for call in calls]
        return sum(float((_kl if kl else F.mse_loss)(y, x)) for y, x in zip(found, floats, strict=True)) / len(calls)

    return metric, apart


def _kl(y: Tensor, x: Tensor) -> Tensor:
    own, other = (t.log_softmax(-1).flatten(0, -2) for t in (y, x))
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


def _calibrate(model: nn.Module, calls: list[Call]) -> None:
    """Ranges of activations as training's first steps would set them."""
    open_observers(model, True)
    try:
        for call in calls:
            call.run(model)
            commit_ranges(model)
    finally:
        open_observers(model, False)


def _samples(model: nn.Module, calls: list[Call]) -> dict[FakeQuantizer, Tensor]:
    """Rows that each static range is for: a weight's, or a sample of what a quantizer of activations reads in float."""
    found = {
        layer.weight_quant: layer.weight_quant.granularity.flat(_mapped(layer.weight_quant, layer.folded()[0]))
        for _, layer in quant_layers(model)
    }
    seen: dict[FakeQuantizer, list[Tensor]] = {}

    def see(q: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = _mapped(q, args[0]).flatten()  # type: ignore[arg-type]
        if x.numel():
            every = max(x.numel() * len(calls) // SAMPLE, 1)
            ends = torch.stack([x.amin(), x.amax()])
            seen.setdefault(q, []).append(torch.cat([x[::every], ends]))  # type: ignore[arg-type]

    handles = [q.register_forward_pre_hook(see) for _, q in quantizers(model) if not q.is_weight]
    try:
        with bypassed(model):
            for call in calls:
                call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    found |= {q: torch.cat(parts).unsqueeze(0) for q, parts in seen.items()}
    return {q: rows.float() for q, rows in found.items() if not (q.spec.dynamic or q.observer.data_free)}


def _mapped(q: FakeQuantizer, x: Tensor) -> Tensor:
    return q.estimator.transform(q, x.detach())


__all__ = ["LapqReport", "lapq"]
