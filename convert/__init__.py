"""How a checkpoint becomes a model: open, merge, write, quantize, install."""
