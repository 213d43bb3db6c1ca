"""One piece of memory per thread and dtype, handed out again and again."""

from __future__ import annotations

import threading

import torch
from torch import nn

from lightning_quant import scratch
from lightning_quant.scratch import LARGEST


def test_it_is_the_same_memory_in_the_tensors_shape():
    first, second = scratch.scratch(torch.empty(4, 6)), scratch.scratch(nn.Parameter(torch.empty(3, 5)))
    assert first.shape == (4, 6)
    assert second.shape == (3, 5)
    assert first.data_ptr() == second.data_ptr()
    assert not second.requires_grad


def test_it_grows():
    small = scratch.scratch(torch.empty(8, dtype=torch.float64))
    large = scratch.scratch(torch.empty(64, dtype=torch.float64))
    assert large.shape == (64,)
    assert scratch.scratch(small).data_ptr() == large.data_ptr()


def test_dtypes_and_threads_have_their_own():
    like, found = torch.empty(16), []
    thread = threading.Thread(target=lambda: found.append(scratch.scratch(like)))
    thread.start()
    thread.join()
    places = [found[0].data_ptr(), scratch.scratch(like).data_ptr(), scratch.scratch(like.double()).data_ptr()]
    assert len(set(places)) == 3


def test_none_where_it_would_not_help():
    assert scratch.scratch(torch.empty(LARGEST + 1, device="meta")) is None
    assert scratch.scratch(torch.empty(4, device="meta")) is None
    assert scratch.scratch(torch.empty(1).expand(LARGEST + 1)) is None
