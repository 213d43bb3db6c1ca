"""The sections of a page, each made only where there is something to show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lightning_quant.errors import CheckpointError
from lightning_quant.export.verdict import VerifyReport
from lightning_quant.report_page import charts
from lightning_quant.report_page.evaluation import Table
from lightning_quant.report_page.history import History
from lightning_quant.report_page.html import Cell, block, cards, definitions, paragraph, section, table, text
from lightning_quant.report_page.layers import LayerFigures
from lightning_quant.report_page.terms import COLUMNS, LAYERS, METRICS
from lightning_quant.sensitivity.result import UNITS, Sensitivity

Picture = Callable[[str, str, Callable[[Path], object]], str]  # as ``svg.picture``
SHOWN = 6  # layers with a histogram, and with a color in curves
PANELS = 12  # of a run's own figures
MISSING = Cell("")


def size(number: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def worst_layer(layers: Sequence[LayerFigures], sensitivity: bool) -> str:
    """The layer with the largest error, in words as HTML; empty without errors.

    Args:
        layers: The worst first.
        sensitivity: Whether it is known what layers do to the output.
    """
    known = [f for f in layers if f.error is not None and f.snr is not None]
    if not known:
        return ""
    first = known[0]
    middle = statistics.median(f.snr for f in known if f.snr is not None)
    share = 100 * (first.error or 0.0) ** 0.5
    more = "" if sensitivity else " This goes by the weights; lightning-quant sensitivity measures the output."
    return paragraph(
        f"The layer that hurts most: <b>{text(first.name)}</b>. Rounding changes its weight by {share:.3g} % of its "
        f"own size (SNR {first.snr:.1f} dB; half of the {len(known)} layers have {middle:.1f} dB or more).{more}",
        kind="worst",
    )


def most_sensitive(found: Sensitivity) -> str:
    """The group of layers whose rounding the output feels most, in words as HTML."""
    first = max(range(len(found.groups)), key=lambda i: max(found.losses[i]))
    scheme = max(range(len(found.schemes)), key=lambda c: found.losses[first][c])
    return paragraph(
        f"Measured, not guessed from the weights: <b>{text(', '.join(found.groups[first]))}</b> is the most sensitive, "
        f"{found.losses[first][scheme]:.3g} at {text(found.schemes[scheme])} ({text(UNITS[found.measure])}).",
        kind="worst",
    )


def layers_section(layers: Sequence[LayerFigures], exact: bool, picture: Picture) -> str:
    """The table of layers, and their errors as bars."""
    head = ["layer", "error %", "SNR dB", "clipped %", "codes used %", "bits", "bytes", "float bytes", "grid"]
    known = [f for f in layers if f.error is not None]
    parts = ["How well the low-bit weights stand for the float ones they were made of, layer by layer."]
    if any(f.stored is not None for f in layers):
        kind = "the export's tensors" if exact else "densely packed codes and scales"
        parts.append(f"Bytes are those of {kind}.")
    if any(f.logged for f in layers):
        parts.append("Errors are the last ones that the run logged.")
    whole = [paragraph(text(" ".join(parts))), definitions(COLUMNS)]
    if known:
        what = f"Rounding error, the {charts.BARS} worst of {len(known)} layers" if len(known) > charts.BARS else ""
        what = what or "Rounding error of every layer, the worst on top"
        whole.append(picture("errors", what, partial(charts.errors, layers)))
    whole.append(table(head, map(_row, layers), sortable=True))
    return section("layers", "Layers, worst first", *whole)


def _row(f: LayerFigures) -> list[Cell]:
    share = None if f.error is None else 100 * f.error**0.5
    percent = [None if v is None else 100 * v for v in (f.clip, f.used)]
    numbers = [(share, ".3g"), (f.snr, ".1f"), (percent[0], ".3g"), (percent[1], ".4g"), (f.bits, ".3g")]
    cells = [MISSING if v is None else Cell(format(v, form), v) for v, form in numbers]
    cells += [MISSING if n is None else Cell(f"{n:,}", n) for n in (f.stored, f.float_bytes)]
    return [Cell(f.name, f.name), *cells, Cell(f.scheme, f.scheme)]


def histograms_section(layers: Sequence[LayerFigures], picture: Picture) -> str:
    """Weights of the worst layers before and after rounding."""
    worst = [(f.name, f.histogram) for f in layers if f.histogram is not None][:SHOWN]
    if not worst:
        return ""
    why = (
        "Blue: the float weights that training keeps. Orange: the levels they are rounded to, which is what ships. "
        "Each weight is divided by its scale, so that steps are 1 wide; blue beyond the last orange bar is cut off, "
        "and a grid that is much wider than the blue wastes its outer levels."
    )
    caption = f"Weights of the {len(worst)} worst layers, before and after"
    drawn = picture("weights", caption, partial(charts.histograms, worst))
    return section("weights", "Weights on their grid", paragraph(text(why)), drawn)


def sensitivity_section(found: Sensitivity, picture: Picture) -> str:
    """What each layer costs at the output, under each scheme that was tried."""
    why = (
        f"From lightning-quant sensitivity: {UNITS[found.measure]}, one layer at a time, under each scheme. Layers "
        "that a runtime fuses are measured together."
    )
    order = sorted(range(len(found.groups)), key=lambda i: -max(found.losses[i]))
    rows = []
    for i in order:
        name = ", ".join(found.groups[i])
        rows.append([Cell(name, name), *(Cell(f"{x:.3g}", float(x)) for x in found.losses[i])])
    what = "Loss by layer and scheme, the most sensitive on top"
    drawn = picture("sensitivity", what, partial(charts.sensitivity, found))
    whole = [paragraph(text(why)), drawn, table(["layers", *found.schemes], rows, sortable=True)]
    return section("sensitivity", "Sensitivity", *whole)


def training_section(history: History, worst: Sequence[str], picture: Picture) -> str:
    """Losses, schedules, and what was logged of quantizers over the run."""
    parts = [paragraph(f"What the run logged over its optimizer steps, from <code>{text(history.source)}</code>.")]
    own = {name: series for name, series in history.run.items() if len(series) > 1}  # others are the table's
    if own:
        names = sorted(own, key=lambda name: (name != "loss", "loss" not in name, name))
        left = f" ({PANELS} of {len(names)})" if len(names) > PANELS else ""
        shown = {name: own[name] for name in names[:PANELS]}
        parts.append("<h3>Loss and scores</h3>")
        parts.append(picture("run", f"What the run itself logged{left}", partial(charts.curves, shown)))
    if history.quant:
        order = [*METRICS]
        names = sorted(history.quant, key=lambda n: (order.index(m) if (m := _metric(n)) in METRICS else len(order), n))
        shown = {name: history.quant[name] for name in names}
        parts.append("<h3>Schedules and quantizers</h3>")
        parts.append(definitions((n, METRICS[n]) for n in dict.fromkeys(map(_metric, names)) if n in METRICS))
        parts.append(picture("quant", "Schedules and means over the model", partial(charts.curves, shown)))
    metrics = {LAYERS[name]: history.layers[name] for name in LAYERS if name in history.layers}
    if "weight_error" in history.layers:
        metrics[LAYERS["weight_error"]] = charts.to_decibels(history.layers["weight_error"])
    if metrics:
        colored = [name for name in worst if any(name in layers for layers in metrics.values())][:SHOWN]
        parts.append("<h3>Layer by layer</h3>")
        what = "Every layer over the run; in color the worst ones of the table above"
        parts.append(picture("steps", what, partial(charts.layer_curves, metrics, colored)))
    return section("training", "Over the run", *parts)


def _metric(name: str) -> str:
    """A metric's name without the part of the model it is of."""
    return name.rpartition(": ")[2]


def scores_section(scores: Table, picture: Picture) -> str:
    """Evaluation figures of several runs beside each other."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for name, values in scores.items():
        tables.setdefault(tuple(values), []).append(name)
    why = "Evaluation figures that were written down, by run. Only runs that are named here were looked at."
    parts = [paragraph(text(why))]
    for runs, names in tables.items():
        rows = [[Cell(run, run), *(Cell(f"{scores[n][run]:.5g}", scores[n][run]) for n in names)] for run in runs]
        parts.append(table(["run", *names], rows, sortable=True))
    for i, (name, values) in enumerate(scores.items()):
        if len(values) > 1:
            parts.append(picture(f"score{i}", f"{name} by run", partial(charts.scores, values, name)))
    return section("comparison", "Runs compared" if any(len(v) > 1 for v in scores.values()) else "Evaluation", *parts)


def verdict_html(report: VerifyReport | Exception | None) -> tuple[tuple[str, str, str], str]:
    """A card of the verdict, and its text; an error is why there is none."""
    if report is None:
        return ("verify", "not compared", ""), ""
    if isinstance(report, CheckpointError):
        return ("verify: what is stored cannot be read", "DAMAGED", "bad"), block(str(report))
    if isinstance(report, Exception):
        return ("verify", "not compared", ""), block(str(report))
    what = "what is stored is what was trained" if report.ok else "the export differs from what was trained"
    shown = "equal" if report.ok else "DIFFERENT"
    return (f"verify: {what}", shown, "good" if report.ok else "bad"), block(str(report))


__all__ = [
    "cards",
    "histograms_section",
    "layers_section",
    "most_sensitive",
    "scores_section",
    "sensitivity_section",
    "size",
    "training_section",
    "verdict_html",
    "worst_layer",
]
