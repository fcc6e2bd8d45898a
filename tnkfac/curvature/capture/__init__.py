"""Seeing what passes through layers: the only folder that registers hooks."""
