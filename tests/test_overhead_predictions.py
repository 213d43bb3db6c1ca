"""What the overhead benchmarks predict: passes, bytes, and how they grow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_quant import QuantConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import overhead_scaling
import steps.ablation
import steps.bytes as paper
import steps.plots
from steps.models import build_model, make_inputs

CONFIG = {"calibration": 1}


def test_passes_of_the_formula():
    def each(method, scheme, **options):
        return paper.passes(QuantConfig.parse(method, scheme, **CONFIG, **options))

    assert each("ste", "w4a16-g32")[0] == paper.Passes(2 + 1 / 32, 3 + 1 / 32, 1, True)
    assert each("lsq", "w4a16-g32")[0] == paper.Passes(2 + 1 / 32, 3 + 9 / 32, 1, True)
    assert each("pege", "w4a16-g32")[0] == paper.Passes(2 + 1 / 32, 3 + 18 / 32, 1, True)
    element = each("pege", "w4a16-g32", theta="element")[0]
    assert element.backward == 3 + 9 / 32 + 0.75
    weight, given = each("ste", "w8a8-static")
    assert (weight.backward, weight.again, weight.keeps) == (0, 2, False)
    assert weight.forward == 3  # its range is found first
    assert each("ste", "w8a8")[1].forward == 2
    apart = paper.passes(QuantConfig.parse("ste", "w8a8", **CONFIG), in_passing=False)
    assert apart[0].forward > 4  # the largest and the least
    assert apart[1].forward > 4
    assert (given.forward, given.backward, given.again) == pytest.approx((2, 3, 2), abs=1e-3)


def test_operations_are_counted_as_they_go_by():
    config = QuantConfig.parse("ste", "w4a16-g32", **CONFIG)
    weight, given = paper.passes(config, fused=False)
    assert given is None
    # divide, round, clamp and multiply; divide again, and the mask reads gradient and place
    assert (weight.forward, weight.backward) == pytest.approx((8, 5), abs=0.1)
    assert 2 < weight.again < 8.1
    both, given = paper.passes(QuantConfig.parse("ste", "w4a8-static-g32", **CONFIG), fused=False)
    assert both == weight
    assert (given.forward, given.backward) == pytest.approx((8, 5), abs=0.1)
    with paper._Moved() as moved:
        a = torch.ones(10).view(2, 5)
        a.mul_(2)
        a @ a.T
    assert moved.bytes == 40 + 80


def test_traffic_by_hand():
    work = paper.Survey(macs=1000, parameters=10, weights=100, inputs=40, read=60)
    weight, identity = paper.Passes(2, 3, 1, True), paper.Passes(4, 0, 2, False)
    masked = paper.Passes(2, 3, 2, True)
    assert paper.traffic(work, (weight, None)) == paper.Traffic(100 * 6 * 4, 0)
    assert paper.traffic(work, (weight, None), 2, recompute=False) == paper.Traffic(100 * 5 * 2, 100 * 2)
    assert paper.traffic(work, (weight, identity)) == paper.Traffic((600 + 40 * 4) * 4, 0)
    assert paper.traffic(work, (weight, identity), sharing=False) == paper.Traffic((600 + 60 * 4) * 4, 20 * 4)
    assert paper.traffic(work, (weight, masked)) == paper.Traffic((600 + 60 * 7) * 4, 0)
    assert paper.traffic(work, (weight, masked), recompute=False) == paper.Traffic((500 + 60 * 5) * 4, 160 * 4)
    assert paper.plain_seconds(work, bandwidth=70.0, rate=6000.0) == 6 * 1000 / 6000 + 7 * 4 * 10 / 70


def test_survey_of_a_llama_by_hand():
    s = {"model": "llama", "vocab": 50, "hidden": 64, "intermediate": 96, "layers": 2, "heads": 2}
    s |= {"batch": 3, "tokens": 8}
    config = QuantConfig.parse("ste", "w8a8", **CONFIG)
    found = paper.survey(lambda: build_model(s), make_inputs(s), config)
    assert found.weights == 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert found.read == 2 * 24 * (4 * 64 + 2 * 64 + 96)  # q, k, v, o; gate and up; down
    assert found.inputs == 2 * 24 * (2 * 64 + 64 + 96)
    assert found.macs >= 24 * (found.weights + 50 * 64)
    assert found.parameters == found.weights + 2 * 50 * 64 + 5 * 64


def test_ablations_predict_what_they_add():
    found = steps.ablation.ablated("llama")
    work = paper.Survey(macs=1, parameters=1, weights=1000, inputs=400, read=900)
    guess = {name: steps.ablation.predicted(c, work, 4) for name, c in found.items() if c["kind"] == "ours"}
    whole = guess["ours ste w4a16-g32"]
    assert guess["ours ste w4a16-g32 without recompute"].kept - whole.kept == 4000
    assert whole.moved - guess["ours ste w4a16-g32 without recompute"].moved == pytest.approx(4000)
    for name, one in guess.items():
        base = guess[name.partition(" without ")[0]]
        more = name.endswith(("kernels", "fusion", "sharing", "absmax", "masks", "turn", "w8a8 without C++")) or (
            name.endswith("g32 without together")  # 8-bit weights have nothing to read in backward
        )
        assert (one.moved > base.moved) == more, name
    assert "ours ste w4a16-g32 without foreach" not in found
    assert "ours pege w4a16-g32 without foreach" in found


def test_scaling_varies_one_thing_at_a_time_and_plots_it(tmp_path, monkeypatch):
    base = {"hidden": 128, "tokens": 256, "layers": 1}
    found = overhead_scaling.points({"hidden": (128, 256), "tokens": (256, 512), "layers": (1,)}, base)
    assert found == [base, {**base, "hidden": 256}, {**base, "tokens": 512}]
    assert overhead_scaling.model_settings(found[2], 1)["batch"] == 2
    monkeypatch.setattr(
        overhead_scaling, "LARGE", {"L": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 2, "vocab": 9}}
    )
    figures = {"seconds": 2.0, "ratio": 1.05, "ratio_10": 1.04, "ratio_90": 1.06}
    measured = dict.fromkeys(["plain", *overhead_scaling.OURS], figures)
    results = overhead_scaling.predict(
        {
            "machine": {"processor": "P"},
            "settings": {"threads": 1, "rounds": 3},
            "hardware": {"bandwidth": 1e10, "peak": {"float32": 1e11}},
            "points": [{"point": point, "measured": measured} for point in found],
        }
    )
    first, wide, long = (row["predicted"] for row in results["points"])
    name = "ours ste w4a16-g32"
    assert first[name] == long[name] < wide[name]  # weights do not grow with tokens
    assert overhead_scaling.ratio(long, name) < overhead_scaling.ratio(first, name)
    assert set(results["large"]["L"]) == {"here, float32", "H100 SXM, bfloat16", "H200 SXM, bfloat16"}
    table = overhead_scaling.table(results)
    assert f"| 128 | 256 | 1 | 2.000 ({first['plain']:.3f}) | 1.050 (" in table
    files = steps.plots.scaling_plots(results, tmp_path)
    assert [f.name for f in files] == ["overhead_hidden.png", "overhead_tokens.png", "overhead_layers.png"]
