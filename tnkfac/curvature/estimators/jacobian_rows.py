"""Vector-Jacobian products of every sample with respect to every parameter."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from tnkfac.curvature.capture.recording import Call, gradients
from tnkfac.curvature.estimators.data import check_dependence
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.moments.second_moment import accumulation_dtype


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; tied ones once.

    Raises:
        ValueError: If there is none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: got no parameter that requires a gradient.")
    return parameters


def owners(parameters: dict[str, nn.Parameter], model: nn.Module) -> list[nn.Module]:
    """Modules that hold some of the parameters themselves."""
    wanted = {id(p) for p in parameters.values()}
    return [m for m in model.modules() if any(id(p) in wanted for p in m._parameters.values())]


def check_independent(model: nn.Module) -> None:
    """Raise a ``ValueError`` if samples of a batch see each other."""
    for name, module in model.named_modules():
        batch_statistics = module.training or getattr(module, "running_mean", None) is None
        if isinstance(module, _BatchNorm) and batch_statistics:
            raise ValueError(
                f"model: {type(module).__name__} {name!r} takes statistics of the batch, so that "
                "samples have no gradients of their own. Supported: model.eval()."
            )


@dataclass(frozen=True)
class _Use:
    """One call in which a parameter is used under some name of its module."""

    module: nn.Module
    name: str
    call: Call

    @property
    def layered(self) -> bool:
        """Whether this is the weight or bias of a supported layer."""
        return self.call.layer is not None and self.name in ("weight", "bias")

    @property
    def sliceable(self) -> bool:
        """Whether the rows of some output channels are those of a smaller layer."""
        layer = self.call.layer
        return layer is not None and self.name == "weight" and layer.groups == 1

    def rows(self, g: Tensor, samples: slice, channels: slice | None) -> Tensor:
        """``[n, *parameter.shape]`` for some samples (and output channels of a weight)."""
        layer, x = self.call.taken()
        x, g = x[samples], g[samples]
        dtype = accumulation_dtype(g.dtype)
        g = g.to(dtype)
        if layer is None or not self.layered:
            return self._mapped(x, g)
        g = layer.standard_output(g)
        if self.name == "bias":
            return layer.sample_bias_gradients(g)
        if channels is not None:
            layer, g = layer.output_slice(g, channels.start, channels.stop)
        return layer.sample_gradients(_standard_input(layer, x, dtype), g)

    def squares(self, g: Tensor) -> Tensor | None:
        """Sum of the squares of all rows, where it needs none of them; else None."""
        layer, x = self.call.taken()
        if layer is None or self.name != "weight":
            return None
        dtype = accumulation_dtype(g.dtype)
        x = _standard_input(layer, x, dtype)
        return layer.sample_squares(x, layer.standard_output(g.to(dtype)))

    def _mapped(self, x: Tensor, g: Tensor) -> Tensor:
        """Any module, mapped over samples."""
        x = x.to(g.dtype) if x.is_floating_point() else x
        state = {
            name: tensor.detach().to(g.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers())
        }

        def sample_row(x: Tensor, g: Tensor) -> Tensor:
            def run(parameter: Tensor) -> Tensor:
                output: Tensor = functional_call(
                    self.module, state | {self.name: parameter}, (x.unsqueeze(0),)
                )
                return output.squeeze(0)

            row: Tensor = vjp(run, state[self.name])[1](g)[0]
            return row

        rows: Tensor = vmap(sample_row)(x, g)
        return rows


def _standard_input(layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    return layer.standard_input(x if layer.reads_indices else x.to(dtype))


class SampleRows:
    """Per-sample vector-Jacobian products of the outputs of one batch.

    Where a parameter belongs to a supported layer, or to a module that treats samples
    independently, all samples are done at once; that this holds is checked on the first sample
    with a backward pass of its own. All other parameters take a backward pass for every sample.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        calls: dict[nn.Module, list[Call]],
        outputs: Tensor,
    ) -> None:
        """Sort the parameters.

        Args:
            parameters: Trainable parameters by name.
            calls: Calls of the modules that hold them.
            outputs: Outputs ``[N, ...]`` of the model.

        Raises:
            ValueError: If the outputs depend on no parameter.
        """
        check_dependence(outputs)
        self.samples = outputs.shape[0]
        self.like = outputs.detach()
        self._parameters = parameters
        self._outputs = outputs
        self._calls = [call for recorded in calls.values() for call in recorded]
        names = {id(p): name for name, p in parameters.items()}
        self._uses: dict[str, list[tuple[int, _Use]]] = {}
        index = 0
        for module, recorded in calls.items():
            for call in recorded:
                for attribute, p in module._parameters.items():
                    if p is not None and id(p) in names:
                        use = (index, _Use(module, attribute, call))
                        self._uses.setdefault(names[id(p)], []).append(use)
                index += 1
        self._alone: list[str] = []
        self._checked = False

    def backpropagate(self, vector: Tensor) -> list[Tensor]:
        """Gradients with respect to the outputs of all calls, for :meth:`rows`."""
        grads = gradients(self._calls, self._outputs, vector)
        if not self._checked:
            self._checked = True
            self._check(vector, grads)
        return grads

    @property
    def together(self) -> list[str]:
        """Parameters whose samples are done at once."""
        return list(self._uses)

    @property
    def unused(self) -> list[str]:
        """Parameters that the outputs do not depend on."""
        return [n for n in self._parameters if n not in self._uses and n not in self._alone]

    def sliceable(self, name: str) -> bool:
        """Whether :meth:`rows` of this parameter takes channels."""
        return all(use.sliceable for _, use in self._uses[name])

    def channels(self, name: str) -> int:
        """Output channels of the layer of a weight."""
        layer = self._uses[name][0][1].call.layer
        assert layer is not None
        return layer.out_channels

    def rows(
        self, name: str, grads: Sequence[Tensor], samples: slice, channels: slice | None = None
    ) -> Tensor:
        """Gradients of some samples, ``[n, *parameter.shape]``.

        Args:
            name: One of :attr:`together`.
            grads: From :meth:`backpropagate`.
            samples: Which samples.
            channels: Which output channels, if not all.
        """
        parts = [use.rows(grads[index], samples, channels) for index, use in self._uses[name]]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def squares(self, name: str, grads: Sequence[Tensor], most: int) -> Tensor:
        """Sum over samples of the squared gradients of a parameter, shaped like it.

        Args:
            name: One of :attr:`together`.
            grads: From :meth:`backpropagate`.
            most: Numbers of the gradients that are held at one time.
        """
        if len(self._uses[name]) == 1:
            ((index, use),) = self._uses[name]
            whole = use.squares(grads[index])
            if whole is not None:
                return whole
        step = max(1, most // max(1, self._parameters[name].numel()))
        parts = (slice(first, first + step) for first in range(0, self.samples, step))
        squares = (self.rows(name, grads, part).square().sum(0) for part in parts)
        return functools.reduce(torch.add, squares)

    def one_by_one(self, vector: Tensor) -> Iterator[tuple[int, str, Tensor]]:
        """Sample, parameter and gradient of all parameters that are not done at once."""
        if not self._alone:
            return
        for n in range(self.samples):
            for name, row in zip(self._alone, self._sample(vector, n, self._alone), strict=True):
                yield n, name, row

    def _sample(self, vector: Tensor, n: int, names: Sequence[str]) -> list[Tensor]:
        """Gradients of one sample by a backward pass."""
        masked = torch.zeros_like(vector)
        masked[n] = vector[n]
        wanted = [self._parameters[name] for name in names]
        grads = torch.autograd.grad(
            self._outputs, wanted, masked, retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)]

    def _check(self, vector: Tensor, grads: Sequence[Tensor]) -> None:
        """Keep together only what agrees with a backward pass of the first sample."""
        parameters = list(self._parameters.values())
        everything = torch.autograd.grad(
            self._outputs, parameters, vector, retain_graph=True, allow_unused=True
        )
        used = [n for n, g in zip(self._parameters, everything, strict=True) if g is not None]
        expected = dict(zip(used, self._sample(vector, 0, used), strict=True))
        self._uses = {
            name: uses
            for name, uses in self._uses.items()
            if name in expected
            and all(self._fits(use.call) for _, use in uses)
            and self._agrees(name, grads, expected[name])
        }
        self._alone = [name for name in used if name not in self._uses]

    def _fits(self, call: Call) -> bool:
        x, n = call.x, self.samples
        return x.ndim > 0 and x.shape[0] == n and len(call.shape) > 0 and call.shape[0] == n

    def _agrees(self, name: str, grads: Sequence[Tensor], expected: Tensor) -> bool:
        try:
            row = self.rows(name, grads, slice(0, 1))[0]
        except Exception:  # whatever a module of the user's raises under vmap
            return False
        if row.shape != expected.shape:
            return False
        tolerance = min(0.1, 100 * torch.finfo(expected.dtype).eps ** 0.75)
        error = (row - expected.to(row.dtype)).norm()
        return bool(error <= tolerance * expected.to(row.dtype).norm())
