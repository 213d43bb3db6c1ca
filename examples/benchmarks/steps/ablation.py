"""What each optimisation of fake quantization buys: ``overhead.py --ablate``.

Methods run with everything on, and without one optimisation at a time (``steps.switches``), by turns with plain
training.  Beside what was measured stands what was predicted: bytes, from ``steps.bytes``, at the bandwidth of this
machine's memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lightning_quant import QuantConfig
from lightning_quant.roofline import measure
from steps.bytes import READ_WRITE, Survey, Traffic, passes, survey, traffic
from steps.candidates import BASELINES, Candidates, ours
from steps.models import FAMILIES, build_model, make_inputs
from steps.runs import Run, say
from steps.switches import SWITCHES, applying


def ablated(family: str) -> Candidates:
    """Plain training, each method whole, and each without what it has, one method at a time."""
    weights, both = FAMILIES[family].schemes[:2]
    found: Candidates = {"plain": BASELINES["plain"]}
    for method, scheme in (
        ("ste", weights),
        ("lsq", weights),
        ("pege", weights),
        ("pege element", weights),
        ("ste", both),
    ):
        name = f"ours {method} {scheme}"
        own = ours(method, scheme, compiled=True)
        found[name] = own
        for switch in applying(method, scheme):
            found[f"{name} without {switch}"] = {**own, "without": switch}
    return found


def predicted(candidate: dict[str, Any], found: Survey, width: int) -> Traffic:
    """Bytes of a candidate's step, with what it lacks left out."""
    config = config_of(candidate)
    without = candidate.get("without")
    if without is None:
        return traffic(found, passes(config), width)
    switch = SWITCHES[without]
    with switch.replaced():
        fused, ours = without not in ("kernels", "fusion"), without not in ("C++", "absmax")
        each = passes(config, fused=fused, change=switch.change, in_passing=ours)
    if without == "together":
        each = replace(each[0], again=READ_WRITE), each[1]
    return traffic(found, each, width, recompute=without != "recompute", sharing=without != "sharing")


def config_of(candidate: dict[str, Any]) -> QuantConfig:
    """The config of one of our candidates."""
    return QuantConfig.parse(candidate["method"], candidate["scheme"], calibration=1, **candidate["options"])


def surveyed(candidate: dict[str, Any], settings: dict[str, Any]) -> Survey:
    """What the model of these settings has to do under a candidate's scheme."""
    return survey(partial(build_model, settings), make_inputs(settings), config_of(candidate))


def run(measurement: Run) -> dict[str, Any]:
    """Measure, and predict beside it.

    Args:
        measurement: Of ``ablated(...)`` or some of it.

    Returns:
        ``candidates`` with a prediction each, and the ``bandwidth`` in bytes per second that it is for.
    """
    settings = measurement.settings
    torch.set_num_threads(settings["threads"])
    bandwidth = bandwidth_of(settings["device"])
    say(f"memory: {bandwidth / 1e9:.1f} GB/s")
    found = measurement.measure()
    width = getattr(torch, settings["dtype"]).itemsize
    seconds = found["plain"]["seconds"]
    surveys: dict[str, Survey] = {}
    for name, figures in found.items():
        candidate = measurement.candidates[name]
        if candidate["kind"] != "ours":
            continue
        scheme = candidate["scheme"]
        surveys[scheme] = surveys.get(scheme) or surveyed(candidate, settings)
        guess = predicted(candidate, surveys[scheme], width)
        ratio = round(1 + guess.moved / bandwidth / seconds, 4)
        figures["predicted"] = {"moved": guess.moved, "kept": guess.kept, "ratio": ratio}
        figures["without"] = candidate.get("without")
    return {"bandwidth": bandwidth, "candidates": found}


def bandwidth_of(device: str, size: int = 2**28) -> float:
    """Bytes per second to and from memory: of the processor's as ``roofline`` measures it, of a GPU by a copy."""
    if device == "cpu":
        return measure(buffer=size, size=256).bandwidth
    numbers = torch.ones(size, device=device)
    copied = torch.empty_like(numbers)
    best = float("inf")
    for _ in range(5):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        copied.copy_(numbers)
        events[1].record()
        events[1].synchronize()
        best = min(best, events[0].elapsed_time(events[1]) / 1000)
    return 2 * numbers.numel() * numbers.element_size() / best
