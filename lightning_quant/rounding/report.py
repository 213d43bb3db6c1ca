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

    def summary(self) -> str:
        """A few lines: mean errors, and how many layers were left to nearest or alone, by the reason."""
        lines = []
        if self.errors:
            before, after = (sum(e) / len(self.errors) for e in zip(*self.errors.values(), strict=True))
            what = f"relative squared error of outputs {before:.2e} to nearest, {after:.2e} as chosen"
            lines.append(f"{self.rounding}: {len(self.errors)} layers or blocks, {what}")
        else:
            lines.append(f"{self.rounding}: every weight written to its grid")
        for title, found in (("to nearest", self.nearest), ("left alone", self.kept)):
            for why in dict.fromkeys(found.values()):
                own = [path for path, reason in found.items() if reason == why]
                lines.append(f"  {title}: {len(own)} x {own[0]} ({why})")
        return "\n".join(lines)
