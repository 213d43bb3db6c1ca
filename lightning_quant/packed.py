"""Linear layers whose frozen weight is stored in a few bits: the base of QLoRA, without another package.

The weight is rounded once to any grid that weights have (4 bits, NF4, 8 bits, ...), its codes are packed, two to a
byte where a code fits into 4 bits, and every use makes the dense weight anew.  Under LoRA that is twice a step and
layer, and what training rounds to its target grid is the dense base plus the adapters: the export is exact.  What the
base lost when it was packed stays lost, unless LoftQ moves the best part of it into the adapters first.

Source: Dettmers et al. 2023, arXiv:2305.14314 (a base in 4 bits under LoRA); Li et al. 2023, arXiv:2310.08659 (LoftQ:
alternate rounding and the best adapters for what rounding lost).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_quant import zero
from lightning_quant.adapters import beside, lora_layers
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import ESTIMATORS
from lightning_quant.granularity import Granularity
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_weight
from lightning_quant.scheme import TensorSpec


class CompactLinear(nn.Linear):
    """A frozen ``nn.Linear`` whose ``weight`` is stored in a few bits and made dense, anew, at every use."""

    unpacked: type[nn.Module] = nn.Linear
    output_axis = 0

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``; backward makes the weight once more."""
        return recomputed(self, input)

    def quant_terms(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the product."""
        return self.weight, self.bias

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product with a matrix."""
        return F.linear(x, weight, bias)

    def unpack(self, weight: Tensor) -> None:
        """Become an ordinary layer with this weight."""
        self._drop_stored()
        self.__class__ = self.unpacked  # type: ignore[assignment]
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def _drop_stored(self) -> None:
        """Forget the stored weight."""
        raise NotImplementedError


def recomputed(layer: Any, x: Tensor, trained: Sequence[nn.Parameter] = (), draws: bool = False) -> Tensor:
    """A layer's output; of all that is of its weight's size, nothing is kept for backward.

    Args:
        layer: Has ``quant_terms()``, ``product(x, weight, bias)``, ``output_axis`` and ``bias``.
        x: Its input, (..., in).
        trained: Parameters that get a gradient through the weight.
        draws: Whether making the weight draws random numbers.

    Returns:
        (..., out).
    """
    given = [t for t in (x, layer.bias, *trained) if t is not None and t.requires_grad]
    parts = any(zero.is_partitioned(p) for p in (*layer.parameters(), *trained))  # gone when backward comes
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not given or parts:
        return layer.product(x, *layer.quant_terms())  # type: ignore[no-any-return]
    return _Recomputed.apply(layer, draws, x, layer.bias, *trained)  # type: ignore[no-any-return, no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """A layer's product that makes its weight once more in backward instead of keeping it.

    What is saved is the input; a dense, a merged and a rounded weight live while in use.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layer: Any, draws: bool, x: Tensor, bias: Tensor | None, *trained: Tensor
    ) -> Tensor:
        """The product; ``trained`` are the parameters that get a gradient through the weight."""
        ctx.layer, ctx.trained, ctx.draws = layer, trained, draws
        ctx.states = _generator_states(x) if draws else []
        ctx.save_for_backward(x)
        y: Tensor = layer.product(x, *layer.quant_terms())
        out: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # no view: what comes next may change it in place
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients of the input, of the bias and of everything the weight is made of."""
        layer, trained = ctx.layer, ctx.trained
        (x,) = ctx.saved_tensors
        now = _generator_states(x) if ctx.draws else []
        _set_generators(x, ctx.states)
        twice = torch.is_grad_enabled()  # this backward shall be differentiated itself
        with torch.set_grad_enabled(bool(trained) or twice), _unnoticed(layer._modules.get("weight_quant")):
            weight, _ = layer.quant_terms()
        _set_generators(x, now)
        rows = layer.output_axis  # of a Linear's weight 0, of a Conv1D's 1
        grad_x = None
        if ctx.needs_input_grad[2]:
            dense = (weight if twice else weight.detach()).to(grad.dtype)
            grad_x = (grad @ (dense.T if rows else dense)).to(x.dtype)
            del dense
        flat = grad.flatten(0, -2)
        grad_bias = flat.sum(0).to(layer.bias.dtype) if ctx.needs_input_grad[3] else None
        found: Sequence[Tensor | None] = [None] * len(trained)
        if weight.requires_grad:
            edge, kind = get_gradient_edge(weight), weight.dtype
            del weight  # before as much again is needed for its gradient
            given = x.flatten(0, -2).to(grad.dtype)
            grad_w = (given.T @ flat if rows else flat.T @ given).to(kind)
            found = torch.autograd.grad(edge, trained, grad_w, allow_unused=True, create_graph=twice)
        return (None, None, grad_x, grad_bias, *found)


@contextmanager
def _unnoticed(q: FakeQuantizer | None) -> Iterator[None]:
    """While open, what the quantizer does is not counted as a call of the model, nor measured."""
    if q is None:
        yield
        return
    before = q.called, q.measuring
    q.measuring = False
    try:
        yield
    finally:
        q.called, q.measuring = before


def _generator_states(x: Tensor) -> list[Tensor]:
    return (
        [torch.get_rng_state()]
        if x.device.type == "cpu"
        else [torch.get_device_module(x.device).get_rng_state(x.device)]
    )


def _set_generators(x: Tensor, states: list[Tensor]) -> None:
    for state in states:
        if x.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(x.device).set_rng_state(state, x.device)


class PackedLinear(CompactLinear):
    """A frozen ``nn.Linear`` in a few bits: buffers ``weight_codes`` (uint8) and ``weight_scale``, no parameter."""

    weight_codes: Tensor
    weight_scale: Tensor
    packing: tuple[FakeQuantizer, ...]  # grid and granularity; a tuple, so that it is no child

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, (out, in), made anew, in the scales' dtype."""
        (q,) = self.packing
        codes = self.weight_codes
        if codes.shape[-1] != self.in_features:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[:, : self.in_features]
        view = q.granularity.view(codes.float() + int(q.low))
        dense = q.real(view, self.weight_scale, 0.0, None)
        return q.granularity.unview(dense, (self.out_features, self.in_features)).to(self.weight_scale.dtype)

    def _drop_stored(self) -> None:
        for name in ("weight_codes", "weight_scale"):
            del self._buffers[name]
        del self.packing


def pack(model: nn.Module, scheme: str = "nf4-g64", loftq: int = 0) -> int:
    """Store frozen Linear layers in a few bits, in place.

    Call it after ``get_peft_model``, which freezes the base, and before ``attach``.  Layers that train, and those that
    share their weight with another module, stay as they are.

    Args:
        model: Holds the layers.
        scheme: Weight half of the scheme grammar: what the base is stored in, not what is trained for.
        loftq: Rounds of LoftQ: a layer's (one) adapter takes over the best rank-r part of what rounding lost.

    Returns:
        Bytes saved.

    Raises:
        AttachError: No frozen Linear layer, a group size that does not divide, or LoftQ for several adapters or beside
            a base that bitsandbytes has rounded.
        ValueError: A scheme that cannot be read, or a grid with a zero point.
    """
    spec = TensorSpec.parse(scheme)
    if spec.symmetric is False:
        raise ValueError(explain("pack", "a grid around 0", repr(scheme), "Leave out -asym."))
    owners: dict[int, int] = {}
    for p in (p for m in model.modules() for p in m.parameters(recurse=False)):
        owners[id(p)] = owners.get(id(p), 0) + 1
    aside = beside(model)
    layers = [
        (path, m)
        for path, m in model.named_modules()
        if type(m) is nn.Linear and not m.weight.requires_grad and owners[id(m.weight)] == 1 and id(m) not in aside
    ]
    if not layers:
        cure = "Wrap the model with get_peft_model first, which freezes it."
        raise AttachError(explain("pack", "frozen Linear layers", "none", cure))
    adapters = {id(lora.base_layer): lora for _, lora in lora_layers(model)} if loftq else {}
    for path, lora in lora_layers(model) if loftq else ():
        if type(lora).__module__ == "peft.tuners.lora.bnb":
            got = "one that bitsandbytes has rounded, whose losses are not known here"
            cure = "Pack a float base; or, on CUDA, call peft.replace_lora_weights_loftq before attach."
            raise AttachError(explain(path, "a float base for LoftQ", got, cure))
    quantizers = [_quantizer(path, layer, spec) for path, layer in layers]
    saved = 0
    for (_, layer), q in track(list(zip(layers, quantizers, strict=True)), "packing weights"):
        codes, scale = _codes(q, layer.weight.detach(), adapters.get(id(layer)), loftq)
        saved += layer.weight.numel() * layer.weight.element_size()
        del layer._parameters["weight"]
        layer.__class__ = PackedLinear
        layer.packing = (q,)  # type: ignore[assignment]
        layer.register_buffer("weight_codes", codes)
        layer.register_buffer("weight_scale", scale)
        saved -= codes.numel() + scale.numel() * scale.element_size()
    return saved


def _quantizer(path: str, layer: nn.Linear, spec: TensorSpec) -> FakeQuantizer:
    rule = ESTIMATORS["ste"]()
    resolved = resolve_weight(spec, False, rule, f"{path}.weight")
    granularity = Granularity(resolved.granularity, 0, resolved.group_size or 0)
    weight = layer.weight
    q = FakeQuantizer(
        resolved, granularity, rule, shape=tuple(weight.shape), where=path, dtype=weight.dtype, device=weight.device
    )
    return q.requires_grad_(False)


@torch.no_grad()
def _codes(q: FakeQuantizer, dense: Tensor, lora: Any, rounds: int) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a weight; with LoftQ, of what its adapter leaves over."""
    rest = dense
    for i in range(rounds if lora is not None else 0):
        if i:
            rest = dense - _delta(lora)
        q.fit_range(rest)
        _fit_adapter(lora, dense - q.on_grid(rest))
    if rounds == 0 or lora is None:
        q.fit_range(rest)
    code, scale, _, _ = q.stored(rest)
    unsigned = (code.to(torch.int16) - int(q.low)).to(torch.uint8)
    if q.high - q.low < 16:
        even = F.pad(unsigned, (0, unsigned.shape[-1] % 2))
        unsigned = even[:, ::2] | (even[:, 1::2] << 4)
    return unsigned.contiguous(), scale.clone()


def _delta(lora: Any) -> Tensor:
    (name,) = lora.lora_A
    delta: Tensor = lora.get_delta_weight(name)
    return delta


def _fit_adapter(lora: Any, lost: Tensor) -> None:
    """The adapter that is nearest to what was lost: ``s B A = U_r S_r V_r^T``, the root of S in each factor."""
    names = list(lora.lora_A)
    if len(names) != 1:
        cure = "Pack before adding the others."
        raise AttachError(explain("pack(loftq=...)", "one adapter per layer", names, cure))
    rank, factor = lora.r[names[0]], lora.scaling[names[0]]
    u, s, v = torch.linalg.svd(lost.float(), full_matrices=False)
    root = s[:rank].sqrt()
    a, b = lora.lora_A[names[0]].weight, lora.lora_B[names[0]].weight
    a.copy_(root[:, None] * v[:rank] / factor)
    b.copy_(u[:, :rank] * root)


__all__ = ["CompactLinear", "PackedLinear", "pack", "recomputed"]
