"""Rows of the operation table, by theme; :mod:`tnkfac.einsum.networks` lists them all."""
