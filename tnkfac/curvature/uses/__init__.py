"""Weights that models use without calling a supported module, seen at the calls that use them."""
