"""``lightning-quant ptq``: a model's directory in, its low-bit export out, without training."""
