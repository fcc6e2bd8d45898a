"""Small classes of matrices, closed under multiplication, in which factors are kept.

A structured matrix is a tuple of tensors with the channel group as leading axis, its *parts*; a
:class:`Structure` is the arithmetic on parts. ``Pi`` projects a symmetric matrix onto the class
such that ``(Pi(M) + Pi(M)^T) / 2`` is ``M`` on the support (arXiv 2312.05705, section 3.2).
"""

from tnkfac.curvature.structures.catalog import (
    check_factor_structure,
    check_structure,
    resolve_structure,
)
from tnkfac.curvature.structures.ragged_diagonal import RaggedDiagonal
from tnkfac.curvature.structures.structure import Decomposable, Matrices, Parts, Structure

__all__ = [
    "Decomposable",
    "Matrices",
    "Parts",
    "RaggedDiagonal",
    "Structure",
    "check_factor_structure",
    "check_structure",
    "resolve_structure",
]
