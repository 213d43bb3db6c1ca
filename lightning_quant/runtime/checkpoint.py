"""Reading a compressed-tensors directory: the schemes its config names, and tensors one by one from any shard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.runtime.choose import Kind
from lightning_quant.runtime.stored import InputRule, StoredLinear

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
INTEGER_FORMATS = ("pack-quantized", "int-quantized")


class Checkpoint:
    """A directory with config.json and safetensors, of our export or of another producer.

    Args:
        path: The directory.

    Raises:
        CheckpointError: No such directory, or a file in it is missing or damaged.
        ValueError: It is quantized in a way that no layer here can compute.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self._json("config.json")
        self.quantization: dict[str, Any] = self.config.get("quantization_config") or {}
        self._check()
        own = self.path / "quant_config.json"
        target = self._json(own.name).get("target") if own.is_file() else None
        self.divisor = 127.5 if target == "transformers" else 127.0
        if (self.path / INDEX).is_file():
            self._file_of: dict[str, str] = self._json(INDEX)["weight_map"]
        else:
            self._file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        self._current: tuple[str, Any] = ("", None)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def file(self, name: str) -> str:
        """The shard that holds a tensor."""
        return self._file_of.get(name, "")

    def tensor(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        value: Tensor = self._reader(name).get_tensor(name)
        return value.clone()

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, without reading it."""
        shape: list[int] = self._reader(name).get_slice(name).get_shape()
        return shape

    def parts(self, path: str) -> list[str]:
        """Names of the tensors of the quantized layer at this path; empty if it is none."""
        if f"{path}.weight_scale" not in self:
            return []
        known = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")
        return [f"{path}.{leaf}" for leaf in known if f"{path}.{leaf}" in self]

    def kind(self, path: str) -> Kind:
        """What a quantized layer is, from the config and the files' headers.

        Raises:
            ValueError: The config says nothing of it, or what no layer here can compute.
        """
        group = self._group(path)
        weights, inputs = group["weights"], group.get("input_activations")
        scale = self.shape(f"{path}.weight_scale")
        if f"{path}.weight_packed" in self:
            out, width = (int(n) for n in self.tensor(f"{path}.weight_shape"))
        else:
            out, width = self.shape(f"{path}.weight")
        groups = scale[1] if len(scale) > 1 else 1
        return Kind((out, width), weights["num_bits"], groups, weights.get("symmetric", True), inputs is not None)

    def stored(self, path: str) -> StoredLinear:
        """Integers and scales of a quantized layer."""
        from compressed_tensors.compressors import unpack_from_int32

        kind = self.kind(path)
        shape = torch.Size(kind.shape)
        packed = f"{path}.weight_packed" in self
        codes = self.tensor(f"{path}.weight_packed" if packed else f"{path}.weight")
        if packed:
            codes = unpack_from_int32(codes, kind.bits, shape)
        scale = self.tensor(f"{path}.weight_scale").reshape(-1, kind.groups)
        scale = scale.expand(shape[0], -1)  # a single one, where the whole weight shares it
        zero = None
        if not kind.symmetric and f"{path}.weight_zero_point" in self:
            zero = self.tensor(f"{path}.weight_zero_point")
            if packed:
                zero = unpack_from_int32(zero, kind.bits, torch.Size((shape[0], kind.groups)), packed_dim=0)
        bias = self.tensor(f"{path}.bias") if f"{path}.bias" in self else None
        inputs = None
        if kind.rounds_inputs:
            fixed = self.tensor(f"{path}.input_scale").reshape(1) if f"{path}.input_scale" in self else None
            inputs = InputRule(fixed, self.divisor)
        return StoredLinear(codes, scale, kind.bits, zero, bias, inputs)

    def _check(self) -> None:
        where = str(self.path)
        if self.quantization.get("quant_method") != "compressed-tensors":
            got = self.quantization.get("quant_method", "a model that is not quantized")
            raise ValueError(explain(where, "a compressed-tensors checkpoint", got, "Load it with from_pretrained."))
        if self.quantization.get("kv_cache_scheme"):
            raise ValueError(
                explain(where, "a key-value cache in float", "kv_cache_scheme", "Load it with from_pretrained.")
            )
        for name, group in self.quantization["config_groups"].items():
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            grid = (weights.get("type"), weights.get("strategy"), weights.get("actorder") in (None, "static", "weight"))
            if grid not in {("int", s, True) for s in ("channel", "group", "tensor")}:
                expected = "integer weights per channel, group or tensor, in their own order"
                raise ValueError(explain(f"{where}: {name}", expected, weights, "Load it with from_pretrained."))
            rule = inputs and (inputs.get("type"), inputs.get("num_bits"), inputs.get("symmetric"))
            if inputs and (rule != ("int", 8, True) or inputs.get("strategy") not in ("token", "tensor")):
                expected = "symmetric 8-bit inputs per token or per tensor"
                raise ValueError(explain(f"{where}: {name}", expected, inputs, "Load it with from_pretrained."))
            if inputs and inputs["strategy"] == "tensor" and inputs.get("dynamic"):
                expected, got = "dynamic inputs per token", "per tensor"
                raise ValueError(explain(f"{where}: {name}", expected, got, "Load it with from_pretrained."))
        formats = {g.get("format") or self.quantization.get("format") for g in self._groups()}
        if not formats <= {*INTEGER_FORMATS, None}:
            raise ValueError(
                explain(where, f"format {' or '.join(INTEGER_FORMATS)}", formats, "Load it with from_pretrained.")
            )

    def _groups(self) -> list[dict[str, Any]]:
        return list(self.quantization["config_groups"].values())

    def _group(self, path: str) -> Mapping[str, Any]:
        """The config group of a layer: by its path, else the one for all Linear layers."""
        for group in self._groups():
            for target in group["targets"]:
                if re.match(target[3:], path) if target.startswith("re:") else target == path:
                    return group
        for group in self._groups():
            if "Linear" in group["targets"]:
                return group
        cure = "Write the checkpoint again with a config that has it."
        raise ValueError(explain(f"{self.path}: {path}", "a config group whose targets match it", "none", cure))

    def _reader(self, name: str) -> Any:
        file = self._file_of[name]
        if self._current[0] != file:
            self._current = (file, self._open(file))
        return self._current[1]

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            cure = "Export again, or fetch the missing file."
            raise CheckpointError(explain(str(self.path / file), "a whole safetensors file", error, cure)) from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            cure = "Point at a directory that export() wrote."
            raise CheckpointError(explain(str(self.path), f"a directory with {name}", error, cure)) from error
        return data
