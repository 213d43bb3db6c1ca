"""The Lightning examples run as users run them: as programs, with flags and YAML."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_quant import QuantConfig
from tests.integration.processes import ROOT, start

EXAMPLES = ROOT / "examples"
SMALL = ("--trainer.max_steps=2", "--model.width=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
CONFIG = ("--config", EXAMPLES / "lightning_cli.yaml")


def program(directory: Path, name: str, *words: object) -> str:
    """What ``python examples/NAME WORDS`` prints, run inside ``directory``."""
    done = start(EXAMPLES / name, *words, cwd=directory)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def parquet(directory: Path) -> None:
    """Files laid out as CIFAR-10's are, with 24 random images."""
    noise = torch.Generator().manual_seed(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split in ("train", "test"):
        pixels = torch.randint(0, 256, (24, 32, 32, 3), dtype=torch.uint8, generator=noise)
        rows = {"image": [encoded(image) for image in pixels], "label": [i % 10 for i in range(24)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(directory / f"{split}.parquet")


def encoded(pixels: torch.Tensor) -> dict[str, object]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("source", ["digits", "parquet"])
def test_cifar10(tmp_path, source):
    words = ["--max_steps", 2, "--width", 4, "--scheme", "w2a4", "--method", "lsq", "--out", tmp_path / "out"]
    if source == "parquet":
        parquet(tmp_path)
        words += ["--data", tmp_path, "--limit", 20, "--batch_size", 8]
    lines = program(tmp_path, "lightning_cifar10.py", *words).splitlines()
    rows = [line.split() for line in lines if line.startswith(("float ", "w2a4 "))]
    assert [row[:-1] for row in rows] == [["float"], ["w2a4", "rounded"], ["w2a4", "lsq"]]
    assert all(0 <= float(row[-1]) <= 1 for row in rows)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    convolutions = {name: w for name, w in weights.items() if w.ndim == 4}
    assert len(convolutions) == 1 + 18 + 2  # the shortcuts of two stages are convolutions too
    assert all(len(w[0].unique()) <= 4 for w in convolutions.values())  # 2 bits in one output channel


def saved_config(directory: Path) -> dict[str, object]:
    """What LightningCLI wrote down of its latest run."""
    newest = max((directory / "lightning_logs").iterdir(), key=lambda p: int(p.name.split("_")[1]))
    return yaml.safe_load((newest / "config.yaml").read_text())


def test_command_line_overrides_the_callback_s_settings(tmp_path):
    words = ("--trainer.callbacks.scheme=w8a4", "--trainer.callbacks.options.theta=channel")
    more = ("--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.filename=last")
    said = program(tmp_path, "lightning_cli.py", "fit", *CONFIG, *words, *more, *SMALL)
    assert "w8 channel dynamic, a4 tensor learned" in said  # blocks
    assert "1 x stem.*: w8 channel dynamic, a8 tensor learned" in said  # the file's rule
    quant, checkpoint = saved_config(tmp_path)["trainer"]["callbacks"]
    assert quant["init_args"]["scheme"] == "w8a4"
    assert quant["init_args"]["options"] == {"theta": "channel", "calibration": 20}
    assert checkpoint["init_args"]["filename"] == "last"
    (path,) = tmp_path.rglob("last.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 2
    config = QuantConfig.from_dict(state["callbacks"]["QuantCallback"]["config"])
    assert (config.weight.bits, config.activation.bits) == (8, 4)
    assert [rule.match for rule in config.rules] == ["stem.0", "head.2"]
    assert config.options == {"theta": "channel"}
    # The file that the run left behind runs again, and the checkpoint is tested as it was trained.
    again = path.parents[1] / "config.yaml"
    said = program(tmp_path, "lightning_cli.py", "test", "--config", again, "--ckpt_path", path)
    assert "w8 channel dynamic, a4 tensor learned" in said
    assert "test_accuracy" in said


def test_command_line_adds_the_callback_to_a_run_that_has_none(tmp_path):
    program(tmp_path, "lightning_cli.py", "fit", *CONFIG, "--trainer.callbacks=null", *SMALL)
    assert saved_config(tmp_path)["trainer"]["callbacks"] is None
    (path,) = tmp_path.rglob("*.ckpt")
    assert not any("_quant." in name for name in torch.load(path, weights_only=True)["state_dict"])
    file = tmp_path / "float.yaml"
    plain = yaml.safe_load(CONFIG[1].read_text())
    del plain["trainer"]["callbacks"]
    file.write_text(yaml.safe_dump(plain))
    words = ("--trainer.callbacks+=lightning_quant.QuantCallback", "--trainer.callbacks.scheme=w4a16")
    said = program(tmp_path, "lightning_cli.py", "fit", "--config", file, *words, f"--model.weights={path}", *SMALL)
    assert "w4 channel learned" in said
    (quant,) = saved_config(tmp_path)["trainer"]["callbacks"]
    assert quant["class_path"] == "lightning_quant.QuantCallback"
    assert quant["init_args"]["scheme"] == "w4a16"
