"""QuantCallback in every combination of strategy, precision, accumulation, gradient checkpointing and compiling."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from lightning_quant import QuantCallback
from tests.integration.matrix_run import Case, cases, train
from tests.integration.modules import QUIET
from tests.integration.processes import differing, result, run

pytestmark = [
    *QUIET,
    # torch's tracer itself does what these are about.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed")
# How far sums in another order may move weights of about 0.1: relative, absolute.
CLOSE = {"32-true": (1e-3, 2e-5), "64-true": (1e-6, 1e-8)}
# Compiling takes seconds, so pairs have to do: compiling before and after quantizers are attached meets full, bfloat16
# (mixed and true) and float16 precision, accumulation and checkpointing on and off.
COMPILED = [
    Case("32-true", 1, True, "inner"),
    Case("bf16-true", 2, False, "inner"),
    Case("bf16-mixed", 2, True, "before"),
    Case("16-mixed", 1, False, "before"),
    Case("64-true", 2, False, "after"),
    Case("bf16-mixed", 1, True, "after"),
    Case("bf16-true", 1, False, "after"),
    Case("16-mixed", 2, True, "after"),
]


@cache
def alone(case: Case) -> dict[str, Any]:
    """The combination in this process, once."""
    return train(case)


def sound(case: Case, found: dict[str, Any]) -> None:
    """Training went well and used every quantizer in every batch."""
    losses = found["losses"]
    assert len(losses) == 8 * case.accumulate
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.5 * losses[0]
    assert found["reached"] == [True] * len(losses)
    assert all(bool(torch.isfinite(value).all()) for value in found["state"].values())


def close(one: dict[str, Any], other: dict[str, Any], rtol: float, atol: float) -> None:
    """The same state at the end, names included."""
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(other["state"][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [Case(*c) for c in product(PRECISIONS, (1, 2), (False, True))], ids=str)
def test_eager(case):
    found = alone(case)
    sound(case, found)
    kinds = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
    assert {value.dtype for value in found["state"].values()} == {kinds.get(case.precision, torch.float32)}
    plain = alone(case._replace(recompute=False))
    assert differing(plain["state"], found["state"]) == []
    assert found["losses"] == plain["losses"]


@pytest.mark.parametrize("precision", CLOSE)
def test_accumulation_is_the_double_batch(precision):
    whole, halves, (rtol, atol) = alone(Case(precision, 1)), alone(Case(precision, 2)), CLOSE[precision]
    close(whole, halves, rtol, atol)
    means = [sum(pair) / 2 for pair in zip(halves["losses"][::2], halves["losses"][1::2], strict=True)]
    assert means == pytest.approx(whole["losses"], rel=rtol)
    moved = (whole["state"]["head.weight"] - train(Case(precision), max_epochs=1)["state"]["head.weight"]).abs().max()
    assert moved > 100 * atol  # else the comparison says nothing


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled(case):
    found, eager = alone(case), alone(case._replace(compiled=""))
    sound(case, found)
    if not case.recompute:  # around which torch breaks the graph
        assert found["graphs"] == case.accumulate + 1  # ranges of a step's first batch, of its others, and settled ones
    # In low precision another order of sums moves a value to another code now and then.
    rtol, atol = CLOSE["64-true"] if case.precision == "64-true" else (0.05, 0.01)
    close(eager, found, rtol, atol)
    assert found["losses"] == pytest.approx(eager["losses"], rel=min(rtol, 0.02))


@pytest.mark.parametrize(("method", "options"), [("pege", {"theta": "element"}), ("lsq", {})])
def test_steps_that_a_gradient_scaler_skips_leave_no_trace(method, options):
    quant = QuantCallback(method, "w4a8", options={"calibration": 1, **options})
    found = train(Case("16-mixed"), quant, scale=2.0**30, max_epochs=12)
    skipped = round(30 - math.log2(found["scale"]))
    assert 3 <= skipped <= 16
    assert found["losses"][:skipped:2] == pytest.approx(
        [found["losses"][0]] * len(found["losses"][:skipped:2]), rel=0.05
    )
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert all(bool(torch.isfinite(value).all()) for value in found["state"].values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_two_processes_are_one(tmp_path, strategy):
    run("matrix_run.py", "--out", tmp_path, "--strategy", strategy, processes=2)
    ranks = [result(tmp_path, r) for r in (0, 1)]
    for case in cases(strategy):
        first, second = (r[str(case)] for r in ranks)
        sound(case, first)
        assert first["losses"] == second["losses"]
        assert differing(first["state"], second["state"]) == []
        if case.precision in CLOSE:
            one, (rtol, atol) = alone(case._replace(compiled="")), CLOSE[case.precision]
            assert first["losses"] == pytest.approx(one["losses"], rel=rtol)
            close(one, first, rtol, atol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning runs FSDP1 and DeepSpeed on CUDA devices only")
@pytest.mark.parametrize("strategy", ["cuda_fsdp1", "cuda_deepspeed"])
def test_strategies_for_gpus(tmp_path, strategy):
    if strategy == "cuda_deepspeed":
        pytest.importorskip("deepspeed")
    run("matrix_run.py", "--out", tmp_path, "--strategy", strategy, processes=min(torch.cuda.device_count(), 2))
    found = result(tmp_path)
    for case in cases(strategy):
        losses = found[str(case)]["losses"]
        assert all(math.isfinite(loss) for loss in losses), case
        assert losses[-1] < 0.5 * losses[0], case
        assert found[str(case)]["reached"] == [True] * len(losses), case
