"""What the figures of a page mean, in a sentence each."""

from __future__ import annotations

METRICS = {
    "lam": "lambda, how strongly the loss pulls weights towards the grid at this step",
    "alpha": "how hard the smooth stand-in for rounding is (DSQ: smaller is harder)",
    "sharpness": "how steep the smooth stand-in for rounding is",
    "share": "share of the weights that are rounded already",
    "rate": "share of the weights that get noise in place of rounding",
    "threshold": "how often a weight may change its code before it is frozen",
    "t": "how steep the stand-in for the sign function is",
    "gate": "whether rounding is switched on yet",
    "theta": "mean of PEGE's learned surrogate parameters",
    "theta_max": "largest of PEGE's learned surrogate parameters",
    "delta": "EWGS: how much gradients grow with the distance from the grid",
    "frozen": "share of the weights that no longer move",
    "frequency": "how often weights change their code, on average",
    "shift": "mean size of the learned shifts of inputs",
    "error": "noise over signal of the rounded weights, mean over layers (0.01 is 20 dB)",
    "clip": "share of weights that lie outside of the grid, mean over layers",
    "flips": "share of integer codes that one optimizer step changed, mean over layers",
    "scale_drift": "how far learned scales have moved from where they started, relative, mean over layers",
    "input_error": "noise over signal of the rounded inputs, mean over layers",
    "input_clip": "share of inputs that lie outside of the grid, mean over layers",
    "input_scale_drift": "the same drift of the scales of inputs",
    "progressive_loss": "what the method itself adds to the loss",
    "distill": "what the teacher adds to the loss",
}
LAYERS = {
    "weight_error": "SNR of the rounded weight, dB (higher is better)",
    "weight_clip": "share of clipped weights",
    "weight_flips": "share of codes changed by a step",
    "weight_scale_drift": "drift of the scales, relative",
}
COLUMNS = (
    ("error", "size of what rounding changes, as a share of the weight's own size; sorted by it, worst first"),
    ("SNR", "the same in decibels, higher is better"),
    ("clipped", "share of values that lie outside of the grid and are cut off"),
    ("codes used", "share of the grid's levels that occur; few mean that bits are wasted"),
    ("bits", "stored bits per value, scales included"),
)
