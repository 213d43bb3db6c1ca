"""DeepSpeed's ZeRO on two gloo processes: every method, and what a Trainer does around its steps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_integration import load_training_checkpoint
from lightning_quant import ESTIMATORS, attach
from lightning_quant.checkpoint import STATE_FILE
from lightning_quant.export import export, verify
from tests.integration.processes import DEEPSPEED, differing, result, run
from tests.integration.resume_run import quantizer_state
from tests.integration.tiny import causal_lm
from tests.integration.zero_run import STATIC

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every method on one process, in float32."""
    out = tmp_path_factory.mktemp("one")
    run("methods_run.py", "--out", out, "--single")
    return result(out)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_method_is_that_of_one_process_to_the_last_bit(tmp_path, alone, stage):
    """State per element and weights put on their levels included, which FSDP2 has to refuse."""
    run("methods_run.py", "--out", tmp_path, "--strategy", f"zero{stage}", "--single", processes=2, env=DEEPSPEED)
    for rank in (0, 1):
        found = result(tmp_path, rank)
        assert found.keys() == set(ESTIMATORS)
        for method, one in alone.items():
            assert found[method]["losses"] == one["losses"], method
            assert differing(one["state"], found[method]["state"]) == [], method


CASES = ("configured", "refused", "best", "loaded", "digits")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory with what the two processes of every case say."""
    out = tmp_path_factory.mktemp("two")
    run("zero_run.py", "--out", out, *CASES, "delayed", "adapters", processes=2, env=DEEPSPEED)
    return out


def test_an_optimizer_and_a_scheduler_of_deepspeeds_own_keep_our_groups(shared):
    """The model's, the scales' and Theta's: rates at the end of the warm-up, weight decays."""
    found = result(shared)["configured"]
    assert found["groups"] == [
        (pytest.approx(3e-3), 0.1, False),
        (pytest.approx(1.5e-3), 0.0, True),
        (pytest.approx(3e-2), 0.0, True),
    ]
    assert found["quant_flips"][-1] > 0.01
    assert any(bool((v > 0.01).any()) for n, v in found["quant"].items() if n.endswith("theta"))


def test_what_cannot_be_served_is_said_by_name(shared):
    found = result(shared)["refused"]
    assert "expected one that keeps groups' own learning rates, got OneCycle" in found["scheduler"]
    assert "got DeepSpeed's flat copies, whose groups are fixed. Give the optimizer" in found["groups"]
    assert "Resume with the config the run was started with." in found["config"]


def test_a_zero_3_directory_is_an_ordinary_one(shared, tmp_path):
    found = result(shared)["best"]
    assert found["best"].endswith(f"checkpoint-{3 * (1 + found['eval_loss'].index(min(found['eval_loss'])))}")
    assert found["again"] == pytest.approx(min(found["eval_loss"]), rel=1e-6)
    saved, exported = shared / "best" / "saved", shared / "best" / "export"
    model, info = LlamaForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is LlamaForCausalLM
    side = load_file(saved / STATE_FILE)
    assert differing(side, {name: found["quant"][name] for name in side}) == []
    trained = load_training_checkpoint(saved)
    assert verify(exported, trained).ok
    export(trained, tmp_path / "again")  # of one process
    names = sorted(p.name for p in exported.glob("*.safetensors"))
    assert names == sorted(p.name for p in (tmp_path / "again").glob("*.safetensors"))
    for name in names:
        assert differing(load_file(exported / name), load_file(tmp_path / "again" / name)) == []


@pytest.mark.parametrize("case", ["delayed", "adapters"])
def test_zero_3_is_the_run_of_one_process(shared, tmp_path, case):
    """To rounding: with Theta in uint8 per element after a float phase, and with LoRA in the rounded weight."""
    run("zero_run.py", "--out", tmp_path, case)
    one, other = result(tmp_path)[case], result(shared)[case]
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert one["quant"].keys() == other["quant"].keys()
    off = [(one["quant"][n].float() - v.float()).abs().mean() for n, v in other["quant"].items() if "theta" in n]
    assert max(off) < (3 if case == "delayed" else 1e-3)  # of 255
    assert differing(other["quant"], result(shared, 1)[case]["quant"]) == []
    if case == "delayed":
        assert any(bool((v > 10).any()) for n, v in other["quant"].items() if n.endswith("theta"))


def test_adapters_saved_from_zero_3(shared):
    saved = shared / "adapters" / "saved"
    assert {p.name for p in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", STATE_FILE}
    model = load_training_checkpoint(saved, causal_lm())
    found = result(shared)["adapters"]["quant"]
    assert differing({n: v for n, v in found.items() if not n.endswith("ready")}, _state(model)) == []


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in quantizer_state(model).items() if not name.endswith("ready")}


def test_weights_partitioned_while_they_are_loaded(shared):
    found = result(shared)["loaded"]
    model = causal_lm()
    report = attach(model, STATIC)
    assert found["parts"] == len(list(causal_lm().parameters()))
    assert found["shares"] == [entry.share for entry in report.attached]
    assert differing(found["begin"], quantizer_state(model)) == []
    assert found["loss"] == pytest.approx(result(shared)["best"]["loss"], rel=2e-3)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_what_is_written_reaches_the_optimizers_copy_and_nothing_else_does(shared, stage):
    found = result(shared)["digits"][stage]
    expected = found["before"].clone()
    expected[1, 1] = 0.5
    assert torch.equal(found["after"], expected)
    assert found["low"].dtype == torch.bfloat16
    assert torch.equal(found["low"], expected.bfloat16())
    assert not torch.equal(found["low"].float(), expected)  # the copy has digits that the parameter has not
