"""No corruption of an export goes unnoticed, and whatever a file holds, verify ends in a verdict or a clear error."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quant import QuantConfig
from lightning_quant.errors import CheckpointError
from lightning_quant.export import export, verify
from lightning_quant.export.stored import PASSING
from tests.integration.test_export import train_a_little
from tests.integration.tiny import VOCAB

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
SCHEMES = {
    "packed": ("w4a16-g32", "compressed-tensors"),
    "zero points": ("w3a16-g32-asym", "compressed-tensors"),
    "static inputs": ("w8a8-static-kv8", "compressed-tensors"),
    "nvfp4": ("nvfp4a16", "compressed-tensors"),
    "folded": ("w4a16-g32", "folded"),
}
EACH = 50


@pytest.fixture(scope="module", params=SCHEMES)
def exported(request, tmp_path_factory):
    """A trained model and its good export, without the checksums, which would find everything by themselves."""
    scheme, format = SCHEMES[request.param]
    config = QuantConfig.parse("ste", scheme, target="transformers", calibration=2)
    torch.manual_seed(0)
    model = train_a_little(LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)), config)
    path = tmp_path_factory.mktemp(request.param.replace(" ", "-")) / "out"
    export(model, path, format=format, config=config)
    (path / "SHA256SUMS").unlink(missing_ok=True)
    assert verify(path, model).ok
    return model, path


class Export:
    """The files that verify reads, to be changed."""

    def __init__(self, path: Path, draw: random.Random) -> None:
        self.path, self.draw = path, draw
        self.tensors = load_file(path / "model.safetensors")
        self.config = json.loads((path / "config.json").read_text())

    def save(self) -> None:
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))

    def name(self, suffix: str = "") -> str:
        return self.draw.choice(sorted(n for n in self.tensors if n.endswith(suffix)))


def flip_a_bit(e: Export) -> str:
    name = e.name()
    data = e.tensors[name].contiguous().view(torch.uint8).flatten().clone()
    at, bit = e.draw.randrange(len(data)), e.draw.randrange(8)
    data[at] ^= 1 << bit
    e.tensors[name] = data.view(e.tensors[name].dtype).view(e.tensors[name].shape)
    return f"bit {bit} of byte {at} of {name}"


def scale_a_tensor(e: Export) -> str:
    floats = sorted(n for n, t in e.tensors.items() if t.dtype == torch.float32 and t.any())
    name = e.draw.choice(floats)
    e.tensors[name] = e.tensors[name] * e.draw.choice([0.5, 0.999, 1.0001, 2.0, -1.0, float("nan")])
    return f"{name} scaled"


def rename(e: Export) -> str:
    name = e.name()
    e.tensors[name[:-1] + "x"] = e.tensors.pop(name)
    return f"{name} renamed"


def swap_two(e: Export) -> str:
    alike: dict[Any, list[str]] = {}
    for name, t in e.tensors.items():
        alike.setdefault((t.shape, t.dtype), []).append(name)
    pairs = [
        (a, b)
        for names in alike.values()
        for a in names
        for b in names
        if a < b and not torch.equal(e.tensors[a].view(torch.uint8), e.tensors[b].view(torch.uint8))
    ]
    a, b = e.draw.choice(pairs)
    e.tensors[a], e.tensors[b] = e.tensors[b], e.tensors[a]
    return f"{a} and {b} swapped"


def drop(e: Export) -> str:
    name = e.name()
    del e.tensors[name]
    return f"{name} dropped"


def add(e: Export) -> str:
    name = e.name() + e.draw.choice(["_extra", ".bias"])
    e.tensors[name] = torch.zeros(4)
    return f"{name} added"


def cast(e: Export) -> str:
    name = e.name("weight")
    e.tensors[name] = e.tensors[name].to(torch.float64)
    return f"{name} cast"


def reshape(e: Export) -> str:
    name = e.draw.choice(sorted(n for n, t in e.tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1]))
    e.tensors[name] = e.tensors[name].reshape(e.tensors[name].shape[::-1])
    return f"{name} reshaped"


def leaves(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of the values in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = [leaf for key, value in items for leaf in leaves(value, (*at, key))]
    return found or [at]


def change_a_setting(e: Export) -> str:
    at = e.draw.choice([p for p in leaves(e.config) if p[0] not in PASSING])
    place = e.config
    for key in at[:-1]:
        place = place[key]
    value = place[at[-1]]
    if isinstance(place, dict) and e.draw.random() < 0.3:
        del place[at[-1]]
        return f"config.json {at} deleted"
    changed = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 2 + 1, str: lambda v: v + "x"}
    place[at[-1]] = changed.get(type(value), lambda v: 7)(value)
    return f"config.json {at}: {value} -> {place[at[-1]]}"


MUTATIONS = [flip_a_bit] * 4 + [scale_a_tensor, rename, swap_two, drop, add, cast, reshape] + [change_a_setting] * 3


def test_random_corruptions_are_found(exported, tmp_path):
    """Five exports, fifty corruptions each."""
    model, good = exported
    unnoticed = []
    for seed in range(EACH):
        draw = random.Random(seed)
        bad = tmp_path / str(seed)
        shutil.copytree(good, bad)
        e = Export(bad, draw)
        what = draw.choice(MUTATIONS)(e)
        e.save()
        try:
            if verify(bad, model).ok:
                unnoticed.append(what)
        except CheckpointError:
            pass
        shutil.rmtree(bad)
    assert unnoticed == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(path: Path, model: Any) -> bool:
    """Whether verify calls it equal; any error but a clear one is a failure of the test."""
    try:
        return verify(path, model).ok
    except CheckpointError as found:
        error = str(found)
    assert re.search(r"expected .*, got ", error, re.DOTALL)
    return False


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    torch.manual_seed(0)
    config = QuantConfig.parse("ste", "w4a16-g32")
    model = train_a_little(LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})), config)
    path = tmp_path_factory.mktemp("packed") / "out"
    export(model, path, config=config)
    (path / "SHA256SUMS").unlink(missing_ok=True)
    return model, path


@QUICK
@given(data=st.data())
def test_whatever_config_json_holds(packed, tmp_path, data):
    model, good = packed
    config = json.loads((good / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from([p for p in leaves(config) if p and p[0] not in PASSING]))
        place = config
        for key in at[:-1]:
            place = place[key]
        place[at[-1]] = data.draw(json_values.filter(lambda v, old=place[at[-1]]: v != old))
    bad = tmp_path / "config"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    (bad / "config.json").write_text(json.dumps(config))
    assert not outcome(bad, model)


@QUICK
@given(text=st.binary(max_size=64))
def test_a_config_json_that_is_none(packed, tmp_path, text):
    model, good = packed
    bad = tmp_path / "none"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    (bad / "config.json").write_bytes(text)
    assert not outcome(bad, model)


@QUICK
@given(data=st.data())
def test_whatever_a_safetensors_header_holds(packed, tmp_path, data):
    model, good = packed
    raw = (good / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    how = data.draw(st.sampled_from(["value", "bytes", "length", "cut"]))
    if how == "value":
        at = data.draw(st.sampled_from([p for p in leaves(header) if p[0] != "__metadata__"]))
        place = header
        for key in at[:-1]:
            place = place[key]
        place[at[-1]] = data.draw(json_values.filter(lambda v, old=place[at[-1]]: v != old))
        text = json.dumps(header).encode()
        bad_raw = len(text).to_bytes(8, "little") + text + raw[8 + size :]
    elif how == "bytes":
        at = data.draw(st.integers(8, 8 + size - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda b: b != raw[at]))
        bad_raw = raw[:at] + bytes([byte]) + raw[at + 1 :]
        if b"__metadata__" in raw[8 : 8 + size] and _same(raw, bad_raw):
            return
    elif how == "length":
        bad_raw = data.draw(st.integers(0, 2**64 - 1).filter(lambda n: n != size)).to_bytes(8, "little") + raw[8:]
    else:
        bad_raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    bad = tmp_path / "header"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    (bad / "model.safetensors").write_bytes(bad_raw)
    assert not outcome(bad, model)


def _same(raw: bytes, other: bytes) -> bool:
    """Whether two files hold the same tensors: a byte of white space or of the metadata changed."""
    sizes = [int.from_bytes(r[:8], "little") for r in (raw, other)]
    try:
        headers = [json.loads(r[8 : 8 + n]) for r, n in zip((raw, other), sizes, strict=True)]
    except ValueError:
        return False
    for header in headers:
        if isinstance(header, dict):
            header.pop("__metadata__", None)
    return headers[0] == headers[1]


def test_safetensors_are_read_by_name_only(packed):
    """The files hold tensors and nothing that runs."""
    with safe_open(packed[1] / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
