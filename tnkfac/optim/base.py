"""What SINGD and KFAC share: groups, layers, schedule, the step, checkpoints."""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnkfac.curvature import FirstForward, find_owners, root_of
from tnkfac.optim import arguments, fallback
from tnkfac.optim.guard import SkippedUpdates, Verdicts, loss_scale, non_finite
from tnkfac.optim.layers import CapturedLayer, Uncaptured, sort
from tnkfac.optim.report import Report, Row
from tnkfac.optim.step import RMS, adam_size, apply_update_, grafted, trust_region

Group = dict[str, Any]


class CurvatureOptimizer(Optimizer):
    """Base of optimizers that precondition layers and train every other parameter by a fallback.

    A subclass says which state a layer has and how statistics and gradients use it.
    """

    _layers: list[CapturedLayer]
    _others: list[Uncaptured]

    def __init__(self, params: Any, defaults: Group, grad_scaler: Any = None) -> None:
        """Sort the parameters and put taps on their layers.

        Args:
            params: Parameters, named parameters, parameter groups, or a module.
            defaults: Hyper-parameters of groups that do not set them.
            grad_scaler: The ``GradScaler`` in use, if it does not call ``step`` itself.
        """
        self._ready = False
        self._layers, self._others = [], []
        self._roots: list[weakref.ref[nn.Module]] = []
        self._grad_scaler = grad_scaler
        self._skipped = SkippedUpdates()
        self._verdicts = Verdicts()
        self._search: FirstForward | None = None
        self._warned: set[str] = set()
        super().__init__(self._listed(params), defaults)
        self._ready = True
        self._sort_parameters()

    # ---------------------------------------------------------------- groups and layers

    def _listed(self, params: Any) -> Any:
        """Spell out what may hold parameters, remembering the modules that they come from."""
        if isinstance(params, Tensor):
            raise TypeError(
                "params: got a Tensor. Supported: an iterable of parameters, named parameters, "
                "parameter groups, a torch.nn.Module."
            )
        root = root_of(params)
        if root is not None:
            self._roots.append(weakref.ref(root))
        if isinstance(params, nn.Module):
            params = [param for param in params.parameters() if param.requires_grad]
        try:
            listed = list(params)
        except TypeError:
            raise TypeError(
                f"params: got {params!r}. Supported: an iterable of parameters, named parameters, "
                "parameter groups, a torch.nn.Module."
            ) from None
        if not listed:
            raise ValueError("params: got no parameters. Supported: at least one.")
        return listed

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; layers among them are found like those of the constructor.

        Args:
            param_group: ``params``, and hyper-parameters that differ from the defaults.

        Raises:
            ValueError: For a hyper-parameter out of range, or no parameters.
            TypeError: For a hyper-parameter of the wrong type.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group: got {param_group!r}. Supported: a dict with 'params'.")
        group = dict(param_group)
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else self._listed(params)
        arguments.warn_near_misses(group, {*self.defaults, *_GROUP_KEYS})
        self._check_group({**self.defaults, **group}, group)
        group["base_lr"] = float(group.get("lr", self.defaults["lr"]))
        group.setdefault("step", 0)
        group.setdefault("last_due", 0)
        super().add_param_group(group)
        if self._ready:
            self._sort_parameters()

    @abstractmethod
    def _check_group(self, group: Group, given: Group) -> None:
        """Check all hyper-parameters of a group; bring those in ``given`` to their stored form."""

    def _sort_parameters(self) -> None:
        groups = self._group_of()
        params = [param for group in self.param_groups for param in group["params"]]
        roots = [root for ref in self._roots if (root := ref()) is not None]
        owners = find_owners(params, roots)
        taken = {id(param) for layer in self._layers for param in layer.params()}
        layers, self._others = sort(self, params, owners, lambda p: groups[id(p)], taken)
        self._layers += layers
        if not owners and self._search is None:
            self._search = FirstForward(self, "_search_module")
        for other in self._others:
            group = groups[id(other.param)]
            if group["fallback"] == "error" and other.param.requires_grad:
                self.close()
                raise ValueError(
                    f"params: {other.name} has no supported layer ({other.reason}), and "
                    "fallback='error'. Supported: fallback='adamw', 'sgd'."
                )
        self._set_taps()

    def _search_module(self, module: nn.Module) -> bool:
        """Look for layers in a module that is about to run; tell whether there are any."""
        known = {id(param) for group in self.param_groups for param in group["params"]}
        if not any(id(param) in known for param in module.parameters()):
            return False
        self._roots.append(weakref.ref(module))
        self._sort_parameters()
        return True

    def _group_of(self) -> dict[int, Group]:
        return {id(param): group for group in self.param_groups for param in group["params"]}

    def _set_taps(self) -> None:
        """Switch taps on where the next step is to update factors."""
        groups = self._group_of()
        for layer in self._layers:
            group = groups.get(id(layer.weight))
            layer.statistics.on = group is not None and layer.last_update < group["last_due"]

    # ---------------------------------------------------------------- what subclasses say

    @abstractmethod
    def _init_layer(self, layer: CapturedLayer, group: Group) -> dict[str, Tensor]:
        """State of a layer, kept under its weight."""

    @abstractmethod
    def _update_layer(
        self, layer: CapturedLayer, group: Group, scale: Tensor | float, keep: Tensor | None
    ) -> None:
        """Take the pending statistics of a layer into its state."""

    @abstractmethod
    def _natural(self, layer: CapturedLayer, gradient: Tensor) -> Tensor:
        """Precondition a gradient matrix ``[G, C_out / G, D]``."""

    @abstractmethod
    def _is_due(self, group: Group, step: int) -> bool:
        """Whether factors are to be updated at a step."""

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, with gradients.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._verdicts.receive()
        groups = self._group_of()
        self._check_gradients()
        self._ensure_state(groups)
        pending = [layer for layer in self._layers if layer.statistics.pending]
        if not pending and self._rests():
            return loss
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        measured = [tensor for layer in pending for tensor in layer.statistics.sums()]
        skip = non_finite([*gradients, *measured])
        self._skipped.add(skip)
        if skip is not True:
            keep = None if skip is False else 1 - skip
            self._update_factors(pending, groups, keep)
            self._step_layers(groups, keep)
            self._step_others(groups, None if keep is None else 1 - keep)
        self._advance(pending if skip is not True else [], groups)
        if isinstance(skip, Tensor):
            self._verdicts.send(skip, self._undo(pending))
        return loss

    def _update_factors(
        self, pending: list[CapturedLayer], groups: dict[int, Group], keep: Tensor | None
    ) -> None:
        scale = loss_scale(self._grad_scaler) if pending else 1.0
        for layer in pending:
            self._update_layer(layer, groups[id(layer.weight)], scale, keep)

    def _step_layers(self, groups: dict[int, Group], keep: Tensor | None) -> None:
        layers = [la for la in self._layers if any(p.grad is not None for p in la.params())]
        matrices = [self._gradient(layer, keep) for layer in layers]
        natural = [self._natural(la, m) for la, m in zip(layers, matrices, strict=True)]
        self._clip(layers, matrices, natural, groups)
        for layer, matrix, update in zip(layers, matrices, natural, strict=True):
            group = groups[id(layer.weight)]
            update = self._graft(layer, group, matrix, update)
            weight, bias = layer.statistics.layer.from_matrix(update, layer.weight.shape)
            self._step_param(layer.weight, weight, groups, group, keep)
            if layer.bias is not None and bias is not None:
                self._step_param(layer.bias, bias, groups, group, keep)

    def _gradient(self, layer: CapturedLayer, keep: Tensor | None) -> Tensor:
        """Joint gradient matrix, zero where there is none or the batch is to be skipped."""
        weight, bias = layer.weight.grad, None
        if weight is None:
            weight = torch.zeros_like(layer.weight)
        if layer.bias is not None:
            bias = layer.bias.grad
            bias = torch.zeros_like(layer.bias) if bias is None else bias.to(weight.dtype)
        matrix = layer.statistics.layer.to_matrix(weight, bias)
        return matrix if keep is None else torch.where(keep.to(matrix.device) > 0, matrix, 0)

    def _clip(
        self,
        layers: list[CapturedLayer],
        matrices: list[Tensor],
        natural: list[Tensor],
        groups: dict[int, Group],
    ) -> None:
        chosen = [i for i, la in enumerate(layers) if groups[id(la.weight)]["kl_clip"] is not None]
        if not chosen:
            return
        owners = [groups[id(layers[i].weight)] for i in chosen]
        factor = trust_region(
            [natural[i] for i in chosen],
            [matrices[i] for i in chosen],
            [group["lr"] for group in owners],
            min(group["kl_clip"] for group in owners),
        )
        for i in chosen:
            natural[i] = natural[i] * factor.to(natural[i].device, natural[i].dtype)

    def _graft(self, layer: CapturedLayer, group: Group, matrix: Tensor, update: Tensor) -> Tensor:
        """Give an update the size that the group asks for, over what is trained of the layer."""
        kind = group["grafting"]
        if kind is None:
            return update
        if layer.bias is not None and layer.bias.grad is None:
            update = update.clone()
            update[:, :, -1] = 0
        if kind == "rms":
            return grafted(update, RMS)
        if kind == "sgd":
            return grafted(update, torch.linalg.vector_norm(matrix) / matrix.numel() ** 0.5)
        state = self.state[layer.weight]
        _, beta = group["fallback_betas"]
        step = group["step"] + 1
        size = adam_size(matrix, state["exp_avg_sq"], step, beta, group["fallback_eps"])
        return grafted(update, size)

    def _step_param(
        self,
        param: Tensor,
        update: Tensor,
        groups: dict[int, Group],
        layer_group: Group,
        keep: Tensor | None,
    ) -> None:
        if param.grad is None:
            return
        group = groups.get(id(param), layer_group)
        apply_update_(
            param,
            update,
            self.state.get(param, {}).get("momentum_buffer"),
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            decoupled=layer_group["decoupled_weight_decay"],
            averaged=layer_group["grafting"] is not None,
            keep=keep,
        )

    def _step_others(self, groups: dict[int, Group], skip: Tensor | None) -> None:
        by_group: dict[int, list[Tensor]] = {}
        for other in self._others:
            if other.param.grad is not None:
                by_group.setdefault(id(groups[id(other.param)]), []).append(other.param)
        for group in self.param_groups:
            params = by_group.get(id(group), [])
            if params:
                fallback.update(
                    params, [self.state.get(param, {}) for param in params], group, skip
                )

    def _advance(self, updated: list[CapturedLayer], groups: dict[int, Group]) -> None:
        for layer in updated:
            layer.last_update = groups[id(layer.weight)]["step"]
            self.state[layer.weight]["last_update"].fill_(layer.last_update)
        for layer in self._layers:
            layer.statistics.clear()
        for group in self.param_groups:
            group["step"] += 1
            if self._is_due(group, group["step"]):
                group["last_due"] = group["step"]
        self._set_taps()

    def _undo(self, updated: list[CapturedLayer]) -> Callable[[], None]:
        """What to do once a step turns out to have been skipped on the device."""

        def undo() -> None:
            for layer in updated:
                layer.last_update -= 1  # due again
                self.state[layer.weight]["last_update"].fill_(layer.last_update)
            self._set_taps()

        return undo

    def _rests(self) -> bool:
        """Whether every learning rate is zero."""
        lrs = [group["lr"] for group in self.param_groups]
        on_host = all(not isinstance(lr, Tensor) or lr.device.type == "cpu" for lr in lrs)
        return on_host and all(float(lr) == 0 for lr in lrs)

    def _check_gradients(self) -> None:
        missing = []
        for name, param in self._named():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise ValueError(
                    f"{name}.grad: got layout {param.grad.layout}. Supported: dense gradients; "
                    "an Embedding gives them with sparse=False."
                )
            if param.grad is None and param.requires_grad:
                missing.append(name)
        if missing:
            self._warn_once(
                "missing",
                f"No gradient reached {_some(missing)}; a step leaves them as they are. This is "
                "normal for a part of the model that did not run.",
            )

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self._layers:
            prefix = f"{layer.name}." if layer.name else ""
            yield f"{prefix}weight", layer.weight
            if layer.bias is not None:
                yield f"{prefix}bias", layer.bias
        for other in self._others:
            yield other.name, other.param

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=5)

    # ---------------------------------------------------------------- state

    def _ensure_state(self, groups: dict[int, Group]) -> None:
        for layer in self._layers:
            if not layer.statistics.bound:
                continue
            group = groups[id(layer.weight)]
            for param in layer.params():
                if param.grad is None or self.state.get(param):
                    continue
                if param is layer.weight:
                    self.state[param].update(self._layer_state(layer, group))
                if groups.get(id(param), group)["momentum"]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        for other in self._others:
            if other.param.grad is not None and not self.state.get(other.param):
                group = groups[id(other.param)]
                self.state[other.param].update(fallback.init_state(other.param, group))

    def _layer_state(self, layer: CapturedLayer, group: Group) -> dict[str, Tensor]:
        state = self._init_layer(layer, group)
        state["last_update"] = torch.tensor(-1)
        if group["grafting"] == "adam":
            shape = (layer.statistics.layer.groups, layer.statistics.c.dim, layer.statistics.k.dim)
            state["exp_avg_sq"] = layer.weight.new_zeros(shape)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and drop statistics that no step has taken.

        Args:
            set_to_none: Set gradients to None instead of zero.
        """
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.statistics.clear()

    @contextmanager
    def no_stats(self) -> Iterator[None]:
        """Passes inside this context contribute no statistics."""
        before = [(layer.statistics, layer.statistics.on) for layer in self._layers]
        for statistics, _ in before:
            statistics.on = False
        try:
            yield
        finally:
            for statistics, on in before:
                statistics.on = on

    def state_dict(self) -> dict[str, Any]:
        """State of every parameter and hyper-parameters of every group, without callables."""
        self._verdicts.receive(wait=True)
        saved = super().state_dict()
        saved["param_groups"] = [
            {key: value for key, value in group.items() if not callable(value)}
            for group in saved["param_groups"]
        ]
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the argument is neither changed nor kept.

        Callables and hyper-parameters that it lacks stay as they are.

        Args:
            state_dict: A saved state.
        """
        live = [dict(group) for group in self.param_groups]
        super().load_state_dict(copy.copy(state_dict))
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):  # torch would cast it to the parameter's dtype
                    on_host = name == "last_update"
                    device = torch.device("cpu") if on_host else param.device
                    self.state[param][name] = value.detach().to(device, copy=True)
        for group, before in zip(self.param_groups, live, strict=True):
            for name, value in before.items():
                group.setdefault(name, value)
        for layer in self._layers:
            mark = self.state.get(layer.weight, {}).get("last_update")
            layer.last_update = -1 if mark is None else int(mark)
            layer.statistics.clear()
        self._set_taps()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Capture anew in a copied or unpickled optimizer."""
        super().__setstate__(state)
        if not hasattr(self, "_ready"):
            self.__dict__.update(_FRESH())
            self._sort_parameters()
            for layer in self._layers:
                mark = self.state.get(layer.weight, {}).get("last_update")
                layer.last_update = -1 if mark is None else int(mark)
            self._set_taps()

    # ---------------------------------------------------------------- for the user

    @property
    def skipped_updates(self) -> int:
        """Number of batches skipped for non-finite gradients or statistics; waits for them."""
        return self._skipped.total

    def report(self) -> Report:
        """How every parameter is trained: a list of rows that prints as a table."""
        rows = Report()
        for layer in self._layers:
            statistics = layer.statistics
            dims: tuple[int, ...] = ()
            structure = "-"
            if statistics.bound:
                dims = (statistics.layer.groups, statistics.k.dim, statistics.c.dim)
                structure = f"{statistics.k.name}, {statistics.c.name}"
            waiting = "" if layer.last_update >= 0 else "no statistics yet"
            prefix = f"{layer.name}." if layer.name else ""
            for name, param in zip(("weight", "bias"), layer.params(), strict=False):
                rows.append(
                    Row(
                        prefix + name,
                        layer.kind,
                        _shape(param),
                        statistics.approx,
                        structure,
                        dims,
                        self._bytes(param),
                        layer.last_update if layer.last_update >= 0 else None,
                        waiting,
                    )
                )
        for other in self._others:
            size = self._bytes(other.param)
            shape = _shape(other.param)
            rows.append(Row(other.name, other.kind, shape, "", "", (), size, None, other.reason))
        return rows

    def _bytes(self, param: Tensor) -> int:
        state = self.state.get(param, {})
        tensors: Iterable[Any] = state.values()
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def close(self) -> None:
        """Remove every hook; afterwards the factors stay as they are."""
        for layer in self._layers:
            layer.close()
        if self._search is not None:
            self._search.remove()


_GROUP_KEYS = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_lr", "last_due")


def _FRESH() -> dict[str, Any]:
    """Attributes of an optimizer that has captured nothing."""
    return {
        "_ready": True,
        "_layers": [],
        "_others": [],
        "_roots": [],
        "_grad_scaler": None,
        "_skipped": SkippedUpdates(),
        "_verdicts": Verdicts(),
        "_search": None,
        "_warned": set(),
    }


def _shape(param: Tensor) -> tuple[int, ...]:
    lazy = torch.nn.parameter.is_lazy(param)
    return () if lazy else tuple(param.shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
