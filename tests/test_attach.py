"""Attaching finds what it should, says what it leaves, refuses before it changes, and can be undone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_quant.attach import (
    attach,
    check_coverage,
    detach,
    is_attached,
    quant_layers,
    quantizers,
    without_quantizers,
)
from lightning_quant.calibration import calibrate
from lightning_quant.errors import AttachError, CoverageError
from lightning_quant.layers import QuantLayer
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import LayerRule, QuantConfig


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4, bias=False))


def llama(**more):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def config(scheme="w4a16-channel", method="ste", **more):
    return QuantConfig.parse(method, scheme, **more)


def state_of(model):
    """Everything attach could change: classes, children, parameters by identity, values."""
    classes = [(n, type(m)) for n, m in model.named_modules()]
    tensors = {k: (v.data_ptr(), v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()}
    return classes, tensors


def assert_unchanged(model, before):
    classes, tensors = state_of(model)
    assert classes == before[0]
    assert {k: p for k, (p, _) in tensors.items()} == {k: p for k, (p, _) in before[1].items()}
    assert all(torch.equal(v, before[1][k][1]) for k, (_, v) in tensors.items())


# --- what is found --------------------------------------------------------------------------------------------------


def test_report_names_layers_grids_and_shares():
    report = attach(mlp(), config("w4a8-channel"))
    total = 16 * 32 + 32 + 32 * 4
    assert [(e.path, e.what) for e in report.attached] == [
        ("0", "w4 channel fixed, a8 token dynamic"),
        ("2", "w4 channel fixed, a8 token dynamic"),
    ]
    assert [e.share for e in report.attached] == pytest.approx([512 / total, 128 / total])
    assert report.coverage == pytest.approx(640 / total)
    assert report.excluded == report.unsupported == []
    assert str(report).splitlines() == [
        " 95.2% of the weights in 2 quantized layers",
        " 95.2%  quantized         2 x *: w4 channel fixed, a8 token dynamic",
    ]


def test_head_and_embeddings_stay_in_float_by_default():
    model = llama(tie_word_embeddings=False)
    report = attach(model, config("w4a8-g16"))
    assert len(report.attached) == 2 * 7
    assert {e.path: e.what for e in report.excluded} == {
        "model.embed_tokens": "embedding (embeddings=True quantizes it)",
        "lm_head": "output head (head=True quantizes it)",
    }
    assert report.unsupported == []
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert "14 x" not in str(report)
    assert "2 x model.layers.*.mlp.down_proj: w4 group16" in str(report)
    model(torch.tensor([[1, 2, 3]]))
    check_coverage(model, "error", "training")


def test_head_and_embeddings_on_request():
    report = attach(llama(tie_word_embeddings=False), config("w4a8-g16", head=True, embeddings=True))
    paths = {e.path: e.what for e in report.attached}
    assert paths["lm_head"] == "w4 group16 fixed, a8 token dynamic"
    assert paths["model.embed_tokens"] == "w4 group16 fixed"  # indices have no grid
    rules = [LayerRule("*.lm_head", weight="w8")]
    report = attach(llama(tie_word_embeddings=False), config("w4a16-g16", rules=rules))
    assert report.attached[-1].path == "lm_head"
    assert report.attached[-1].what == "w8 channel dynamic"


def test_gpt2_is_reached():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=8)).eval()
    reference = copy.deepcopy(model)
    report = attach(model, config("w8a16"))
    assert len(report.attached) == 2 * 4
    assert {e.path for e in report.excluded} == {"transformer.wte", "transformer.wpe", "lm_head"}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        difference = (model(ids).logits - reference(ids).logits).abs().max()
    assert 0 < difference < 0.05


def test_convolutional_networks_get_channels_and_static_asymmetric_activations():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    report = attach(model, config("w4a8", "lsq"))
    assert {e.what for e in report.attached} == {"w4 channel learned, a8 tensor learned asymmetric"}


def test_first_rule_that_matches_wins():
    rules = [
        LayerRule("0", weight=None),
        LayerRule("*", weight="w2-tensor", activation=TensorSpec(4)),
        LayerRule("2", weight="w8"),
    ]
    model = mlp()
    report = attach(model, config(rules=rules))
    assert [(e.path, e.what) for e in report.excluded] == [("0", "by a rule")]
    assert [(e.path, e.what) for e in report.attached] == [("2", "w2 tensor fixed, a4 token dynamic")]
    assert type(model[0]) is nn.Linear


def test_rule_can_take_the_activation_away():
    model = mlp()
    attach(model, config("w8a8", rules=[LayerRule("0", activation=None)]))
    assert model[0].input_quant is None
    assert model[2].input_quant is not None


def test_a_module_reached_by_two_paths_is_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = attach(model, config())
    assert [e.path for e in report.attached] == ["a"]
    assert model["b"][0] is model["a"] is shared
    assert len(list(quantizers(model))) == 1
    detach(model)
    assert type(shared) is nn.Linear


def test_tied_head_and_embedding_stay_tied():
    model = llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    attach(model, config("w4a16-g16"))
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    model = llama(tie_word_embeddings=True)
    attach(model, config("w8a16", head=True, embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = model.lm_head.quant_terms()[0].detach()
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, want)


def test_share_counts_a_tied_weight_once():
    report = attach(llama(tie_word_embeddings=True), config("w8a16", head=True, embeddings=True))
    assert report.coverage <= 1


def test_fused_experts_are_listed_as_not_reached():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 16, 16))

    model = nn.ModuleDict({"router": nn.Linear(16, 4), "experts": Experts()})
    report = attach(model, config())
    assert [(e.path, e.what) for e in report.unsupported] == [("experts.up", "Experts is not a layer we can reach")]
    assert report.unsupported[0].share == pytest.approx(1024 / (1024 + 64 + 4))
    assert "NOT REACHED" in str(report)


def test_multihead_attention_is_listed_as_not_reached():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 2)})
    report = attach(model, config())
    assert {e.path for e in report.unsupported} == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert [e.path for e in report.attached] == ["out"]


# --- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
def test_fast_path_of_the_transformer_layer_is_closed(wrap):
    """In evaluation that layer would hand its raw weights to one fused kernel, past every module's forward."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    if wrap:
        model = nn.TransformerEncoder(model, 2)
    x, padding = torch.randn(2, 3, 16), torch.tensor([[False, False, True], [False, False, False]])
    attach(model, config("w2a16-channel"))
    model.eval()
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding)
    check_coverage(model, "error", "evaluation")
    open_ones = detach(model, fold=True).train()  # the fast path stays shut in training
    for module in open_ones.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(open_ones(x, src_key_padding_mask=padding)[~padding], got[~padding])
    layer = model.layers[0] if wrap else model
    assert layer.activation_relu_or_gelu == 1
    assert not wrap or model.use_nested_tensor is True


def test_unused_layer_is_a_coverage_error_and_exclusion_cures_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Net()
    attach(model, config("w8a8"))
    model(torch.randn(2, 4))
    with pytest.raises(CoverageError, match=r"2 never called \(unused.weight_quant, unused.input_quant\).*LayerRule"):
        check_coverage(model, "error", "training")
    model(torch.randn(2, 4))
    with pytest.warns(UserWarning, match=r"unused.weight_quant: expected every quantizer to be called"):
        check_coverage(model, "warn", "training")
    check_coverage(model, "off", "training")
    model = Net()
    attach(model, config("w8a8", rules=[LayerRule("unused", weight=None)]))
    model(torch.randn(2, 4))
    check_coverage(model, "error", "training")


def test_coverage_forgets_earlier_batches():
    model = mlp()
    attach(model, config())
    model(torch.randn(2, 16))
    check_coverage(model, "error", "training")
    with pytest.raises(CoverageError, match="2 never called"):
        check_coverage(model, "error", "training")


# --- refusals leave the model as it was -------------------------------------------------------------------------------


def patched():
    model = mlp()
    add_hook_to_module(model[2], ModelHook())
    return model


def integer():
    model = mlp()
    model[2].weight = nn.Parameter(torch.zeros(4, 32, dtype=torch.int8), requires_grad=False)
    return model


REFUSALS = {
    "unused rule": (
        mlp,
        config(rules=[LayerRule("*.lm_head", weight=None)]),
        r"rules\[0\]: .*match='\*.lm_head', which matches none. Paths look like '2'",
    ),
    "unused rule with a near path": (
        lambda: nn.ModuleDict({"down_proj2": nn.Linear(4, 4)}),
        config(rules=[LayerRule("*.down_proj", weight=None)]),
        "Paths that come near: down_proj2",
    ),
    "group that does not divide": (
        mlp,
        config("w4a16-g32"),
        "0: .*group_size=32 does not divide in_features=16. Use group_size=16",
    ),
    "patched forward": (patched, config(), "2: .*forward patched on the instance.*Attach before dispatch_model"),
    "nothing supported": (lambda: nn.Sequential(nn.ReLU()), config(), "Sequential: expected at least one layer"),
    "everything excluded": (
        mlp,
        config(rules=[LayerRule("*", weight=None)]),
        r"at least one layer to quantize .*got none \(2 left out\). Loosen the rules",
    ),
    "float scheme": (mlp, QuantConfig(method="ste", weight=None, activation=None), r"got none \(2 left out\)"),
    "meta weights": (
        lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, device="meta")),
        config(),
        "1: expected a weight with values, got a meta tensor",
    ),
    "integer weights": (integer, config(), "2: expected a plain floating-point weight, got Tensor of torch.int8"),
    "unknown method": (mlp, config(method="pge"), "QuantConfig.method: .*Did you mean method 'pege'"),
    "unknown option": (mlp, config(dleta=1.0, method="ewgs"), "Did you mean option 'delta'"),
    "unknown observer": (
        mlp,
        QuantConfig("ste", TensorSpec(4, granularity="channel", observer="mmse"), None),
        "0.weight: TensorSpec.observer: .*Did you mean observer 'mse'",
    ),
    "theta over budget": (mlp, config(method="pege", theta_bytes=1), "pege.theta_bytes: expected at least"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_change_nothing(name):
    build, settings, message = REFUSALS[name]
    model = build()
    before = None if name == "meta weights" else state_of(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        attach(model, settings)
    assert not is_attached(model)
    assert [type(m) for m in model.modules()] == kinds
    if before:
        assert_unchanged(model, before)


def test_attaching_twice_is_refused():
    model = mlp()
    attach(model, config())
    before = state_of(model)
    with pytest.raises(AttachError, match=r"expected a float model, got one with quantizers. Call detach\(model\)"):
        attach(model, config("w8a16"))
    assert_unchanged(model, before)


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4a8-g16", "w8a16", "w2a16-tensor", "w4a8-channel-static-asym"])
@pytest.mark.parametrize("method", ["pege", "dsq", "pege_replace", "lsq"])
def test_detach_restores_classes_and_keys_with_weights_on_the_grid(method, scheme):
    model = mlp()
    keys, kinds = list(model.state_dict()), [type(m) for m in model]
    attach(model, config(scheme, method))
    latent = [layer.weight for _, layer in quant_layers(model)]
    expected = [layer.weight_quant.on_grid(layer.weight) for _, layer in quant_layers(model)]
    codes = [layer.weight_quant.stored(layer.weight)[0] for _, layer in quant_layers(model)]
    assert detach(model) is model
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model] == kinds
    assert not any("quant" in n for n, _ in model.named_modules())
    assert model[0].weight is latent[0]
    assert torch.equal(model[0].weight, expected[0])
    assert torch.equal(model[2].weight, expected[1])
    assert max(c.unique().numel() for c in codes) <= 2 ** int(scheme[1])


def test_detach_without_fold_gives_the_latent_weights_back():
    model = mlp()
    before = state_of(model)
    attach(model, config())
    detach(model, fold=False)
    assert_unchanged(model, before)
    assert not is_attached(model)


def test_folded_weight_only_model_computes_what_evaluation_computed():
    model, x = mlp().eval(), torch.randn(3, 16)
    attach(model, config("w4a16-channel", "pege_replace"))
    y = model(x)
    assert torch.equal(detach(model)(x), y)


def test_float_checkpoint_loads_into_an_attached_model():
    model, checkpoint = mlp(), mlp().state_dict()
    attach(model, config("w4a8-static-channel", "pege"))
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert not unexpected
    assert missing
    assert all("_quant." in k for k in missing)
    plain, mine = without_quantizers(model.state_dict(), model)
    assert set(plain) == set(checkpoint)
    assert set(mine) == set(missing)


def test_optimizer_built_before_attaching_keeps_training_the_same_parameters():
    model = mlp()
    ids = [id(p) for p in model.parameters()]
    attach(model, config())
    assert [id(p) for p in model.parameters()] == ids
    assert all(isinstance(m, QuantLayer) for m in (model[0], model[2]))


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibrate_sets_static_ranges_and_restores_the_mode():
    model = mlp().train()
    attach(model, config("w8a8-static"))
    batches = [torch.randn(4, 16), (torch.randn(4, 16),), {"input": torch.randn(4, 16)}]
    assert calibrate(model, batches) == 3
    assert model.training
    static = [q for _, q in quantizers(model) if not q.is_weight]
    assert all(q.ready and not q.observing for q in static)
    low, high = batches[0].min().item(), batches[0].max().item()
    for x in (batches[1][0], batches[2]["input"]):
        low, high = 0.9 * low + 0.1 * x.min().item(), 0.9 * high + 0.1 * x.max().item()
    assert static[0].running.tolist() == pytest.approx([low, high], rel=1e-5)
    assert static[0].scale.item() == pytest.approx(max(-low, high) / 127, rel=1e-5)


def test_calibrate_without_batches():
    model = mlp()
    attach(model, config("w8a8-static"))
    with pytest.raises(ValueError, match="calibrate: expected at least one batch, got 0"):
        calibrate(model, [])


def test_calibrate_closes_the_observers_when_a_batch_fails():
    model = mlp().train()
    attach(model, config("w8a8-static"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(model, [torch.randn(4, 16), torch.randn(4, 15)])
    assert model.training
    assert not any(q.observing for _, q in quantizers(model))


def test_nothing_here_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        attach(model, config("w8a8"))
        model(torch.randn(2, 16)).sum().backward()
        detach(model)


def test_sparse_embeddings_and_shared_weights_are_refused():
    net = nn.Sequential(nn.Embedding(8, 8, sparse=True), nn.Linear(8, 8))
    with pytest.raises(AttachError, match="dense gradients, got sparse=True"):
        attach(net, QuantConfig.parse("ste", "w8a16", embeddings=True))
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    with pytest.raises(AttachError, match=r'1: expected .* the same parameter as 0.* LayerRule\(match="1"'):
        attach(net, QuantConfig.parse("ste", "w4a16-channel"))
