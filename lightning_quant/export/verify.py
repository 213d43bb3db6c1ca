"""Prove that an export computes what training computed: integers, scales, every layer, the logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_quant.adapters import acting_beside, float_paths, without_adapters
from lightning_quant.attach import detach, quant_layers, quantizers
from lightning_quant.checkpoint import load_training_checkpoint
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.compressed_tensors import PACKED, layer_format
from lightning_quant.export.layout import on_disk, stored_parts
from lightning_quant.export.onnx_qdq import MODEL_FILE
from lightning_quant.export.writer import as_shipped, float_tensors, shipped_model
from lightning_quant.layers import QuantLayer


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
    """

    path: str
    format: str
    max_abs_diff: float
    mean_abs_diff: float
    tolerance: float
    layers: list[LayerCheck]
    other: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            f"tolerance {self.tolerance:.3g})",
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


def verify(
    path: str | Path,
    model_or_training_dir: nn.Module | str | Path,
    inputs: Any = None,
    tolerance: float | None = None,
) -> VerifyReport:
    """Compare an export, through its real reader, with the model that was trained.

    Args:
        path: The export.
        model_or_training_dir: The trained model with its quantizers, or a training directory.
        inputs: Keyword inputs of the model (onnx: as ``export`` takes them); None: 2 x 32 token ids drawn with a fixed
            seed (onnx: ``example_input_array``).
        tolerance: Largest logit difference that counts as equal; None: 0, since readers are exact in float32 (onnx: see
            ``verify_onnx``).

    Returns:
        The comparison; ``.ok`` is the verdict.

    Raises:
        CheckpointError: Either side is missing, damaged or not what it claims to be.
    """
    path = Path(path)
    stored = None if (path / MODEL_FILE).is_file() else _Stored(path)
    if isinstance(model_or_training_dir, nn.Module):
        trained = model_or_training_dir
    else:
        trained = load_training_checkpoint(model_or_training_dir)
    trained = shipped_model(trained)
    beside = [p for p, _ in acting_beside(trained, {id(layer) for _, layer in quant_layers(trained)})]
    with as_shipped(trained):
        if stored is None:
            from lightning_quant.export.verify_onnx import verify_onnx

            return verify_onnx(path, trained, inputs, tolerance)
        contents, other = _compare_tensors(stored, trained)
        notes = _notes(trained, stored.format)
        if beside:
            got = "on both sides; while training they add after its product, which sums floats in another order"
            notes.append(f"adapters of {beside[0]} (of {len(beside)} layers in float) are merged {got}")
        outputs, logits = _compare_outputs(stored, trained, inputs)
    order = [p for p in outputs if p in contents] + [p for p in contents if p not in outputs]
    checks = [LayerCheck(p, *contents[p], outputs.get(p, 0.0)) for p in order]
    return VerifyReport(str(path), stored.format, *logits, tolerance or 0.0, checks, other, notes)


class _Stored:
    """The tensors of an export directory, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(explain(str(path), "an export", "no such directory", "Point at what export() wrote."))
        try:
            config_file = path / "config.json"
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
            index_file = path / "model.safetensors.index.json"
            if index_file.is_file():
                self.files = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
            else:
                with self._open("model.safetensors") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(explain(str(path), "whole JSON files", repr(error), "Export again.")) from error
        self.format = "compressed-tensors" if "quantization_config" in config else "folded"

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                explain(str(self.path / name), "a whole safetensors file", str(error), "Export again.")
            ) from error

    def tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise CheckpointError(
                explain(str(self.path), f"a tensor {name}", "none", "It was exported from another model; export again.")
            )
        with self._open(self.files[name]) as file:
            value: Tensor = file.get_tensor(name)
            return value

    def parts(self, model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A float tensor of the model in the parts that are stored."""
        return {name: tensor} if name in self.files else on_disk(model, name, tensor)

    def differs(self, name: str, tensor: Tensor) -> int:
        """How many values of a stored tensor are others than these."""
        found = self.tensor(name)
        return int((found != tensor.cpu()).sum()) if found.shape == tensor.shape else tensor.numel()


def _compare_tensors(stored: _Stored, trained: nn.Module) -> tuple[dict[str, tuple[int, float]], list[str]]:
    contents: dict[str, tuple[int, float]] = {}
    other = []
    for name, tensor, layer in float_tensors(trained):
        path = name.removesuffix(".weight")
        if layer is not None and stored.format == "compressed-tensors":
            parts = [_compare_layer(stored, layer, *part) for part in stored_parts(trained, name, layer)]
            contents[path] = (sum(codes for codes, _ in parts), max(scale for _, scale in parts))
            continue
        value = tensor.detach() if layer is None else layer.on_grid()
        differs = sum(stored.differs(key, part) for key, part in stored.parts(trained, name, value).items())
        if layer is not None:
            contents[path] = (differs, 0.0)
        elif differs:
            other.append(name)
    return contents, other


def _compare_layer(stored: _Stored, layer: QuantLayer, path: str, codes: Tensor, scale: Tensor) -> tuple[int, float]:
    from compressed_tensors.compressors import unpack_from_int32

    codes, scale = codes.cpu(), scale.cpu()
    if layer_format(layer) == PACKED:
        shape = torch.Size(stored.tensor(f"{path}.weight_shape").tolist())
        found = unpack_from_int32(stored.tensor(f"{path}.weight_packed"), int(layer.weight_quant.spec.bits), shape)
    else:
        found = stored.tensor(f"{path}.weight")
    found_scale = stored.tensor(f"{path}.weight_scale")
    if found.shape != codes.shape:
        return codes.numel(), float("inf")
    difference = float((found_scale.double() - scale.double()).abs().max())
    inputs = layer.input_quant
    if inputs is not None and not inputs.spec.dynamic:
        gap = (
            (stored.tensor(f"{path}.input_scale").double() - inputs.range.scale(inputs).detach().cpu().double())
            .abs()
            .max()
        )
        difference = max(difference, float(gap))
    return int((found != codes).sum()), difference


def _notes(trained: nn.Module, format: str) -> list[str]:
    inputs = [q for _, q in quantizers(trained) if not q.is_weight]
    if not inputs:
        return []
    if format == "folded":
        return ["a folded checkpoint keeps activations in float; outputs are compared without input quantizers"]
    if any(q.spec.dynamic and q.target == "vllm" for q in inputs):
        return [
            "trained for target='vllm' (dynamic scale absmax/127); the reader here divides by 127.5, so outputs are "
            "compared under the reader's rule on both sides"
        ]
    return []


def _compare_outputs(
    stored: _Stored, trained: nn.Module, inputs: Mapping[str, Tensor] | None
) -> tuple[dict[str, float], tuple[float, float]]:
    shipped = _read(stored, trained)
    if inputs is None:
        inputs = _token_inputs(trained)
    device = next(trained.parameters()).device
    names = float_paths(trained)
    layers = {
        layer.weight_name(str(names[p])).removesuffix(".weight"): layer.runs_in(p) for p, layer in quant_layers(trained)
    }
    paths = {p: str(names[p]) for p in layers.values()}
    with _ReaderRules(trained, folded=stored.format == "folded"):
        theirs = _run(trained, {k: v.to(device) for k, v in inputs.items()}, paths)
    ours = _run(shipped, inputs, {name: name for name in paths.values()})
    gaps = {p: float((ours[p] - theirs[p]).abs().max()) for p in theirs if p in ours and p}
    outputs = {layer: gap for ran, gap in gaps.items() for layer, at in layers.items() if paths[at] == ran}
    gap = (ours[""] - theirs[""]).abs()
    return outputs, (float(gap.max()), float(gap.mean()))


def _token_inputs(trained: nn.Module) -> dict[str, Tensor]:
    if not hasattr(trained, "config"):
        raise ValueError(
            explain("verify", "inputs for a model that takes no tokens", "none", "Pass inputs={argument name: tensor}.")
        )
    vocabulary = int(trained.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    ids = torch.randint(0, vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _read(stored: _Stored, trained: nn.Module) -> nn.Module:
    """The export through its reader: transformers' for its models, plain ``load_state_dict`` for others."""
    path = stored.path
    if not hasattr(trained, "save_pretrained"):
        plain = detach(without_adapters(copy.deepcopy(trained)), fold=False).cpu()
        plain.load_state_dict({name: stored.tensor(name) for name in stored.files})
        return plain.eval()
    import transformers

    kind = getattr(transformers, type(trained).__name__)
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, AttributeError) as error:  # T5 looks for weights that are packed
        cure = "Export again; what its reader cannot load at all, with format='folded'."
        raise CheckpointError(explain(str(path), "an export its reader loads", str(error), cure)) from error
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        raise CheckpointError(
            explain(
                str(path), "a clean loading report", str(wrong)[:300], "The reader would compute with random weights."
            )
        )
    reader: nn.Module = model.eval()
    return reader


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """Outputs of these layers (path -> name) in the order they ran, and of the model under the empty name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output.detach().float().cpu().clone()  # an in-place ReLU may follow

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(name)) for p, name in paths.items()]
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    first = output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]
    found[""] = first.detach().float().cpu()
    return found


class _ReaderRules:
    """While comparing outputs, let the trained model follow what the reader does to activations, in its dtype.

    After training in mixed precision accelerate leaves a forward on the model that turns autocast on.
    """

    def __init__(self, trained: nn.Module, folded: bool) -> None:
        self.trained, self.folded = trained, folded

    def __enter__(self) -> None:
        self.layers = [(layer, layer.input_quant) for _, layer in quant_layers(self.trained)]
        self.targets = [(q, q.target) for _, q in quantizers(self.trained)]
        for q, _ in self.targets:
            q.target = "transformers"
        if self.folded:
            for layer, _ in self.layers:
                layer.input_quant = None
        self.forward = self.trained.__dict__.get("forward")
        if "_original_forward" in self.trained.__dict__:
            self.trained.forward = self.trained._original_forward  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        for q, target in self.targets:
            q.target = target
        for layer, inputs in self.layers:
            layer.input_quant = inputs
        if self.forward is not None:
            self.trained.forward = self.forward
