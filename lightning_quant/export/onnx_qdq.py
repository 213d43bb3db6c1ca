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

import ast
import copy
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.export.writer import Sink, float_tensors, write_model_files
from lightning_quant.layers import QuantLayer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig

MODEL_FILE = "model.onnx"
OPSET = 21  # the first with 4-bit integers and scales per block
QUANTIZER, BITS = "lightning_quant.quantizer", "lightning_quant.bits"  # notes on QuantizeLinear and DequantizeLinear
PRODUCTS = {"QuantizeLinear": "quantized", "Clip": "clipped", "DequantizeLinear": "real"}


def write_onnx(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any
) -> None:
    """Write ``model.onnx``.  The batch, the inputs' first dimension, stays free.

    Raises:
        ValueError: No example inputs, a layer ONNX has no exact form for (named), or a forward that cannot be traced.
    """
    args, kwargs = example_inputs(model, inputs)
    for path, quantizer in quantizers(model):
        _check(path, quantizer)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or (parameter.is_floating_point() and parameter.dtype != torch.float32):
            got = "a sharded one" if hasattr(parameter, "full_tensor") else str(parameter.dtype)
            cure = "Load the checkpoint in one process and call model.float(); its codes and scales stay."
            raise ValueError(explain(f"{name} (format='onnx')", "a whole float32 parameter", got, cure))
    if sink.writes:
        program = _trace(_with_operators(model), args, kwargs)
        _finish(program.model)
        program.save(sink.directory / MODEL_FILE)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor, _ in float_tensors(model))
        sink.file(MODEL_FILE, size)
    write_model_files(model, sink, tokenizer, config, None)


def check_onnx(model: nn.Module) -> None:
    """Refuse, before training, a quantizer that ``write_onnx`` would refuse after it; nothing is traced."""
    for path, quantizer in quantizers(model):
        _check(path, quantizer, trained=False)


def is_onnx(path: Path) -> bool:
    """Whether the file is there."""
    return (path / MODEL_FILE).is_file()


def example_inputs(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments to trace a model with, of at least two samples.

    One sample would be repeated: tracing takes a batch of 1 for a constant.

    Args:
        model: A LightningModule's ``example_input_array`` stands in for missing inputs.
        inputs: One tensor, a tuple or list (positional), a mapping (keywords), or None.

    Raises:
        ValueError: None, or tensors that do not share their first dimension.
    """
    if inputs is None:
        inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        cure = "Pass inputs=, a tensor, tuple or mapping as forward takes it, or set example_input_array."
        raise ValueError(explain("format='onnx'", "example inputs to trace the model with", "none", cure))
    args, kwargs = arguments(inputs)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    sizes = {len(t) if t.ndim else 0 for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        got = f"shapes {[tuple(t.shape) for t in tensors]}"
        raise ValueError(explain("inputs", "tensors whose first dimension is one batch", got, "Pass such inputs."))

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return torch.cat([value, value]) if len(value) == 1 else value

    return tuple(prepare(v) for v in args), {k: prepare(v) for k, v in kwargs.items()}


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, tuple, list or mapping as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _check(path: str, q: FakeQuantizer, trained: bool = True) -> None:
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
    if q.is_weight and q.granularity.kind == "group" and (len(q.shape) != 2 or q.granularity.axis != 0):
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
        Codes, int8, in the weight's shape; scales and zero points (int8), each as its quantizer shapes them; bits.
    """
    q = layer.weight_quant
    codes, scale, zero, _ = q.stored(layer.folded()[0])
    bits = q.spec.bits
    if _half(q):
        codes, scale, zero, bits = 2 * codes + 1, scale / 2, 0.0, bits + 1
    zero = zero if isinstance(zero, Tensor) else torch.full_like(scale, zero)
    return codes, scale, zero.to(torch.int8), bits


def _lowest(q: FakeQuantizer) -> int:
    """The activation code that is stored as 0."""
    return -(1 << int(q.spec.bits) - 1)


def zero_point(q: FakeQuantizer) -> Tensor:
    """The zero point of an activation as it is stored, uint8, 0-dim."""
    return (torch.as_tensor(q.range.zero(q)).reshape(()) - _lowest(q)).to(torch.uint8)


@torch.no_grad()
def _with_operators(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose quantizers are ONNX operators on constants."""
    traced = copy.deepcopy(model).cpu().eval()
    for path, layer in quant_layers(traced):
        _, bias = layer.folded()
        _become_weight(f"{path}.weight_quant" if path else "weight_quant", layer)
        layer.__dict__.pop("folds", None)
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    for path, q in quantizers(traced):
        if not q.is_weight:
            scale, zero = q.range.scale(q).reshape(()), zero_point(q)
            q.__class__ = _Activation
            q.become(path, q.spec.bits, _scale=scale, _zero=zero)  # type: ignore[operator]
    return traced


def _become_weight(path: str, layer: QuantLayer) -> None:
    codes, scale, zero, bits = stored_weight(layer)
    q = layer.weight_quant
    attributes: dict[str, Any] = {}
    if q.granularity.kind == "group":
        attributes = {"axis": 1, "block_size": q.granularity.group_size}
    else:
        whole = q.granularity.kind == "tensor"
        attributes = {} if whole else {"axis": q.granularity.axis}
        scale, zero = (t.reshape(() if whole else (-1,)) for t in (scale, zero))
    q.__class__ = _Weight
    q.become(path, bits, _codes=codes, _scale=scale, _zero=zero)  # type: ignore[operator]
    q.attributes = attributes  # type: ignore[assignment]


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    batch = torch.export.Dim("batch")
    try:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments  # as torch.export names them
    except TypeError as error:
        expected = f"arguments of {type(model).__name__}.forward{inspect.signature(model.forward)}"
        raise ValueError(explain("inputs", expected, error, "Pass what forward takes.")) from error
    shapes = tree_map(lambda value: {0: batch} if isinstance(value, Tensor) else None, dict(named))
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        expected = "a forward that torch.export can trace with a batch of any size"
        got = f"{type(error.__cause__ or error).__name__}: {str(error.__cause__ or error).strip().splitlines()[0]}"
        cure = "Keep decisions on values and on the batch's size out of forward; the error above has the place."
        raise ValueError(explain(f"{type(model).__name__} (format='onnx')", expected, got, cure)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says about packages that are not installed and about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*flatten dynamic_shapes.*")  # an argument that is no tensor
            yield
    finally:
        logger.setLevel(level)


def _finish(model: Any) -> None:
    """Give every quantizer its own named constants, pack narrow codes, drop the trace's notes (they hold source paths).

    The exporter lets layers share small constants that are equal.  Afterwards a reader finds ``<path>.codes``,
    ``<path>.scale`` and ``<path>.zero`` for every quantizer, and node names begin with the module's path.

    Args:
        model: An ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir as ir

    graph, own = model.graph, {}
    calls: Counter[str] = Counter()
    for node in graph.all_nodes():
        notes = dict(node.metadata_props)
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "['', '']"))
        node.name = f"{scopes[-2]}/{node.name}" if scopes[-2] else node.name
        node.doc_string = None
        node.metadata_props.clear()
        if QUANTIZER not in notes:
            continue
        product = f"{notes[QUANTIZER]}.{PRODUCTS[node.op_type]}"
        calls[product] += 1
        if not node.outputs[0].is_graph_output():
            node.outputs[0].name = product if calls[product] == 1 else f"{product}_{calls[product]}"
        if node.op_type == "Clip":
            continue
        node.metadata_props.update({key: notes[key] for key in (QUANTIZER, BITS)})
        for i, part in enumerate(("codes", "scale", "zero")):
            shared, name = node.inputs[i], f"{notes[QUANTIZER]}.{part}"
            if shared.is_initializer():
                if name not in own:
                    kind, array = shared.dtype, shared.const_value.numpy()
                    if kind == ir.DataType.INT8 and float(notes[BITS]) <= 4:
                        kind = ir.DataType.INT4
                    tensor = ir.Tensor(array.astype(kind.numpy()), dtype=kind, name=name)
                    own[name] = ir.Value(
                        name=name, type=ir.TensorType(kind), shape=ir.Shape(array.shape), const_value=tensor
                    )
                node.replace_input_with(i, own[name])
    for value in [v for v in graph.initializers.values() if not v.uses()]:
        del graph.initializers[value.name]
    for value in own.values():
        graph.register_initializer(value)
