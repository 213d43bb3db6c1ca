"""The compressed-tensors format, as vLLM and transformers load it, written from trained integers and scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import float_paths
from lightning_quant.distributed import whole
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.experts import ExpertWeight
from lightning_quant.export.layout import on_disk, splits, stored_parts
from lightning_quant.export.stored import StoredTensors, read_json, unequal
from lightning_quant.export.writer import Sink, float_tensors, write_model_files
from lightning_quant.layers import QuantLayer, QuantLinear
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig

PACKED, PLAIN = "pack-quantized", "int-quantized"
EXPERTS = r"re:.*\.experts.*"  # a target; single experts have no module in transformers


def write_compressed_tensors(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any = None
) -> None:
    """Write packed integers, scales and the ``quantization_config`` that says how to read them.

    Weight-only layers become ``pack-quantized`` (int32 words), layers with quantized inputs
    ``int-quantized`` (int8).  Everything is checked before the first byte.

    Raises:
        ValueError: The model is not transformers', or a layer has a grid the format's readers lack.
    """
    quantization = quantization_config(model, target)
    for name, tensor, layer in track(list(float_tensors(model)), "writing weights"):
        if layer is None:
            sink.add(_disk_name(model, name, tensor), whole(tensor))
        else:
            for path, codes, scale in stored_parts(model, name, layer):
                _add_layer(sink, path, layer, codes, scale)
    write_model_files(model, sink, tokenizer, config, quantization)


def check_compressed_tensors(model: nn.Module) -> None:
    """Refuse, before training, what ``write_compressed_tensors`` would refuse after it."""
    quantization_config(model, trained=False)


def is_compressed(path: Path) -> bool:
    """Whether config.json says so."""
    config = path / "config.json"
    return config.is_file() and "quantization_config" in read_json(config)


class StoredCompressed(StoredTensors):
    """Read by transformers."""

    format = "compressed-tensors"

    def layer(self, model: nn.Module, name: str, layer: QuantLayer) -> tuple[int, float]:
        """See the base class."""
        found = [self._matrix(layer, *part) for part in stored_parts(model, name, layer)]
        return sum(codes for codes, _ in found), max(scale for _, scale in found)

    def _matrix(self, layer: QuantLayer, path: str, codes: Tensor, scale: Tensor) -> tuple[int, float]:
        from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

        if layer_format(layer) == PACKED:
            bits = int(layer.weight_quant.spec.bits)
            packed, own = self.tensor(f"{path}.weight_packed"), pack_to_int32(codes.cpu(), bits)
            differ = unequal(packed, own)
            if differ and packed.shape == own.shape and packed.dtype == own.dtype:  # words; but say integers
                differ = max(1, unequal(unpack_from_int32(packed, bits, codes.shape), codes))
            if self.tensor(f"{path}.weight_shape").tolist() != list(codes.shape):
                differ = codes.numel()
        else:
            differ = unequal(self.tensor(f"{path}.weight"), codes)
        apart = _apart(self.tensor(f"{path}.weight_scale"), scale.to(layer.weight.dtype))
        inputs = layer.input_quant
        if inputs is not None and not inputs.spec.dynamic:
            own = inputs.range.scale(inputs).detach().to(layer.weight.dtype)
            apart = max(apart, _apart(self.tensor(f"{path}.input_scale"), own))
        return differ, apart

    def quantization(self, trained: nn.Module) -> dict[str, Any] | None:
        """See the base class."""
        return quantization_config(trained)


def _apart(found: Tensor, own: Tensor) -> float:
    """Largest difference of two scales; infinite where they are not of one shape and dtype, or not numbers."""
    if found.shape != own.shape or found.dtype != own.dtype:
        return float("inf")
    gap = float((found.double() - own.cpu().double()).abs().max())
    return gap if gap == gap else float("inf")


def _disk_name(model: nn.Module, name: str, tensor: Tensor) -> str:
    """A float tensor's name on disk; fused experts in float stay fused, since readers take single ones for packed."""
    names = list(on_disk(model, name, tensor))
    return names[0] if len(names) == 1 else name


def _add_layer(sink: Sink, path: str, layer: QuantLayer, codes: Tensor, scale: Tensor) -> None:
    from compressed_tensors.compressors import pack_to_int32

    size = codes.numel() * layer.weight.element_size()
    if layer_format(layer) == PACKED:
        packed = pack_to_int32(codes, int(layer.weight_quant.spec.bits))
        sink.add(f"{path}.weight_packed", packed, size)
        sink.add(f"{path}.weight_shape", torch.tensor(codes.shape, dtype=torch.int64), 0)
    else:
        sink.add(f"{path}.weight", codes, size)
    sink.add(f"{path}.weight_scale", scale.to(layer.weight.dtype), 0)
    inputs = layer.input_quant
    if inputs is not None and not inputs.spec.dynamic:
        sink.add(f"{path}.input_scale", whole(inputs.range.scale(inputs).detach()).to(layer.weight.dtype), 0)


def layer_format(layer: QuantLayer) -> str:
    """How a layer's integers are stored."""
    return PACKED if layer.input_quant is None else PLAIN


def quantization_config(model: nn.Module, target: str | None = None, trained: bool = True) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, after checking that the format can say all of it.

    Args:
        model: A transformers model with quantizers.
        target: Runtime the export is for, or None for the one training followed.
        trained: Whether ranges that training observes must be there.

    Raises:
        ValueError: See ``write_compressed_tensors``; the message names the layer.
    """
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(
            explain("format='compressed-tensors'", "a transformers model", type(model).__name__, "Use format='folded'.")
        )
    names = float_paths(model)
    modules = {name: m for p, m in model.named_modules() if (name := names[p]) is not None}
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        if isinstance(getattr(module, "weight", None), nn.Parameter):  # a packed weight is nobody else's
            owners.setdefault(id(module.weight), []).append(path)
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path, layer in modules.items():
        if isinstance(layer, QuantLayer):
            _check_layer(path, layer, owners.get(id(layer.weight), [path]), target, trained)
            if isinstance(layer, ExpertWeight):
                _check_experts(model, layer.weight_name(path), layer)
                path = EXPERTS
            group = _group(layer)
            targets = groups.setdefault(repr(group), (group, []))[1]
            targets += [path] * (path not in targets)
    if sum(EXPERTS in targets for _, targets in groups.values()) > 1:
        expected, cure = "one grid for all experts", "Give them the same scheme, or use format='folded'."
        raise ValueError(explain("format='compressed-tensors'", expected, "experts on several", cure))
    dense = [p for p, m in modules.items() if isinstance(m, nn.Linear) and not isinstance(m, QuantLayer)]
    dense += _routers(model, modules)
    entries = {}
    for i, (group, paths) in enumerate(groups.values()):
        entries[f"group_{i}"] = {"targets": ["Linear"] if len(groups) == 1 else paths, **group}
    formats = {g["format"] for g, _ in groups.values()}
    data = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": dense,
        "kv_cache_scheme": None,
        "version": __version__,
        "config_groups": entries,
    }
    QuantizationConfig.model_validate(data)
    if data["format"] == PACKED and sum(targets != [EXPERTS] for _, targets in groups.values()) <= 1:
        # transformers' reader unpacks while loading.  Without it models that initialize weights by name (Falcon, T5,
        # ModernBERT) do not load, and parts of a model that are called before the whole find no weight.
        data["dequantize"] = True
    return data


def _routers(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of float modules with a matrix that some readers hold in a Linear, as on disk."""
    found = []
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, (nn.Linear, nn.Embedding, QuantLayer)):
            found.append(_disk_name(model, f"{path}.weight", weight).removesuffix(".weight"))
    return found


def _group(layer: QuantLayer) -> dict[str, Any]:
    spec = layer.weight_quant.spec
    weights = {
        "num_bits": int(spec.bits),
        "type": "int",
        "symmetric": True,
        "strategy": "group" if spec.granularity == "group" else "channel",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    inputs = None
    if layer.input_quant is not None:
        dynamic = bool(layer.input_quant.spec.dynamic)
        inputs = {
            "num_bits": int(layer.input_quant.spec.bits),
            "type": "int",
            "symmetric": True,
            "strategy": "token" if dynamic else "tensor",
            "dynamic": dynamic,
        }
    return {"format": layer_format(layer), "weights": weights, "input_activations": inputs, "output_activations": None}


def _check_layer(path: str, layer: QuantLayer, owners: list[str], target: str | None, trained: bool) -> None:
    def refuse(expected: str, got: object, cure: str) -> ValueError:
        return ValueError(explain(f"{path} (format='compressed-tensors')", expected, got, cure))

    spec, inputs = layer.weight_quant.spec, layer.input_quant
    if not isinstance(layer, (QuantLinear, ExpertWeight)):
        raise refuse("a Linear layer", type(layer).__name__, "Its readers know no other: use format='folded'.")
    if spec.bits not in (2, 3, 4, 5, 6, 8):
        raise refuse("2 to 6 or 8 bits", f"{spec.bits:g}", "Use format='folded'.")
    if not spec.symmetric:
        raise refuse("symmetric weights", "asymmetric ones", "Readers fail on packed zero points: train without -asym.")
    if overrides(layer.weight_quant.estimator, "decode"):
        got = f"levels that {type(layer.weight_quant.estimator).__name__.lower()} chose"
        raise refuse("evenly spaced levels", got, "Use format='folded'.")
    if layer.weight_quant.grid.zero != 0 or layer.weight_quant.table is not None or layer.weight_quant.range.affine:
        raise refuse("evenly spaced levels around 0", f"grid={spec.grid!r}", "Use format='folded'.")
    if len(owners) > 1:
        raise refuse("a weight of its own", f"one shared by {', '.join(owners)}", "Leave a tied head in float.")
    if inputs is not None:
        _check_inputs(inputs, refuse)
        if trained and not inputs.ready:
            raise refuse("calibrated inputs", "no range yet", "Train, or call calibrate(model, batches).")
        if inputs.spec.dynamic and target not in (None, inputs.target):
            raise refuse(f"target={inputs.target!r}, which training followed", repr(target), "Train with that target.")
    if inputs is not None and inputs.spec.bits == 8 and spec.bits == 8 and spec.granularity == "group":
        raise refuse("per-channel weights beside int8 inputs", "groups", "No kernel computes it: use w8a8.")


def _check_experts(model: nn.Module, name: str, layer: ExpertWeight) -> None:
    if not splits(model, name, layer):
        expected = "experts that a checkpoint holds one by one"
        got = f"those of {type(model).__name__}, which are fused"
        raise ValueError(explain(f"{name} (format='compressed-tensors')", expected, got, "Use format='folded'."))


def _check_inputs(inputs: FakeQuantizer, refuse: Any) -> None:
    if overrides(inputs.estimator, "transform", "assign", "decode"):
        got = f"what {type(inputs.estimator).__name__.lower()} does to them"
        raise refuse("inputs rounded to the nearest level", got, "Use format='folded'.")
    if inputs.spec.grid != "int" or inputs.spec.range not in ("scale", "log2"):
        got = f"grid={inputs.spec.grid!r}, range={inputs.spec.range!r}"
        raise refuse("evenly spaced levels around 0", got, "Use format='folded'.")
    if inputs.spec.bits != 8:
        raise refuse("8-bit inputs", f"{inputs.spec.bits:g} bits", "Use format='folded', or train with a8.")
    if not inputs.spec.symmetric:
        raise refuse("symmetric inputs", "asymmetric ones", "Train with TensorSpec(symmetric=True).")
