"""Bhalgat et al. 2020: straight-through in x - beta; gradients of s and beta are the range's."""

from tests.oracle.ste import expected as expected

BITS = (4, 1.58, 2, 3, 8)
KINDS = ("channel", "group", "tensor", "static")
ASYMMETRIC = False  # weights are symmetric
