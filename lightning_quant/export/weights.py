"""The float model's tensors one by one, each real while it is looked at: what every format is written from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.adapters import float_paths
from lightning_quant.attach import deployed_norm, quant_layers, quantizers
from lightning_quant.export.streamed import weights_on_disk
from lightning_quant.layers import QuantLayer, compact_keys, dense_weight


class _Item(NamedTuple):
    """A tensor to come: its key in the state dict, its name in the float model, where it is."""

    key: str
    name: str
    tensor: Tensor | None
    layer: QuantLayer | None
    compact: nn.Module | None = None


def float_tensors(model: nn.Module, skip: int = 0) -> Iterator[tuple[str, Tensor, QuantLayer | None]]:
    """The float model's state dict, each storage once, with the quantized layer that owns a weight.

    Biases and normalizations that were folded have the values that ship beside the folded weight; adapters are left
    out (see ``as_shipped``), and what PEFT wrapped has the name it was born with.

    Weights on disk, and those stored in a few bits, are made as their turn comes: nobody may hold on to them, and the
    former are empty once the next one is asked for.

    Args:
        model: A model with quantizers.
        skip: Pass over the first so many, without reading them.
    """
    source = weights_on_disk(model)
    shipped = {} if source is not None else _shipped(model)
    for item in _items(model)[skip:]:
        if item.compact is not None:
            yield item.name, dense_weight(item.compact), item.layer  # type: ignore[misc]
            continue
        tensor: Tensor = item.tensor  # type: ignore[assignment]
        if source is None:
            yield item.name, shipped.get(id(tensor), tensor.detach()), item.layer
            continue
        path, _, leaf = item.key.rpartition(".")
        owner = item.layer
        if owner is None and isinstance(module := model.get_submodule(path), QuantLayer):
            owner = module
        with source.held(model, path, leaf, item.name, owner) as value:
            yield item.name, value, item.layer
            if tensor.is_meta:
                value.data = value.new_empty(0)  # whoever asks for the next one still has a name for this one


def item_count(model: nn.Module) -> int:
    """How many ``float_tensors`` there are."""
    return len(_items(model))


def _items(model: nn.Module) -> list[_Item]:
    layers = {layer.weight_name(path): layer for path, layer in quant_layers(model)}
    mine = tuple(f"{path}." for path, _ in quantizers(model))
    names = float_paths(model)
    compact = {key: (path, layer) for key, path, layer in compact_keys(model)}
    made: set[str] = set()
    seen: set[object] = set()
    found = []
    for key, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = key.rpartition(".")
        if key in compact:
            path, stored = compact[key]
            if path not in made and (name := names[path]) is not None:
                found.append(_Item(key, f"{name}.weight", None, layers.get(f"{path}.weight"), stored))
            made.add(path)
            continue
        name = names.get(path, path)
        if key.startswith(mine) or name is None:
            continue
        storage = distributed.to_local(tensor)
        place: object = (storage.data_ptr(), storage.shape, storage.stride())
        if tensor.is_meta:  # which has no storage, but ties are one parameter
            place = id(tensor)
        if storage.numel() and place in seen:
            continue
        seen.add(place)
        found.append(_Item(key, f"{name}.{leaf}" if name else leaf, tensor, layers.get(key)))
    return found


def _shipped(model: nn.Module) -> dict[int, Tensor]:
    """Tensors beside layers' weights that ship with another value than they have in training, by identity."""
    found: dict[int, Tensor] = {}
    for _, layer in quant_layers(model):
        values = deployed_norm(layer)
        if layer.folds and not values and layer.bias is not None:
            values.append((layer.bias, layer.folded()[1].detach()))  # type: ignore[union-attr]
        found.update({id(tensor): value for tensor, value in values})
    return found
