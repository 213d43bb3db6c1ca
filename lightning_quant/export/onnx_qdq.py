"""The ONNX format: integer weights behind DequantizeLinear, activations through QuantizeLinear and DequantizeLinear.

Every runtime that reads ONNX knows this form ("QDQ").  In a copy of the model each quantizer's forward is replaced by
the operators themselves, and the copy is traced in evaluation mode:

    weights       codes (int8; int4, two to a byte, up to 4 bits) -> DequantizeLinear(scale, zero point)
    activations   QuantizeLinear -> [Clip] -> DequantizeLinear, in uint8, one scale and zero point per tensor

A code c of a b-bit activation is stored as c + 2^(b-1).  Saturation at 0 and 255 is what 8 bits need; narrower grids
have a Clip on the stored integers, which is exact and moves no value between levels.  (UINT4 would do without for
4 bits, but onnxruntime 1.31 fails on it: its optimizer refuses a ReLU6 before such a QuantizeLinear.)

onnxruntime without graph optimization computes what evaluation computes, up to the order in which floats are summed.
With its default optimizations it runs integer kernels and rounds some values differently.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.experts import ExpertWeight
from lightning_quant.export.onnx_inputs import example_inputs
from lightning_quant.export.onnx_trace import BITS, QUANTIZER, finish, trace
from lightning_quant.export.writer import Sink, float_tensors, write_model_files
from lightning_quant.layers import QuantLayer, unpack_all
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
LARGEST = 2**31 - 2**26  # bytes of constants in the file itself: a protobuf message ends at 2 GiB


def write_onnx(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any
) -> None:
    """Write ``model.onnx``, beside it ``model.onnx.data`` for constants that are too many for one file.

    The batch, the inputs' first dimension, stays free, and of text the number of tokens.

    Raises:
        ValueError: No example inputs, a layer ONNX has no exact form for (named), or a forward that cannot be traced.
    """
    args, kwargs = example_inputs(model, inputs)
    _check_model(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or (parameter.is_floating_point() and parameter.dtype != torch.float32):
            got = "a sharded one" if hasattr(parameter, "full_tensor") else str(parameter.dtype)
            cure = "Load the checkpoint in one process and call model.float(); its codes and scales stay."
            raise ValueError(explain(f"{name} (format='onnx')", "a whole float32 parameter", got, cure))
    if sink.writes:
        program = trace(_with_operators(model), args, kwargs)
        finish(program.model)
        held = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        program.save(sink.directory / MODEL_FILE, external_data=held > LARGEST)
        sink.file(MODEL_FILE, sum(tensor.numel() * tensor.element_size() for _, tensor, _ in float_tensors(model)))
        if held > LARGEST:
            sink.file(DATA_FILE, 0)
    write_model_files(model, sink, tokenizer, config, None)


def check_onnx(model: nn.Module) -> None:
    """Refuse, before training, what ``write_onnx`` without inputs would refuse after it; nothing is traced."""
    _check_model(model, trained=False)
    if hasattr(model, "save_pretrained"):
        example_inputs(model, None)


def is_onnx(path: Path) -> bool:
    """Whether the file is there."""
    return (path / MODEL_FILE).is_file()


def _check_model(model: nn.Module, trained: bool = True) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        cure = "pip install lightning-quant[onnx]."
        raise ValueError(explain("format='onnx'", "onnx and onnxscript", f"no {' and no '.join(missing)}", cure))
    for path, layer in quant_layers(model):
        if isinstance(layer, ExpertWeight):
            where, got = f"{path} (format='onnx')", "experts in one tensor, of which each token chooses some"
            cure = "Use format='compressed-tensors' or 'gguf'."
            raise ValueError(explain(where, "layers that every token goes through", got, cure))
    for path, quantizer in quantizers(model):
        _check(path, quantizer, trained)


def _check(path: str, q: FakeQuantizer, trained: bool) -> None:
    """Refuse what DequantizeLinear cannot say, so that what is written computes what was trained."""

    def refuse(expected: str, got: object, cure: str) -> ValueError:
        return ValueError(explain(f"{path} (format='onnx')", expected, got, cure))

    method = type(q.estimator).__name__.lower()
    otherwise = "Use format='folded'." if q.is_weight else "Train with float activations (a16), or method='ste'."
    if q.table is not None:
        raise refuse("evenly spaced levels", f"grid={q.spec.grid!r}", f"Train with grid='int'. {otherwise}")
    if overrides(q.estimator, "decode") or (not q.is_weight and overrides(q.estimator, "transform", "assign")):
        raise refuse("values rounded to the nearest of evenly spaced levels", f"what {method} does", otherwise)
    if q.range.affine:
        got, cure = f"a grid shifted by a real number (range={q.spec.range!r})", "Train with range='scale'."
        raise refuse("an integer zero point", got, cure)
    if _half(q) and not (q.is_weight and q.spec.bits < 8):
        got = f"levels on both sides of 0 but none at 0 ({q.spec.bits:g} bits, grid={q.spec.grid!r})"
        raise refuse("an integer zero point", got, f"Train with grid='int' of 2 bits or more. {otherwise}")
    if not q.is_weight and q.spec.dynamic:
        cure = "Train with -static in the scheme, e.g. w8a8-static."
        raise refuse("activations on a static range", "a range per token, taken anew at every call", cure)
    if trained and not q.ready:
        raise refuse("a calibrated range", "none yet", "Train, or call calibrate(model, batches).")
    if q.is_weight and q.granularity.kind == "group" and len(q.shape) != 2:
        raise refuse("groups along the rows of a matrix", f"a weight of shape {q.shape}", "Train with -channel.")
    if q.is_weight and q.granularity.kind == "pixel" and len(q.shape) > 2:
        raise refuse("scales per tensor, channel or group", "one per place of the kernel", "Train with -channel.")


class _Operators(FakeQuantizer):
    """A quantizer in the traced copy: it holds constants and its forward is ONNX operators.

    Constants are ``_scale`` and ``_zero``, and for weights ``_codes``; ``_finish`` renames them.
    """

    notes: dict[str, str]

    def become(self, path: str, bits: float, **constants: Tensor) -> None:
        """Let these be all the tensors it holds."""
        self._parameters.clear()
        self._buffers.clear()
        for name, value in constants.items():
            self.register_buffer(name, value.clone())
        self.notes = {QUANTIZER: path, BITS: f"{bits:g}"}


class _Weight(_Operators):
    """DequantizeLinear of constant codes; the weight that is handed in is not looked at."""

    attributes: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        constants, kind = [self._codes, self._scale, self._zero], torch.float32
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", constants, self.attributes, dtype=kind, shape=self.shape, metadata_props=self.notes
        )


class _Activation(_Operators):
    """QuantizeLinear, a Clip unless the codes fill eight bits, DequantizeLinear."""

    def forward(self, x: Tensor) -> Tensor:
        def operator(name: str, of: Tensor, *more: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.onnx.ops.symbolic(name, [of, *more], dtype=dtype, shape=x.shape, metadata_props=self.notes)

        code = operator("QuantizeLinear", x, self._scale, self._zero, dtype=torch.uint8)
        if self.high - self.low < 255:
            low, high = (torch.tensor(end - _lowest(self), dtype=torch.uint8) for end in (self.low, self.high))
            code = operator("Clip", code, low, high, dtype=torch.uint8)
        return operator("DequantizeLinear", code, self._scale, self._zero, dtype=x.dtype)


def _half(q: FakeQuantizer) -> bool:
    """Whether levels lie half a step off 0: +-1/2, +-3/2, ..."""
    return q.grid.zero == -0.5


def stored_weight(layer: QuantLayer) -> tuple[Tensor, Tensor, Tensor, float]:
    """Codes, scale, zero point and width of a weight as they are stored.

    Levels half a step off 0 are odd numbers of half steps, of one bit more, with zero point 0: the same floats.

    Returns:
        Codes, int8, in the weight's shape; scales and zero points (int8), 0-dim per tensor, 1-D per channel, per group
        in the weight's shape with a number for each group; bits.
    """
    q = layer.weight_quant
    codes, scale, zero, _ = q.stored(layer.folded()[0])
    bits = q.spec.bits
    if _half(q):
        codes, scale, zero, bits = 2 * codes + 1, scale / 2, 0.0, bits + 1
    zero = zero if isinstance(zero, Tensor) else torch.full_like(scale, zero)
    if q.granularity.kind == "group":
        scale, zero = (t.T.contiguous() if q.granularity.axis else t for t in (scale, zero))
    else:
        scale, zero = (t.reshape(() if q.granularity.kind == "tensor" else (-1,)) for t in (scale, zero))
    return codes, scale, zero.to(torch.int8), bits


def _lowest(q: FakeQuantizer) -> int:
    """The activation code that is stored as 0."""
    return -(1 << int(q.spec.bits) - 1)


def zero_point(q: FakeQuantizer) -> Tensor:
    """The zero point of an activation as it is stored, uint8, 0-dim."""
    return (torch.as_tensor(q.range.zero(q)).reshape(()) - _lowest(q)).to(torch.uint8)


@torch.no_grad()
def _with_operators(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose quantizers are ONNX operators on constants; it shares the model's parameters.

    Weights that are one tensor in the model, on one grid, are stored once, under the name of the first.
    """
    shared = {id(p): nn.Parameter(p.detach().cpu(), requires_grad=False) for p in model.parameters() if _plain(p)}
    traced = unpack_all(copy.deepcopy(model, shared)).cpu().eval()
    for module in traced.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # outputs are tensors, not a cache
        if "_original_forward" in module.__dict__:  # accelerate's, which turns autocast on
            del module.__dict__["forward"], module.__dict__["_original_forward"]
    first: dict[int, FakeQuantizer] = {}
    for path, layer in quant_layers(traced):
        _, bias = layer.folded()
        _become_weight(f"{path}.weight_quant" if path else "weight_quant", layer)
        layer.__dict__.pop("folds", None)
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        if isinstance(layer.weight, nn.Parameter):
            owner: Any = first.setdefault(id(layer.weight), layer.weight_quant)
            if owner is not layer.weight_quant and _alike(owner, layer.weight_quant):
                layer.weight_quant = owner
    for path, q in quantizers(traced):
        if not q.is_weight:
            scale, zero = q.range.scale(q).reshape(()), zero_point(q)
            q.__class__ = _Activation
            q.become(path, q.spec.bits, _scale=scale, _zero=zero)  # type: ignore[operator]
    return traced


def _plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter


def _alike(one: Any, other: Any) -> bool:
    """Whether two weights are stored as the same numbers."""
    mine, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    return one.attributes == other.attributes and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _become_weight(path: str, layer: QuantLayer) -> None:
    codes, scale, zero, bits = stored_weight(layer)
    q = layer.weight_quant
    q.attributes = {}  # type: ignore[assignment]
    if q.granularity.kind == "group":
        q.attributes = {"axis": 1 - (q.granularity.axis or 0), "block_size": q.granularity.group_size}  # type: ignore[assignment]
    elif q.granularity.kind != "tensor":
        q.attributes = {"axis": q.granularity.axis}  # type: ignore[assignment]
    q.__class__ = _Weight
    q.become(path, bits, _codes=codes, _scale=scale, _zero=zero)  # type: ignore[operator]
