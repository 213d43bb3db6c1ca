"""What a rounding did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RoundingReport:
    """What became of each layer or block.

    Attributes:
        rounding: Its name.
        errors: Path of a layer or block -> relative squared error of its output on the calibration data, with nearest
            codes and with the chosen ones.
        nearest: Path of a layer -> why it was rounded to nearest.
        kept: Path of a layer -> why its weight was left alone.
    """

    rounding: str
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    nearest: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table."""
        lines = [f"{self.rounding}: relative squared error of outputs, rounded to nearest and as chosen"]
        lines += [f"  {path or '(model)':<48} {a:.3e} -> {b:.3e}" for path, (a, b) in self.errors.items()]
        lines += [f"  {path:<48} to nearest: {why}" for path, why in self.nearest.items()]
        lines += [f"  {path:<48} left alone: {why}" for path, why in self.kept.items()]
        return "\n".join(lines)
