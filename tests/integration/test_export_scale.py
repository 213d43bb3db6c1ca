"""Exports of training directories: one weight in memory, the same bytes however the run went."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_quant import LayerRule, QuantConfig, attach
from lightning_quant.attach import quantizers, without_quantizers
from lightning_quant.checkpoint import load_training_checkpoint, quantizers_aside, save_quant_state
from lightning_quant.cli import main
from lightning_quant.errors import CheckpointError
from lightning_quant.export import export, verify
from lightning_quant.export.atomic import SUMS
from lightning_quant.export.streamed import open_training_directory
from lightning_quant.export.weights import float_tensors
from tests.integration.processes import ROOT, start
from tests.integration.test_export import train_a_little
from tests.integration.tiny import VOCAB, causal_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor"),  # biases, which have one dimension
]

BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import export_7b  # noqa: E402

BENCH = {"vocab": 512, "hidden": 1024, "intermediate": 4096, "layers": 10, "heads": 8}
W4 = QuantConfig.parse("ste", "w4a16-g32")


def save(model: nn.Module, path: Path, config: QuantConfig, shard: str = "60KB") -> Path:
    """What a quantized Trainer writes."""
    with quantizers_aside(model):
        model.save_pretrained(path, max_shard_size=shard)
    save_quant_state(path, without_quantizers(model.state_dict(), model)[1], config)
    return path


def mixtral(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCAB, intermediate_size=96, num_local_experts=4, tie_word_embeddings=tied, **sizes)
    )


def lora(tmp_path: Path, **options: object) -> nn.Module:
    """Adapters on quantized layers, and beside one that stays in float; an output head that is trained as a whole."""
    causal_lm("qwen2").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    names = ["q_proj", "v_proj"] + ["up_proj", "down_proj"] * ("lora_bias" not in options)
    model = get_peft_model(
        type(causal_lm("qwen2")).from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=names, modules_to_save=["lm_head"], **options),
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    return model


def directory(tmp_path: Path, kind: str) -> Path:
    """A training directory of this kind."""
    config = W4
    if kind == "element":
        config = QuantConfig.parse("pege", "w4a16-g32", theta="element", theta_dtype="uint8")
    elif kind in ("lora", "dora", "bias"):
        config = QuantConfig.parse("ste", "w4a16-g32", rules=(LayerRule("*.v_proj", weight=None),))
    elif kind == "static":
        config = QuantConfig.parse("lsq", "w8a8-static", calibration=2)
    elif kind == "cache":
        config = QuantConfig.parse("ste", "w4a16-g32-kv8", calibration=2)
    elif kind == "embeddings":
        config = QuantConfig.parse("ste", "w8a16", embeddings=True, head=True)
    if kind in ("lora", "dora", "bias"):
        model = lora(
            tmp_path, use_dora=kind == "dora", **({"lora_bias": True, "bias": "lora_only"} if kind == "bias" else {})
        )
        attach(model, config)
    elif kind == "mixtral":
        model = mixtral()
        attach(model, config)
    else:
        model = causal_lm("qwen2" if kind == "static" else "llama", tied=kind in ("tied", "embeddings"))
        model = train_a_little(model.to(torch.bfloat16) if kind == "bf16" else model, config)
    return save(model, tmp_path / "run", config)


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def same(a: Path, b: Path) -> None:
    one, other = files(a), files(b)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


CASES = [(kind, "compressed-tensors") for kind in ("llama", "tied", "bf16", "mixtral", "lora", "static", "cache")]
CASES += [(kind, "folded") for kind in ("element", "dora", "bias", "embeddings", "mixtral")]


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_streamed_is_what_is_written_from_memory(tmp_path, kind, format):
    run = directory(tmp_path, kind)
    export(load_training_checkpoint(run), tmp_path / "memory", format=format, config=None, max_shard_bytes=15_000)
    (tmp_path / "memory" / "quant_config.json").unlink(missing_ok=True)
    report = export(run, tmp_path / "disk", format=format, max_shard_bytes=15_000)
    assert len(report.files) > 3
    assert open_training_directory(run) is not None
    one, other = files(tmp_path / "memory"), files(tmp_path / "disk")
    differing = {name for name in {*one, *other} if one.get(name) != other.get(name)}
    assert differing <= {"quant_config.json", "README.md", SUMS}
    assert verify(tmp_path / "disk", run).ok
    assert verify(tmp_path / "disk", run, logits=False).ok


def run_export(*words: object, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """``lightning-quant export`` in a process of its own."""
    command = [sys.executable, "-m", "lightning_quant.cli", "export", *map(str, words)]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A training directory of Mixtral, in shards, whose fused experts are larger than an export's shard."""
    path = tmp_path_factory.mktemp("scale")
    model = mixtral()
    attach(model, W4)
    return save(model, path / "run", W4)


@pytest.fixture(scope="module")
def killed(trained) -> Path:
    """Where an export to ``out`` was killed, hard, once it had finished some shards; inside of a fused weight."""
    place = trained.parent / "killed"
    place.mkdir()
    process = run_export(trained, place / "out", "--max-shard-bytes", 4000)
    noted = place / ".out.partial.json"
    while process.poll() is None:
        if noted.is_file() and len(json.loads(noted.read_text())["shards"]) >= 6:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in place.iterdir()) == [".out.partial", ".out.partial.json"]
    return place


@pytest.fixture(scope="module")
def whole(trained) -> Path:
    """The same export, not interrupted."""
    export(trained, trained.parent / "whole", max_shard_bytes=4000)
    return trained.parent / "whole"


def shards_of(place: Path) -> list[dict[str, object]]:
    return json.loads((place / ".out.partial.json").read_text())["shards"]


def test_a_killed_export_goes_on_to_the_same_bytes(tmp_path, trained, killed, whole, capsys):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    first = (tmp_path / ".out.partial" / "shard-0").stat()
    words = ["--resume", "--max-shard-bytes", "4000"]
    assert main(["export", str(trained), str(tmp_path / "out"), *words]) == 0
    same(tmp_path / "out", whole)
    assert str(tmp_path / "out") in capsys.readouterr().out
    shard = next((tmp_path / "out").glob("model-00001-of-*.safetensors")).stat()
    assert (shard.st_ino, shard.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)  # not written again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kept", range(7))
def test_resume_after_any_shard(tmp_path, trained, killed, whole, kept):
    """Between two weights and inside of one; shards are counted from the journal, whatever else lies there."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    noted = tmp_path / ".out.partial.json"
    data = json.loads(noted.read_text())
    noted.write_text(json.dumps({**data, "shards": data["shards"][:kept]}))
    (tmp_path / ".out.partial" / "shard-99.part4").write_bytes(b"left behind")
    export(trained, tmp_path / "out", max_shard_bytes=4000, resume=True)
    same(tmp_path / "out", whole)


def test_resume_where_names_were_being_given(tmp_path, trained, whole, monkeypatch):
    """Stopped after the last shard, when some have their final names: nothing is encoded again."""
    giving, given = os.replace, []

    def stop(source: Path, to: Path) -> None:
        given.append(to)
        if Path(to).name.startswith("model-00003"):
            raise KeyboardInterrupt
        giving(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            export(trained, tmp_path / "out", max_shard_bytes=4000, resume=True)
    assert list((tmp_path / ".out.partial").glob("model-00002-of-*"))
    monkeypatch.setattr("lightning_quant.quantizer.FakeQuantizer.stored", None)
    export(trained, tmp_path / "out", max_shard_bytes=4000, resume=True)
    same(tmp_path / "out", whole)


def test_without_resume_it_starts_over(tmp_path, trained, killed, whole):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".out.partial" / "shard-0").write_bytes(b"left behind")
    export(trained, tmp_path / "out", max_shard_bytes=4000)
    same(tmp_path / "out", whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_resume_forgets_shards_that_are_not_whole(tmp_path, trained, killed, whole):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    file = tmp_path / ".out.partial" / "shard-2"
    file.write_bytes(file.read_bytes()[:-1])
    export(trained, tmp_path / "out", max_shard_bytes=4000, resume=True)
    same(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("settings", "word"), [({"max_shard_bytes": 5000}, "max_shard_bytes"), ({"format": "folded"}, "format")]
)
def test_resume_of_other_settings_is_refused(tmp_path, trained, killed, settings, word):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=rf"out: expected an interrupted export of the same, got one .*{word}"):
        export(trained, tmp_path / "out", resume=True, **{"max_shard_bytes": 4000, **settings})
    assert shards_of(tmp_path) == shards_of(killed)  # still there, to go on from


def test_resume_of_another_training_is_refused(tmp_path, trained, killed):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    state = trained / "quant_state.safetensors"
    before = state.stat()
    os.utime(state)
    with pytest.raises(CheckpointError, match=r"got one that differs in .*quant_state\.safetensors"):
        export(trained, tmp_path / "out", max_shard_bytes=4000, resume=True)
    os.utime(state, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_resume_with_nothing_behind_is_an_export(tmp_path, trained, whole):
    export(trained, tmp_path / "out", max_shard_bytes=4000, resume=True)
    same(tmp_path / "out", whole)
    with pytest.raises(ValueError, match="a training directory to go on from, got a model in memory"):
        export(load_training_checkpoint(trained), tmp_path / "other", resume=True)


def test_overwrite_replaces_an_export_once_the_new_one_is_complete(tmp_path, trained):
    export(trained, tmp_path / "out", format="folded")
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert main(["export", str(trained), str(tmp_path / "out"), "--overwrite"]) == 0
    assert verify(tmp_path / "out", trained).format == "compressed-tensors"
    old = files(tmp_path / "out")
    with pytest.raises(ValueError, match="Did you mean"):
        export(trained, tmp_path / "out", format="foldd", overwrite=True)
    assert files(tmp_path / "out") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_overwrite_touches_exports_only(tmp_path, trained):
    run = shutil.copytree(trained, tmp_path / "run")
    before = files(run)
    for place in (run, tmp_path):
        with pytest.raises(FileExistsError, match="an export to overwrite, got another directory or a file"):
            export(run, place, overwrite=True)
    assert files(run) == before


def test_what_is_killed_between_the_renames_comes_back(tmp_path, trained, whole):
    shutil.copytree(whole, tmp_path / ".out.old")
    with pytest.raises(FileExistsError):
        export(trained, tmp_path / "out")
    same(tmp_path / "out", whole)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from lightning_quant.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_old_export(tmp_path, trained):
    export(trained, tmp_path / "out")
    old = files(tmp_path / "out")
    words = ["export", str(trained), str(tmp_path / "out"), "--overwrite"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "expected a disk that takes the export, got [Errno 27] File too large" in done.stderr.splitlines()[-1]
    assert files(tmp_path / "out") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_two_processes_do_not_write_one_export(tmp_path, trained):
    import fcntl

    (tmp_path / ".out.partial").mkdir()
    lock = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="no other process exporting there, got one that is"):
        export(trained, tmp_path / "out")
    os.close(lock)
    export(trained, tmp_path / "out")


def test_files_are_as_the_reader_of_safetensors_wants_them(tmp_path, trained):
    """Whole table, no holes, every tensor aligned to its elements, which torch asks for."""
    export(trained, tmp_path / "out", max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = 0
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        head = int.from_bytes(file.read_bytes()[:8], "little")
        assert head % 8 == 0
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(key)
                sizes += tensor.numel() * tensor.element_size()
                assert tensor.data_ptr() % tensor.element_size() == 0
                assert index["weight_map"].pop(key) == file.name
    assert index["weight_map"] == {}
    assert index["metadata"]["total_size"] == sizes


def test_weights_are_let_go_of(trained):
    model = open_training_directory(trained)
    assert all(p.is_meta for p in model.parameters())
    assert not any(t.is_meta for _, q in quantizers(model) for t in q.state_dict().values())
    held = []
    for _, tensor, layer in float_tensors(model):
        assert tensor.numel() > 0
        if layer is not None:
            assert not layer.weight.is_meta
        held.append(tensor)
        assert all(t.numel() == 0 for t in held[:-1])
    assert all(p.is_meta for p in model.parameters())


PEAK = """
import sys
import compressed_tensors.compressors, transformers.models.llama.modeling_llama
from lightning_quant.export import export, verify
def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
export(sys.argv[1], sys.argv[2])
print(peak() - before)
verify(sys.argv[2], sys.argv[1], logits=False)
print(peak() - before)
"""


def test_memory_is_that_of_one_tensor(tmp_path):
    """330 MB in bfloat16, the largest of them 8 MB: to load them all would be seen."""
    made = export_7b.make(tmp_path / "run", BENCH, "w4a16-g128", 2**27)
    assert made["bytes"] > 300e6
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PEAK, str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    assert len(peaks) == 2
    assert all(peak < made["largest"] + 120e6 for peak in peaks), peaks


def test_the_benchmark_of_seven_billion_in_small(tmp_path):
    """The script at a small size, with no kills: imports alone would outlast it."""
    place = tmp_path / "disk"
    place.mkdir()
    sizes = {"vocab": 64, "hidden": 128, "intermediate": 256, "layers": 2, "heads": 4}
    words = [w for name, size in sizes.items() for w in (f"--{name}", str(size))]
    out = tmp_path / "results.json"
    done = start(BENCHMARKS / "export_7b.py", "--dir", place, "--out", out, "--kills", "0", "--shard-mib", "1", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())["figures"]
    assert figures["identical"] is True
    assert figures["export"]["peak"] > figures["export"]["anonymous"] > 0
    assert figures["out_bytes"] < figures["bytes"]
    assert "bytes identical" in done.stdout
    assert list(place.iterdir()) == []


def test_sums_are_those_of_sha256sum(whole):
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=whole, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    listed = {line.split("  ")[1] for line in (whole / SUMS).read_text().splitlines()}
    assert listed == files(whole).keys() - {SUMS}


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


HARMED = {
    "changed": (lambda out: append(out / "generation_config.json"), "generation_config.json (changed)"),
    "missing": (lambda out: (out / "README.md").unlink(), "README.md (missing)"),
    "extra": (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt (extra)"),
    "sums": (lambda out: (out / SUMS).write_text("nonsense\n"), f"{SUMS} (not in the format of sha256sum)"),
}


@pytest.mark.parametrize("name", HARMED)
def test_verify_names_files_that_are_not_as_they_were_written(tmp_path, trained, whole, name):
    out = shutil.copytree(whole, tmp_path / "out")
    harm, word = HARMED[name]
    harm(out)
    report = verify(out, trained, logits=False)
    assert not report.ok
    assert report.other == [word]
    assert report.first_difference == word
    assert word in str(report)
    assert main(["verify", str(out), "--against", str(trained), "--no-logits"]) == 1


def test_verify_of_an_export_without_sums_says_so(tmp_path, trained, whole):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / SUMS).unlink()
    report = verify(out, trained, logits=False)
    assert report.ok
    assert any("no SHA256SUMS" in note for note in report.notes)
    assert "logits were not compared" in str(report)


def test_contents_are_compared_without_a_run(tmp_path, trained, whole):
    out = shutil.copytree(whole, tmp_path / "out")
    file = sorted(out.glob("model-*.safetensors"))[3]
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    report = verify(out, trained, logits=False)
    assert not report.ok
    assert f"{file.name} (changed)" in report.other
    assert any(not check.ok for check in report.layers) or len(report.other) > 1


def test_the_card_says_what_is_there(tmp_path, trained):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "README.md").write_text("of the training")
    rows = [
        {"eval_loss": 9.0, "step": 1},
        {"eval_loss": 1.25, "eval_runtime": 3.0, "step": 8},
        {"loss": 1.0, "step": 9},
    ]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": rows, "global_step": 9}))
    report = export(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert (run / "README.md").read_text() == "of the training"
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "base_model" not in front
    assert front["quantization"] == {
        "method": "ste",
        "scheme": "w4 group32 fixed",
        "format": "compressed-tensors",
    }
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert ["`model.layers.*.self_attn.q_proj`", "2", "w4 group32 fixed"] in lines
    assert ["`lm_head`", "1", "float32: output head"] in lines
    assert ["`model.embed_tokens`", "1", "float32: embedding"] in lines
    assert any(line[0] == "`model.layers.*.mlp.gate`" and "TopKRouter is not quantized" in line[2] for line in lines)
    assert f"{report.total_bytes / 2**20:.2f} MiB of weights, {report.float_bytes / 2**20:.2f} MiB" in text
    assert "At step 8" in text
    assert "| loss | 1.25 |" in text
    assert "runtime" not in text
    assert "MixtralForCausalLM.from_pretrained" in text
    assert str(tmp_path) not in text
    export(run, tmp_path / "folded", format="folded")
    plain = (tmp_path / "folded" / "README.md").read_text()
    assert "vllm serve" not in plain
    assert "compressed-tensors" not in plain.split("## Versions")[0]


def test_the_card_names_a_base_model_of_the_hub(tmp_path):
    model = causal_lm()
    model.config.name_or_path = "someone/tiny-llama"
    attach(model, W4)
    export(model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "someone/tiny-llama"
    assert "vllm serve" in text
