r"""A slow dense float64 reference of the SINGD optimizer, written from its formulas.

``u`` are the columns of the unfolded inputs of a layer (see ``layer_matrices``) and ``g`` those of
the gradients of the back-propagated scalar with respect to its outputs; ``kfac_approx="reduce"``
first averages the ``u`` and sums the ``g`` of a sample over its shared positions. Sums run over
every call of the layer since the last step::

    A = sum u u^T / number of u            B = R sum g g^T        R = number of averaged loss terms

State per layer and channel group: ``K`` ``[D, D]``, ``C`` ``[Co, Co]`` (start: identity) and
``m_K``, ``m_C`` (start: zero). With ``tr(M)`` the trace divided by the dimension, ``P`` the
projection onto the structure, ``a1 = alpha1``, ``e = (1 - a1 if normalize_lr_cov else 1) / 2``,
every ``T`` steps, old values on the right::

    H_K = P(K^T A K)    H_C = P(C^T B C)    KK = P(K^T K)    CC = P(C^T C)
    m_K <- a1 m_K + e (tr(H_C) H_K + damping tr(CC) KK - I)       K <- K - b_K K m_K
    m_C <- a1 m_C + e (tr(H_K) H_C + damping tr(KK) CC - I)       C <- C - b_C C m_C

``b`` is ``lr_cov``, divided by ``max(1, largest |entry| of the new m)`` if ``normalize_lr_cov``;
``kfac_like`` sets the four traces to 1 and ``alpha1`` to 0. In every step, with the new factors::

    [u_W | u_b] = C C^T [grad_W | grad_b] K K^T
    v <- momentum v + u + weight_decay p            p <- p - lr v

``P`` takes a symmetric ``M`` to the ``m`` in the structure with ``(m + m^T) / 2 = M`` on its
support: entries are kept, doubled where their mirror image is no entry of the structure. The
Toeplitz structures then average along each diagonal.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oracles.layer_matrices import LAYERS, from_matrix, output_columns, to_matrix, unfold_input

Batches = Iterable[tuple[Any, Any, float]]
Callback = Callable[[nn.Module, torch.Size], int]


def structure_support(name: str, dim: int) -> Tensor:
    """Return the mask ``[dim, dim]`` of the entries that a matrix of this structure may have."""
    row, column = torch.arange(dim)[:, None], torch.arange(dim)[None, :]
    if block := re.fullmatch(r"block(\d+)diagonal", name):
        return row // int(block[1]) == column // int(block[1])
    if sizes := re.fullmatch(r"hierarchical(\d+)_(\d+)", name):
        top = min(int(sizes[1]), dim)
        bottom = max(top, dim - int(sizes[2]))  # first index of the last, dense block
        return (row == column) | (row < top) | ((row >= bottom) & (column >= top))
    return {
        "dense": (row == row) | (column == column),
        "diagonal": row == column,
        "triltoeplitz": row >= column,
        "triutoeplitz": row <= column,
        "triltopleftdiag": (row == column) | (row == dim - 1),
        "trilbottomrightdiag": (row == column) | (column == 0),
        "triutopleftdiag": (row == column) | (column == dim - 1),
        "triubottomrightdiag": (row == column) | (row == 0),
    }[name]


def project(name: str, matrix: Tensor) -> Tensor:
    """Apply the projection ``P`` of a structure to symmetric matrices ``[G, dim, dim]``."""
    dim = matrix.shape[-1]
    support = structure_support(name, dim).to(matrix)
    matrix = matrix * support * (2 - support.T)
    if name.endswith("toeplitz"):
        for offset in range(1 - dim, dim):
            diagonal = matrix.diagonal(offset, 1, 2)
            diagonal.copy_(diagonal.mean(1, keepdim=True).expand_as(diagonal).clone())
    return matrix


def mean_trace(matrix: Tensor) -> Tensor:
    """Return trace / dimension of ``[G, dim, dim]`` as ``[G, 1, 1]``."""
    return matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


@dataclass
class Options:
    """Hyper-parameters, named as in ``singd``; ``loss_average`` may be a function as well."""

    lr: float = 1e-3
    momentum: float = 0.9
    damping: float = 1e-3
    alpha1: float = 0.5
    weight_decay: float = 0.0
    T: int = 10
    loss_average: str | Callback | None = "batch"
    lr_cov: float | Callable[[int], float] = 1e-2
    structures: tuple[str, str] = ("dense", "dense")
    kfac_approx: str = "expand"
    kfac_like: bool = False
    normalize_lr_cov: bool = False


@dataclass
class Sums:
    """Un-normalised statistics of one layer."""

    uu: Any = 0.0  # tensor once there are terms
    gg: Any = 0.0
    vectors: int = 0  # number of terms in ``uu``
    loss_terms: int = 0  # R


class SingdReference:
    """SINGD on a float64 copy of a model; the formulas are at the top of this file.

    ``model`` is the trained copy; ``K[name]`` and ``C[name]`` are the factors ``[G, dim, dim]`` of
    the layer with that qualified name. Modules with a common weight are one layer, under the
    first name. ``options`` may be changed between steps. Layers with all parameters frozen are
    left alone, half-frozen ones refused; parameters of other modules stay as they are. Data must
    be float64.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], **options: Any
    ) -> None:
        self.model: Any = copy.deepcopy(model).double()
        self.loss_fn = loss_fn
        self.options = Options(**options)
        self.steps = 0
        self.layers: dict[str, Any] = {}
        self.name_of: dict[nn.Module, str] = {}
        first_name: dict[Tensor, str] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LAYERS) and any(p.requires_grad for p in module.parameters()):
                self.name_of[module] = first_name.setdefault(module.weight, name)
                layer = self.layers.setdefault(self.name_of[module], module)
                trainable = all(p.requires_grad for p in module.parameters())
                if layer.bias is not module.bias or not trainable:
                    raise NotImplementedError(f"{name}: half frozen, or tied without its bias")
        self.K: dict[str, Tensor] = {}
        self.C: dict[str, Tensor] = {}
        self.m_K: dict[str, Tensor] = {}
        self.m_C: dict[str, Tensor] = {}
        for name, module in self.layers.items():
            matrix = to_matrix(module, module.weight, module.bias).detach()
            groups, rows, columns = matrix.shape
            self.K[name] = torch.eye(columns).to(matrix).repeat(groups, 1, 1)
            self.C[name] = torch.eye(rows).to(matrix).repeat(groups, 1, 1)
            self.m_K[name], self.m_C[name] = 0 * self.K[name], 0 * self.C[name]
        self.velocity: dict[nn.Parameter, Tensor] = {}

    def step(self, batches: Batches) -> float:
        """Do one step on micro-batches ``(x, y, loss_weight)``; return the loss.

        ``loss_weight * loss_fn(model(x), y)`` is differentiated per micro-batch and gradients add
        up, so a mean loss over ``N`` samples in all wants weights ``n / N``.
        """
        loss, gradients, sums = self.measure(batches)
        if self.steps % self.options.T == 0:
            for name, layer_sums in sums.items():
                self.update_factors(name, *self.normalise(layer_sums))
        for name, module in self.layers.items():
            weight, bias = module.weight, module.bias
            if weight not in gradients:
                continue
            matrix = to_matrix(module, gradients[weight], gradients.get(bias))
            K, C = self.K[name], self.C[name]
            matrix = C @ C.mT @ matrix @ K @ K.mT
            for p, u in zip((weight, bias), from_matrix(module, matrix), strict=False):
                v = self.options.momentum * self.velocity.get(p, 0.0)
                self.velocity[p] = v + u + self.options.weight_decay * p.detach()
                p.data -= self.options.lr * self.velocity[p]
        self.steps += 1
        return loss

    def measure(self, batches: Batches) -> tuple[float, dict[Any, Tensor], dict[str, Sums]]:
        """Return the loss, the gradients by parameter and the statistics by layer name."""
        total = 0.0
        gradients: dict[Any, Tensor] = {}
        sums: dict[str, Sums] = {}
        parameters = [p for module in self.layers.values() for p in module.parameters()]
        calls: list[tuple[Any, Tensor, Tensor]] = []

        def record(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            calls.append((module, x.detach().clone(), out))
            return out.clone()  # an activation may overwrite the copy, not ``out``

        handles = [m.register_forward_hook(record, with_kwargs=True) for m in self.name_of]
        for x, y, loss_weight in batches:
            calls.clear()
            loss = loss_weight * self.loss_fn(self.model(x), y)
            total += loss.item()
            wanted = parameters + [out for _, _, out in calls]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            for p, gradient in zip(parameters, found, strict=False):
                if gradient is not None:
                    gradients[p] = gradients.get(p, 0.0) + gradient
            for (module, x_in, out), g in zip(calls, found[len(parameters) :], strict=True):
                if g is not None:
                    layer_sums = sums.setdefault(self.name_of[module], Sums())
                    self.accumulate(layer_sums, module, x_in, out.detach(), g)
        for handle in handles:
            handle.remove()
        return total, gradients, sums

    def accumulate(self, sums: Sums, module: Any, x: Tensor, out: Tensor, g: Tensor) -> None:
        """Add one call of a layer to its statistics."""
        u, columns = unfold_input(module, x, out), output_columns(module, g)
        samples, positions = u.shape[0], u.shape[3]
        if self.options.kfac_approx == "reduce":
            u, columns = u.mean(3, keepdim=True), columns.sum(3, keepdim=True)
        sums.uu = sums.uu + torch.einsum("ngds,nges->gde", u, u)
        sums.gg = sums.gg + torch.einsum("ngds,nges->gde", columns, columns)
        sums.vectors += samples * u.shape[3]
        average = self.options.loss_average
        if callable(average):
            sums.loss_terms += average(module, out.shape)
        elif average is None:
            sums.loss_terms = 1
        else:
            sums.loss_terms += samples * {"batch": 1, "batch+sequence": positions}[average]

    @staticmethod
    def normalise(sums: Sums) -> tuple[Tensor, Tensor]:
        """Return ``A`` ``[G, D, D]`` and ``B`` ``[G, Co / G, Co / G]``."""
        return sums.uu / sums.vectors, sums.gg * sums.loss_terms

    def update_factors(self, name: str, A: Tensor, B: Tensor) -> None:
        """Update ``m_K``, ``m_C``, ``K`` and ``C`` of one layer."""
        o, (structure_K, structure_C) = self.options, self.options.structures
        K, C = self.K[name], self.C[name]
        H_K, KK = project(structure_K, K.mT @ A @ K), project(structure_K, K.mT @ K)
        H_C, CC = project(structure_C, C.mT @ B @ C), project(structure_C, C.mT @ C)
        t_HK, t_KK, t_HC, t_CC = (1.0 if o.kfac_like else mean_trace(M) for M in (H_K, KK, H_C, CC))
        alpha1 = 0.0 if o.kfac_like else o.alpha1
        eta = 0.5 * (1.0 - alpha1 if o.normalize_lr_cov else 1.0)
        new_K = t_HC * H_K + o.damping * t_CC * KK - torch.eye(K.shape[1])
        new_C = t_HK * H_C + o.damping * t_KK * CC - torch.eye(C.shape[1])
        m_K = self.m_K[name] = alpha1 * self.m_K[name] + eta * new_K
        m_C = self.m_C[name] = alpha1 * self.m_C[name] + eta * new_C
        self.K[name] = K - self.rate(m_K) * (K @ m_K)
        self.C[name] = C - self.rate(m_C) * (C @ m_C)

    def rate(self, m: Tensor) -> Tensor | float:
        """Return the step size ``b`` for one factor, ``[G, 1, 1]`` if normalised."""
        lr_cov = self.options.lr_cov
        rate = lr_cov(self.steps) if callable(lr_cov) else lr_cov
        if not self.options.normalize_lr_cov:
            return rate
        return rate / m.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
