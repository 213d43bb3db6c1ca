"""Collect what is known of a run, and write the page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_quant.checkpoint import CONFIG_FILE, load_quant_config, load_training_checkpoint
from lightning_quant.errors import explain
from lightning_quant.export.streamed import open_training_directory
from lightning_quant.export.verdict import VerifyReport
from lightning_quant.export.verify import verify
from lightning_quant.plan import words
from lightning_quant.report_page import html, sections
from lightning_quant.report_page.evaluation import Table, compared, directory_scores, logged_scores
from lightning_quant.report_page.find import Sources, find_sources
from lightning_quant.report_page.history import History, read_history
from lightning_quant.report_page.layers import LayerFigures, Measured, exported_layers, measure_model, with_logged
from lightning_quant.report_page.loading import card_facts, format_name, loading_html
from lightning_quant.report_page.sensitivity_file import read_sensitivity
from lightning_quant.report_page.sizes import weight_bytes
from lightning_quant.report_page.svg import picture
from lightning_quant.version import __version__


@dataclass(frozen=True)
class PageReport:
    """What was written.

    Attributes:
        path: The page.
        sections: Names of its sections.
        worst: The layer with the largest error of its weight; None where no errors are known.
        layers: Figures of the layers, the worst first.
        verdict: What ``verify`` says; an error where it could not compare, None where there was nothing to compare.
    """

    path: Path
    sections: list[str]
    worst: str | None
    layers: list[LayerFigures]
    verdict: VerifyReport | Exception | None

    def __str__(self) -> str:
        """A line or two."""
        worst = "" if self.worst is None else f"\nthe layer that hurts most: {html.clean(self.worst)}"
        return f"{self.path}: {', '.join(self.sections)}; {len(self.layers)} layers{worst}"


def write_page(
    directories: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    model: nn.Module | None = None,
    compare: Sequence[tuple[str, str | Path]] = (),
    sensitivity: str | Path | None = None,
    logits: bool = False,
    plots: bool = True,
) -> PageReport:
    """Write one HTML page that needs nothing else: about a run, its export, or both.

    Of a training directory one weight is in memory at a time.

    Args:
        directories: A training directory, a log directory of Lightning, an export, or several of one run.
        out: The page, written whole or not at all.
        model: The trained model with its quantizers, where no directory can give it: a LightningModule.
        compare: Names and directories (or JSON files) of runs whose evaluation figures go beside this one's.
        sensitivity: Figures that ``lightning-quant sensitivity --json`` wrote.
        logits: Let ``verify`` run both models as well, which needs the memory for them.
        plots: Draw; without, matplotlib is not needed.

    Raises:
        CheckpointError: A directory that is neither a run's nor an export, or a damaged file.
        ImportError: There is no matplotlib, with its cure.
    """
    names = [directories] if isinstance(directories, (str, Path)) else list(directories)
    sources = find_sources([Path(name) for name in names])
    history = None if sources.logs is None else read_history(sources.logs)
    figures = sources.sensitivity if sensitivity is None else Path(sensitivity)
    found = None if figures is None else read_sensitivity(figures)
    scores = _scores([Path(name) for name in names], history, compare)
    measured = _measured(sources, model)
    layers = [] if measured is None else measured.layers
    if measured is None and sources.export is not None:
        layers = exported_layers(sources.export)
    layers = with_logged(layers, history)
    verdict = _verdict(sources, model, logits)
    draw = picture if plots else (lambda name, caption, draw: "")

    made: list[tuple[str, str, str]] = []
    if layers:
        exact = sources.export is not None if measured is None else measured.exact
        made.append(("layers", "Layers", sections.layers_section(layers, exact, draw)))
    if plots and (weights := sections.histograms_section(layers, draw)):
        made.append(("weights", "Weights", weights))
    if found is not None:
        made.append(("sensitivity", "Sensitivity", sections.sensitivity_section(found, draw)))
    if history is not None:
        worst = [f.name for f in layers if f.error is not None]
        made.append(("training", "Over the run", sections.training_section(history, worst, draw)))
    if scores:
        made.append(("comparison", "Comparison", sections.scores_section(scores, draw)))
    if sources.export is not None and (loading := loading_html(sources.export)):
        made.append(("loading", "Loading", html.section("loading", "How to load it", loading)))
    known = [f.name for f in layers if f.error is not None]
    head = _head(sources, measured, layers, verdict)
    head += sections.worst_layer(layers, found is not None) + ("" if found is None else sections.most_sensitive(found))
    shown = html.page(f"Quantization report: {Path(names[0]).resolve().name}", head, made)
    path = _write(Path(out), shown)
    return PageReport(path, [name for name, _, _ in made], known[0] if known else None, layers, verdict)


def _measured(sources: Sources, model: nn.Module | None) -> Measured | None:
    if model is None and sources.training is not None:
        model = open_training_directory(sources.training)
        model = load_training_checkpoint(sources.training) if model is None else model
    return None if model is None else measure_model(model, sources.export)


def _verdict(sources: Sources, model: nn.Module | None, logits: bool) -> VerifyReport | Exception | None:
    trained = sources.training if model is None else model
    if sources.export is None or trained is None:
        return None
    runs = logits or format_name(sources.export) == "onnx"  # which is compared in a run only
    try:
        return verify(sources.export, trained, logits=runs)
    except (ValueError, OSError, ImportError) as error:  # a damaged export is a verdict, too
        return error


def _scores(directories: Sequence[Path], history: History | None, compare: Sequence[tuple[str, str | Path]]) -> Table:
    table = compared((name, Path(path)) for name, path in compare)
    for directory in directories:
        for figure, value in directory_scores(directory).items():
            table.setdefault(figure, {}).setdefault(directory.resolve().name, value)
    if history is not None and not table:
        name = directories[0].resolve().name
        table = {figure: {name: value} for figure, value in logged_scores(history).items()}
    return table


def _head(
    sources: Sources,
    measured: Measured | None,
    layers: Sequence[LayerFigures],
    verdict: VerifyReport | Exception | None,
) -> str:
    """The figures that come first."""
    facts = {} if sources.export is None else card_facts(sources.export)
    schemes = Counter(f.scheme for f in layers if f.scheme and f.error is not None)
    scheme = schemes.most_common(1)[0][0] if schemes else facts.get("scheme", "")
    method = facts.get("method", "")
    place = next((d for d in (sources.training, sources.export) if d is not None and (d / CONFIG_FILE).is_file()), None)
    if place is not None and not (scheme and method):
        config = load_quant_config(place)
        method = method or (config.method if isinstance(config.method, str) else type(config.method).__name__.lower())
        if not scheme and config.weight is not None:
            scheme = words(config.weight, config.activation)
    boxes = [("scheme", scheme, ""), ("method", method, "")]
    after = None if sources.export is None else weight_bytes(sources.export)
    if measured is not None:
        smaller = measured.after if after is None else after
        what = "size of all weights" if after is not None else "size of all weights, densely packed"
        boxes.append((what, f"{sections.size(measured.before)} → {sections.size(smaller)}", ""))
        boxes.append(("times smaller", f"{measured.before / max(smaller, 1):.2f}", ""))
    elif after is not None:
        boxes.append(("size of all weights", sections.size(after), ""))
    if sources.export is not None:
        boxes.append(("format", format_name(sources.export), ""))
    more = ""
    if sources.export is not None:
        box, more = sections.verdict_html(verdict)
        boxes.append(box)
        if verdict is None:
            more = html.paragraph(
                "Name the training directory as well, and the export is compared with it.", kind="quiet"
            )
    parts = [(label, path) for label, path in vars(sources).items() if path is not None]
    made_of = "; ".join(f"{html.text(label)} <code>{html.text(path)}</code>" for label, path in parts)
    made_of = html.paragraph(f"Made by lightning-quant {__version__} from {made_of}.", kind="quiet")
    return made_of + html.cards([box for box in boxes if box[1]]) + more


def _write(path: Path, page: str) -> Path:
    if path.is_dir():
        cure = "Name a file, such as report.html."
        raise ValueError(explain("report --out", "a file", f"the directory {path}", cure))
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
