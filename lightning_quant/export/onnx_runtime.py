"""Read an ONNX file that was exported here and run it through onnxruntime, exactly as it is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.onnx_inputs import arguments
from lightning_quant.export.onnx_qdq import MODEL_FILE


def read_model(path: str | Path, whole: bool = True) -> Any:
    """The ``onnx.ModelProto`` of a file, or of the directory that ``export`` wrote.

    Args:
        path: File or directory.
        whole: With what is stored in ``model.onnx.data``, if there is such a file.

    Raises:
        CheckpointError: No such file, or a damaged one.
    """
    import onnx
    from google.protobuf.message import DecodeError

    file = _file(path)
    try:
        return onnx.load(str(file), load_external_data=whole)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise CheckpointError(
            explain(str(file), "a whole ONNX file", f"{type(error).__name__}: {error}", "Export again.")
        ) from error


def _file(path: str | Path) -> Path:
    return Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)


def constants(path: str | Path) -> dict[str, Tensor]:
    """The file's constants by name; 4-bit integers come as int8."""
    import onnx

    found = {}
    for tensor in read_model(path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        narrow = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        found[tensor.name] = torch.tensor(array.astype("int8") if narrow else array)
    return found


def feeds(model: Any, inputs: Any) -> dict[str, Tensor]:
    """The model's inputs by name.

    Args:
        model: ``onnx.ModelProto``.
        inputs: A tensor, a tuple (in the file's order) or a mapping of names; what is no tensor is part of the file.

    Raises:
        ValueError: Other names, or another number of them.
    """
    names = [value.name for value in model.graph.input]
    args, kwargs = arguments(inputs)
    tensors = [value for value in args if isinstance(value, Tensor)]
    given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if len(tensors) + len(given) != len(names) or set(given) != {*names[len(tensors) :]}:
        got = f"{len(tensors)} positional and {sorted(given)}"
        raise ValueError(explain("inputs", f"one tensor for each of {names}", got, "Name them, or keep their order."))
    return {name: value.detach().cpu() for name, value in {**dict(zip(names, tensors, strict=False)), **given}.items()}


def run_onnxruntime(path: str | Path, inputs: Any, also: Iterable[str] = ()) -> dict[str, Tensor]:
    """Outputs, and other values, of the file as onnxruntime computes it without rewriting the graph.

    Args:
        path: File, or the directory that ``export`` wrote.
        inputs: As ``feeds`` takes them.
        also: Names of values inside the graph; they are made outputs in memory, the file stays.

    Returns:
        Value by name, the model's outputs first.
    """
    import onnx
    import onnxruntime

    model = read_model(path, whole=False)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for name in {*also} - {value.name for value in model.graph.output}:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kinds[name], None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(_file(path).parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in feeds(model, inputs).items()})
    return {out.name: torch.from_numpy(value) for out, value in zip(session.get_outputs(), found, strict=True)}
