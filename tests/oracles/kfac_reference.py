r"""A slow dense float64 reference of the KFAC optimizer, written from its formulas.

``A`` and ``B`` are those of ``singd_reference``, restricted to the structure. Per layer and channel
group, with ``rho = factor_decay``, every ``factor_update_steps``::

    X_A <- rho X_A + (1 - rho) A        X_B likewise        w <- rho w + 1 - rho
    s   <- rho s + (1 - rho) R sum_n (Q_B^T W_n Q_A)^2      (ekfac, W_n: gradient of sample n)

all from zero, and every ``inv_update_steps`` afterwards ``A^ = X_A / w``, ``B^ = X_B / w``,
``Q_A``, ``Q_B`` their eigenvectors, ``s = d_B d_A^T``. A gradient ``G = [grad_W | grad_b]`` becomes

- eigen: the solution of ``(B^ (x) A^ + damping I) vec D = vec G``;
- ekfac: ``Q_B ((Q_B^T G Q_A) / (s + damping)) Q_A^T``;
- cholesky: ``(B^ + b I)^-1 G (A^ + a I)^-1`` with the damping of the last decomposition: factor:
  ``a = b = damping``; pi: ``a = pi sqrt(damping)``, ``b = sqrt(damping) / pi``, ``pi^2`` the ratio
  of mean traces of ``A^`` and ``B^``.

Then ``nu = min(1, sqrt(kl_clip / |sum lr^2 <D, G>|))`` over all layers, and per parameter
``u = nu D + weight_decay p``, ``v <- momentum v + u``, ``p <- p - lr (v or u + momentum v)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oracles.layer_matrices import from_matrix, output_columns, to_matrix, unfold_input
from oracles.singd_reference import Batches, SingdReference, Sums, mean_trace, project


@dataclass
class KfacOptions:
    """Hyper-parameters beside those that SINGD has."""

    factor_decay: float = 0.95
    factor_update_steps: int = 1
    inv_update_steps: int = 10
    kl_clip: float | None = 1e-3
    compute_method: str = "eigen"
    damping_type: str = "tikhonov"
    nesterov: bool = False


def checked_spectrum(M: Tensor, Q: Tensor) -> Tensor:
    """Eigenvalues ``[G, d]`` of ``M`` in the order of the columns of ``Q``, its eigenvectors."""
    eye = torch.eye(M.shape[1], dtype=M.dtype).expand_as(M)
    torch.testing.assert_close(Q.mT @ Q, eye, rtol=0, atol=1e-12)
    turned = Q.mT @ M @ Q
    values = turned.diagonal(dim1=1, dim2=2)
    size = 1e-12 * float(M.abs().max())
    torch.testing.assert_close(turned, torch.diag_embed(values), rtol=0, atol=size)
    return values


class KfacReference(SingdReference):
    """KFAC on a float64 copy of a model; the formulas are at the top of this file.

    Eigenvectors of equal eigenvalues are not unique, and the scales of ekfac depend on them: they
    are taken from ``bases(name)``, if set, and checked.
    """

    def __init__(self, model: Any, loss_fn: Any, **options: Any) -> None:
        mine = {k: options.pop(k) for k in KfacOptions.__annotations__ if k in options}
        super().__init__(model, loss_fn, **options)
        self.kfac = KfacOptions(**mine)
        self.X: dict[str, list[Tensor]] = {}
        self.w: dict[str, float] = {}
        self.scales: dict[str, Tensor] = {}
        self.kept: dict[str, Any] = {}
        self.samples: dict[int, list[Tensor]] = {}
        self.bases: Callable[[str], tuple[Tensor, Tensor]] | None = None

    def accumulate(self, sums: Sums, module: Any, x: Tensor, out: Tensor, g: Tensor) -> None:
        """Keep the gradients ``[N, G, Co, D]`` of the samples, too."""
        super().accumulate(sums, module, x, out, g)
        u, columns = unfold_input(module, x, out), output_columns(module, g)
        gradients = torch.einsum("ngcs,ngds->ngcd", columns, u)
        self.samples.setdefault(id(sums), []).append(gradients)

    def step(self, batches: Batches) -> float:
        """One step on micro-batches ``(x, y, loss_weight)``; return the loss."""
        o, kfac = self.options, self.kfac
        loss, gradients, sums = self.measure(batches)
        if self.steps % kfac.factor_update_steps == 0:
            for name, layer_sums in sums.items():
                self.update(name, layer_sums)
        if self.steps % kfac.inv_update_steps == 0:
            for name in self.X:
                self.decompose(name)
        self.samples.clear()
        found = {}
        total = 0.0
        for name, module in self.layers.items():
            if module.weight in gradients:
                weight, bias = gradients[module.weight], gradients.get(module.bias)
                G = to_matrix(module, weight, bias)
                found[name] = self.precondition(name, G)
                total += o.lr**2 * float((found[name] * G).sum())
        nu = 1.0
        if kfac.kl_clip is not None and total:
            nu = min(1.0, (kfac.kl_clip / abs(total)) ** 0.5)
        for name, D in found.items():
            module = self.layers[name]
            parts = from_matrix(module, nu * D)
            for p, u in zip((module.weight, module.bias), parts, strict=False):
                u = u + o.weight_decay * p.detach()
                v = self.velocity[p] = o.momentum * self.velocity.get(p, 0.0) + u
                p.data -= o.lr * (u + o.momentum * v if kfac.nesterov else v)
        self.steps += 1
        return loss

    def update(self, name: str, sums: Sums) -> None:
        """Take one batch into the moving averages."""
        rho = self.kfac.factor_decay
        new = [
            project(structure, M)
            for structure, M in zip(self.options.structures, self.normalise(sums), strict=True)
        ]
        old = self.X.get(name, [torch.zeros_like(M) for M in new])
        self.X[name] = [rho * o + (1 - rho) * n for o, n in zip(old, new, strict=True)]
        self.w[name] = rho * self.w.get(name, 0.0) + 1 - rho
        if name in self.scales:
            Q_A, Q_B = self.kept[name][2:]
            W = torch.cat(self.samples[id(sums)])
            squares = sums.loss_terms * (Q_B.mT @ W @ Q_A).square().sum(0)
            self.scales[name] = rho * self.scales[name] + (1 - rho) * squares

    def decompose(self, name: str) -> None:
        """Set what gradients are preconditioned with."""
        A, B = (M / self.w[name] for M in self.X[name])
        damping = self.options.damping
        if self.kfac.compute_method == "cholesky":
            a = b = damping
            if self.kfac.damping_type == "pi":
                pi = (mean_trace(A) / mean_trace(B)).sqrt()
                a, b = pi * damping**0.5, damping**0.5 / pi
            eyes = (torch.eye(M.shape[1], dtype=torch.float64) for M in (A, B))
            shifts = zip((A, B), (a, b), eyes, strict=True)
            self.kept[name] = tuple(torch.linalg.inv(M + s * eye) for M, s, eye in shifts)
            return
        (d_A, Q_A), (d_B, Q_B) = (torch.linalg.eigh(M) for M in (A, B))
        if self.bases is not None:
            Q_A, Q_B = self.bases(name)
            d_A, d_B = checked_spectrum(A, Q_A), checked_spectrum(B, Q_B)
        self.kept[name] = A, B, Q_A, Q_B
        if self.kfac.compute_method == "ekfac":
            self.scales[name] = d_B.clamp(min=0)[:, :, None] * d_A.clamp(min=0)[:, None]

    def precondition(self, name: str, G: Tensor) -> Tensor:
        """Apply the damped inverse to ``[groups, Co, D]``."""
        damping = self.options.damping
        if self.kfac.compute_method == "cholesky":
            A_inv, B_inv = self.kept[name]
            return B_inv @ G @ A_inv
        A, B, Q_A, Q_B = self.kept[name]
        if self.kfac.compute_method == "ekfac":
            return Q_B @ ((Q_B.mT @ G @ Q_A) / (self.scales[name] + damping)) @ Q_A.mT
        rows = []
        for a, b, g in zip(A, B, G, strict=True):
            matrix = torch.kron(b, a)
            matrix = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
            rows.append(torch.linalg.solve(matrix, g.flatten()).view_as(g))
        return torch.stack(rows)
