"""Kernels compiled for this processor, once: where PyTorch's own are slower than reading the weights.

With AVX-512: ``int8_rows``, few rows by int8 codes, at the speed of memory.  With AMX besides: ``int4_tiles`` and
``int8_tiles``, any number of rows; weights are unpacked to bfloat16 a block at a time within the caches and multiplied
in tiles, so that they are read once and no dense copy is ever in memory.

All sum in float32 and round the output once.  int4 weights have the value bf16(code * scale); int8 codes are exact in
bfloat16, and the sum takes the scale.

Compiling takes some seconds, wants ninja and a C++ compiler, and its result is kept in PyTorch's folder of extensions.
Without it, or on other processors, PyTorch's kernels and dense pieces do the work.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_quant.native import load

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp")
OPERATORS = ("int8_rows", "int4_tiles", "int8_tiles")
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
CHECKED = (1, 2, 3, 4, 6, 17, 40)  # rows that a kernel is tried on before it is used

log = logging.getLogger(__name__)


@cache
def find(name: str) -> Kernel | None:
    """One of ``OPERATORS``, or None where it does not exist.

    Each takes rows (rows, in), bfloat16, contiguous; ``in`` is a multiple of 32.

    - ``int8_rows`` and ``int8_tiles``: codes (out, in), int8, contiguous, and scales (out,), bfloat16.
    - ``int4_tiles``: what ``aten::_weight_int4pack_mm_for_cpu`` takes, where it interleaves 64 rows of weight.

    They answer (rows, out), bfloat16.
    """
    kernel: Kernel | None = getattr(torch.ops.lightning_quant, name, None) if _loaded() else None
    if kernel is None or all(_is_right(kernel, name, rows) for rows in CHECKED):
        return kernel
    log.warning("the kernel %s computes wrongly as this compiler made it, and is not used", name)
    return None


def _is_right(kernel: Kernel, name: str, rows: int) -> bool:
    """Whether sums of a few codes, which bfloat16 holds exactly, come out exactly: compilers are not beyond doubt."""
    out, width = 128, 96
    four = name == "int4_tiles"
    low = -8 if four else -128
    codes = (torch.arange(out * width).reshape(out, width) * 37 % (-2 * low) + low).to(torch.int8)
    x = torch.zeros(rows, width, dtype=torch.bfloat16)
    for r in range(rows):
        x[r, r * 7 % width] = 1
        x[r, (r * 5 + 41) % width] += 1
    scale = 2.0 ** (torch.arange(out) % 4).to(torch.bfloat16)
    expected = (x.float() @ codes.float().t() * scale.float()).to(torch.bfloat16)
    if four:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        spread = scale.expand(width // 32, out)
        found = kernel(x, packed, torch.stack((spread, torch.zeros_like(spread)), -1).contiguous())
    else:
        found = kernel(x, codes, scale)
    return torch.equal(found, expected)


@cache
def _loaded() -> bool:
    """Load the kernels, compiling them if that was not done before; tells once why there are none."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if sys.platform != "linux" or not capabilities.get("avx512_f"):
        return False
    try:
        load(SOURCE, FLAGS)
    except Exception as error:  # whatever a missing or broken compiler raises: results are the same, only later
        cure = "pip install 'lightning-quant[runtime]' and have a C++ compiler on PATH"
        log.warning("no compiled kernels, int4 and int8 layers are slower (%s): %s", cure, error)
        return False
    for name in OPERATORS:
        if hasattr(torch.ops.lightning_quant, name):
            torch.library.register_fake(f"lightning_quant::{name}", _shape)
    return True


def _shape(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
