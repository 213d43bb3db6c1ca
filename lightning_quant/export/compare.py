"""Compare an export with the trained model: integers, scales, every layer's output, the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import float_paths
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.stored import Stored
from lightning_quant.export.verdict import LayerCheck, VerifyReport
from lightning_quant.export.writer import float_tensors


def compare(
    stored: Stored,
    trained: nn.Module,
    inputs: Mapping[str, Tensor] | None,
    tolerance: float | None,
    logits: bool = True,
) -> VerifyReport:
    """Tensor by tensor, then through the format's reader.

    Args:
        stored: The export.
        trained: The model with its quantizers, as it ships.
        inputs: Keyword inputs of the model; None: 2 x 32 token ids drawn with a fixed seed.
        tolerance: Largest logit difference that counts as equal; None: the reader's own.
        logits: Whether to run the models; without, one tensor is in memory at a time.
    """
    contents, other = _contents(stored, trained)
    notes = _notes(trained, stored)
    outputs, gaps = _outputs(stored, trained, inputs) if logits else ({}, (0.0, 0.0))
    order = [p for p in outputs if p in contents] + [p for p in contents if p not in outputs]
    checks = [LayerCheck(p, *contents[p], outputs.get(p, 0.0)) for p in order]
    if tolerance is None:
        tolerance = stored.tolerance
    return VerifyReport(str(stored.path), stored.format, *gaps, tolerance, checks, other, notes + stored.notes, logits)


def _contents(stored: Stored, trained: nn.Module) -> tuple[dict[str, tuple[int, float]], list[str]]:
    contents: dict[str, tuple[int, float]] = {}
    other = []
    for name, tensor, layer in float_tensors(trained):
        if layer is not None:
            contents[name.removesuffix(".weight")] = stored.layer(trained, name, layer)
        elif stored.differs(trained, name, tensor.detach()):
            other.append(name)
    return contents, other + stored.odd(trained)


def _notes(trained: nn.Module, stored: Stored) -> list[str]:
    notes = [stored.reason] if stored.reason else []
    inputs = [q for _, q in quantizers(trained) if not q.is_weight]
    if inputs and not stored.rounds_inputs:
        notes.append(f"{stored.format} keeps activations in float; outputs are compared without input quantizers")
    elif any(q.spec.dynamic and q.target == "vllm" for q in inputs):
        notes.append(
            "trained for target='vllm' (dynamic scale absmax/127); the reader here divides by 127.5, so outputs are "
            "compared under the reader's rule on both sides"
        )
    return notes


def _outputs(
    stored: Stored, trained: nn.Module, inputs: Mapping[str, Tensor] | None
) -> tuple[dict[str, float], tuple[float, float]]:
    shipped = stored.read(trained)
    if inputs is None:
        inputs = _token_inputs(trained)
    device = next(trained.parameters()).device
    names = float_paths(trained)
    layers = {
        layer.weight_name(str(names[p])).removesuffix(".weight"): layer.runs_in(p) for p, layer in quant_layers(trained)
    }
    paths = {p: str(names[p]) for p in layers.values()}
    with _ReaderRules(trained, stored), stored.following(trained, shipped, inputs):
        theirs = _run(trained, {k: v.to(device) for k, v in inputs.items()}, paths)
    try:
        ours = _run(shipped, inputs, {name: name for name in paths.values()})
    except Exception as error:  # a reader may find only now that a file is not what it says
        where, expected = str(stored.path), "an export that its reader can run"
        raise CheckpointError(explain(where, expected, f"{error!r:.300}", "Export again.")) from error
    gaps = {p: float((ours[p] - theirs[p]).abs().max()) for p in theirs if p in ours and p}
    outputs = {layer: gap for ran, gap in gaps.items() for layer, at in layers.items() if paths[at] == ran}
    gap = (ours[""] - theirs[""]).abs()
    return outputs, (float(gap.max()), float(gap.mean()))


def _token_inputs(trained: nn.Module) -> dict[str, Tensor]:
    if not hasattr(trained, "config"):
        raise ValueError(
            explain("verify", "inputs for a model that takes no tokens", "none", "Pass inputs={argument name: tensor}.")
        )
    vocabulary = int(trained.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    ids = torch.randint(0, vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """Outputs of these layers (path -> name) in the order they ran, and of the model under the empty name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output.detach().float().cpu().clone()  # an in-place ReLU may follow

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(name)) for p, name in paths.items()]
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    first = output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]
    found[""] = first.detach().float().cpu()
    return found


class _ReaderRules:
    """While comparing outputs, let the trained model follow what the reader does to activations, in its dtype.

    After training in mixed precision accelerate leaves a forward on the model that turns autocast on.
    """

    def __init__(self, trained: nn.Module, stored: Stored) -> None:
        self.trained, self.rule, self.rounds_inputs = trained, stored.rule, stored.rounds_inputs

    def __enter__(self) -> None:
        self.before = [(q, q.target, q.enabled) for _, q in quantizers(self.trained)]
        for q, _, _ in self.before:
            q.target = self.rule
            q.enabled = q.enabled and (q.is_weight or self.rounds_inputs)
        self.forward = self.trained.__dict__.get("forward")
        if "_original_forward" in self.trained.__dict__:
            self.trained.forward = self.trained._original_forward  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        for q, target, enabled in self.before:
            q.target, q.enabled = target, enabled
        if self.forward is not None:
            self.trained.forward = self.forward
