"""Quantizer parameters get an optimizer group of their own: no weight decay, a learning rate of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import explain
from lightning_quant.spec import QuantConfig
from lightning_quant.zero import is_stepped

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def learned_parameters(model: nn.Module, config: QuantConfig) -> dict[int, tuple[nn.Parameter, float]]:
    """The quantizers' trainable parameters by identity, with their learning-rate factors."""
    found = {}
    for _, q in quantizers(model):
        for parameter, factor in q.learned():
            if parameter.requires_grad:
                found[id(parameter)] = (parameter, config.scale_lr if factor is None else factor)
    return found


def param_groups(model: nn.Module, config: QuantConfig, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups for a hand-written loop: the model's own parameters, then the quantizers'.

    Args:
        model: A model with quantizers.
        config: The config it was attached with.
        lr: Learning rate of the model's parameters.
        weight_decay: Weight decay of the model's parameters; the quantizers' is 0.
    """
    mine = learned_parameters(model, config)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}]
    for factor in sorted({f for _, f in mine.values()}):
        chosen = [p for p, f in mine.values() if f == factor]
        groups.append({"params": chosen, "lr": lr * factor, "weight_decay": 0.0, "quantizer": True})
    return groups


def freeze_with_weights(model: nn.Module) -> None:
    """Stop learning the quantizers of layers whose weights are frozen: what is not trained keeps its grid."""
    for _, layer in quant_layers(model):
        if not any(p.requires_grad for p in layer.sources()):
            for _, q in quantizers(layer):
                q.requires_grad_(False)


def split_groups(optimizers: list[Optimizer], schedulers: list[Any], model: nn.Module, config: QuantConfig) -> None:
    """Move quantizer parameters out of the groups an optimizer was built with into groups of their own.

    Those that no optimizer holds join the one that holds their layer's weight.  A new group copies the settings
    of the one that it is taken from, or that holds the weight, with learning rates times the factor and no weight
    decay; learning-rate schedulers that keep one entry per group get the entry of the origin.

    Args:
        optimizers: The optimizers of the run.
        schedulers: Their learning-rate schedulers.
        model: The model with quantizers.
        config: The config it was attached with.

    Raises:
        ValueError: No optimizer holds a learned quantizer parameter, nor the weight of its layer; or ZeRO has taken
            them over already, in groups without any of ours.
    """
    mine = learned_parameters(model, config)
    if any(is_stepped(p) for p, _ in mine.values()):
        if not any(group.get("quantizer") for optimizer in optimizers for group in optimizer.param_groups):
            cure = "Give the optimizer lightning_quant.param_groups(model, config, lr) before deepspeed.initialize."
            got = "DeepSpeed's flat copies, whose groups are fixed"
            raise ValueError(explain("the optimizer", "groups of the quantizers' parameters", got, cure))
        return
    joining = _joining(optimizers, model, mine)
    for optimizer in optimizers:
        for origin in range(len(optimizer.param_groups)):
            group = optimizer.param_groups[origin]
            if group.get("quantizer"):
                continue
            found = [p for p in group["params"] if id(p) in mine]
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            found += [q for p in group["params"] for q in joining.pop(id(p), ())]
            for factor in sorted({mine[id(p)][1] for p in found}):
                new = {k: v for k, v in group.items() if k != "params"}
                new.update({k: new[k] * factor for k in _RATES if isinstance(new.get(k), (int, float, Tensor))})
                new.update(params=[p for p in found if mine[id(p)][1] == factor], quantizer=True)
                if "weight_decay" in new:
                    new["weight_decay"] = 0.0
                optimizer.add_param_group(new)
                for scheduler in schedulers:
                    _extend(scheduler, optimizer, origin, factor)


def _joining(optimizers: list[Optimizer], model: nn.Module, mine: Mapping[int, Any]) -> dict[int, list[nn.Parameter]]:
    """Learned parameters that no optimizer holds, by the identity of a weight of their layer that one does hold."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    joining: dict[int, list[nn.Parameter]] = {}
    lost: list[str] = []
    for _, layer in quant_layers(model):
        home = next((id(p) for p in layer.sources() if id(p) in held), None)
        for parameter in [p for _, q in quantizers(layer) for p, _ in q.learned()]:
            if id(parameter) in held or id(parameter) not in mine:
                continue
            if home is None:
                lost.append(names[id(parameter)])
            else:
                joining.setdefault(home, []).append(parameter)
    if lost and optimizers:
        raise ValueError(
            explain(
                lost[0],
                "every learned quantizer parameter, or the weight of its layer, in an optimizer",
                f"{len(lost)} in none ({', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''})",
                "Give the optimizer module.parameters() or lightning_quant.param_groups(model, config, lr); a layer "
                "that shall not train: freeze its weight in __init__, or LayerRule(match=..., weight=None).",
            )
        )
    return joining


def _extend(scheduler: Any, optimizer: Optimizer, origin: int, factor: float) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):
        _extend(inner, optimizer, origin, factor)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in ("base_lrs", "max_lrs", "_last_lr", "min_lrs", "base_momentums", "max_momentums", "lr_lambdas"):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == len(optimizer.param_groups) - 1:
            values.append(values[origin] * factor if name.endswith(("lrs", "_lr")) else values[origin])
