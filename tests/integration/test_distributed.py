"""Two real gloo processes agree with each other, and with one process at the same global batch.

Everything runs in float64: a sum in another order then moves no value to another code, so whole runs can be compared.
"""

from __future__ import annotations

import pytest
import torch

from lightning_quant import ESTIMATORS
from tests.integration.processes import differing, result, run


def equal(one: dict, other: dict) -> None:
    """The same losses at every step and the same quantizer state at the end, to rounding."""
    losses = [torch.tensor(r["losses"], dtype=torch.float64) for r in (one, other)]
    # transformers computes its loss in float32
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert one["quant"].keys() == other["quant"].keys()
    for name, value in one["quant"].items():
        torch.testing.assert_close(other["quant"][name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def agree(ranks: list[dict], state: str) -> None:
    """Ranks hold the same quantizer state bit for bit, ``state`` among it."""
    assert differing(ranks[0]["quant"], ranks[1]["quant"]) == []
    for name in ("scale", state):
        assert any(n.endswith(name) for n in ranks[0]["quant"])


@pytest.mark.parametrize(
    ("strategy", "scheme", "state"),
    [("ddp", "w4a16-g32", "theta"), ("ddp", "w8a8-static", "running"), ("fsdp2", "w4a16-g32", "theta")],
)
def test_lightning(tmp_path, strategy, scheme, state):
    args = ("--epochs", 2, "--scheme", scheme, "--double")
    run("lightning_run.py", "--out", tmp_path / "one", *args)
    run("lightning_run.py", "--out", tmp_path / "two", *args, "--strategy", strategy, processes=2)
    ranks = [result(tmp_path / "two", r) for r in (0, 1)]
    agree(ranks, state)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert len(ranks[0]["losses"]) == 16
    equal(result(tmp_path / "one"), ranks[0])


def test_lightning_with_a_delay(tmp_path):
    """Learned scales have gradients of 0 in the float phase, and start from the whole of sharded weights."""
    args = ("--epochs", 2, "--delay", 0.3, "--double")
    run("lightning_run.py", "--out", tmp_path / "one", *args)
    one = result(tmp_path / "one")
    for strategy in ("ddp", "fsdp2"):
        run("lightning_run.py", "--out", tmp_path / strategy, *args, "--strategy", strategy, processes=2)
        ranks = [result(tmp_path / strategy, r) for r in (0, 1)]
        agree(ranks, "theta")
        equal(one, ranks[0])


@pytest.mark.parametrize(
    ("strategy", "scheme", "state"),
    [("ddp", "w4a16-g32", "theta"), ("ddp", "w8a8-static", "running"), ("fsdp2", "w4a16-g32", "theta")],
)
def test_lightning_compiled(tmp_path, strategy, scheme, state):
    """In float32, as the kernels are: a value may move to another code in time, so losses are compared, and loosely."""
    args = ("--epochs", 1, "--scheme", scheme, "--strategy", strategy, "--method", "ste" if "a8" in scheme else "pege")
    run("lightning_run.py", "--out", tmp_path / "plain", *args, processes=2)
    run("lightning_run.py", "--out", tmp_path / "compiled", *args, "--compile", processes=2)
    ranks = [result(tmp_path / "compiled", r) for r in (0, 1)]
    agree(ranks, state)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["losses"] == pytest.approx(result(tmp_path / "plain")["losses"], rel=1e-3)


@pytest.mark.parametrize("theta", ["group", "element"])
def test_trainer_ddp(tmp_path, theta):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    args = ("--theta", theta, "--double")
    run("hf_run.py", "--out", tmp_path / "one", *args)
    run("hf_run.py", "--out", tmp_path / "two", *args, processes=2)
    ranks = [result(tmp_path / "two", r) for r in (0, 1)]
    assert ranks[0]["wrapped"] == "DistributedDataParallel"
    agree(ranks, "theta")
    equal(result(tmp_path / "one"), ranks[0])


def test_trainer_accumulation_equals_the_big_batch(tmp_path):
    for name, accumulate in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        run("hf_run.py", "--out", tmp_path / name, "--scheme", "w8a8-static", "--accumulate", accumulate, "--double")
    one = result(tmp_path / "one")
    assert len(one["losses"]) == 12
    assert sum(n.endswith("running") for n in one["quant"]) == 14
    equal(one, result(tmp_path / "two"))


# What a rank does with its own part of a batch and not with its sum: |g| in the backward pass, and a search for the
# best range, which does not add up over parts as extremes and power means do.
LOCAL = ("elq", "ewgs", "lsq_plus")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every method on one process."""
    out = tmp_path_factory.mktemp("one")
    run("methods_run.py", "--out", out)
    return result(out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_every_method_on_two_processes_is_that_of_one(tmp_path, alone, strategy):
    run("methods_run.py", "--out", tmp_path, "--strategy", strategy, processes=2)
    ranks = [result(tmp_path, r) for r in (0, 1)]
    refused = {m for m, found in ranks[0].items() if isinstance(found, str)}
    assert refused == ({m for m in ESTIMATORS if ESTIMATORS[m]().holds_elements} if strategy == "fsdp2" else set())
    assert all("expected a whole weight for the state per element" in ranks[0][m] for m in refused)
    for method in sorted(ESTIMATORS.keys() - refused):
        one, (first, second) = alone[method], (r[method] for r in ranks)
        assert first["losses"] == second["losses"], method
        assert differing(first["state"], second["state"]) == [], method
        exact = method not in LOCAL
        assert one["losses"] == pytest.approx(first["losses"], rel=1e-6 if exact else 0.1), method
        for name, value in one["state"].items() if exact else ():
            torch.testing.assert_close(
                first["state"][name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=f"{method} {name}": f"{n}: {m}"
            )
