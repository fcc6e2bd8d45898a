"""The order of a contraction: slots, steps, and what is computed only once.

A :class:`Program` is the torch-free half of a plan. Slots are numbered values; a value that would
be computed twice gets one slot, so the two equal halves of a Gram product cost one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from tnkfac.einsum.network import Network
from tnkfac.einsum.operands import Operand, Variable

Legs = tuple[str, ...]
Search = Callable[[list[frozenset[str]], frozenset[str], dict[str, int]], Iterable[tuple[int, ...]]]
"""Finds a contraction order: legs of the inputs, of the output, sizes -> positions to contract.

The result of a contraction goes to the end of the list, as in ``opt_einsum.paths``.
"""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COST_OF_WRITING = 8  # multiply-adds that take as long as writing one number


@dataclass(frozen=True)
class Step:
    """One contraction of one or two values.

    Attributes:
        inputs: Slots of the values that are read.
        output: Slot of the value that is written.
        equation: Einsum equation over the axes of the values.
        kind: ``"einsum"``; ``"hadamard"``, an elementwise product with a sum; or ``"pack"``, a
            copy into the layout that the next matrix product wants.
        flops: Multiply-adds.
        size: Number of entries of the result.
    """

    inputs: tuple[int, ...]
    output: int
    equation: str
    kind: str
    flops: int
    size: int

    def __str__(self) -> str:
        """One line of a printed plan."""
        reads = ", ".join(f"v{slot}" for slot in self.inputs)
        return f"v{self.output} = {self.kind}({self.equation!r}, {reads})  # {self.flops:,} flops"


@dataclass
class Program:
    """Slots and steps under construction; equal computations get the same slot."""

    leaves: list[Operand] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    constant: list[bool] = field(default_factory=list)
    result: int = -1
    _known: dict[object, int] = field(default_factory=dict)

    def leaf(self, operand: Operand) -> int:
        """Slot of an operand; the same tensor seen in the same way has one slot."""
        key = (operand.source, operand.shape, operand.view)
        if key not in self._known:
            self._known[key] = self._slot(operand.sizes, not isinstance(operand.source, Variable))
            self.leaves.append(operand)
        return self._known[key]

    def step(
        self, inputs: Sequence[int], legs: Sequence[Legs], result: Legs, pack: bool = False
    ) -> int:
        """Slot of the contraction of one or two slots, computed once."""
        sizes = {
            leg: size
            for slot, names in zip(inputs, legs, strict=True)
            for leg, size in zip(names, self.shapes[slot], strict=True)
        }
        equation = _equation(legs, result)
        key = (tuple(inputs), equation, pack)
        if key not in self._known:
            shape = tuple(sizes[leg] for leg in result)
            constant = all(self.constant[slot] for slot in inputs)
            output = self._slot(shape, constant)
            same = len(legs) == 2 and set(legs[0]) == set(legs[1])
            kind = "pack" if pack else "hadamard" if same else "einsum"
            moves = len(legs) == 1 and set(result) == set(legs[0])
            flops = 0 if constant or moves else prod(sizes.values())
            self.steps.append(Step(tuple(inputs), output, equation, kind, flops, prod(shape)))
            self._known[key] = output
        return self._known[key]

    def _slot(self, shape: tuple[int, ...], constant: bool) -> int:
        self.shapes.append(shape)
        self.constant.append(constant)
        return len(self.shapes) - 1

    @property
    def running(self) -> list[Step]:
        """Steps that depend on a variable."""
        return [step for step in self.steps if not self.constant[step.output]]

    @property
    def flops(self) -> int:
        """Multiply-adds of everything that depends on a variable."""
        return sum(step.flops for step in self.running)

    @property
    def cost(self) -> int:
        """Multiply-adds, and what writing the intermediate results takes."""
        return sum(step.flops + COST_OF_WRITING * step.size for step in self.running)


def _equation(legs: Sequence[Legs], result: Legs) -> str:
    letters: dict[str, str] = {}
    for leg in (leg for names in legs for leg in names):
        if leg not in letters:
            if len(letters) == len(LETTERS):
                raise ValueError(f"A contraction has more than {len(LETTERS)} legs: {legs}.")
            letters[leg] = LETTERS[len(letters)]
    inputs = ",".join("".join(letters[leg] for leg in names) for names in legs)
    return f"{inputs}->{''.join(letters[leg] for leg in result)}"


def contract(program: Program, terms: list[tuple[int, Legs]], output: Legs, search: Search) -> int:
    """Contract all terms to ``output`` in the order that ``search`` finds; return the slot."""
    terms = [_summed(program, terms, index, output) for index in range(len(terms))]
    order: Iterable[tuple[int, ...]] = [(0, 1)] if len(terms) == 2 else ()
    if len(terms) > 2:
        sizes = {
            leg: size
            for slot, legs in terms
            for leg, size in zip(legs, program.shapes[slot], strict=True)
        }
        order = search([frozenset(legs) for _, legs in terms], frozenset(output), sizes)
    for group in order:
        picked = [terms[index] for index in group]
        terms = [term for index, term in enumerate(terms) if index not in group]
        while len(picked) > 1:
            (a, left), (b, right) = picked[:2]
            needed = {*output, *(leg for _, legs in (*terms, *picked[2:]) for leg in legs)}
            both = dict.fromkeys((*left, *right))
            result = tuple(leg for leg in both if leg in needed)
            if not terms and len(picked) == 2:
                result = output
            inputs = (a, b)
            if a == b and set(left) != set(right):
                a, left, right = _packed(program, a, left, right, result)
                inputs = (a, a)
            picked[:2] = [(program.step(inputs, (left, right), result), result)]
        terms += picked
    slot, legs = terms[0]
    return slot if legs == output else program.step((slot,), (legs,), output)


def _summed(
    program: Program, terms: list[tuple[int, Legs]], index: int, output: Legs
) -> tuple[int, Legs]:
    """Sum the legs that no other term and not the output has, as torch would do first."""
    slot, legs = terms[index]
    others = {leg for i, (_, names) in enumerate(terms) if i != index for leg in names}
    result = tuple(dict.fromkeys(leg for leg in legs if leg in others or leg in output))
    return (slot, legs) if result == legs else (program.step((slot,), (legs,), result), result)


def _packed(
    program: Program, slot: int, left: Legs, right: Legs, result: Legs
) -> tuple[int, Legs, Legs]:
    """Lay a value out so that the product with itself needs no further copy."""
    batch = [leg for leg in left if leg in right and leg in result]
    summed = [leg for leg in left if leg in right and leg not in result]
    free = [leg for leg in left if leg not in right]
    order = (*batch, *summed, *free)
    if order == left:
        return slot, left, right
    packed = program.step((slot,), (left,), order, pack=True)
    return packed, order, tuple(right[left.index(leg)] for leg in order)


def whole(network: Network, search: Search) -> Program:
    """Contract all operands in one search."""
    program = Program()
    terms = [(program.leaf(op), op.legs) for op in network.operands]
    program.result = contract(program, terms, network.output.legs, search)
    return program


def by_halves(network: Network, search: Search) -> Program | None:
    """Contract one half, then multiply the result with itself, where both halves are equal."""
    program = Program()
    terms = [(program.leaf(op), op.legs) for op in network.operands]
    half = len(terms) // 2
    if [slot for slot, _ in terms[:half]] != [slot for slot, _ in terms[half:]]:
        return None
    sides = []
    first = _recording(search)  # the second half is contracted like the first
    for inside, outside in ((terms[:half], terms[half:]), (terms[half:], terms[:half])):
        needed = {*network.output.legs, *(leg for _, legs in outside for leg in legs)}
        legs = tuple(dict.fromkeys(leg for _, names in inside for leg in names if leg in needed))
        sides.append((contract(program, inside, legs, first), legs))
    program.result = contract(program, sides, network.output.legs, search)
    return program


def _recording(search: Search) -> Search:
    """A search that answers every call as it did the first."""
    paths: list[tuple[tuple[int, ...], ...]] = []

    def once(
        terms: list[frozenset[str]], output: frozenset[str], sizes: dict[str, int]
    ) -> Iterable[tuple[int, ...]]:
        if not paths:
            paths.append(tuple(search(terms, output, sizes)))
        return paths[0]

    return once


def slot_to_scale(program: Program) -> int | None:
    """The smallest constant or intermediate that enters the result exactly once."""
    uses = {program.result: 1}
    for step in reversed(program.steps):
        for slot in step.inputs:
            uses[slot] = uses.get(slot, 0) + uses.get(step.output, 0)
    running = program.running
    read = {slot for step in running for slot in step.inputs if program.constant[slot]}
    written = {step.output for step in running}
    once = [slot for slot, n in uses.items() if n == 1 and slot in read | written]
    return min(once, key=lambda s: (not program.constant[s], prod(program.shapes[s])), default=None)


def peak_memory(program: Program) -> int:
    """Largest number of entries that results hold at one time."""
    steps = program.running
    last = {slot: index for index, step in enumerate(steps) for slot in step.inputs}
    alive: dict[int, int] = {}
    peak = 0
    for index, step in enumerate(steps):
        alive[step.output] = step.size
        peak = max(peak, sum(alive.values()))
        alive = {s: n for s, n in alive.items() if last.get(s, len(steps)) > index}
    return max(peak, prod(program.shapes[program.result]))
