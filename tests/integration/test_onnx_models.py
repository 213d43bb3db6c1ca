"""Models of transformers in the ONNX format: text of any length, tied heads, quantized keys and values, damage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import onnx
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments, default_data_collator

from hf_integration import QuantArguments, QuantTrainer
from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.cli import main
from lightning_quant.errors import AttachError
from lightning_quant.export import check_export, export, onnx_qdq, verify
from lightning_quant.export.onnx_inputs import drawn_inputs, example_inputs
from lightning_quant.export.onnx_runtime import constants, run_onnxruntime
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm, token_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from architectures import FAMILIES  # noqa: E402

EVERYTHING = QuantConfig.parse("ste", "w8a8-kv8", target="onnxruntime", embeddings=True, head=True, calibration=2)


def prepared(family: str, config: QuantConfig) -> torch.nn.Module:
    model = FAMILIES[family].build()
    attach(model, config)
    calibrate(model, [FAMILIES[family].inputs(seed=seed) for seed in range(2)])
    return model.eval()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A trained Llama with a tied head, everything in it quantized, and its export, which tests leave as they are."""
    model = train_a_little(causal_lm("llama", tied=True), EVERYTHING)
    out = tmp_path_factory.mktemp("llama") / "out"
    export(model, out, config=EVERYTHING)
    return model, out


def free(out: Path) -> dict[str, list[str | int]]:
    """Dimensions of the inputs, as the file has them."""
    inputs = onnx.load(out / "model.onnx", load_external_data=False).graph.input
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in inputs}


def test_a_language_model_takes_texts_of_any_number_and_length(shared, capfd):
    model, out = shared
    assert free(out) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    for rows, length in ((1, 1), (5, 5), (2, 40)):
        batch = drawn_inputs(model, rows, length)
        found = run_onnxruntime(out, batch)
        with torch.no_grad():
            expected = model(**batch).logits
        assert [*found] == ["logits"]
        assert float(expected.abs().max()) > 1
        # a value on the middle between two codes may go to either: all others are float error
        assert ((found["logits"] - expected).abs() > 1e-4).float().mean() < 0.01
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_verify_of_a_language_model(shared):
    model, out = shared
    report = verify(out, model)
    assert report.ok, str(report)
    assert report.max_abs_diff <= report.tolerance <= 1e-4
    assert len(report.layers) == 16
    names = {node.name.rpartition("/")[0] for node in onnx.load(out / "model.onnx").graph.node}
    assert {check.path for check in report.layers} <= names  # those from a slice of a list too: outputs were compared
    handed = 2 * 32 * (2 * (64 * 6 + 128 + 2 * 32) + 64)
    assert f" of {handed} activations" in report.notes[0]  # keys and values are among them


def test_nothing_is_printed_by_the_exporter(tmp_path, capfd, caplog):
    model = prepared("bert", QuantConfig.parse("ste", "w4a8-channel-static"))
    export(model, tmp_path / "out", format="onnx")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    assert verify(tmp_path / "out", model).ok
    assert free(tmp_path / "out")["attention_mask"] == ["batch", "sequence"]


def test_a_tied_weight_is_stored_once(shared):
    model, out = shared
    stored = constants(out)
    assert torch.equal(
        stored["model.embed_tokens.weight_quant.codes"], model.lm_head.weight_quant.stored(model.lm_head.weight)[0]
    )
    assert "lm_head.weight_quant.codes" not in stored
    large = [name for name, value in stored.items() if value.is_floating_point() and value.numel() >= 64 * 64]
    assert not large
    for letter in "kv":
        q = model.get_submodule(f"model.layers.1.self_attn.kv_quant.{letter}")
        assert float(stored[f"model.layers.1.self_attn.kv_quant.{letter}.scale"]) == float(q.range.scale(q))


def plus_one(values) -> None:
    values[3] += 1


def larger(values) -> None:
    values[0] *= 1.01


EDITS = {
    "code": ("model.layers.0.mlp.up_proj.weight_quant.codes", plus_one, "model.layers.0.mlp.up_proj: 1 integers"),
    "tied code": ("model.embed_tokens.weight_quant.codes", plus_one, "lm_head: 1 integers"),
    "scale": ("model.layers.1.self_attn.o_proj.weight_quant.scale", larger, "o_proj: 0 integers, d scale"),
    "input": ("model.layers.1.self_attn.o_proj.input_quant.scale", larger, "o_proj: 0 integers, d scale"),
    "keys": ("model.layers.0.self_attn.kv_quant.k.scale", larger, "model.layers.0.self_attn.kv_quant.k: differs"),
    "norm": ("model.norm.weight", larger, "model.norm.weight: differs"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_names_what_differs(tmp_path, shared, edit):
    model, out = shared
    name, change, message = EDITS[edit]
    file = shutil.copytree(out, tmp_path / "out") / "model.onnx"
    damaged = onnx.load(file)
    (tensor,) = [t for t in damaged.graph.initializer if t.name == name]
    array = onnx.numpy_helper.to_array(tensor).copy()
    change(array.reshape(-1))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(damaged, file)
    bad = verify(tmp_path / "out", model)
    assert not bad.ok
    assert message in str(bad)


def test_groups_of_a_layer_that_keeps_a_row_of_the_matrix_per_input(tmp_path):
    model = prepared("gpt2", QuantConfig.parse("ste", "w3a16-g16-asym"))
    export(model, tmp_path / "out", format="onnx")
    report = verify(tmp_path / "out", model)
    assert report.ok, str(report)
    kept = {t.name: t for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    codes, scale = (kept[f"transformer.h.0.mlp.c_fc.weight_quant.{part}"] for part in ("codes", "scale"))
    assert (codes.data_type, [*codes.dims], [*scale.dims]) == (onnx.TensorProto.INT4, [64, 256], [4, 256])


def test_constants_beyond_a_protobuf_message_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_qdq, "LARGEST", 1000)
    model = prepared("vit", QuantConfig.parse("ste", "w8a8-static"))
    report = export(model, tmp_path / "out", format="onnx")
    assert report.files == ["model.onnx", "model.onnx.data"]
    data, file = tmp_path / "out" / "model.onnx.data", tmp_path / "out" / "model.onnx"
    assert report.total_bytes == data.stat().st_size + file.stat().st_size
    assert data.name in (tmp_path / "out" / "SHA256SUMS").read_text()
    assert verify(tmp_path / "out", model).ok
    assert free(tmp_path / "out") == {"pixel_values": ["batch", 3, 16, 16]}
    batch = drawn_inputs(model, 5, 0)
    found = run_onnxruntime(tmp_path / "out", batch)["logits"]
    assert torch.allclose(found, model(**batch).logits.detach(), rtol=0, atol=1e-4)
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    places = {t.name: int(e.value) for t in tensors for e in t.external_data if e.key == "offset"}
    codes = next(name for name in places if name.endswith("weight_quant.codes"))
    with data.open("r+b") as opened:
        opened.seek(places[codes])
        first = opened.read(1)[0]
        opened.seek(places[codes])
        opened.write(bytes([first ^ 1]))
    assert f"{codes.removesuffix('.weight_quant.codes')}: 1 integers" in str(verify(tmp_path / "out", model))


def test_refused_by_name(tmp_path):
    dynamic = FAMILIES["llama"].build()
    attach(dynamic, QuantConfig.parse("ste", "w8a8"))
    with pytest.raises(ValueError, match=r"q_proj.input_quant \(format='onnx'\): .* static range.*Train with -static"):
        check_export(dynamic, "onnx")
    floats = prepared("llama", QuantConfig.parse("ste", "w8a16-kvfp8"))
    with pytest.raises(ValueError, match=r"self_attn\.kv_quant\.k \(format='onnx'\): expected evenly spaced levels"):
        export(floats, tmp_path / "out", format="onnx")
    experts = FAMILIES["mixtral"].build()
    attach(experts, QuantConfig.parse("ste", "w4a16-g32"))
    with pytest.raises(
        ValueError, match=r"experts\S* \(format='onnx'\): expected layers that every token goes through"
    ):
        check_export(experts, "onnx")
    sound = FAMILIES["whisper"].build()
    attach(sound, QuantConfig.parse("ste", "w8a16"))
    with pytest.raises(ValueError, match=r"expected example inputs to trace the model with, got none"):
        check_export(sound, "onnx")
    assert list(tmp_path.iterdir()) == []


def test_example_inputs_have_no_two_dimensions_that_tracing_takes_for_one():
    model = causal_lm()
    for rows, length in ((1, 1), (2, 2), (1, 2), (4, 4), (3, 8)):
        _, named = example_inputs(model, {"input_ids": torch.zeros(rows, length, dtype=torch.long)})
        first, second = named["input_ids"].shape
        assert first != second
        assert min(first, second) > 1
        assert (first % rows, second % length) == (0, 0)


def test_flag_and_command_without_example_inputs(tmp_path, capsys):
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    flags = QuantArguments(
        "lsq", "w8a8", quant_target="onnxruntime", quant_calibration=2, quant_export=str(tmp_path / "out")
    )
    tokenizer = small_tokenizer()
    trainer = QuantTrainer(
        model=causal_lm("opt"),
        args=settings,
        train_dataset=token_rows(8),
        data_collator=default_data_collator,
        quant=flags,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path / "out", trainer.model).ok
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--format", "onnx"]) == 0
    assert main(["verify", str(tmp_path / "again"), "--against", str(tmp_path / "run")]) == 0
    assert "EQUAL" in capsys.readouterr().out
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    flags = QuantArguments("lsq", "w8a8", quant_format="onnx", quant_export=str(tmp_path / "never"))
    with pytest.raises(AttachError, match=r"--quant_export: .*input_quant .*Train with -static"):
        QuantTrainer(model=causal_lm(), args=settings, train_dataset=token_rows(8), quant=flags)


def small_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
