"""What every process does; started by ``test_ddp``, once for all scenarios."""

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forking import start
from network import batch, loss, network, using
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnkfac import KFAC, SINGD
from tnkfac.optim import base
from tnkfac.optim.distributed import buckets, leave, placing, reduction
from tnkfac.optim.params import state as states

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SINGD": (SINGD, {"T": 2, "structures": "dense"}),
    "SINGD auto": (SINGD, {"T": 2}),
    "SINGD diagonal": (SINGD, {"T": 2, "structures": "diagonal"}),
    "SINGD Toeplitz": (SINGD, {"T": 2, "structures": ("triltoeplitz", "hierarchical2_1")}),
    "SINGD reduce, blocks, summed": (
        SINGD,
        {"T": 1, "structures": "block3diagonal", "kfac_approx": "reduce", "loss_average": None},
    ),
    "SINGD paper": (SINGD, {**SINGD.REFERENCE, "T": 2, "loss_average": "batch+sequence"}),
    "KFAC": (KFAC, {"inv_update_steps": 2}),
    "KFAC trust region": (KFAC, {"kl_clip": 1e-3, "damping": 0.1}),
    # each pixel of "up" meets one tap, so that its eigenvectors are not unique
    "KFAC ekfac": (KFAC, {"compute_method": "ekfac", "skip_layers": ("up",)}),
    "KFAC kfac-pytorch": (KFAC, {"normalization": "kfac-pytorch"}),
}
SCENARIOS: list[Callable[[], None]] = []


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    """Run it in every process."""
    SCENARIOS.append(function)
    return function


def part(tensor: Tensor, sizes: list[int]) -> Tensor:
    """What this process gets of a batch."""
    return torch.split(tensor, sizes)[dist.get_rank()]


def even(size: int) -> list[int]:
    return [size // dist.get_world_size()] * dist.get_world_size()


def built(
    name: str, first: str = "model", options: Any = None, **wrap: Any
) -> tuple[nn.Module, Any]:
    """A wrapped model and its optimizer, in either order."""
    cls, own = OPTIMIZERS[name]
    options = {**own, **(options or {})}
    model = network()
    if first == "model":
        wrapped = DistributedDataParallel(model, **wrap)
        return wrapped, cls(wrapped.parameters(), lr=0.01, **options)
    optimizer = cls(model.parameters(), lr=0.01, **options)
    return DistributedDataParallel(model, **wrap), optimizer


def state_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    found = [p.detach() for p in model.parameters()]
    for param in model.parameters():
        found += [v for v in optimizer.state[param].values() if isinstance(v, Tensor)]
    return found


def assert_same_everywhere(tensors: list[Tensor]) -> None:
    """Bit for bit."""
    flat = torch.cat([t.double().reshape(-1) for t in tensors])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    assert all(torch.equal(other, flat) for other in every)


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Averaged over samples, or summed."""
    summed = OPTIMIZERS[name][1].get("loss_average", "") is None
    return (lambda out, y: loss(out, y) * len(y)) if summed else loss


def train(model: Any, optimizer: Any, name: str, step: int, sizes: list[int], micro: int) -> None:
    """One step of this process on its part, of several micro-batches if asked for."""
    optimizer.zero_grad()
    criterion = loss_of(name)
    pieces = [torch.chunk(part(t, sizes), micro) for t in batch(step, sum(sizes))]
    for index, (x, y) in enumerate(zip(*pieces, strict=True)):
        last = index + 1 == micro
        with nullcontext() if last else model.no_sync():
            (criterion(model(x), y) / (1 if criterion is not loss else micro)).backward()
    optimizer.step()


def whole(model: nn.Module, optimizer: Any, name: str, step: int, size: int) -> None:
    """One step of one process on the whole batch."""
    x, y = batch(step, size)
    optimizer.zero_grad()
    loss_of(name)(model(x), y).backward()
    optimizer.step()


@scenario
def ranks_equal_one_process() -> None:
    """Six steps on even parts of a batch, also as micro-batches without communication.

    With a summed loss gradients are averaged all the same. The defaults do not see a scale, but for
    the ``eps`` of AdamW.
    """
    few = dist.get_world_size() > 2
    for name, (cls, options) in OPTIMIZERS.items():
        for micro, first in ((2, "optimizer"),) if few else ((1, "model"), (2, "optimizer")):
            single = network()
            reference = cls(single.parameters(), lr=0.01, **options)
            model, optimizer = built(name, first)
            for step in range(6):
                whole(single, reference, name, step, 8)
                train(model, optimizer, name, step, even(8), micro)
            for p, q in zip(model.parameters(), single.parameters(), strict=True):
                error = 1e-11 if loss_of(name) is loss else 1e-6
                close = torch.allclose(p, q, rtol=error, atol=error)
                assert close, (name, micro, float((p - q).abs().max()))
            assert_same_everywhere(state_of(model.module, optimizer))
            assert optimizer._processes.count == dist.get_world_size()
            optimizer.close()


def averaged_by_hand(model: nn.Module, optimizer: Any, name: str, step: int) -> None:
    """One step on this process's part of a batch; nothing wraps the model."""
    x, y = (part(t, even(8)) for t in batch(step, 8))
    optimizer.zero_grad()
    loss_of(name)(model(x), y).backward()
    for param in model.parameters():
        dist.all_reduce(param.grad)
        param.grad /= dist.get_world_size()
    optimizer.step()


@scenario
def weights_that_are_used_equal_one_process() -> None:
    """Those of attention, packed ones and stacks."""
    for name in ("SINGD auto", "SINGD diagonal", "KFAC"):
        cls, options = OPTIMIZERS[name]
        single, model = using(), DistributedDataParallel(using())
        reference = cls(single.parameters(), lr=0.01, **options)
        optimizer = cls(model.parameters(), lr=0.01, **options)
        for step in range(4):
            whole(single, reference, name, step, 8)
            train(model, optimizer, name, step, even(8), 2)
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-9), (name, float((p - q).abs().max()))
        assert all(row.last_update is not None for row in optimizer.report())
        optimizer.close()


@scenario
def gradients_averaged_by_hand_equal_one_process() -> None:
    """Where the group is named, whatever part of the preconditioners each process keeps."""
    few = dist.get_world_size() > 2
    for name in ("SINGD", "SINGD Toeplitz", "KFAC") if few else OPTIMIZERS:
        cls, options = OPTIMIZERS[name]
        for fraction in (1.0, 1 / dist.get_world_size()):
            single, model = network(), network()
            reference = cls(single.parameters(), lr=0.01, **options)
            optimizer = cls(
                model.parameters(),
                lr=0.01,
                process_group=dist.group.WORLD,
                grad_worker_fraction=fraction,
                **options,
            )
            for step in range(6):
                whole(single, reference, name, step, 8)
                averaged_by_hand(model, optimizer, name, step)
            error = 1e-11 if loss_of(name) is loss else 1e-6
            for p, q in zip(model.parameters(), single.parameters(), strict=True):
                assert torch.allclose(p, q, rtol=error, atol=error), (name, fraction)
            assert_same_everywhere([p.detach() for p in model.parameters()])
            optimizer.close()


@scenario
def processes_that_nothing_ties_together_are_told_of() -> None:
    """Once, at the first step; not where the user has said how it is, or the model is wrapped."""
    told = {
        "auto": lambda: built_alone("auto"),
        "None": lambda: built_alone(None),
        "group": lambda: built_alone(dist.group.WORLD),
        "wrapped": lambda: built("SINGD"),
    }
    for way, build in told.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, optimizer = build()
            for step in range(3):
                averaged_by_hand(model, optimizer, "SINGD", step)
            optimizer.close()
        texts = [str(w.message) for w in caught if "process_group=" in str(w.message)]
        assert len(texts) == (way == "auto"), (way, texts)
    with pytest.raises(TypeError, match=r"process_group: got 'world'. Supported: 'auto', None"):
        built_alone("world")


def built_alone(process_group: Any) -> tuple[nn.Module, Any]:
    model = network()
    return model, SINGD(model.parameters(), lr=0.01, T=2, process_group=process_group)


@scenario
def uneven_parts_give_the_mean_of_local_means() -> None:
    """Inputs are averaged over all samples, output gradients as the loss is: per process."""
    world = dist.get_world_size()
    sizes = [3, 5, 2, 4][:world]
    model, optimizer = built("SINGD")
    x, y = (part(t, sizes) for t in batch(0, sum(sizes)))
    loss(model(x), y).backward()
    layers = optimizer._registry.layers
    local = [[s.clone() for s in layer.statistics.sums()] for layer in layers]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, local)
    optimizer._processes.look(model.parameters)
    optimizer._processes.send(layers)()
    for place, layer in enumerate(layers):
        found = layer.statistics.factors()
        parts = [of_rank[place] for of_rank in everyone]
        rows = sum(sums[-1][1] for sums in parts)
        for i, A in enumerate(found.A):
            expected = sum(sums[i] for sums in parts) / rows
            torch.testing.assert_close(A, expected, rtol=1e-12, atol=1e-14)
        for i, B in enumerate(found.B, len(found.A)):
            expected = sum(sums[-1][2] * sums[i] for sums in parts) / world
            torch.testing.assert_close(B, expected, rtol=1e-12, atol=1e-14)


@scenario
def ranks_stay_bit_identical() -> None:
    """Thirty steps on uneven parts."""
    sizes = [3, 5, 2, 4][: dist.get_world_size()]
    for name in ("SINGD", "SINGD diagonal", "KFAC"):
        model, optimizer = built(name)
        for step in range(30):
            train(model, optimizer, name, step, sizes, 1)
        assert_same_everywhere(state_of(model.module, optimizer))
        optimizer.close()


@scenario
def a_layer_that_some_did_not_run() -> None:
    """It does not hang the others; what they have measured counts. So with one that nobody ran."""
    for name in ("SINGD", "SINGD diagonal", "KFAC"):
        model, optimizer = built(name, find_unused_parameters=True)
        for step in range(4):
            optimizer.zero_grad()
            x, y = (part(t, even(8)) for t in batch(step, 8))
            runs = step > 0 and dist.get_rank() == 0
            loss(model(x, extra=runs), y).backward()
            optimizer.step()
            updates = {row.name: row.last_update for row in optimizer.report()}
            assert (updates["extra.weight"] is not None) == (step > 0), (name, step)
        assert_same_everywhere(state_of(model.module, optimizer))
        optimizer.close()


@scenario
def a_batch_that_is_not_finite_is_skipped_by_all() -> None:
    """The statistics of one process are; then the gradients of one, which reach all of them."""
    for name in ("SINGD", "SINGD diagonal", "KFAC"):
        for kind in ("statistics", "gradients"):
            model, optimizer = built(name)
            for step in range(2):  # the next one updates factors
                train(model, optimizer, name, step, even(8), 1)
            before = [t.clone() for t in state_of(model.module, optimizer)]
            x, y = (part(t, even(8)) for t in batch(1, 8))
            optimizer.zero_grad()
            if kind == "gradients" and dist.get_rank() == 1:
                x[0] = float("nan")
            loss(model(x), y).backward()
            if kind == "statistics" and dist.get_rank() == 1:
                optimizer._registry.layers[0].statistics.hidden_leaves[0].grad[:] = float("inf")
            optimizer.step()
            assert optimizer.skipped_updates == 1
            for a, b in zip(before, state_of(model.module, optimizer), strict=True):
                assert torch.equal(a, b)
            train(model, optimizer, name, 2, even(8), 1)
            assert_same_everywhere(state_of(model.module, optimizer))
            assert not torch.equal(before[0], state_of(model.module, optimizer)[0])
            optimizer.close()


@scenario
def what_is_sent_is_what_the_formula_says() -> None:
    """Triangles of symmetric factors, a count of three numbers for each layer, in few messages."""
    known, sent = dist.all_reduce, list[int]()

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return known(tensor, *args, **kwargs)

    for name in ("SINGD", "SINGD diagonal"):
        model, optimizer = built(name)
        train(model, optimizer, name, 0, even(8), 1)
        reduction.dist.all_reduce = counted
        for step, due in ((1, False), (2, True)):
            sent.clear()
            train(model, optimizer, name, step, even(8), 1)
            expected = 0
            for layer in optimizer._registry.layers if due else ():
                own = layer.statistics
                for d in (own.k.dim, own.c.dim):
                    expected += own.layer.groups * (d if "diag" in name else d * (d + 1) // 2)
                expected += 3
            assert sum(sent) == expected, (name, sent, expected)
            assert len(sent) == due  # everything fits into one bucket
        reduction.dist.all_reduce = known
        optimizer.close()


def kept_bytes(optimizer: Any) -> int:
    """Of preconditioners, in this process."""
    found = 0
    for layer in optimizer._registry.layers:
        state = optimizer.state[layer.weight]
        names = [k for k in state if k not in ("momentum_buffer", *states.ON_HOST)]
        found += sum(state[name].numel() * state[name].element_size() for name in names)
    return found


@scenario
def placements_give_the_same_parameters() -> None:
    """Whoever updates and keeps preconditioners; what is kept is what the plan says."""
    world = dist.get_world_size()
    few = world > 2
    for name in ("SINGD", "KFAC", "KFAC trust region") if few else OPTIMIZERS:
        cls, options = OPTIMIZERS[name]
        single = network()
        reference = cls(single.parameters(), lr=0.01, **options)
        for step in range(6):
            whole(single, reference, name, step, 8)
        least = None
        for workers in [g for g in range(1, world + 1) if world % g == 0]:
            extra = {"grad_worker_fraction": workers / world}
            model, optimizer = built(name, options=extra)
            for step in range(6):
                train(model, optimizer, name, step, even(8), 1)
            error = 1e-11 if loss_of(name) is loss else 1e-6
            for p, q in zip(model.parameters(), single.parameters(), strict=True):
                close = torch.allclose(p, q, rtol=error, atol=error)
                assert close, (name, workers, float((p - q).abs().max()))
            assert_same_everywhere([p.detach() for p in model.parameters()])
            plan, mine = optimizer.placement(), kept_bytes(optimizer)
            assert mine == plan.state_bytes[dist.get_rank()], (name, plan)
            least = least or sum(plan.state_bytes)
            assert sum(plan.state_bytes) >= least
            owners = {row.updated_by for row in plan} - {"all"}
            if name in ("SINGD", "KFAC"):
                assert len(owners) == world, plan
                assert (
                    all(row.kept_by.count(",") == workers - 1 for row in plan) or workers == world
                )
            optimizer.close()


@scenario
def checkpoints_are_whole_wherever_parts_are_kept() -> None:
    """All processes put the state together; it goes on the same, with any placement."""
    world = dist.get_world_size()
    for name in ("SINGD", "SINGD Toeplitz", "KFAC", "KFAC ekfac"):
        model, optimizer = built(name, options={"grad_worker_fraction": 1 / world})
        for step in range(3):
            train(model, optimizer, name, step, even(8), 1)
        saved = copy.deepcopy(optimizer.state_dict())
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        everything = [v for s in saved["state"].values() for _, v in sorted(s.items())]
        assert_same_everywhere([v for v in everything if isinstance(v, Tensor)])
        assert kept_bytes(optimizer) == optimizer.placement().state_bytes[dist.get_rank()]
        for fraction in (1 / world, 1.0):
            twin, other = built(name, options={"grad_worker_fraction": fraction})
            twin.load_state_dict(weights)
            other.load_state_dict(saved)
            for group in other.param_groups:
                group["grad_worker_fraction"] = fraction
            for step in range(3, 6):
                train(twin, other, name, step, even(8), 1)
                if fraction < 1:
                    train(model, optimizer, name, step, even(8), 1)
            assert kept_bytes(other) == other.placement().state_bytes[dist.get_rank()]
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                # gradients of a new DistributedDataParallel lie in other buckets
                assert torch.allclose(p, q, rtol=1e-11, atol=1e-11), (name, fraction)
            other.close()
        optimizer.close()


@scenario
def a_decomposition_that_fails_is_reported_by_all() -> None:
    """Though one process makes it; all go on with what they had."""
    for workers in (1, dist.get_world_size()):
        fraction = workers / dist.get_world_size()
        options = {"grad_worker_fraction": fraction, "num_tolerated_failures": 1}
        model, optimizer = built("KFAC", options=options)
        for step in range(2):
            train(model, optimizer, "KFAC", step, even(8), 1)
        layer = next(la for la in optimizer._registry.layers if la.name == "mix")
        if optimizer._runner.placing.assignment.is_grad_worker(layer):
            optimizer.state[layer.weight]["A"][:] = float("nan")
        with pytest.warns(UserWarning, match="mix.weight could not be decomposed"):
            train(model, optimizer, "KFAC", 2, even(8), 1)
        assert int(optimizer.state[layer.weight]["failures"]) == 1
        for step in range(3, 6):
            train(model, optimizer, "KFAC", step, even(8), 1)
        assert int(optimizer.state[layer.weight]["failures"]) == 0
        assert_same_everywhere([p.detach() for p in model.parameters()])
        optimizer.close()


@scenario
def structures_chosen_after_the_plan() -> None:
    """Layers that turn out diagonal stay where they are, and nobody waits for them in vain."""
    options = {"max_step_ratio": 1.0, "grad_worker_fraction": 1 / dist.get_world_size()}
    model, optimizer = built("SINGD auto", options=options)
    for step in range(5):
        train(model, optimizer, "SINGD", step, even(8), 1)
    assert {layer.statistics.k.name for layer in optimizer._registry.layers} == {"diagonal"}
    assert_same_everywhere([p.detach() for p in model.parameters()])
    optimizer.state_dict()
    optimizer.close()


@scenario
def a_fraction_that_does_not_fit_is_refused() -> None:
    """At the first update, when the number of processes is known."""
    if dist.get_world_size() == 4:
        model, optimizer = built("SINGD", options={"grad_worker_fraction": 0.75})
        with pytest.raises(ValueError, match=r"3 of 4 processes.* 0.25, 0.5, 1.0"):
            train(model, optimizer, "SINGD", 0, even(8), 1)
        optimizer.close()


@scenario
def what_placements_send_is_what_the_formula_says() -> None:
    """Preconditioners to those that keep them, and preconditioned gradients to all others."""
    known, sent = dist.broadcast, list[int]()

    def counted(tensor: Tensor, source: int, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * (source == dist.get_rank()))
        return known(tensor, source, *args, **kwargs)

    world = dist.get_world_size()
    for workers in [g for g in range(1, world + 1) if world % g == 0]:
        options = {"grad_worker_fraction": workers / world}
        model, optimizer = built("SINGD", options=options)
        train(model, optimizer, "SINGD", 0, even(8), 1)
        reduction.dist.broadcast = counted
        for step, due in ((1, False), (2, True)):
            sent.clear()
            train(model, optimizer, "SINGD", step, even(8), 1)
            expected = 0
            for layer in optimizer._registry.layers:
                own, plan = layer.statistics, optimizer._runner.placing.assignment
                sides = own.layer.groups * (own.k.numel + own.c.numel)
                if due and workers > 1 and plan.of(layer).inv_worker == dist.get_rank():
                    expected += sides  # K and C
                if workers < world and plan.source(layer) == dist.get_rank():
                    expected += own.layer.groups * own.k.dim * own.c.dim
            assert sum(sent) == expected, (workers, step, sent, expected)
        reduction.dist.broadcast = known
        optimizer.close()


@scenario
def buckets_do_not_matter() -> None:
    """Nor does it matter that a layer is larger than a bucket."""
    found = []
    for size in (25 * 2**20, 700):
        buckets.BUCKET = size
        model, optimizer = built("SINGD")
        for step in range(3):
            train(model, optimizer, "SINGD", step, even(8), 1)
        found.append([t.clone() for t in state_of(model.module, optimizer)])
        optimizer.close()
    buckets.BUCKET = 25 * 2**20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # sums in another order


@scenario
def messages_travel_while_others_are_packed_and_gradients_are_read() -> None:
    """In a trace: each one is on its way during operations of the process that has sent it."""
    buckets.BUCKET = 1 << 20
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(300, 300) for _ in range(4))))
    optimizer = SINGD(model.parameters(), T=1, structures="dense")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 300)).square().mean().backward()
            optimizer._processes.look(model.parameters)
            receive = optimizer._processes.send(optimizer._registry.layers)
            base.non_finite(optimizer._gradients())
            with torch.profiler.record_function("waits"):
                receive()
    events = list(trace.events())
    travels = [e.time_range for e in events if e.name == "gloo:all_reduce"]
    waits = [e.time_range for e in events if e.name == "waits"]
    found = {
        e.name
        for e in events
        if e.name in ("aten::index_select", "aten::cat", "aten::_foreach_norm")
        and any(t.start <= e.time_range.start < t.end for t in travels)
        and not any(w.start <= e.time_range.start < w.end for w in waits)
    }
    assert found
    assert len(travels) >= 10  # at least two in each of the steps
    buckets.BUCKET = 25 * 2**20
    optimizer.close()


@scenario
def other_layers_are_refused() -> None:
    """Instead of adding up what does not belong together."""
    model, optimizer = built("SINGD")
    if dist.get_rank() == 0:
        optimizer._registry.layers[0].statistics.restructure(
            ("diagonal", "diagonal"), model.module.conv.weight
        )
    x, y = (part(t, even(8)) for t in batch(0, 8))
    loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="different layers"):
        optimizer.step()
    optimizer.close()


@scenario
def a_state_dict_that_one_process_alone_asks_for() -> None:
    """It is in many; an error, not a wait without end."""
    placing.PATIENCE = timedelta(seconds=1)
    options = {"grad_worker_fraction": 1 / dist.get_world_size()}
    model, optimizer = built("SINGD", options=options, process_group=dist.new_group())
    train(model, optimizer, "SINGD", 0, even(8), 1)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="did not take part"):
            optimizer.state_dict()
    optimizer.close()
    model, optimizer = built("SINGD")  # every process keeps all
    train(model, optimizer, "SINGD", 0, even(8), 1)
    if dist.get_rank() == 0:
        assert optimizer.state_dict()["state"][0]["K"].isfinite().all()
    optimizer.close()


@scenario
def a_message_that_is_lost_names_its_layers() -> None:
    """The last scenario: one process does not take part, and the group is of no use afterwards."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    model, optimizer = built("SINGD", process_group=group)
    x, y = (part(t, even(8)) for t in batch(0, 8))
    for step in range(2):  # the next one is due again
        train(model, optimizer, "SINGD", step, even(8), 1)
    optimizer.zero_grad()
    loss(model(x), y).backward()
    if dist.get_rank() == 0:
        with pytest.raises(
            RuntimeError, match=r"what is known of conv, grouped.* did not take part"
        ):
            optimizer.step()
    dist.barrier()


def run(**group: Any) -> None:
    """All scenarios."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **group)
    for function in SCENARIOS:
        function()
        if dist.get_rank() == 0:
            print(function.__name__, "holds", flush=True)
    leave()


if __name__ == "__main__":
    start(run, [int(world) for world in sys.argv[2:]], sys.argv[1])
