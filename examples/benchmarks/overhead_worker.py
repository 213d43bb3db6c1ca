"""One candidate of ``overhead.py`` in an interpreter of its own: builds it, then takes a step whenever told to.

Reads commands from stdin, one a line (``step``, ``memory``, ``quit``), and answers each with a line of JSON.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TINY = {"vocab": 64, "hidden": 64, "intermediate": 128, "layers": 1, "heads": 2, "batch": 1, "tokens": 32}
LR, TOTAL_STEPS, CALIBRATION = 1e-4, 1000, 1
Update = Callable[[Callable[[], None]], None]


def build_model(settings: dict[str, Any]) -> nn.Module:
    """A Llama from a config, with fixed random weights, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings["vocab"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["intermediate"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        max_position_embeddings=settings["tokens"],
    )
    return LlamaForCausalLM(config).train()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Update:
    """The training loop everybody shares: backward, update, clear."""

    def update(backward: Callable[[], None]) -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours(model: nn.Module, method: str, scheme: str, options: dict[str, Any]) -> Update:
    """This package, driven as a front end drives it."""
    from lightning_quant import QuantConfig, QuantController
    from lightning_quant.optim import param_groups

    config = QuantConfig.parse(method, scheme, calibration=CALIBRATION, **options)
    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(TOTAL_STEPS)
    optimizer = torch.optim.AdamW(param_groups(model, config, LR))
    step = 0

    def update(backward: Callable[[], None]) -> None:
        nonlocal step
        controller.on_step(step)
        backward()
        controller.before_optimizer_step()
        optimizer.step()
        controller.after_optimizer_step()
        optimizer.zero_grad()
        step += 1

    return update


def torchao(model: nn.Module, scheme: str) -> None:
    """Torchao's QAT preparation: int4 weights by groups of 32, or int8 with dynamic asymmetric int8 per token."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if scheme == "w4a16-g32":
        config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
    else:
        config = QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
            step="prepare",
        )
    quantize_(model, config, lambda m, path: isinstance(m, nn.Linear) and "lm_head" not in path)


def modelopt(model: nn.Module, scheme: str, batch: torch.Tensor) -> None:
    """ModelOpt's fake quantization: int4 weights by blocks of 32, or int8 with static int8 per tensor."""
    import modelopt.torch.quantization as mtq

    if scheme == "w4a16-g32":
        config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
        for rule in config["quant_cfg"]:
            if "block_sizes" in (rule.get("cfg") or {}):
                rule["cfg"]["block_sizes"][-1] = 32
    else:
        config = mtq.INT8_DEFAULT_CFG
    mtq.quantize(model, config, forward_loop=lambda m: m(input_ids=batch))


def build(candidate: dict[str, Any], settings: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """The candidate's training step, which returns the loss, and facts about it."""
    model = build_model(settings)
    batch = torch.randint(0, settings["vocab"], (settings["batch"], settings["tokens"]))
    kind, scheme = candidate["kind"], candidate.get("scheme", "")
    library = {"plain": "torch", "ours": "torch", "torchao": "torchao", "modelopt": "nvidia-modelopt"}[kind]
    if kind == "ours":
        update = ours(model, candidate["method"], scheme, candidate.get("options", {}))
    else:
        if kind == "torchao":
            torchao(model, scheme)
        elif kind == "modelopt":
            modelopt(model, scheme, batch)
        model.train()
        update = plain(model, torch.optim.AdamW(model.parameters(), lr=LR))
    head = type(model.lm_head)
    if kind in ("plain", "ours", "torchao") and head is not nn.Linear:
        raise RuntimeError(f"{kind}: expected lm_head in float, got {head}. Exclude it.")

    def step() -> float:
        loss: list[torch.Tensor] = []

        def backward() -> None:
            loss.append(model(input_ids=batch, labels=batch).loss)
            loss[0].backward()

        update(backward)
        return float(loss[0])

    names = {"torch": "torch", "transformers": "transformers", library: library}
    versions = {name: importlib.metadata.version(name) for name in names.values()}
    return step, {"versions": {**versions, "python": platform.python_version()}}


def status(field: str) -> int:
    """A line of /proc/self/status that counts memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected {field}, got none. Memory is measured on Linux only.")


def main() -> None:
    """Serve one candidate."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    candidate, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    build(candidate, {**settings, **TINY})[0]()  # what is imported or set up once is not the step's memory
    gc.collect()

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    start = status("VmRSS")
    step, facts = build(candidate, settings)
    answer(**facts)
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            break
        if command == "memory":  # of the steps that follow the ones done so far
            trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # peak := now
            step()
            answer(peak=status("VmHWM") - start)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        answer(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, loss=loss)


if __name__ == "__main__":
    main()
