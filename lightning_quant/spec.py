"""What to quantize and how: frozen, plain-typed, versioned, YAML in and out.

Nothing here knows a module or a tensor.  A config is built once, checked once and then only read.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_quant.errors import explain, unknown
from lightning_quant.presets import resolved
from lightning_quant.scheme import ACTIVATION_BITS, TensorSpec, parse_scheme, split_cache
from lightning_quant.targets import TARGETS

SPEC_VERSION = 1
COVERAGE = ("error", "warn", "off")
KV_CACHES = {"int8": {"bits": 8}, "fp8": {"bits": 8, "grid": "e4m3"}}
BATCH_NORM = ("keep", "two_pass", "frozen")
SPEC_KEYS = ("learn_scale", "range", "grid", "observer", "scale_format", "narrow")
INHERIT = "inherit"


class YamlLoader(yaml.SafeLoader):
    """Safe YAML whose floats may lack a point: ``1e-3`` is a number, as in every other tool, not a string."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class LayerRule:
    """Overrides for the layers whose path matches; the first rule that matches wins.

    Args:
        match: Shell pattern on the module path (``*.down_proj``; a leading ``*.`` also matches a
            top-level module), or ``re:`` followed by a regular expression.
        weight: ``"inherit"``, ``None`` (leave the layer in float), a ``TensorSpec`` or a scheme string.
        activation: ``"inherit"``, ``None`` (float activations) or a ``TensorSpec``.
    """

    match: str
    weight: TensorSpec | str | None = INHERIT
    activation: TensorSpec | str | None = INHERIT

    def __post_init__(self) -> None:
        if isinstance(self.weight, str) and self.weight != INHERIT:
            object.__setattr__(self, "weight", TensorSpec.parse(self.weight))
        if isinstance(self.activation, str) and self.activation != INHERIT:
            raise ValueError(
                explain(
                    f"LayerRule({self.match!r}).activation",
                    "'inherit', None or a TensorSpec",
                    repr(self.activation),
                    "Write TensorSpec(bits=8) for 8-bit activations.",
                )
            )

    def matches(self, path: str) -> bool:
        """Whether the rule speaks of the module at ``path``.

        >>> LayerRule("*.lm_head", weight=None).matches("lm_head")
        True
        """
        if self.match.startswith("re:"):
            return re.search(self.match[3:], path) is not None
        return fnmatch.fnmatchcase(path, self.match) or fnmatch.fnmatchcase("." + path, self.match)


@dataclass(frozen=True)
class Distill:
    """Learning from a teacher's outputs beside the labels: see ``lightning_quant.distill``.

    Args:
        weight: Factor on ``T^2 KL(teacher || model)`` of the softened outputs.
        temperature: T, which outputs are divided by; above 1 it brings out how the teacher ranks unlikely answers.
        hidden: Factor on the mean squared difference of hidden states, for models that can return them.
        module: Path of the submodule whose outputs are taught; None: the model itself.
    """

    weight: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    module: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("weight", 0), ("hidden", 0), ("temperature", 1e-3)):
            value = getattr(self, name)
            if isinstance(value, str) or not least <= value < float("inf"):
                cure = "Use for example Distill(weight=0.5, temperature=2.0)."
                raise ValueError(explain(f"Distill.{name}", f"a number from {least} on", repr(value), cure))

    @staticmethod
    def parse(given: Distill | Mapping[str, Any] | float | None, where: str = "QuantConfig.distill") -> Distill | None:
        """From a weight or a mapping of fields; None where nothing would be learned.

        >>> Distill.parse(0.5), Distill.parse(0)
        (Distill(weight=0.5, temperature=1.0, hidden=0.0, module=None), None)
        """
        if isinstance(given, Mapping):
            _known(given, Distill, where)
            given = Distill(**given)
        elif isinstance(given, (int, float)):
            given = Distill(weight=given)
        elif not (given is None or isinstance(given, Distill)):
            cure = "Write for example 0.5, or {weight: 0.5, temperature: 2}."
            raise ValueError(explain(where, "a weight or a mapping of Distill's fields", repr(given), cure))
        return given if given is not None and (given.weight or given.hidden) else None


@dataclass(frozen=True)
class QuantConfig:
    """Everything that decides what training computes and what an export holds.

    Args:
        method: Name in ``ESTIMATORS``, or an ``Estimator`` of your own (a checkpoint keeps its class's path and
            settings; to load one, register the class under that path in ``ESTIMATORS``).
        weight: Spec of the weights, or None for float weights.
        activation: Spec of the layers' inputs, or None for float activations.
        rules: Per-layer overrides, first match wins.
        options: The method's own settings (fields of its estimator class).
        embeddings: Also quantize ``nn.Embedding`` weights.
        head: Also quantize the output head that ``get_output_embeddings()`` names.
        calibration: Optimizer steps at the start of training in which static activation ranges follow
            the data; after them the ranges stay (or are learned).
        coverage: What to do about a quantizer that a batch never reached: ``error``, ``warn``, ``off``.
        target: Runtime (a name of ``TARGETS``) whose arithmetic and constraints training follows: the dynamic int8
            scale is absmax/127 in vLLM's kernels (``vllm``) and absmax/127.5 in the reader of transformers;
            ``llama.cpp`` has blocks of 32 weights with float16 scales; ``onnxruntime`` and ``openvino`` have
            constant ranges of activations.
        scale_lr: Learning rate of learned scales, as a factor on the learning rate of their layer.
        seed: Seeds the counter-based noise of methods that draw random numbers.
        delay: Quantization delay: the optimizer steps (1 or more), or the share of the run (below 1), that
            training spends in float before its forwards are quantized.  Ranges follow the data in them, and
            evaluation is quantized from the start.
        batch_norm: What becomes of batch normalization right after a quantized layer: ``keep`` leaves it a
            float operation of its own; ``two_pass`` folds it into the layer's weight, with the statistics of
            the batch from a second pass; ``frozen`` folds it with the running statistics, which stay.
        freeze_batch_norm: Share of the run after which batch normalization keeps its running statistics,
            folded or not; None: never.  Without the batch's own statistics a network, float ones too, bears
            smaller learning rates only: let the rate fall before.
        operators: Width of the operands of additions, concatenations and average pools (static, one range for
            the operands of one operation), which integer-only runtimes need; None leaves them in float.
        first_last: Scheme of the layers that see the model's input or make its output, e.g. ``w8a8``;
            ``inherit``: as all others; None: float.
        strict: Refuse a model with weights that nothing here can reach, instead of listing them.
        distill: Learn from a teacher's outputs as well: a weight, ``Distill`` or a mapping of its fields.
        kv_cache: Grid of the keys and values that a decoder of transformers keeps (``int8``, ``fp8``), one static
            range each per layer; None: float.
        setup: What is done before training, in this order: names of ``TRANSFORMS``, which act on the float model, then
            of ``TUNINGS`` and at the end one of ``ROUNDINGS``, which act on the one with quantizers; or mappings of a
            name and its options, e.g. ``("smoothquant", {"name": "adaround", "steps": 500})``; or a preset,
            ``"data_free"``, ``"light"`` or ``"advanced"``, in whose place its steps are kept: see ``presets``.
        setup_batches: How many batches of training data ``setup`` looks at.
        compile: Run the quantizers' own arithmetic in compiled kernels, one pass over memory each way.  The first
            steps compile, some seconds per kind of layer.  A model that is compiled as a whole needs it not.  Where
            kernels of our own know the method and the grid it is those that run: Triton's on CUDA, C++ in float32 on
            processors (the extras ``triton`` and ``runtime``); else those of PyTorch's compiler.  Gradients of layers
            that run in C++ cannot be differentiated again.
        recompute: Linear layers round their weight once more in backward instead of keeping the rounded one, which
            saves a copy of all of them.
    """

    method: Any = "pege"
    weight: TensorSpec | None = field(default_factory=TensorSpec)
    activation: TensorSpec | None = field(default_factory=TensorSpec)
    rules: tuple[LayerRule, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    embeddings: bool = False
    head: bool = False
    calibration: int = 16
    coverage: str = "error"
    target: str = "vllm"
    scale_lr: float = 0.1
    seed: int = 0
    delay: float = 0
    batch_norm: str = "keep"
    freeze_batch_norm: float | None = None
    operators: int | None = None
    first_last: str | None = INHERIT
    strict: bool = False
    distill: Distill | None = None
    kv_cache: str | None = None
    setup: tuple[str | Mapping[str, Any], ...] = ()
    setup_batches: int = 8
    compile: bool = False
    recompute: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "setup", resolved(_steps(self.setup), self.activation is None))
        if self.setup_batches < 1:
            cure = "Use for example 8."
            raise ValueError(explain("QuantConfig.setup_batches", "1 or more batches", self.setup_batches, cure))
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "distill", Distill.parse(self.distill))
        object.__setattr__(self, "options", dict(self.options))
        if not isinstance(self.method, str) and self.options:
            got = f"{type(self.method).__name__} with options {sorted(self.options)} beside it"
            raise ValueError(explain("QuantConfig.method", "an object that stands alone", got, "Set its own fields."))
        if self.target not in TARGETS:
            raise ValueError(unknown("target", self.target, TARGETS, "QuantConfig.target"))
        if self.coverage not in COVERAGE:
            raise ValueError(unknown("coverage", self.coverage, COVERAGE, "QuantConfig.coverage"))
        if self.weight is None and self.activation is not None:
            raise ValueError(
                explain(
                    "QuantConfig",
                    "quantized weights wherever activations are quantized",
                    "weight=None with an activation spec",
                    "No runtime computes float weights on integer activations; use for example scheme='w8a8'.",
                )
            )
        if self.calibration < 0:
            raise ValueError(
                explain("QuantConfig.calibration", "0 or more optimizer steps", self.calibration, "Use for example 16.")
            )
        if self.delay < 0 or (self.delay >= 1 and self.delay != int(self.delay)):
            cure = "Use for example 0.1, or 1000."
            raise ValueError(explain("QuantConfig.delay", "a share below 1 or whole optimizer steps", self.delay, cure))
        if self.batch_norm not in BATCH_NORM:
            raise ValueError(unknown("batch_norm", self.batch_norm, BATCH_NORM, "QuantConfig.batch_norm"))
        if self.freeze_batch_norm is not None and not 0 <= self.freeze_batch_norm <= 1:
            cure = "Use for example 0.7."
            raise ValueError(
                explain("QuantConfig.freeze_batch_norm", "a share in [0, 1]", self.freeze_batch_norm, cure)
            )
        if self.operators is not None and self.operators not in ACTIVATION_BITS:
            cure = "Use for example 8."
            raise ValueError(explain("QuantConfig.operators", f"one of {ACTIVATION_BITS} bits", self.operators, cure))
        if self.first_last not in (INHERIT, None):
            parse_scheme(self.first_last)
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise ValueError(unknown("grid", self.kv_cache, KV_CACHES, "QuantConfig.kv_cache"))

    @staticmethod
    def parse(
        method: Any = "pege", scheme: str = "w8a8", *, rules: Iterable[LayerRule] = (), **options: Any
    ) -> QuantConfig:
        """Build a config from a method's name (or an ``Estimator``) and a scheme string.

        Keywords that are fields of this class go there; ``learn_scale``, ``range``, ``grid``, ``observer``,
        ``scale_format`` and ``narrow`` go to the specs of weights and activations alike; all others are the
        method's own options.

        >>> QuantConfig.parse("lsq", "w4a16-g32").weight.group_size
        32
        """
        scheme, kv_cache = split_cache(scheme)
        if kv_cache is not None:
            options.setdefault("kv_cache", kv_cache)
        weight, activation = parse_scheme(scheme)
        own = {f.name for f in fields(QuantConfig)} - {"method", "weight", "activation", "rules", "options"}
        settings = {k: options.pop(k) for k in list(options) if k in own}
        shared = {k: options.pop(k) for k in SPEC_KEYS if k in options}
        weight, activation = weight and replace(weight, **shared), activation and replace(activation, **shared)
        return QuantConfig(
            method=method, weight=weight, activation=activation, rules=tuple(rules), options=options, **settings
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for YAML or JSON, with the format's version."""
        method, options = self.method, self.options
        if not isinstance(method, str):
            options = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
            method = f"{type(method).__module__}:{type(method).__qualname__}"
        plain = asdict(replace(self, method="", options=options))
        return {"version": SPEC_VERSION, **plain, "method": method, "rules": [asdict(r) for r in self.rules]}

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "QuantConfig") -> QuantConfig:
        """Inverse of ``to_dict``; unknown keys and newer versions are refused."""
        data = dict(data)
        version = data.pop("version", None)
        if version != SPEC_VERSION:
            raise ValueError(
                explain(
                    where, f"version {SPEC_VERSION}", repr(version), "Write it again with this release's to_yaml()."
                )
            )
        _known(data, QuantConfig, where)
        for name in ("weight", "activation"):
            if name in data:
                data[name] = _spec(data[name], f"{where}.{name}")
        data["distill"] = Distill.parse(data.get("distill"), f"{where}.distill")
        rules = []
        for i, rule in enumerate(data.get("rules") or ()):
            if not isinstance(rule, Mapping) or "match" not in rule:
                cure = 'Write for example {match: "*.lm_head", weight: null}.'
                raise ValueError(explain(f"{where}.rules[{i}]", "a mapping with the key match", repr(rule), cure))
            _known(rule, LayerRule, f"{where}.rules[{i}]")
            rule = dict(rule)
            for name in ("weight", "activation"):
                if isinstance(rule.get(name), Mapping):
                    rule[name] = _spec(rule[name], f"{where}.rules[{i}].{name}")
            rules.append(LayerRule(**rule))
        return QuantConfig(**{**data, "rules": tuple(rules)})

    def to_yaml(self, path: str | Path) -> None:
        """Write the config as YAML, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(path.name + f".tmp{os.getpid()}")
        temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")
        temporary.replace(path)

    @staticmethod
    def from_yaml(path: str | Path) -> QuantConfig:
        """Read a config that ``to_yaml`` (or a person) wrote."""
        data = yaml.load(Path(path).read_text(encoding="utf-8"), YamlLoader)
        if not isinstance(data, Mapping):
            raise ValueError(
                explain(str(path), "a mapping of settings", type(data).__name__, "See QuantConfig.to_yaml.")
            )
        return QuantConfig.from_dict(data, where=str(path))


def _steps(given: Any) -> tuple[str | Mapping[str, Any], ...]:
    """The entries of ``setup``; a name or a mapping stands for a list of one."""
    steps = (given,) if isinstance(given, (str, Mapping)) else tuple(given)
    for step in steps:
        if not isinstance(step, str) and not (isinstance(step, Mapping) and isinstance(step.get("name"), str)):
            cure = "Write for example smoothquant, or {name: equalize, relu6: true}."
            raise ValueError(explain("QuantConfig.setup", "names, or mappings with a name", repr(step), cure))
    return steps


def _known(data: Mapping[str, Any], kind: type, where: str) -> None:
    names = [f.name for f in fields(kind)]
    for key in data:
        if key not in names:
            raise ValueError(unknown("key", key, names, where))


def _spec(data: Any, where: str) -> TensorSpec | None:
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise ValueError(explain(where, "a mapping of TensorSpec fields or null", repr(data), "See to_yaml()."))
    _known(data, TensorSpec, where)
    return TensorSpec(**data)
