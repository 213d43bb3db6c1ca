"""A training directory as a model whose weights stay on disk, and become real one at a time.

The model is made on the meta device by transformers itself, from its config.json and the shapes in the files, so that
names, dtypes and ties are those of ``from_pretrained``.  Quantizers and adapters are real, but for quantizers' state as
large as the weight.  ``float_tensors`` asks for each weight when its turn comes, and hands it back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_quant.adapters import acting_beside, merged_beside
from lightning_quant.attach import attach, quant_layers, quantizers
from lightning_quant.checkpoint import (
    ADAPTER_FILE,
    STATE_FILE,
    adapters_base,
    damaged_weights,
    load_quant_config,
    load_quant_state,
    transformers_class,
    with_adapters,
)
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.layers import QuantLayer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_training_directory(directory: str | Path) -> nn.Module | None:
    """The model of a training directory with its quantizers, weights left on disk.

    Args:
        directory: Holds weights, or PEFT's adapters, with ``quant_config.json`` and ``quant_state.safetensors``.

    Returns:
        The model, in evaluation mode; None where its weights must be in memory: normalizations are folded into layers,
        the base is stored quantized or not as safetensors in a directory.

    Raises:
        CheckpointError: Something is missing or damaged.
    """
    directory = Path(directory)
    config = load_quant_config(directory)
    adapted = (directory / ADAPTER_FILE).is_file()
    base = Path(adapters_base(directory)) if adapted else directory
    if not _streams(base, config):
        return None
    model = on_meta(base)
    whole = with_adapters(directory, model) if adapted else model
    attach(whole, config, fit=False)
    load_quant_state(whole, directory)
    model.weights_on_disk.keep_states(whole, directory / STATE_FILE)  # type: ignore[operator, union-attr]
    return whole.eval()


def weights_on_disk(model: nn.Module) -> DiskWeights | None:
    """Where the weights of a model from ``open_training_directory`` are; None for other models."""
    found = getattr(model, "weights_on_disk", None)
    return found if isinstance(found, DiskWeights) else None


def _streams(base: Path, config: QuantConfig) -> bool:
    if config.batch_norm != "keep" or not ((base / WHOLE).is_file() or (base / INDEX).is_file()):
        return False
    _, own = transformers_class(base)
    return getattr(own, "quantization_config", None) is None


def on_meta(base: Path) -> nn.Module:
    """The float model of a directory, its weights left on disk: see ``weights_on_disk``.

    Raises:
        CheckpointError: Weights are missing or damaged, or transformers does not know the model.
    """
    kind, config = transformers_class(base)
    files = _files(base)
    state = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (_, shape, dtype) in files.items()}
    options = {"state_dict": state, "device_map": {"": "meta"}, "output_loading_info": True}
    model, info = kind.from_pretrained(None, config=config, **options)
    if info["missing_keys"]:
        raise damaged_weights(base, f"none for {sorted(info['missing_keys'])[0]}")
    if model.can_generate():
        model.generation_config = _generation_config(base)
    model.weights_on_disk = DiskWeights(model, base, {key: file for key, (file, _, _) in files.items()}, state)
    own: nn.Module = model
    return own


def _generation_config(base: Path) -> Any:
    """As ``from_pretrained`` has it."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return GenerationConfig.from_pretrained(base, config_file_name="config.json", _from_model_config=True)


def _files(base: Path) -> dict[str, tuple[str, list[int], torch.dtype]]:
    """File, shape and dtype of every tensor of a directory."""
    found: dict[str, tuple[str, list[int], torch.dtype]] = {}
    try:
        names = [WHOLE]
        if (base / INDEX).is_file() and not (base / WHOLE).is_file():
            names = sorted(set(json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            with safe_open(base / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    found[key] = (name, part.get_shape(), DTYPES[part.get_dtype()])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged_weights(base, error) from error
    return found


class DiskWeights:
    """Reads a model's weights from its directory, by the names they have in the model.

    Args:
        model: On the meta device.
        directory: Where the weights are.
        files: Name on disk -> file.
        shapes: Name on disk -> meta tensor.
    """

    def __init__(
        self, model: nn.Module, directory: Path, files: Mapping[str, str], shapes: Mapping[str, Tensor]
    ) -> None:
        self.directory, self.files = directory, files
        self.states: dict[int, str] = {}
        self.state_file = directory / STATE_FILE
        self._find_sources(model, shapes)

    def _find_sources(self, model: nn.Module, shapes: Mapping[str, Tensor]) -> None:
        """Which tensors on disk become which of the model, by the rules that transformers loads with."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.model = (model,)
        rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, own = model.base_model_prefix, model.state_dict()
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        self.sources: dict[str, tuple[str, Any, list[tuple[str, str]]]] = {}
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, own)  # type: ignore[arg-type]
            if name not in own and key in own:
                name, pattern = rename_source_key(key, [], [], prefix, own)  # type: ignore[arg-type]
            if pattern is None:
                self.sources[name] = name, None, [(key, key)]
            else:
                groups.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern))
        for name, (rule, keys) in groups.items():
            for target in self._converted(name, rule, [(pattern, shapes[key]) for key, pattern in keys]):
                self.sources[target] = name, rule, keys

    def _converted(self, name: str, rule: Any, parts: list[tuple[str, Any]]) -> dict[str, Tensor]:
        rule = copy.deepcopy(rule)
        for pattern, part in parts:
            rule.add_tensor(name, name, pattern, part)
        (model,) = self.model
        found = rule.convert(name, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}

    def read(self, name: str, like: Tensor) -> Tensor:
        """One tensor of the model.

        Args:
            name: Its name in the model that PEFT was given.
            like: Has its shape and dtype.

        Raises:
            CheckpointError: It is not there, or damaged.
        """
        if name not in self.sources:
            raise damaged_weights(self.directory, f"none for {name}")
        first, rule, keys = self.sources[name]
        if rule is None:
            value = self._tensor(keys[0][0], like.dtype)
        else:
            parts = [(pattern, lambda key=key: self._tensor(key, like.dtype)) for key, pattern in keys]
            value = self._converted(first, rule, parts)[name]
        if value.shape != like.shape:
            got = f"{tuple(value.shape)} for {name}, whose shape is {tuple(like.shape)}"
            raise damaged_weights(self.directory, got)
        return value

    def _tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        path = self.directory / self.files[key]
        try:
            with safe_open(path, framework="pt") as file:  # opened anew, so that its pages are let go of
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise damaged_weights(self.directory, error) from error
        return tensor.to(dtype)

    def keep_states(self, model: nn.Module, file: Path) -> None:
        """Note which quantizers have their state on disk only."""
        self.state_file = file
        self.states = {id(q): path for path, q in quantizers(model) if q.device.type == "meta"}

    @contextmanager
    def held(self, model: nn.Module, path: str, leaf: str, name: str, layer: QuantLayer | None) -> Iterator[Tensor]:
        """A tensor's value as it ships; while open, the layer it belongs to holds it.

        Args:
            model: The model, as ``float_tensors`` got it.
            path: Path of the module that holds the tensor.
            leaf: The tensor's name in it.
            name: The tensor's name in the model that PEFT was given.
            layer: The quantized layer that owns it.
        """
        module = model.get_submodule(path)
        of_layer = layer is not None and bool(layer.folds)
        quantized = {id(own) for _, own in quant_layers(model)}
        around = next((lora for _, lora in acting_beside(model, quantized) if lora.base_layer is module), None)
        tensors = {**module._parameters, **module._buffers}
        leaves = (
            list(tensors) if of_layer or around is not None else [leaf]
        )  # what is merged is made of weight and bias
        leaves = [n for n in leaves if (t := tensors[n]) is not None and t.is_meta]
        kept: dict[str, Any] = {n: (module._parameters if n in module._parameters else module._buffers) for n in leaves}
        before = {n: held[n] for n, held in kept.items()}
        stem = name.removesuffix(leaf)
        try:
            for n, held in kept.items():
                value = self.read(stem + n, before[n])  # type: ignore[arg-type]
                held[n] = nn.Parameter(value, requires_grad=False) if n in module._parameters else value
            merged = nullcontext() if around is None else merged_beside(nn.ModuleList([around]), quantized)
            with self._state(layer), merged:
                value = (module._parameters if leaf in module._parameters else module._buffers)[leaf].detach()  # type: ignore[union-attr]
                if of_layer and leaf == "bias":
                    value = layer.folded()[1].detach()  # type: ignore[union-attr]
                yield value
        finally:
            for n, held in kept.items():
                held[n] = before[n]

    @contextmanager
    def _state(self, layer: QuantLayer | None) -> Iterator[None]:
        """While open, a quantizer whose state is on disk has it."""
        path = None if layer is None else self.states.get(id(layer.weight_quant))
        if path is None:
            yield
            return
        q: FakeQuantizer = layer.weight_quant  # type: ignore[union-attr]
        stored = list(q.state_dict())
        q.to_empty(device="cpu")
        if q.table is not None:
            q.table = q.grid.table()
        for name, schedule in q.estimator.schedules().items():
            q._buffers[name] = torch.tensor(schedule.first, dtype=torch.float32)
        for name in ("step", "started"):
            if name in q._buffers:
                q._buffers[name].zero_()  # type: ignore[union-attr]
        try:
            with safe_open(self.state_file, framework="pt") as file:
                q.load_state_dict({name: file.get_tensor(f"{path}.{name}") for name in stored})
            yield
        except SafetensorError as error:
            cure = "Take an earlier checkpoint."
            raise CheckpointError(explain(str(self.state_file), "a whole file", str(error), cure)) from error
        finally:
            q.to("meta")
