"""Fused experts: three-dimensional weights that no Linear holds, quantized expert by expert.

transformers keeps the experts of a layer in two parameters, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, and
computes with them in one of several functions that read them off the module (``use_experts_implementation``: eager,
``batched_mm``, ``grouped_mm``, ...).  Here such a module's forward hands the same function a view of the module on
which these names are the rounded weights.  The module itself is not touched: parameters keep identity and names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from lightning_quant import zero
from lightning_quant.layers import QuantLayer


class ExpertWeight(QuantLayer):
    """One weight of fused experts, (experts, out, in), seen as a layer: each row of each expert has its own scales.

    It lives beside the weight, as ``gate_up_proj_quant`` beside ``gate_up_proj``, and holds the quantizer only.
    Inputs stay in float: that of ``down_proj`` arises inside of the experts' function.

    Args:
        owner: The module that holds the weight.
        name: The weight's name in it.
    """

    output_axis = 1
    stacked = True
    input_channels = ""
    bias = None

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = (owner,), name  # a tuple, so that the owner is no child of its own part
        self.train(owner.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The owner's parameter."""
        return self.owner[0]._parameters[self.name]  # type: ignore[return-value]

    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight on its grid."""
        y: Tensor = self.weight_quant(self.weight)
        return y

    def weight_name(self, path: str) -> str:
        """The weight's name in the model, given this module's."""
        return path.removesuffix("_quant")

    def runs_in(self, path: str) -> str:
        """The path of the experts."""
        return path.rpartition(".")[0]

    def join(self) -> None:
        """Let the owner compute with the rounded weight."""
        (owner,) = self.owner
        owner.add_module(f"{self.name}_quant", self)
        if not isinstance(owner, QuantExperts):
            owner.__class__ = quant_class(type(owner))  # type: ignore[arg-type,assignment]

    def leave(self) -> None:
        """Let the owner be what it was."""
        (owner,) = self.owner
        del owner._modules[f"{self.name}_quant"]
        if isinstance(owner, QuantExperts):
            owner.__class__ = float_experts(owner)  # type: ignore[assignment]


class TransposedExpertWeight(ExpertWeight):
    """The same for (experts, in, out), as in GPT-OSS."""

    output_axis = 2

    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight on its grid, laid out as it was: products of another layout sum in another order."""
        return super().forward().contiguous()


class QuantExperts(nn.Module):
    """Put in front of a class of experts: computes with the weights that have quantizers, rounded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the float experts, by whatever implementation the model's config names."""
        weights = {m.name: m() for m in self.children() if isinstance(m, ExpertWeight)}
        return float_experts(self).forward(_Rounded(self, weights), *args, **kwargs)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled by the float class, since this one has no name to be found under."""
        return _blank, (float_experts(self),), self.__dict__


class _Rounded:
    """Experts with some of their weights rounded."""

    def __init__(self, experts: nn.Module, weights: dict[str, Tensor]) -> None:
        self.__dict__.update(weights)
        self.experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


@cache
def quant_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that experts of this class become."""
    return type(
        f"Quant{kind.__name__}", (QuantExperts, kind), {"__module__": __name__, "__doc__": QuantExperts.__doc__}
    )


def float_experts(module: QuantExperts) -> type[nn.Module]:
    """The class that quantized experts were born with."""
    return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, QuantExperts))


def _blank(kind: type[nn.Module]) -> nn.Module:
    made = quant_class(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def expert_weights(module: nn.Module) -> list[ExpertWeight]:
    """The weights of fused experts as layers to be; nothing for other modules.

    Experts are told by what transformers' ``use_experts_implementation`` gives a class, since all of its
    implementations compute with these names and nothing else.
    """
    kind = type(module)
    if not (kind.__module__.startswith("transformers.") and hasattr(module, "is_transposed")):
        return []
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    held = [module._parameters.get(name) for name in names]
    if not (hasattr(kind.forward, "__wrapped__") and all(p is not None and len(zero.shape(p)) == 3 for p in held)):
        return []
    made = TransposedExpertWeight if module.is_transposed else ExpertWeight
    return [made(module, name) for name in names]
