"""What comparing an export with the trained model comes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerCheck:
    """One quantized layer.

    Attributes:
        path: Module path.
        codes_differ: How many integers (folded: weights) differ from the trained ones.
        scale_diff: Largest difference of a scale, real.
        output_diff: Largest difference of the layer's output in the run that gave the logits, real.
    """

    path: str
    codes_differ: int
    scale_diff: float
    output_diff: float

    @property
    def ok(self) -> bool:
        """Whether integers and scales are the trained ones."""
        return self.codes_differ == 0 and self.scale_diff == 0.0


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of ``verify``.

    Attributes:
        path: The export.
        format: Its format.
        max_abs_diff: Largest difference of a logit, real.
        mean_abs_diff: Mean difference of the logits.
        tolerance: Largest logit difference that counts as equal.
        layers: One entry per quantized layer, in the order they ran.
        other: Names of unquantized tensors that differ from the trained ones.
        notes: What the numbers do not cover, and why.
        ran: Whether the models ran; if not, logits and outputs are not compared.
    """

    path: str
    format: str
    max_abs_diff: float
    mean_abs_diff: float
    tolerance: float
    layers: list[LayerCheck]
    other: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ran: bool = True

    @property
    def ok(self) -> bool:
        """Whether everything that was stored is what was trained, and computes the same."""
        return all(c.ok for c in self.layers) and not self.other and self.max_abs_diff <= self.tolerance

    @property
    def first_difference(self) -> str | None:
        """The first layer, in the order they ran, whose contents or output differ; None if none does."""
        for check in self.layers:
            if not check.ok or check.output_diff > self.tolerance:
                return check.path
        return self.other[0] if self.other else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "ok": self.ok, "first_difference": self.first_difference}

    def __str__(self) -> str:
        """A readable verdict, with the layers that differ."""
        codes = sum(c.codes_differ for c in self.layers)
        scale = max((c.scale_diff for c in self.layers), default=0.0)
        lines = [
            f"{'EQUAL' if self.ok else 'DIFFERENT'}: {self.path} ({self.format})",
            f"  {len(self.layers)} quantized layers: {codes} integers differ, max|d scale| = {scale:.3g}",
            f"  verify max|d logits| = {self.max_abs_diff} (mean {self.mean_abs_diff:.3g}, "
            f"tolerance {self.tolerance:.3g})"
            if self.ran
            else "  logits were not compared",
        ]
        if not self.ok:
            lines.append(f"  first difference: {self.first_difference}")
            bad = [c for c in self.layers if not c.ok or c.output_diff > self.tolerance]
            lines += [
                f"    {c.path}: {c.codes_differ} integers, d scale {c.scale_diff:.3g}, d output {c.output_diff:.3g}"
                for c in bad[:20]
            ]
            lines += [f"    {name}: differs" for name in self.other[:20]]
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])
