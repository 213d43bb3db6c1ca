"""Put quantizers into a model and take them out again, changing classes in place.

Parameters keep their identity and their names; a float checkpoint keeps its keys.
"""

from __future__ import annotations

import fnmatch
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lightning_quant.errors import AttachError, CoverageError, explain
from lightning_quant.estimators import Estimator, build_estimator
from lightning_quant.granularity import Granularity
from lightning_quant.layers import QuantEmbedding, QuantLayer, float_class, is_convolution, layer_class
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.spec import INHERIT, LayerRule, QuantConfig, TensorSpec


@dataclass(frozen=True)
class Entry:
    """One line of a report.

    Attributes:
        path: Module path.
        what: Grid in words for attached layers, reason for the others.
        share: Share of the model's weights, in [0, 1].
    """

    path: str
    what: str
    share: float


@dataclass
class Report:
    """What ``attach`` did: attached layers, layers left out on purpose, weights nothing here can reach."""

    attached: list[Entry] = field(default_factory=list)
    excluded: list[Entry] = field(default_factory=list)
    unsupported: list[Entry] = field(default_factory=list)

    @property
    def coverage(self) -> float:
        """Share of the model's weights that are quantized."""
        return sum(e.share for e in self.attached)

    def __str__(self) -> str:
        """A table; layers that differ only in their number share a line."""
        lines = [f"{self.coverage:6.1%} of the weights in {len(self.attached)} quantized layers"]
        for title, entries in (
            ("quantized", self.attached),
            ("left in float", self.excluded),
            ("NOT REACHED", self.unsupported),
        ):
            merged: dict[tuple[str, str], list[float]] = {}
            for e in entries:
                pattern = ".".join("*" if part.isdigit() else part for part in e.path.split("."))
                merged.setdefault((pattern, e.what), []).append(e.share)
            for (pattern, what), shares in merged.items():
                lines.append(f"{sum(shares):6.1%}  {title:<13}  {len(shares):>4} x {pattern}: {what}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Plan:
    path: str
    module: nn.Module
    kind: type[QuantLayer]
    weight: TensorSpec
    activation: TensorSpec | None
    rows: tuple[int, int]
    scales: tuple[int, ...]

    @property
    def granularity(self) -> Granularity:
        return Granularity(self.weight.granularity, self.kind.output_axis, self.weight.group_size or 0)


def attach(model: nn.Module, config: QuantConfig) -> Report:
    """Turn the model's supported layers into quantized ones, in place.

    Everything is checked before anything is changed.  Weight ranges are read off the weights as they are
    now, so load them first.

    Args:
        model: Any module; not yet wrapped, dispatched or compiled.
        config: What to quantize and how.

    Returns:
        What was attached, what was left out and why, with shares of the weights.

    Raises:
        AttachError: Nothing to quantize, an unused rule, a group size that does not divide, a patched
            forward, weights without values, or quantizers already in place.
        ValueError: Unknown method, option or observer.
    """
    estimator = build_estimator(config.method, dict(config.options))
    if is_attached(model):
        raise AttachError(
            explain(type(model).__name__, "a float model", "one with quantizers", "Call detach(model) first.")
        )
    plans, report = _plan(model, config, estimator)
    weights, inputs = estimator.role(True), estimator.role(False)
    weights = weights.fit({p.path: p.rows for p in plans}, {p.path: p.scales for p in plans})
    quantizers = [_quantizers(p, config, weights, inputs) for p in plans]
    for plan, (weight, activation) in track(list(zip(plans, quantizers, strict=True)), "fitting weight ranges"):
        weight.fit_range(plan.module.weight)  # type: ignore[arg-type]
        plan.module.__class__ = plan.kind
        plan.module.add_module("weight_quant", weight)
        plan.module.add_module("input_quant", activation)
        plan.module.train(plan.module.training)
    return report


def _plan(model: nn.Module, config: QuantConfig, estimator: Estimator) -> tuple[list[_Plan], Report]:
    modules = dict(model.named_modules())
    total = max(sum(p.numel() for p in model.parameters()), 1)
    heads = {id(h) for m in modules.values() if (h := _head(m)) is not None}
    convolutional = any(is_convolution(type(m)) for m in modules.values())
    used: set[int] = set()
    plans: list[_Plan] = []
    report = Report()
    covered: set[int] = set()

    for path, module in modules.items():
        kind = layer_class(type(module))
        if kind is None or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        weight = module.weight
        share = 0.0 if id(weight) in covered else weight.numel() / total
        rule = _rule(config.rules, path, used)
        weight_spec = config.weight if rule is None or rule.weight == INHERIT else rule.weight
        input_spec = config.activation if rule is None or rule.activation == INHERIT else rule.activation
        named = rule is not None and rule.weight not in (INHERIT, None)
        reason = None
        if weight_spec is None:
            reason = "by a rule" if rule is not None and rule.weight is None else "float weights in the scheme"
        elif kind is QuantEmbedding and not (config.embeddings or named):
            reason = "embedding (embeddings=True quantizes it)"
        elif id(module) in heads and not (config.head or named):
            reason = "output head (head=True quantizes it)"
        covered.add(id(weight))
        if reason is not None:
            report.excluded.append(Entry(path, reason, share))
            continue
        assert isinstance(weight_spec, TensorSpec)
        assert not isinstance(input_spec, str)
        _check_module(path, module, weight)
        spec = resolve_weight(weight_spec, convolutional, estimator.role(True), f"{path}.weight")
        twin = next((p for p in plans if p.module.weight is weight), None)
        if twin is not None and not (spec.dynamic and spec == twin.weight):
            raise AttachError(
                explain(
                    path,
                    "a weight that one quantized layer owns (or scales that follow the weight: w8)",
                    f"the same parameter as {twin.path}, which is quantized too",
                    f'Leave one in float: LayerRule(match="{path}", weight=None).',
                )
            )
        activation = None
        if input_spec is not None and kind is not QuantEmbedding:
            activation = resolve_activation(input_spec, convolutional, estimator.role(False), f"{path}.input")
            if activation.granularity == "group":
                Granularity("group", None, activation.group_size or 0).check_row(weight.shape[-1], path)
        granularity = Granularity(spec.granularity, kind.output_axis, spec.group_size or 0)
        scales = granularity.scale_shape(weight.shape, path)
        plans.append(_Plan(path, module, kind, spec, activation, granularity.rows(weight.shape), scales))
        report.attached.append(Entry(path, _words(spec, activation), share))

    _check_rules(config.rules, used, list(modules))
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim >= 2 and id(p) not in covered:
                covered.add(id(p))
                where = f"{path}.{name}" if path else name
                reason = f"{type(module).__name__} is not a layer we can reach"
                report.unsupported.append(Entry(where, reason, p.numel() / total))
    if not plans:
        raise AttachError(
            explain(
                type(model).__name__,
                "at least one layer to quantize (Linear, Conv, ConvTranspose, Embedding, Conv1D; exact classes)",
                "none" + (f" ({len(report.excluded)} left out)" if report.excluded else ""),
                "Loosen the rules, or pass the inner model that holds the layers:\n" + str(report),
            )
        )
    return plans, report


def _head(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        head = getter()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _rule(rules: tuple[LayerRule, ...], path: str, used: set[int]) -> LayerRule | None:
    matching = [i for i, rule in enumerate(rules) if rule.matches(path)]
    used.update(matching)
    return rules[matching[0]] if matching else None


def _check_rules(rules: tuple[LayerRule, ...], used: set[int], paths: list[str]) -> None:
    for i, rule in enumerate(rules):
        if i not in used:
            near = [p for p in paths if p and fnmatch.fnmatchcase(p, f"*{rule.match.strip('*.').split('.')[-1]}*")]
            hint = f"Paths that come near: {', '.join(near[:5])}." if near else f"Paths look like {paths[-1]!r}."
            raise AttachError(
                explain(
                    f"rules[{i}]", "a pattern that matches a layer", f"match={rule.match!r}, which matches none", hint
                )
            )


def _check_module(path: str, module: nn.Module, weight: Tensor) -> None:
    if "forward" in module.__dict__:
        raise AttachError(
            explain(
                path,
                "a module with its class's own forward",
                "a forward patched on the instance (accelerate's hooks do that)",
                "Attach before dispatch_model / prepare, or call accelerate.hooks.remove_hook_from_submodules(model).",
            )
        )
    if weight.is_meta:
        raise AttachError(explain(path, "a weight with values", "a meta tensor", "Load the weights, then attach."))
    if getattr(module, "sparse", False):
        raise AttachError(
            explain(path, "an embedding with dense gradients", "sparse=True", "Build it with sparse=False.")
        )
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        raise AttachError(
            explain(
                path,
                "a plain floating-point weight",
                f"{type(weight.data).__name__} of {weight.dtype}",
                "Attach before sharding, and to a model that is not stored quantized.",
            )
        )


def _quantizers(
    plan: _Plan, config: QuantConfig, weights: Estimator, inputs: Estimator
) -> tuple[FakeQuantizer, FakeQuantizer | None]:
    weight: Tensor = plan.module.weight  # type: ignore[assignment]
    build = partial(FakeQuantizer, target=config.target, dtype=weight.dtype, device=weight.device)
    salt = zlib.crc32(plan.path.encode()) ^ config.seed
    where = f"{plan.path}.weight"
    own = build(plan.weight, plan.granularity, weights, shape=tuple(weight.shape), salt=salt, where=where)
    if plan.activation is None:
        return own, None
    of_inputs = build(
        plan.activation,
        Granularity(plan.activation.granularity, None, plan.activation.group_size or 0),
        inputs,
        channels=getattr(plan.module, plan.kind.input_channels),
        channel_axis=plan.kind.channel_axis,
        salt=~salt,
        where=f"{plan.path}.input",
    )
    if of_inputs.observer.data_free and not of_inputs.spec.dynamic:
        of_inputs.fit_range(torch.empty(1, 0))
    return own, of_inputs


def _words(weight: TensorSpec, activation: TensorSpec | None) -> str:
    def one(letter: str, spec: TensorSpec) -> str:
        size = str(spec.group_size) if spec.group_size else ""
        kind = "dynamic" if spec.dynamic else "learned" if spec.learn_scale else "fixed"
        more = "" if spec.symmetric else " asymmetric"
        for value, usual in ((spec.grid, "int"), (spec.range, "scale"), (spec.scale_format, "float")):
            more += "" if value == usual else f" {value}"
        return f"{letter}{spec.bits:g} {spec.granularity}{size} {kind}{more}"

    return one("w", weight) + (", " + one("a", activation) if activation else "")


def detach(model: nn.Module, fold: bool = True) -> nn.Module:
    """Restore the float classes and drop the quantizers; the keys are those the model was born with.

    Args:
        model: A model with quantizers.
        fold: Leave the weights on their grid (what evaluation computed) instead of the latent ones.
            Activations are float afterwards either way.

    Returns:
        The same model.
    """
    for _, layer in quant_layers(model):
        if fold:
            with torch.no_grad():
                layer.weight.copy_(layer.weight_quant.on_grid(layer.weight))
        layer.__class__ = float_class(layer)  # type: ignore[assignment]
        del layer.weight_quant
        if "input_quant" in layer._modules:
            del layer.input_quant
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether the model holds quantizers."""
    return any(True for _ in quant_layers(model))


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """The quantized layers with their paths, each once."""
    for path, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield path, module


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    """All quantizers with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            yield path, module


def check_coverage(model: nn.Module, mode: str, phase: str) -> None:
    """Complain about quantizers that the last batch did not reach, then forget who was called.

    Args:
        model: A model with quantizers.
        mode: ``error``, ``warn`` or ``off``.
        phase: What the batch was for, for the message.

    Raises:
        CoverageError: Some were never called and ``mode`` is ``error``.
    """
    missed = []
    for path, q in quantizers(model):
        if not q.called:
            missed.append(path)
        q.called = False
    if not missed or mode == "off":
        return
    message = explain(
        missed[0],
        f"every quantizer to be called by a {phase} batch",
        f"{len(missed)} never called ({', '.join(missed[:4])}{', ...' if len(missed) > 4 else ''})",
        "Usual causes: nn.MultiheadAttention or TransformerEncoderLayer's fast path read weights themselves, "
        "accelerate hooks kept an old forward, experts that got no token, or an unused layer. "
        'Exclude them with LayerRule(match=..., weight=None), or set coverage="warn".',
    )
    if mode == "error":
        raise CoverageError(message)
    warnings.warn(message, stacklevel=2)


def without_quantizers(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (keys of the float model, quantizers' keys)."""
    prefixes = tuple(f"{path}." for path, _ in quantizers(model))
    mine = {k: v for k, v in state.items() if k.startswith(prefixes)} if prefixes else {}
    return {k: v for k, v in state.items() if k not in mine}, mine
