"""QuantTrainer resumed from every phase, on every way to share a run: the run that went on and the resumed one agree.

All are compared bit for bit: within one kind, sums are made in one order.  What other files hold already is not
repeated: ``test_resume.py`` (killed processes, more methods), ``test_resume_phases.py`` (Lightning in the middle of an
epoch, delays, folded normalization, FSDP2's directory checkpoints), ``test_peft.py`` (adapters).
"""

from __future__ import annotations

import pytest
import torch

from tests.integration.processes import DEEPSPEED, differing, result, run
from tests.integration.resume_run import CALIBRATION, PHASES, STEPS

SHARED = ("ddp", "fsdp2", "zero2", "zero3")
WRAPPED = {
    "one": "LlamaForCausalLM",
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPLlamaForCausalLM",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
RUNS = [(kind, n) for kind in WRAPPED for n in (1, 2) if (kind, n) != ("zero2", 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of every run has to say; a single process is its own rank 0."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run("resume_run.py", "--out", one, "--kinds", "one")
    run("resume_run.py", "--out", two, "--kinds", *SHARED, processes=2, env=DEEPSPEED)
    return [{**result(one), **result(two)}, result(two, 1)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("kind", "accumulate"), RUNS)
def test_resumed_is_uninterrupted(found, kind, accumulate, phase):
    for ranks in found[: 1 if kind == "one" else 2]:
        whole, rest = ranks[f"{kind}-{accumulate}"], ranks[f"{kind}-{accumulate}-{phase}"]
        assert rest["wrapped"] == whole["wrapped"] == WRAPPED[kind]
        assert (rest["sharded"] > 0) == (kind in ("fsdp2", "zero3"))
        assert list(rest["losses"]) == list(range(1, STEPS + 1))
        assert rest["losses"] == whole["losses"]
        assert differing(whole["state"], rest["state"]) == []
        assert differing(whole["quant"], rest["quant"]) == []
    rest = found[0][f"{kind}-{accumulate}-{phase}"]
    assert len(rest["state"]) > 80  # gathered by rank 0


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", WRAPPED)
def test_calibration_goes_on_and_does_not_start_over(found, kind, phase):
    whole, rest = found[0][f"{kind}-2"], found[0][f"{kind}-2-{phase}"]
    assert whole["observed"] == list(range(1, CALIBRATION + 1))
    assert rest["observed"] == list(range(PHASES[phase] + 1, CALIBRATION + 1))
    begin = {name: value for name, value in rest["begin"].items() if not name.endswith(".ready")}
    assert all(bool(value) for name, value in rest["begin"].items() if name.endswith(".ready"))
    assert differing(rest["saved"], begin) == []
    assert differing(begin, {name: whole["quant"][name] for name in begin}) != []


@pytest.mark.parametrize("kind", WRAPPED)
def test_phases_are_what_they_are_called(found, kind):
    lam = found[0][f"{kind}-2"]["lam"]
    assert lam[PHASES["calibration"]] == 0
    assert 0 < lam[PHASES["ramp"] + 1] < 0.1
    assert lam[PHASES["settled"]] == pytest.approx(0.1)


@pytest.mark.parametrize(("kind", "accumulate"), [found for found in RUNS if found[0] != "one"])
def test_shared_runs_are_the_run_of_one_process(found, kind, accumulate):
    """To rounding: float32 sums in another order move a few values to another code, which moves the loss a little."""
    one, other = found[0]["one-1"], found[0][f"{kind}-{accumulate}"]
    assert list(other["losses"].values()) == pytest.approx(list(one["losses"].values()), rel=2e-3)
    assert differing(other["quant"], found[1][f"{kind}-{accumulate}"]["quant"]) == []
    for name, value in one["quant"].items():
        if name.endswith("running"):
            torch.testing.assert_close(other["quant"][name], value, rtol=0.02, atol=1e-3)
