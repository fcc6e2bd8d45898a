"""A rule of one's own: Adam in the eigenbasis of gradient second moments (SOAP, arXiv 2409.11321).

Written as a user of the package would: nothing of it is in the package.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnkfac.optim import CurvatureOptimizer, Needs, Option, Rule, options

__all__ = ["SOAP", "SoapRule"]


def betas(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: got {value!r}. Supported: a pair of numbers.")
    for beta in value:
        options.number(name, beta, below=1.0)
    return value[0], value[1]


class SoapRule(Rule):
    """Adam's moments of a gradient ``G``, turned by eigenvectors of ``G G^T`` and ``G^T G``."""

    options: ClassVar[Mapping[str, Option]] = {
        **options.SHARED,
        "betas": Option((0.95, 0.95), betas, "decays of the moments of gradients"),
        "shampoo_beta": Option(
            0.95, partial(options.number, below=1.0), "decay of the second moments of matrices"
        ),
        "eps": Option(1e-8, options.number, "added to the root of second moments"),
        "precondition_frequency": Option(10, options.interval, "steps between eigenbases"),
    }
    derived = ("Q_L", "Q_R")

    def needs(self, group: dict[str, Any]) -> Needs:
        return Needs(statistics=False)

    def refresh_interval(self, group: dict[str, Any], step: int) -> int:
        every = group["precondition_frequency"]
        return int(every(step) if callable(every) else every)

    def init(self, layer: Any) -> dict[str, tuple[Tensor, ...]]:
        described, weight = layer.statistics.layer, layer.weight
        groups, rows, columns = described.groups, described.out_dim, described.in_dim
        kind = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        eye_L, eye_R = (torch.eye(n, **kind).repeat(groups, 1, 1) for n in (rows, columns))
        return {
            "mean": (torch.zeros(groups, rows, columns, **kind),),
            "square": (torch.zeros(groups, rows, columns, **kind),),
            "count": (torch.zeros(groups, 1, 1, **kind),),
            "L": (torch.zeros_like(eye_L),),
            "R": (torch.zeros_like(eye_R),),
            "Q_L": (eye_L,),
            "Q_R": (eye_R,),
        }

    def source(self) -> tuple[str, ...]:
        return "L", "R"

    def refresh(self, batch: Any) -> dict[str, tuple[Tensor, ...]]:
        (L,), (R,) = batch.read("L"), batch.read("R")
        return {"Q_L": (torch.linalg.eigh(L)[1],), "Q_R": (torch.linalg.eigh(R)[1],)}

    def precondition(self, batch: Any, gradient: Tensor) -> Tensor:
        group, kept = batch.group, {name: batch.read(name)[0] for name in self.init_names}
        G, Q_L, Q_R = gradient.to(kept["L"].dtype), kept["Q_L"], kept["Q_R"]
        (beta1, beta2), beta = group["betas"], group["shampoo_beta"]
        count = kept["count"] + 1
        mean = kept["mean"].lerp(G, 1 - beta1)
        square = kept["square"].lerp((Q_L.mT @ G @ Q_R).square(), 1 - beta2)
        batch.write(
            {
                "mean": (mean,),
                "square": (square,),
                "count": (count,),
                "L": (kept["L"].lerp(G @ G.mT, 1 - beta),),
                "R": (kept["R"].lerp(G.mT @ G, 1 - beta),),
            }
        )
        turned = Q_L.mT @ (mean / (1 - beta1**count)) @ Q_R
        size = (square / (1 - beta2**count)).sqrt() + group["eps"]
        return (Q_L @ (turned / size) @ Q_R.mT).to(gradient.dtype)

    init_names = ("mean", "square", "count", "L", "R", "Q_L", "Q_R")


class SOAP(CurvatureOptimizer):
    """Adam in the eigenbasis of gradient second moments, for every layer of a model."""

    rule = SoapRule()
