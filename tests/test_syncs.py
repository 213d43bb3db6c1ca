"""A training step never waits for the device: nothing it does reads a tensor's value on the host.

On a GPU each such read makes Python wait until all queued kernels are done.  They are operators of their own, so a
processor can count them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant import QuantConfig, QuantController
from lightning_quant.estimators import ESTIMATORS
from lightning_quant.optim import param_groups

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item(), float(), bool(), a comparison in an if
    aten.equal.default,
    aten.nonzero.default,  # sizes of what follows depend on values
    aten.masked_select.default,
    aten._unique2.default,
}


class Reads(TorchDispatchMode):
    """Notes the operators that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def steps(method: str, scheme: str, **options: Any) -> list[int]:
    """Reads per step of a short run, calibration, schedules, learned state and all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 32))
    controller = QuantController(config := QuantConfig.parse(method, scheme, calibration=2, **options))
    controller.prepare(model)
    controller.begin(60)  # weights that are frozen in stages are so elsewhere
    optimizer = torch.optim.SGD(param_groups(model, config, 0.01))
    counts = []
    for step in range(6):
        with Reads() as reads:
            controller.on_step(step)
            model(torch.randn(8, 128)).square().mean().backward()
            controller.before_optimizer_step()
            optimizer.step()
            controller.after_optimizer_step()
            optimizer.zero_grad()
        counts.append(len(reads.found))
    return counts


def test_reads_are_seen():
    with Reads() as reads:
        if torch.ones(()) > 0:
            torch.ones(3).nonzero()
    assert len(reads.found) == 2


@pytest.mark.parametrize("method", sorted(ESTIMATORS))
def test_none_in_a_step(method):
    assert steps(method, ESTIMATORS[method].about.scheme)[1:] == [0] * 5


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        ("pege", "w4a16-g32", {"theta": "element"}),
        ("pege", "w4a8-g32", {}),
        ("pege", "w8a8-static", {"sharpness": "learned"}),
        ("lsq", "w8a8-static", {}),
        ("ste", "w4a8-g32", {"compile": True}),
        ("lsq", "w4a16-g32", {"delay": 3}),
        ("ste", "nf4", {}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_none_whatever_is_on(method, scheme, options):
    assert steps(method, scheme, **options)[1:] == [0] * 5
