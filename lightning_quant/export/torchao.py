"""torchao's format, as transformers loads it: its tensor classes made of trained integers and scales.

=====================  ==============================================  ==========================================
weights                inputs                                          class
=====================  ==============================================  ==========================================
8 bits per channel     float                                           Int8Tensor (what Int8WeightOnly makes)
2 to 8 bits            float                                           IntxUnpackedToInt8Tensor (IntxWeightOnly)
2 to 8 bits/channel    8 bits, per token                               Int8Tensor with PerRow inputs
=====================  ==============================================  ==========================================

Every code takes a byte, whatever its width: torchao has no packed form that every processor runs.  Its 4-bit groups
beside quantized inputs round those around a zero point of their own at every call, which nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import float_paths
from lightning_quant.attach import quant_layers
from lightning_quant.distributed import whole
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.export.layout import Matrix, stored_parts
from lightning_quant.export.linear_only import FOLDED, check_linear_only, float_linears
from lightning_quant.export.stored import StoredTensors, read_json, unequal
from lightning_quant.export.weights import float_tensors
from lightning_quant.export.writer import Sink, write_model_files
from lightning_quant.layers import QuantLayer, float_dtype
from lightning_quant.spec import QuantConfig

METHOD = "torchao"
FLOAT_ERROR = 1e-5  # of the largest logit, in float32
HALF_ERROR = 8  # the same in half precision, in units of its rounding: torchao rounds products before it scales them


def write_torchao(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any = None
) -> None:
    """Write int8 codes and scales, and in every file's header the class each weight is an instance of.

    Raises:
        ValueError: See ``check_torchao``.
    """
    check_model(model)
    sink.metadata = {**sink.metadata, **header(model)}
    for name, tensor, layer in sink.weights(model):
        if layer is None:
            sink.add(name, whole(tensor))
            continue
        (matrix,) = stored_parts(model, name, layer)
        size = tensor.numel() * tensor.element_size()
        for suffix, value in parts(matrix, layer).items():
            sink.add(f"{matrix.path}._weight_{suffix}", value, size)
            size = 0
    write_model_files(model, sink, tokenizer, config, quantization_config(model))


def check_torchao(model: nn.Module) -> None:
    """Refuse, before training, what ``write_torchao`` would refuse after it."""
    check_model(model)


def is_torchao(path: Path) -> bool:
    """Whether config.json says so."""
    config = path / "config.json"
    found = read_json(config).get("quantization_config", {}) if config.is_file() else {}
    return isinstance(found, dict) and found.get("quant_method") == METHOD


class StoredTorchao(StoredTensors):
    """Read by transformers."""

    format = METHOD
    rule = METHOD
    reason = "torchao sums integers, or codes before they are scaled, in another order than training sums floats"

    def layer(self, model: nn.Module, name: str, layer: QuantLayer) -> tuple[int, float]:
        """See the base class."""
        (matrix,) = stored_parts(model, name, layer)
        differ, apart = 0, 0.0
        for suffix, own in parts(matrix, layer).items():
            found = self.tensor(f"{matrix.path}._weight_{suffix}")
            if suffix != "scale":
                differ += unequal(found, own)
            elif unequal(found, own):
                alike = found.shape == own.shape and found.dtype == own.dtype
                gap = float((found.double() - own.double().cpu()).abs().max()) if alike else math.nan
                apart = max(apart, gap if gap == gap else math.inf)
        return differ, apart

    def odd(self, trained: nn.Module) -> list[str]:
        """See the base class."""
        own, wrong = header(trained), set()
        for file in sorted({*self.files.values()}):
            with self._open(file) as opened:
                found = opened.metadata() or {}
            wrong |= {
                f"header of {file}: {key}" for key in {*own, *found} - {"format"} if own.get(key) != found.get(key)
            }
        return sorted(wrong) + super().odd(trained)

    @contextmanager
    def following(self, trained: nn.Module, shipped: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, layers get their inputs as torchao rounds them.

        The largest magnitude of a row lies at 127.5 in code units, halfway between two codes: the last bit of a sum
        before it, and that torchao multiplies by 1 / scale where training divides, decide which one it comes to.  A
        layer is therefore handed the reader's own input, if that is the trained model's up to float error.
        """
        names = float_paths(trained)
        read: dict[str, list[Tensor]] = {}
        found = {str(names[path]): layer for path, layer in quant_layers(trained) if layer.input_quant is not None}

        def keep(name: str) -> Any:
            return lambda module, args: read.setdefault(name, []).append(args[0].detach().clone())

        handles = [shipped.get_submodule(name).register_forward_pre_hook(keep(name)) for name in found]
        try:
            output = shipped(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        dtype = float_dtype(trained)
        share = FLOAT_ERROR if dtype == torch.float32 else HALF_ERROR * torch.finfo(dtype).eps
        self.tolerance = share * max(1.0, float(output[0].abs().max()))
        moved = rounded = 0

        def hand_over(name: str) -> Any:
            def hook(quantizer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
                nonlocal moved, rounded
                theirs, own = read[name].pop(0).to(output.device), args[0]
                if (theirs - own).abs().max() > share * own.abs().max().clamp(min=1):
                    theirs = own  # another value, which outputs then show
                value = reciprocal(theirs)
                moved, rounded = moved + int(((value - output).abs() > 0.5 * _scale(own)).sum()), rounded + own.numel()
                return value

            return hook

        handles = [layer.input_quant.register_forward_hook(hand_over(name)) for name, layer in found.items()]  # type: ignore[union-attr]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if rounded:
            self.notes.append(
                f"{moved} of {rounded} inputs come to another code in torchao than in training, as the end of a range "
                "does, which lies halfway between two; layers are compared on the same codes"
            )

    def quantization(self, trained: nn.Module) -> dict[str, Any] | None:
        """See the base class."""
        return quantization_config(trained)


def reciprocal(x: Tensor) -> Tensor:
    """``x`` on torchao's 8-bit grid per row: x * (1 / scale) rounded, with scale = absmax / 127.5."""
    scale = _scale(x)
    return (torch.clamp(torch.round(x * (1.0 / scale)), -128, 127) * scale).to(x.dtype)


def _scale(x: Tensor) -> Tensor:
    return (x.abs().amax(-1, keepdim=True) / 127.5).float().clamp(min=torch.finfo(torch.float32).eps)


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; which class a weight has is said in the files."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    dense = [*float_linears(model)]
    found: dict[str, Any] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=dense).to_dict()
    return found


def header(model: nn.Module) -> dict[str, str]:
    """What torchao's reader looks up of every tensor, written by torchao itself for tensors without values."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    kinds = {}
    for name, tensor, layer in float_tensors(model):
        kinds[name] = torch.empty(0) if layer is None else instance(_empty(name, tensor, layer), layer)
    found: dict[str, str] = flatten_tensor_state_dict(kinds)[1]
    return found


def parts(matrix: Matrix, layer: QuantLayer) -> dict[str, Tensor]:
    """The tensors that an instance of torchao's class is made of, by their names in it."""
    dtype = layer.weight.dtype
    found = {"qdata": matrix.codes, "scale": matrix.scale.to(dtype)}
    if not _is_int8(layer):
        zero = torch.zeros_like(matrix.scale) if matrix.zero is None else matrix.zero
        found["zero_point"] = zero.to(torch.int8)
    return {name: value.contiguous() for name, value in found.items()}


def instance(matrix: Matrix, layer: QuantLayer) -> Tensor:
    """What torchao computes with."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    held, dtype = parts(matrix, layer), layer.weight.dtype
    spec = layer.weight_quant.spec
    size = [1, matrix.codes.shape[1] // matrix.scale.shape[1]]
    if _is_int8(layer):
        rounds = None if layer.input_quant is None else QuantizeTensorToInt8Kwargs(granularity=PerRow())
        found: Tensor = Int8Tensor(held["qdata"], held["scale"], size, dtype, act_quant_kwargs=rounds)
        return found
    last: Tensor = IntxUnpackedToInt8Tensor(
        **held,
        target_dtype=getattr(torch, f"int{int(spec.bits)}"),
        block_size=size,
        dtype=dtype,
        activation_quantization=None,
    )
    return last


def check_model(model: nn.Module) -> None:
    """Refuse what torchao has no class for.

    Args:
        model: A model with quantizers.

    Raises:
        ValueError: No torchao, a model that is not transformers', or a layer (named) that cannot be said.
    """
    where = f"format={METHOD!r}"
    if find_spec("torchao") is None:
        raise ValueError(explain(where, "torchao", "none installed", "pip install lightning-quant[torchao]."))
    check_linear_only(model, METHOD)
    for path, layer in quant_layers(model):
        _check_layer(path, layer)


def _check_layer(path: str, layer: QuantLayer) -> None:
    def refuse(expected: str, got: object, cure: str = FOLDED) -> ValueError:
        return ValueError(explain(f"{path} (format={METHOD!r})", expected, got, cure))

    q, inputs = layer.weight_quant, layer.input_quant
    spec = q.spec
    if spec.grid != "int" or q.range.affine or q.grid.zero not in (0, None) or spec.bits not in range(2, 9):
        raise refuse("integers of 2 to 8 bits around a zero point", f"grid={spec.grid!r}, {spec.bits:g} bits")
    if overrides(q.estimator, "decode"):
        raise refuse("evenly spaced levels", f"levels that {type(q.estimator).__name__.lower()} chose")
    if inputs is None:
        return
    own = inputs.spec
    if overrides(inputs.estimator, "transform", "assign", "decode") or own.grid != "int" or own.range != "scale":
        raise refuse("inputs rounded to the nearest integer", f"what {type(inputs.estimator).__name__.lower()} does")
    if not own.dynamic or own.granularity != "token" or own.bits != 8:
        cure = "Train with -dynamic in the scheme, e.g. w8a8-dynamic."
        raise refuse("8-bit inputs on a range per token", f"{own.bits:g} bits per {own.granularity}", cure)
    if not spec.symmetric or spec.granularity == "group":
        got = "groups" if spec.symmetric else "zero points"
        cure = "Train with -channel and without -asym, or with float activations (a16)."
        raise refuse("symmetric weights per channel beside quantized inputs", got, cure)
    if inputs.target != METHOD:
        cure = f"Train with target={METHOD!r}, whose scales are absmax / 127.5 in every layer."
        raise refuse(f"training with target={METHOD!r} where inputs are rounded", repr(inputs.target), cure)


def _is_int8(layer: QuantLayer) -> bool:
    spec = layer.weight_quant.spec
    plain = spec.bits == 8 and bool(spec.symmetric) and spec.granularity == "channel"
    return layer.input_quant is not None or plain


def _empty(name: str, tensor: Tensor, layer: QuantLayer) -> Matrix:
    """A matrix of the right shape without values."""
    groups = layer.weight_quant.scale_shape[-1]
    scale = torch.empty(len(tensor), groups, device="meta")
    codes = torch.empty(tensor.shape, dtype=torch.int8, device="meta")
    return Matrix(name.removesuffix(".weight"), codes, scale)
