"""What a step launches on CUDA, counted on tensors without numbers: no GPU is needed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tnkfac
from profile_step import VIEWS
from tnkfac.curvature.moments import position_sums
from tnkfac.curvature.structures import RaggedDiagonal
from tnkfac.optim import base
from tnkfac.optim.step import apply, grafting, triton_step

FREE = (*VIEWS, "device", "new_empty", "scalar_tensor", "promote_types")
"""What launches nothing."""
LARGEST_LISTS = {"_foreach_norm": 3, "_foreach_copy_": 1, "_fused_sgd_": 2, "_fused_adamw_": 2}
"""At most so many launches for lists as long as these; one for all others."""


class Launches(TorchDispatchMode):
    """Counts operations on CUDA, and what the stubs of kernels report."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name not in FREE and any(t.device.type == "cuda" for t in tensors):
            lists = [a for a in args if isinstance(a, (list, tuple)) and a]
            single = name.startswith("_foreach") and all(isinstance(a, Tensor) for a in lists[0])
            uneven = single and len(lists) > 1 and isinstance(lists[1][0], Tensor)
            uneven = uneven and any(a.shape != b.shape for a, b in zip(*lists[:2], strict=True))
            count = len(lists[0]) if uneven else LARGEST_LISTS.get(name, 1)
            self.seen += [name] * count
        return None if name == "_fused_sgd_" else func(*args, **(kwargs or {}))


class Flags:
    """Nothing waits for a device here."""

    def send(self, skip: Tensor, undo: Any) -> None: ...
    def receive(self, wait: bool = False) -> None: ...


class Kernels:
    """In the place of Triton's: what they return, and that they were launched."""

    BLOCK = 1024

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def usable(self, tensor: Tensor) -> bool:
        return True

    def squared_sums(self, x: Tensor, unfolding: Any, sizes: tuple[int, ...]) -> Tensor:
        self.seen += ["kernel", "sum"]
        taps = 1 if unfolding is None else torch.Size(unfolding.kernel_size).numel()
        return x.new_empty(x.shape[1], taps, dtype=torch.float32)

    def scaled(self, table: Any, tiles: Any, lengths: Any, sizes: Any, n: int, kind: Any) -> Tensor:
        self.seen += ["kernel"] * 3
        return torch.empty(n, dtype=kind, device="cuda")


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    launches = Launches()
    kernels = Kernels(launches.seen)
    monkeypatch.setattr(triton_step, "triton_kernels", lambda like: kernels)
    monkeypatch.setattr(position_sums, "triton_kernels", lambda tensor: kernels)
    monkeypatch.setattr(apply, "_PLAIN", (*apply._PLAIN, FakeTensor))
    monkeypatch.setattr(base, "AsyncFlags", Flags)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0)

    def sent(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(torch.tensor(numbers).shape, dtype=dtype, device=device)

    monkeypatch.setattr(triton_step, "_sent", sent)
    for cached in (triton_step._tiles, RaggedDiagonal.of, grafting._kept):
        cached.cache_clear()
    yield launches
    for cached in (triton_step._tiles, RaggedDiagonal.of, grafting._kept):
        cached.cache_clear()


@pytest.mark.parametrize("T", [1, 100], ids=["update", "no update"])
def test_a_step_of_resnet18(T: int, counting: Launches) -> None:
    """At most 60 in a step, 140 with an update of the factors, however many layers there are.

    A number on the host would be an error: tensors have none here.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = torchvision.models.resnet18(num_classes=100)
        optimizer = tnkfac.SINGD(
            model.parameters(), structures="diagonal", kfac_approx="reduce", T=T
        )
        for step in range(2):
            optimizer.zero_grad()
            model(torch.empty(2, 3, 64, 64, device="cuda"))
            for param in model.parameters():
                param.grad = torch.empty_like(param)
            layers = optimizer._registry.layers
            assert len(layers) == 21
            optimizer._ensure_state()
            for layer in layers:
                mark = optimizer.state[layer.weight]["last_update"]
                mark.fill_(max(int(mark), step))  # not a start, which decomposes
                leaves = layer.statistics.leaves(layer.weight)
                if T == 1:
                    for leaf in leaves:
                        leaf.grad = torch.empty(leaf.shape, device="cuda")
            counting.seen.clear()
            with counting:
                optimizer.step()
    assert counting.seen.count("kernel") == 3
    assert 10 < len(counting.seen) <= (140 if T == 1 else 60), counting.seen


@pytest.mark.parametrize("kernels", [True, False])
def test_a_hook(kernels: bool, counting: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(position_sums, "triton_kernels", lambda tensor: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            module = torch.nn.Conv2d(64, 64, 3, padding=1)
        optimizer = tnkfac.SINGD(module.parameters(), structures="diagonal", kfac_approx="reduce")
        x = torch.empty(8, 64, 56, 56, device="cuda")
        module(x)
        (layer,) = optimizer._registry.layers
        statistics = layer.statistics
        with counting:
            found = statistics.measure(statistics.layer, x, torch.empty_like(x), None)
    assert found is not None
    assert 2 <= len(counting.seen) <= 10, counting.seen
