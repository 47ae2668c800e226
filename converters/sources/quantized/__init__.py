"""Checkpoints whose weights are quantized: one module per method, all decoding to what the method's own arithmetic gives."""
