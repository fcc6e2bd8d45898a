"""Weights that a model uses without calling a supported module: seen at the calls that use them.

Most models have some: attention reads ``qkv.weight`` and calls ``F.linear``, experts are entries of
one parameter, a subclass pads before it convolves. Inside of the modules that use such weights, a
mode of torch's functions looks at every call of those that are products.
Where an argument is a weight, or a view of one, the output goes through the same identity as that
of a supported module. What the call multiplies with is a *slot*: a weight, or a block of one,
with factors of its own.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tnkfac.curvature.capture.batch import BatchSize, by_sample, sequence_first
from tnkfac.curvature.capture.calls import EagerCall, Identity, Rows, Share, TracedCall, through
from tnkfac.curvature.capture.hooks import never_a_frame_alone, taking_notes
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.capture.tap import EMPTY, FORWARD_MODE, TAPPED, TRANSFORMED, opaque
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.precision import Guard
from tnkfac.curvature.uses.blocks import Span
from tnkfac.curvature.uses.matching import Declare, Matching, Place
from tnkfac.curvature.uses.products import CASTS, PRODUCTS, Product
from tnkfac.curvature.uses.slots import CHECKPOINTED, COMPILED_VIEW, UNRECORDED, BiasSlot, Weight
from tnkfac.curvature.uses.starts import STARTS, Starts


class _Frame:
    """What a scope that runs knows of the weights in it."""

    def __init__(self, scope: object, outer: _Frame | None) -> None:
        self.scope = scope
        self.known: dict[int, tuple[Weight, Tensor, Any]] = {} if outer is None else {**outer.known}
        self.copies: dict[int, tuple[Tensor, Place]] = {} if outer is None else outer.copies
        self.biases: list[tuple[Tensor, weakref.ref[nn.Module], str]] = (
            [] if outer is None else [*outer.biases]
        )
        self.curious: bool = outer is not None and outer.curious
        self.sequence_first: int = 0 if outer is None else outer.sequence_first


class Uses(TorchFunctionMode):
    """The mode in which calls are looked at, of one optimizer."""

    def __init__(self, declare: Declare, batch: BatchSize) -> None:
        """No module runs.

        Args:
            declare: Takes up slots that calls are seen to use.
            batch: How many samples a pass has.
        """
        super().__init__()
        self._matching = Matching(declare, self._bias)
        self._batch = batch
        self._local = threading.local()
        self._one_at_a_time = Guard()
        self._traced: list[tuple[Tensor, Weight]] = []
        self._traced_scopes: list[object] = []
        self._traced_sequence_first = 0
        self._traced_views: list[tuple[Tensor, tuple[Tensor, Weight], int]] = []

    # ---------------------------------------------------------------- scopes

    @property
    def _frames(self) -> list[_Frame]:
        frames: list[_Frame] | None = getattr(self._local, "frames", None)
        if frames is None:
            frames = self._local.frames = []
        return frames

    @property
    def _frame(self) -> _Frame:
        """That of the innermost scope; an empty one between the pieces of a broken graph."""
        frames = self._frames
        return frames[-1] if frames else _Frame(None, None)

    def enter(self, scope: object, weights: Sequence[Weight], user: nn.Module) -> None:
        """A module begins to run that uses some weights.

        Args:
            scope: Who says so.
            weights: The weights.
            user: The module.
        """
        if torch.compiler.is_compiling():
            self._enter_traced(scope, weights)
            return
        frames = self._frames
        begun = sum(frame.scope is scope for frame in frames)
        if begun and begun >= _running(user):
            self.heal()  # an interrupt has skipped the end of a scope
        frame = _Frame(scope, frames[-1] if frames else None)
        frame.curious = frame.curious or any(not weight.settled for weight in weights)
        hooks = _saved_tensor_hooks()
        for weight in weights:
            for reference, attribute in weight.owners:
                if (module := reference()) is None:
                    continue
                param = module._parameters.get(attribute)  # under fully_shard another at each pass
                if isinstance(param, nn.Parameter) and param.requires_grad:
                    frame.known[id(param)] = weight, param, hooks
                frame.biases += [
                    (bias, reference, name)
                    for name, bias in module._parameters.items()
                    if bias is not None and bias.ndim == 1 and bias.requires_grad
                ]
        frames.append(frame)
        if len(frames) == 1:
            self._local.below = _modes()
            self.__enter__()  # type: ignore[no-untyped-call]

    def pass_by(self, scope: object) -> None:
        """A module begins to run that is not looked into; perhaps inside of a call of itself."""
        frames = self._frames
        if frames and any(frame.scope is scope for frame in frames):
            frames.append(_Frame(scope, None))

    def leave(self, scope: object) -> None:
        """The module has run, or has raised an error."""
        if torch.compiler.is_compiling():
            self._leave_traced(scope)
            return
        frames = self._frames
        if frames and frames[-1].scope is scope:
            frames.pop()
            if not frames:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def heal(self) -> None:
        """Take the mode from torch's stack where an interrupt has left it there."""
        if not self._frames:
            return
        self._frames.clear()
        stack = _modes()
        place = next((i for i, mode in enumerate(stack) if mode is self), None)
        if place is None:  # the end of a mode around it has taken it away in its own place
            place = _common(stack, self._local.below) - 1
        if place < 0:
            return
        for _ in stack[place:]:
            torch._C._pop_torch_function_stack()
        for mode in stack[place + 1 :]:
            torch._C._push_on_torch_function_stack(mode)

    def _enter_traced(self, scope: object, weights: Sequence[Weight]) -> None:
        for weight in weights:
            for reference, attribute in weight.owners:
                module = reference()
                param = None if module is None else module._parameters.get(attribute)
                if isinstance(param, nn.Parameter) and param.requires_grad:
                    self._traced.append((param, weight))
        self._traced_scopes.append(scope)
        if len(self._traced_scopes) == 1:
            self.__enter__()  # type: ignore[no-untyped-call]

    def _leave_traced(self, scope: object) -> None:
        if not self._traced_scopes or self._traced_scopes[-1] is not scope:
            return
        self._traced_scopes.pop()
        if not self._traced_scopes:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._traced.clear()  # not another list: a compiler would hand out what this one holds
            self._traced_views.clear()

    # ---------------------------------------------------------------- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, and look at it if it may multiply with a weight."""
        kwargs = kwargs or {}
        if not (torch.compiler.is_compiling() or self._frames):  # what a compiler does by itself
            return func(*args, **kwargs)
        parse = PRODUCTS.get(func)
        if parse is None:
            if func is F.multi_head_attention_forward:
                return taking_notes(self._attend, args, kwargs)
            out = func(*args, **kwargs)
            if torch.compiler.is_compiling():
                starts = STARTS.get(func)
                if starts is not None:
                    taking_notes(self._note_traced, starts, args, kwargs, out)
            elif func in CASTS:
                self._note_cast(args[0], out)
            elif not self._note_part(func, args, out):
                self._note_function(func, args, out)
            return out
        product = parse(args, kwargs, self._is_known)
        out = func(*args, **kwargs)
        if product is None:
            self._note_function(func, args, out)
            return out
        return self._tapped(product, out)

    def _attend(self, args: Any, kwargs: Any) -> Any:
        """Run the stock attention with its linear maps, splits and chunks visible."""
        query = args[0] if args else kwargs["query"]
        samples = query.shape[1] if query.ndim == 3 else 0  # [L, N, C], also with batch_first
        if torch.compiler.is_compiling():
            self._traced_sequence_first = samples
            with self:
                out = _attention(*args, **kwargs)
            self._traced_sequence_first = 0
            return out
        frame = self._frame
        before, frame.sequence_first = frame.sequence_first, samples
        try:
            with self:
                return _attention(*args, **kwargs)
        finally:
            frame.sequence_first = before

    def _note_function(self, func: Any, args: Any, out: Any) -> None:
        """Remember, in first passes, which functions make something else of a weight."""
        if torch.compiler.is_compiling() or not self._frame.curious:
            return
        made = out[0] if isinstance(out, list | tuple) and out else out
        if not (isinstance(made, Tensor) and made.requires_grad):
            return
        first = args[0] if args and isinstance(args[0], list | tuple) else ()
        for argument in (*args, *first):
            self._note_taken(argument, made, getattr(func, "__name__", str(func)))

    def _note_taken(self, argument: Any, made: Tensor, name: str) -> None:
        """Remember that a function has taken a weight, unless what it made is a view of it."""
        if not isinstance(argument, Tensor):
            return
        known = self._frame.known
        root = argument if argument._base is None else argument._base
        if id(root) in known and made is not argument and made._base is not root:
            known[id(root)][0].functions.add(name)

    def _note_cast(self, source: Any, copy: Any) -> None:
        """Remember a copy in another dtype or order for the time of the outermost scope."""
        if copy is source or not isinstance(copy, Tensor):
            return
        place = self._place(source)
        if place is not None and copy.stride() == source.stride():
            self._frame.copies[id(copy)] = copy, place

    def _note_part(self, func: Any, args: Any, out: Any) -> bool:
        """Remember what an index vector has copied."""
        if func is not Tensor.__getitem__ or not isinstance(args[1], Tensor):
            return False
        source, index = args
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32) or source.ndim != 3:
            return False
        place = self._place(source)
        if place is None or place.entries is not None:
            return False
        self._frame.copies[id(out)] = out, place._replace(entries=index.detach())
        return True

    def _note_traced(self, starts: Starts, args: Any, kwargs: Any, out: Any) -> None:
        """Remember where views of weights start, since a compiler does not tell."""
        source, others = args[0], args[1:]
        found = self._traced_weight(source) if isinstance(source, Tensor) else None
        if found is None:
            return
        known, start = found
        made = out if isinstance(out, list | tuple) else (out,)
        for view, distance in zip(made, starts(source, others, kwargs, made), strict=False):
            if distance is not None:
                self._traced_views.append((view, known, start + distance))

    # ---------------------------------------------------------------- whose numbers these are

    def _is_known(self, argument: Any) -> bool:
        if not isinstance(argument, Tensor):
            return False
        if torch.compiler.is_compiling():
            return self._traced_weight(argument) is not None
        frame, base = self._frame, argument._base
        keys = (id(argument),) if base is None else (id(argument), id(base))
        return any(key in frame.known or key in frame.copies for key in keys)

    def _place(self, argument: Tensor) -> Place | None:
        """Which numbers of which weight an argument is, or None."""
        frame = self._frame
        for root in (argument, argument._base):
            if root is None:
                continue
            shape, strides = tuple(argument.shape), argument.stride()
            if (known := frame.known.get(id(root))) is not None:
                weight, param, hooks = known
                if hooks is not _saved_tensor_hooks():
                    weight.event = CHECKPOINTED  # what recomputes it runs without the scope
                    return None
                offset = int(argument.storage_offset() - param.storage_offset())
                return Place(weight, param, shape, strides, offset)
            if (noted := frame.copies.get(id(root))) is not None:
                copy, place = noted
                offset = int(argument.storage_offset() - copy.storage_offset())
                if place.entries is not None:
                    same = offset == 0 and argument.numel() == copy.numel()
                    return place._replace(shape=shape, strides=strides) if same else None
                return place._replace(shape=shape, strides=strides, offset=place.offset + offset)
        return None

    def _traced_place(self, argument: Tensor) -> Place | None:
        """The same in a graph that is being compiled."""
        found = self._traced_weight(argument)
        if found is None:
            return None
        (param, weight), offset = found
        return Place(weight, param, tuple(argument.shape), argument.stride(), offset)

    def _traced_weight(self, argument: Tensor) -> tuple[tuple[Tensor, Weight], int] | None:
        """Which weight an argument is (a part of), and where it starts in it."""
        for known in self._traced:
            if argument is known[0]:
                return known, 0
        for view, known, start in self._traced_views:
            if argument is view:
                return known, start
        for known in self._traced:
            if argument._base is known[0]:
                if argument.numel() == known[0].numel():
                    return known, 0
                known[1].event = COMPILED_VIEW
        return None

    def _bias(self, argument: Any, size: int) -> BiasSlot | None:
        """The trained bias that an argument is: a parameter of the same modules, or a slice."""
        if not isinstance(argument, Tensor) or argument.ndim != 1 or argument.numel() != size:
            return None
        for param, module, name in self._frame.biases:
            if argument is param:
                return BiasSlot(module, name, None)
            if argument._base is param and (size < 2 or argument.stride(0) == 1):
                offset = int(argument.storage_offset() - param.storage_offset())
                return BiasSlot(module, name, Span(offset, size))
        return None

    # ---------------------------------------------------------------- measuring

    def _tapped(self, product: Product, out: Any) -> Any:
        """Pass the output of a product through the identity, if it is to be measured."""
        if not torch.is_grad_enabled():
            self._note_unrecorded(product)
            return out
        if not isinstance(out, Tensor) or not out.requires_grad:
            return out
        if torch.compiler.is_compiling():
            return taking_notes(self._trace, product, out)
        place = self._place(product.weight)
        if place is None or place.weight.refused:
            return out
        weight = place.weight
        weight.seen = True
        if self._frame.curious:
            self._note_taken(product.bias, out, "add")
        if out.is_meta:
            self._count_rows(product, place, out)
            return out
        obstacle = _obstacle(product.x, out)
        if obstacle is not None:
            self._tell(weight, obstacle)
            return out
        with self._one_at_a_time:  # another thread may be about to declare the same slots
            found = self._matching.shares(product, place)
        if isinstance(found, str):
            weight.event = found
            return out
        shares = [
            Share(
                slot.statistics,
                layer,
                self._rows(rows, layer, product, slot.is_entry(place.weight)),
            )
            for slot, layer, rows in found
            if slot.statistics.enabled
        ]
        if not shares:
            return out
        self._tell(weight, TAPPED)
        x = product.x.detach().clone() if weight.copies else product.x
        leaves: list[Tensor] = []
        for share in shares:
            share.statistics.drop_stale()
            leaves += share.statistics.leaves(place.param)
        terms = self._terms(weight, shares[0].statistics, out)
        call = EagerCall(shares, out.shape, terms, place.param, x._version, weight)
        if found[0][0].is_entry(weight) and not shares[0].statistics.explicit_passes:
            call.turn = self._batch.passes
        return through(out, x, call, leaves)

    def _note_unrecorded(self, product: Product) -> None:
        """Remember why a weight may get a gradient that no call seen here has given it."""
        if torch.compiler.is_compiling():
            return
        place = self._place(product.weight)
        if place is not None and not (place.weight.seen or place.weight.event):
            place.weight.event = UNRECORDED

    def _count_rows(self, product: Product, place: Place, out: Tensor) -> None:
        """See which slots a call without numbers has a share in, and with how many rows."""
        found = self._matching.shares(product, place)
        if isinstance(found, str):
            place.weight.event = found
            return
        outputs = sum(layer.out_channels for _, layer, _ in found)
        for slot, _, _ in found:
            slot.rows += out.numel() // outputs

    def _trace(self, product: Product, out: Tensor) -> Tensor:
        """Tap an output inside of a graph that is being compiled."""
        if torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active():
            return out
        place = self._traced_place(product.weight)
        if place is None or place.weight.refused:
            return out
        found = self._matching.shares(product, place)
        if isinstance(found, str):
            place.weight.event = found
            return out
        shares = [
            Share(
                slot.statistics,
                layer,
                self._rows(rows, layer, product, slot.is_entry(place.weight)),
            )
            for slot, layer, rows in found
            if slot.statistics.enabled
        ]
        if not shares:
            return out
        leaves: list[Tensor] = []
        for share in shares:
            leaves += share.statistics.graph_leaves(place.param)
        terms = self._terms(place.weight, shares[0].statistics, out)
        call = TracedCall(shares, out.shape, terms)
        tapped: Tensor = Identity.apply(out, product.x, call, False, *leaves)
        return tapped

    def _rows(
        self, rows: Rows | None, layer: Layer, product: Product, stacked: bool
    ) -> Rows | None:
        """Rows as those of samples, where a call has them in another order or number.

        Args:
            rows: Rows of the call; None if they are those of its arguments.
            layer: What it is a call of.
            product: The call.
            stacked: Whether it takes one matrix of a stack, to which rows come in no order.
        """
        if layer.kernel_size or len(product.weight.shape) != 2 or stacked:
            return rows
        if torch.compiler.is_compiling():
            samples = self._traced_sequence_first
        else:
            samples = self._frame.sequence_first
        return sequence_first(rows, samples) if samples else by_sample(rows, self._batch.size)

    def _terms(self, weight: Weight, statistics: Statistics, out: Tensor) -> float | None:
        average = statistics.loss_average
        if not callable(average):
            return self._batch.terms(statistics)
        terms = float(average(weight.owners[0][0](), out.shape))
        if not torch.compiler.is_compiling():
            statistics.told_terms = terms
        return terms

    def _tell(self, weight: Weight, event: str) -> None:
        weight.event = event
        for slot in weight.slots:
            slot.statistics.last_event = event


never_a_frame_alone(Uses.__torch_function__)


def _obstacle(x: Any, out: Tensor) -> str | None:
    """Why a call cannot be measured; None if it can."""
    if torch._C._are_functorch_transforms_active():
        return TRANSFORMED
    if torch.autograd.forward_ad._current_level >= 0:
        return FORWARD_MODE
    for role, tensor in (("output", out), ("input", x)):
        why = opaque(role, tensor)
        if why:
            return why
    return EMPTY if not (x.numel() and out.numel()) else None


def _modes() -> list[Any]:
    """The modes of torch's functions, the innermost one last."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(place) for place in range(count)]


def _common(these: Sequence[object], those: Sequence[object]) -> int:
    """How many entries two lists begin with in common."""
    differ = (i for i, (a, b) in enumerate(zip(these, those, strict=False)) if a is not b)
    return next(differ, min(len(these), len(those)))


def _running(module: nn.Module) -> int:
    """How many calls of a module run in this thread: several, of one that calls itself."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals["self"] is module:
            count += 1
        frame = frame.f_back
    return count


def _saved_tensor_hooks() -> Any:
    """Hooks of saved tensors that are on top: those of a checkpoint, inside of one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _check_padding(mask: Tensor, keys: int, samples: int) -> None:
    """As torch does, whose message compilers cannot trace inside of a mode."""
    if tuple(mask.shape[:2]) != (samples, keys):
        raise AssertionError(
            f"key_padding_mask: got {tuple(mask.shape)}. Supported: {(samples, keys)}."
        )


def _stock_attention() -> Any:
    """The stock attention, which asks nobody whether its functions are overridden."""
    stock = F.multi_head_attention_forward
    own = {"has_torch_function": lambda *_: False, "_check_key_padding_mask": _check_padding}
    names = {**F.__dict__, **own}
    copy = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__)
    copy.__kwdefaults__ = stock.__kwdefaults__
    return copy


_attention = _stock_attention()
_CALL = nn.Module._call_impl.__code__
