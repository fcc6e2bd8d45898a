"""Estimates of the curvature of a whole model over data."""
