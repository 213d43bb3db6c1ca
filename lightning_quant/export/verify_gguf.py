"""A GGUF export read back: its blocks, its keys, and the model that a reader makes of it."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import without_adapters
from lightning_quant.attach import detach
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.gguf import MODEL_FILE, metadata, stored_blocks, stored_float
from lightning_quant.export.gguf_blocks import pack, unpack
from lightning_quant.export.gguf_metadata import extra_tensors
from lightning_quant.export.gguf_names import parts
from lightning_quant.export.stored import ANOTHER, PASSING, Stored, read_json, read_pretrained, unequal
from lightning_quant.export.writer import config_json, float_tensors
from lightning_quant.layers import QuantLayer, float_dtype, unpack_all

# Settings of a config that change nothing of what a trained model computes.
IDLE = {
    *PASSING,
    "_model_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
IDLE |= {"attention_dropout", "pretraining_tp", "max_position_embeddings", "router_aux_loss_coef", "max_window_layers"}
IDLE |= {"output_router_logits", "router_jitter_noise", "residual_dropout", "resid_pdrop", "embd_pdrop"}


class StoredGguf(Stored):
    """Read by transformers where its reader takes the whole config from the file, else by ``gguf`` itself."""

    format = "gguf"
    rounds_inputs = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fields, self.tensors = read_gguf(path / MODEL_FILE)
        self.asked: set[str] = set()

    def found(self, name: str, kind: str) -> Tensor | None:
        """A tensor's bytes or numbers; None if it has another type.

        Raises:
            CheckpointError: There is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(explain(str(self.path / MODEL_FILE), f"a tensor {name}", "none", ANOTHER))
        self.asked.add(name)
        tensor = self.tensors[name]
        if tensor.tensor_type.name != kind:
            return None
        data = torch.from_numpy(tensor.data.copy())
        return data.view(torch.bfloat16) if kind == "BF16" else data

    def layer(self, model: nn.Module, name: str, layer: QuantLayer) -> tuple[int, float]:
        """See the base class."""
        differ, apart = 0, 0.0
        for part, kind, own in stored_blocks(model, name, layer):
            data = self.found(part.name, kind)
            packed = pack(kind, own)
            if data is None or data.shape != packed.shape:
                return own.codes.numel() + differ, float("inf")
            if torch.equal(data, packed):
                continue
            there = unpack(kind, data)
            differ += unequal(there.codes, own.codes)
            apart = max(apart, _apart(there.scale, own.scale))
            if there.minimum is not None and own.minimum is not None:
                apart = max(apart, _apart(there.minimum, own.minimum))
        return differ, apart

    def differs(self, model: nn.Module, name: str, tensor: Tensor) -> int:
        """See the base class."""
        differ = 0
        for part, kind, own in stored_float(model, name, tensor):
            data = self.found(part.name, kind)
            differ += own.numel() if data is None else unequal(data, own)
        return differ

    def odd(self, trained: nn.Module) -> list[str]:
        """See the base class."""
        odd = []
        for name, own in extra_tensors(trained).items():
            data = self.found(name, "F32")
            if data is None or unequal(data, own):
                odd.append(name)
        odd += [f"{name} (nothing trained)" for name in sorted({*self.tensors} - self.asked)]
        tokenizer = None
        if (self.path / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            # the file as it is: the class that a config stands for may add tokens of its own
            kind = PreTrainedTokenizerFast if (self.path / "tokenizer.json").is_file() else AutoTokenizer
            tokenizer = kind.from_pretrained(self.path)
        with tempfile.TemporaryDirectory() as place:
            writer = metadata(trained, tokenizer)
            writer.write_header_to_file(Path(place) / MODEL_FILE)
            writer.write_kv_data_to_file()
            writer.close()
            fields, _ = read_gguf(Path(place) / MODEL_FILE)
            odd += [
                f"{MODEL_FILE}: {key}" for key in {**fields, **self.fields} if fields.get(key) != self.fields.get(key)
            ]
        own_config = config_json(trained, None) or {}
        there = read_json(self.path / "config.json")
        keys = [key for key in {**own_config, **there} if key not in PASSING]
        return odd + [f"config.json: {key}" for key in keys if own_config.get(key) != there.get(key)]

    def read(self, trained: nn.Module) -> nn.Module:
        """See the class; what stops transformers is noted in ``reason``."""
        lost = _lost(self.path, trained)
        if not lost:
            how = trained.config._attn_implementation  # type: ignore[union-attr]
            keywords = {"gguf_file": MODEL_FILE, "dtype": float_dtype(trained), "attn_implementation": how}
            return read_pretrained(self.path, trained, **keywords)
        self.notes.append(f"transformers' own GGUF reader {lost}: read by gguf's dequantizer into the trained class")
        return self._dequantized(trained)

    def _dequantized(self, trained: nn.Module) -> nn.Module:
        """The trained class with gguf's dequantized tensors in it."""
        from gguf import dequantize

        state: dict[str, Tensor] = {}
        for name, tensor, _ in float_tensors(trained):
            pieces = []
            for part in parts(trained, name):
                found = self.tensors[part.name]
                value = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
                pieces.append(part.back(value))
            state[name] = torch.cat(pieces, dim=-2) if len(pieces) > 1 else pieces[0]
            state[name] = state[name].to(tensor.dtype)
        plain = unpack_all(detach(without_adapters(copy.deepcopy(trained)), fold=False)).cpu()
        left = plain.load_state_dict(state, strict=False)
        filled = {plain.state_dict()[name].data_ptr() for name in state}
        missing = [name for name in left.missing_keys if plain.state_dict()[name].data_ptr() not in filled]
        if missing or left.unexpected_keys:
            got = f"{missing} missing, {left.unexpected_keys} left over"
            raise CheckpointError(explain(str(self.path / MODEL_FILE), "all tensors of the model", got, ANOTHER))
        return plain.eval()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of a file, with their types and values, and its tensors, which are mapped and not read yet.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            key: ([kind.name for kind in field.types], field.contents())
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(explain(str(path), "a whole GGUF file", f"{error!r:.200}", "Export again.")) from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _lost(path: Path, trained: nn.Module) -> str:
    """What transformers' reader makes otherwise of the file's settings; empty if nothing."""
    from transformers import AutoConfig

    own: Any = trained.config
    try:
        found = AutoConfig.from_pretrained(path, gguf_file=MODEL_FILE)
    except Exception as error:  # whatever it raises for an architecture it does not know
        return f"does not take this architecture ({str(error).splitlines()[0]:.200})"
    if found.model_type != own.model_type:
        return f"takes it for {found.model_type!r}"
    mine, theirs = own.to_dict(), found.to_dict()
    keys = [key for key in {**mine, **theirs} if key not in IDLE and mine.get(key) != theirs.get(key)]
    keys = [key for key in keys if not _close(mine.get(key), theirs.get(key))]
    return f"does not take {', '.join(sorted(keys))} from the file" if keys else ""


def _close(own: Any, found: Any) -> bool:
    """Whether two settings are the same but for rounding to float32."""
    if isinstance(own, dict) and isinstance(found, dict):
        return own.keys() == found.keys() and all(_close(own[key], found[key]) for key in own)
    if isinstance(own, float) and isinstance(found, float):
        return bool(torch.tensor(own, dtype=torch.float32) == torch.tensor(found, dtype=torch.float32))
    return bool(own == found)


def _apart(found: Tensor, own: Tensor) -> float:
    gap = float((found.double() - own.double()).abs().max())
    return gap if gap == gap else float("inf")
