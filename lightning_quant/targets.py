"""What each runtime asks of training, so that nothing has to be rounded once more when the model is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A runtime.

    Args:
        format: Export format it reads, for a transformers model.
        reader_scale: Dynamic int8 scales are absmax / 127.5, as compressed-tensors computes in transformers, and
            torchao; else absmax / 127, as integer kernels do.
        joins_rows: A 2-D input has one dynamic scale for all of it, else one per row.
        group_size: Weights that share a scale along a row, where the file's blocks have that size.
        scale_format: What a file stores weight scales in (a name of ``SCALE_FORMATS``).
        static_inputs: Ranges of activations are constants in the file.
        fused: Names of layers that the runtime fuses into one, with one scale for their common input.
    """

    format: str
    reader_scale: bool = False
    joins_rows: bool = False
    group_size: int | None = None
    scale_format: str = "float"
    static_inputs: bool = False
    fused: tuple[tuple[str, ...], ...] = ()


TARGETS: dict[str, Target] = {
    "vllm": Target("compressed-tensors", fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))),
    "transformers": Target("compressed-tensors", reader_scale=True, joins_rows=True),
    "gptq": Target("gptq", scale_format="float16"),
    "torchao": Target("torchao", reader_scale=True),
    "llama.cpp": Target("gguf", group_size=32, scale_format="float16"),
    "onnxruntime": Target("onnx", static_inputs=True),
    "openvino": Target("onnx", static_inputs=True),
}
