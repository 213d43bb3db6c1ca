"""The Markdown tables of ``overhead.py``: steps, shares and ablations, each model's below its own heading."""

from __future__ import annotations

import re
import statistics
from typing import Any

from steps.models import title
from steps.profile import PIECES
from steps.switches import SWITCHES

NOTHING = "Not measured yet."


def table(results: dict[str, Any]) -> str:
    """Time and peak memory of all models' candidates."""
    parts = [_steps(part["steps"]) for part in results["models"].values() if "steps" in part]
    return "\n\n".join(parts) or NOTHING


def _steps(results: dict[str, Any]) -> str:
    found = results["candidates"]
    lines = [
        f"Training step of a {_where(results)}; plain is {_size(found['plain'])}. "
        f"Medians of interleaved rounds{_starts(results)}; in brackets 10 to 90 % of them, and how many they are.",
        "",
        "| | scheme | time | | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, c in found.items():
        base = found[c.get("baseline", "plain")]
        who, scheme = named(name)
        who += f" ({_size(c)})" * (c is base and name != "plain")
        memory = f"{c['peak'] / base['peak']:.3f}" if "peak" in c else ""
        spread = f"{c['ratio_10']:.3f} to {c['ratio_90']:.3f}, {c.get('rounds', results['settings']['rounds'])}"
        lines.append(f"| {who} | {scheme} | {c['ratio']:.3f}{_error(c)} | [{spread}] | {memory} |")
    lines += [f"| {' | '.join(named(name))} | failed: {_cell(why)} | | |" for name, why in _failed(results)]
    if len({c.get("baseline", "plain") for c in found.values()}) > 1:
        lines += ["", "LoRA and checkpointing are compared with plain training of the same kind (1.000)."]
    return "\n".join(lines)


def share_table(results: dict[str, Any]) -> str:
    """Which share of a step the profiler finds in our code, of all models' candidates."""
    parts = [_shares(part["steps"]) for part in results["models"].values() if "steps" in part]
    return "\n\n".join(filter(None, parts)) or NOTHING


def _shares(results: dict[str, Any]) -> str:
    rows = {name: c["share"] for name, c in results["candidates"].items() if "share" in c}
    if not rows:
        return ""
    lines = [
        f"Share of a step's time in our own code, from the profiler: {_where(results)}.",
        "",
        f"| | scheme | {' | '.join(PIECES)} | in all |",
        "|---" * (len(PIECES) + 3) + "|",
    ]
    for name, share in rows.items():
        cells = [f"{share[piece]:.2%}" for piece in PIECES]
        lines.append(f"| {' | '.join(named(name))} | {' | '.join(cells)} | {sum(share.values()):.2%} |")
    return "\n".join(lines)


def ablation_table(results: dict[str, Any]) -> str:
    """What each optimisation buys, of all models that were measured without them."""
    parts = [_ablation(part["ablation"]) for part in results["models"].values() if "ablation" in part]
    return "\n\n".join(parts) or NOTHING


def _ablation(results: dict[str, Any]) -> str:
    found, plain = results["candidates"], results["candidates"]["plain"]
    lines = [
        f"Without one optimisation at a time: {_where(results)}; plain is {_size(plain)}, memory was measured at "
        f"{results['bandwidth'] / 1e9:.1f} GB/s. Moved: what quantizers read and write in a step; predicted: that at "
        "full bandwidth beside plain's time, and what is kept for backward beside plain's memory.",
        "",
        "| | scheme | without | moved | time: predicted | measured | | memory: predicted | measured |",
        "|---" * 9 + "|",
    ]
    for name, c in found.items():
        if name == "plain":
            continue
        guess = c["predicted"]
        who, scheme = named(name.partition(" without ")[0])
        without = SWITCHES[c["without"]].without if c.get("without") else "(nothing)"
        spread = f"[{c['ratio_10']:.3f} to {c['ratio_90']:.3f}]"
        memory = f"{c['peak'] / plain['peak']:.3f}" if "peak" in c else ""
        kept = f"{1 + guess['kept'] / plain['peak']:.3f}" if "peak" in plain else ""
        cells = [f"{guess['moved'] / 2**20:.0f} MiB", f"{guess['ratio']:.3f}", f"{c['ratio']:.3f}", spread]
        lines.append(f"| {' | '.join([who, scheme, without, *cells, kept, memory])} |")
    lines += [f"| {' | '.join(named(name))} | failed: {_cell(why)} |" + " |" * 6 for name, why in _failed(results)]
    return "\n".join(lines)


def named(name: str) -> tuple[str, str]:
    """What a candidate is called, and its scheme.

    >>> named("ours LoRA ste w4a16-g32"), named("plain LoRA")
    (('ours LoRA ste', 'w4a16-g32'), ('plain LoRA', ''))
    """
    who, _, last = name.rpartition(" ")
    return (who, last) if re.match(r"w\d", last) else (name, "")


def _where(results: dict[str, Any]) -> str:
    s = results["settings"]
    threads = "" if s.get("device") == "cuda" else f", {s['threads']} threads"
    where = results["machine"].get("gpu") or results["machine"]["processor"]
    return f"{title(s)}, {s.get('optimizer', 'AdamW')}) on {where}{threads}"


def _starts(results: dict[str, Any]) -> str:
    starts = sorted({len(c["by_start"]) for c in results["candidates"].values() if "by_start" in c} or {1})
    often = " to ".join(map(str, dict.fromkeys((starts[0], starts[-1]))))
    said = f", interpreters started {often} times; +-: standard error of the mean of the starts' medians"
    return said if starts[-1] > 1 else ""


def _error(c: dict[str, Any]) -> str:
    each = c.get("by_start", [])
    return f" +- {statistics.stdev(each) / len(each) ** 0.5:.3f}" if len(each) > 1 else ""


def _size(c: dict[str, Any]) -> str:
    return f"{c['seconds']:.3g} s" + (f" and {c['peak'] / 2**20:.0f} MiB" if "peak" in c else "")


def _failed(results: dict[str, Any]) -> list[tuple[str, str]]:
    return list(results.get("failed", {}).items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:120]
