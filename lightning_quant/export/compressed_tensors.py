"""The compressed-tensors format, as vLLM and transformers load it, written from trained integers and scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import float_path, float_paths
from lightning_quant.distributed import whole
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.experts import ExpertWeight
from lightning_quant.export.ct_layouts import PACKED, arguments, layout_of
from lightning_quant.export.layout import Matrix, on_disk, splits, stored_parts
from lightning_quant.export.stored import StoredTensors, read_json, unequal
from lightning_quant.export.writer import Sink, write_model_files
from lightning_quant.fused import fused_layers
from lightning_quant.kv_cache import kv_quantizers
from lightning_quant.layers import QuantLayer, QuantLinear
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig

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
    for name, tensor, layer in sink.weights(model):
        if layer is None:
            sink.add(_disk_name(model, name, tensor), whole(tensor))
        else:
            for matrix in stored_parts(model, name, layer):
                size = matrix.codes.numel() * layer.weight.element_size()
                for suffix, value in _tensors(matrix, layer).items():
                    sink.add(f"{matrix.path}.{suffix}", value, size)
                    size = 0
    for name, scale in _kv_scales(model):
        sink.add(name, scale, 0)
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
        found = [self._matrix(layer, matrix) for matrix in stored_parts(model, name, layer)]
        return sum(codes for codes, _ in found), max(scale for _, scale in found)

    def _matrix(self, layer: QuantLayer, matrix: Matrix) -> tuple[int, float]:
        differ, apart = 0, 0.0
        for suffix, own in _tensors(matrix, layer).items():
            stored = self.tensor(f"{matrix.path}.{suffix}")
            if "scale" in suffix:
                apart = max(apart, _apart(stored, own))
            elif suffix == "weight_packed" and own.dtype == torch.int32:
                differ += _integers(stored, own, int(layer.weight_quant.spec.bits), matrix.codes)
            else:
                differ += unequal(stored, own)
        return differ, apart

    @property
    def rounds_inputs(self) -> bool:  # type: ignore[override]
        """Not where its reader is told to unpack weights while loading: it leaves inputs alone then."""
        return "dequantize" not in self.config.get("quantization_config", {})

    def odd(self, trained: nn.Module) -> list[str]:
        """See the base class."""
        wrong = [name for name, scale in _kv_scales(trained) if _apart(self.tensor(name), scale)]
        return wrong + super().odd(trained)

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


def _integers(found: Tensor, own: Tensor, bits: int, codes: Tensor) -> int:
    """How many packed integers differ."""
    from compressed_tensors.compressors import unpack_from_int32

    differ = unequal(found, own)
    if differ and found.shape == own.shape and found.dtype == own.dtype:  # in words; at least one integer each
        differ = max(1, unequal(unpack_from_int32(found, bits, codes.shape), codes))
    return differ


def _tensors(matrix: Matrix, layer: QuantLayer) -> dict[str, Tensor]:
    """What is stored of a layer (or of one expert), by the rest of its name."""
    dtype = layer.weight.dtype
    layout = layout_of(layer.weight_quant, layer.input_quant)
    found = layout.tensors(matrix, layer.weight_quant, dtype)  # type: ignore[union-attr]
    inputs = layer.input_quant
    if inputs is not None and not inputs.spec.dynamic:
        found["input_scale"] = whole(inputs.range.scale(inputs).detach()).to(dtype)
        if inputs.grid.zero is None:
            zero = inputs.range.zero(inputs)
            assert isinstance(zero, Tensor)
            found["input_zero_point"] = whole(zero).to(torch.int8)
    return found


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
    if target is not None:
        _check_fused(model, target)
    if sum(EXPERTS in targets for _, targets in groups.values()) > 1:
        expected, cure = "one grid for all experts", "Give them the same scheme, or use format='folded'."
        raise ValueError(explain("format='compressed-tensors'", expected, "experts on several", cure))
    dense = [p for p, m in modules.items() if isinstance(m, nn.Linear) and not isinstance(m, QuantLayer)]
    dense += _routers(model, modules)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    # a head is no Linear in vLLM and wants to be named
    heads = [p for p, m in modules.items() if m is head and isinstance(m, QuantLayer)]
    entries = {}
    for i, (group, paths) in enumerate(groups.values()):
        entries[f"group_{i}"] = {"targets": ["Linear", *heads] if len(groups) == 1 else paths, **group}
    formats = {g["format"] for g, _ in groups.values()}
    data = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": dense,
        "kv_cache_scheme": _kv_scheme(model, target, trained),
        "version": __version__,
        "config_groups": entries,
    }
    QuantizationConfig.model_validate(data)
    kinds = [group for group, targets in groups.values() if targets != [EXPERTS]] or [g for g, _ in groups.values()]
    unpacked = [g for g in kinds if _only_unpacked(g)]
    if unpacked and len(groups) > 1:
        got, cure = f"{len(groups)}, one of them {unpacked[0]['format']}", "Use one, or format='folded'."
        where, expected = "format='compressed-tensors'", "one scheme where weights have zero points or mx scales"
        raise ValueError(explain(where, expected, got, cure))
    if unpacked and data["kv_cache_scheme"] is not None:
        got, cure = unpacked[0]["format"], "Use symmetric integers, fp8, or leave kv_cache out."
        expected = "weights that are read packed beside a quantized cache"
        raise ValueError(explain("format='compressed-tensors'", expected, got, cure))
    rounds = data["kv_cache_scheme"] is not None or any(g["input_activations"] for g, _ in groups.values())
    if len(kinds) == 1 and (unpacked or not rounds):
        # transformers' reader unpacks while loading.  Without it models that initialize weights by name (Falcon, T5,
        # ModernBERT) do not load, and parts of a model that are called before the whole find no weight.
        data["dequantize"] = True
    return data


def _check_fused(model: nn.Module, target: str) -> None:
    """Layers that the runtime makes one of must be alike: it refuses others, or computes with the largest scale."""
    for group in fused_layers(model, target):
        (first, one), *rest = group.items()
        for path, layer in rest:
            where, cure = f"{path} (target={target!r})", "Give them one scheme, and train with this target."
            if _said_of(layer) != _said_of(one):
                raise ValueError(explain(where, f"the scheme of {first}", "another", cure))
            pair = [m.input_quant for m in (one, layer) if isinstance(m, QuantLayer) and m.input_quant is not None]
            if len(pair) == 2 and not pair[0].spec.dynamic and all(q.ready for q in pair):
                scales = [whole(q.range.scale(q).detach()) for q in pair]
                if not torch.equal(*scales):
                    raise ValueError(explain(where, f"the range of {first}'s input, which is its own", "another", cure))


def _kv_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and scales of the quantizers of keys and values."""
    for path, quant in kv_quantizers(model).items():
        name = float_path(path)
        for letter, q in (("k", quant.k), ("v", quant.v)):
            yield f"{name}.{letter}_scale", whole(q.range.scale(q).detach())


def _kv_scheme(model: nn.Module, target: str | None, trained: bool) -> dict[str, Any] | None:
    """What config.json says of keys and values."""
    found = kv_quantizers(model)
    for path, quant in found.items():
        where = f"{path} (format='compressed-tensors')"
        if trained and not (quant.k.ready and quant.v.ready):
            cure = "Train, or call calibrate(model, batches)."
            raise ValueError(explain(where, "calibrated keys and values", "no range yet", cure))
        if target == "vllm" and quant.k.spec.grid == "int":
            cure = "Train with kv_cache='fp8' (-kvfp8 in the scheme), or export with target='transformers'."
            raise ValueError(explain(f"{path} (target='vllm')", "keys and values in fp8", "int8", cure))
        return arguments(quant.k.spec)
    return None


def _said_of(layer: nn.Module) -> dict[str, Any] | None:
    return _group(layer) if isinstance(layer, QuantLayer) else None


def _only_unpacked(group: Mapping[str, Any]) -> bool:
    """Whether transformers can read such weights while loading only; it fails on their packed form."""
    return group["format"].startswith("mx") or (group["format"] == PACKED and not group["weights"]["symmetric"])


def _routers(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of float modules with a matrix that some readers hold in a Linear, as on disk."""
    found = []
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, (nn.Linear, nn.Embedding, QuantLayer)):
            found.append(_disk_name(model, f"{path}.weight", weight).removesuffix(".weight"))
    return found


def _group(layer: QuantLayer) -> dict[str, Any]:
    layout = layout_of(layer.weight_quant, layer.input_quant)
    assert layout is not None
    inputs = None if layer.input_quant is None else arguments(layer.input_quant.spec, layout.dtype)
    weights = arguments(layer.weight_quant.spec, layout.dtype)
    return {"format": layout.format, "weights": weights, "input_activations": inputs, "output_activations": None}


def _check_layer(path: str, layer: QuantLayer, owners: list[str], target: str | None, trained: bool) -> None:
    def refuse(expected: str, got: object, cure: str) -> ValueError:
        return ValueError(explain(f"{path} (format='compressed-tensors')", expected, got, cure))

    q, inputs = layer.weight_quant, layer.input_quant
    spec = q.spec
    if not isinstance(layer, (QuantLinear, ExpertWeight)):
        raise refuse("a Linear layer", type(layer).__name__, "Its readers know no other: use format='folded'.")
    if layout_of(q, inputs) is None or q.range.affine or q.grid.zero not in (0, None):
        got = f"grid={spec.grid!r}, range={spec.range!r}, {spec.bits:g} bits, {spec.scale_format} scales"
        raise refuse("integers around a zero point, or fp8, mxfp8, mxfp4 or nvfp4", got, "Use format='folded'.")
    if spec.grid == "int" and spec.bits not in (2, 3, 4, 5, 6, 8):
        raise refuse("2 to 6 or 8 bits", f"{spec.bits:g}", "Use format='folded'.")
    if not spec.symmetric and inputs is not None:
        raise refuse("symmetric weights beside quantized inputs", "asymmetric ones", "Train without -asym.")
    if overrides(q.estimator, "decode"):
        got = f"levels that {type(q.estimator).__name__.lower()} chose"
        raise refuse("evenly spaced levels", got, "Use format='folded'.")
    if len(owners) > 1:
        raise refuse("a weight of its own", f"one shared by {', '.join(owners)}", "Leave a tied head in float.")
    if inputs is not None:
        _check_inputs(inputs, spec, refuse)
        if trained and not inputs.ready:
            raise refuse("calibrated inputs", "no range yet", "Train, or call calibrate(model, batches).")
        if inputs.spec.dynamic and target not in (None, inputs.target):
            raise refuse(f"target={inputs.target!r}, which training followed", repr(target), "Train with that target.")
    if inputs is not None and spec.grid == "int" and spec.bits == 8 and spec.granularity == "group":
        raise refuse("per-channel weights beside int8 inputs", "groups", "No kernel computes it: use w8a8.")


def _check_experts(model: nn.Module, name: str, layer: ExpertWeight) -> None:
    if not splits(model, name, layer):
        expected = "experts that a checkpoint holds one by one"
        got = f"those of {type(model).__name__}, which are fused"
        raise ValueError(explain(f"{name} (format='compressed-tensors')", expected, got, "Use format='folded'."))


def _check_inputs(inputs: FakeQuantizer, weight: TensorSpec, refuse: Any) -> None:
    spec = inputs.spec
    if overrides(inputs.estimator, "transform", "assign", "decode"):
        got = f"what {type(inputs.estimator).__name__.lower()} does to them"
        raise refuse("inputs rounded to the nearest level", got, "Use format='folded'.")
    if spec.scale_format == "e4m3":
        cure = "Its readers want a divisor that was calibrated: train with nvfp4a16."
        raise refuse("inputs in float beside nvfp4 weights", "nvfp4", cure)
    if spec.grid == "int" and weight.grid != "int":
        raise refuse("inputs on the weights' kind of grid", "integers beside floats", "Use fp8, mxfp4 or mxfp8.")
    if (spec.grid != "int" and spec.grid != weight.grid) or spec.range not in ("scale", "log2"):
        got = f"grid={spec.grid!r}, range={spec.range!r}"
        raise refuse("evenly spaced levels around 0, or the weights' float grid", got, "Use format='folded'.")
    if spec.grid == "int" and spec.bits != 8:
        raise refuse("8-bit inputs", f"{spec.bits:g} bits", "Use format='folded', or train with a8.")
