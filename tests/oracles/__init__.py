"""Slow, independent references that the tests compare the package against."""
