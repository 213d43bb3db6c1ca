"""Decides, before anything is changed, what becomes of every layer, normalization and operator of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_quant import zero
from lightning_quant.adapters import beside, float_path, lora_layers, other_bases
from lightning_quant.bn_ranges import PROMISED, with_promised_ranges
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import Estimator, overrides
from lightning_quant.experts import expert_weights
from lightning_quant.granularity import Granularity
from lightning_quant.graph import Flow, flow, followers, outermost
from lightning_quant.kv_cache import plan_kv_cache
from lightning_quant.layers import (
    BNB,
    QuantEmbedding,
    QuantLayer,
    dense_weight,
    float_dtype,
    is_compact,
    is_convolution,
    layer_class,
)
from lightning_quant.norms import FOLDED
from lightning_quant.operators import plan_operators
from lightning_quant.report import Entry, Report
from lightning_quant.resolve import for_target, resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec, parse_scheme
from lightning_quant.spec import INHERIT, LayerRule, QuantConfig
from lightning_quant.targets import TARGETS, Target


@dataclass(frozen=True)
class LayerPlan:
    """One layer to be.

    Attributes:
        path: Its place in the model.
        module: Itself, in float.
        kind: Its class to be.
        weight: Resolved spec of the weight.
        activation: Resolved spec of its input, or None.
        shape: The weight's shape.
        dtype: Dtype that the weight has for the model, which bitsandbytes' layers take from it.
        device: Where it is.
        rows: The weight's output channels and the elements of each.
        scales: Shape of the weight's scales.
        ends: Of the range of its inputs, where a batch normalization promises one, real.
    """

    path: str
    module: nn.Module
    kind: type[QuantLayer]
    weight: TensorSpec
    activation: TensorSpec | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: tuple[int, int]
    scales: tuple[int, ...]
    ends: tuple[float, float] | None = None

    @property
    def granularity(self) -> Granularity:
        """Which of the weight's elements share a scale."""
        return _granularity(self.weight, self.kind)


@dataclass
class Plan:
    """What ``attach`` will do.

    Attributes:
        layers: Layers to be quantized.
        norms: Path of a layer -> path of the normalization to fold into it.
        operators: Path of a module -> names of the quantizers of what it adds, joins or averages.
        attention: Paths of modules whose keys and values are quantized.
        report: The same in words.
    """

    layers: list[LayerPlan] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    operators: dict[str, list[str]] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class _Candidate:
    path: str
    module: nn.Module
    kind: type[QuantLayer]
    weight: TensorSpec
    activation: TensorSpec | None
    share: float
    by_rule: bool


def make_plan(model: nn.Module, config: QuantConfig, estimator: Estimator, values: bool = True) -> Plan:
    """Choose layers, resolve their specs, pair normalizations, find operators; changes nothing.

    Args:
        model: Any module.
        config: What to quantize and how.
        estimator: The method.
        values: Whether weights must have values.

    Raises:
        AttachError: Nothing to quantize, an unused rule, a layer that cannot be quantized as asked, with ``strict``
            a weight nothing reaches, a normalization or an operator that cannot be found.
        ValueError: A combination of settings that makes no sense.
    """
    plan = Plan()
    convolutional = any(is_convolution(type(m)) for m in model.modules())
    candidates = _candidates(model, config, plan.report, values)
    promised = any(PROMISED in (c.weight.observer, c.activation and c.activation.observer) for c in candidates)
    looked_at = config.batch_norm != "keep" or config.first_last != INHERIT or promised
    traced = flow(model) if looked_at else Flow()
    if config.first_last != INHERIT:
        candidates = _outermost(candidates, config.first_last, traced, plan.report)
    for candidate in candidates:
        candidate = _constrained(candidate, TARGETS[config.target])
        plan.layers.append(_resolve(candidate, plan.layers, estimator, convolutional, float_dtype(model)))
    if promised:
        plan.layers = with_promised_ranges(model, plan.layers, traced)
    _check_adapters(model, plan, estimator)
    if not plan.layers:
        raise AttachError(
            explain(
                type(model).__name__,
                "at least one layer to quantize (Linear, Conv, ConvTranspose, Embedding, Conv1D; exact classes)",
                "none" + (f" ({len(plan.report.excluded)} left out)" if plan.report.excluded else ""),
                "Loosen the rules, or pass the inner model that holds the layers:\n" + str(plan.report),
            )
        )
    if config.batch_norm != "keep":
        plan.norms = _norms(model, plan, traced, estimator)
    if config.operators is not None and config.activation is not None:
        plan.operators, failures = plan_operators(model)
        for path, why in failures.items():
            reason = f"torch.fx cannot trace its forward ({why}): what it adds, joins and averages stays in float"
            plan.report.unsupported.append(Entry(path or type(model).__name__, reason, 0.0))
    if config.kv_cache is not None:
        plan.attention = plan_kv_cache(model)
    for candidate, layer in zip(candidates, plan.layers, strict=True):
        what = words(layer.weight, layer.activation)
        what += ", batch norm folded in" if layer.path in plan.norms else ""
        if candidate.activation is not None and candidate.activation.observer == PROMISED:
            what += f", input range from {'batch normalization' if layer.ends else 'data'}"
        what += ", inputs in float" if layer.kind.stacked and candidate.activation is not None else ""
        plan.report.attached.append(Entry(layer.path, what, candidate.share))
    for path, names in plan.operators.items():
        what = f"a{config.operators} operands" if names != ["input_quant"] else f"a{config.operators} input"
        plan.report.attached.append(Entry(path or type(model).__name__, what, 0.0))
    plan.report.attached += [Entry(path, f"{config.kv_cache} keys and values", 0.0) for path in plan.attention]
    if config.strict and plan.report.unsupported:
        share = sum(e.share for e in plan.report.unsupported)
        named = ", ".join(f"{e.path} ({e.share:.1%})" for e in plan.report.unsupported[:8])
        cure = "Replace what holds them by layers of their own, or set strict=False and leave them in float."
        raise AttachError(
            explain(
                type(model).__name__,
                "weights and operators that can all be reached",
                f"{named}: {share:.1%} of the weights in modules that are not",
                cure,
            )
        )
    return plan


def _candidates(model: nn.Module, config: QuantConfig, report: Report, values: bool) -> list[_Candidate]:
    """Layers to be quantized, with their own specs; all others go into the report."""
    aside, wrapped = beside(model), other_bases(model)
    modules = {path: m for path, m in model.named_modules() if id(m) not in aside}
    total = max(_numbers(modules), 1)
    heads = {id(part) for m in modules.values() if (h := _head(m)) is not None for part in h.modules()}
    used: set[int] = set()
    covered: set[int] = set()
    found: list[_Candidate] = []
    for path, layer, module in _layers(modules):
        kind = type(layer) if isinstance(layer, QuantLayer) else layer_class(type(layer))
        weight = dense_weight(layer, path) if kind is not None and id(layer) not in wrapped else None
        if kind is None or weight is None:
            continue
        owner = id(weight) if isinstance(weight, nn.Parameter) else id(layer)  # a compact weight is made anew
        share = 0.0 if owner in covered else zero.numel(weight) / total
        rule = _rule(config.rules, float_path(path), used)
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
        covered.add(owner)
        if reason is not None:
            report.excluded.append(Entry(path, reason, share))
            continue
        assert isinstance(weight_spec, TensorSpec)
        assert not isinstance(input_spec, str)
        _check_module(path, module, weight, values)
        found.append(_Candidate(path, layer, kind, weight_spec, input_spec, share, named))
    _check_rules(config.rules, used, [float_path(path) for path in modules])
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            if len(zero.shape(p)) >= 2 and not covered & {id(p), id(module)}:
                covered.add(id(p))
                where = f"{path}.{name}" if path else name
                reason = f"{type(module).__name__} is not a layer we can reach"
                if id(module) in wrapped:
                    reason = "what its adapter adds lies outside of its weight (LoRA of Linear and Conv1D is served)"
                size = module.out_features * module.in_features if is_compact(module) else zero.numel(p)
                report.unsupported.append(Entry(where, reason, size / total))  # type: ignore[operator]
    return found


def _layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """What may be a layer: its path, itself and the module that holds its weight."""
    for path, module in modules.items():
        yield path, module, module
        for part in expert_weights(module):
            yield f"{path}.{part.name}".lstrip("."), part, module


def _numbers(modules: Mapping[str, nn.Module]) -> int:
    """How many numbers the model's own parameters and compact weights hold."""
    compact = [m for m in modules.values() if is_compact(m)]
    stored = {id(m._parameters.get("weight")) for m in compact}
    own = {id(p): zero.numel(p) for m in modules.values() for p in m.parameters(recurse=False) if id(p) not in stored}
    return sum(own.values()) + sum(m.out_features * m.in_features for m in compact)  # type: ignore[operator, misc]


def _outermost(candidates: list[_Candidate], scheme: str | None, traced: Flow, report: Report) -> list[_Candidate]:
    """The candidates with those at the model's input and output on their own scheme (rules go before it).

    Where the model does not trace in one part, first and last are those of its definition.
    """
    layers = [c.path for c in candidates if c.kind is not QuantEmbedding]
    ends = outermost(traced, set(layers)) or (set(layers[:1]), set(layers[-1:]))
    weight, activation = parse_scheme(scheme) if scheme is not None else (None, None)
    chosen = []
    for candidate in candidates:
        if candidate.by_rule or candidate.path not in ends[0] | ends[1]:
            chosen.append(candidate)
        elif weight is None:
            report.excluded.append(Entry(candidate.path, "first or last layer", candidate.share))
        else:
            chosen.append(replace(candidate, weight=weight, activation=activation))
    return chosen


def _constrained(candidate: _Candidate, target: Target) -> _Candidate:
    """The candidate with what its runtime asks of its specs."""
    weight = for_target(candidate.weight, target, True, f"{candidate.path}.weight")
    activation = candidate.activation
    if activation is not None:
        activation = for_target(activation, target, False, f"{candidate.path}.input")
    return replace(candidate, weight=weight, activation=activation)


def _resolve(
    candidate: _Candidate, before: list[LayerPlan], estimator: Estimator, convolutional: bool, stream: torch.dtype
) -> LayerPlan:
    """Fill the specs in and check that the layer can have them."""
    path, module, kind = candidate.path, candidate.module, candidate.kind
    weight: Tensor = dense_weight(module)  # type: ignore[assignment]
    spec = resolve_weight(candidate.weight, convolutional, estimator.role(True), f"{path}.weight")
    shared = isinstance(weight, nn.Parameter)  # a compact weight is made anew, and is nobody else's
    twin = next((p for p in before if shared and p.module.weight is weight), None)
    if twin is not None and not (spec.dynamic and spec == twin.weight):
        raise AttachError(
            explain(
                path,
                "a weight that one quantized layer owns (or scales that follow the weight: w8)",
                f"the same parameter as {twin.path}, which is quantized too",
                f'Give both w8, or leave one in float: LayerRule(match="{path}", weight=None).',
            )
        )
    activation = None
    if candidate.activation is not None and kind.input_channels:
        activation = resolve_activation(candidate.activation, convolutional, estimator.role(False), f"{path}.input")
        if activation.granularity == "group":
            Granularity("group", None, activation.group_size or 0).check_row(zero.shape(weight)[-1], path)
    granularity = _granularity(spec, kind)
    scales = granularity.scale_shape(zero.shape(weight), path)
    dtype = stream if type(module).__module__ == BNB else weight.dtype
    shape = zero.shape(weight)
    return LayerPlan(path, module, kind, spec, activation, shape, dtype, weight.device, granularity.rows(shape), scales)


def _granularity(spec: TensorSpec, kind: type[QuantLayer]) -> Granularity:
    return Granularity(spec.granularity, kind.output_axis, spec.group_size or 0, kind.stacked)


def _check_adapters(model: nn.Module, plan: Plan, estimator: Estimator) -> None:
    """LoRA around a layer to be quantized must have a merged weight to round."""
    planned = {id(layer.module) for layer in plan.layers}
    for path, lora in lora_layers(model):
        if id(lora.base_layer) in planned:
            from lightning_quant.lora import check_lora

            check_lora(path, lora, estimator)


def _norms(model: nn.Module, plan: Plan, traced: Flow, estimator: Estimator) -> dict[str, str]:
    """Which normalization goes into which layer; those that go into none are reported.

    Raises:
        AttachError: None found, or a method whose rounding takes the factor out again.
    """
    layers = {p.path: p for p in plan.layers}
    planned = {id(p.module) for p in plan.layers}
    pairs = followers(model, traced, lambda m: id(m) in planned, _has_statistics)
    norms = [path for path, m in model.named_modules() if _has_statistics(m)]
    if not pairs:
        reasons = "; ".join(f"{p or 'the model'}: {why}" for p, why in traced.failures.items())
        got = f"{len(norms)} normalizations" + (
            f", and forwards that torch.fx cannot trace ({reasons})" if reasons else ""
        )
        cure = 'Use batch_norm="keep".' if not norms else "Let a layer's output go to the normalization alone, once."
        raise AttachError(explain("batch_norm", "batch normalization right after a quantized layer", got, cure))
    for path in pairs:
        spec, rule = layers[path].weight, estimator.role(True)
        if rule.holds_elements or overrides(rule, "transform") or spec.observer == "unit":
            name = type(rule).__name__.lower()
            got = f"{name}, which keeps state of the layer's own weight or takes its size out"
            cure = 'Use batch_norm="keep", or a method such as lsq, ste or pege with theta="group".'
            raise AttachError(explain(f"{path}.weight", "a method that rounds any weight it is given", got, cure))
    plan.report.excluded += [
        Entry(path, "normalization without a quantized layer right before it", 0.0)
        for path in norms
        if path not in pairs.values()
    ]
    return pairs


def _has_statistics(module: nn.Module) -> bool:
    return type(module) in FOLDED and module.running_mean is not None


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


def _check_module(path: str, module: nn.Module, weight: Tensor, values: bool) -> None:
    if "forward" in module.__dict__:
        raise AttachError(
            explain(
                path,
                "a module with its class's own forward",
                "a forward patched on the instance (accelerate's hooks do that)",
                "Attach before dispatch_model / prepare, or call accelerate.hooks.remove_hook_from_submodules(model).",
            )
        )
    if values and weight.is_meta:
        cure = "Load the weights, then attach; or attach(model, config, fit=False), then load weights and quantizers."
        raise AttachError(explain(path, "a weight with values", "a meta tensor", cure))
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


def words(weight: TensorSpec, activation: TensorSpec | None) -> str:
    """Both specs in a few words."""

    def one(letter: str, spec: TensorSpec) -> str:
        size = str(spec.group_size) if spec.group_size else ""
        kind = "dynamic" if spec.dynamic else "learned" if spec.learn_scale else "fixed"
        more = "" if spec.symmetric else " asymmetric"
        for value, usual in ((spec.grid, "int"), (spec.range, "scale"), (spec.scale_format, "float")):
            more += "" if value == usual else f" {value}"
        return f"{letter}{spec.bits:g} {spec.granularity}{size} {kind}{more}"

    return one("w", weight) + (", " + one("a", activation) if activation else "")
