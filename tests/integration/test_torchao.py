"""Exports in torchao's format, run by ``make test-runtimes`` where torchao is installed."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_quant import QuantConfig, attach
from lightning_quant.errors import CheckpointError
from lightning_quant.export import check_export, export, verify
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm, token_batch

pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.skipif(find_spec("torchao") is None, reason="make test-runtimes has it in an environment of its own"),
    pytest.mark.filterwarnings("ignore"),  # torchao's own, while it is imported
]

CASES = [  # family, tied, scheme, largest difference of a logit, class of the weights
    ("llama", False, "w8a16", 1e-5, "Int8Tensor"),
    ("llama", True, "w4a16-g32", 0.0, "IntxUnpackedToInt8Tensor"),
    ("qwen2", False, "w2a16-g32-asym", 0.0, "IntxUnpackedToInt8Tensor"),
    ("llama", False, "w8a8", 1e-5, "Int8Tensor"),
    ("opt", False, "w4a8-channel", 1e-5, "Int8Tensor"),
    ("opt", True, "w8a8", 1e-5, "Int8Tensor"),
]


def exported(tmp_path: Path, family: str, tied: bool, scheme: str) -> tuple[torch.nn.Module, Path]:
    config = QuantConfig.parse("lsq", scheme, target="torchao")
    model = train_a_little(causal_lm(family, tied), config)
    report = export(model, tmp_path / "out", config=config, max_shard_bytes=40_000)
    assert report.format == "torchao"
    assert len(report.files) > 2
    return model, tmp_path / "out"


@pytest.mark.parametrize(("family", "tied", "scheme", "bound", "kind"), CASES)
def test_transformers_reads_what_was_trained(tmp_path, family, tied, scheme, bound, kind):
    from transformers import AutoModelForCausalLM

    model, out = exported(tmp_path, family, tied, scheme)
    report = verify(out, model)
    assert report.ok, str(report)
    assert report.max_abs_diff <= bound
    assert max(check.output_diff for check in report.layers) <= bound
    read = AutoModelForCausalLM.from_pretrained(out)
    weights = [m.weight for m in read.modules() if isinstance(m, torch.nn.Linear)]
    assert [type(w).__name__ for w in weights].count(kind) == len(report.layers)
    quantized = [w for w in weights if type(w).__name__ == kind]
    assert all((getattr(w, "act_quant_kwargs", None) is not None) == ("a8" in scheme) for w in quantized)
    assert read.generate(**token_batch(), max_new_tokens=2, do_sample=False).shape[1] == 18


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("ao"), "llama", False, "w8a8")


LAYER = "model.layers.1.mlp.up_proj"
EDITS = {
    "code": (f"{LAYER}._weight_qdata", 1, f"{LAYER}: 1 integers"),
    "scale": (f"{LAYER}._weight_scale", 1e-4, f"{LAYER}: 0 integers, d scale 0.0001"),
    "norm": ("model.norm.weight", 1, "model.norm.weight: differs"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_names_what_differs(tmp_path, shared, edit):
    model, out = shared
    name, change, message = EDITS[edit]
    path = shutil.copytree(out, tmp_path / "out")
    file = path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]
    rewrite(file, lambda tensors, header: tensors[name].flatten()[:1].add_(change))
    bad = verify(path, model)
    assert not bad.ok
    assert message in str(bad)


def rewrite(file: Path, change) -> None:
    with safe_open(file, framework="pt") as opened:
        tensors, header = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, file, header)


def test_a_header_without_the_rounding_of_inputs_is_found(tmp_path, shared):
    model, out = shared
    path = shutil.copytree(out, tmp_path / "out")

    def forget(tensors, header) -> None:
        said = json.loads(header[f"{LAYER}.weight"])
        said["_data"]["act_quant_kwargs"] = None
        header[f"{LAYER}.weight"] = json.dumps(said)

    for file in path.glob("*.safetensors"):
        rewrite(file, forget)
    bad = verify(path, model)
    assert not bad.ok
    assert f"{LAYER}.weight: differs" in str(bad)
    assert next(check for check in bad.layers if check.path == LAYER).output_diff > 1e-3


def test_missing_file(tmp_path, shared):
    model, out = shared
    path = shutil.copytree(out, tmp_path / "out")
    next(path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002\S+: expected a whole safetensors file"):
        verify(path, model)


REFUSED = {
    "w4a8-g32": r"expected symmetric weights per channel beside quantized inputs, got groups\. Train with -channel",
    "w8a8-static": r"expected 8-bit inputs on a range per token, got 8 bits per tensor\. Train with -dynamic",
    "nf4-g32": r"expected integers of 2 to 8 bits around a zero point, got grid='nf4'",
    "w1a16-channel": r"expected integers of 2 to 8 bits around a zero point, got grid='int', 1 bits",
    "w8a16-kv8": r"self_attn\S* \(format='torchao'\): expected keys and values in float",
}


@pytest.mark.parametrize("scheme", REFUSED)
def test_refused_by_name(scheme):
    attach(model := causal_lm(), QuantConfig.parse("ste", scheme, target="torchao"))
    with pytest.raises(ValueError, match=REFUSED[scheme]):
        check_export(model, "torchao")


def test_refused_for_the_arithmetic_that_training_followed():
    attach(model := causal_lm(), QuantConfig.parse("ste", "w8a8"))
    with pytest.raises(
        ValueError, match=r"q_proj .*target='torchao' where inputs are rounded, got 'vllm'\. Train with"
    ):
        check_export(model, "torchao")
    attach(tied := causal_lm(tied=True), QuantConfig.parse("ste", "w8a16", embeddings=True, head=True))
    with pytest.raises(ValueError, match=r"embed_tokens \(format='torchao'\): expected a Linear layer"):
        check_export(tied, "torchao")
