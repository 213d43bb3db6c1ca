"""README.md of an export: what is in it, what was trained, how to load it.  Nothing in it depends on when or where."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from torch import nn

from lightning_quant.adapters import float_paths
from lightning_quant.attach import quant_layers
from lightning_quant.checkpoint import ADAPTER_FILE, adapters_base
from lightning_quant.export.writer import ExportReport
from lightning_quant.layers import QuantLayer, float_dtype, is_compact
from lightning_quant.plan import words
from lightning_quant.spec import QuantConfig
from lightning_quant.version import __version__

CARD_FILE = "README.md"
TRAINER_STATE = "trainer_state.json"
LIBRARIES = {"onnx": "onnx", "gguf": "gguf"}  # others: transformers
PACKAGES = ("torch", "transformers", "compressed-tensors")


def versions() -> dict[str, str]:
    """Releases of what decides an export's bytes, by package."""
    found = {"lightning-quant": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_card(model: nn.Module, report: ExportReport, config: QuantConfig | None, training: Path | None) -> str:
    """The text of README.md for an export of a transformers model.

    Args:
        model: As it ships.
        report: What was written.
        config: What it was trained with, if known.
        training: The training directory, if it comes from one.
    """
    title = f"{type(model).__name__}, {_scheme(model)}"
    parts = [_front_matter(model, report, config, training), f"# {title}\n"]
    parts.append(
        f"Trained with quantization in the forward pass by lightning-quant{_method(config)}.  What is stored are the "
        "integers and scales that training ended with, not rounded once more.\n"
    )
    parts += [_layers(model), _size(model, report)]
    if training is not None and (figures := _figures(training)):
        parts.append(figures)
    parts += ["## Loading\n", *_loading(model, report)]
    parts.append(
        "## Checking\n\n`SHA256SUMS` holds the digests of all files (`sha256sum -c SHA256SUMS`).  Against the training "
        "directory:\n\n```bash\nlightning-quant verify EXPORT --against TRAINING_DIRECTORY\n```\n"
    )
    parts.append("## Versions\n\n" + ", ".join(f"{name} {release}" for name, release in versions().items()) + "\n")
    return "\n".join(parts)


def _front_matter(model: nn.Module, report: ExportReport, config: QuantConfig | None, training: Path | None) -> str:
    tags = ["quantized", "quantization-aware-training", "lightning-quant", report.format]
    lines = ["---", f"library_name: {LIBRARIES.get(report.format, 'transformers')}"]
    if (base := _base_model(model, training)) is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "quantization:"]
    lines += [f"  method: {json.dumps(_name(config))}"] * (config is not None)
    lines += [f"  scheme: {json.dumps(_scheme(model))}", f"  format: {report.format}", "---\n"]
    return "\n".join(lines)


def _base_model(model: nn.Module, training: Path | None) -> str | None:
    """The name of the model on the Hub that training began with; None for paths, which are nobody else's."""
    named = getattr(getattr(model, "config", None), "name_or_path", "")
    if training is not None and (training / ADAPTER_FILE).is_file():
        named = adapters_base(training)
    known = isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).exists()
    return str(named) if known else None


def _name(config: QuantConfig | None) -> str:
    method = None if config is None else config.method
    return method if isinstance(method, str) else type(method).__name__.lower()


def _method(config: QuantConfig | None) -> str:
    return "" if config is None else f" (method `{_name(config)}`)"


def _spec(layer: QuantLayer) -> str:
    return words(layer.weight_quant.spec, None if layer.input_quant is None else layer.input_quant.spec)


def _scheme(model: nn.Module) -> str:
    """What most layers have."""
    ((scheme, _),) = Counter(_spec(layer) for _, layer in quant_layers(model)).most_common(1)
    return scheme


def _layers(model: nn.Module) -> str:
    """How many layers have which grid, and what stayed in float and why."""
    names = float_paths(model)
    rows: Counter[tuple[str, str]] = Counter()
    for path, layer in quant_layers(model):
        name = layer.weight_name(str(names.get(path, path))).removesuffix(".weight")
        rows[_pattern(name), _spec(layer)] += 1
    for name, why in _left_out(model):
        rows[_pattern(name), f"{str(float_dtype(model)).removeprefix('torch.')}: {why}"] += 1
    lines = ["## Layers\n", "| layers | count | stored as |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {count} | {what} |" for (name, what), count in rows.items())]) + "\n"


def _left_out(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules with matrices in float, and why they are."""
    names = float_paths(model)
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    heads = set() if head is None else {id(part) for part in head.modules()}  # adapters may be around it
    for path, module in model.named_modules():
        name = names.get(path)
        own = [p for p in module._parameters.values() if p is not None and p.ndim >= 2]
        if name is None or isinstance(module, QuantLayer) or not (own or is_compact(module)):
            continue
        if any(isinstance(child, QuantLayer) for child in module.children()):  # experts, whose weights are theirs
            continue
        if id(module) in heads:
            yield name, "output head"
        elif isinstance(module, nn.Embedding):
            yield name, "embedding"
        elif isinstance(module, nn.Linear):
            yield name, "left out by the configuration"
        else:
            yield name, f"{type(module).__name__} is not quantized"


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _size(model: nn.Module, report: ExportReport) -> str:
    before, after = report.float_bytes, report.total_bytes
    dtype = str(float_dtype(model)).removeprefix("torch.")
    return (
        f"## Size\n\n{after / 2**20:.2f} MiB of weights, {before / 2**20:.2f} MiB in training ({dtype}): "
        f"{before / max(after, 1):.2f} times smaller.\n"
    )


def _figures(training: Path) -> str:
    """The last evaluation in a Trainer's log."""
    try:
        state = json.loads((training / TRAINER_STATE).read_text(encoding="utf-8"))
        rows = [row for row in state.get("log_history", []) if any(key.startswith("eval_") for key in row)]
    except (OSError, ValueError, AttributeError):
        return ""
    if not rows:
        return ""
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    found = {
        k: v for k, v in rows[-1].items() if k.startswith("eval_") and k not in timing and isinstance(v, (int, float))
    }
    lines = [f"## Evaluation\n\nAt step {rows[-1].get('step', state.get('global_step'))} of training, quantized:\n"]
    lines += ["| metric | value |", "|---|---|"]
    return (
        "\n".join([*lines, *(f"| {key.removeprefix('eval_')} | {value:.6g} |" for key, value in found.items())]) + "\n"
    )


def _loading(model: nn.Module, report: ExportReport) -> list[str]:
    """What loads the format, and only that."""
    if report.format == "gguf":
        return [f"```bash\nllama-cli -m {report.files[0]}\n```\n"]
    if report.format == "onnx":
        return [f'```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("{report.files[0]}")\n```\n']
    found = []
    if report.format == "compressed-tensors":
        found.append("With transformers, which needs `pip install compressed-tensors`:\n")
    elif report.format == "gptq":
        found.append("With transformers, which needs `pip install optimum gptqmodel`:\n")
    elif report.format == "torchao":
        found.append("With transformers, which needs `pip install torchao`:\n")
    else:
        found.append("A plain float checkpoint whose weights lie on the trained grid; activations are not rounded:\n")
    kind = type(model).__name__
    found.append(f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("EXPORT")\n```\n')
    if report.format == "gptq" or (report.format == "compressed-tensors" and _vllm(model)):
        found.append("With vLLM:\n\n```bash\nvllm serve EXPORT\n```\n")
    return found


def _vllm(model: nn.Module) -> bool:
    """Whether vLLM has kernels for every layer: 4 or 8 bits around 0 without inputs, or 8 bits with rounded inputs."""
    if not type(model).__name__.endswith("ForCausalLM"):
        return False
    for _, layer in quant_layers(model):
        spec, inputs = layer.weight_quant.spec, layer.input_quant
        fits = spec.grid == "int" and bool(spec.symmetric) and layer.weight_quant.target == "vllm"
        if inputs is None:
            fits &= spec.bits in (4, 8) and (spec.group_size or 128) in (32, 64, 128)
        else:
            fits &= spec.bits == inputs.spec.bits == 8 and spec.granularity == "channel"
        if not fits:
            return False
    return True
