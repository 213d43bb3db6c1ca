"""GPTQ's format, which vLLM, SGLang and transformers (with gptqmodel) load, written from trained codes and scales.

Of a Linear of (out, in) with G groups along its rows, codes of b bits:

    qweight  int32 (in b / 32, out)   codes + 2^(b-1), 32 / b rows to a word, the first one lowest
    qzeros   int32 (G, out b / 32)    2^(b-1) - 1 everywhere: readers add the 1
    scales   float16 (G, out)
    g_idx    int32 (in)               the group of each row

Source: AutoGPTQ's first version of the format (``checkpoint_format`` "gptq"), as gptqmodel 7.6 reads it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import without_adapters
from lightning_quant.attach import detach, quant_layers
from lightning_quant.distributed import whole
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.export.layout import Matrix, stored_parts
from lightning_quant.export.linear_only import FOLDED, check_linear_only, float_linears
from lightning_quant.export.stored import StoredTensors, read_json, unequal
from lightning_quant.export.weights import float_tensors
from lightning_quant.export.writer import Sink, write_model_files
from lightning_quant.layers import QuantLayer, unpack_all
from lightning_quant.spec import QuantConfig

METHOD = "gptq"
WORD = 32


def write_gptq(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any = None
) -> None:
    """Write packed codes, half-precision scales and the ``quantization_config`` that says how to read them.

    Raises:
        ValueError: See ``check_gptq``.
    """
    check_gptq(model)
    for name, tensor, layer in sink.weights(model):
        if layer is None:
            sink.add(name, whole(tensor))
            continue
        (matrix,) = stored_parts(model, name, layer)
        size = tensor.numel() * tensor.element_size()
        for suffix, value in parts(matrix, layer).items():
            sink.add(f"{matrix.path}.{suffix}", value, size)
            size = 0
    write_model_files(model, sink, tokenizer, config, quantization_config(model))


def is_gptq(path: Path) -> bool:
    """Whether config.json says so."""
    config = path / "config.json"
    found = read_json(config).get("quantization_config", {}) if config.is_file() else {}
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def check_gptq(model: nn.Module) -> None:
    """Refuse what the format cannot say: it has one width and one group size for all Linear layers but the head.

    Raises:
        ValueError: Names the layer.
    """

    def refuse(where: str, expected: str, got: object, cure: str) -> ValueError:
        return ValueError(explain(f"{where} (format={METHOD!r})", expected, got, cure))

    check_linear_only(model, METHOD)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for path, module in float_linears(model).items():
        if module is not head:
            raise refuse(path, "every Linear layer but the head quantized", "one in float", FOLDED)
    first: tuple[str, Any] | None = None
    for path, layer in quant_layers(model):
        q = layer.weight_quant
        spec = q.spec
        if layer is head:
            raise refuse(path, "an output head in float", f"{spec.bits:g} bits", "Train with head=False.")
        if layer.input_quant is not None:
            raise refuse(path, "float inputs", f"{layer.input_quant.spec.bits:g} bits", "Train with a16.")
        even = spec.grid == "int" and q.range.offset(q) is None and not overrides(q.estimator, "decode")
        if not even or not spec.symmetric or spec.bits not in (4, 8):
            got = f"grid={spec.grid!r}, range={spec.range!r}, symmetric={spec.symmetric}, {spec.bits:g} bits"
            raise refuse(path, "integers of 4 or 8 bits around 0", got, FOLDED)
        if spec.scale_format != "float16":
            cure = f"Train with target={METHOD!r}."
            raise refuse(path, "scales in half precision", f"scale_format={spec.scale_format!r}", cure)
        rows, width = q.rows
        for count in (rows, width):
            if count * int(spec.bits) % WORD:
                raise refuse(path, f"dimensions that fill words of {WORD} bits", f"{(rows, width)}", FOLDED)
        own = (int(spec.bits), _group_size(layer))
        first = first or (path, own)
        if own != first[1]:
            expected, got = f"{first[1][0]} bits in groups of {first[1][1]}, as {first[0]}", f"{own[0]} in {own[1]}"
            raise refuse(path, expected, got, "Give all layers one scheme; -1 is a group per row.")


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of config.json."""
    _, layer = next(quant_layers(model))
    return {
        "quant_method": METHOD,
        "bits": int(layer.weight_quant.spec.bits),
        "group_size": _group_size(layer),
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def parts(matrix: Matrix, layer: QuantLayer) -> dict[str, Tensor]:
    """The tensors of a layer, by the rest of their names."""
    bits = int(layer.weight_quant.spec.bits)
    width, groups = matrix.codes.shape[1], matrix.scale.shape[1]
    zeros = torch.full((len(matrix.codes), groups), -1, dtype=torch.int8)
    return {
        "qweight": pack(matrix.codes.cpu(), bits),
        "qzeros": pack(zeros.T, bits).T.contiguous(),
        "scales": matrix.scale.T.to(torch.float16).contiguous().cpu(),
        "g_idx": torch.arange(width, dtype=torch.int32) // (width // groups),
    }


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of (out, in) as words of (in bits / 32, out), int32, each above 2^(bits-1) less than itself.

    >>> pack(torch.tensor([[-8, -7, 0, 7, -8, -8, -8, -8]], dtype=torch.int8), 4)
    tensor([[63504]], dtype=torch.int32)
    """
    per_word = WORD // bits
    fields = (codes.T.to(torch.int32) + (1 << bits - 1)).reshape(-1, per_word, len(codes))
    words = torch.zeros_like(fields[:, 0])
    for place in range(per_word):
        words |= fields[:, place] << bits * place
    return words.contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Numbers from 0 of (rows bits / 32, columns) words, (rows, columns), int32."""
    places = torch.arange(0, WORD, bits, dtype=torch.int32).reshape(1, -1, 1)
    return ((words.unsqueeze(1) >> places) & ((1 << bits) - 1)).flatten(0, 1)


class StoredGptq(StoredTensors):
    """Read by a reader of our own, which makes float weights of it: see ``_weight``."""

    format = METHOD
    reason = (
        "read by a reader of our own, which computes (code - zero) * scale in float32; kernels of runtimes round "
        "further (gptqmodel 7.6 on tiny Llamas: 0.0002 to 0.05 of a logit)"
    )

    def layer(self, model: nn.Module, name: str, layer: QuantLayer) -> tuple[int, float]:
        """See the base class."""
        (matrix,) = stored_parts(model, name, layer)
        bits = int(layer.weight_quant.spec.bits)
        differ, apart = 0, 0.0
        for suffix, own in parts(matrix, layer).items():
            found = self.tensor(f"{matrix.path}.{suffix}")
            alike = found.shape == own.shape and found.dtype == own.dtype
            if suffix == "scales":
                gap = float((found.double() - own.double()).abs().max()) if alike else math.inf
                apart = gap if gap == gap else math.inf
            elif alike and suffix in ("qweight", "qzeros"):
                differ += unequal(unpack(found, bits), unpack(own, bits))
            else:
                differ += unequal(found, own)
        return differ, apart

    def quantization(self, trained: nn.Module) -> dict[str, Any] | None:
        """See the base class."""
        return quantization_config(trained)

    def read(self, trained: nn.Module) -> nn.Module:
        """A float model with the weights that the file says."""
        plain = unpack_all(detach(without_adapters(copy.deepcopy(trained)), fold=False)).cpu()
        plain.load_state_dict(dict(self._floats(trained)), strict=False)  # tied ones are there once
        return plain.eval()

    def _floats(self, trained: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, tensor, layer in float_tensors(trained):
            yield name, self.tensor(name) if layer is None else self._weight(name, tensor.dtype)

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        path = name.removesuffix(".weight")
        bits = int(self.config["quantization_config"]["bits"])
        words, zeros, scales, group = (self.tensor(f"{path}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx"))
        zero, rows = unpack(zeros.T, bits).T + 1, group.long()
        return ((unpack(words, bits) - zero[rows]) * scales.float()[rows]).T.to(dtype).contiguous()


def _group_size(layer: QuantLayer) -> int:
    """Rows of a group, -1 for one group."""
    spec = layer.weight_quant.spec
    return int(spec.group_size or -1) if spec.granularity == "group" else -1
