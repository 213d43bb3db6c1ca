"""Trace a model into an ONNX graph and give what is in it names that a reader can look up."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_quant.errors import explain
from lightning_quant.export.onnx_inputs import free_dimensions

OPSET = 21  # the first with 4-bit integers and scales per block
QUANTIZER, BITS = "lightning_quant.quantizer", "lightning_quant.bits"  # notes on QuantizeLinear and DequantizeLinear
PRODUCTS = {"QuantizeLinear": "quantized", "Clip": "clipped", "DequantizeLinear": "real"}
SLICED = re.compile(r"\.slice\((?P<start>\w+), \w+, (?P<step>\w+)\)\.(?P<place>\d+)")  # list[a:b:c][d] in a scope
OUTSIDE = "_empty_nn_module_stack_from_metadata_hook"  # the scope of what belongs to no module
LOGGERS = ("torch.onnx", "onnxscript.optimizer._constant_folding")


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A ``torch.onnx.ONNXProgram`` of the model.

    Args:
        model: In evaluation mode, its quantizers operators of ONNX.
        args: From ``example_inputs``.
        kwargs: From ``example_inputs``.

    Raises:
        ValueError: Arguments that forward does not take, or a forward that cannot be traced.
    """
    try:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments  # as torch.export names them
    except TypeError as error:
        expected = f"arguments of {type(model).__name__}.forward{inspect.signature(model.forward)}"
        raise ValueError(explain("inputs", expected, error, "Pass what forward takes.")) from error
    shapes = free_dimensions(model, named)
    try:
        with _quiet():
            options: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "verbose": False}
            program: Any = torch.onnx.export(model, args, kwargs=kwargs, dynamic_shapes=shapes, **options)
    except torch.onnx.OnnxExporterError as error:
        expected = "a forward that torch.export can trace with a batch, and a text, of any size"
        got = f"{type(error.__cause__ or error).__name__}: {str(error.__cause__ or error).strip().splitlines()[0]}"
        cure = "Keep decisions on values and on sizes out of forward; the error above has the place."
        raise ValueError(explain(f"{type(model).__name__} (format='onnx')", expected, got, cure)) from error
    names = _output_names(program.exported_program.call_spec.out_spec)
    if len(names) == len(program.model.graph.outputs):
        for value, name in zip(program.model.graph.outputs, names, strict=True):
            value.name = name
    return program


def _output_names(spec: Any) -> list[str]:
    """What a model calls its outputs, where it returns them by name."""
    if not isinstance(spec.context, list) or not all(isinstance(key, str) for key in spec.context):
        return []
    names = []
    for key, child in zip(spec.context, spec.children(), strict=True):
        names += [key] if child.is_leaf() else [f"{key}.{i}" for i in range(child.num_leaves)]
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says about packages that are not installed and about its own attempts."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*flatten dynamic_shapes.*")  # an argument that is no tensor
            warnings.filterwarnings("ignore", message=".*shares? the same shape constraints.*")  # as it should
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _unsliced(found: re.Match[str]) -> str:
    """The place in a list of modules of one that was taken from a slice of it."""
    start, step, place = (int(found[name]) if found[name] != "None" else None for name in ("start", "step", "place"))
    return f".{(start or 0) + (step or 1) * (place or 0)}"


def finish(model: Any) -> None:
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
        path = SLICED.sub(_unsliced, scopes[-2]) if scopes[-2] != OUTSIDE else ""
        node.name = f"{path}/{node.name}" if path else node.name
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
