"""An export on disk: its tensors one at a time, and the model that its reader makes of them."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_quant.adapters import without_adapters
from lightning_quant.attach import detach
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.layout import on_disk
from lightning_quant.export.writer import config_json
from lightning_quant.layers import QuantLayer, unpack_all

PASSING = ("transformers_version", "_name_or_path", "use_cache")  # of no consequence for what a model computes
ANOTHER = "It was exported from another model; export again."


class Stored(ABC):
    """What ``compare`` asks of a format.

    Class attributes: ``format``, its name; ``rounds_inputs``, whether its reader quantizes layers' inputs; ``rule``,
    the target whose dynamic scales it has;
    ``tolerance``, the largest difference of a logit that its reader itself causes, and ``reason``, why it does.

    Args:
        path: The export.

    Raises:
        CheckpointError: It is missing, damaged or no such export.
    """

    format: ClassVar[str]
    rounds_inputs: ClassVar[bool] = True
    rule: ClassVar[str] = "transformers"
    tolerance: float = 0.0
    reason: ClassVar[str] = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []  # what else the report says

    @abstractmethod
    def layer(self, model: nn.Module, name: str, layer: QuantLayer) -> tuple[int, float]:
        """How many stored integers of a weight differ from the trained ones, and the largest difference of a scale."""

    @abstractmethod
    def differs(self, model: nn.Module, name: str, tensor: Tensor) -> int:
        """How many values of a float tensor of the model are stored as others."""

    @abstractmethod
    def odd(self, trained: nn.Module) -> list[str]:
        """What else is stored that was not trained: further tensors, other settings.  Asked last."""

    def following(
        self, trained: nn.Module, shipped: nn.Module, inputs: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """While open, the trained model rounds inputs as the reader does, where that is another arithmetic."""
        return nullcontext()

    @abstractmethod
    def read(self, trained: nn.Module) -> nn.Module:
        """The model that the format's reader makes of the export, in evaluation mode."""


class StoredTensors(Stored):
    """A directory of safetensors, with transformers' config.json if the model is its."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not path.is_dir():
            raise CheckpointError(explain(str(path), "an export", "no such directory", "Point at what export() wrote."))
        self.config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        index = path / "model.safetensors.index.json"
        self.asked: set[str] = set()
        self.files: dict[str, str] = {}
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(f, str) and "/" not in f for f in files.values()):
                raise CheckpointError(
                    explain(str(index), "weight_map, names to files", repr(files)[:80], "Export again.")
                )
            self.files = files
        else:
            with self._open("model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            where, expected = str(self.path / name), "a whole safetensors file"
            raise CheckpointError(explain(where, expected, str(error), "Export again.")) from error

    def tensor(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: There is none of that name, or it cannot be read.
        """
        if name not in self.files:
            raise CheckpointError(explain(str(self.path), f"a tensor {name}", "none", ANOTHER))
        self.asked.add(name)
        with self._open(self.files[name]) as file:
            try:
                value: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                where = f"{self.path / self.files[name]}: {name}"
                raise CheckpointError(explain(where, "a whole tensor", str(error), "Export again.")) from error
            return value

    def parts(self, model: nn.Module, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """A tensor of the model in the parts that are stored."""
        return {name: tensor} if name in self.files else on_disk(model, name, tensor)

    def differs(self, model: nn.Module, name: str, tensor: Tensor) -> int:
        """See the base class."""
        return sum(unequal(self.tensor(key), part) for key, part in self.parts(model, name, tensor).items())

    def odd(self, trained: nn.Module) -> list[str]:
        """See the base class."""
        found = [f"{name} (nothing trained)" for name in sorted({*self.files} - self.asked)]
        own = config_json(trained, self.quantization(trained))
        if own is not None:
            keys = [*own, *(k for k in self.config if k not in own)]
            found += [f"config.json: {k}" for k in keys if k not in PASSING and own.get(k) != self.config.get(k)]
        return found

    def quantization(self, trained: nn.Module) -> dict[str, Any] | None:
        """The ``quantization_config`` that config.json must hold."""
        return None

    def read(self, trained: nn.Module) -> nn.Module:
        """Through transformers for its models, by plain ``load_state_dict`` for others."""
        if not hasattr(trained, "save_pretrained"):
            plain = unpack_all(detach(without_adapters(copy.deepcopy(trained)), fold=False)).cpu()
            plain.load_state_dict({name: self.tensor(name) for name in self.files})
            return plain.eval()
        return read_pretrained(self.path, trained)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: It is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(explain(str(path), "a whole JSON file", str(error), "Export again.")) from error
    return data


def unequal(found: Tensor, tensor: Tensor) -> int:
    """How many values of a stored tensor are others than these; all of them where shape or dtype is another."""
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        return max(found.numel(), tensor.numel(), 1)
    return int((found != tensor.cpu()).sum())


def read_pretrained(path: Path, trained: nn.Module, **kwargs: Any) -> nn.Module:
    """What transformers makes of a directory, with nothing missing and nothing left over.

    Args:
        path: The directory.
        trained: Of the class to read it into.
        kwargs: For ``from_pretrained``.

    Raises:
        CheckpointError: It cannot be read so.
    """
    import transformers

    kind = getattr(transformers, type(trained).__name__)
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, **kwargs)
    except Exception as error:  # whatever a reader makes of a file that is not what it says
        cure = "Export again; what its reader cannot load at all, with format='folded'."
        raise CheckpointError(explain(str(path), "an export its reader loads", f"{error!r:.500}", cure)) from error
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        cure = "The reader would compute with random weights."
        raise CheckpointError(explain(str(path), "a clean loading report", str(wrong)[:300], cure))
    reader: nn.Module = model.eval()
    return reader
