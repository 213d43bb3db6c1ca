"""vLLM on the CPU computes what was trained (`make test-runtimes`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lightning_quant import QuantConfig
from lightning_quant.export import export, verify
from tests.integration.test_export import train_a_little

RUNTIME = os.environ.get("VLLM_PYTHON")
SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "dtype": "float32"}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.06}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
CASES = ["w4a16-g32", "w4a16-g32-asym", "w4a16-channel head", "w8a8", "w8a8-static"]
# With AMX vLLM's int8 kernels take 16-bit activations only, and it rounds the inputs of int4 weights to 8 bits
AMX = Path("/proc/cpuinfo").is_file() and "amx_int8" in Path("/proc/cpuinfo").read_text()

pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.skipif(RUNTIME is None, reason="make test-runtimes installs vLLM and says where it is"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_computes_what_was_trained(tmp_path, family, case):
    scheme, _, head = case.partition(" ")
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    quant = QuantConfig.parse("lsq" if "static" in scheme else "ste", scheme, calibration=2, head=bool(head))
    packed = quant.activation is None
    # its kernels for packed weights compute in 16 bits, so scales are trained in them
    model = train_a_little(kind(config(**SIZES)).to(torch.bfloat16 if packed else torch.float32), quant)
    export(model, tmp_path / "out", target="vllm", config=quant)
    ids = torch.randint(3, 512, (48,), generator=torch.Generator().manual_seed(5))
    if packed:
        export(model, tmp_path / "folded", format="folded", config=quant)
        model = kind.from_pretrained(tmp_path / "folded", dtype=torch.float32).eval()
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0, :-1]

    def gap(path: Path, dtype: str) -> torch.Tensor:
        return (own - logits_of_vllm(path, ids, dtype)).abs() / own.abs().max()

    if packed:  # held to what 16 bits do to the same values in float layers
        found, floor = gap(tmp_path / "out", "bfloat16"), gap(tmp_path / "folded", "bfloat16")
        print(f"{family} {case}: mean {found.mean():.2e} max {found.max():.2e}, in float layers {floor.mean():.2e}")
        assert found.mean() < (1e-2 if AMX else 1.25 * floor.mean())
        return
    assert verify(tmp_path / "out", model).ok
    found = gap(tmp_path / "out", "bfloat16" if AMX else "float32")
    print(f"{family} {case}: mean {found.mean():.2e} max {found.max():.2e}")
    # a float sum in another order moves dynamic inputs that sit on the edge between two codes
    assert found.mean() < (2e-2 if AMX else 2e-3 if scheme == "w8a8" else 1e-6)


def logits_of_vllm(path: Path, ids: torch.Tensor, dtype: str) -> torch.Tensor:
    """After each token but the last, (tokens - 1, vocabulary)."""
    script, out = Path(__file__).with_name("vllm_run.py"), path.with_name("logits")
    command = [str(RUNTIME), str(script), str(path), str(out), dtype, *map(str, ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).reshape(len(ids) - 1, -1)
