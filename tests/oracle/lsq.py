"""Esser et al. 2020: straight-through; the scale's gradient is the contract's own."""

from tests.oracle.ste import expected as expected

NEUTRAL = {}
