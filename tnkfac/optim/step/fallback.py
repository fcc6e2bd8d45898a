"""The optimizer of every parameter that has no Kronecker-factored curvature.

The update itself is torch's own AdamW or SGD.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from tnkfac.curvature import switch
from tnkfac.optim.options import Group
from tnkfac.optim.params.sharding import local_shard

State = dict[str, Tensor]


def share_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether numbers lie in memory in the same order and without gaps.

    Fused kernels walk through the memory of parameter, gradient and state in step; on the CPU they
    look neither at strides nor at a sign that is yet to be applied.
    """
    first = tensors[0]
    strides = first.stride()
    if any(tensor.stride() != strides or tensor.is_neg() for tensor in tensors):
        return False
    return first.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(first))


def init_state(param: Tensor, group: Group) -> State:
    """State of one parameter; its keys depend on the group only.

    Half-precision parameters have moments in float32: in bfloat16 a slow moving average would not
    decay, and in float16 small squares are zero.
    """
    param = _single(param.detach())
    if group["fallback"] == "adamw":
        return {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }
    return {"momentum_buffer": torch.zeros_like(param)}


def _single(tensor: Tensor) -> Tensor:
    """In float32 if it is in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _real(tensor: Tensor) -> Tensor:
    """Real and imaginary parts as numbers of their own, which share its memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _mapped(change: Callable[[Tensor], Tensor], state: State) -> State:
    return {key: change(value) for key, value in state.items()}


def update(
    params: list[Tensor],
    states: list[State],
    group: Group,
    found_inf: Tensor | None = None,
) -> None:
    """One step for parameters of one group whose gradients are all there.

    Args:
        params: Parameters.
        states: Their states, from :func:`init_state`.
        found_inf: On CUDA, a scalar tensor that turns the step into none where it is one.
        group: Their group. Without ``fallback_lr`` the group's ``lr`` is used; with it, it is
            scaled by what a scheduler has made of the group's ``lr``.
    """
    by_kind: dict[tuple[bool, object], list[tuple[Tensor, Tensor, State]]] = defaultdict(list)
    for param, state in zip(params, states, strict=True):
        whole, shard = local_shard(param.detach()), _mapped(local_shard, state)
        assert param.grad is not None
        grad = _single(local_shard(param.grad))
        moments = [value for key, value in shard.items() if key != "step"]
        alike = share_layout([_single(whole), grad, *moments])
        by_kind[alike, (type(param), param.device, param.dtype)].append((whole, grad, shard))
    for (alike, _), entries in by_kind.items():
        wholes = [whole for whole, _, _ in entries]
        grads = [grad for _, grad, _ in entries]
        shards = [shard for _, _, shard in entries]
        single = [_single(whole) for whole in wholes]
        if found_inf is None or (alike and not single[0].is_complex()):
            _update(single, grads, shards, group, found_inf, alike)
        else:  # only a fused kernel can skip a step without waiting for the device
            single = [param.contiguous() for param in single]
            grads = [grad.resolve_conj().resolve_neg().contiguous() for grad in grads]
            compact = [_mapped(Tensor.contiguous, shard) for shard in shards]
            _update(
                [_real(param) for param in single],
                [_real(grad) for grad in grads],
                [_mapped(_real, shard) for shard in compact],
                group,
                found_inf,
                True,
            )
            for shard, new in zip(shards, compact, strict=True):
                torch._foreach_copy_(list(shard.values()), list(new.values()))
        changed = [i for i, whole in enumerate(wholes) if whole is not single[i]]
        if changed:
            torch._foreach_copy_([wholes[i] for i in changed], [single[i] for i in changed])


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: Group,
    found_inf: Tensor | None,
    alike: bool,
) -> None:
    """Step for tensors of one kind; ``alike``: fused kernels may take them."""
    decay = group["fallback_weight_decay"]
    decay = group["weight_decay"] if decay is None else decay
    lr = learning_rate(group)
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    fused = found_inf is not None or (not switch.plain and params[0].device.type in ("cpu", "cuda"))
    fused = fused and alike and params[0].is_floating_point()
    kernel = {"fused": True, "found_inf": found_inf} if fused else {"foreach": True}
    if group["fallback"] == "adamw":
        beta1, beta2 = group["fallback_betas"]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            **kernel,
            capturable=params[0].is_cuda and not fused,
            has_complex=params[0].is_complex(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=group["fallback_eps"],
            maximize=False,
        )
        return
    sgd(
        params,
        grads,
        [state["momentum_buffer"] for state in states],
        **kernel,
        weight_decay=decay,
        momentum=_momentum(group),
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        has_sparse_grad=False,
    )


def learning_rate(group: Group) -> Tensor | float:
    """Learning rate of the fallback at this step."""
    lr: Tensor | float | None = group["fallback_lr"]
    of_group: Tensor | float = group["lr"]
    if lr is None:
        return of_group
    return lr if group["base_lr"] == 0 else lr * (of_group / group["base_lr"])


def _momentum(group: Group) -> float:
    momentum = group["fallback_momentum"]
    return float(group["momentum"] if momentum is None else momentum)
