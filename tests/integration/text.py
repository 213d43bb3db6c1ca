"""Small models trained on English text, and outliers planted in what their layers read."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.rounding.data import read_text
from tests.integration.tiny import causal_lm

LENGTH, ROWS, FIRST = 48, 16, 32  # FIRST: the code of a space, the smallest of printable characters
PLANTED = [3, 17, 40]


@cache
def characters() -> Tensor:
    """The help topics of the standard library as numbers below 96."""
    kept = [ord(c) - FIRST for c in read_text(None).replace("\n", " ") if FIRST <= ord(c) < FIRST + 96]
    return torch.tensor(kept)


def batch(seed: int, held_out: bool = False) -> dict[str, Tensor]:
    """Rows of text with labels; the last tenth of the text is held out."""
    text = characters()
    cut = len(text) * 9 // 10
    low, high = (cut, len(text) - LENGTH) if held_out else (0, cut - LENGTH)
    starts = torch.randint(low, high, (ROWS,), generator=torch.Generator().manual_seed(seed))
    ids = torch.stack([text[s : s + LENGTH] for s in starts.tolist()])
    return {"input_ids": ids, "labels": ids}


CALIBRATION = [batch(1000 + seed) for seed in range(4)]
HELD_OUT = [batch(seed, held_out=True) for seed in range(4)]


def trained(family: str, steps: int = 250) -> PreTrainedModel:
    """A model that has learned something of the text."""
    torch.manual_seed(0)
    model = causal_lm(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def plant(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """Make three channels that the layers of each block read ``by`` times as large, which their weights undo."""
    for layer in getattr(model.model, "decoder", model.model).layers:
        attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
        first = getattr(layer, "input_layernorm", None) or layer.self_attn_layer_norm
        second = layer.post_attention_layernorm if mlp is not None else layer.final_layer_norm
        wide = (mlp.gate_proj, mlp.up_proj) if mlp is not None else (layer.fc1,)
        for norm, linears in ((first, (attention.q_proj, attention.k_proj, attention.v_proj)), (second, wide)):
            norm.weight[PLANTED] *= by
            if getattr(norm, "bias", None) is not None:
                norm.bias[PLANTED] *= by
            for linear in linears:
                linear.weight[:, PLANTED] /= by
    return model


@torch.no_grad()
def loss_of(model: PreTrainedModel, batches: list[dict[str, Tensor]] = HELD_OUT) -> float:
    return sum(float(model(**b).loss) for b in batches) / len(batches)


def quantized_loss(model: PreTrainedModel, config: QuantConfig, batches: list[dict[str, Tensor]] = HELD_OUT) -> float:
    """Loss of a quantized copy; static ranges are taken from the calibration batches."""
    model = copy.deepcopy(model)
    attach(model, config)
    if config.activation is not None and config.activation.dynamic is False:
        calibrate(model, CALIBRATION)
    return loss_of(model, batches)
