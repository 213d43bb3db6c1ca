"""One HTML page about a run or an export: how good the low-bit model is, and which layer hurts most."""
