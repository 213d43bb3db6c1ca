"""Files in the ONNX format, run by onnxruntime and by integers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import onnx
import pytest
import torch
from torch import nn

from lightning_quant import LayerRule, QuantCallback, QuantConfig, QuantController, TensorSpec, attach, calibrate
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import CheckpointError
from lightning_quant.export import compare_with_runtime, export, run_integer_only, verify
from lightning_quant.export.integer_operators import quantize
from lightning_quant.export.integer_values import Scaled, Step
from lightning_quant.export.onnx_runtime import constants, run_onnxruntime
from lightning_quant.packed import pack
from tests.convnets import MobileNetV2, ResNet20

INT8, INT4, FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU6(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
    )


def sound() -> nn.Module:
    layers = [nn.Conv1d(2, 6, 5, stride=2, padding=2, dilation=1), nn.ReLU(), nn.MaxPool1d(2)]
    layers += [nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=3), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(*layers)


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, stride=2), nn.AvgPool3d(2))


def enlarging() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(6, 2, 2, bias=False),
    )


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24, bias=False), nn.ReLU(), nn.Linear(24, 5))


class Mover(nn.Module):
    """Reads a Linear on three dimensions and moves what lies between its layers about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(torch.relu(self.conv(x)), (1, 0, 2, 0))[:, :, ::2, 1:]
        x = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6)
        y = self.mix(x)
        return self.head(torch.cat([y, torch.relu(y)], 1).mean(1))


NETS = {
    "images": (images, (3, 8, 8)),
    "sound": (sound, (2, 32)),
    "volumes": (volumes, (1, 6, 6, 6)),
    "enlarging": (enlarging, (3, 8, 8)),
    "matrices": (matrices, (16,)),
    "mover": (Mover, (3, 8, 8)),
    "resnet": (lambda: ResNet20(4, 1), (1, 8, 8)),
    "mobilenet": (lambda: MobileNetV2(4), (1, 8, 8)),
}


def samples(name: str, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *NETS[name][1], generator=torch.Generator().manual_seed(seed))


def trained(name: str, config: QuantConfig, steps: int = 4) -> nn.Module:
    """A few steps as front ends drive them, so that weights, scales and statistics are trained ones."""
    torch.manual_seed(0)
    model = NETS[name][0]()
    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for step in range(steps):
        controller.on_step(step)
        optimizer.zero_grad()
        (model(samples(name, 16, step)) - 1).square().mean().backward()
        controller.before_optimizer_step(optimizer)
        optimizer.step()
        controller.after_optimizer_step()
    controller.on_eval()
    return model.eval()


def spec(**fields) -> TensorSpec:
    return TensorSpec(**{"granularity": "tensor", "dynamic": False, **fields})


OPERANDS = {"resnet": 3, "mobilenet": 2}  # both operands of each addition share a quantizer
FOLDING = {"batch_norm": "frozen", "operators": 8}
PARSED = {
    "8 bits": ("images", "lsq", "w8a8", {}),
    "4 bits": ("images", "lsq", "w4a4", {}),
    "2 and 3 bits": ("images", "lsq", "w2a3-tensor", {}),
    "levels off 0": ("images", "pact", "w4a4", {}),
    "one bit": ("matrices", "ste", "w1a8-channel-static", {}),
    "one dimension": ("sound", "lsq", "w4a8-asym", {}),
    "three dimensions": ("volumes", "lsq", "w4a5", {}),
    "transposed": ("enlarging", "lsq", "w4a8", {}),
    "transposed per tensor": ("enlarging", "lsq", "w8a4-tensor-asym", {}),
    "matrices": ("matrices", "lsq", "w4a8-channel-static", {}),
    "moved values": ("mover", "lsq", "w8a6", {}),
    "residual": ("resnet", "lsq", "w8a8", FOLDING),
    "inverted residual": ("mobilenet", "lsq", "w4a4", FOLDING | {"batch_norm": "two_pass"}),
}
CASES = {k: (net, QuantConfig.parse(m, s, calibration=2, **more)) for k, (net, m, s, more) in PARSED.items()}
NARROW = spec(bits=4, symmetric=True, narrow=True)
CASES["symmetric activations"] = ("images", QuantConfig("ste", TensorSpec(8), spec(bits=8, symmetric=True)))
CASES["narrow activations"] = ("matrices", QuantConfig("ste", TensorSpec(4, granularity="channel"), NARROW))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model of 8 bits and its export, which tests leave as it is."""
    name, config = CASES["8 bits"]
    model, out = trained(name, config), tmp_path_factory.mktemp("shared") / "out"
    export(model, out, format="onnx", config=config, inputs=samples(name, 2))
    return model, out


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_and_integers_compute_what_evaluation_computes(tmp_path, case):
    name, config = CASES[case]
    model = trained(name, config)
    report = export(model, tmp_path / "out", format="onnx", config=config, inputs=samples(name, 1))
    file = tmp_path / "out" / "model.onnx"
    assert report.files == ["model.onnx"]
    assert report.total_bytes == file.stat().st_size
    assert json.loads((tmp_path / "out" / "quant_config.json").read_text())["method"] == config.method
    onnx.checker.check_model(onnx.load(file), full_check=True)
    for count in (1, 5):  # the example had one sample; the batch is free
        x = samples(name, count, seed=9)
        with torch.no_grad():
            expected = model(x)
        (found,) = run_onnxruntime(tmp_path / "out", x).values()
        assert found.shape == expected.shape
        assert float(expected.abs().max()) > 0.05
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)

    x = samples(name, 200, seed=10)
    free, step = (compare_with_runtime(file, x, local=local) for local in (False, True))
    paper = compare_with_runtime(file, x, headroom=False, local=True)
    print(f"{case}: {free.share:.2g} of the integers differ, each by itself {step.share:.2g}, k=0 {paper.share:.2g}")
    assert len(free.differing) == sum(1 for _, q in quantizers(model) if not q.is_weight) + OPERANDS.get(name, 0)
    assert step.share < 1e-4
    assert step.largest <= 1
    assert free.share < 1e-3
    assert paper.share < 0.1
    assert paper.largest <= 1
    assert free.outputs < 0.1


def initializers(path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path / "model.onnx").graph.initializer}


def test_weights_are_stored_as_integers_and_nowhere_as_floats(tmp_path, shared):
    narrow = trained("images", QuantConfig.parse("ste", "w3a8-asym", calibration=2))
    export(narrow, tmp_path / "out", format="onnx", inputs=samples("images", 2))
    for model, out, kind, per_byte in ((*shared, INT8, 1), (narrow, tmp_path / "out", INT4, 2)):
        found, values = initializers(out), constants(out)
        for path, layer in quant_layers(model):
            codes, zero = found[f"{path}.weight_quant.codes"], found[f"{path}.weight_quant.zero"]
            assert (codes.data_type, zero.data_type) == (kind, kind)
            assert len(codes.raw_data) == -(-layer.weight.numel() // per_byte)
            stored, scale, _, _ = layer.weight_quant.stored(layer.weight)
            assert torch.equal(values[codes.name], stored)
            assert torch.equal(values[f"{path}.weight_quant.scale"], scale.detach().flatten())
        assert not [t.name for t in found.values() if t.data_type == FLOAT and len(t.dims) > 1]
        activations = [t.data_type for name, t in found.items() if name.endswith("input_quant.zero")]
        assert activations == [onnx.TensorProto.UINT8] * 4


def test_the_file_names_no_path_of_the_machine_that_wrote_it(shared):
    content = (shared[1] / "model.onnx").read_bytes()
    assert b"weight_quant" in content
    assert b".py" not in content
    assert str(Path(__file__).parent).encode() not in content


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    config = QuantConfig.parse("pege", "w4a8", calibration=2, **FOLDING)
    model = trained("resnet", config).train()
    for q in model.modules():
        if hasattr(q, "called"):
            q.called = False
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {path: (type(m), m.training, sorted(m.__dict__)) for path, m in model.named_modules()}
    parameters = list(model.parameters())
    export(model, tmp_path / "out", format="onnx", inputs=samples("resnet", 2))
    assert kinds == {path: (type(m), m.training, sorted(m.__dict__)) for path, m in model.named_modules()}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(q.called for _, q in quantizers(model))


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a16-tensor"])
def test_weights_alone(tmp_path, scheme):
    model = trained("matrices", QuantConfig.parse("lsq", scheme))
    export(model, tmp_path / "out", format="onnx", inputs=samples("matrices", 2))
    x = samples("matrices", 7, seed=3)
    (found,) = run_onnxruntime(tmp_path / "out", x).values()
    assert torch.allclose(found, model(x).detach(), rtol=0, atol=1e-5)
    assert verify(tmp_path / "out", model, x).ok
    message = "one per group" if "-g" in scheme else r"0/\w+ \(Gemm\): expected integers .*, got floats\. Quantize"
    with pytest.raises(ValueError, match=message):
        run_integer_only(tmp_path / "out", x)


def test_bases_that_are_stored_in_a_few_bits(tmp_path):
    model = matrices().requires_grad_(False)
    pack(model, "nf4-g8")
    attach(model, QuantConfig.parse("ste", "w4a16-g8", rules=[LayerRule("2", weight=None)]))
    x = samples("matrices", 7, seed=3)
    export(model, tmp_path / "out", format="onnx", inputs=x)
    assert verify(tmp_path / "out", model, x).ok


class Module(pl.LightningModule):
    """Its example inputs are keywords, one of which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.example_input_array = matrices(), {"x": torch.zeros(3, 16), "double": True}

    def forward(self, x: torch.Tensor, double: bool = False) -> torch.Tensor:
        y = self.net(x)
        return y + y if double else y

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")  # Lightning's own, in fit
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_lightning_module_brings_its_own_example(tmp_path):
    module, quant = Module(), QuantCallback("lsq", "w8a8-static", options={"calibration": 2})
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=4, callbacks=[quant], accelerator="cpu", default_root_dir=tmp_path, **quiet)
    loader = torch.utils.data.DataLoader(samples("matrices", 64), batch_size=16)
    trainer.fit(module, loader)
    quant.export(module, tmp_path / "out", format="onnx")
    assert module.trainer is trainer
    assert verify(tmp_path / "out", module).ok
    x = samples("matrices", 3)
    (found,) = run_onnxruntime(tmp_path / "out", {"x": x}).values()
    assert torch.allclose(found, module.eval()(x, double=True).detach(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected one tensor for each of \['x'\], got 0 positional and \['y'\]"):
        run_onnxruntime(tmp_path / "out", {"y": x})


def test_example_inputs(tmp_path):
    model = prepared("matrices", QuantConfig.parse("ste", "w8a8-static"))
    export(model, tmp_path / "tuple", format="onnx", inputs=(torch.zeros(1, 16),))
    x = samples("matrices", 3)
    (found,) = run_onnxruntime(tmp_path / "tuple", (x,)).values()
    assert torch.allclose(found, model.eval()(x).detach(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"format='onnx': expected example inputs .*, got none\. Pass inputs="):
        export(model, tmp_path / "none", format="onnx")
    with pytest.raises(ValueError, match=r"first dimension is one batch, got shapes \[\(2, 16\), \(3, 16\)\]"):
        export(model, tmp_path / "none", format="onnx", inputs=(torch.zeros(2, 16), torch.zeros(3, 16)))
    with pytest.raises(
        ValueError, match=r"arguments of Sequential.forward\(input\), got missing a required argument: 'in"
    ):
        export(model, tmp_path / "none", format="onnx", inputs={"x": torch.zeros(2, 16)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuple"]


def prepared(name: str, config: QuantConfig) -> nn.Module:
    model = NETS[name][0]()
    attach(model, config)
    calibrate(model, [samples(name, 8)])
    return model


ONE_BIT = QuantConfig("ste", TensorSpec(8), spec(bits=1, symmetric=True))
REFUSED = {
    "dynamic": ("matrices", QuantConfig.parse("ste", "w8a8"), "0.input_quant", "static range.*Train with -static"),
    "codebook": (
        "matrices",
        QuantConfig.parse("ste", "w4a16-channel", grid="nf4"),
        "0.weight_quant",
        "evenly spaced levels.*grid='nf4'",
    ),
    "decode": ("matrices", QuantConfig.parse("clip_q", "w4a16"), "0.weight_quant", "what clipq does.*format='folded'"),
    "transform": ("images", QuantConfig.parse("react", "w4a4"), "0.input_quant", "what react does.*method='ste'"),
    "no level at 0": ("images", ONE_BIT, "0.input_quant", "integer zero point.*2 bits"),
    "real offset": ("images", QuantConfig.parse("lsq_plus", "w8a8"), "0.input_quant", "range='scale'"),
    "groups": ("sound", QuantConfig.parse("ste", "w4a16-g2"), "0.weight_quant", "groups along the rows of a matrix"),
    "places": ("images", QuantConfig.parse("syq", "w1.58a8"), "0.weight_quant", "per place of the kernel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused_with_its_path(tmp_path, case):
    name, config, path, message = REFUSED[case]
    model = prepared(name, config)
    with pytest.raises(ValueError, match=rf"{path} \(format='onnx'\): expected .*{message}"):
        export(model, tmp_path / "out", format="onnx", inputs=samples(name, 2))
    assert list(tmp_path.iterdir()) == []


class Deciding(nn.Module):
    """A forward that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = matrices()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if x.sum() > 0 else x[:, :5]


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    model = Deciding()
    attach(model, QuantConfig.parse("ste", "w8a16"))
    with pytest.raises(ValueError, match=r"Deciding \(format='onnx'\): expected a forward that torch.export can trace"):
        export(model, tmp_path / "out", format="onnx", inputs=samples("matrices", 2))
    attach(uncalibrated := matrices(), QuantConfig.parse("ste", "w8a8-static"))
    with pytest.raises(ValueError, match=r"0.input_quant .*a calibrated range, got none yet"):
        export(uncalibrated, tmp_path / "out", format="onnx", inputs=samples("matrices", 2))
    attach(half := matrices().bfloat16(), QuantConfig.parse("ste", "w8a16"))
    with pytest.raises(ValueError, match=r"0.weight .*: expected a whole float32 parameter, got torch.bfloat16"):
        export(half, tmp_path / "out", format="onnx", inputs=samples("matrices", 2))
    assert list(tmp_path.iterdir()) == []


def swap(model: onnx.ModelProto, name: str, change) -> None:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    array = onnx.numpy_helper.to_array(tensor).copy()
    change(array.reshape(-1))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def add_one(values) -> None:
    values[3] += 1


EDITS = {
    "code": ("3.weight_quant.codes", add_one, "3: 1 integers"),
    "scale": ("5.weight_quant.scale", lambda v: v.__setitem__(1, v[1] * 1.01), "5: 0 integers, d scale"),
    "zero": ("5.input_quant.zero", lambda v: v.__setitem__(0, v[0] + 1), "5: 1 integers"),
    "bias": ("8.bias", add_one, "8's output"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_names_the_layer_that_differs(tmp_path, shared, edit):
    model, out = shared
    name, change, message = EDITS[edit]
    file = shutil.copytree(out, tmp_path / "out") / "model.onnx"
    swap(damaged := onnx.load(file), name, change)
    onnx.save(damaged, file)
    bad = verify(tmp_path / "out", model, samples("images", 50))
    assert not bad.ok
    assert message in str(bad)


def test_verify(tmp_path, shared):
    model, out = shared
    good = verify(out, model, samples("images", 50))
    assert good.ok
    assert good.max_abs_diff <= 1e-5
    assert [c.path for c in good.layers] == ["0", "3", "5", "8"]
    assert "0 of 24800 activations" in good.notes[0]
    other = images()
    attach(other, QuantConfig.parse("ste", "w8a8"))
    calibrate(other, [samples("images", 50)])
    assert not verify(out, other, samples("images", 4)).ok
    file = shutil.copytree(out, tmp_path / "out") / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.onnx: expected a whole ONNX file, got DecodeError"):
        verify(tmp_path / "out", model, samples("images", 4))
    attach(smaller := matrices(), QuantConfig.parse("ste", "w8a16"))
    with pytest.raises(CheckpointError, match=r"expected 512 numbers named 0.weight_quant.codes, got 216"):
        verify(out, smaller, samples("matrices", 4))


def exported(tmp_path, model: nn.Module, config: QuantConfig, x: torch.Tensor):
    attach(model, config)
    calibrate(model, [x])
    export(model.eval(), tmp_path / "out", format="onnx", inputs=x[:2])
    return tmp_path / "out"


W8A8 = QuantConfig.parse("ste", "w8a8")


class Residual(nn.Module):
    """The smallest of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.other(x)


def test_integers_refuse_what_needs_floats_and_say_the_cure(tmp_path):
    x = samples("images", 8)
    out = exported(tmp_path / "norm", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), W8A8, x)
    with pytest.raises(ValueError, match=r"1/\S+ \(BatchNormalization\): expected one of Add, .*batch_norm='two_pass'"):
        run_integer_only(out, x)
    config = QuantConfig.parse("ste", "w8a8", rules=[LayerRule("0", weight=None)])
    out = exported(tmp_path / "first", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), config, x)
    with pytest.raises(ValueError, match=r"0/\S+ \(Conv\): expected integers to compute with, got floats\. Quantize"):
        run_integer_only(out, x)
    out = exported(tmp_path / "add", nn.Sequential(Residual()), W8A8, x)
    with pytest.raises(ValueError, match=r"0/\S+ \(Add\): expected operands on one grid, got .*operators=8"):
        run_integer_only(out, x)
    x = torch.randn(4, 150_000)
    out = exported(tmp_path / "wide", nn.Sequential(nn.Linear(150_000, 1)), QuantConfig.parse("ste", "w8a8-static"), x)
    with pytest.raises(ValueError, match=r"0/\S+ \(Gemm\): expected sums that fit int32, got up to \d+"):
        run_integer_only(out, x)


def test_a_channel_of_tiny_weights_keeps_its_bias(tmp_path):
    """Its bias is far beyond int32 in units of its sums, which do not matter beside it."""
    model = images()
    with torch.no_grad():
        model[0].weight[1] *= 1e-9
        model[0].bias[1] = 1.5
    x = samples("images", 64)
    out = exported(tmp_path, model, W8A8, x)
    scale, zero = (constants(out)[f"3.input_quant.{part}"] for part in ("scale", "zero"))
    for headroom in (True, False):
        codes = run_integer_only(out, x, headroom).codes["3.input_quant.quantized"]
        assert ((codes[:, 1] - zero) * scale - 1.5).abs().max() <= scale / 2 + 1e-6
        assert compare_with_runtime(out, x, headroom, local=True).largest <= 1


def test_integers_by_hand():
    """30 codes of 0.5 on the grid of step 2 with zero point 7, and a bias of 0.3 on sums worth 0.25 each."""
    half = Scaled(torch.tensor([30, -30, 2000]), torch.tensor(0.5, dtype=torch.float64), 2000)
    step = Step("here", "QuantizeLinear", {})
    stored = quantize(step, half, torch.tensor(2.0), torch.tensor(7, dtype=torch.uint8))
    assert stored.tolist() == [15, 0, 255]  # 7.5 + 7 and -7.5 + 7 are halves: up; 500 saturates
    sums = Scaled(torch.tensor([4]), torch.tensor(0.25, dtype=torch.float64), 100)
    fine = Step("here", "Add", {}).finer(sums, torch.tensor(0.3, dtype=torch.float64))
    assert fine.bound.bit_length() <= 31
    assert float(fine.integer * fine.scale) == 1.0
    assert float(fine.scale) == 0.25 / 2**23  # 100 + 1.2 needs 7 of 31 bits, one stays for the sum
    coarse = Step("here", "Add", {}, headroom=False).finer(sums, torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(coarse.integer, sums.integer)
