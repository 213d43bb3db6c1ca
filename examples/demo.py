"""The whole path in a few minutes: train, quantize while fine-tuning, export, verify, reload, generate.

    python examples/demo.py --out demo [--data my.txt]

Every figure printed is measured in this run; logs, checkpoints, results.json and a plot end up in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import machine

HERE = Path(__file__).resolve().parent
MODEL = ["--hidden_size", "192", "--num_hidden_layers", "4", "--vocab_size", "320"]
PRETRAIN = ["--max_steps", "520", "--learning_rate", "5e-3", "--warmup_steps", "30"]
FINETUNE = ["--max_steps", "100", "--learning_rate", "1e-3", "--warmup_steps", "10"]
COMMON = [
    *("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "32", "--lr_scheduler_type", "cosine"),
    *("--logging_steps", "10", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"),
    *("--dataloader_pin_memory", "False", "--do_eval"),
]
SCHEMES = ("w4a16-g32", "w2a16-g32")
NOISE = 0.01
GENERATE = """
import sys, warnings
warnings.filterwarnings("ignore")
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The ", return_tensors="pt", return_token_type_ids=False)
out = model.generate(**ids, max_new_tokens=60, do_sample=True, top_k=20, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


class Demo:
    """Runs stages as processes of their own, with their output in OUT/logs."""

    def __init__(self, out: Path, data: str | None) -> None:
        self.out, self.data = out, [] if data is None else ["--data", str(Path(data).resolve())]
        self.stages = 0
        (out / "logs").mkdir(parents=True)

    def run(self, title: str, *command: str) -> str:
        """Run one stage and return what it printed."""
        self.stages += 1
        print(f"[{self.stages:2d}] {title} ...", end="", flush=True)
        start = time.perf_counter()
        env = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
        log = self.out / "logs" / f"{self.stages:02d}.txt"
        log.write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            sys.exit(f" failed; the end of {log}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        print(f" {time.perf_counter() - start:.0f} s", flush=True)
        return done.stdout

    def causal_lm(self, title: str, name: str, *flags: str, quant: tuple[str, ...] = ()) -> float:
        """One run of the unmodified training script, quantized if flags say so; returns its validation loss."""
        script = [str(HERE / "causal_lm.py"), *COMMON, *self.data, "--output_dir", str(self.out / name), *flags]
        self.run(title, *(("-m", "hf_integration", *script, *quant) if quant else script))
        return json.loads((self.out / name / "eval_results.json").read_text())["eval_loss"]


def language_model(demo: Demo) -> dict[str, float]:
    start, tuned = str(demo.out / "float"), str(demo.out / "control")
    train = ["--do_train", "--model_name_or_path", start, *FINETUNE]
    loss = {"float": demo.causal_lm("train a small Llama in float", "float", "--do_train", *MODEL, *PRETRAIN)}
    loss["control"] = demo.causal_lm("fine-tune it in float: the control", "control", *train)
    for scheme in SCHEMES:
        rounding = ("--quant", "ste", "--quant_scheme", scheme)
        for base, path in (("float", start), ("control", tuned)):
            name = f"{scheme} rounded {base}"
            loss[name] = demo.causal_lm(
                f"round the {base} model to {scheme}",
                name.replace(" ", "-"),
                "--model_name_or_path",
                path,
                quant=rounding,
            )
        export = str(demo.out / f"{scheme}-export")
        flags = ("--quant", "pege", "--quant_scheme", scheme, "--quant_export", export)
        loss[f"{scheme} qat"] = demo.causal_lm(f"fine-tune at {scheme} with PEGE", f"{scheme}-qat", *train, quant=flags)
    return loss


def plot(demo: Demo, loss: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in ("control", *(f"{s}-qat" for s in SCHEMES)):
        history = json.loads((demo.out / name / "trainer_state.json").read_text())["log_history"]
        points = [(h["step"], h["loss"]) for h in history if "loss" in h]
        left.plot(*zip(*points, strict=True), label=name)
        lam = [(h["step"], h["quant_lam"]) for h in history if "quant_lam" in h]
        if lam and name == f"{SCHEMES[0]}-qat":
            twin = left.twinx()
            twin.plot(*zip(*lam, strict=True), color="gray", linestyle=":", label="lambda(t)")
            twin.set_ylabel("lambda(t)")
    left.set(title="fine-tuning", xlabel="optimizer step", ylabel="training loss")
    left.legend()
    right.barh(list(loss), list(loss.values()))
    right.set(title="validation loss", xlim=(min(loss.values()) * 0.97, max(loss.values()) * 1.01))
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(demo.out / "demo.png", dpi=120)


def table(loss: dict[str, float]) -> str:
    head = "| validation loss | float | fine-tuned float | rounded | rounded fine-tuned | QAT | recovered |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for scheme in SCHEMES:
        rounded, rounded_control, qat = (loss[f"{scheme} {n}"] for n in ("rounded float", "rounded control", "qat"))
        lost = rounded_control - loss["control"]
        recovered = f"{(rounded_control - qat) / lost:.0%}" if lost > NOISE else f"(rounding loses {lost:.4f})"
        figures = (loss["float"], loss["control"], rounded, rounded_control, qat)
        lines.append(f"| {scheme} | " + " | ".join(f"{v:.4f}" for v in figures) + f" | {recovered} |")
    lines += [
        "",
        "rounded: nearest level, scales of least squared error per group, no training (what QAT starts from).",
        "recovered: the share of what rounding the fine-tuned model loses that QAT of as many steps wins back,",
        f"(rounded fine-tuned - QAT) / (rounded fine-tuned - fine-tuned float); no share of a loss below {NOISE}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--data", default=None, help="a text file in place of pydoc_data.topics")
    args = parser.parse_args()
    start = time.perf_counter()
    shutil.rmtree(args.out, ignore_errors=True)
    demo = Demo(args.out.resolve(), args.data)

    loss = language_model(demo)
    print("\n" + table(loss) + "\n", flush=True)
    for scheme in SCHEMES:
        against = ("--against", str(demo.out / f"{scheme}-qat"))
        export = str(demo.out / f"{scheme}-export")
        print(demo.run(f"reload {scheme} and verify", "-m", "lightning_quant.cli", "verify", export, *against))
    print(demo.run("let the reloaded int4 model write", "-c", GENERATE, str(demo.out / f"{SCHEMES[0]}-export")))

    digits = demo.run("a Lightning CNN on digits", str(HERE / "digits.py"), "--out", str(demo.out / "digits"))
    print(digits)
    accuracy = json.loads((demo.out / "digits" / "results.json").read_text())
    results = {
        "validation_loss": loss,
        "digits_accuracy": accuracy,
        "seconds": time.perf_counter() - start,
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
    }
    (demo.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(demo, loss)
    print(f"{time.perf_counter() - start:.0f} s in all; everything is in {args.out}/, the plot in {args.out}/demo.png")


if __name__ == "__main__":
    main()
