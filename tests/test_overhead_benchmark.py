"""The overhead benchmarks: what workers run, what tables and predictions say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_quant.attach import quantizers
from lightning_quant.layers import QuantLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import overhead
import steps.candidates
import steps.plots
import steps.worker
from steps.models import FAMILIES, build_model, make_inputs, sizes
from steps.profile import PIECES, shares
from steps.runs import Run
from steps.switches import SWITCHES

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks


def tiny(family="llama", **more):
    place = {"threads": 1, "device": "cpu", "dtype": "float32", "compile_model": False}
    return {"model": family, **sizes(family, "cpu", {}), **FAMILIES[family].tiny, **place, **more}


def built(name, family="llama", compiled=False, **more):
    """A candidate's step and model, without compiled kernels if nothing else is said."""
    candidate = dict(steps.candidates.candidates(family)[name], **more)
    if "options" in candidate:
        candidate["options"] = {**candidate["options"], "compile": compiled}
    torch.manual_seed(0)
    step, model, facts = steps.worker.build(candidate, tiny(family))
    assert facts["versions"]["torch"] == torch.__version__
    return step, model


KINDS = [
    ("llama", "plain"),
    ("llama", "ours pege element w4a16-g32"),
    ("llama", "ours ste w8a8"),
    ("llama", "plain LoRA"),
    ("llama", "PEFT's two paths LoRA"),
    ("llama", "ours LoRA pege compiled w4a16-g32"),
    ("llama", "plain checkpointed"),
    ("llama", "ours checkpointed ste compiled w8a8"),
    ("llama-1b", "ours ste compiled w4a16-g128"),
    ("vit-b", "ours ste compiled w4a16-g32"),
    ("resnet-50", "ours lsq compiled w8a8-static"),
    ("resnet-50", "ours pege compiled w4a16-channel"),
]


@pytest.mark.parametrize(("family", "name"), KINDS)
def test_every_kind_trains(family, name):
    step, model = built(name, family)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        assert torch.isfinite(step())
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert len(moved) >= 0.9 * len(before)
    assert any(isinstance(m, QuantLayer) for m in model.modules()) == name.startswith("ours")
    if "LoRA" in name:
        assert {n.rpartition("lora_")[1] for n in before if "_quant" not in n} == {"lora_"}


def test_merged_lora_computes_what_two_paths_do():
    merged, paths = (built(name)[1].eval() for name in ("plain LoRA", "PEFT's two paths LoRA"))
    batch = {k: v for k, v in make_inputs(tiny()).items() if k != "labels"}
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, paths(**batch).logits, atol=1e-5)


def test_checkpointed_blocks_run_twice():
    calls = {}
    for name in ("plain", "plain checkpointed"):
        step, model = built(name)
        calls[name] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, name=name: calls[name].append(1))
        step()
    assert len(calls["plain"]) == 1
    assert len(calls["plain checkpointed"]) == 2


def test_each_is_compared_with_training_of_its_kind():
    found = steps.candidates.candidates("llama")
    for name, c in found.items():
        base = found[c.get("baseline", name)]
        assert base["kind"] == "plain"
        assert [bool(c.get(k)) for k in ("lora", "checkpointing")] == [
            bool(base.get(k)) for k in ("lora", "checkpointing")
        ]
    kept = steps.candidates.chosen(found, ["LoRA ste"], peers=False)
    assert list(kept) == ["plain", "plain LoRA", *(n for n in found if "LoRA ste" in n)]
    assert {c["baseline"] for c in kept.values() if "baseline" in c} == {"plain LoRA"}
    assert not any("compiled" in name for name in steps.candidates.candidates("llama-1b", compile_model=True))


def test_shares_find_every_piece():
    for name, compiled in (
        ("ours pege w4a16-g32", False),
        ("ours lsq w8a8-static", False),
        ("ours lsq w4a16-g32", True),
    ):
        step, model = built(name, compiled=compiled)
        forward = model.model.layers[0].mlp.up_proj.weight_quant.forward.__func__
        found = shares(model, step, steps=1)
        assert list(found) == list(PIECES)
        assert all(0 < share < 1 for share in found.values()), found
        assert sum(found.values()) < 1
        assert model.model.layers[0].mlp.up_proj.weight_quant.forward.__func__ is forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_find_what_they_replace_and_compute_the_same(name):
    candidate = "ours ste w8a8" if SWITCHES[name].inputs else "ours lsq w4a16-g32"
    if SWITCHES[name].elements:
        candidate = "ours pege element w4a16-g32"
    step, whole = built(candidate)
    expected = [float(step()) for _ in range(3)]
    with SWITCHES[name].replaced():
        step, model = built(candidate, compiled=name != "kernels", without=name)
        found = [float(step()) for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-3)  # a largest value is at the edge of its mask
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    assert all(m.recomputes == (name != "recompute") for m in layers)
    if name == "turn":
        assert [any(q.turn is not None for _, q in quantizers(m)) for m in (whole, model)] == [True, False]
    if name == "masks":
        assert all(q.clips for _, q in quantizers(model))


def test_without_fusion_there_is_no_inductor():
    with SWITCHES["fusion"].replaced():
        assert torch.compile.keywords == {"backend": "eager"}
    assert not hasattr(torch.compile, "keywords")


def figures(ratio, **more):
    spread = {"ratio": ratio, "ratio_10": ratio - 0.01, "ratio_90": ratio + 0.01}
    return {"seconds": ratio * 2, **spread, "peak": int(ratio * 2**30), **more}


def measured(**more):
    settings = {**tiny(), "rounds": 3, "hidden": 512}
    share = {"forward": 0.01, "backward": 0.02, "controller": 0.001, "optimizer": 0.0}
    found = {
        "plain": figures(1.0, baseline="plain"),
        "ours ste w4a16-g32": figures(1.02, baseline="plain", share=share),
        "plain LoRA": figures(0.5, baseline="plain LoRA") | {"ratio": 1.0},
        "ours LoRA ste w4a16-g32": figures(0.55, baseline="plain LoRA") | {"ratio": 1.1},
    }
    own = {"date": "2026-01-01", "machine": {"processor": "P"}, "versions": {}, "settings": settings}
    return {**own, "candidates": found, "failed": {"torchao w8a8": "no | such thing"}, **more}


def test_tables_and_parts(tmp_path):
    path = tmp_path / "overhead.json"
    guess = {"moved": 2**21, "kept": 2**29, "ratio": 1.01}
    whole = figures(1.02, predicted=guess, without=None)
    without = figures(1.5, predicted=guess, without="recompute")
    name = "ours ste w4a16-g32"
    ablation = {"plain": figures(1.0), name: whole, f"{name} without recompute": without}
    overhead.put(path, "vit-b", "steps", {**measured(), "settings": {**tiny("vit-b"), "rounds": 3}})
    overhead.put(path, "llama", "ablation", {**measured(), "candidates": ablation, "bandwidth": 1e10})
    results = overhead.put(path, "llama", "steps", measured())
    assert results == json.loads(path.read_text(encoding="utf-8"))
    assert list(results["models"]) == ["llama", "vit-b"]
    assert set(results["models"]["llama"]) == {"steps", "ablation"}
    table = overhead.table(results)
    assert (
        "1-layer Llama (hidden 512, 1 x 32 tokens, float32, AdamW) on P, 1 threads; plain is 2 s and 1024 MiB" in table
    )
    assert "| ours ste | w4a16-g32 | 1.020 | [1.010 to 1.030, 3] | 1.020 |" in table
    assert "| ours LoRA ste | w4a16-g32 | 1.100 | [0.540 to 0.560, 3] | 1.100 |" in table
    assert "| torchao | w8a8 | failed: no \\| such thing | | |" in table
    assert table.index("Llama") < table.index("ViT-B/16")
    assert "| ours ste | w4a16-g32 | 1.00% | 2.00% | 0.10% | 0.00% | 3.10% |" in overhead.share_table(results)
    rows = overhead.ablation_table(results)
    twice = measured()
    twice["candidates"]["ours ste w4a16-g32"]["by_start"] = [1.01, 1.03]
    shown = overhead.table({"models": {"llama": {"steps": twice}}})
    assert "| ours ste | w4a16-g32 | 1.020 +- 0.010 |" in shown
    assert "rounds, interpreters started 2 times; +-:" in shown
    assert "| ours ste | w4a16-g32 | (nothing) | 2 MiB | 1.010 | 1.020 |" in rows
    assert (
        "| what was rounded is kept for backward | 2 MiB | 1.010 | 1.500 | [1.490 to 1.510] | 1.500 | 1.500 |" in rows
    )
    peak = measured()["candidates"]["plain"]["peak"]
    more = {
        "plain": {k: v for k, v in figures(1.0, rounds=40).items() if k != "peak"},
        "torchao w8a8": figures(1.2, rounds=40),
    }
    fewer = {**measured(), "candidates": more, "settings": {**measured()["settings"], "rounds": 40}}
    both = overhead.put(tmp_path / "added.json", "llama", "steps", measured())
    assert "ours ste w4a16-g32" in both["models"]["llama"]["steps"]["candidates"]
    both = overhead.put(tmp_path / "added.json", "llama", "steps", fewer, add=True)["models"]["llama"]["steps"]
    assert list(both["candidates"]) == [*measured()["candidates"], "torchao w8a8"]
    assert both["candidates"]["plain"]["peak"] == peak
    assert {name: c["rounds"] for name, c in both["candidates"].items()} == {
        **dict.fromkeys(measured()["candidates"], 3),
        "plain": 40,
        "torchao w8a8": 40,
    }
    with pytest.raises(SystemExit, match="settings"):
        overhead.put(tmp_path / "added.json", "llama", "steps", {**fewer, "settings": {}}, add=True)
    assert overhead.ablation_table({"models": {}}) == "Not measured yet."
    assert steps.plots.steps_plot(results, tmp_path / "plots").stat().st_size > 10_000
    names = ("cuda", "bfloat16", True)
    gpu = dict(zip(("device", "dtype", "compile_model"), names, strict=True))
    assert overhead.part_name(tiny()) == "llama"
    assert overhead.part_name(tiny("llama-1b", **gpu)) == "llama-1b cuda bfloat16 compiled"


def test_a_run_leaves_out_what_fails_and_keeps_the_rest():
    plain = {"kind": "plain"}
    broken = {"kind": "ours", "method": "ste", "scheme": "w4a16-g48", "options": {}, "baseline": "plain"}
    again = {**plain, "baseline": "plain", "scheme": "w4a16-g48"}
    both = {"plain": plain, "plain, again": again, "ours ste w4a16-g48": broken}
    run = Run(both, tiny(), rounds=1, warmup=0, starts=2, memory=False, profiled=False)
    found = run.measure()
    assert list(found) == ["plain", "plain, again"]
    assert found["plain"]["ratio"] == 1.0
    assert found["plain, again"]["ratio"] != 1.0
    assert {c["rounds"] for c in found.values()} == {2}  # one after each start
    assert sum(found["plain, again"]["by_start"]) / 2 == pytest.approx(found["plain, again"]["ratio"], abs=1e-4)
    assert "does not divide" in run.failed["ours ste w4a16-g48"]
    assert run.versions["torch"] == torch.__version__


def test_models_are_the_published_ones():
    s = {"model": "resnet-50", **sizes("resnet-50", "cuda", {})}
    with torch.device("meta"):
        resnet = build_model(s)
        vit = build_model({"model": "vit-b", **sizes("vit-b", "cuda", {})})
        llama = build_model({"model": "llama-1b", **sizes("llama-1b", "cuda", {})})
    assert isinstance(resnet, nn.Module)
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032
    assert sum(p.numel() for p in vit.parameters()) == 86_567_656
    assert sum(p.numel() for p in llama.parameters()) == 1_235_814_400


def test_memory_alone_starts_nothing_else(monkeypatch):
    run = Run({"plain": {"kind": "plain"}}, tiny(), rounds=0, warmup=0, profiled=False)
    monkeypatch.setattr(run, "turns", None)
    found = run.measure()
    assert list(found) == ["plain"]
    assert list(found["plain"]) == ["peak"]
    assert found["plain"]["peak"] > 0
