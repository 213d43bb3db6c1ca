"""Triton's kernels: the plain arithmetic's bits forward and its gradients backward, on a GPU or in the interpreter."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import quantizers
from lightning_quant.estimators import base, compiled, kernels, native
from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.ste import Ste
from lightning_quant.grid import Grid
from tests.test_estimators import LAM, expected, quantizer_of

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(not kernels.is_installed(), reason="Triton is not installed")
NAMES = ("forward", "backward")
FORWARD = torch.ops.lightning_quant.fake_quantize.default
BACKWARD = torch.ops.lightning_quant.fake_quantize_backward.default


def settings(rule, grid=None, clips=True, interior=True):
    return base.Settings(grid or Grid(4), clips, interior, True, rule)


@pytest.fixture
def calls(monkeypatch):
    """The operators call the kernels on this machine's tensors too; how often they did."""
    from lightning_quant import triton_kernels

    count = dict.fromkeys(NAMES, 0)

    def counting(name):
        function = getattr(triton_kernels, name)

        def counted(*args):
            count[name] += 1
            return function(*args)

        return counted

    for name in NAMES:
        monkeypatch.setattr(triton_kernels, name, counting(name))
    if not ON_GPU:
        round_to_bfloat16(monkeypatch)
        monkeypatch.setattr(kernels, "fits", kernels.covers)
        monkeypatch.setattr(native, "is_built", lambda: False)  # C++ does this work on processors
        monkeypatch.setattr(native, "_known", {})
    with nullcontext() if ON_GPU else torch.library._scoped_library("lightning_quant", "IMPL") as library:
        if library is not None:
            library.impl("fake_quantize", kernels._forward_cuda, "CPU")
            library.impl("fake_quantize_backward", kernels._backward_cuda, "CPU")
        yield count


def round_to_bfloat16(monkeypatch):
    """Let the interpreter round to bfloat16, as GPUs do; by itself it cuts."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            narrow = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return TensorHandle(narrow.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding)


RULES = {
    "ste": Ste(),
    "ste round": Ste("round"),
    "ste none": Ste("none"),
    "lsq": Lsq(),
    "ewgs": Ewgs(0.25),
    "pege group": Pege(lam=LAM, initial=0.5),
    "pege channel": Pege(lam=LAM, initial=0.5, theta="channel"),
    "pege element": Pege(lam=LAM, initial=0.5, theta="element"),
}
WEIGHTS = ("group", "channel", "tensor")
CASES = [(rule, kind) for rule in RULES for kind in WEIGHTS]
CASES += [(rule, kind) for rule in ("ste", "lsq", "ewgs") for kind in ("token", "static")]


def both(q, x, g):
    """(y, gradients by name) of a quantizer, plain and with compiled kernels."""
    found = []
    for one_pass in (False, True):
        twin, given = copy.deepcopy(q).to(DEVICE), x.detach().to(DEVICE).requires_grad_()
        twin.compiled = one_pass
        y = twin(given)
        y.backward(g.to(DEVICE))
        grads = {"x": given.grad, **{name: p.grad for name, p in twin.named_parameters()}}
        found.append((y.detach(), grads))
    return found


def same(found, tolerance, zeros=True):
    """Outputs by bits, gradients relative to the largest of each tensor."""
    (y, want), (z, got) = found
    assert torch.equal(y, z)
    assert y.dtype == z.dtype
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        bound = tolerance * float(value.double().abs().max())
        assert (got[name].double() - value.double()).abs().max() <= bound, name
    if zeros:
        assert torch.equal(want["x"] == 0, got["x"] == 0)


@needs_triton
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_rule_on_every_view(calls, name, kind):
    """Against the plain arithmetic in float32, and against the formulas in float64."""
    rule = RULES[name]
    q, x = quantizer_of(rule, kind, shape=(6, 128))
    g = torch.randn(x.shape)
    found = both(q, x, g)
    unchanged = kind == "token" and name != "ewgs"  # nothing lies beyond such a range, and nothing is learned
    assert calls == {"forward": 1, "backward": int(not unchanged)}
    same(found, 2e-6)
    want_y, want_x, want_range, want_state = expected(name.split()[0], q, x, g)
    y, grads = found[1]
    exact = {"x": want_x, **want_range, **want_state}
    assert set(exact) == set(grads)
    assert np.abs(y.double().cpu().numpy() - want_y).max() <= 1e-6 * np.abs(want_y).max()
    for key, want in exact.items():
        assert np.abs(grads[key].double().cpu().numpy() - want).max() <= 1e-5 * np.abs(want).max(), key


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["lsq", "ewgs", "pege group", "pege element"])
def test_half_precisions(calls, name, dtype):
    """Both compute in float32, so that no more than the last bit of a result differs."""
    q, x = quantizer_of(RULES[name], "group", dtype)
    same(both(q, x, torch.randn(x.shape).to(dtype)), torch.finfo(dtype).eps)
    assert calls["backward"] == 1


@needs_triton
@pytest.mark.parametrize("kind", ["group", "channel"])
@pytest.mark.parametrize("name", ["ste", "lsq", "ewgs", "pege group", "pege element"])
def test_zero_points(calls, name, kind):
    q, x = quantizer_of(RULES[name], kind, symmetric=False, bits=3)
    assert (q.scale_zero_offset(x)[1] != 0).any()
    same(both(q, x, torch.randn(x.shape)), 2e-6)
    assert calls["backward"] == 1


@needs_triton
@pytest.mark.parametrize("bits", [1, 1.58, 2, 8])
def test_other_widths(calls, bits):
    """One bit has its levels half a step beside the codes."""
    for name in ("lsq", "pege group"):
        q, x = quantizer_of(RULES[name], "group", bits=bits)
        same(both(q, x, torch.randn(x.shape)), 2e-6)
    assert calls["backward"] == 2


@needs_triton
@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_edges_and_what_is_not_a_number(calls, symmetric):
    """All ties between codes, the float32 numbers on and around the ends, infinities, zeros."""
    scale, zero = 0.25, 0.0 if symmetric else 3.0
    ties = (torch.arange(-12, 12) + 0.5 - zero) * scale
    ends = (tensor([-8.0, 7.0, -8.5, 7.5]) - zero) * scale
    near = torch.cat([ends, torch.nextafter(ends, tensor(math.inf)), torch.nextafter(ends, tensor(-math.inf))])
    far = tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 1e30, -1e30])
    x = torch.cat([ties, near, far]).to(DEVICE)
    g = torch.linspace(-1, 1, len(x)).to(DEVICE)
    levels = tensor([scale], device=DEVICE), tensor([zero], device=DEVICE) if zero else 0.0
    for rule in (Ste(), Ste("round"), Ste("none"), Ewgs(0.5)):
        s = settings(rule)
        y = kernels.quantized(s, x, *levels, None)
        torch.testing.assert_close(y, base.quantized(s, x, *levels, None), rtol=0, atol=0, equal_nan=True)
        assert y[:4].tolist() == [(c - zero) * scale for c in (-8.0, -8.0, -8.0, -8.0)]
        assert y[8:12].tolist() == [(c - zero) * scale for c in (-4.0, -2.0, -2.0, -0.0)]  # half to even
        got, want = (f(s, False, g, x, *levels, None).x for f in (kernels.gradients, base.gradients))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
    assert calls == {"forward": 4, "backward": 4}


@needs_triton
@pytest.mark.parametrize("k", [2.0, 2.3, 3.7, 5.1, 8.0])
def test_peges_pull_ends_at_the_range(calls, k):
    """On a level the surrogate is the grid but for rounding, and what lies beyond counts as on the last."""
    x, g = torch.randn(4, 32, device=DEVICE).sign() * 9, torch.randn(4, 32, device=DEVICE)
    scale, b = torch.rand(4, 1, device=DEVICE) + 0.1, torch.rand(4, 1, device=DEVICE)
    inputs = b, tensor(k, device=DEVICE), tensor(1e3, device=DEVICE)
    assert not kernels.gradients(settings(Pege()), False, g, x, scale, 0.0, None, *inputs).x.any()
    assert calls["backward"] == 1


@needs_triton
@pytest.mark.parametrize("size", [1, 7, 33, 1000, 2500])
@pytest.mark.parametrize("rows", [1, 5])
def test_sizes_that_fill_no_tile(calls, rows, size):
    """Rows of any length, and scales that several rows read; sums agree, so nothing beyond the ends is added."""
    x, g = torch.randn(rows, 2, size, device=DEVICE), torch.randn(rows, 2, size, device=DEVICE)
    k, pull = tensor(4.0, device=DEVICE), tensor(0.05, device=DEVICE)
    for shape in ((rows, 2, 1), (rows, 1, 1), (1,)):
        scale = torch.rand(shape, device=DEVICE) * 0.2 + 0.1
        zero = torch.rand(shape, device=DEVICE)  # no grid's, but nothing may depend on that
        b = torch.rand(rows, 2, 1, device=DEVICE)
        s = settings(Pege())
        assert kernels.covers(s, x, scale, zero, None, b, k, pull)
        assert torch.equal(kernels.quantized(s, x, scale, zero, None), base.quantized(s, x, scale, zero, None))
        got, want = (f(s, True, g, x, scale, zero, None, b, k, pull) for f in (kernels.gradients, base.gradients))
        for one, other in ((got.x, want.x), (got.scale, want.scale), (got.state[0], want.state[0])):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * float(other.abs().max()))
        assert got.state[1:] == want.state[1:] == (None, None)


@needs_triton
def test_any_strides(calls):
    """Weights of another layout than their rows', and the gradient of a sum, which has no memory of its own."""
    x = torch.randn(32, 5, device=DEVICE).t()
    g = torch.ones((), device=DEVICE).expand(5, 32)
    scale = torch.rand(1, 5, device=DEVICE).add_(0.1).t()
    s = settings(Lsq())
    assert torch.equal(kernels.quantized(s, x, scale, 0.0, None), base.quantized(s, x, scale, 0.0, None))
    got, want = (f(s, True, g, x, scale, 0.0, None) for f in (kernels.gradients, base.gradients))
    assert torch.equal(got.x, want.x)
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-6, atol=1e-6)


@needs_triton
def test_ranges_that_cover_and_scales_that_values_inside_leave_alone(calls):
    x, g = torch.randn(4, 32, device=DEVICE), torch.randn(4, 32, device=DEVICE)
    scale = torch.full((4, 1), 0.1, device=DEVICE)
    for clips, interior in ((False, True), (True, False)):
        s = settings(Ewgs(0.5), clips=clips, interior=interior)
        got, want = (f(s, True, g, x, scale, 0.0, None) for f in (kernels.gradients, base.gradients))
        torch.testing.assert_close(got[:2], want[:2], rtol=1e-5, atol=1e-5)
    assert calls["backward"] == 2


@needs_triton
def test_the_option_compile_brings_them_in(calls):
    """Through whole layers, forward and backward; what they do not cover is the compiler's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16)).to(DEVICE)
    twin, x = copy.deepcopy(model), torch.randn(5, 64, device=DEVICE)
    for module, one_pass in ((model, False), (twin, True)):
        attach(module, QuantConfig.parse("pege", "w4a16-g16", compile=one_pass, lam=0.01, initial=0.5, calibration=1))
        module(x).square().mean().backward()
    assert calls["forward"] >= 2
    assert calls["backward"] == 2
    assert torch.equal(model(x), twin(x))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * float(p.grad.abs().max()))


# --- the operators and who gets them: without Triton ----------------------------------------------------------------


def operands(theta=None):
    x, g = torch.randn(6, 4, 32, device=DEVICE), torch.randn(6, 4, 32, device=DEVICE)
    scale, zero = torch.rand(6, 4, 1, device=DEVICE) + 0.1, torch.ones(6, 4, 1, device=DEVICE)
    points, constants = (None, 0.0, -8, 7), ("clamp", 0.5, True, True, True)
    own = [None] * 3 if theta is None else [theta.to(DEVICE), tensor(4.0, device=DEVICE), tensor(0.1, device=DEVICE)]
    return (x, scale, *points), (x, scale, zero, *points[1:]), (g, x, scale, *points), constants, own


@pytest.mark.skipif(ON_GPU and not kernels.is_installed(), reason="Triton is not installed")
def test_operators_fulfil_the_contract_of_pytorch():
    plain, offset, given, constants, none = operands()
    torch.library.opcheck(FORWARD, plain)
    torch.library.opcheck(FORWARD, offset)
    for rule in ("ste", "ewgs"):
        torch.library.opcheck(BACKWARD, (*given, rule, *constants, *none))
    for theta in (torch.rand(6, 4, 1), torch.randint(0, 255, (6, 4, 32), dtype=torch.uint8)):
        torch.library.opcheck(BACKWARD, (*given, "pege", *constants, *operands(theta)[-1]))
    unmasked = ("clamp", 0.0, False, True, True)  # where the gradient passes unchanged, it is a tensor of its own
    torch.library.opcheck(BACKWARD, (*given, "ste", *unmasked, *none))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.skipif(ON_GPU and not kernels.is_installed(), reason="Triton is not installed")
def test_whole_functions_compile_around_them():
    plain, _, given, constants, none = operands()

    def both_ways(x, g):
        y = FORWARD(x * 2, *plain[1:])
        return y, BACKWARD(g, x * 2, *given[2:], "ewgs", *constants, *none)[0] + 1

    x, g = plain[0], given[0]
    for got, want in zip(torch.compile(both_ways, fullgraph=True)(x, g), both_ways(x, g), strict=True):
        assert torch.equal(got, want)


def test_which_quantizers_get_them():
    x, one, row = torch.randn(4, 3, 32), torch.ones(1), torch.ones(4, 3, 1)
    theta, k, pull = torch.rand(4, 3, 1), tensor(4.0), tensor(0.1)
    yes = [
        (Ste(), x, row, 0.0, None),
        (Ste("round"), x.bfloat16(), one, 0.0, None),
        (Lsq(), x.half(), row[:, :1], row[:, :1], None),
        (Ewgs(), x, row, row, None),
        (Pege(), x, row, 0.0, None, theta, k, pull),
        (Pege(), x, row, 0.0, None, torch.zeros(4, 3, 32, dtype=torch.uint8), k, pull),
    ]
    no = [
        (Ste(), x.double(), row.double(), 0.0, None),
        (Ste(), x[:0], one, 0.0, None),
        (Ste(), x, torch.ones(1, 3, 1), 0.0, None),
        (Ste(), x, torch.ones(32), 0.0, None),
        (Ste(), x, row, torch.ones(32), None),
        (Ste(), x, row, 0.0, Grid(4, kind="nf4").table()),
        (Ewgs("hessian"), x, row, 0.0, None, one),
        (Dsq(), x, row, 0.0, None, one),
        (Pege(), x, row, 0.0, None, torch.rand(32), k, pull),
        (Pege(theta="element", theta_dtype="float32"), x, row, 0.0, None, torch.rand(4, 3, 32), k, pull),
        (Pege(sharpness="learned"), x, row, 0.0, None, theta, theta, pull),
    ]
    assert all(kernels.covers(settings(rule), *rest) for rule, *rest in yes)
    assert not any(kernels.covers(settings(rule), *rest) for rule, *rest in no)
    assert not any(kernels.fits(settings(rule), *rest) for rule, *rest in yes)  # they are not on CUDA


def test_cpu_tensors_never_get_them(monkeypatch):
    """With Triton there or not, the compiler's are theirs."""
    for name in ("quantized", "gradients"):
        monkeypatch.setattr(kernels, name, None)
    monkeypatch.setattr(kernels, "is_installed", lambda: True)
    monkeypatch.setattr(compiled, "one_pass", lambda body, *given: body(*given))
    model = nn.Sequential(nn.Linear(64, 32))
    attach(model, QuantConfig.parse("pege", "w4a16-g16", compile=True, calibration=1))
    assert all(q.compiled for _, q in quantizers(model))
    model(torch.randn(2, 64)).sum().backward()
    assert model[0].weight.grad is not None


def test_triton_is_not_imported_before_a_gpu_wants_it():
    program = (
        "import sys, torch, lightning_quant\n"
        "from lightning_quant.estimators import kernels\n"
        "kernels.is_installed()\n"
        "torch.ops.lightning_quant.fake_quantize(torch.randn(2, 8), torch.ones(1), None, 0.0, -8, 7)\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- machine code ---------------------------------------------------------------------------------------------------

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_quant import triton_kernels as t

TYPES = dict.fromkeys(("x_ptr", "y_ptr", "g_ptr", "given_ptr"), "*bf16")
TYPES |= dict.fromkeys(("scale_ptr", "of_scale_ptr", "sharpness_ptr", "pull_ptr"), "*fp32")
TYPES |= dict.fromkeys(("fixed", "low", "high", "below", "above", "strength"), "fp32") | {"rows": "i32"}
SPANS = {"scale_span": 1, "zero_span": 1, "theta_span": 1}
UNUSED = {"zero_ptr", "theta_ptr", "of_theta_ptr"}
FLAGS = {"OFFSET": False, "CLIPS": True, "LEARNS": True, "INTERIOR": True}

def code(kernel, size, rule, **more):
    columns = min(size, t.TILE)
    known = SPANS | FLAGS | {"RULE": rule, "SIZE": size, "ROWS": t.TILE // columns, "COLUMNS": columns} | more
    types = TYPES | {name: kind for name, kind in more.items() if isinstance(kind, str)}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in known and n not in types else types.get(n, "constexpr") for n in names}
    constants = {(i,): known.get(n) for i, n in enumerate(names) if signature[n] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    assert {n for n in names if signature[n] == "constexpr"} <= known.keys() | UNUSED
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32)).asm

for size in (32, 128, 3072):
    forward = code(t._forward, size, None)
    assert forward["cubin"]
    assert "div.rn.f32" in forward["ptx"] and "div.full" not in forward["ptx"] and "fma" not in forward["ptx"]
    for rule, theta in (("ste", {}), ("ewgs", {}), ("pege", {"theta_ptr": "*u8", "SHARES": False}),
                        ("pege", {"theta_ptr": "*fp32", "of_theta_ptr": "*fp32", "SHARES": True})):
        backward = code(t._backward, size, rule, **{"SHARES": False} | theta)
        assert backward["cubin"]
        assert "atom." not in backward["ptx"] and "red.global" not in backward["ptx"]
offset = {"zero_ptr": "*fp32", "scale_span": "i32", "zero_span": "i32", "OFFSET": True}
assert code(t._forward, 128, None, **offset)["cubin"] and code(t._backward, 128, "ste", **offset, SHARES=False)["cubin"]
print("compiled")
"""


@needs_triton
def test_they_compile_for_a_gpu_that_is_not_here(tmp_path):
    """Down to machine code.  Division is the exact one, nothing is fused into the forward, sums need no atomics."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr


@pytest.mark.skipif(ON_GPU, reason="it would run")
def test_the_benchmark_says_what_it_needs():
    command = [sys.executable, ROOT / "examples" / "benchmarks" / "gpu_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs a CUDA device" in done.stderr
