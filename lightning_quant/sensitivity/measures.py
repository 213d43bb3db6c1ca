"""How much a layer suffers from few bits: five measures, each a number that adds up over layers.

* ``kl``, ``mse``, ``loss``: one layer at a time is quantized, the model is run, and its output compared with that of
  the float model: the divergence of the distributions over the last dimension, the mean squared difference, or the
  rise of the loss, which may be negative.  ``layers x batches`` runs for each scheme.
* ``sqnr``: the layer is given its float input, and ``noise / signal = |y - y_q|^2 / |y|^2`` is taken of its output;
  both its weight and its input are quantized.  One run per batch for each scheme.
* ``hessian``: ``Tr(H) / n * |W_q - W|^2`` (HAWQ-V2, arXiv:1911.03852, equation 2.11), H the Hessian of the loss in the
  layer's weight, of n numbers.  Probes once for all schemes and no further run; the rounding of inputs is not seen.
  **Deviation**: a trace counts with at least its standard error, so that noise makes no layer free of charge.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_quant.attach import quantizers
from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.sensitivity.trace import Trace

OUTPUTS = ("kl", "mse")
MEASURES = (*OUTPUTS, "loss", "sqnr", "hessian")

Layers = Mapping[str, QuantLayer]
Group = tuple[str, ...]
Details = dict[str, dict[str, float]]


@contextmanager
def only(active: Sequence[FakeQuantizer]) -> Iterator[None]:
    """While open, these quantizers of a model whose quantizers are off are on."""
    try:
        for q in active:
            q.enabled = True
        yield
    finally:
        for q in active:
            q.enabled = False


def one_at_a_time(
    layers: Layers, groups: Sequence[Group], evaluate: Callable[[], float], baseline: float, what: str
) -> list[float]:
    """Rise of a figure when a group alone is quantized."""
    found = []
    for group in track(groups, what):
        with only([q for path in group for _, q in quantizers(layers[path])]):
            found.append(evaluate() - baseline)
    return found


def noise_shares(layers: Layers, run: Callable[[Any], Any], batches: Sequence[Any], what: str) -> Details:
    """Noise over signal of each layer's weight, input and output; of an input in float it is 0.

    Args:
        layers: By path, quantizers off.
        run: The model's forward on a batch.
        batches: Data.
        what: For the progress bar.

    Returns:
        By path ``weight``, ``input`` and ``output``.  Weights that belong to no call of their own (fused experts) have
        their own noise for that of the output.
    """
    sums: dict[tuple[str, str], Tensor] = {}

    def note(path: str, name: str, clean: Tensor, noisy: Tensor) -> None:
        wide = torch.promote_types(clean.dtype, torch.float32)
        pair = [torch.linalg.vector_norm(t.to(wide)).double().square() for t in (noisy - clean, clean)]
        sums[path, name] = sums.get((path, name), 0) + torch.stack(pair)

    def hook_of(path: str) -> Callable[..., None]:
        def hook(layer: QuantLayer, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            with only([q for _, q in quantizers(layer)]):
                note(path, "output", y, layer.forward(*args, **kwargs))
                if layer.input_quant is not None:
                    x = args[0] if args else next(iter(kwargs.values()))
                    note(path, "input", x, layer.input_quant(x))

        return hook

    handles = [layer.register_forward_hook(hook_of(p), with_kwargs=True) for p, layer in layers.items()]
    try:
        for batch in track(batches, what):
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, layer in layers.items():
        with only([layer.weight_quant]):
            note(path, "weight", layer.folded()[0].detach(), layer.on_grid())
    found: Details = defaultdict(lambda: {"weight": 0.0, "input": 0.0, "output": 0.0})
    for (path, name), pair in sums.items():
        noise, signal = pair.tolist()
        found[path][name] = noise / signal if signal else 0.0
    return found


def decibels(share: float) -> float:
    """Signal to noise, of noise over signal.

    >>> decibels(0.01), decibels(0)
    (20.0, inf)
    """
    return -10 * math.log10(share) if share > 0 else math.inf


def weighted_errors(layers: Layers, found: Mapping[str, Trace]) -> Details:
    """For each layer the squared error of its rounded weight, and that times the mean diagonal of the Hessian."""
    details: Details = {}
    for path, layer in layers.items():
        with only([layer.weight_quant]):
            error = float((layer.on_grid() - layer.folded()[0].detach()).float().square().sum(dtype=torch.float64))
        trace = found[path]
        details[path] = {"error": error, "loss": max(trace.mean, trace.error) * error}
    return details


def comparison(measure: str, floats: Sequence[Any], run: Callable[[int], Any]) -> Callable[[], float]:
    """What evaluates a model: the mean of a measure over batches.

    Args:
        measure: ``kl``, ``mse`` or ``loss``.
        floats: The float model's outputs, batch by batch (not read with ``loss``).
        run: The model's output for a batch's number.
    """

    def value(i: int) -> Tensor:
        if measure == "loss":
            return loss_of(run(i)).double()
        found, wanted = (logits_of(t).float() for t in (run(i), floats[i]))
        if measure == "mse":
            return (found - wanted).square().mean(dtype=torch.float64)
        rows, like = found.flatten(0, -2).log_softmax(-1), wanted.flatten(0, -2).log_softmax(-1)
        return F.kl_div(rows, like, reduction="batchmean", log_target=True).double()

    return lambda: float(torch.stack([value(i) for i in range(len(floats))]).mean())


def loss_of(output: Any) -> Tensor:
    """The loss in what a model or the user's ``loss`` returned.

    Raises:
        ValueError: There is none.
    """
    found = output.get("loss") if hasattr(output, "get") else output
    if not isinstance(found, Tensor) or found.numel() != 1:
        cure = "Put labels into the batches, pass loss=lambda model, batch: ..., or use measure='kl'."
        raise ValueError(explain("sensitivity", "a model that returns its loss", _words(found), cure))
    return found.reshape(())


def logits_of(output: Any) -> Tensor:
    """The first output that counts."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output["logits"] if "logits" in output else output[0]
    return found


def _words(found: Any) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
