"""Scale shapes, and views that give every element its own scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.errors import AttachError
from lightning_quant.granularity import Granularity


@pytest.mark.parametrize(
    ("kind", "axis", "size", "shape", "expected"),
    [
        ("tensor", 0, 0, (6, 8), (1,)),
        ("channel", 0, 0, (6, 8), (6, 1)),
        ("channel", 1, 0, (6, 8), (8, 1)),
        ("channel", 0, 0, (4, 3, 5, 5), (4, 1)),
        ("channel", 1, 0, (4, 3, 5, 5), (3, 1)),
        ("group", 0, 4, (6, 8), (6, 2)),
        ("group", 1, 3, (6, 8), (8, 2)),
        ("group", 0, 25, (4, 3, 5, 5), (4, 3)),
        ("pixel", 0, 0, (4, 3, 5, 2), (10, 1)),
        ("pixel", 1, 0, (4, 3, 5, 2), (10, 1)),
        ("pixel", 0, 0, (4, 3, 7), (7, 1)),
        ("pixel", 0, 0, (6, 8), (6, 1)),
        ("pixel", 1, 0, (6, 8), (8, 1)),
        ("token", None, 0, (2, 3, 8), (1,)),
    ],
)
def test_scale_shape(kind, axis, size, shape, expected):
    assert Granularity(kind, axis, size).scale_shape(shape) == expected


def test_group_that_does_not_divide():
    with pytest.raises(AttachError, match=r"mlp.down: .*group_size=128 does not divide in_features=96\. "):
        Granularity("group", 0, 128).scale_shape((4, 96), "mlp.down")
    with pytest.raises(AttachError, match=r'Use group_size=32, or exclude it with LayerRule\(match="\*.down", weight'):
        Granularity("group", 0, 128).scale_shape((4, 96), "mlp.down")
    with pytest.raises(AttachError, match="Use granularity='channel'"):
        Granularity("group", 0, 128).scale_shape((4, 9), "mlp.down")


def test_channel_axis_1_groups_run_along_the_input():
    """GPT-2's Conv1D stores (in, out): scale [j, g] belongs to column j and inputs g*size..."""
    weight = torch.arange(24.0).reshape(4, 6)
    view = Granularity("group", 1, 2).view(weight)
    assert view.shape == (6, 2, 2)
    assert view[5, 1].tolist() == [weight[2, 5].item(), weight[3, 5].item()]


@given(
    st.sampled_from(["tensor", "channel", "group", "pixel"]),
    st.integers(0, 1),
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
)
def test_unview_undoes_view(kind, axis, shape):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    size = x.numel() // shape[axis]
    granularity = Granularity(kind, axis, size)
    assert torch.equal(granularity.unview(granularity.view(x), x.shape), x)


@pytest.mark.parametrize("axis", [0, 1])
def test_pixels_hold_one_place_of_the_kernel_of_all_channels(axis):
    weight = torch.randn(2, 3, 5, 4)
    view = Granularity("pixel", axis).view(weight)
    assert view.shape == (20, 6)
    for i in range(5):
        for j in range(4):
            assert torch.equal(view[4 * i + j].sort()[0], weight[:, :, i, j].flatten().sort()[0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("kind", "size"), [("channel", 0), ("group", 4)])
def test_flat_rows_and_lifted_scales_agree(kind, size, axis):
    """Dividing by the largest magnitude of each row of ``flat`` through ``lift`` leaves every row's largest at 1."""
    x = torch.randn(8, 12)
    granularity = Granularity(kind, axis, size)
    scale = granularity.flat(x).abs().amax(dim=1).reshape(granularity.scale_shape(x.shape))
    y = granularity.unview(granularity.view(x) / granularity.lift(scale), x.shape)
    torch.testing.assert_close(granularity.flat(y).abs().amax(dim=1), torch.ones(scale.numel()))


def test_no_copy_when_axis_is_0():
    x = torch.randn(4, 6)
    assert Granularity("group", 0, 3).view(x).data_ptr() == x.data_ptr()


def test_activations_keep_their_shape():
    x = torch.randn(2, 3, 4)
    assert Granularity("token", None).view(x) is x
    assert Granularity("token", None).unview(x, x.shape) is x
    assert Granularity("tensor", None).flat(x).shape == (1, 24)
    assert Granularity("token", None).flat(x).shape == (6, 4)
