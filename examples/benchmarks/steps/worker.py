"""One candidate of ``overhead.py`` in an interpreter of its own: builds it, then takes a step whenever told to.

Reads commands from stdin, one a line (``step``, ``base``: its baseline's, ``memory``, ``profile``, ``quit``), and
answers each with a line of JSON.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from steps.models import FAMILIES, add_lora, build_model, checkpoint_blocks, make_inputs, placed

LR, DECAY, TOTAL_STEPS, CALIBRATION = 1e-4, 0.01, 1000, 1
LIBRARIES = {"torchao": "torchao", "modelopt": "nvidia-modelopt"}
Update = Callable[[Callable[[], None]], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Update:
    """The training loop everybody shares: backward, update, clear."""

    def update(backward: Callable[[], None]) -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours(model: nn.Module, method: str, scheme: str, options: dict[str, Any], without: str | None = None) -> Update:
    """This package, driven as a front end drives it.

    Args:
        model: The float model.
        method: The method.
        scheme: The scheme.
        options: Further arguments of ``QuantConfig.parse``.
        without: A name of ``SWITCHES``, an optimisation that is left out.
    """
    from lightning_quant import QuantConfig, QuantController
    from lightning_quant.optim import param_groups

    change = None
    if without is not None:
        from steps.switches import SWITCHES

        options, change = {**options, **SWITCHES[without].config}, SWITCHES[without].change
    config = QuantConfig.parse(method, scheme, calibration=CALIBRATION, **options)
    controller = QuantController(config)
    controller.prepare(model)
    if change is not None:
        change(model)
    controller.begin(TOTAL_STEPS)
    optimizer = adamw(param_groups(model, config, LR, DECAY))
    step = 0

    def update(backward: Callable[[], None]) -> None:
        nonlocal step
        controller.on_step(step, alone=True)
        backward()
        controller.before_optimizer_step()
        optimizer.step()
        controller.after_optimizer_step()
        optimizer.zero_grad()
        step += 1

    return update


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of all candidates, fused as ``transformers.Trainer``'s.

    On processors the other kind takes a square root that is slow for zeros, which the gradients of clipped weights are.
    """
    return torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, fused=True)


def torchao(model: nn.Module, scheme: str) -> None:
    """Torchao's QAT preparation: int4 weights by groups, or int8 with dynamic asymmetric int8 per token."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if scheme.startswith("w4a16"):
        config = QATConfig(
            weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=group_size(scheme)), step="prepare"
        )
    else:
        config = QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
            step="prepare",
        )
    quantize_(model, config, lambda m, path: isinstance(m, nn.Linear) and "lm_head" not in path)


def modelopt(model: nn.Module, scheme: str, inputs: dict[str, Tensor]) -> None:
    """ModelOpt's fake quantization: int4 weights by blocks, or int8 with static int8 per tensor."""
    import modelopt.torch.quantization as mtq

    if scheme.startswith("w4a16"):
        config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
        for rule in config["quant_cfg"]:
            if "block_sizes" in (rule.get("cfg") or {}):
                rule["cfg"]["block_sizes"][-1] = group_size(scheme)
    else:
        config = mtq.INT8_DEFAULT_CFG
    mtq.quantize(model, config, forward_loop=lambda m: m(**{k: v for k, v in inputs.items() if k != "labels"}))


def group_size(scheme: str) -> int:
    """The elements that share a scale."""
    found = re.search(r"-g(\d+)", scheme)
    assert found is not None
    return int(found[1])


def build(
    candidate: dict[str, Any], settings: dict[str, Any]
) -> tuple[Callable[[], Tensor], nn.Module, dict[str, Any]]:
    """The candidate's training step, which returns the loss, its model, and facts about it."""
    device, dtype = settings.get("device", "cpu"), getattr(torch, settings.get("dtype", "float32"))
    model = build_model(settings).to(device, dtype)
    inputs = placed(make_inputs(settings), device, dtype)
    kind, scheme = candidate["kind"], candidate.get("scheme", "")
    if candidate.get("checkpointing"):
        checkpoint_blocks(model)
    if candidate.get("lora"):
        model = add_lora(model, merged=kind == "plain" and not candidate.get("two_paths"))
    if kind == "ours":
        update = ours(model, candidate["method"], scheme, candidate.get("options", {}), candidate.get("without"))
    else:
        if kind == "torchao":
            torchao(model, scheme)
        elif kind == "modelopt":
            modelopt(model, scheme, inputs)
        model.train()
        update = plain(model, adamw([{"params": [p for p in model.parameters() if p.requires_grad]}]))
    head = type(getattr(model, "lm_head", nn.Linear(1, 1)))
    if kind in ("plain", "ours", "torchao") and head is not nn.Linear:
        raise RuntimeError(f"{kind}: expected lm_head in float, got {head}. Exclude it.")
    forward = torch.compile(model) if settings.get("compile_model") else model

    def step() -> Tensor:
        loss: list[Tensor] = []

        def backward() -> None:
            loss.append(forward(**inputs).loss)
            loss[0].backward()

        update(backward)
        return loss[0].detach()

    names = ["torch", "transformers", *(LIBRARIES[k] for k in [kind] if k in LIBRARIES)]
    names += ["peft"] * bool(candidate.get("lora"))
    versions = {name: importlib.metadata.version(name) for name in names}
    return step, model, {"versions": {**versions, "python": platform.python_version()}}


def status(field: str) -> int:
    """A line of /proc/self/status that counts memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected {field}, got none. Memory is measured on Linux only.")


def timed(step: Callable[[], Tensor], device: str) -> dict[str, float]:
    """A step's seconds, by the clock (on a GPU between two of its events) and of the processor, and its loss."""
    if device == "cuda":
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        cpu = time.process_time()
        events[0].record()
        loss = step()
        events[1].record()
        events[1].synchronize()
        wall = events[0].elapsed_time(events[1]) / 1000
    else:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        wall = time.perf_counter() - wall
    return {"wall": wall, "cpu": time.process_time() - cpu, "loss": float(loss)}


def peak(step: Callable[[], Tensor], device: str, start: int) -> int:
    """The most bytes a step needs at a time, over those there were at the start."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - start
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    step()
    return status("VmHWM") - start


def resident(device: str) -> int:
    """Bytes in use."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def main() -> None:
    """Serve one candidate."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    candidate, settings, baseline = map(json.loads, sys.argv[1:4])
    device = settings["device"]
    torch.set_num_threads(settings["threads"])

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    with ExitStack() as stack:
        if candidate.get("without"):
            from steps.switches import SWITCHES

            stack.enter_context(SWITCHES[candidate["without"]].replaced())
        tiny = {**settings, **FAMILIES[settings["model"]].tiny, "compile_model": False}
        build(candidate, tiny)[0]()  # what is imported or set up once is not the step's memory
        gc.collect()
        base = None if baseline is None else build(baseline, settings)[0]
        start = resident(device)
        step, model, facts = build(candidate, settings)
        answer(**facts)
        for line in sys.stdin:
            command = line.strip()
            if command == "quit":
                break
            if command == "memory":  # of the steps that follow the ones done so far
                answer(peak=peak(step, device, start))
            elif command == "profile":
                from steps.profile import shares

                answer(shares=shares(model, step))
            else:
                answer(**timed(base if base is not None and command == "base" else step, device))


if __name__ == "__main__":
    main()
