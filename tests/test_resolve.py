"""What is left open is decided by the model and the method; pairs that make no sense are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from hf_integration import QuantArguments
from lightning_quant import QuantCallback, QuantConfig, attach
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.ste import Ste
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec, parse_scheme

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


def test_both_front_ends_choose_grid_range_and_observer():
    config = QuantConfig.parse("lsq", "w4a4-static", grid="apot", observer="minmax")
    flags = QuantArguments(quant="lsq", quant_scheme="w4a4-static", quant_option=["grid=apot", "observer=minmax"])
    assert flags.to_config() == config
    options = {"grid": "apot", "observer": "minmax"}
    assert QuantCallback("lsq", "w4a4-static", options=options).config == config
    assert {s.grid for s in (config.weight, config.activation)} == {"apot"}


@pytest.mark.parametrize(
    ("method", "scheme", "options", "message"),
    [
        ("stochastic", "nf4-g32", {}, "method stochastic: expected a uniform grid.*Use grid='int', or a method"),
        ("lsq", "w4a16-g32", {"grid": "apot", "range": "bounds"}, "expected range='scale'.*Levels are only scaled"),
        ("lsq", "w8a8-dynamic", {"range": "offset"}, "expected a static range, got dynamic=True.*Use -static"),
        ("lsq", "w4a16-g32-asym", {"scale_format": "pow2"}, "a symmetric grid with range='scale'.*drop -asym"),
        ("lsq", "w4a16-g32-asym", {"grid": "apot"}, "signed levels, got symmetric=False.*Leave -asym out"),
        ("lsq", "w3a16-g32", {"grid": "nf4"}, r"one of \(4,\) bits, got 3.*Write for example w4"),
        ("twn", "w4a16", {}, "method 'twn'.*bits=1.58, got bits=4.*Set bits to 1.58, or choose another method"),
        ("dorefa", "w2a2-static", {"range": "bounds"}, "method 'dorefa'.*range='scale', got range='bounds'"),
        ("lsq", "w4a16-g32", {"range": "clip"}, "0.weight: range='clip'"),
        ("tqt", "w1a16-channel", {}, "0.weight: range='log2'"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_with_the_cure(method, scheme, options, message):
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(ValueError, match=rf"^0\.(weight|input): .*{message.removeprefix('0.weight: ')}"):
        attach(model, QuantConfig.parse(method, scheme, **options))
    assert type(model[0]) is nn.Linear
