"""Scheme grammar, rules, YAML: what is understood, and what is refused with which words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from lightning_quant.scheme import FLOATS, GRAMMAR, PRESETS, WEIGHT_BITS, TensorSpec, parse_scheme
from lightning_quant.spec import LayerRule, QuantConfig

# --- grammar ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in FLOATS])
def test_presets_in_any_case(preset):
    weight, activation = parse_scheme(preset)
    assert parse_scheme(preset.upper()) == parse_scheme(f" {preset.capitalize()} ") == (weight, activation)
    w, a = re.fullmatch(r"w(\d+)a(\d+)", preset).groups()
    assert weight == TensorSpec(bits=int(w), symmetric=True)
    assert activation == (None if a == "16" else TensorSpec(bits=int(a)))


@pytest.mark.parametrize("name", FLOATS)
def test_float_presets(name):
    weight, activation = parse_scheme(name.upper())
    assert weight == TensorSpec(symmetric=True, **FLOATS[name])
    if name == "nf4":
        assert activation is None
        assert parse_scheme("nf4-g64")[0].group_size == 64
    else:
        assert activation == weight
        assert parse_scheme(f"{name}a16") == (weight, None)


@pytest.mark.parametrize("text", ["nf4a16", "nvfp4-g32", "fp8-asym", "mxfp4-static", "fp4", "nf4-static"])
def test_float_presets_refuse(text):
    with pytest.raises(ValueError, match=r"expected the form .* got the part"):
        parse_scheme(text)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_every_weight_width(bits):
    assert parse_scheme(f"w{bits:g}") == (TensorSpec(bits=bits, symmetric=True), None)


@pytest.mark.parametrize(
    ("scheme", "weight", "activation"),
    [
        ("w4a16-g32", {"bits": 4, "granularity": "group", "group_size": 32}, None),
        ("w4-channel", {"bits": 4, "granularity": "channel"}, None),
        ("w2-tensor-asym", {"bits": 2, "granularity": "tensor", "symmetric": False}, None),
        ("w1.58a8", {"bits": 1.58}, {"bits": 8}),
        ("w8a8-static", {"bits": 8}, {"bits": 8, "dynamic": False, "granularity": "tensor"}),
        ("w8a8-dynamic", {"bits": 8}, {"bits": 8, "dynamic": True, "granularity": "token"}),
        ("w8a8-token", {"bits": 8}, {"bits": 8, "dynamic": True, "granularity": "token"}),
        (
            "w4a4-asym-static-g64",
            {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 64},
            {"bits": 4, "dynamic": False, "granularity": "tensor"},
        ),
    ],
)
def test_flags(scheme, weight, activation):
    expected = TensorSpec(**{"symmetric": True, **weight}), activation and TensorSpec(**activation)
    assert parse_scheme(scheme) == parse_scheme(scheme.upper()) == expected


def test_sixteen_bits_is_float():
    assert parse_scheme("w16") == (None, None)
    assert parse_scheme("w16a16") == (None, None)


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        ("w9", "w9"),
        ("int8", "int8"),
        ("", ""),
        ("w4a9", "w4a9"),
        ("w4a1.58", "w4a1.58"),
        ("w4a16-g0", "g0"),
        ("w4a16-g", "g"),
        ("w4a16-g32-g64", "g64"),
        ("w4a16-g32-channel", "channel"),
        ("w4a16-static", "static"),
        ("w8a8-static-dynamic", "dynamic"),
        ("w8a8-asym-asym", "asym"),
        ("w8a8-kv3", "kv3"),
        ("w4a16 g32", "w4a16 g32"),
    ],
)
def test_refusals_show_the_grammar(scheme, part):
    words = f"expected the form {re.escape(GRAMMAR)}, got the part {re.escape(repr(part))}"
    with pytest.raises(ValueError, match=words):
        parse_scheme(scheme)
    with pytest.raises(ValueError, match="Ready-made schemes: w4a16, w8a16"):
        parse_scheme(scheme)


# --- TensorSpec -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, r"TensorSpec.bits: expected one of \(1, 1.58, .*, got 9. 16 bits is written as None"),
        ({"granularity": "chanel"}, "Did you mean granularity 'channel'"),
        ({"granularity": "group"}, "Set both or neither"),
        ({"group_size": 32}, "Set both or neither"),
        ({"granularity": "group", "group_size": 0}, "a positive integer, got 0"),
    ],
)
def test_tensor_spec_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        TensorSpec(**settings)


def test_tensor_spec_parse():
    assert TensorSpec.parse("w4-g32") == TensorSpec(4, True, "group", 32)
    for text in ("w4a8", "w16"):
        with pytest.raises(ValueError, match="a weight scheme such as 'w4-g32', got"):
            TensorSpec.parse(text)


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.lm_head", "lm_head", True),
        ("*.lm_head", "model.lm_head", True),
        ("*.lm_head", "my_lm_head", False),
        ("lm_head", "model.lm_head", False),
        ("model.layers.[0-3].*", "model.layers.2.mlp.up_proj", True),
        ("model.layers.[0-3].*", "model.layers.4.mlp.up_proj", False),
        ("*.Down_proj", "a.down_proj", False),
        (r"re:layers\.\d+\.mlp", "model.layers.11.mlp.up_proj", True),
        (r"re:^mlp", "model.layers.11.mlp", False),
    ],
)
def test_rule_matching(pattern, path, expected):
    assert LayerRule(pattern, weight=None).matches(path) is expected


def test_rule_reads_a_scheme_string():
    assert LayerRule("*", weight="w2-g64").weight == TensorSpec(2, True, "group", 64)
    with pytest.raises(ValueError, match=re.escape(GRAMMAR)):
        LayerRule("*", weight="two bits")
    with pytest.raises(ValueError, match=r"LayerRule\('\*'\).activation: .*Write TensorSpec\(bits=8\)"):
        LayerRule("*", activation="a8")


# --- QuantConfig ----------------------------------------------------------------------------------------------------


def test_parse_sorts_keywords():
    rule = LayerRule("*.head", weight=None)
    config = QuantConfig.parse("pege", "w4a8-g32", rules=[rule], lam=0.5, calibration=3, embeddings=True)
    assert config.weight == TensorSpec(4, True, "group", 32)
    assert config.rules == (rule,)
    assert dict(config.options) == {"lam": 0.5}
    assert (config.calibration, config.embeddings) == (3, True)
    config = QuantConfig.parse("ste", "w4a8", learn_scale=True)
    assert config.weight.learn_scale is config.activation.learn_scale is True
    assert QuantConfig.parse("ste", "w4a16", learn_scale=False).activation is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "vlm"}, "Did you mean target 'vllm'"),
        ({"coverage": "warning"}, "Did you mean coverage 'warn'"),
        ({"weight": None}, "No runtime computes float weights on integer activations"),
        ({"calibration": -1}, "0 or more optimizer steps, got -1"),
    ],
)
def test_config_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**settings)


CONFIGS = [
    QuantConfig(),
    QuantConfig.parse("ste", "w1.58a16"),
    QuantConfig(weight=None, activation=None),
    QuantConfig.parse(
        "pege",
        "w4a8-g32-asym-static",
        rules=[
            LayerRule("*.lm_head", weight=None),
            LayerRule(r"re:mlp\.\d", weight="w2-g64", activation=None),
            LayerRule("*.o_proj", activation=TensorSpec(8, granularity="tensor", dynamic=False)),
            LayerRule("*.q_proj"),
        ],
        lam={"curve": "cosine", "start": 0.0, "end": 1e-3},
        theta="element",
        coverage="warn",
        target="transformers",
        scale_lr=0.5,
        seed=3,
        embeddings=True,
        head=True,
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_yaml_round_trip(config, tmp_path):
    config.to_yaml(tmp_path / "quant.yaml")
    assert QuantConfig.from_yaml(tmp_path / "quant.yaml") == config
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert [p.name for p in tmp_path.iterdir()] == ["quant.yaml"]  # nothing half-written stays behind


def test_yaml_by_hand_then_back(tmp_path):
    text = """
version: 1
method: lsq
weight: {bits: 4, granularity: group, group_size: 32}
activation: null
rules:
  - {match: "*.lm_head", weight: null}
  - {match: "*.down_proj", weight: w8-channel}
"""
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    config = QuantConfig.from_yaml(tmp_path / "a.yaml")
    assert config == QuantConfig(
        method="lsq",
        weight=TensorSpec(4, None, "group", 32),
        activation=None,
        rules=(LayerRule("*.lm_head", weight=None), LayerRule("*.down_proj", weight="w8-channel")),
    )
    config.to_yaml(tmp_path / "b.yaml")
    data = yaml.safe_load((tmp_path / "b.yaml").read_text(encoding="utf-8"))
    assert data["version"] == 1
    assert data["rules"][0] == {"match": "*.lm_head", "weight": None, "activation": "inherit"}
    assert data["rules"][1]["weight"]["granularity"] == "channel"


def test_keys_left_out_take_the_defaults():
    assert QuantConfig.from_dict({"version": 1}) == QuantConfig()
    assert QuantConfig.from_dict({"version": 1, "weight": {"bits": 4}}) == replace(QuantConfig(), weight=TensorSpec(4))


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_versions(version):
    with pytest.raises(ValueError, match=rf"version 1, got {version!r}. Write it again"):
        QuantConfig.from_dict({**QuantConfig().to_dict(), "version": version})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methd": "ste"}, "QuantConfig: .*got 'methd'. Did you mean key 'method'"),
        ({"weight": {"bit": 4}}, "QuantConfig.weight: .*got 'bit'. Did you mean key 'bits'"),
        ({"rules": [{"match": "*", "wieght": None}]}, r"QuantConfig.rules\[0\]: .*Did you mean key 'weight'"),
        (
            {"rules": [{"match": "*", "weight": {"group": 3}}]},
            r"QuantConfig.rules\[0\].weight: .*Did you mean key 'group_size'",
        ),
        ({"weight": "w4"}, "QuantConfig.weight: expected a mapping of TensorSpec fields or null, got 'w4'"),
        (
            {"rules": [{"weight": None}]},
            r"QuantConfig.rules\[0\]: expected a mapping with the key match, got {'weight'",
        ),
        ({"rules": ["*.lm_head"]}, r"QuantConfig.rules\[0\]: expected a mapping with the key match, got '\*"),
    ],
)
def test_unknown_keys(change, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict({**QuantConfig().to_dict(), **change})


def test_yaml_that_is_no_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a mapping of settings, got list"):
        QuantConfig.from_yaml(tmp_path / "a.yaml")


def test_config_is_frozen_and_owns_its_options():
    options = {"lam": 0.1}
    config = QuantConfig(options=options)
    options["lam"] = 0.9
    assert config.options["lam"] == 0.1
    with pytest.raises(AttributeError, match="cannot assign"):
        config.method = "ste"
