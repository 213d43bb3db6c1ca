"""What is optimized in place of a weight's codes: AdaRound's soft rounding, AdaQuant's moved weight."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lightning_quant.rounding.held import Held

ZETA, GAMMA = 1.1, -0.1


class Variable(nn.Module):
    """Stands where a layer's weight quantizer is while its codes are sought.

    Attributes:
        v: What is trained, (rows, columns).
        called: Is read and set as a quantizer's is.
        measuring: Likewise.

    Args:
        held: The weight and its grid.
    """

    v: nn.Parameter
    called = False
    measuring = False

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held

    @abstractmethod
    def rows(self) -> Tensor:
        """The weight that is computed with, (rows, columns), real."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The codes that it comes to, (rows, columns), float."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is computed with, in its shape and dtype; the argument is the one it was made of."""
        return self.held.weight_of(self.rows())

    def output(self, y: Tensor) -> Tensor:
        """The layer's output, as it is."""
        return y

    def pull(self, beta: float) -> Tensor | None:
        """Gradient of what draws ``v`` to codes; None without such a term."""
        return None


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma; 0, 1)`` with zeta = 1.1, gamma = -0.1.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """``V = -ln((zeta - gamma) / (h - gamma) - 1)``, for h in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


@torch.no_grad()
def penalty_gradient(v: Tensor, beta: float) -> Tensor:
    """dP/dV of ``P = sum(1 - |2 h(V) - 1|^beta)``, which is 0 where every h is 0 or 1.

        dP/dV = -2 beta sign(2 h - 1) |2 h - 1|^(beta - 1) * dh/dV

    Written out, since its graph would take as long as the block.
    """
    sigmoid = torch.sigmoid(v)
    h = sigmoid * (ZETA - GAMMA) + GAMMA
    slope = sigmoid.mul_(1 - sigmoid).mul_(((h > 0) & (h < 1)).to(h.dtype))
    side = h.clamp_(0, 1).mul_(2).sub_(1)
    power = side.abs().pow_(beta - 1).copysign_(side)
    return power.mul_(slope).mul_(-2 * beta * (ZETA - GAMMA))


def annealed(step: int, steps: int, first: float = 20.0, last: float = 2.0, warm_up: float = 0.2) -> float:
    """beta: ``first`` for the first share ``warm_up`` of the steps, then linear to ``last``.

    >>> [annealed(t, 10000) for t in (0, 2000, 6000, 10000)]
    [20.0, 20.0, 11.0, 2.0]
    """
    start = warm_up * steps
    share = 0.0 if step < start else (step - start) / max(steps - start, 1)
    return last + (first - last) * (1 - min(share, 1.0))


class SoftRounding(Variable):
    """``scale * (clip(floor(w / scale) + h(V)) - zero)``: V decides for the level below or the one above.

    It begins at the float weight.  On a codebook places take the part of codes.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv:2004.10568.
    """

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        place = held.place(held.rows)
        self.floor = place.floor().clamp_(max=held.q.grid.high - 1)
        self.v = nn.Parameter(inverse_rectified_sigmoid(place - self.floor))

    def rows(self) -> Tensor:
        """See the base class."""
        return self.held.real(self.floor + rectified_sigmoid(self.v), between=True)

    def codes(self) -> Tensor:
        """See the base class."""
        return self.held.settled(self.floor + (rectified_sigmoid(self.v.detach()) >= 0.5))

    def pull(self, beta: float) -> Tensor | None:
        """See ``penalty_gradient``."""
        return penalty_gradient(self.v, beta)


class MovedWeight(Variable):
    """``Q(w + scale * V)`` with the straight-through gradient: any level may be reached."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self.v = nn.Parameter(torch.zeros_like(held.rows))
        self.step = held.steps()

    def _moved(self) -> Tensor:
        return self.held.rows + self.v * self.step

    def rows(self) -> Tensor:
        """See the base class."""
        moved = self._moved()
        return moved + (self.held.real(self.codes()) - moved).detach()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """See the base class."""
        return self.held.nearest(self._moved())
