"""GPTQ: columns are rounded one by one, and those still to come make up for the error.

H = 2 X X^T + damping * mean(diag H) I,   U = chol(H^-1), upper
for each column j:  e = (w_j - Q(w_j)) / U_jj,   w_k -= e U_jk  for all k > j
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.rounding.held import Held
from lightning_quant.rounding.hessian import Moments, is_matrix, output_error
from lightning_quant.rounding.unit import Errors, Unit, stages, watched


@dataclass(frozen=True)
class Gptq:
    """Error-compensating rounding with the second moments of the inputs.

    A group's range is read off its columns when their turn comes, unless training has moved it or ``act_order`` is set,
    which keeps the ranges there are.

    Source: Frantar et al., "GPTQ", ICLR 2023, arXiv:2210.17323, and its code.

    **Deviation**: columns whose inputs are always 0 are rounded to nearest, not to 0; blocks are whole groups, so that
    a group's range is read off columns that have all updates before it.

    Args:
        damping: Share of the mean of H's diagonal that is added to it; ten times as much where H has no root.
        block: Columns whose updates to all later ones are applied at once.
        act_order: Round columns with the largest inputs first.
        sequential: Layers of a unit see inputs that the ones before them, rounded, have made; otherwise all of them
            are seen in one pass.
    """

    needs_float: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    damping: float = 0.01
    block: int = 128
    act_order: bool = False
    sequential: bool = True

    def __post_init__(self) -> None:
        if not (self.damping > 0 and self.block > 0):
            got = f"damping={self.damping}, block={self.block}"
            raise ValueError(explain("gptq", "damping > 0 and block > 0", got, "Leave them out."))

    @torch.no_grad()
    def __call__(self, unit: Unit) -> Errors:
        """Round the unit's layers."""
        layers = unit.readers()
        for path, layer in list(layers.items()):
            if not is_matrix(layer):
                unit.to_nearest(path, layers.pop(path), "no product of a matrix that GPTQ knows")
        steps = stages(unit, layers) if self.sequential else [list(layers)]
        found: Errors = {}
        for step in filter(None, steps):
            moments, now = Moments(), {path: layers[path] for path in step}
            with watched(now, lambda path, x, m=moments: m.add(path, layers[path], x)):  # type: ignore[misc]
                for call in unit.calls:
                    call.run(unit.module)
            for path, layer in now.items():
                hessian = moments.hessian(path)
                if hessian is None:
                    unit.to_nearest(path, layer, "no calibration input reached it")
                else:
                    found[path] = self._layer(path, layer, hessian)
        return found

    def _layer(self, path: str, layer: QuantLayer, hessian: Tensor) -> tuple[float, float]:
        """Round one layer; its relative squared output error with nearest codes and with the chosen ones."""
        held = Held(layer, path)
        before, nearest = held.rows.clone(), held.real(held.nearest(held.rows))
        codes = gptq_codes(held, hessian, self.damping, self.block, self.act_order)
        held.write(codes)
        whole = max(output_error(before, hessian), 1e-30)
        return output_error(nearest - before, hessian) / whole, output_error(held.real(codes) - before, hessian) / whole


@torch.no_grad()
def gptq_codes(held: Held, hessian: Tensor, damping: float = 0.01, block: int = 128, act_order: bool = False) -> Tensor:
    """Codes, float, (rows, columns), that GPTQ chooses; ranges of groups that are read anew are set in ``held``.

    Args:
        held: The weight and its grid.
        hessian: (groups of rows, columns, columns).
        damping: See ``Gptq``.
        block: Likewise.
        act_order: Likewise.

    Raises:
        ValueError: H has no root, however much is added to its diagonal.
    """
    count, width = len(hessian), held.rows.shape[1]
    order = torch.arange(width, device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(dim1=1, dim2=2).mean(0), descending=True, stable=True)
        hessian = hessian[:, order][:, :, order]
    root = _root(hessian, damping, held.path)
    values = held.rows[:, order].reshape(count, -1, width)
    codes = torch.empty_like(held.rows)
    refit = not act_order and held.fits()
    step = held.size * max(block // held.size, 1) if refit else block
    for start in range(0, width, step):
        end = min(start + step, width)
        part, own = values[:, :, start:end].contiguous(), root[:, start:end, start:end].contiguous()
        errors = torch.empty_like(part)
        for j in range(end - start):
            column = order[start + j : start + j + 1]
            if refit and (start + j) % held.size == 0:
                held.refit((start + j) // held.size, part[:, :, j : j + held.size].reshape(-1, held.size))
            now = part[:, :, j].reshape(-1, 1)
            code = held.nearest(now, column)
            codes[:, column] = code
            error = (now - held.real(code, column)).reshape(count, -1, 1) / own[:, j, j].view(-1, 1, 1)
            part[:, :, j + 1 :].addcmul_(error, own[:, j : j + 1, j + 1 :], value=-1)
            errors[:, :, j : j + 1] = error
        values[:, :, end:] -= errors @ root[:, start:end, end:]
    return codes


def _root(hessian: Tensor, damping: float, path: str) -> Tensor:
    """Upper Cholesky factor of the damped inverse."""
    if not torch.isfinite(hessian).all():
        cure = "Look for them in the calibration data, or leave the layer out with a LayerRule."
        raise ValueError(explain(path, "finite inputs", "infinities or NaN", cure))
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    damped = hessian.clone()
    ends = damped.diagonal(dim1=1, dim2=2)
    ends[dead] = 1.0
    share = damping
    while True:
        ends += (share * diagonal.mean(-1, keepdim=True)).clamp(min=1e-30)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                found: Tensor = upper
                return found
        share *= 10
        if share > 1e4:
            cure = "Give more calibration data, or leave the layer out with a LayerRule."
            raise ValueError(explain(path, "inputs whose second moments have a Cholesky root", "none", cure))
