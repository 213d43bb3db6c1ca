"""Set-up transforms on real architectures: the float function stays, and quantization gets easier."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.layers import QuantLinear
from lightning_quant.transforms import (
    absorb_bias,
    awq,
    clip_weights,
    correct_bias,
    correct_weights,
    equalize,
    reestimate_bn,
    rotate,
    smoothquant,
)
from lightning_quant.transforms.equalize import without_relu6
from lightning_quant.transforms.pairs import Pair, find_pairs
from lightning_quant.transforms.rescale import TransformReport, rescale
from tests.convnets import MobileNetV2, ResNet20, digits, train
from tests.integration.text import CALIBRATION, HELD_OUT, loss_of, quantized_loss, trained
from tests.integration.text import plant as plant_text
from tests.integration.tiny import causal_lm, token_batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
from architectures import FAMILIES

SAME = 1e-5


def plant(model: nn.Module, batch: object, by: float = 50.0) -> None:
    """Make every seventh channel that layers read from a normalization an outlier."""
    with torch.no_grad():
        for path in {p.producer for p in find_pairs(model, batch).found}:
            module = model.get_submodule(path)
            name, weight = type(module).__name__, module.weight
            if weight.ndim != 1:
                continue
            one = 1.0 if name.startswith("Gemma") else 0.0  # it multiplies with 1 + w
            weight.copy_(weight + 0.2 * torch.randn(weight.shape))
            weight[::7] = (weight[::7] + one) * by - one


def moved(model: nn.Module, batch: object, start: torch.Tensor) -> float:
    return float((output(model, batch) - start).abs().max() / start.abs().max())


@torch.no_grad()
def output(model: nn.Module, batch: object) -> torch.Tensor:
    return model(**batch).logits if isinstance(batch, dict) else model(batch)


# (family, sites of SmoothQuant, of equalization, what must be refused and why)
SITES = [
    ("llama", 9, 4, {}),
    ("qwen2", 9, 4, {}),
    ("opt", 8, 4, {"model.decoder.final_layer_norm": "lm_head has a weight that another module uses too"}),
    ("gemma2", 8, 4, {"model.norm": "lm_head has a weight that another module uses too"}),
    ("gpt2", 4, 0, {"transformer.ln_f": "lm_head has a weight that another module uses too"}),
    (
        "bert",
        2,
        2,
        {
            f"bert.encoder.layer.{i}.attention.output.LayerNorm": f"something beside bert.encoder.layer.{i}."
            "intermediate.dense reads it"
            for i in (0, 1)
        }
        | {
            "cls.predictions.transform.LayerNorm": "cls.predictions.decoder has a weight that another module uses too",
        },
    ),
    ("vit", 7, 2, {}),
]


@pytest.mark.parametrize(("family", "smoothed", "equalized", "refused"), SITES, ids=[s[0] for s in SITES])
def test_the_float_function_stays_with_outliers_planted(family, smoothed, equalized, refused):
    torch.manual_seed(0)
    model = FAMILIES[family].build()  # in training mode, as from_config leaves it: dropout must not disturb the proof
    batches = [FAMILIES[family].inputs(seed=i) for i in range(3)]
    plant(model, batches[0])
    training = [m.training for m in model.modules()]
    float_model = copy.deepcopy(model).eval()
    start = output(float_model, batches[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = smoothquant(model, batches)
    assert [m.training for m in model.modules()] == training
    assert len(report.applied) == smoothed
    unread = {p: why for p, why in report.refused.items() if "reads its channels as they are" in why}
    assert report.refused == refused | unread
    assert all("norm" in path.lower() for path in unread)
    for site in report.applied:  # outliers went over: the weights that read them grew
        for path in site.consumers:
            assert not torch.equal(before[f"{path}.weight"], model.get_submodule(path).weight)
    assert report.difference < SAME
    assert moved(model.eval(), batches[0], start) < SAME
    report = equalize(model, batches)
    assert len(report.applied) == equalized
    assert report.difference < SAME
    assert moved(model, batches[0], start) < SAME


@pytest.mark.parametrize("kind", [ResNet20, MobileNetV2])
def test_convolution_networks_keep_their_function(kind):
    torch.manual_seed(0)
    net = kind().eval()
    without_relu6(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.1, 2)
            module.weight.data[::7] *= 50
            module.bias.data.normal_()
    x = torch.randn(4, 1, 8, 8)
    start = output(net, x)
    for transform, sites in ((smoothquant, 9 if kind is ResNet20 else 7), (equalize, 9 if kind is ResNet20 else 7)):
        report = transform(net, [x])
        assert len(report.applied) == sites
        reasons = ("something beside", "reads its channels as they are", "a batch normalization after it")
        assert all(any(r in why for r in reasons) for why in report.refused.values())
        assert report.difference < SAME
        assert moved(net, x, start) < SAME


def test_relu6_lets_no_factor_through():
    torch.manual_seed(0)
    net, x = MobileNetV2().eval(), torch.randn(4, 1, 8, 8)
    assert equalize(net, [x]).applied == []
    assert any(isinstance(m, nn.ReLU6) for m in net.modules())
    report = equalize(net, [x], relu6=True)
    assert any(a.what == "equalize" for a in report.applied)
    assert not any(isinstance(m, nn.ReLU6) for m in net.modules())
    config = FAMILIES["vit"]
    vit = config.build()
    vit.vit.encoder_act = nn.ReLU6()
    with pytest.raises(ValueError, match=r"equalize\(relu6=True\): expected .* Set hidden_act='relu'"):
        equalize(vit, [config.inputs()], relu6=True)


class Mixed(nn.Module):
    """Normalizations of other kinds, one dimension, and channels that something else sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 12)
        self.conv, self.norm2, self.last = nn.Conv1d(4, 6, 3), nn.GroupNorm(2, 6), nn.Conv1d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.second(torch.relu(self.norm1(self.first(x)))))
        return self.last(torch.relu(self.norm2(self.conv(y.view(-1, 4, 3)))))


def test_other_normalizations():
    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(5, 8)
    with torch.no_grad():
        net.norm1.weight[2] = net.norm2.weight[3] = 50
        net.norm1.running_mean.normal_()
    start = output(net, x)
    report = smoothquant(net, [x])
    assert [a.producer for a in report.applied] == ["norm1", "norm2"]
    assert moved(net, x, start) < SAME


def test_what_would_change_the_output_is_taken_back():
    """A site with a reader left out: weights are put back bit for bit, and the report says why."""
    model = causal_lm("llama").eval()
    pair = next(p for p in find_pairs(model, token_batch()).found if p.producer.endswith("0.input_layernorm"))
    assert len(pair.consumers) == 3
    short = Pair(pair.producer, dict(list(pair.consumers.items())[:2]), pair.channels, pair.part)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report, factors = TransformReport(), torch.linspace(0.5, 2, 64)
    assert not rescale(model, short, factors, "test", report)
    assert report.refused[pair.producer].startswith("the output would change by")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert rescale(model, pair, factors, "test", report)
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_model_that_answers_at_random_is_refused():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.randn(())

    with pytest.raises(ValueError, match="expected the same output twice"):
        find_pairs(Noisy(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4))


# ---- a language model with outliers in its activations


@pytest.fixture(scope="module")
def language_model():
    """A Llama that learned some English; three channels of what its layers read are 512 times too large."""
    torch.set_num_threads(1)
    return plant_text(trained("llama"), 512.0)


def quantized(model: nn.Module, scheme: str) -> float:
    return quantized_loss(model, QuantConfig.parse("ste", scheme))


@pytest.fixture(scope="module")
def language_model_with_biases():
    """An OPT of the same kind: its normalizations have biases."""
    torch.set_num_threads(1)
    return plant_text(trained("opt"), 512.0)


@pytest.mark.parametrize(
    ("scheme", "alpha"), [*(("w8a8-tensor-static", a) for a in (0.5, None, "search")), ("w8a8-static", 0.5)]
)
@pytest.mark.parametrize("which", ["language_model", "language_model_with_biases"])
def test_smoothquant_saves_w8a8_from_outliers(request, which, scheme, alpha):
    """Per tensor, inputs with outliers leave next to nothing of the model; smoothed, less than 1 % is lost."""
    language_model = request.getfixturevalue(which)
    real = loss_of(language_model)
    assert real < 2.5  # of ln 96 = 4.6 for a model that knows nothing
    assert quantized(language_model, scheme) > 1.5 * real
    model = copy.deepcopy(language_model)
    smoothquant(model, CALIBRATION, alpha, QuantConfig.parse("ste", scheme))
    assert abs(loss_of(model) - real) < 1e-4
    assert quantized(model, scheme) < 1.01 * real


def test_rotation_saves_w8a8_from_outliers(language_model):
    model, real = copy.deepcopy(language_model), loss_of(language_model)
    start = output(model, HELD_OUT[0])
    report = rotate(model, CALIBRATION)
    assert [a.what for a in report.applied] == ["rotate"] * 3  # the stream, and each layer's values
    assert moved(model, HELD_OUT[0], start) < SAME
    assert quantized(model, "w8a8-static") < 1.01 * real


def test_awq_and_its_clipping_beat_plain_rounding(language_model):
    for scheme, share in (("w3a16-g32", 0.2), ("w2a16-g32", 0.0)):
        config, plain = QuantConfig.parse("ste", scheme), quantized(language_model, scheme)
        model = copy.deepcopy(language_model)
        report = awq(model, CALIBRATION, config)
        assert len(report.applied) >= 4
        assert abs(loss_of(model) - loss_of(language_model)) < 1e-4
        assert quantized(model, scheme) < plain - share * (plain - loss_of(language_model))
        clipped = clip_weights(model, CALIBRATION, config)
        assert clipped.applied
        assert clipped.difference > 0
        assert quantized(model, scheme) < plain


def test_awq_takes_the_best_of_what_it_tries(language_model):
    """With one point the exponent is 0, and nothing is done."""
    model = copy.deepcopy(language_model)
    assert awq(model, CALIBRATION, QuantConfig.parse("ste", "w3a16-g32"), points=1).applied == []
    with pytest.raises(ValueError, match=r"awq.points: expected 1 or more"):
        awq(model, CALIBRATION, QuantConfig.parse("ste", "w3a16-g32"), points=0)


@pytest.mark.parametrize(
    ("family", "why"),
    [("opt", "RMS normalization without a bias"), ("gemma2", "scale can move on"), ("gpt2", "RMS normalization")],
)
def test_rotations_are_refused_where_the_stream_does_not_turn(family, why):
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval()
    plant(model, FAMILIES[family].inputs())
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = rotate(model, [FAMILIES[family].inputs()], heads=False)
    assert report.applied == []
    assert why in next(iter(report.refused.values()))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_rotation_with_grouped_values_and_biases():
    for family in ("qwen2", "qwen3"):
        torch.manual_seed(0)
        model, batch = FAMILIES[family].build().eval(), FAMILIES[family].inputs()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.normal_()
        plant(model, batch)
        start, before = output(model, batch), model.model.layers[0].self_attn.v_proj.weight.clone()
        report = rotate(model, [batch])
        assert len(report.applied) == 3, report
        assert moved(model, batch, start) < SAME
        assert not torch.equal(before, model.model.layers[0].self_attn.v_proj.weight)


# ---- a depthwise network with channels out of balance


def digits_loss(net: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(x[1500:]), y[1500:]))


def unbalanced(seed: int) -> nn.Module:
    """A MobileNetV2 trained on digits; channels between its layers are then scaled by 2^-6 ... 2^6, exactly."""
    torch.manual_seed(seed)
    net = MobileNetV2(12)
    train(net, 150)
    net.eval()
    without_relu6(net)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in list(net.features)[3:6]:
            for norm, reader in ((block.conv[1], block.conv[3]), (block.conv[4], block.conv[6])):
                factors = torch.exp2(torch.randint(-6, 7, norm.weight.shape, generator=draw).float())
                norm.weight.mul_(factors)
                norm.bias.mul_(factors)
                reader.weight.div_(factors.view((-1, 1, 1, 1) if reader.groups > 1 else (1, -1, 1, 1)))
    return net


@pytest.fixture(scope="module")
def depthwise():
    torch.set_num_threads(1)
    return [unbalanced(seed) for seed in range(3)]


def rounded(net: nn.Module, scheme: str, **options: object) -> nn.Module:
    net = copy.deepcopy(net)
    attach(net, QuantConfig.parse("ste", scheme, **options))
    if "static" in scheme:
        calibrate(net, IMAGES)
    return net.eval()


IMAGES = [(part,) for part in digits()[0][:256].split(64)]


@pytest.mark.parametrize("scheme", ["w8a16-tensor", "w8a8-tensor-static"])
@pytest.mark.parametrize("batch_norm", ["keep", "frozen"])
def test_equalization_saves_a_depthwise_network_at_per_tensor_int8(depthwise, batch_norm, scheme):
    real, saved = [digits_loss(net) for net in depthwise], []
    assert max(real) < 0.3
    for net in depthwise:
        assert digits_loss(rounded(net, scheme, batch_norm=batch_norm)) > 2
        even = copy.deepcopy(net)
        report = equalize(even, IMAGES, relu6=True)
        assert report.difference < SAME
        assert abs(digits_loss(even) - digits_loss(net)) < 1e-4
        saved.append(digits_loss(rounded(even, scheme, batch_norm=batch_norm)))
    assert sum(saved) < 1.01 * sum(real)


@pytest.mark.parametrize("scheme", ["w4a16-channel", "w3a16-channel"])
def test_corrections_bring_rounded_networks_back(scheme):
    """Mean outputs come back by the bias, means and spreads of weights by shifting them."""
    torch.manual_seed(0)
    net = MobileNetV2()
    train(net, 150)
    net.eval()
    config, plain = QuantConfig.parse("ste", scheme), digits_loss(rounded(net, scheme))
    for correct in (correct_bias, correct_weights):
        other = copy.deepcopy(net)
        report = correct(other, IMAGES, config)
        assert len(report.applied) >= 10
        assert report.difference > 1e-3  # the float function changes, and the report says so
        assert digits_loss(rounded(other, scheme)) < plain - 0.2 * (plain - digits_loss(net))


def test_bias_correction_meets_the_mean():
    """E[Q(W) x + b'] is E[W x + b], for layers with a bias and for those before a batch normalization."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    net.eval()
    x = torch.rand(64, 2, 6, 6)
    net[1].running_mean.normal_()
    want = [net[:2](x).mean((0, 2, 3)), net(x).mean(0)]
    first, last = copy.deepcopy(net), copy.deepcopy(net)
    config = QuantConfig.parse("ste", "w2a16-channel")
    report = correct_bias(net, [x], config)
    assert {a.producer for a in report.applied} == {"0", "4"}
    attach(net, config)
    # each layer's own part, with the float inputs the correction was taken from
    first[0], first[1] = net[0], net[1]
    last[4] = net[4]
    with torch.no_grad():
        torch.testing.assert_close(first.eval()[:2](x).mean((0, 2, 3)), want[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(last.eval()(x).mean(0), want[1], atol=1e-4, rtol=1e-4)
    bare = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    report = correct_bias(bare, [torch.randn(9, 4)], config)
    assert report.refused == {"0": "it has no bias"}
    assert isinstance(net[4], QuantLinear)


class Normal(nn.Module):
    """A normalization whose outputs are as its parameters say, before a reader."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm1d(8), nn.ReLU() if relu else nn.Identity()
        self.reader = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.act(self.norm(x)))


@pytest.mark.parametrize("relu", [True, False])
def test_analytic_correction_agrees_with_the_empirical(relu):
    torch.manual_seed(0)
    net = Normal(relu).eval()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 2)
        net.norm.bias.normal_()
    x, config = torch.randn(20_000, 8), QuantConfig.parse("ste", "w2a16-channel")
    net.requires_grad_(False)
    other = copy.deepcopy(net)
    start = net.reader.bias.clone()
    assert correct_bias(net, [x], config).applied
    assert correct_bias(other, [x], config, analytic=True).applied
    assert float((net.reader.bias - start).abs().max()) > 0.05
    torch.testing.assert_close(net.reader.bias, other.reader.bias, atol=0.02, rtol=0)


def test_high_biases_are_absorbed():
    """Channels that are always positive lose their constant part; what is not near enough is put back."""
    torch.manual_seed(0)
    net = Normal(relu=True).eval()
    with torch.no_grad():
        net.norm.bias[:4] = 6.0
    x = torch.randn(2000, 8)
    start = output(net, x)
    report = absorb_bias(net, [x])
    assert [a.producer for a in report.applied] == ["norm"]
    torch.testing.assert_close(net.norm.bias[:4], torch.full((4,), 3.0))
    assert 0 < report.difference < 0.05  # one value in a thousand lies below c
    assert moved(net, x, start) == pytest.approx(report.difference)
    worse = Normal(relu=True).eval()
    with torch.no_grad():
        worse.norm.bias[:4] = 6.0
        worse.norm.running_var.fill_(1e-2)  # ten times as far spread as its parameters say
    before = {k: v.clone() for k, v in worse.state_dict().items()}
    report = absorb_bias(worse, [x])
    assert report.refused["norm"].startswith("the output would change by")
    assert all(torch.equal(v, before[k]) for k, v in worse.state_dict().items())


@pytest.mark.parametrize("batch_norm", [None, "keep", "two_pass"])
def test_statistics_are_those_of_the_batches(batch_norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    x = torch.randn(96, 1, 6, 6) * 3 + 1
    if batch_norm is not None:
        attach(net, QuantConfig.parse("ste", "w8a16", batch_norm=batch_norm))
    net.train()
    momentum = net[1].momentum
    report = reestimate_bn(net, list(x.split(32)))
    assert report.applied
    with torch.no_grad():
        y = nn.functional.conv2d(x, net[0].weight)
    parts = y.split(32)
    tolerance = {"atol": 0.02, "rtol": 0.02} if batch_norm else {"atol": 1e-5, "rtol": 1e-5}
    mean, var = (torch.stack([f(p, (0, 2, 3)) for p in parts]).mean(0) for f in (torch.mean, torch.var))
    torch.testing.assert_close(net[1].running_mean, mean, **tolerance)
    torch.testing.assert_close(net[1].running_var, var, **tolerance)
    assert net[1].momentum == momentum
    assert all(m.training for m in net.modules())
    assert reestimate_bn(nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2)]).refused


def test_nothing_is_scaled_through_a_batch_normalization():
    """With statistics of an untrained network a factor passes; in training, batches' own would take it away."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(8, 1, 8, 8)
    assert [p.producer for p in find_pairs(net, x).found] == ["1"]
    start = net.train()(x).detach()
    assert equalize(net, [x]).applied
    torch.testing.assert_close(net.train()(x), start, rtol=1e-4, atol=1e-5)
