"""TRL's trainers, which make or wrap the model on their way to Trainer.__init__: under the mixin and under hf-quant."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_integration import QuantTrainerMixin, load_training_checkpoint
from hf_integration.launch import main
from lightning_quant import CoverageError, QuantConfig
from lightning_quant.adapters import lora_layers
from lightning_quant.attach import is_attached, quantizers
from lightning_quant.cli import main as lightning_quant
from lightning_quant.export import export, verify
from tests.integration.processes import differing
from tests.integration.tiny import VOCAB, causal_lm

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'lightning-quant[trl]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),  # TRL's own calls
]

SCRIPTS = Path(trl.__file__).parent / "scripts"
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]}
CONFIG = QuantConfig.parse("pege", "w4a16-g32", target="transformers")
COMMON = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
COMMON |= {"save_strategy": "steps", "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


class QuantSFTTrainer(QuantTrainerMixin, trl.SFTTrainer):
    """As a user writes it."""


class QuantDPOTrainer(QuantTrainerMixin, trl.DPOTrainer):
    """As a user writes it."""


KINDS = {"sft": (QuantSFTTrainer, trl.SFTConfig), "dpo": (QuantDPOTrainer, trl.DPOConfig)}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then


def text(i: int, count: int) -> str:
    return " ".join(f"w{3 + (i + j) % 90}" for j in range(count))


def pair(i: int) -> dict[str, str]:
    return {"prompt": text(i, 3), "chosen": " " + text(i + 3, 4), "rejected": " " + text(i * 7, 4)}


ROWS = {"sft": [{"text": text(i, 12)} for i in range(32)], "dpo": [pair(i) for i in range(32)]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model and its tokenizer on disk: TRL makes models of names."""
    path = tmp_path_factory.mktemp("base")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    causal_lm().save_pretrained(path)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(path)
    return path


def make(
    kind: str, root: Path, base: Path, lora: bool, config: QuantConfig = CONFIG, **settings: object
) -> QuantTrainerMixin:
    trainer, arguments = KINDS[kind]
    return trainer(
        model=str(base),
        args=arguments(str(root / "run"), max_length=16, **{**COMMON, **settings}),
        train_dataset=Dataset.from_list(ROWS[kind]),
        peft_config=LoraConfig(**LORA) if lora else None,
        quant=config,
    )


def log(trainer: QuantTrainerMixin, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_exports_and_resumes(tmp_path, base, kind, lora):
    trainer = make(kind, tmp_path, base, lora)
    assert sum(1 for _ in quantizers(trainer.model)) == 14
    wrapped = [type(layer).__name__ for _, layer in lora_layers(trainer.model)]
    assert wrapped == ["QuantLoraLinear"] * 6 * lora  # quantizers came after the adapters
    assert getattr(trainer, "ref_model", None) is None or not is_attached(trainer.ref_model)
    trainer.train()
    assert all(math.isfinite(loss) for loss in log(trainer, "loss"))
    assert len(log(trainer, "quant_error")) == 4
    if kind == "dpo":  # the reference: without adapters the float model, with them the quantized base
        assert (log(trainer, "rewards/margins")[0] == 0) == lora
        assert log(trainer, "rewards/margins")[-1] != 0
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(name.endswith("weight_quant.scale") for name in trained)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {n for n, p in trainer.model.named_parameters() if id(p) in held} == trained

    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file() == lora
    trainer.export(tmp_path / "low")
    report = verify(tmp_path / "low", trainer.model)
    assert report.ok
    assert report.max_abs_diff == 0.0
    back = load_training_checkpoint(tmp_path / "final")  # the base model is found by its name
    assert differing(dict(back.state_dict()), dict(trainer.model.state_dict())) == []
    if lora:
        export(back.merge_and_unload(), tmp_path / "merged", config=CONFIG)
        assert verify(tmp_path / "merged", trainer.model).ok

    rest = make(kind, tmp_path / "rest", base, lora)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert differing(dict(rest.model.state_dict()), dict(trainer.model.state_dict())) == []


def test_without_quant_it_is_trl_s_own(tmp_path, base):
    torch.manual_seed(0)
    ours = make("sft", tmp_path, base, True, None)
    ours.train()
    torch.manual_seed(0)
    plain = trl.SFTTrainer(
        model=str(base),
        args=trl.SFTConfig(str(tmp_path / "plain"), max_length=16, **COMMON),
        train_dataset=Dataset.from_list(ROWS["sft"]),
        peft_config=LoraConfig(**LORA),
    )
    plain.train()
    assert log(ours, "loss") == log(plain, "loss")


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="this TRL calls the head")
def test_a_head_that_trl_reads_past_is_not_called_quantized(tmp_path, base):
    trainer = make("sft", tmp_path, base, False, QuantConfig.parse("lsq", "w4a16-g32", head=True))
    with pytest.raises(CoverageError, match=r"lm_head\.weight_quant: expected every quantizer to be called"):
        trainer.train()


def reads_plainly(path: Path) -> nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trl_s_script_under_hf_quant(tmp_path, base, kind, lora, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", ROWS[kind]), ("test", ROWS[kind][:8])):
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    own = f"--model_name_or_path {base} --dataset_name {data} --output_dir {tmp_path / 'out'} --max_steps 2"
    own += " --max_length 16 --per_device_train_batch_size 4 --use_cpu --report_to none --eval_strategy steps"
    own += " --eval_steps 2 --disable_tqdm true --learning_rate 1e-3 --logging_steps 1"
    own += " --use_peft --lora_r 4 --lora_target_modules q_proj v_proj up_proj" if lora else ""
    flags = f"--quant pege --quant_scheme w4a16-g32 --quant_export {tmp_path / 'low'}"
    assert main([str(SCRIPTS / f"{kind}.py"), *own.split(), *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "14 quantized layers" in out
    assert "eval_loss" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() == lora
    assert lightning_quant(["verify", str(tmp_path / "low"), "--against", str(tmp_path / "out")]) == 0
    assert "max|d logits| = 0.0" in capsys.readouterr().out
    low = reads_plainly(tmp_path / "low")
    with torch.no_grad():
        assert torch.isfinite(low(torch.arange(3, 9)[None]).logits).all()
