"""Memory of fine-tuning a 1.1-billion-parameter Llama with LoRA: in float32, as QLoRA, and with our quantizers.

Every variant trains in a process of its own.  Its random weights are made layer by layer, and stored right away in
what the variant keeps them in, so that building needs less than training.  Measured are the largest resident memory of
the process (``ru_maxrss``: Python and libraries included), that of the training steps alone, and the bytes of what is
held between steps.  Linux only.

    python examples/benchmarks/qlora_memory.py              # everything, about half an hour and 8 GB of memory
    python examples/benchmarks/qlora_memory.py --only NAME  # one variant, anew; the results of the others stay
    python examples/benchmarks/qlora_memory.py --table      # the table of the last results
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "qlora.json"
SIZES = {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000}
RUN = {"tokens": 128, "rank": 16, "steps": 2, "threads": 1}
# name: (base, method of the quantizers)
VARIANTS: dict[str, tuple[str, str | None]] = {
    "LoRA": ("float32", None),
    "QLoRA": ("bitsandbytes NF4", None),
    "LoRA-QAT": ("float32", "ste"),
    "QLoRA-QAT": ("bitsandbytes NF4", "ste"),
    "QLoRA-QAT, own base": ("pack(nf4-g64)", "ste"),
}
PLAIN, SAME, OURS = "LoRA", "LoRA-QAT", "QLoRA-QAT"
SCHEME = "w4a16-g32"
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # what is freed leaves the process
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# In the process of a variant


def build(settings: dict[str, Any], base: str) -> Any:
    """The model with random frozen weights, its layers' matrices stored as ``base`` says."""
    import torch
    from tqdm.auto import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=settings["hidden"],
        intermediate_size=settings["intermediate"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        vocab_size=settings["vocab"],
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def fill(part: torch.nn.Module) -> None:
        part.to_empty(device="cpu")
        for p in part.parameters():
            p.normal_(0, 0.02, generator=generator) if p.ndim > 1 else p.fill_(1)

    with torch.no_grad():
        for part in (model.model.embed_tokens, model.lm_head, model.model.norm):
            fill(part)
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
        for layer in tqdm(model.model.layers, desc="building"):
            for part in list(layer.children()):
                for matrix in [m for m in part.modules() if isinstance(m, torch.nn.Linear)] or [part]:
                    fill(matrix)
                    store(part, matrix, base)
    model.is_loaded_in_4bit = base.startswith("bitsandbytes")  # what PEFT asks for
    return model


def store(part: Any, matrix: Any, base: str) -> None:
    """Keep a matrix as the base wants it."""
    import torch

    if base == "float32" or not isinstance(matrix, torch.nn.Linear):
        return
    if base.startswith("pack"):
        from lightning_quant.packed import pack

        pack(part if matrix is None else torch.nn.ModuleList([matrix]), "nf4-g64")
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    name = next(name for name, m in part.named_modules() if m is matrix)
    new = Linear4bit(matrix.in_features, matrix.out_features, bias=False, quant_type="nf4", device="meta")
    new.weight = Params4bit(matrix.weight.data, compress_statistics=True, quant_type="nf4", module=new).to("cpu")
    setattr(part, name, new)


def held(tensors: Iterator[Any]) -> int:
    """Bytes of these tensors, each once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def status(field: str) -> int:
    """A line of /proc/self/status that counts memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def train(model: Any, method: str | None, settings: dict[str, Any]) -> tuple[Callable[[int], float], Any]:
    """A training step, and its optimizer."""
    import torch

    ids = torch.randint(0, settings["vocab"], (1, settings["tokens"]), generator=torch.Generator().manual_seed(1))
    if method is None:
        control = None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    else:
        from lightning_quant import QuantConfig, QuantController, param_groups

        config = QuantConfig.parse(method, SCHEME)
        weight = dataclasses.replace(config.weight, observer="minmax")  # a search takes minutes, and no memory
        config = dataclasses.replace(config, weight=weight)
        control = QuantController(config)
        control.prepare(model)
        control.begin(100)
        optimizer = torch.optim.AdamW(param_groups(model, config, lr=1e-4))

    def step(index: int) -> float:
        if control is not None:
            control.on_step(index)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if control is not None:
            control.before_optimizer_step(optimizer)
        optimizer.step()
        if control is not None:
            control.after_optimizer_step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, optimizer


def work(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a variant; what it took."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lightning_quant.attach import quantizers

    torch.set_num_threads(settings["threads"])
    base, method = VARIANTS[name]
    start = status("VmRSS")
    model = build(settings, base)
    held_by_base = held(tensor for tensor in stored(model))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=settings["rank"], lora_alpha=16, target_modules="all-linear")).train()
    built = status("VmHWM")
    step, optimizer = train(model, method, settings)
    attached = status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := now
    seconds, losses = [], []
    for index in range(settings["steps"]):
        began = time.perf_counter()
        losses.append(step(index))
        seconds.append(time.perf_counter() - began)
        say(f"  step {index + 1} of {settings['steps']}: {seconds[-1]:.0f} s")
    return {
        "libraries": start,
        "base": held_by_base,
        "adapters": held(p for n, p in model.named_parameters() if "lora_" in n),
        "quantizers": held(t for _, q in quantizers(model) for t in (*q.parameters(), *q.buffers())),
        "optimizer": held(t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)),
        "peak building": built,
        "peak attaching": attached,
        "peak steps": status("VmHWM"),
        "peak": max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, attached, status("VmHWM")),
        "losses": losses,
        "seconds": [round(s, 1) for s in seconds],
    }


def stored(model: Any) -> Iterator[Any]:
    """Tensors that the base is made of, bitsandbytes' statistics among them."""
    yield from (t for t in model.state_dict(keep_vars=True).values() if t.device.type != "meta")


# Outside of it


def share(results: dict[str, Any], name: str, key: str) -> float:
    return results["variants"][name][key] / results["variants"][PLAIN][key]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, variants = results["settings"], results["variants"]
    plain, ours = variants[PLAIN], variants[OURS]
    lines = [
        f"Largest resident memory, in MiB, of LoRA of rank {s['rank']} on every layer of a Llama of "
        f"{results['parameters'] / 1e9:.1f}e9 parameters ({s['layers']} layers, hidden {s['hidden']}), "
        f"1 x {s['tokens']} tokens, float32, AdamW, {s['steps']} steps, each in a process of its own (Python and "
        f"libraries: {plain['libraries'] / 2**20:.0f}). QAT is {SCHEME}.",
        "",
        "| | base | held for it | quantizers | adapters, optimizer | peak | of LoRA's |",
        "|---" * 7 + "|",
    ]
    for name, v in variants.items():
        sizes = (v["base"], v["quantizers"], v["adapters"] + v["optimizer"], v["peak"])
        cells = [f"{size / 2**20:.0f}" for size in sizes]
        lines.append(f"| {name} | {VARIANTS[name][0]} | {' | '.join(cells)} | {share(results, name, 'peak'):.2f} |")
    less = plain["base"] - ours["base"]
    lines += ["", f"The base shrinks by {less / 2**20:.0f} MiB ({less / plain['peak']:.0%} of the peak of {PLAIN})."]
    for name in [n for n in (PLAIN, SAME) if n in variants]:
        saved = variants[name]["peak"] - ours["peak"]
        part = f"{saved / variants[name]['peak']:.0%}"
        lines[-1] += f" The peak of {OURS} is below that of {name} by {saved / 2**20:.0f} MiB ({part})."
    rest = ours["peak"] - plain["peak"] + less
    lines[-1] += (
        f" Of what is missing to {PLAIN}, {rest / 2**20:.0f} MiB, scales take {ours['quantizers'] / 2**20:.0f}, "
    )
    lines[-1] += "the rest are working copies of one layer's weight."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--only", choices=VARIANTS, help="one variant, anew; the results of the others stay")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, value in {**SIZES, **RUN}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in (*SIZES, *RUN)}
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    if args.worker:
        print(json.dumps(work(args.worker, settings)))
        return
    old = json.loads(args.out.read_text(encoding="utf-8")) if args.only and args.out.exists() else {}
    found = old.get("variants", {}) if old.get("settings") == settings else {}
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    for name in [args.only] if args.only else VARIANTS:
        say(f"{name} ...")
        command = [sys.executable, __file__, "--worker", name, *flags]
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", **MAPPED)
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        say(f"{name}: {found[name]['peak'] / 2**20:.0f} MiB")
        write(args.out, settings, found)
    if {PLAIN, OURS} <= set(found):
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))


def write(path: Path, settings: dict[str, int], found: dict[str, Any]) -> None:
    """The results file, whole or not at all."""
    from machine import machine

    h, f, v = settings["hidden"], settings["intermediate"], settings["vocab"]
    kv = h // settings["heads"] * settings["kv_heads"]
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "settings": settings,
        "parameters": settings["layers"] * (2 * h * h + 2 * h * kv + 3 * h * f + 2 * h) + 2 * v * h + h,
        "variants": {name: found[name] for name in VARIANTS if name in found},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
