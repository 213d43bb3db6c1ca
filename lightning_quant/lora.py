"""LoRA whose merge is exact: the layer rounds what merging will store.

Where peers train ``Q(W) x + s B A x`` and then ship ``Q(W + s B A)``, another function, the layer here computes

    y = Q(W + s B A) x + b

in training and evaluation alike, with the sum formed by the very operations that merging uses.  ``merge_and_unload``
leaves quantized layers with their quantizers behind, and their integers are those of the last training step.

Adapters of every rank, with rsLoRA's scale, trained biases and DoRA's magnitudes are served, several at a time.
PEFT's layer changes its class in place, so that ``get_peft_model`` stays the user's own call.

Dropout cannot act on a token's path through A alone, for there is one weight for all of them: a share p of A's input
features is left out (the same for the whole batch) and the others are multiplied with 1 / (1 - p).  **Deviation** from
Hu et al. 2021, arXiv:2106.09685, whose dropout draws anew for every token; evaluation and merge agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_quant import zero
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import Estimator
from lightning_quant.layers import QuantLayer, QuantLinear
from lightning_quant.packed import CompactLinear, recomputed
from lightning_quant.rounded_product import rounded_product


class QuantLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA of a Linear (or GPT-2's Conv1D) whose base layer rounds the merged weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's product with the merged weight on its grid."""
        if kwargs.get("adapter_names") is not None:
            got = "adapter_names, another adapter for each row"
            raise ValueError(explain("LoRA", "one set of adapters per batch", got, "Call the model once per adapter."))
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B A`` in the layout of the weight; in training with some of A's input features left out."""
        drop: Any = self.lora_dropout[adapter]
        if not (self.training and isinstance(drop, nn.Dropout) and drop.p > 0) or self.merged or self._exact:
            delta: Tensor = super().get_delta_weight(adapter)
            return delta
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        product: Tensor = b @ (a * F.dropout(torch.ones_like(a[:1]), drop.p))
        return (product.T if self.fan_in_fan_out else product) * float(self.scaling[adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put what training rounded into the base weight, bit for bit."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        base: QuantLayer = self.get_base_layer()  # type: ignore[assignment]
        with torch.no_grad():
            weight, bias = self.merged_terms(names, exact=True)
            if safe_merge and not bool(torch.isfinite(weight).all()):
                got = f"NaN or infinity from the adapters {names}"
                raise ValueError(explain("merge", "finite weights", got, "Take an earlier checkpoint."))
            if isinstance(base, CompactLinear):
                base.unpack(weight)
            else:
                base.weight.data = weight
            if bias is not base.bias and base.bias is not None and bias is not None:
                base.bias.data = bias
        self.merged_adapters += names

    def merged_terms(self, names: list[str], exact: bool = False) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight and bias with these adapters in them, differentiable, in the weight's dtype."""
        base: QuantLayer = self.get_base_layer()  # type: ignore[assignment]
        own = base.weight
        weight, bias = own, base.bias
        self._exact = exact
        try:
            with torch.autocast(weight.device.type, enabled=False):  # merging knows no autocast
                for name in names:
                    delta = self.get_delta_weight(name)
                    weight = weight + delta
                    if name in self.lora_variant:
                        weight = weight * self._magnitude(name, own, delta)
                    weight = weight.to(own.dtype)
                    if self.lora_bias[name]:
                        bias = (bias + self.lora_B[name].bias * self.scaling[name]).to(own.dtype)
        finally:
            self._exact = False
        return weight, bias

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the active adapters."""
        for holder in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            for name in self.active_adapters:
                if name in holder:
                    yield from holder[name].parameters()

    def _magnitude(self, name: str, weight: Tensor, delta: Tensor) -> Tensor:
        """DoRA's factor per output channel: its magnitude over the norm of the sum, which gets no gradient."""
        vector: Any = self.lora_magnitude_vector[name]
        rows = delta.T if self.fan_in_fan_out else delta
        norm = vector.get_weight_norm(weight, rows, scaling=1).detach()
        factor: Tensor = (vector.weight / norm).view(-1, 1)
        return factor.T if self.fan_in_fan_out else factor

    _exact = False


class LoraFold:
    """What a base layer asks for its weight: see ``QuantLayer.folds``.

    Args:
        lora: The layer around it, PEFT's; it becomes ours.
    """

    def __init__(self, lora: nn.Module) -> None:
        self.born = type(lora)
        lora.__class__ = QuantLoraLinear
        self.lora: QuantLoraLinear = lora  # type: ignore[assignment]

    def fold(self, layer: QuantLayer) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias with the active adapters merged in."""
        lora = self.lora
        if lora.disable_adapters or lora.merged:
            return layer.weight, layer.bias
        return lora.merged_terms([n for n in lora.active_adapters if n in lora.lora_A])

    def through(self, layer: QuantLayer, x: Tensor, *sizes: Any) -> Tensor:
        """The layer's output; of all that is of the weight's size, nothing is kept for backward."""
        if any(name in self.lora.lora_bias and self.lora.lora_bias[name] for name in self.lora.active_adapters):
            return layer.product(x, *layer.quant_terms())  # a trained bias is not a matter of the weight
        trained = [p for p in (*self.sources(), *layer.weight_quant.parameters()) if p.requires_grad]
        draws, parts = _draws(self.lora), any(zero.is_partitioned(p) for p in (*layer.parameters(), *trained))
        if type(layer) is QuantLinear and layer.recomputes and torch.is_grad_enabled() and not (draws or parts):
            y = rounded_product(layer, x, self.fold(layer)[0], lambda: self.fold(layer)[0])
            if y is not None:
                return y
        return recomputed(layer, x, trained, draws)

    def sources(self) -> list[nn.Parameter]:
        """What the active adapters train."""
        return list(self.lora.adapter_parameters())

    def undo(self) -> None:
        """Give PEFT its layer back."""
        self.lora.__class__ = self.born  # type: ignore[assignment]


def as_linear(lora: nn.Module) -> None:
    """Let PEFT's layer for bitsandbytes be its layer for a float Linear."""
    lora.__class__ = LoraLinear


def _draws(lora: QuantLoraLinear) -> bool:
    """Whether forming the weight draws random numbers."""
    return lora.training and any(isinstance(d, nn.Dropout) and d.p > 0 for d in lora.lora_dropout.values())


def check_lora(path: str, module: nn.Module, rule: Estimator) -> None:
    """Refuse what has no merged weight to round.

    Raises:
        AttachError: Merged already, a variant other than DoRA, or a method with state per element of the weight.
    """
    if rule.role(True).holds_elements:
        got = f"{type(rule).__name__.lower()}, which steers elements of the layer's own weight"
        cure = 'Use lsq, ste or pege with theta="group"; or train without adapters.'
        raise AttachError(explain(path, "a method that rounds any weight it is given", got, cure))
    lora: Any = module
    if lora.merged:
        cure = "Call unmerge_adapter(), or merge_and_unload() and quantize what that returns."
        raise AttachError(explain(path, "adapters beside the base weight", f"{lora.merged_adapters} merged", cure))
    for name, variant in lora.lora_variant.items():
        if not isinstance(variant, DoraLinearVariant):
            got, cure = f"{type(variant).__name__} ({name})", "Use plain LoRA, rsLoRA or DoRA."
            raise AttachError(explain(path, "a LoRA that merges into its base weight", got, cure))
