"""The models that ``overhead.py`` trains: families, their sizes here and on a GPU, and what is put around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

GPU_TOKENS = {"batch": 8, "tokens": 1024}
IMAGE = {"image": 224, "classes": 1000}
RANK = 16


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        title: What a table calls it; braces hold names of sizes.
        schemes: Schemes it is measured under.
        sizes: On a processor, where a step takes seconds.
        gpu: What is larger on a GPU: the published size.
        tiny: What is smaller in the step that is taken to load everything.
    """

    title: str
    schemes: tuple[str, ...]
    sizes: Mapping[str, Any]
    gpu: Mapping[str, Any]
    tiny: Mapping[str, Any]


SMALL_LLAMA = {"vocab": 2048, "hidden": 512, "intermediate": 1408, "layers": 4, "heads": 8, "batch": 8, "tokens": 256}
LLAMA_1B = {"vocab": 2048, "hidden": 2048, "intermediate": 8192, "layers": 1, "heads": 32, "kv_heads": 8}
TINY_LLAMA = {"vocab": 64, "hidden": 128, "intermediate": 256, "layers": 1, "heads": 2, "kv_heads": 2}
VIT_B = {"hidden": 768, "intermediate": 3072, "layers": 2, "heads": 12, "patch": 16, **IMAGE, "batch": 8}
TINY_VIT = {"hidden": 64, "intermediate": 128, "layers": 1, "heads": 2, "image": 32, "classes": 8, "batch": 1}
RESNET_50 = {"width": 64, "layers": [1, 1, 1, 1], **IMAGE, "image": 128, "batch": 8}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "{layers}-layer Llama (hidden {hidden}, {batch} x {tokens} tokens",
        ("w4a16-g32", "w8a8", "w8a8-static"),
        SMALL_LLAMA,
        {},
        {**TINY_LLAMA, "batch": 1, "tokens": 32},
    ),
    "llama-1b": Family(
        "Llama of the 1B shape ({layers} of its 16 layers, hidden {hidden}, {batch} x {tokens} tokens",
        ("w4a16-g128", "w8a8"),
        {**LLAMA_1B, "batch": 4, "tokens": 256},
        {"layers": 16, "vocab": 128256, **GPU_TOKENS},
        {**TINY_LLAMA, "batch": 1, "tokens": 32},
    ),
    "vit-b": Family(
        "ViT-B/{patch} ({layers} of its 12 layers, hidden {hidden}, {batch} images of {image} pixels",
        ("w4a16-g32", "w8a8-static"),
        VIT_B,
        {"layers": 12, "batch": 128},
        TINY_VIT,
    ),
    "resnet-50": Family(
        "ResNet-50 (bottlenecks per stage: {layers}, {batch} images of {image} pixels",
        ("w4a16-channel", "w8a8-static"),
        RESNET_50,
        {"layers": [3, 4, 6, 3], "image": 224, "batch": 128},
        {"width": 8, "layers": [1, 1, 1, 1], "image": 32, "classes": 8, "batch": 2},
    ),
}


def sizes(family: str, device: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a family on a device, with what the user has given put over them."""
    own = {**FAMILIES[family].sizes, **(FAMILIES[family].gpu if device == "cuda" else {})}
    unknown = [f"--{name}" for name in given if name not in own]
    if unknown:
        raise SystemExit(f"{family}: expected {', '.join('--' + n for n in own)}, got {', '.join(unknown)}. Leave out.")
    if isinstance(own["layers"], list) and "layers" in given:
        given = {**given, "layers": [given["layers"]] * len(own["layers"])}
    return {**own, **given}


def title(settings: Mapping[str, Any]) -> str:
    """What a table says of a model."""
    name = FAMILIES[settings.get("model", "llama")].title
    return name.format(**settings) + f", {settings['dtype']}" + (", compiled" * bool(settings.get("compile_model")))


def build_model(settings: Mapping[str, Any]) -> nn.Module:
    """A model from a config, with fixed random weights, on the current default device and in float32."""
    torch.manual_seed(0)
    return BUILDERS[settings.get("model", "llama")](settings).train()


def make_inputs(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch: tokens and what follows them, or images and their classes."""
    if "vocab" in settings:
        ids = torch.randint(0, settings["vocab"], (settings["batch"], settings["tokens"]))
        return {"input_ids": ids, "labels": ids}
    batch = settings["batch"], 3, settings["image"], settings["image"]
    return {"pixel_values": torch.randn(batch), "labels": torch.randint(0, settings["classes"], batch[:1])}


def placed(inputs: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch on a device; images in the model's dtype."""
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}


def _llama(s: Mapping[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["intermediate"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s.get("kv_heads", s["heads"]),
        max_position_embeddings=s["tokens"],
        tie_word_embeddings=s.get("model") == "llama-1b",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _vit(s: Mapping[str, Any]) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=s["hidden"],
        intermediate_size=s["intermediate"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        image_size=s["image"],
        patch_size=s["patch"],
        num_labels=s["classes"],
    )
    return ViTForImageClassification(config)


def _resnet(s: Mapping[str, Any]) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=s["width"],
        hidden_sizes=[s["width"] * 4 * 2**stage for stage in range(len(s["layers"]))],
        depths=s["layers"],
        layer_type="bottleneck",
        num_labels=s["classes"],
    )
    return ResNetForImageClassification(config)


BUILDERS = {"llama": _llama, "llama-1b": _llama, "vit-b": _vit, "resnet-50": _resnet}


def add_lora(model: nn.Module, merged: bool) -> nn.Module:
    """PEFT's LoRA on every Linear layer but the head.

    Args:
        model: The float model.
        merged: Let each layer's forward be one product with W + s B A, as LoRA that is trained for rounding needs it,
            instead of PEFT's two paths.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear

    class MergedLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            (name,) = self.active_adapters
            weight = self.base_layer.weight + self.get_delta_weight(name)
            return F.linear(x, weight, self.base_layer.bias)

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    for module in wrapped.modules() if merged else ():
        if type(module) is Linear:
            module.__class__ = MergedLinear
    return wrapped.train()


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep the blocks' inputs alone for backward, which runs each block once more."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
