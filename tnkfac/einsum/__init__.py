"""Convolutions and their curvature as tensor networks (arXiv 2307.02275)."""

from tnkfac.einsum import functional, networks
from tnkfac.einsum.functional import index_pattern
from tnkfac.einsum.network import Network
from tnkfac.einsum.plans import Plan, plan
from tnkfac.einsum.rules import simplify

__all__ = ["Network", "Plan", "functional", "index_pattern", "networks", "plan", "simplify"]
