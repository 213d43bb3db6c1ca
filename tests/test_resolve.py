"""What is left open is decided by the model and the method; pairs that make no sense are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.ste import Ste
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.spec import TensorSpec, parse_scheme

CLOSED = {"grid": "int", "range": "scale"}


@pytest.mark.parametrize(
    ("scheme", "convolutional", "learns", "expected"),
    [
        ("w8", False, True, TensorSpec(8, True, "channel", None, True, "minmax", False)),
        ("w8", True, False, TensorSpec(8, True, "channel", None, True, "minmax", False)),
        ("w4", False, False, TensorSpec(4, True, "group", 128, False, "mse", False)),
        ("w4", False, True, TensorSpec(4, True, "group", 128, False, "mse", True)),
        ("w4", True, True, TensorSpec(4, True, "channel", None, False, "mse", True)),
        ("w4-tensor-asym", False, True, TensorSpec(4, False, "tensor", None, False, "mse", True)),
        ("w8-g32", False, True, TensorSpec(8, True, "group", 32, True, "minmax", False)),
    ],
)
def test_resolve_weight(scheme, convolutional, learns, expected):
    rule = Lsq() if learns else Ste()
    assert resolve_weight(TensorSpec.parse(scheme), convolutional, rule) == replace(expected, **CLOSED)


def test_resolve_weight_keeps_explicit_choices():
    spec = resolve_weight(TensorSpec(8, learn_scale=True), False, Ste())
    assert (spec.dynamic, spec.learn_scale, spec.observer) == (False, True, "mse")
    spec = resolve_weight(TensorSpec(4, learn_scale=False), False, Lsq())
    assert spec.learn_scale is False
    spec = resolve_weight(TensorSpec(8, observer="minmax"), False, Ste())
    assert (spec.dynamic, spec.observer) == (False, "minmax")
    with pytest.raises(ValueError, match="tensor, channel or group for weights, got token"):
        resolve_weight(TensorSpec(4, granularity="token"), False, Ste())


@pytest.mark.parametrize(
    ("scheme", "convolutional", "learns", "expected"),
    [
        ("w8a8", False, True, TensorSpec(8, True, "token", None, True, "ema", False)),
        ("w8a8", True, True, TensorSpec(8, False, "tensor", None, False, "ema", True)),
        ("w8a8-static", False, False, TensorSpec(8, True, "tensor", None, False, "ema", False)),
        ("w8a8-dynamic", True, True, TensorSpec(8, True, "token", None, True, "ema", False)),
    ],
)
def test_resolve_activation(scheme, convolutional, learns, expected):
    rule = Lsq() if learns else Ste()
    assert resolve_activation(parse_scheme(scheme)[1], convolutional, rule) == replace(expected, **CLOSED)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec(8, dynamic=False, granularity="token"), "'token' with dynamic=False"),
        (TensorSpec(8, dynamic=True, granularity="tensor"), "'tensor' with dynamic=True"),
        (TensorSpec(8, granularity="channel"), "granularity 'token' or 'group' with dynamic=True or 'tensor'"),
        (TensorSpec(8, symmetric=False, dynamic=True), "fc.input: .*symmetric=True when dynamic, got False"),
    ],
)
def test_resolve_activation_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_activation(spec, False, Ste(), "fc.input")
