"""What the optimizer sees of forward and backward passes, against explicit per-call factors.

Statistics are read where they end up: at IKFAC's first update from the identity ``K`` is
``I - lr_cov (A - I) / 2``, and ``C`` likewise of ``B``.
"""

import copy
import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracles import factors as oracle
from oracles.loops import assert_same_weights, fit, mlp_batch, squares, weights
from oracles.optimizers import Optimizer, factor_key, is_kfac, skip_unless_decomposable
from oracles.zoo import mlp

BOTH_OPTIMIZERS = True


LR_COV = 0.01


class Calls:
    """Every call of some modules: input and the output whose gradient counts.

    Outputs are cloned behind the module, so that operations in place do not touch them.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor]] = []
        self.handles = [m.register_forward_hook(self, with_kwargs=True) for m in modules]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        """Record a call."""
        x = args[0] if args else kwargs["input"]
        if out.requires_grad:
            self.calls.append((module, x.detach().clone(), out))
        return out.clone()

    def close(self) -> None:
        """Stop recording."""
        for handle in self.handles:
            handle.remove()


Passes = list[tuple[Any, Tensor, Tensor]]  # module, input, gradient of the output


def expected_factors(
    module: Any, passes: Passes, approx: str = "expand", samples: int = 0
) -> tuple[Tensor, Tensor]:
    """Dense ``A`` and ``B`` over all passes of a module, for a loss averaged over the batch.

    The batch has so many ``samples``, or those of the layer's input.
    """
    uu, gg, count, terms = 0.0, 0.0, 0, 0
    for owner, x, g in passes:
        if owner is module and x.numel():
            u = oracle.unfolded_input(module, x)
            n = u.shape[0] * (u.shape[3] if approx == "expand" else 1)
            uu = uu + n * torch.as_tensor(oracle.input_factor(module, x, approx))
            gg = gg + torch.as_tensor(oracle.grad_factor(module, g, approx, loss_terms=1))
            count, terms = count + n, terms + (samples or u.shape[0])
    assert isinstance(uu, Tensor)
    assert isinstance(gg, Tensor)
    return uu / count, terms * gg


def first_update(factor: Tensor) -> Tensor:
    """IKFAC's first update of the identity, without damping."""
    eye = torch.eye(factor.shape[1]).to(factor)
    return eye - LR_COV * 0.5 * (factor - eye)


def assert_measured(
    optimizer: Any,
    module: Any,
    passes: Passes,
    rtol: float = 1e-10,
    approx: str = "expand",
    samples: int = 0,
) -> None:
    """The first update from the identity is the one that the oracle's factors give."""
    A, B = expected_factors(module, passes, approx, samples)
    state = optimizer.state[module.weight]
    assert int(state["last_update"]) >= 0, "no statistics"
    assert_factors(state, A, B, rtol)


def assert_factors(state: dict[str, Tensor], A: Tensor, B: Tensor, rtol: float = 1e-10) -> None:
    """What the optimizer has measured, from its state after the first step."""
    for factor, kfac, singd in ((A, "A", "K"), (B, "B", "C")):
        found, expected = state[kfac if is_kfac() else singd].double(), first_update(factor)
        if is_kfac():
            found, expected = found / state["factor_weight"].double(), factor
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def observing(model: nn.Module, **options: Any) -> Any:
    """An optimizer whose first update reveals the factors."""
    settings: dict[str, Any] = {"init": "identity", "kfac_like": True, "alpha1": 0.0, "T": 1}
    settings |= {"structures": "dense", "damping": 0.0, "lr_cov": LR_COV}
    return Optimizer(model.parameters(), **{**settings, **options})


def record(model: Any, run: Callable[[nn.Module], Tensor]) -> Passes:
    """Passes of one differentiated forward pass of all layers of the model."""
    layers = [m for m in model.modules() if isinstance(m, oracle.Layer)]
    calls = Calls(*layers)
    loss = run(model)
    found = torch.autograd.grad(loss, [out for _, _, out in calls.calls], allow_unused=True)
    calls.close()
    return [
        (module, x, g)
        for (module, x, _), g in zip(calls.calls, found, strict=True)
        if g is not None
    ]


def assert_all_measured(
    optimizer: Any, model: Any, passes: Passes, rtol: float = 1e-10, samples: int = 0
) -> None:
    for module in {module: None for module, _, _ in passes}:
        assert_measured(optimizer, module, passes, rtol, samples=samples)


# --- operations on the output, and ways to call a layer ----------------------------------------


class Behind(nn.Module):
    """A layer, something that is done to its output, and a second layer."""

    def __init__(self, first: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.after, self.last = first, after, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever comes out of the first layer ends in 4 features."""
        y: Tensor = self.last(self.after(self.first(x)).reshape(-1, 4))
        return y


def add_in_place(x: Tensor) -> Tensor:
    x += x.detach().cos()
    return x


def scale_in_place(x: Tensor) -> Tensor:
    return x.mul_(2.0).add_(1.0)


def assign_slice(x: Tensor) -> Tensor:
    x[..., :1] = 0.5
    x[..., 1] = 2 * x[..., 1]
    return x


def write_a_view(x: Tensor) -> Tensor:
    x.view(-1)[::2].mul_(3.0)
    return x


def chunk_in_place(x: Tensor) -> Tensor:
    first, second = x.split(x.shape[-1] // 2, -1)
    return torch.cat([first.contiguous().relu(), second.sigmoid()], -1)


def hook_on_output(x: Tensor) -> Tensor:
    """A user's hook on the tapped output (on a stale view this has crashed torch)."""
    x.register_hook(lambda g: g)
    return torch.relu_(x)


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": torch.relu,
    "relu_": torch.relu_,
    "+=": add_in_place,
    "mul_ add_": scale_in_place,
    "slices": assign_slice,
    "view": write_a_view,
    "split": chunk_in_place,
    "hook": hook_on_output,
}
FIRST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 2-d": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear 3-d, bias": (lambda: nn.Linear(3, 4), (5, 2, 3)),
    "linear 3-d, no bias": (lambda: nn.Linear(3, 4, bias=False), (5, 2, 3)),
    "linear 4-d": (lambda: nn.Linear(3, 4), (2, 3, 2, 3)),
    "linear 1-d": (lambda: nn.Linear(3, 4), (3,)),
    "conv": (lambda: nn.Conv1d(2, 3, 2), (5, 2, 5)),
    "conv unbatched": (lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "conv2d unbatched, grouped": (lambda: nn.Conv2d(2, 2, 2, groups=2), (2, 3, 5)),
    "transposed unbatched": (lambda: nn.ConvTranspose1d(2, 2, 2, stride=2), (2, 4)),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("first", FIRST)
def test_operations_on_the_output(first: str, after: str) -> None:
    """In-place operations behind a layer, where tensor hooks lose statistics silently."""
    build, shape = FIRST[first]
    model = Behind(build(), AFTER[after]).double()
    x = torch.randn(*shape, dtype=torch.float64)

    def run(net: nn.Module) -> Tensor:
        return net(x).square().sum()

    passes = record(model, run)
    optimizer = observing(model)
    run(model).backward()
    optimizer.step()
    alone = "unbatched" in first or "1-d" in first
    assert_all_measured(optimizer, model, passes, samples=0 if alone else shape[0])


INPUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: torch.randn(3, 2, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 2, 5, 4).mT,
    "expanded": lambda: torch.randn(1, 1, 4, 5).expand(3, 2, 4, 5),
    "strided": lambda: torch.randn(6, 2, 8, 5)[::2, :, ::2],
    "needs a gradient": lambda: torch.randn(3, 2, 4, 5).requires_grad_(),
}


@pytest.mark.parametrize("name", INPUTS)
def test_layouts_of_inputs(name: str) -> None:
    x = INPUTS[name]().double().detach().requires_grad_(name == "needs a gradient")
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()

    def run(net: nn.Module) -> Tensor:
        return net(x).square().sum()

    passes = record(model, run)
    optimizer = observing(model)
    run(model).backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


class ByKeyword(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(3, 4), nn.ConvTranspose1d(4, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Keywords only, with an output size."""
        x = torch.tanh(self.first(input=x)).mT
        y: Tensor = self.up(input=x)
        return y


def test_keyword_call() -> None:
    model, (x, _) = ByKeyword().double(), mlp_batch(0, 15, 1)
    x = x.view(-1, 5, 3)
    passes = record(model, lambda net: net(x).square().sum())
    optimizer = observing(model)
    model(x).square().sum().backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_output_size_of_a_transposed_convolution(approx: str) -> None:
    """``output_size`` at the call overrides the padding that the layer was built with."""
    model = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    optimizer = observing(model, kfac_approx=approx)
    out = model(x, output_size=[10])
    assert out.shape[-1] == 10
    out.square().sum().backward()
    g = 2 * out.detach()
    optimizer.step()
    A = oracle.input_factor(model, x, approx, output_padding=[1])
    B = oracle.grad_factor(model, g, approx)
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    assert_factors(optimizer.state[model.weight], A, B)


# --- activation checkpointing and memory --------------------------------------------------------


class Blocks(nn.Module):
    """A chain of blocks, perhaps checkpointed."""

    def __init__(self, mode: str | None) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3]`` to ``[N, 4]``."""
        x = self.stem(x)
        for block in self.blocks:
            if self.mode is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_factors(mode: str) -> None:
    plain, checkpointed = Blocks(None).double(), Blocks(mode).double()
    checkpointed.load_state_dict(plain.state_dict())
    x, y = mlp_batch(0, 3, 4)
    passes = record(plain, lambda net: squares(net(x), y))
    optimizer = observing(checkpointed)
    squares(checkpointed(x), y).backward()
    optimizer.step()
    twins = dict(zip(plain.modules(), checkpointed.modules(), strict=True))
    assert_all_measured(optimizer, checkpointed, [(twins[m], u, g) for m, u, g in passes])


class Watch(nn.Module):
    """Keeps weak references to what passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        """A new tensor, which the next layer keeps for its backward."""
        x = x * 1.0
        self.seen.append(weakref.ref(x))
        return x

    def alive(self) -> int:
        """How many of them are still there."""
        gc.collect()
        return sum(ref() is not None for ref in self.seen)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_frees_activations(mode: str) -> None:
    """The tap must not keep the activation that checkpointing gave up."""
    watch = Watch()
    block = nn.Sequential(nn.Linear(4, 4), watch, nn.Linear(4, 4))
    optimizer = observing(block)
    x = torch.randn(6, 4, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=mode == "reentrant")
    assert watch.alive() == 0
    out.square().sum().backward()
    optimizer.step()
    assert int(optimizer.state[block[0].weight]["last_update"]) == 0


def test_inputs_are_freed_after_backward() -> None:
    """While the loss is still alive, and without a step."""
    watch = Watch()
    model = nn.Sequential(nn.Linear(4, 4), watch, nn.Linear(4, 4))
    optimizer = observing(model)
    loss = model(torch.randn(6, 4)).square().sum()
    assert watch.alive() == 1
    loss.backward()
    assert watch.alive() == 0
    assert loss.grad_fn is not None
    optimizer.step()


def test_a_forward_without_backward_is_freed() -> None:
    watch = Watch()
    model = nn.Sequential(nn.Linear(4, 4), watch, nn.Linear(4, 4))
    optimizer = observing(model)
    for _ in range(3):
        out = model(torch.randn(6, 4))
        del out
    assert watch.alive() == 0
    optimizer.step()


# --- passes that must not count -----------------------------------------------------------------


def evaluate(model: nn.Module, x: Tensor) -> None:
    """A backward pass through a model in evaluation mode."""
    model.eval()
    kept = {p: p.grad for p in model.parameters()}
    squares(model(x), torch.zeros(())).backward()
    for p, g in kept.items():
        p.grad = g
    model.train()


def no_grad(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def inference(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def input_gradient(model: nn.Module, x: Tensor) -> None:
    """An adversarial example."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)


def parameter_gradient(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def create_graph(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def unused_forward(model: nn.Module, x: Tensor) -> None:
    model(x)


def functional_call(model: nn.Module, x: Tensor) -> None:
    """Other weights in the place of the parameters."""
    other = {n: (2 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, other, (x,)).square().sum().backward()


def per_sample(model: nn.Module, x: Tensor) -> None:
    """Per-sample gradients by ``vmap(grad)``."""
    named = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (row[None],)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(named, x)


def jacobian(model: nn.Module, x: Tensor) -> None:
    torch.func.vmap(torch.func.jacrev(lambda row: model(row[None])[0]))(x)


def traced(model: nn.Module, x: Tensor) -> None:
    """An export by tracing; what it returns has no hook in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = torch.jit.trace(model, x)
    torch.testing.assert_close(copy(x), model(x))


def replica(model: nn.Module, x: Tensor) -> None:
    """What ``DataParallel`` calls on other devices."""
    for module in model.modules():
        module._is_replica = True  # type: ignore[assignment]
    kept = {p: p.grad for p in model.parameters()}
    model(x).square().sum().backward()
    for module in model.modules():
        del module._is_replica
    for p, g in kept.items():
        p.grad = g


SILENT = {
    f.__name__: f
    for f in (
        traced,
        replica,
        evaluate,
        no_grad,
        inference,
        input_gradient,
        parameter_gradient,
        create_graph,
        unused_forward,
        functional_call,
        per_sample,
        jacobian,
    )
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SILENT)
def test_other_passes_contribute_nothing(name: str, when: str) -> None:
    """Before and after the pass that counts, inside the same step."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: squares(net(x), y))
    optimizer = observing(model)
    optimizer.zero_grad()
    if when == "before":
        SILENT[name](model, 3 * x)
    squares(model(x), y).backward()
    if when == "after":
        SILENT[name](model, 3 * x)
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


@pytest.mark.parametrize("name", SILENT)
def test_other_passes_alone_update_nothing(name: str) -> None:
    """A step with nothing but such passes leaves model and factors as they are."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    optimizer = Optimizer(model.parameters(), T=1)
    fit(model, optimizer, [(x, y)])
    optimizer.zero_grad()
    before, factors = weights(model), optimizer.state[model[0].weight][factor_key()].clone()
    SILENT[name](model, x)
    for p in model.parameters():
        p.grad = None
    optimizer.step()
    assert all(torch.equal(p, before[key]) for key, p in weights(model).items())
    assert torch.equal(optimizer.state[model[0].weight][factor_key()], factors)


def test_gradient_penalty_counts_once() -> None:
    """The pass that creates a graph does not count; the final ``.backward()`` does."""
    model, (x, _) = mlp(3, 4, 1), mlp_batch(0, 3, 1)

    def penalised(net: nn.Module) -> Tensor:
        inputs = x.clone().requires_grad_()
        out = net(inputs).sum()
        (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
        return out + (slope.square().sum(1) - 1).square().sum()

    plain = mlp(3, 4, 1)
    plain.load_state_dict(model.state_dict())
    passes = record(plain, penalised)
    penalised(plain).backward()
    optimizer = observing(model)
    penalised(model).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    optimizer.step()
    twins = dict(zip(plain.modules(), model.modules(), strict=True))
    assert_all_measured(optimizer, model, [(twins[m], u, g) for m, u, g in passes])


def test_no_stats() -> None:
    """A block of passes that train the weights without counting for the factors."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: squares(net(x), y))
    optimizer = observing(model)
    squares(model(x), y).backward()
    with optimizer.no_stats():
        squares(model(5 * x), y).backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


def test_no_stats_ends_with_an_error() -> None:
    """Statistics are back on after an exception."""
    model, (x, y) = mlp(3, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: squares(net(x), y))
    optimizer = observing(model)
    with pytest.raises(KeyError), optimizer.no_stats():
        raise KeyError
    squares(model(x), y).backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_drops_pending(to_none: bool) -> None:
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: squares(net(x), y))
    optimizer = observing(model)
    squares(model(7 * x), y).backward()
    optimizer.zero_grad(set_to_none=to_none)
    squares(model(x), y).backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


# --- several passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_adversarial_training_keeps_networks_apart(clear: str) -> None:
    """The generator's backward runs through the discriminator; its statistics are dropped."""
    G, D = mlp(3, 4, 3), mlp(3, 4, 1)
    x, z = mlp_batch(0, 3, 3)
    optimizers = {"G": observing(G), "D": observing(D)}

    def zero(name: str, network: nn.Module) -> None:
        if clear == "model":
            network.zero_grad()
        else:
            optimizers[name].zero_grad()

    def generator_loss(net: nn.Module) -> Tensor:
        return (D(net(z)) - 1).square().mean()

    def discriminator_loss(net: nn.Module) -> Tensor:
        return (net(x) - 1).square().mean() + net(G(z).detach()).square().mean()

    g_passes = record(G, generator_loss)
    zero("G", G)
    generator_loss(G).backward()
    optimizers["G"].step()
    d_passes = record(D, discriminator_loss)
    zero("D", D)
    discriminator_loss(D).backward()
    optimizers["D"].step()
    assert_all_measured(optimizers["G"], G, g_passes)
    assert_all_measured(optimizers["D"], D, d_passes)


def test_two_losses_on_a_retained_graph() -> None:
    """Each backward is a pass of its own."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    losses = (lambda out: squares(out, y), lambda out: out.cos().sum())
    passes = [p for loss in losses for p in record(model, lambda net, loss=loss: loss(net(x)))]
    optimizer = observing(model)
    out = model(x)
    losses[0](out).backward(retain_graph=True)
    losses[1](out).backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


def test_two_forwards_then_two_backwards() -> None:
    """In any order, inputs meet their own gradients."""
    model, (x, y), (u, v) = mlp(3, 4, 2), mlp_batch(0, 3, 2), mlp_batch(1, 3, 2, samples=3)
    pairs = ((x, y), (u, v))
    passes = [p for a, b in pairs for p in record(model, lambda n, a=a, b=b: squares(n(a), b))]
    optimizer = observing(model)
    first, second = squares(model(x), y), squares(model(u), v)
    first.backward()
    second.backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


def test_empty_batch() -> None:
    """No rows: nothing is divided by zero, and a later micro-batch counts alone."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: squares(net(x), y))
    optimizer = observing(model)
    model(x[:0]).square().sum().backward()
    squares(model(x), y).backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)


def test_only_an_empty_batch() -> None:
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters())
    before = weights(model)
    model(torch.ones(0, 3).double()).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[key]) for key, p in weights(model).items())


def test_part_of_the_outputs() -> None:
    """Rows without gradient still count as samples."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: net(x)[:3].square().sum())
    optimizer = observing(model)
    model(x)[:3].square().sum().backward()
    optimizer.step()
    assert_all_measured(optimizer, model, passes)
    assert y.shape[0] == passes[0][1].shape[0]


# --- life of the hooks --------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_close_removes_hooks() -> None:
    """Afterwards steps go on with the factors as they are; closing twice does no harm."""
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters(), T=1)
    fit(model, optimizer, [mlp_batch(0, 3, 2)])
    assert hooks(model) == 3  # with that of the model, which tells how many samples it gets
    factor = optimizer.state[model[0].weight][factor_key()].clone()
    optimizer.close()
    optimizer.close()
    assert hooks(model) == 0
    before = weights(model)
    fit(model, optimizer, [mlp_batch(1, 3, 2)])
    assert torch.equal(optimizer.state[model[0].weight][factor_key()], factor)
    assert all(not torch.equal(p, before[key]) for key, p in weights(model).items())


@pytest.mark.parametrize("trained", [False, True])
def test_a_dropped_optimizer_is_freed(trained: bool) -> None:
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters(), T=1)
    if trained:
        fit(model, optimizer, [mlp_batch(0, 3, 2)])
    ref = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert ref() is None
    assert hooks(model) == 0


def test_an_optimizer_of_free_parameters_leaves_no_global_hook() -> None:
    """Where no module is found the next forward pass is watched; not longer than needed."""
    before = len(nn.modules.module._global_forward_pre_hooks)
    optimizer = Optimizer([nn.Parameter(torch.ones(3))])
    del optimizer
    gc.collect()
    assert len(nn.modules.module._global_forward_pre_hooks) == before


def test_a_model_may_die_before_its_optimizer() -> None:
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters(), T=1)
    fit(model, optimizer, [mlp_batch(0, 3, 2)])
    ref = weakref.ref(model[0])
    del model
    gc.collect()
    assert ref() is None
    optimizer.zero_grad()
    optimizer.step()


def test_hooks_do_not_pile_up() -> None:
    """One optimizer after the other on the same model."""
    model = mlp(3, 4, 2)
    for seed in range(3):
        optimizer = Optimizer(model.parameters(), T=1)
        fit(model, optimizer, [mlp_batch(seed, 3, 2)])
        del optimizer
        gc.collect()
    assert hooks(model) == 0


def test_no_weak_reference_to_parameters() -> None:
    """torch swaps parameters in place only if nobody holds a weak reference to them."""
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters(), T=1)
    fit(model, optimizer, [mlp_batch(0, 3, 2)])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.float32


def test_two_optimizers_on_halves_of_a_model() -> None:
    """Each sees its own layers only, whichever steps first."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    passes = record(model, lambda net: squares(net(x), y))
    body, head = observing(model[0]), observing(model[2])
    squares(model(x), y).backward()
    head.step()
    body.step()
    assert_measured(body, model[0], passes)
    assert_measured(head, model[2], passes)
    assert not set(map(id, body.state)) & set(map(id, head.state))


def test_two_optimizers_on_one_model() -> None:
    """The second, say of a teacher's copy of the loop, does not disturb the first."""
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    optimizer, other = Optimizer(model.parameters(), T=1), Optimizer(twin.parameters(), T=1)
    idle = Optimizer(model.parameters(), T=1)
    batches = [mlp_batch(step, 3, 2) for step in range(3)]
    fit(model, optimizer, batches)
    fit(twin, other, batches)
    assert_same_weights(model, twin)
    assert not idle.state


@pytest.mark.parametrize("structures", ["dense", "diagonal", "triutoeplitz"])
def test_images_of_many_sizes(structures: str) -> None:
    """Fully convolutional training with another size in every step: caches of plans are bounded."""
    skip_unless_decomposable(structures)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(2, 1, 2, 2))
    optimizer = Optimizer(model.parameters(), T=1, structures=structures)
    for step in range(30):
        x = torch.randn(2, 1, 4 + step % 6, 5 + step // 6)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(row.last_update == 29 for row in optimizer.report())
    assert not [f for f in cached_functions() if f.cache_info().maxsize is None]


def cached_functions() -> list[Any]:
    """Everything in the package that is wrapped in a cache."""
    modules = [m for name, m in sys.modules.items() if name.startswith("tnkfac.")]
    found = [value for m in modules for value in vars(m).values() if hasattr(value, "cache_info")]
    assert len(found) > 5
    return found


# --- many passes, and several at a time ---------------------------------------------------------


@pytest.mark.parametrize("name", SILENT)
def test_memory_does_not_grow(name: str) -> None:
    """Passes that never become a step leave nothing behind."""
    model, (x, y) = mlp(3, 4, 2), mlp_batch(0, 3, 2)
    optimizer = Optimizer(model.parameters(), T=1)
    fit(model, optimizer, [(x, y)])

    def living() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        for _ in range(5):
            SILENT[name](model, x)
            for p in model.parameters():
                p.grad = None
        counts.append(living())
    assert counts[1] == counts[2]


def test_two_threads_train_two_models() -> None:
    """Each as it does alone."""
    alone, together = ([mlp(3, 4, 2) for _ in range(2)] for _ in range(2))
    for one, other in zip(alone, together, strict=True):
        other.load_state_dict(one.state_dict())

    def train(model: nn.Module) -> None:
        optimizer = Optimizer(model.parameters(), T=2)
        fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(20)])

    for model in alone:
        train(model)
    threads = [threading.Thread(target=train, args=(model,)) for model in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert_same_weights(other, one)


def test_modules_that_no_search_sees() -> None:
    """A list of parameters of a model hidden from the garbage collector: found as it first runs."""
    model = mlp(3, 4, 2)
    gc.freeze()
    try:
        optimizer = Optimizer(list(model.parameters()), T=1)
        assert not any(row.structure for row in optimizer.report())
        fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(2)])
    finally:
        gc.unfreeze()
    assert all(row.last_update == 1 for row in optimizer.report())
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structures", ["dense", "diagonal", "block2diagonal", "triltoeplitz"])
def test_sums_of_half_precision_are_in_single(dtype: torch.dtype, structures: str) -> None:
    """Of many micro-batches, the last would be lost in eight bits."""
    skip_unless_decomposable(structures)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    optimizer = Optimizer(model.parameters(), structures=structures)
    for _ in range(300):
        model(torch.ones(1, 4, dtype=dtype)).sum().backward()
    (layer,) = optimizer._registry.layers
    *sums, counts = layer.statistics.sums()
    assert {part.dtype for part in sums} == {torch.float32}
    assert float(counts[0]) == 300
    assert float(sums[0].max()) >= 300


def test_passes_to_named_inputs_add_up() -> None:
    """``backward(inputs=...)`` reaches parameters past the sums of statistics."""
    model = mlp(3, 4, 2)
    twin = copy.deepcopy(model)
    optimizers = [Optimizer(net.parameters()) for net in (model, twin)]
    for seed in range(3):
        x, y = mlp_batch(seed, 3, 2)
        squares(model(x), y).backward(inputs=list(model.parameters()))
        squares(twin(x), y).backward()
    for layer, other in zip(*(o._registry.layers for o in optimizers), strict=True):
        for found, expected in zip(layer.statistics.sums(), other.statistics.sums(), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_pass_whose_graph_is_made_contributes_nothing() -> None:
    """Into ``.grad``, where only the next pass over it counts."""
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters())
    x, y = mlp_batch(0, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the reference cycle
        squares(model(x), y).backward(create_graph=True)
    assert not any(layer.statistics.pending for layer in optimizer._registry.layers)
    model.zero_grad()
