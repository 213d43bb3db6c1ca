"""What holds of every method on the scheme it is made for, whatever the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_quant import ESTIMATORS
from lightning_quant.catalog import example
from lightning_quant.scheme import parse_scheme

ROWS = arrays(np.float32, (1, 32), elements=st.floats(-4, 4, width=32, allow_subnormal=False))
MADE_FOR_INPUTS = [m for m, kind in ESTIMATORS.items() if parse_scheme(kind.about.scheme)[1] is not None]


def weights_of(method, x):
    """The method's weight quantizer for a row of weights."""
    q = example(ESTIMATORS[method](), True, tuple(x.shape))
    q.fit_range(x)
    return q.eval()


@pytest.mark.parametrize("method", ESTIMATORS)
@settings(max_examples=15)
@given(rows=ROWS)
def test_weights_of_a_row_keep_their_order_on_few_finite_levels(method, rows):
    x = torch.from_numpy(rows)
    q = weights_of(method, x)
    y = q(x)
    assert y.isfinite().all()
    assert len(y.unique()) <= round(2**q.spec.bits)
    order = x[0].argsort(stable=True)
    assert (y[0, order].diff() >= 0).all()
    assert torch.equal(y, q.on_grid(x))


@pytest.mark.parametrize("method", ESTIMATORS)
@settings(max_examples=15)
@given(rows=ROWS)
def test_stored_codes_fit_their_width_and_rebuild_the_weights(method, rows):
    x = torch.from_numpy(rows)
    q = weights_of(method, x)
    code, scale, zero, offset = q.stored(x)
    assert code.min() >= q.low
    assert code.max() <= q.high
    blocks = q.granularity.view(code).float()
    inputs = q.estimator.inputs(q, *q.blocks(q.estimator.transform(q, x))[:2])
    rebuilt = q.granularity.unview(q.real(blocks, scale, zero, offset, inputs), x.shape)
    assert torch.equal(rebuilt.to(x.dtype), q(x))


@pytest.mark.parametrize("method", MADE_FOR_INPUTS)
@settings(max_examples=15)
@given(rows=ROWS)
def test_inputs_keep_their_order_on_few_finite_levels(method, rows):
    x = torch.from_numpy(rows)
    q = example(ESTIMATORS[method](), False, tuple(x.shape))
    if not q.spec.dynamic:
        q.fit_range(x)
    y = q.eval()(x)
    assert y.isfinite().all()
    assert len(y.unique()) <= round(2**q.spec.bits)
    assert (y[0, x[0].argsort(stable=True)].diff() >= 0).all()


@pytest.mark.parametrize("method", ESTIMATORS)
@settings(max_examples=10)
@given(rows=ROWS)
def test_gradients_are_finite_in_training(method, rows):
    x = torch.from_numpy(rows).clone().requires_grad_()
    q = weights_of(method, x.detach()).train()
    q(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in q.parameters())
