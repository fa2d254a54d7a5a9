"""Prepared mail and the code that prepared it."""
