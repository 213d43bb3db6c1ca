"""Low-bit layers hold the file's integers and compute the fake-quant layer's function, on few rows and on many."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.runtime import LowBitLinear, convert, linear4, native
from lightning_quant.runtime.choose import Kind, RoundedLinear, build, choose
from lightning_quant.runtime.stored import InputRule, StoredLinear

CPU = torch.device("cpu")
ROWS = (1, 2, 4, 6, 7, 40, 200)  # few rows, and many
# of (out, in, groups, bits): padded rows, several pieces, groups cut or shared, codes narrower than their storage
FOUR = [(192, 256, 8, 4), (100, 256, 1, 4), (64, 512, 1, 2), (1100, 1024, 8, 3), (16, 96, 3, 4)]
EIGHT = [(100, 96, 8), (37, 100, 8), (600, 2048, 6)]  # 100 columns: the kernel would read beyond them


def stored(out, width, groups, bits, inputs=None, bias=True, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(out + width)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, width), dtype=torch.int8, generator=generator)
    scale = (torch.rand(out, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    return StoredLinear(codes, scale, bits, None, torch.randn(out, generator=generator) if bias else None, inputs)


def exact(s: StoredLinear, x: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """The layer in float64, or the size of the sums in it."""
    weight = (s.codes.double().view(len(s.codes), s.scale.shape[1], -1) * s.scale.double().unsqueeze(-1)).flatten(1)
    if s.inputs is not None:
        codes, scale = s.inputs.codes(x)
        x = codes.double() * scale.double()
    x, bias = x.double(), 0 if s.bias is None else s.bias.bfloat16().double()
    return x.abs() @ weight.abs().t() + abs(bias) if absolute else x @ weight.t() + bias


def close(layer: nn.Module, s: StoredLinear, rows: int) -> None:
    """Rounding to bfloat16 (2^-8 each) of the weights, and of the output before and after the bias, and no more."""
    x = torch.randn(rows, s.codes.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
    y, expected, size = layer(x), exact(s, x), exact(s, x, absolute=True)
    bound = 2**-7 * expected.abs() + 2**-8 * size
    assert y.dtype == torch.bfloat16
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("shape", FOUR)
def test_int4(shape):
    out, width, groups, bits = shape
    s = stored(*shape)
    assert choose(Kind((out, width), bits, groups, True, False), torch.bfloat16, CPU)[0] == "int4"
    layer = build("int4", s, torch.bfloat16, CPU)
    assert torch.equal(layer.codes(), s.codes)
    assert torch.equal(layer.weight, s.dense(torch.bfloat16))
    for rows in ROWS:
        close(layer, s, rows)
    assert layer(torch.zeros(2, 0, width)).shape == (2, 0, out)
    assert layer(torch.zeros(2, 3, width)).dtype == torch.float32
    held = sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if n != "bias")
    assert held <= (out + 63) // 64 * 64 * (width / 2 + 4 * width / layer.group)


@pytest.mark.parametrize("shape", EIGHT)
def test_int8(shape):
    out, width, bits = shape
    s = stored(out, width, 1, bits)
    assert choose(Kind((out, width), bits, 1, True, False), torch.bfloat16, CPU)[0] == "int8"
    layer = build("int8", s, torch.bfloat16, CPU)
    assert torch.equal(layer.codes(), s.codes)
    for rows in ROWS:
        close(layer, s, rows)


@pytest.mark.parametrize("shape", EIGHT)
@pytest.mark.parametrize("inputs", [InputRule(), InputRule(divisor=127.5), InputRule(torch.tensor([0.02]))])
def test_w8a8(shape, inputs, monkeypatch):
    out, width, bits = shape
    s = stored(out, width, 1, bits, inputs)
    layer = build("w8a8", s, torch.bfloat16, CPU)
    assert torch.equal(layer.codes(), s.codes)
    for rows in ROWS:
        close(layer, s, rows)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = build("w8a8", s, torch.bfloat16, CPU)
    x = torch.randn(5, width).bfloat16()
    assert torch.equal(plain.codes(), s.codes)
    assert torch.equal(plain(x), layer(x))  # both sum whole numbers


def test_a_row_of_zeros_has_a_scale():
    layer = build("w8a8", stored(8, 32, 1, 8, InputRule(), bias=False), torch.float32, CPU)
    assert torch.equal(layer(torch.zeros(2, 32)), torch.zeros(2, 8))


@pytest.fixture
def no_native(monkeypatch):
    """A processor for which nothing is compiled."""
    monkeypatch.setattr(native, "find", lambda name: None)
    linear4.many_rows.cache_clear()
    yield
    linear4.many_rows.cache_clear()


@pytest.mark.parametrize("shape", FOUR)
def test_int4_in_dense_pieces(shape, no_native):
    assert linear4.many_rows().startswith("dense")
    s = stored(*shape)
    layer = build("int4", s, torch.bfloat16, CPU)
    for rows in (100, 200):
        close(layer, s, rows)


def test_pieces_without_a_compiler_are_the_same(monkeypatch, no_native):
    s = stored(1100, 1024, 8, 4)
    layer, x = build("int4", s, torch.bfloat16, CPU), torch.randn(200, 1024).bfloat16()
    fast = layer(x)
    monkeypatch.setattr(linear4, "fast_dense_block", lambda: linear4.dense_block)
    assert torch.equal(layer(x), fast)


def test_another_order_of_the_kernel_is_left_to_the_kernel(monkeypatch, no_native):
    s = stored(192, 256, 8, 4)
    layer = build("int4", s, torch.bfloat16, CPU)
    monkeypatch.setattr(linear4, "half_block", lambda: None)
    assert linear4.many_rows() == ""
    close(layer, s, 200)


@pytest.mark.parametrize("shape", EIGHT)
def test_int8_without_native_kernels(shape, no_native):
    out, width, bits = shape
    s = stored(out, width, 1, bits)
    layer = build("int8", s, torch.bfloat16, CPU)
    for rows in ROWS:
        close(layer, s, rows)


native_only = pytest.mark.skipif(native.find("int4_tiles") is None, reason="needs AMX and a C++ compiler")


@native_only
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 15, 16, 17, 32, 33, 100])
def test_tiles_are_the_dense_product(rows, threads):
    """Sums of float32, whose order alone may differ, rounded once: beside float64 within half a bfloat16 step."""
    torch.set_num_threads(threads)
    x = torch.randn(rows, 512).bfloat16()
    four, eight = stored(192, 512, 4, 4, bias=False), stored(75, 512, 1, 8, bias=False)
    layer = build("int4", four, torch.bfloat16, CPU)
    operands = x, eight.codes, eight.scale.flatten()
    found = [
        (layer._by_tiles(x), x.double() @ four.dense(torch.bfloat16).double().t(), exact(four, x, absolute=True)),
        *((native.find(n)(*operands), exact(eight, x), exact(eight, x, True)) for n in ("int8_tiles", "int8_rows")),
    ]
    for y, expected, size in found:
        assert y.shape == expected.shape
        assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()


@native_only
def test_tiles_leave_other_kernels_their_registers():
    x, w = torch.randn(40, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    before = nn.functional.linear(x, w)
    layer = build("int4", stored(192, 512, 4, 4), torch.bfloat16, CPU)
    first = layer(x)
    for _ in range(3):
        assert torch.equal(nn.functional.linear(x, w), before)
        assert torch.equal(layer(x), first)


@pytest.mark.parametrize("name", native.OPERATORS)
def test_a_kernel_that_computes_wrongly_is_not_used(name, monkeypatch, caplog):
    if name == "int4_tiles" and linear4.half_block() != 32:
        pytest.skip("packed in another order on this processor")

    def one_code_off(x, weight, scale):
        y = x.new_zeros(len(x), len(weight))
        if name == "int4_tiles":
            codes = linear4._codes(weight, 32)
        else:
            codes = weight.clone()
            scale = scale.reshape(1, -1, 1).expand(3, -1, 2)
        codes[-1, 41] += len(found)  # right when asked first
        return y + (x.float() @ codes.float().t() * scale[0, :, 0].float()).bfloat16()

    monkeypatch.setattr(native, "_loaded", lambda: True)
    monkeypatch.setattr(native.torch.ops.lightning_quant, name, one_code_off, raising=False)
    found = []
    for _ in range(2):
        native.find.cache_clear()
        found.append(native.find(name))
    native.find.cache_clear()
    assert found[0] is one_code_off
    assert found[1] is None
    assert f"{name} computes wrongly" in caplog.text


def test_without_a_compiler_there_is_a_warning_and_no_kernel(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._loaded.cache_clear()
    try:
        assert not native._loaded()
    finally:
        native._loaded.cache_clear()
    assert "no compiled kernels" in caplog.text
    assert "lightning-quant[runtime]" in caplog.text
    assert list((tmp_path / "lightning_quant").iterdir()) == []


def test_scales_that_are_rounded_cost_at_most_a_bfloat16_step():
    s = stored(64, 256, 8, 4, dtype=torch.float32)
    layer = build("int4", s, torch.bfloat16, CPU)
    held = layer.scale_zero[:, :64, 0].t().double()
    assert ((held - s.scale.double()).abs() <= 2**-8 * s.scale.double()).all()
    assert not torch.equal(held, s.scale.double())


@pytest.mark.parametrize(
    ("kind", "dtype", "kernel", "reason"),
    [
        (Kind((64, 256), 8, 8, True, False), torch.bfloat16, "dense", "no kernel has 8 bits in groups of 32"),
        (Kind((64, 256), 5, 8, True, False), torch.bfloat16, "dense", "no kernel has 5 bits in groups of 32"),
        (Kind((64, 256), 4, 16, True, False), torch.bfloat16, "dense", "groups of 16"),
        (Kind((64, 200), 4, 1, True, False), torch.bfloat16, "int8", "4-bit codes stored in 8 bits"),
        (Kind((64, 256), 4, 8, True, False), torch.float32, "dense", "not float32"),
        (Kind((64, 256), 4, 8, False, False), torch.bfloat16, "dense", "zero points"),
        (Kind((64, 256), 4, 8, True, True), torch.bfloat16, "dense", "weights in groups"),
        (Kind((64, 256), 4, 1, True, True), torch.float32, "w8a8", "4-bit codes stored in 8 bits"),
    ],
)
def test_what_runs_where(kind, dtype, kernel, reason):
    got, why = choose(kind, dtype, CPU)
    assert got == kernel
    assert reason in why


def test_dense_layers_still_round_their_inputs():
    s = stored(32, 64, 2, 4, InputRule())
    layer, x = build("dense", s, torch.float32, CPU), torch.randn(3, 5, 64)
    assert type(layer) is RoundedLinear
    expected = exact(StoredLinear(s.codes, s.scale, 4, None, s.bias, s.inputs), x.reshape(15, 64)).reshape(3, 5, 32)
    assert (layer(x) - expected).abs().max() < 0.05  # weights and bias in bfloat16


def test_zero_points():
    s = stored(8, 64, 2, 4)
    zero = torch.randint(-3, 3, (8, 2), dtype=torch.int8)
    dense = StoredLinear(s.codes, s.scale, 4, zero).dense(torch.float32)
    assert dense[3, 40] == (s.codes[3, 40] - zero[3, 1]) * s.scale[3, 1]


def test_copies_compute_the_same_and_saving_is_refused():
    layer, x = build("w8a8", stored(64, 96, 1, 8, InputRule()), torch.bfloat16, CPU), torch.randn(2, 96)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(TypeError, match=r"W8A8Linear: expected .* Keep the export"):
        pickle.dumps(layer)


def network(scheme, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 256), nn.LayerNorm(256), nn.Linear(256, 64))
    model.bfloat16()
    config = QuantConfig.parse("ste", scheme, head=True, **options)
    attach(model, config)
    calibrate(model, [torch.randn(8, 256).bfloat16()])
    return model.eval()


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [("w4a16-g128", "int4"), ("w8a16", "int8"), ("w8a8", "w8a8"), ("w8a8-static", "w8a8"), ("w8a16-g32", "dense")],
)
def test_convert_in_place(scheme, kernel):
    model = network(scheme)
    codes = {p: m.weight_quant.stored(m.weight)[0] for p, m in model.named_children() if hasattr(m, "weight_quant")}
    twin = copy.deepcopy(model)
    fast = convert(model)
    assert fast is model
    assert [line.kernel for line in fast.runtime_report.lines] == [kernel] * 3
    if kernel != "dense":
        assert all(torch.equal(fast.get_submodule(p).codes(), c) for p, c in codes.items())
        assert not any(p.ndim == 2 for p in fast.parameters())
    x = torch.randn(200, 256).bfloat16()
    with torch.no_grad():
        for rows in (x[:1], x):
            assert (fast(rows).float() - twin(rows).float()).abs().max() < 0.05  # of values around 1


def test_what_cannot_be_converted_computes_as_in_training():
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(256, 64))
    attach(model, QuantConfig.parse("ste", "w4a16", head=True))
    x = torch.randn(2, 8, 32)
    expected = model.eval()(x)
    fast = convert(model, dtype=torch.float32)
    kernels = {line.path: line.kernel for line in fast.runtime_report.lines}
    assert kernels == {"0": "none", "2": "dense"}
    assert "QuantConv1d is no Linear layer of its own" in str(fast.runtime_report)
    assert torch.allclose(fast(x), expected, atol=1e-5)


def test_convert_wants_quantizers():
    with pytest.raises(ValueError, match=r"convert: expected a model with quantizers, got a float model\. Convert"):
        convert(nn.Linear(4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["int4", "int8", "w8a8"])
def test_cuda(case):
    bits = 4 if case == "int4" else 8
    s = stored(192, 256, 2 if bits == 4 else 1, bits, InputRule() if case == "w8a8" else None)
    layer = build(case, s, torch.bfloat16, torch.device("cuda"))
    assert isinstance(layer, LowBitLinear)
    assert torch.equal(layer.codes().cpu(), s.codes)
    for rows in ROWS:
        x = torch.randn(rows, 256).bfloat16()
        bound = 2**-7 * exact(s, x).abs() + 2**-8 * exact(s, x, absolute=True)
        assert ((layer(x.cuda()).cpu().double() - exact(s, x)).abs() <= bound).all()
