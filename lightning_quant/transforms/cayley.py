"""Gradient descent on orthogonal matrices by the Cayley transform."""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 1.0  # of a step times the norm of its generator
SMALLEST = 1e-8


@torch.no_grad()
def cayley_step(x: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One descent step that stays orthogonal: ``(I - a/2 W)^-1 (I + a/2 W) X``.

        W = (X G^T - G X^T) / 2,   a = min(lr, 1 / ||W||_1)

    W is skew-symmetric, so its Cayley transform is a rotation; ``W X`` is the projection of -G on what is tangent to
    the orthogonal matrices at X.

    Args:
        x: Orthogonal, (n, n), real; float64 keeps it so to 1e-12 over hundreds of steps.
        gradient: G = dL/dX, (n, n).
        lr: The largest step.

    Returns:
        The next X.

    Source: Li, Li, Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform",
    ICLR 2020, arXiv:2002.01113, algorithm 1 without momentum, for square matrices; the bound on the step as in the
    code of SpinQuant, arXiv:2405.16406.
    Deviation: the system is solved where they iterate towards its solution a few times, so nothing has to be brought
    back to the manifold by a QR decomposition now and then.

    >>> turned = cayley_step(torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 1.0)  # X[0, 1] shall fall
    >>> [[round(v, 4) for v in row] for row in turned.tolist()]
    [[0.8824, -0.4706], [0.4706, 0.8824]]
    """
    w = (x @ gradient.T - gradient @ x.T) / 2
    step = min(lr, REACH / (float(w.abs().sum(dim=0).max()) + SMALLEST))
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    moved: Tensor = torch.linalg.solve(one - step / 2 * w, (one + step / 2 * w) @ x)
    return moved


__all__ = ["cayley_step"]
