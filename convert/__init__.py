"""Conversion of a checkpoint into an installed model: open, merge, write, quantize, install."""
