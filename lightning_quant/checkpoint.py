"""A training directory: what ``save_pretrained`` writes, with the float model's keys, plus our side files.

``quant_config.json`` holds the config, ``quant_state.safetensors`` the quantizers' state.  The weights load
by plain ``from_pretrained``, those of a model with adapters by PEFT's; the side files bring the model back to where
training was.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_quant.attach import attach, is_attached, without_quantizers
from lightning_quant.distributed import like
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig

STATE_FILE = "quant_state.safetensors"
CONFIG_FILE = "quant_config.json"
ADAPTER_FILE = "adapter_config.json"


@contextmanager
def quantizers_aside(model: nn.Module) -> Iterator[None]:
    """While open, the model has the float model's keys and no others: what saves or loads it sees no quantizers."""
    holders = [m for m in model.modules() if any(isinstance(c, FakeQuantizer) for c in m._modules.values())]
    whole = [m._modules for m in holders]
    try:
        for module in holders:
            module._modules = {n: c for n, c in module._modules.items() if not isinstance(c, FakeQuantizer)}
        yield
    finally:
        for module, children in zip(holders, whole, strict=True):
            module._modules = children


def save_quant_state(directory: str | Path, state: dict[str, Tensor], config: QuantConfig) -> None:
    """Write both side files, each whole or not at all.

    Args:
        directory: An existing directory.
        state: The quantizers' part of a state dict.
        config: The config the model was attached with.
    """
    directory = Path(directory)
    temporary = directory / f"{STATE_FILE}.tmp{os.getpid()}"
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, temporary, metadata={"format": "pt", "version": "1"})
    temporary.replace(directory / STATE_FILE)
    temporary = directory / f"{CONFIG_FILE}.tmp{os.getpid()}"
    temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / CONFIG_FILE)


def load_quant_config(directory: str | Path) -> QuantConfig:
    """The config of a training directory.

    Raises:
        CheckpointError: The file is missing or not JSON.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            explain(
                str(directory),
                f"a training directory with {CONFIG_FILE}",
                "none",
                "Point at a checkpoint-* or output directory that a quantized Trainer wrote.",
            )
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(explain(str(path), "JSON", str(error), "Take an earlier checkpoint.")) from error
    return QuantConfig.from_dict(data, where=str(path))


def load_quant_state(model: nn.Module, directory: str | Path) -> None:
    """Load the quantizers' state of a training directory into a model with quantizers.

    What the model has on the meta device stays there.

    Raises:
        CheckpointError: The side file is missing, damaged, or of another model.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            explain(
                str(directory),
                f"{STATE_FILE} beside the weights",
                "none",
                "Without it ranges would start over; take a checkpoint written by a quantized Trainer.",
            )
        )
    _, mine = without_quantizers(model.state_dict(), model)
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            state = {k: file.get_tensor(k) for k in sorted(found) if k in mine and not mine[k].is_meta}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            explain(str(path), "a whole safetensors file", str(error), "Take an earlier checkpoint.")
        ) from error
    if set(mine) != found:
        odd = sorted(set(mine) ^ found)
        raise CheckpointError(
            explain(
                str(path),
                f"state of the {len(mine)} tensors of this model's quantizers",
                f"{len(found)}; first that differs: {odd[0]}",
                "Attach with the directory's quant_config.json.",
            )
        )
    model.load_state_dict({key: like(value, mine[key]) for key, value in state.items()}, strict=False)


def load_training_checkpoint(directory: str | Path, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    """The model of a training directory as training had it: float weights plus quantizers.

    Args:
        directory: Holds weights, or PEFT's adapters, with ``quant_config.json`` and ``quant_state.safetensors``.
        model: A float model with the directory's weights already in it; with adapters also the model they were
            trained beside, which gets them.  None: made by ``from_pretrained`` of the auto class that the
            directory's ``architectures`` names; with adapters, of the base model that they name.
        kwargs: For ``from_pretrained``.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: Something is missing or damaged.
    """
    config = load_quant_config(directory)
    if (Path(directory) / ADAPTER_FILE).is_file():
        model = with_adapters(directory, model, **kwargs)
    elif model is None:
        model = _from_pretrained(directory, **kwargs)
    if not is_attached(model):
        attach(model, config)
    load_quant_state(model, directory)
    return model.eval()


def adapters_base(directory: str | Path) -> str:
    """The name of the base model of a directory with adapters.

    Raises:
        CheckpointError: There is none.
    """
    file = Path(directory) / ADAPTER_FILE
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except json.JSONDecodeError as error:
        raise CheckpointError(explain(str(file), "JSON", str(error), "Take an earlier checkpoint.")) from error
    if not base:
        cure = "Pass it: load_training_checkpoint(directory, model), verify(path, load_training_checkpoint(...))."
        raise CheckpointError(explain(str(file), "the name of the base model", repr(base), cure))
    return str(base)


def with_adapters(directory: str | Path, model: nn.Module | None, **kwargs: Any) -> nn.Module:
    """The base model, with the directory's adapters unless it is wrapped already.

    Args:
        directory: Holds the adapters.
        model: The base; None: the one that they name.  Its weights may be on the meta device, adapters are not.
        kwargs: For ``from_pretrained`` of the base.

    Raises:
        CheckpointError: Something is missing or damaged.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils.save_and_load import load_peft_weights

    if isinstance(model, PeftModel):
        return model
    if model is None:
        model = _from_pretrained(adapters_base(directory), **kwargs)
    lazy = any(p.is_meta for p in model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            wrapped: Any = PeftModel.from_pretrained(model, directory, low_cpu_mem_usage=lazy)  # type: ignore[arg-type]
            if lazy:  # PEFT has moved them to where the base is
                name = wrapped.active_adapter
                state = load_peft_weights(str(directory), "cpu")
                with _left_in_place(wrapped):
                    set_peft_model_state_dict(wrapped, state, name, low_cpu_mem_usage=True)
                cast_adapter_dtype(wrapped.base_model, name, autocast_adapter_dtype=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, UserWarning) as error:
        got, cure = " ".join(str(error).split())[:300], "Give the base model they were trained beside."
        raise CheckpointError(explain(str(directory), "adapters of this model", got, cure)) from error
    found: nn.Module = wrapped
    return found


@contextmanager
def _left_in_place(model: nn.Module) -> Iterator[None]:
    """While open, PEFT loads adapters without moving them to where their base layers are."""
    move = "_move_adapter_to_device_of_base_layer"
    layers: list[Any] = [m for m in model.modules() if hasattr(m, move)]
    try:
        for layer in layers:
            layer.__dict__[move] = lambda *args, **kwargs: None
        yield
    finally:
        for layer in layers:
            del layer.__dict__[move]


def transformers_class(directory: str | Path) -> tuple[Any, Any]:
    """The class of transformers that a directory's config.json names, and that config.

    Raises:
        CheckpointError: There is none.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            explain(
                str(directory),
                "a config.json of transformers beside the weights",
                str(error),
                "For a model of another kind call load_training_checkpoint(directory, model) or verify(path, model).",
            )
        ) from error
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise CheckpointError(
            explain(
                str(directory),
                "a config.json whose architectures name a class of transformers",
                names,
                "Pass the model yourself.",
            )
        )
    return kind, config


def damaged_weights(directory: str | Path, error: object) -> CheckpointError:
    """What to raise where a directory's weights cannot be read."""
    return CheckpointError(explain(str(directory), "whole weight files", str(error), "Take an earlier checkpoint."))


def _from_pretrained(directory: str | Path, **kwargs: Any) -> nn.Module:
    kind, _ = transformers_class(directory)
    with torch.no_grad():
        try:
            model: nn.Module = kind.from_pretrained(directory, **kwargs)
        except (SafetensorError, OSError) as error:
            raise damaged_weights(directory, error) from error
    return model
