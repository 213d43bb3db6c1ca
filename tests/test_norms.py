"""Batch normalization folded into the layer before it, against the float network it was made from."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_quant import LayerRule, QuantConfig, QuantController, TensorSpec, attach, detach
from lightning_quant.attach import quant_layers
from lightning_quant.errors import AttachError
from lightning_quant.norms import FoldedBatchNorm, hold_statistics
from tests.convnets import MobileNetV2, ResNet20, digits, train

FINE = TensorSpec(8, granularity="channel", dynamic=True)  # 8 bits, so that float comparisons mean something


def config(batch_norm: str = "two_pass", method: str = "ste", **settings: object) -> QuantConfig:
    return QuantConfig.parse(method, "w8a16", batch_norm=batch_norm, **settings)


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Normalizations as training leaves them, signs of gamma included."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                m.running_mean.copy_(torch.randn(m.num_features, generator=g))
                m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
                if m.weight is not None:
                    m.weight.copy_(torch.randn(m.num_features, generator=g))
                    m.bias.copy_(torch.randn(m.num_features, generator=g))
    return net


KINDS = {
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), (16, 6)),
    "conv1d": (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), (4, 4, 9)),
    "conv2d": (nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), (4, 4, 6, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), (4, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (4, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (3, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6), (4, 4, 5, 5)),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), (4, 4, 5, 5)),
    "not affine": (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False), (4, 4, 6, 6)),
    "cumulative": (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, momentum=None), (4, 4, 6, 6)),
}


@pytest.fixture(params=KINDS)
def case(request):
    torch.manual_seed(0)
    layer, norm, shape = KINDS[request.param]
    net = randomize(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))).double()
    return net, torch.randn(shape, dtype=torch.float64)


def identity_rounding(net: nn.Module) -> nn.Module:
    """Take the rounding out, so that only the folding is left."""
    for _, layer in quant_layers(net):
        layer.weight_quant.enabled = False
    return net


def test_without_rounding_it_is_the_float_network_in_training_and_evaluation(case):
    net, x = case
    folded = copy.deepcopy(net)
    attach(folded, config())
    identity_rounding(folded)
    for _ in range(3):
        want, got = net.train()(x), folded.train()(x)
        torch.testing.assert_close(got, want)
        g = torch.randn_like(want)
        for out, module in ((want, net), (got, folded)):
            module.zero_grad()
            (out * g).sum().backward()
        for (name, p), q in zip(net.named_parameters(), folded.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-9, msg=name)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(dict(folded.named_buffers())[name], buffer)
    torch.testing.assert_close(folded.eval()(x), net.eval()(x))


def test_what_is_rounded_is_the_folded_weight(case):
    net, x = case
    folded = copy.deepcopy(net)
    attach(folded, config("frozen"))
    (layer,) = (layer for _, layer in quant_layers(folded))
    norm = folded[1]
    gamma = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
    factor = gamma / (norm.running_var + norm.eps).sqrt()
    out = layer.output_axis
    if out and layer.groups > 1:
        per_row = factor.reshape(layer.groups, -1).repeat_interleave(layer.weight.shape[0] // layer.groups, 0)
        want = layer.weight * per_row[:, :, None, None]
    else:
        want = layer.weight * factor.reshape([-1 if i == out else 1 for i in range(layer.weight.ndim)])
    torch.testing.assert_close(layer.folded()[0], want, rtol=1e-6, atol=1e-6)
    rows = want.movedim(out, 0).flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / 127
    on_grid = layer.on_grid().movedim(out, 0).flatten(1)
    torch.testing.assert_close(on_grid, (rows / scale).round() * scale, rtol=1e-5, atol=1e-6)
    assert torch.equal(folded.train()(x), folded.eval()(x))


def test_folded_checkpoint_has_the_float_keys_and_computes_the_same(case):
    net, x = case
    folded = copy.deepcopy(net)
    attach(folded, config("frozen"))
    want = folded.eval()(x)
    plain = detach(copy.deepcopy(folded)).eval()
    assert set(plain.state_dict()) == set(net.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    torch.testing.assert_close(plain(x), want, rtol=1e-6, atol=1e-6)
    back = detach(folded, fold=False)
    for name, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_wrong_fusion_would_show():
    """Rounding w and normalizing afterwards is another function than the one that ships."""
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = torch.randn(2, 3, 6, 6)
    rule = [LayerRule("0", weight=TensorSpec(4, granularity="tensor", dynamic=True))]
    outs = []
    for batch_norm in ("keep", "frozen"):
        module = copy.deepcopy(net)
        attach(module, config(batch_norm, rules=rule))
        outs.append(module.eval()(x))
    assert (outs[0] - outs[1]).abs().max() > 0.05


@pytest.mark.parametrize("make", [ResNet20, MobileNetV2])
def test_every_normalization_of_the_usual_networks_is_folded(make):
    net = randomize(make(width=4))
    x = digits()[0][:8]
    want = net.eval()(x)
    report = attach(net, config())
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, FoldedBatchNorm))]
    assert norms
    assert all(isinstance(m, FoldedBatchNorm) for m in norms)
    assert sum("batch norm folded in" in e.what for e in report.attached) == len(norms)
    identity_rounding(net)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-3)


def test_it_trains_and_statistics_are_held_from_a_share_of_the_run_on():
    torch.manual_seed(0)
    net = ResNet20(width=4, depth=1)
    control = QuantController(QuantConfig.parse("lsq", "w4a4", batch_norm="two_pass", freeze_batch_norm=0.5))
    control.prepare(net)
    control.begin(20)
    seen = []

    class Watch:
        def on_step(self, step):
            control.on_step(step)
            net.train()  # as the Trainer of transformers does at every step
            seen.append(net.bn.running_mean.clone())

        def after_optimizer_step(self):
            control.after_optimizer_step()

    losses = train(net, 20, control=Watch())
    assert sum(losses[-4:]) < sum(losses[:4])
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [True] * 10 + [False] * 9
    control.begin(20)
    control.on_step(0)
    assert net.bn.training


def test_plain_normalizations_are_held_too_and_let_go():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    hold_statistics(net, True)
    net.train()
    net(torch.randn(8, 4))
    assert not net[1].running_mean.any()
    assert set(net.state_dict()) == set(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).state_dict())
    hold_statistics(net, False)
    net(torch.randn(8, 4))
    assert net[1].running_mean.any()
    assert type(net[1]) is nn.BatchNorm1d


def test_length_of_the_run_is_needed_to_hold_statistics():
    control = QuantController(config(freeze_batch_norm=0.5))
    control.prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="freeze_batch_norm: expected the number of optimizer steps"):
        control.begin(None)


class Twice(nn.Module):
    """A normalization after a layer whose output something else sees as well, and one after no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.after = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.first(x)
        return self.after(self.last(self.norm(y) + y))


def test_only_what_nothing_else_sees_is_folded_and_the_rest_is_reported():
    net = Twice()
    report = attach(net, config())
    assert [type(m).__name__ for m in (net.norm, net.after)] == ["BatchNorm1d", "FoldedBatchNorm1d"]
    assert [(e.path, e.what) for e in report.excluded] == [
        ("norm", "normalization without a quantized layer right before it")
    ]


class Branches(nn.Module):
    """Decides on values: torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.body(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("net", "settings", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), {}, r'batch_norm: expected batch normalization .* got 0 .*batch_norm="keep"'),
        (Branches(), {}, r"got 1 normalizations, and forwards that torch.fx cannot trace \(the model: TraceError"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {"method": "freeze"}, "0.weight: expected a method that"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {"method": "dorefa"}, "takes its size out"),
    ],
)
def test_refusals(net, settings, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(AttachError, match=message):
        attach(net, config(**settings))
    assert not list(quant_layers(net))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_linear_over_sequences_is_refused_in_its_first_step():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    attach(net, config())
    with pytest.raises(AttachError, match=r"expected outputs of shape \(N, C\), got shape \(2, 5, 5\)"):
        net.train()(torch.randn(2, 5, 4))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    attach(net, config())
    x = torch.randn(4, 2, 6, 6)
    twin = copy.deepcopy(net)
    want = net(x)
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(twin[1].running_var, net[1].running_var)
