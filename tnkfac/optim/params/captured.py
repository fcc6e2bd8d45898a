"""Captured layers, and parameters that the fallback trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.structures import Parts
from tnkfac.optim.options import Group
from tnkfac.optim.params.parts import home
from tnkfac.optim.params.scaling import ElementwisePreconditioner


@dataclass(frozen=True)
class Needs:
    """Measurements that a rule needs of a layer.

    Attributes:
        statistics: Whether anything is; else gradients alone are used.
        outputs: Whether output gradients are, too.
        squares: Whether per-sample gradients are squared in an eigenbasis.
        explicit_passes: Whether only passes that the user names count.
        everywhere: Whether every process has to keep what is made of it.
    """

    statistics: bool = True
    outputs: bool = True
    squares: bool = False
    explicit_passes: bool = False
    everywhere: bool = False


@dataclass
class CapturedLayer:
    """A weight, perhaps with its bias, whose curvature is captured.

    Attributes:
        name: Qualified name of the first module that owns the weight.
        kind: Type name of that module.
        weight: The weight.
        bias: The bias, if it is trained with the weight.
        group: Parameter group of the weight.
        bias_group: Parameter group of the bias.
        needs: What is to be measured of it.
        labels: Names of weight and bias in their module.
        statistics: What the taps of its modules measure.
        scaling: Diagonal factors that were read of its state, if any.
        removers: Callables that remove the taps.
        cached_marks: What was read of its state, see :func:`tnkfac.optim.params.state.mark`.
        cached_products: What was made of its state, see
            :meth:`tnkfac.optim.params.batches.Stack.made_of`.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    group: Group
    bias_group: Group
    needs: Needs
    statistics: Statistics
    labels: tuple[str, str] = ("weight", "bias")
    scaling: ElementwisePreconditioner | None = None
    removers: list[Callable[[], object]] = field(default_factory=list)
    cached_marks: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)
    cached_products: dict[str, tuple[list[tuple[Tensor, int]], Parts]] = field(default_factory=dict)

    def params(self) -> list[Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def owned(self) -> list[Tensor]:
        """The parameters that weight and bias are, or are parts of."""
        return [home(param) for param in self.params()]

    def group_of(self, param: Tensor) -> Group:
        """Parameter group of its weight or bias."""
        return self.bias_group if param is self.bias else self.group

    def named(self) -> list[tuple[str, Tensor]]:
        """Its parameters with their qualified names."""
        prefix = f"{self.name}." if self.name else ""
        return [(prefix + name, p) for name, p in zip(self.labels, self.params(), strict=False)]

    def close(self) -> None:
        """Remove the taps and what they have collected."""
        for remove in self.removers:
            remove()
        self.removers.clear()
        self.statistics.clear()
        self.cached_products.clear()


@dataclass
class Uncaptured:
    """A parameter that the fallback trains.

    Attributes:
        name: Qualified name, or ``param_<i>``.
        kind: Type name of the module that owns it, or empty.
        param: The parameter.
        group: Its parameter group.
        reason: Why it has no Kronecker-factored curvature.
    """

    name: str
    kind: str
    param: Tensor
    group: Group
    reason: str


def update_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which natural gradients do not overflow: float32 in place of float16."""
    return torch.float32 if dtype == torch.float16 else dtype
