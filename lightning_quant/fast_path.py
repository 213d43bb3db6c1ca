"""PyTorch's transformer layers have an inference path that reads their weights past the layers: it is closed."""

from __future__ import annotations

from torch import nn

from lightning_quant.layers import QuantLayer

SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",  # 0: no activation the fused kernel knows
    nn.TransformerEncoder: "use_nested_tensor",
}


def close_fast_paths(model: nn.Module) -> None:
    """Send evaluation through the layers, where some of them are quantized now; what is computed stays the same."""
    for module in model.modules():
        for kind, switch in SWITCHES.items():
            if isinstance(module, kind) and any(isinstance(m, QuantLayer) for m in module.modules()):
                module.__dict__.setdefault("_fast_path", getattr(module, switch))
                setattr(module, switch, 0)


def open_fast_paths(model: nn.Module) -> None:
    """Undo it."""
    for module in model.modules():
        for kind, switch in SWITCHES.items():
            if isinstance(module, kind) and "_fast_path" in module.__dict__:
                setattr(module, switch, module.__dict__.pop("_fast_path"))
