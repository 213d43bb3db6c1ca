"""Try every scheme on every layer of a float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import float_path
from lightning_quant.attach import attach, detach, quant_layers, quantizers
from lightning_quant.bypass import evaluating
from lightning_quant.calibration import commit_ranges, open_observers
from lightning_quant.errors import explain, unknown
from lightning_quant.fused import fused_layers
from lightning_quant.layers import QuantLayer, is_compact
from lightning_quant.scheme import TensorSpec, parse_scheme
from lightning_quant.sensitivity import measures
from lightning_quant.sensitivity.budgets import Seconds, bit_operations, held_bytes, seconds_of, stored_bits
from lightning_quant.sensitivity.latency import Known, measured
from lightning_quant.sensitivity.result import Sensitivity
from lightning_quant.sensitivity.trace import Trace, traces
from lightning_quant.sensitivity.traffic import samples, watch
from lightning_quant.spec import INHERIT, QuantConfig
from lightning_quant.transforms.pairs import call

SCHEMES = ("w2a16-g32", "w3a16-g32", "w4a16-g32", "w8a16")
MEASURE = "measure"

Loss = Callable[[nn.Module, Any], Tensor]
Run = Callable[[Any], Any]
Layers = dict[str, QuantLayer]


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    schemes: Sequence[str] = SCHEMES,
    measure: str = "kl",
    config: QuantConfig | None = None,
    loss: Loss | None = None,
    latency: Seconds | str | None = None,
    rows: int | None = None,
    probes: int = 4,
) -> Sensitivity:
    """Find out what each layer of a model loses and costs under each scheme.

    Layers that a rule or ``first_last`` of the config gives a scheme of their own keep it, and are not chosen for.

    Args:
        model: In float; it is left as it was.
        batches: Data, each a mapping, tuple, list or tensor as the forward takes it, or with ``loss`` whatever that
            takes.  The first of them is run to count operations, per row of its first tensor.
        schemes: What is tried on every layer.
        measure: One of ``measures.MEASURES``; ``loss`` and ``hessian`` need the loss.
        config: Rules, target and so on; its own scheme is replaced by each of ``schemes``, and its ``setup`` is not
            carried out.
        loss: Runs a model on a batch and returns the scalar loss, such as
            ``lambda model, batch: cross_entropy(model(batch[0]), batch[1])``; None: models return it themselves, as
            those of transformers do where batches hold labels.
        latency: Seconds of each layer under each scheme, ``{path or pattern: {scheme: seconds}}``; ``"measure"``: they
            are timed on the kernels of ``lightning_quant.runtime``.
        rows: Rows of inputs to time layers with (1: as in decoding); None: as many as the batch passes.
        probes: Random vectors per batch and layer for ``hessian``.

    Raises:
        ValueError: Unknown measure or scheme, no batch, no loss where one is needed, nothing to choose for.
    """
    data, config = list(batches), config or QuantConfig("ste")
    _check(data, schemes, measure, loss, latency, probes)

    def run(batch: Any) -> Any:
        return call(model, batch) if loss is None else loss(model, batch)

    losses, bits, bops, seconds = [], [], [], []
    details: dict[str, dict[str, Any]] = {}
    estimates: dict[str, Trace] = {}
    tied: list[set[str]] = []
    known: Known = {}
    with evaluating(model):
        free = _free(model, config, schemes)
        floats = [measures.logits_of(run(b)) if measure in measures.OUTPUTS else None for b in data]
        evaluate = measures.comparison(measure, floats, lambda i: run(data[i]))
        baseline = evaluate() if measure == "loss" else 0.0
        for scheme in schemes:
            with _tried(model, _with_scheme(config, scheme), run, data) as every:
                layers = {path: every[path] for path in free}
                groups = _groups(model, free, config.target)
                traffic = watch(model, lambda: run(data[0]))
                macs = {_name(model, p): n / samples(data[0]) for p, n in traffic.macs.items()}
                tied += [{_name(model, p) for p in paths} for paths in traffic.tied]
                if measure == "hessian":
                    estimates = estimates or traces(layers, lambda b: measures.loss_of(run(b)), data, probes)
                    found = measures.weighted_errors(layers, estimates)
                    losses.append([sum(found[p]["loss"] for p in group) for group in groups])
                    for path, trace in estimates.items():
                        row = details.setdefault(path, {"trace": trace.mean, "spread": trace.error, "error": []})
                        row["error"].append(found[path]["error"])
                elif measure == "sqnr":
                    found = measures.noise_shares(layers, run, data, scheme)
                    losses.append([sum(found[p]["output"] for p in group) for group in groups])
                    for path in free:
                        row = details.setdefault(path, {"weight": [], "input": [], "output": []})
                        for name, column in row.items():
                            column.append(measures.decibels(found[path][name]))
                else:
                    what = f"{scheme}, layer by layer"
                    losses.append(measures.one_at_a_time(layers, groups, evaluate, baseline, what))
                bits.append({p: stored_bits(layer) for p, layer in layers.items()})
                bops.append({p: bit_operations(macs.get(p, 0.0), layer) for p, layer in layers.items()})
                if latency == MEASURE:
                    passed = {_name(model, p): rows or n for p, n in traffic.rows.items()}
                    seconds.append(measured(layers, passed, known, f"{scheme}, timing layers"))
                numbers = {p: layer.weight.numel() for p, layer in layers.items()}
                fixed = {p: layer for p, layer in every.items() if p not in layers}
                rest = {
                    "bytes": held_bytes(model, every.values()) + sum(map(stored_bits, fixed.values())) / 8,
                    "bops": sum(bit_operations(n, fixed.get(p)) for p, n in macs.items() if p not in layers),
                }
    if isinstance(latency, Mapping):
        by_path = {path: seconds_of(latency, path, schemes) for path in free}
        seconds = [{path: row[c] for path, row in by_path.items()} for c in range(len(schemes))]
    places = {path: i for i, group in enumerate(groups) for path in group}
    together = {tuple(sorted({places[p] for p in paths if p in places})) for paths in tied}

    def table(columns: list[dict[str, float]]) -> list[list[float]]:
        return [[sum(column[p] for p in group) for column in columns] for group in groups]

    return Sensitivity(
        schemes=tuple(schemes),
        groups=groups,
        losses=[list(row) for row in zip(*losses, strict=True)],
        bits=table(bits),
        bops=table(bops),
        seconds=table(seconds) if seconds else None,
        numbers=[sum(numbers[p] for p in group) for group in groups],
        ties=[list(tie) for tie in sorted(together) if len(tie) > 1],
        rest=rest,
        baseline=baseline,
        measure=measure,
        patterns=_patterns(model, free),
        activations=_given_inputs(config, free),
        details=details,
    )


def _check(data: list[Any], schemes: Sequence[str], measure: str, loss: Any, latency: Any, probes: int) -> None:
    if measure not in measures.MEASURES:
        raise ValueError(unknown("measure", measure, measures.MEASURES, "sensitivity"))
    if not data or not schemes:
        got = f"{len(data)} batches, {len(schemes)} schemes"
        raise ValueError(explain("sensitivity", "a batch and a scheme at least", got, "Pass representative inputs."))
    if loss is not None and measure in measures.OUTPUTS:
        cure = "Leave loss= out, or use measure='loss', 'hessian' or 'sqnr'."
        raise ValueError(explain(f"measure {measure!r}", "the model's outputs", "loss=, which hides them", cure))
    if isinstance(latency, str) and latency != MEASURE:
        cure = "Read a file with read_seconds(path)."
        raise ValueError(explain("latency", f"{MEASURE!r} or a table of seconds", repr(latency), cure))
    if probes < 2:
        raise ValueError(explain("probes", "2 or more", probes, "Use for example 4."))
    for scheme in schemes:
        if parse_scheme(scheme)[0] is None:
            cure = "Leave layers in float by a rule: LayerRule(match, weight=None)."
            raise ValueError(explain("schemes", "schemes with weights below 16 bits", repr(scheme), cure))


@contextmanager
def _tried(model: nn.Module, config: QuantConfig, run: Run, data: list[Any]) -> Iterator[Layers]:
    """While open, the model has calibrated quantizers that are switched off; its layers by name."""
    attach(model, config)
    try:
        if any(not q.ready for _, q in quantizers(model)):
            open_observers(model, True)
            for batch in data:
                run(batch)
                commit_ranges(model)
            open_observers(model, False)
        for _, q in quantizers(model):
            q.enabled = False
        yield _named(model)
    finally:
        detach(model, fold=False)


def _free(model: nn.Module, config: QuantConfig, schemes: Sequence[str]) -> list[str]:
    """Layers whose weights follow the config's scheme, in order; every scheme is seen to be possible."""
    for path, module in model.named_modules():
        if is_compact(module):
            cure = "Load the model in float."
            raise ValueError(explain(path, "a weight in float", "one that is stored in a few bits", cure))
    specs: list[dict[str, Any]] = []
    for scheme in schemes:
        attach(model, _with_scheme(config, scheme), fit=False)
        specs.append(
            {
                p: (layer.weight_quant.spec, layer.input_quant and layer.input_quant.spec)
                for p, layer in _named(model).items()
            }
        )
        detach(model, fold=False)
    own = {path: next((r for r in config.rules if r.matches(path)), None) for path in specs[0]}
    named = {path for path, rule in own.items() if rule is not None and isinstance(rule.weight, TensorSpec)}
    alike = {path for path in specs[0] if len(set(schemes)) > 1 and all(s[path] == specs[0][path] for s in specs)}
    free = [path for path in specs[0] if path not in named | alike]
    if not free:
        cure = "Loosen the rules, or try schemes that differ."
        raise ValueError(explain("sensitivity", "a layer whose scheme is open", "none", cure))
    return free


def _with_scheme(config: QuantConfig, scheme: str) -> QuantConfig:
    weight, activation = parse_scheme(scheme)
    specs = {"weight": weight and asdict(weight), "activation": activation and asdict(activation)}
    return QuantConfig.from_dict({**config.to_dict(), **specs})


def _named(model: nn.Module) -> Layers:
    """Quantized layers by the path that rules match."""
    return {_name(model, path): layer for path, layer in quant_layers(model)}


def _name(model: nn.Module, path: str) -> str:
    module = model.get_submodule(path)
    own = module.weight_name(path).removesuffix(".weight") if isinstance(module, QuantLayer) and path else path
    return float_path(own)


def _groups(model: nn.Module, paths: Sequence[str], target: str) -> list[tuple[str, ...]]:
    """Layers that the runtime fuses together, the others one by one."""
    fused = [tuple(n for p in group if (n := _name(model, p)) in paths) for group in fused_layers(model, target)]
    of = {path: group for group in fused for path in group}
    return list(dict.fromkeys(of.get(path, (path,)) for path in paths))


def _patterns(model: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """What rules match each layer by: with ``*.`` before it, so that it is found inside of a LightningModule too.

    Not where this would match another module as well, or a number alone.
    """
    every = [float_path(path) for path, _ in model.named_modules()]

    def pattern(path: str) -> str:
        alone = not any(other.endswith(f".{path}") for other in every)
        return f"*.{path}" if alone and not path.replace(".", "").isdigit() else path

    return {path: pattern(path) if path else "*" for path in paths}


def _given_inputs(config: QuantConfig, paths: Sequence[str]) -> dict[str, TensorSpec | None]:
    """Inputs that a rule of the config speaks of."""
    own = {path: next((r for r in config.rules if r.matches(path)), None) for path in paths}
    return {p: r.activation for p, r in own.items() if r is not None and r.activation != INHERIT}  # type: ignore[misc]
