"""Plain settings become a config, or a message that says what is wrong with them."""

from __future__ import annotations

import pytest

from lightning_quant.controller import QuantController
from lightning_quant.estimators import build_estimator
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.settings import build_config
from lightning_quant.spec import LayerRule, QuantConfig

RAMP = {"curve": "cosine", "start": 0.0, "end": 0.5, "delay": 0.2}


def test_fields_and_rules_arrive():
    config = build_config(
        "lsq", "w4a8", rules=[{"match": "head", "weight": None}], calibration=0, delay=0.5, strict=True
    )
    assert config == QuantConfig.parse(
        "lsq", "w4a8", rules=[LayerRule("head", weight=None)], calibration=0, delay=0.5, strict=True
    )
    assert build_config(calibration=None, delay=None) == QuantConfig.parse()


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("pege", {"lam": RAMP, "sharpness": 2.0}),
        ("pege_replace", {"share": {"curve": "linear", "end": 1.0}, "lam": 0.1}),
        ("dsq", {"alpha": {"curve": "hardness", "start": 0.2, "end": 0.02}}),
        ("dampen", {"lam": 0.1}),
        ("freeze", {"threshold": 0.02}),
        ("noise", {"rate": {"curve": "linear", "start": 0.1, "end": 1.0}}),
        ("inq", {"share": {"curve": "linear", "start": 0.2, "end": 1.0}}),
        ("ede", {"t": {"curve": "geometric", "start": 0.1, "end": 10.0}}),
    ],
)
def test_schedules_become_options(method, schedule):
    config = build_config(method, "w4a16", schedule=schedule, options={"calibration": 3})
    assert config == QuantConfig.parse(method, "w4a16", calibration=3, **schedule)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {"lamb": 0.1}}, r"schedule: expected one of lam, sharpness, got 'lamb'\. Did you mean .*'lam'"),
        ({"method": "dsq", "schedule": {"alhpa": RAMP}}, r"schedule: expected one of alpha, got 'alhpa'"),
        ({"method": "dsq", "schedule": {"state_lr": RAMP}}, r"schedule: expected one of alpha, got 'state_lr'"),
        ({"method": "lsq", "schedule": {"lam": 0.1}}, r"schedule: expected one of \(none\), got 'lam'"),
        ({"schedule": {"lam": {"curv": "linear"}}}, r"schedule\['lam'\]: expected the fields of Schedule"),
        ({"schedule": {"lam": {"curve": "linaer"}}}, r"Schedule\.curve: .*Did you mean curve 'linear'"),
        ({"schedule": {"lam": 0.1}, "options": {"lam": 0.2}}, r"each setting once, got lam in options and in schedule"),
        ({"delay": 3, "options": {"delay": 2}}, r"each setting once, got delay in options and in arguments"),
        (
            {"method": "pege", "schedule": {"sharpness": 3}, "options": {"theta": "grp"}},
            "pege.theta: expected one of .*group",
        ),
        ({"delay": -1}, r"QuantConfig\.delay"),
        ({"method": Lsq(), "schedule": {"lam": 0.1}}, "an object that stands alone"),
        ({"config": QuantConfig(), "schedule": {"lam": 0.1}, "delay": 2}, r"alone, got schedule, delay beside it"),
        ({"config": QuantConfig(), "strict": False}, r"alone, got strict beside it"),
        ({"config": QuantConfig(), "scheme": "w4a8"}, r"alone, got scheme beside it"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantController(build_config(**settings))


def test_values_out_of_range_are_refused_by_the_method():
    config = build_config("dsq", schedule={"alpha": {"curve": "linear", "start": 0.5, "end": 2.0}})
    with pytest.raises(ValueError, match=r"dsq\.alpha: expected values in \(0, 1\)"):
        build_estimator(config.method, dict(config.options))
