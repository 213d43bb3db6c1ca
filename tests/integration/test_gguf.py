"""Training for llama.cpp, export, what verify finds, and the readers of the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
)

from hf_integration import QuantArguments, QuantTrainer
from lightning_quant import LayerRule, QuantConfig, TensorSpec, attach, detach
from lightning_quant.attach import quant_layers
from lightning_quant.cli import main
from lightning_quant.errors import CheckpointError
from lightning_quant.export import check_export, export, verify
from lightning_quant.export.gguf_tokenizer import SPLITS
from tests.integration.gguf_models import FAMILIES, YARN, small
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm, token_batch, token_rows

FILE = "model.gguf"


def config(scheme: str = "w4a16", method: str = "ste", **options) -> QuantConfig:
    options = {"target": "llama.cpp", "coverage": "off", **options}  # a batch may leave out an expert
    return QuantConfig.parse(method, scheme, **options)


def exported(tmp_path: Path, family: str = "llama", scheme: str = "w4a16", method: str = "ste", **options):
    """A trained model and where it was exported to, without naming the format."""
    chosen = config(scheme, method, **options)
    model = train_a_little(small(family), chosen)
    report = export(model, tmp_path / "out", config=chosen)
    assert report.format == "gguf"
    assert report.files == [FILE]
    return model, tmp_path / "out"


READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3-128", "gemma-2-256", "phi-3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_computes_what_training_computed(tmp_path, family):
    model, out = exported(tmp_path, family)
    report = verify(out, model)
    assert report.ok, str(report)
    assert report.max_abs_diff == 0.0
    assert len(report.layers) >= 8
    assert any("own GGUF reader" in note for note in report.notes) == (family not in READ_BY_TRANSFORMERS)


SCHEMES = ["w8a16", "w4a16", "w5a16", "w4a16-asym", "w5a16-asym", "w2a16", "w1.58a16-g64", "w8a16-channel"]


@pytest.mark.parametrize(("method", "scheme"), [*(("lsq", scheme) for scheme in SCHEMES), ("pege", "w4a16")])
def test_transformers_reads_every_kind_of_block(tmp_path, method, scheme):
    model, out = exported(tmp_path, "llama", scheme, method)
    assert verify(out, model).ok
    reader = AutoModelForCausalLM.from_pretrained(out, gguf_file=FILE)
    batch = token_batch(rows=3, seed=9)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, reader(**batch).logits)
    detach(model)
    assert not torch.equal(reader(**batch).logits, small("llama")(**batch).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embeddings_and_head(tmp_path, family, tied):
    chosen = config("w8a16", embeddings=True, head=True)
    model = train_a_little(small(family, tie_word_embeddings=tied), chosen)
    export(model, tmp_path / "out", config=chosen)
    assert verify(tmp_path / "out", model).ok
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds.get("output.weight") == (None if tied else "Q8_0")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tmp_path, dtype):
    chosen = config()
    small("llama").save_pretrained(tmp_path / "float")  # .to() would round the rotary frequencies too
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    attach(model, chosen)
    export(model, tmp_path / "out", config=chosen)
    assert verify(tmp_path / "out", model).ok
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert kinds["token_embd.weight"] == ("BF16" if dtype == torch.bfloat16 else "F16")


def test_experts_are_stacked(tmp_path):
    model, out = exported(tmp_path, "mixtral")
    tensors = {t.name: t for t in gguf.GGUFReader(out / FILE).tensors}
    assert tensors["blk.1.ffn_gate_exps.weight"].shape.tolist() == [64, 128, 4]
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [128, 64, 4]
    assert tensors["blk.1.ffn_down_exps.weight"].tensor_type.name == "Q4_0"
    weight = torch.from_numpy(gguf.dequantize(tensors["blk.1.ffn_up_exps.weight"].data, gguf.GGMLQuantizationType.Q4_0))
    fused = model.model.layers[1].mlp.experts.gate_up_proj_quant.on_grid()
    assert torch.equal(weight, fused[:, 128:])


def test_mixed_grids_and_float_layers(tmp_path):
    rules = [LayerRule("*.down_proj", weight="w8"), LayerRule("*.0.self_attn.q_proj", weight=None)]
    model, out = exported(tmp_path, "qwen2", rules=rules)
    assert verify(out, model).ok
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / FILE).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "F32"
    assert kinds["blk.1.attn_q.weight"] == "Q4_0"


def test_inputs_as_llama_cpp_rounds_them(tmp_path):
    inputs = TensorSpec(8, granularity="group", group_size=32, dynamic=True)
    chosen = QuantConfig("ste", TensorSpec(4), inputs, target="llama.cpp")
    model = train_a_little(small("llama"), chosen)
    export(model, tmp_path / "out", config=chosen)
    report = verify(tmp_path / "out", model)
    assert report.ok
    assert "without input quantizers" in report.notes[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers for it
def test_adapters_are_merged_under_the_names_of_the_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(small("qwen2"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    attach(wrapped, config())
    export(wrapped, tmp_path / "out")
    assert verify(tmp_path / "out", wrapped).ok


def tensor(path: Path, name: str):
    """A tensor of a file, open for changes."""
    reader = gguf.GGUFReader(path / FILE, "r+")
    return next(t for t in reader.tensors if t.name == name).data


def flip(path: Path) -> None:
    tensor(path, "blk.1.ffn_up.weight")[3, 5] ^= 0x10


def rescale(path: Path) -> None:
    tensor(path, "blk.0.attn_q.weight")[0, 0] ^= 1  # lowest bit of the first block's step


def swap(path: Path) -> None:
    a, b = tensor(path, "blk.0.ffn_down.weight"), tensor(path, "blk.1.ffn_down.weight")
    a[:], b[:] = b.copy(), a.copy()


def norm(path: Path) -> None:
    tensor(path, "output_norm.weight")[7] += 1e-3


def setting(path: Path) -> None:
    field = gguf.GGUFReader(path / FILE, "r+").fields["llama.rope.freq_base"]
    field.parts[field.data[0]][0] = 20000.0


def beside(path: Path) -> None:
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "rms_norm_eps": 1e-4}))


DAMAGE = {
    "nibble": (flip, "layers.1.mlp.up_proj"),
    "scale": (rescale, "layers.0.self_attn.q_proj"),
    "swap": (swap, "layers.0.mlp.down_proj"),
    "norm": (norm, "model.norm.weight"),
    "setting": (setting, "model.gguf: llama.rope.freq_base"),
    "config": (beside, "config.json: rms_norm_eps"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds_damage_and_names_it(tmp_path, name):
    model, out = exported(tmp_path)
    edit, where = DAMAGE[name]
    edit(out)
    report = verify(out, model)
    assert not report.ok
    assert where in str(report)
    if name in ("nibble", "scale"):
        (bad,) = [c for c in report.layers if not c.ok]
        assert bad.codes_differ == (name == "nibble")
        assert (bad.scale_diff > 0) == (name == "scale")


def test_renamed_and_truncated_files_are_clear_errors(tmp_path, capsys):
    model, out = exported(tmp_path)
    data = (out / FILE).read_bytes()
    (out / FILE).write_bytes(data.replace(b"blk.1.ffn_up", b"blk.9.ffn_up", 1))
    with pytest.raises(CheckpointError, match=r"model\.gguf: expected a tensor blk\.1\.ffn_up\.weight, got none"):
        verify(out, model)
    (out / FILE).write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.gguf: expected a whole GGUF file, got .*Export again"):
        verify(out, model)
    (out / FILE).write_bytes(b"GGML" + data[4:])
    assert main(["verify", str(out), "--against", str(tmp_path)]) == 2
    assert "expected a whole GGUF file" in capsys.readouterr().err


def test_a_tensor_nobody_trained_is_found(tmp_path):
    model, out = exported(tmp_path, "llama-3")
    shutil.copytree(out, tmp_path / "plain")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    found = verify(tmp_path / "plain", model)
    assert "rope_freqs.weight (nothing trained)" in found.other


def attached(family: str = "llama", scheme: str = "w4a16", settings: dict | None = None, **options):
    model = small(family, **(settings or {}))
    attach(model, config(scheme, **options))
    return model


REFUSED = {
    "other target": (
        lambda: attached(scheme="w4a16-g32", target="vllm"),
        "expected float16 scales, got .*Train with target='llama.cpp'",
    ),
    "quantized inputs": (lambda: attached(scheme="w8a8"), r"q_proj .*expected float inputs, got 8-bit ones per token"),
    "groups": (lambda: attached(scheme="w4a16-g16", target="vllm"), "groups of 32 or a multiple, got 16.*-g32"),
    "offset of 8 bits": (lambda: attached(scheme="w8a16-asym"), "got 8 bits and an offset. Leave -asym out"),
    "codebook": (
        lambda: attached(scheme="nf4-g32", target="vllm"),
        "evenly spaced levels, got grid='nf4'",
    ),
    "rows": (lambda: attached(scheme="w8a16-channel", settings={"intermediate_size": 48}), "rows .* of 32, got 48"),
    "tied head": (lambda: attached(embeddings=True, settings={"tie_word_embeddings": True}), "lm_head reads in float"),
    "keys and values": (lambda: attached(scheme="w4a16-kv8"), r"self_attn .*keys and values in float.*cache-type-k"),
    "rotary": (
        lambda: attached(settings={"rope_parameters": {**YARN, "rope_type": "dynamic"}}),
        "one of default, linear, llama3, yarn, got 'dynamic'",
    ),
    "yarn": (lambda: attached(settings={"rope_parameters": {**YARN, "mscale": 0.7}}), "mscale.*expected None, got 0.7"),
    "activation": (lambda: attached(settings={"hidden_act": "gelu"}), r"config\.hidden_act .*expected silu"),
    "bias": (lambda: attached("qwen3", settings={"attention_bias": True}), "attention_bias .*expected False"),
    "untied": (lambda: attached("gemma", settings={"tie_word_embeddings": False}), "tie_word_embeddings .*True"),
    "scalar": (lambda: attached("gemma-3", settings={"query_pre_attn_scalar": 9}), "query_pre_attn_scalar .*16"),
    "dense layers": (lambda: attached("qwen3-moe", settings={"mlp_only_layers": [0]}), "experts in every layer"),
    "router": (lambda: attached("qwen3-moe", settings={"norm_topk_prob": False}), "norm_topk_prob"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_before_training(tmp_path, name):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        check_export(model, "gguf")
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused_with_the_list(tmp_path):
    model = causal_lm("opt")
    attach(model, config())
    with pytest.raises(ValueError, match=r"one of LlamaForCausalLM, .*got OPTForCausalLM\. Use format='folded'"):
        export(model, tmp_path / "out")


TEXT = ["The quick brown fox jumps over 12 lazy dogs, isn't it?  And   then\n\nsome more lines we'll see."] * 3
TEXT += ["hello world hello there, the world's largest numbers are 42 and 4096"]


def byte_level(split: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_only])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """Merges over text in which spaces are written out, and a token for each byte, as Llama 2 has them."""
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    first = Tokenizer(models.BPE())
    first.normalizer = spaces
    first.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=90, special_tokens=[], show_progress=False))
    learned = json.loads(first.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += sorted(learned["vocab"], key=learned["vocab"].get)
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = spaces
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"gpt-2": lambda: byte_level(None), "default": with_byte_fallback}
TOKENIZERS |= {name: lambda split=split: byte_level(split) for split, name in SPLITS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_give_the_same_ids_from_the_file(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    model = attached(settings={"vocab_size": len(tokenizer) + 3})
    export(model, tmp_path / "out", tokenizer=tokenizer)
    assert verify(tmp_path / "out", model).ok
    fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (name == "default")
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 2}]"
    if name != "default":
        assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    reader = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=FILE)
    for text in (TEXT[0], TEXT[-1], "zebra \u00dcn\u00efcode 12345  x", "<s>a</s>"):
        assert reader(text).input_ids == tokenizer(text).input_ids


def test_a_changed_vocabulary_is_found(tmp_path):
    tokenizer = byte_level(None)
    model = attached(settings={"vocab_size": len(tokenizer)})
    export(model, tmp_path / "out", tokenizer=tokenizer)
    file = tmp_path / "out" / FILE
    token = tokenizer.convert_ids_to_tokens(300).encode()
    data = file.read_bytes()
    place = data.index(len(token).to_bytes(8, "little") + token) + 8
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert any("tokenizer.ggml." in name for name in verify(tmp_path / "out", model).other)


def test_a_rule_that_llama_cpp_has_no_name_for_leaves_the_vocabulary_out(tmp_path):
    tokenizer = byte_level(r"\d|\D+")
    model = attached(settings={"vocab_size": len(tokenizer)})
    with pytest.warns(UserWarning, match="expected byte-level BPE .*The file takes token ids"):
        export(model, tmp_path / "out", tokenizer=tokenizer)
    assert gguf.GGUFReader(tmp_path / "out" / FILE).fields["tokenizer.ggml.model"].contents() == "no_vocab"
    with pytest.warns(UserWarning, match="expected byte-level BPE"):
        assert verify(tmp_path / "out", model).ok


@pytest.mark.parametrize("format", ["gguf", None])
def test_flags_train_for_the_target_and_the_directory_gives_the_same_file(tmp_path, format):
    flags = QuantArguments("lsq", "w4a16", quant_target="llama.cpp", quant_export=str(tmp_path / "out"))
    flags.quant_format = format
    settings = {"max_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "run"), dataloader_pin_memory=False, **settings)
    tokenizer = byte_level(None)
    data = {"train_dataset": Dataset.from_list(token_rows(8)), "processing_class": tokenizer}
    data["data_collator"] = default_data_collator
    trainer = QuantTrainer(small("qwen2", vocab_size=len(tokenizer)), arguments, quant=flags, **data)
    trainer.train()
    trainer.save_model()
    export(tmp_path / "run", tmp_path / "again", tokenizer=tokenizer)  # reads one weight at a time
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "run")]) == 0


RUNTIME = os.environ.get("LLAMA_CPP_PYTHON")


in_llama_cpp = pytest.mark.skipif(RUNTIME is None, reason="make test-runtimes builds llama.cpp and says where it is")


def llama_cpp(*words: object) -> None:
    """Run the script of that name beside this file."""
    script = Path(__file__).with_name("llama_cpp_run.py")
    command = [str(RUNTIME), str(script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def logits_of_llama_cpp(out: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of one sequence, (tokens, vocabulary)."""
    llama_cpp(out / FILE, out.with_name("logits"), *ids.tolist())
    data = bytearray(out.with_name("logits").read_bytes())
    return torch.frombuffer(data, dtype=torch.float32).reshape(len(ids), -1)


ONE_LAYER = [(family, "1.self_attn.o_proj", "w8") for family in FAMILIES]
ONE_LAYER += [("llama", layer, scheme) for layer in ("lm_head", "0.self_attn.q_proj") for scheme in ("w8", "w4", "w5")]


@pytest.mark.runtimes
@in_llama_cpp
@pytest.mark.parametrize(("family", "end", "scheme"), ONE_LAYER)
def test_inputs_that_training_rounds_per_32_are_llama_cpps(tmp_path, family, end, scheme):
    """In one layer: through several, codes between two roundings move others, and the comparison says less."""
    inputs = TensorSpec(8, granularity="group", group_size=32, dynamic=True)
    rules = [LayerRule(f"re:{end}$"), LayerRule("*", weight=None)]
    model = small(family)
    options = {"target": "llama.cpp", "head": end == "lm_head"}
    attach(model, QuantConfig("ste", TensorSpec.parse(scheme), inputs, rules, **options))
    export(model.eval(), tmp_path / "out")
    ids = torch.randint(3, 96, (64,), generator=torch.Generator().manual_seed(5))
    theirs = logits_of_llama_cpp(tmp_path / "out", ids)
    ((_, layer),) = quant_layers(model)
    with torch.no_grad():
        rounded = model(input_ids=ids[None]).logits[0]
        layer.input_quant.enabled = False
        plain = model(input_ids=ids[None]).logits[0]
    gap = (theirs - rounded).abs().mean()
    print(f"{family} {end} {scheme}: mean {gap:.6f}, without rounding inputs {(theirs - plain).abs().mean():.6f}")
    assert gap < (1e-3 if "gemma" in family else 2e-4)  # llama.cpp reads this activation off a table of float16
    assert (theirs - plain).abs().mean() > 2 * gap


@pytest.mark.runtimes
@in_llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    export(attached(settings={"vocab_size": len(tokenizer) + 3}), tmp_path / "out", tokenizer=tokenizer)
    texts = [TEXT[0], TEXT[-1], "zebra \u00dcn\u00efcode 12345  x"]
    llama_cpp(tmp_path / "out" / FILE, tmp_path / "ids.json", *texts)
    assert json.loads((tmp_path / "ids.json").read_text()) == [tokenizer(text).input_ids for text in texts]


@pytest.mark.runtimes
@in_llama_cpp
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16-asym", "w5a16", "w5a16-asym"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_but_for_its_own_rounding_of_activations(tmp_path, family, scheme):
    model, out = exported(tmp_path, family, scheme)
    ids = torch.randint(3, 96, (64,), generator=torch.Generator().manual_seed(5))
    theirs = logits_of_llama_cpp(out, ids)
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0]
    loss = [torch.nn.functional.cross_entropy(x[:-1], ids[1:]) for x in (own, theirs)]
    gap = (own - theirs).abs()
    print(f"{family} {scheme}: mean {gap.mean():.4f} max {gap.max():.3f} nll {loss[0]:.4f} {loss[1]:.4f}")
    # a token between two experts may go to another one, and is then computed otherwise altogether
    routed = hasattr(model.config, "num_experts_per_tok")
    assert (gap.median() if routed else gap.mean()) < 0.03
    assert abs(loss[0] - loss[1]) < 0.02
