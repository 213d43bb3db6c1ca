"""The GGUF format of llama.cpp, written from trained integers and scales.

Blocks of 32 weights share a step in half precision, so that training with ``target='llama.cpp'`` is what makes the
file hold the trained numbers: nothing is rounded here.  Codes narrower than 4 bits go into 4-bit blocks as they are.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.attach import ALIKE, EVERYWHERE, quant_layers, read_in_float
from lightning_quant.distributed import whole
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.export.gguf_blocks import BLOCK, BLOCK_TYPES, Blocks, is_half, pack, per_block, smallest_type
from lightning_quant.export.gguf_metadata import add_settings, check_config, extra_tensors
from lightning_quant.export.gguf_names import Part, architecture, parts
from lightning_quant.export.gguf_tokenizer import add_tokenizer
from lightning_quant.export.writer import Sink, write_model_files
from lightning_quant.kv_cache import kv_quantizers
from lightning_quant.layers import QuantLayer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig

MODEL_FILE = "model.gguf"
TRAIN = "Train with target='llama.cpp'."


def write_gguf(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any = None
) -> None:
    """Write one file, and config.json and the tokenizer beside it.

    Data goes to a file of its own while the tensors come by, one at a time, and is put behind the header, which
    needs the shapes of all, in the end.

    Raises:
        ValueError: See ``check_gguf``; or a scale is no half-precision number.
    """
    check_model(model)
    size = 0
    with _Data(sink.directory / f"{MODEL_FILE}.data", sink.writes) as data:
        for name, tensor, layer in sink.weights(model):
            size += tensor.numel() * tensor.element_size()
            held = stored_float(model, name, tensor) if layer is None else stored_blocks(model, name, layer)
            for part, kind, value in held:
                data.add(part.name, kind, value)
        for name, tensor in extra_tensors(model).items():
            data.add(name, "F32", tensor)
    if sink.writes:
        data.finish(metadata(model, tokenizer), sink.directory / MODEL_FILE)
        sink.file(MODEL_FILE, size)
    write_model_files(model, sink, tokenizer, config, None)


def check_gguf(model: nn.Module) -> None:
    """Refuse, before training, what ``write_gguf`` would refuse after it."""
    check_model(model, trained=False)
    metadata(model, None)  # also that the package is there


def is_gguf(path: Path) -> bool:
    """Whether there is such a file."""
    return (path / MODEL_FILE).is_file()


def metadata(model: nn.Module, tokenizer: Any) -> Any:
    """A ``GGUFWriter`` with all keys and no tensors."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(None, architecture(model).name)
    add_settings(writer, model)
    kinds: Counter[str] = Counter()
    for _, layer in quant_layers(model):
        kinds[block_type(layer.weight_quant) or ""] += 1
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kinds.most_common(1)[0][0]}"])
    writer.add_quantization_version(2)
    own: Any = model.config
    add_tokenizer(writer, tokenizer, own.vocab_size, own)
    return writer


def stored_float(model: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[Part, str, Tensor]]:
    """What the file holds of a tensor in float: each part, the name of its type, its values."""
    value = whole(tensor).cpu()
    for part in parts(model, name):
        rows = part.rows(value)
        kind = float_type(part.name, rows)
        yield part, kind, (rows.float() + part.shift if part.shift else rows.to(FLOATS[kind])).contiguous()


def stored_blocks(model: nn.Module, name: str, layer: QuantLayer) -> Iterator[tuple[Part, str, Blocks]]:
    """What the file holds of a trained weight: each part, the name of its type, its blocks.

    Raises:
        ValueError: A scale is no half-precision number.
    """
    blocks, kind = blocks_of(name, layer), block_type(layer.weight_quant)
    assert kind is not None, name  # check_model has seen to it
    for part in parts(model, name):
        minimum = None if blocks.minimum is None else part.rows(blocks.minimum)
        yield part, kind, Blocks(part.rows(blocks.codes), part.rows(blocks.scale), minimum)


FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def float_type(name: str, tensor: Tensor) -> str:
    """Type of a tensor in float: matrices keep theirs, the rest is what llama.cpp wants, float32."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return "F32"
    return next((kind for kind, dtype in FLOATS.items() if dtype == tensor.dtype), "F32")


@torch.no_grad()
def blocks_of(name: str, layer: QuantLayer) -> Blocks:
    """A layer's trained integers and scales in blocks, rows first.

    Raises:
        ValueError: A scale is no half-precision number.
    """
    q = layer.weight_quant
    codes, scale, zero, offset = q.stored(layer.folded()[0])
    codes = codes.movedim(layer.output_axis, 1 if layer.stacked else 0).cpu()
    shape, columns = codes.shape[:-1], codes.shape[-1]
    minimum = None
    if has_minimum(q):
        low = zero * 0 + q.low - zero if isinstance(zero, Tensor) else q.low - zero
        minimum = low * scale if offset is None else low * scale + offset
        codes = (codes.to(torch.int16) - q.low).to(torch.int8)
    found = []
    for what, x in (("scales", scale), ("lowest levels", minimum)):
        if x is not None and not is_half(x):
            raise ValueError(explain(f"{name} (format='gguf')", f"float16 {what}", "others", TRAIN))
        x = None if x is None else x.expand(shape.numel()).unsqueeze(1) if x.ndim == 1 else x
        found.append(None if x is None else per_block(x.reshape(*shape, -1).cpu(), columns))
    assert found[0] is not None
    return Blocks(codes, found[0], found[1])


def has_minimum(q: FakeQuantizer) -> bool:
    """Whether the lowest level is stored beside the step."""
    return q.range.affine or q.grid.zero != 0


def block_type(q: FakeQuantizer) -> str | None:
    """The name of the blocks that hold a weight's codes; None if none do."""
    return smallest_type(q.grid.low, q.grid.high, has_minimum(q))


def check_model(model: nn.Module, trained: bool = True) -> None:
    """Refuse what the format's readers cannot compute.

    Args:
        model: A model with quantizers.
        trained: Whether its scales are those that ship.

    Raises:
        ValueError: Another architecture or setting, a layer with other levels, groups or inputs than blocks hold.
    """
    check_config(model)
    for path, other in read_in_float(model).items():
        raise ValueError(explain(f"{path} (format='gguf')", EVERYWHERE, f"one that {other} reads in float", ALIKE))
    for path in kv_quantizers(model):
        cure = "llama.cpp is told their type when it runs (--cache-type-k, --cache-type-v): leave kv_cache out."
        raise ValueError(explain(f"{path} (format='gguf')", "keys and values in float", "quantized ones", cure))
    for path, layer in quant_layers(model):
        _check_layer(path, layer, trained)


def _check_layer(path: str, layer: QuantLayer, trained: bool) -> None:
    def refuse(expected: str, got: object, cure: str) -> ValueError:
        return ValueError(explain(f"{path} (format='gguf')", expected, got, cure))

    q, spec = layer.weight_quant, layer.weight_quant.spec
    if overrides(q.estimator, "decode"):
        got = f"levels that {type(q.estimator).__name__.lower()} chose"
        raise refuse("evenly spaced levels", got, "Use format='folded'.")
    if q.table is not None:
        raise refuse("evenly spaced levels", f"grid={spec.grid!r}", "Use format='folded'.")
    if block_type(q) is None:
        got = f"{spec.bits:g} bits" + (" and an offset" if has_minimum(q) else "")
        raise refuse(f"one of {', '.join(BLOCK_TYPES)}", got, "Leave -asym out, or use 5 bits or fewer.")
    columns = q.rows[1]
    if columns % BLOCK:
        cure = 'Leave it in float with LayerRule(match=..., weight=None), or use format="folded".'
        raise refuse(f"rows of a multiple of {BLOCK}", columns, cure)
    if spec.granularity == "group" and (spec.group_size or 0) % BLOCK:
        raise refuse(
            f"groups of {BLOCK} or a multiple", spec.group_size, f"Write -g{BLOCK}; or {TRAIN[0].lower()}{TRAIN[1:]}"
        )
    if not trained and q.dtype == torch.float32 and spec.scale_format == "float":
        raise refuse("float16 scales", "float32 ones", TRAIN)
    if layer.input_quant is not None and not _as_llama_cpp(layer.input_quant):
        got = f"{layer.input_quant.spec.bits:g}-bit ones per {layer.input_quant.spec.granularity}"
        cure = (
            "llama.cpp rounds them by itself, per 32 to 8 bits: train with a16, or with what it does, "
            "TensorSpec(8, granularity='group', group_size=32, dynamic=True)."
        )
        raise refuse("float inputs", got, cure)


def _as_llama_cpp(inputs: FakeQuantizer) -> bool:
    """Whether inputs are rounded as llama.cpp's own int8 blocks are."""
    spec = inputs.spec
    if overrides(inputs.estimator, "transform", "assign", "decode") or spec.grid != "int" or not spec.symmetric:
        return False
    return bool(spec.dynamic) and spec.bits == 8 and spec.granularity == "group" and spec.group_size == BLOCK


class _Data:
    """Tensors' bytes on disk, in the order they came, with what the header must say of them.

    Args:
        path: A file that ``finish`` removes.
        writes: Whether this process writes at all.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.infos: list[tuple[str, tuple[int, ...], int, str]] = []
        self.file = path.open("wb") if writes else None

    def __enter__(self) -> _Data:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, name: str, kind: str, value: Tensor | Blocks) -> None:
        """Append one tensor."""
        if self.file is None:
            return
        if isinstance(value, Blocks):
            shape, data = tuple(value.codes.shape), pack(kind, value)
        else:
            shape, data = tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8)
        self.infos.append((name, shape, data.numel(), kind))
        data.numpy().tofile(self.file)
        self._pad(self.file)

    def finish(self, writer: Any, path: Path) -> None:
        """Write the header and what was appended."""
        from gguf import GGMLQuantizationType

        for name, shape, size, kind in self.infos:
            writer.add_tensor_info(name, shape, None, size, raw_dtype=GGMLQuantizationType[kind])
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "ab") as out, open(self.path, "rb") as data:
            self._pad(out)
            shutil.copyfileobj(data, out, 2**24)
        os.remove(self.path)

    @staticmethod
    def _pad(file: Any) -> None:
        file.write(bytes(-file.tell() % BLOCK))  # GGUF's alignment is 32 bytes too
