"""Hyper-parameters: one row each with default, check and meaning.

Every message names argument, value and choices. A check returns the value as groups store it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from tnkfac.curvature.callers import warn
from tnkfac.curvature.structures import check_factor_structure, check_structure

Group = dict[str, Any]
"""A parameter group, with its hyper-parameters."""
Params = ParamsT | nn.Module
"""Parameters, named parameters, parameter groups, or a module."""
Check = Callable[[str, object], object]
"""Takes name and value; returns the value as it is stored, or raises."""

GRAFTING = ("rms", "adam", "sgd", None)
INIT = ("first_batch", "identity")
FALLBACK = ("adamw", "sgd", "error")
LOSS_AVERAGE = ("batch", "batch+sequence", None)
APPROX = ("expand", "reduce")
REFUSED = ("maximize", "differentiable")
"""Keys of groups of torch's optimizers that change what a step does, and are not to be had here."""


@dataclass(frozen=True)
class Option:
    """A hyper-parameter of a parameter group.

    Attributes:
        default: Its value in groups that do not set it.
        check: Raises for values that are not supported, and returns others as they are stored.
        meaning: One line for people.
    """

    default: object
    check: Check
    meaning: str

    def but(self, default: object, meaning: str | None = None) -> Option:
        """This option with another default."""
        return replace(self, default=default, meaning=meaning or self.meaning)


Options = Mapping[str, Option]
"""Hyper-parameters by name."""


# -------------------------------------------------------------------------------- checks


def choices(name: str, value: object, supported: Iterable[object]) -> object:
    """Raise unless ``value`` is one of ``supported``.

    Raises:
        ValueError: If it is not.
    """
    supported = tuple(supported)
    if value not in supported:
        raise ValueError(f"{name}: got {value!r}. Supported: {', '.join(map(repr, supported))}.")
    return value


def number(
    name: str, value: object, least: float = 0.0, below: float | None = None
) -> float | Tensor:
    """Raise unless ``value`` is a number in ``[least, below)``. Tensors on a device are trusted.

    Raises:
        TypeError: If it is no number.
        ValueError: If it lies outside.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, not a scalar.")
        if value.device.type == "cpu":
            number(name, value.item(), least, below)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}. Supported: a number.")
    if not value >= least or (below is not None and not value < below):
        end = "" if below is None else f" and below {below:g}"
        raise ValueError(f"{name}: got {value!r}. Supported: at least {least:g}{end}.")
    return value


def fraction(name: str, value: object) -> float | Tensor:
    """Raise unless ``value`` is a number from 0 to 1.

    Raises:
        TypeError: If it is no number.
        ValueError: If it lies outside.
    """
    share = number(name, value)
    if share > 1:
        raise ValueError(f"{name}: got {value}. Supported: 0 to 1.")
    return share


def flag(name: str, value: object) -> bool:
    """Raise unless ``value`` is a bool.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}. Supported: a bool, True or False.")
    return value


def interval(name: str, value: object) -> object:
    """Raise unless ``value`` is a positive int or a callable of the step.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not positive.
    """
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}. Supported: a positive int, a callable.")
    if value < 1:
        raise ValueError(f"{name}: got {value!r}. Supported: a positive int, a callable.")
    return value


def growing_interval(name: str, value: object) -> object:
    """Raise unless ``value`` is an interval, or ``"auto"`` for one that grows.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is not positive, or another string.
    """
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(
                f"{name}: got {value!r}. Supported: a positive int, 'auto', a callable."
            )
        return value
    return interval(name, value)


def whole(name: str, value: object, least: int) -> int:
    """Raise unless ``value`` is an int of at least ``least``.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}. Supported: an int of at least {least}.")
    if value < least:
        raise ValueError(f"{name}: got {value!r}. Supported: an int of at least {least}.")
    return value


def names(name: str, value: object) -> tuple[str, ...]:
    """Several strings, as a tuple.

    Raises:
        TypeError: If they are anything else.
    """
    listed = () if value is None else value
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise TypeError(f"{name}: got {value!r}. Supported: a sequence of names.")
    listed = tuple(listed)
    if not all(isinstance(entry, str) for entry in listed):
        raise TypeError(f"{name}: got {value!r}. Supported: a sequence of names.")
    return listed


def optional(check: Check) -> Check:
    """The check of a hyper-parameter that may be None."""
    return lambda name, value: None if value is None else check(name, value)


def automatic(check: Check) -> Check:
    """The check of a hyper-parameter that may be None or ``"auto"``.

    Raises:
        ValueError: For another string.
    """

    def checked(name: str, value: object) -> object:
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"{name}: got {value!r}. Supported: a number, 'auto', None.")
        return value if value is None or value == "auto" else check(name, value)

    return checked


def scheduled(check: Check) -> Check:
    """The check of a hyper-parameter that may be a callable."""
    return lambda name, value: value if callable(value) else check(name, value)


def grafting(name: str, value: object) -> object:
    """Raise unless this can be the size of a layer's update.

    Raises:
        TypeError: If it is no name, number or None.
        ValueError: For an unknown name, or a number that is not positive.
    """
    named = value is None or isinstance(value, str)
    if value not in GRAFTING if named else isinstance(value, bool) or value == 0:
        listed = ", ".join(map(repr, GRAFTING))
        raise ValueError(f"{name}: got {value!r}. Supported: {listed}, a positive number.")
    return value if named else number(name, value)


def structure_pair(name: str, value: object, factors: bool = False) -> tuple[str, str]:
    """One structure name for both factors, or a pair, as a pair.

    Args:
        name: Of the argument.
        value: What was given.
        factors: Whether only structures of factors will do.

    Raises:
        TypeError: If it is neither.
        ValueError: If a name is unknown.
    """
    pair = (value, value) if isinstance(value, str) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name}: got {value!r}. Supported: a name or a pair of names.")
    try:
        check = check_factor_structure if factors else check_structure
        return check(pair[0]), check(pair[1])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('structure: ')}") from None


def dtype_pair(name: str, value: object) -> tuple[str | None, str | None]:
    """One dtype for both factors, or a pair, as names that a checkpoint can hold.

    Raises:
        TypeError: If it is not a floating-point dtype, None, or a pair of these.
    """
    pair = value if isinstance(value, tuple | list) else (value, value)
    dtypes = [None if entry is None else _dtype_name(entry) for entry in pair]
    if len(dtypes) != 2 or "" in dtypes:
        raise TypeError(
            f"{name}: got {value!r}. Supported: a floating-point torch.dtype, "
            "None, or a pair of these."
        )
    return dtypes[0], dtypes[1]


def dtype_name(name: str, value: object) -> str:
    """A dtype as a name that a checkpoint can hold.

    Raises:
        TypeError: If it is not a floating-point dtype.
    """
    dtype = _dtype_name(value)
    if not dtype:
        raise TypeError(f"{name}: got {value!r}. Supported: a floating-point torch.dtype.")
    return dtype


def _dtype_name(value: object) -> str:
    """Name of a floating-point dtype; empty for anything else."""
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return str(dtype).removeprefix("torch.") if floating else ""


def _betas(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: got {value!r}. Supported: a pair.")
    for beta in value:
        number(name, beta, below=1.0)
    return value[0], value[1]


# -------------------------------------------------------------------------------- tables

FALLBACK_OPTIONS: Options = {
    "lr": Option(None, optional(number), "learning rate; None for that of the group"),
    "betas": Option((0.9, 0.999), _betas, "decays of AdamW's moving averages"),
    "eps": Option(1e-8, number, "added to the root of AdamW's second moments"),
    "weight_decay": Option(None, optional(number), "coefficient; None for that of the group"),
    "momentum": Option(None, optional(number), "of SGD; None for that of the group"),
}
"""Entries of ``fallback_options``; groups have them as ``fallback_<name>``."""

SHARED: Options = {
    "lr": Option(1e-3, number, "learning rate; a number or a tensor"),
    "momentum": Option(
        0.0,
        partial(number, below=1.0),
        "of the parameter updates; a moving average with grafting",
    ),
    "weight_decay": Option(
        0.0, number, "decoupled, as in AdamW, or added to the gradient: `decoupled_weight_decay`"
    ),
    "decoupled_weight_decay": Option(
        True, flag, "shrink parameters beside the update, instead of adding decay to it"
    ),
    "loss_average": Option(
        "batch",
        scheduled(partial(choices, supported=LOSS_AVERAGE)),
        'what the loss is averaged over: `"batch"`, `"batch+sequence"`, `None` for a sum, or a '
        "callable `(module, output_shape) -> number`",
    ),
    "structures": Option(
        "auto", structure_pair, "a name of a structure, or a pair of them (input, output)"
    ),
    "kfac_approx": Option(
        "expand",
        partial(choices, supported=APPROX),
        '`"expand"` (KFC) or `"reduce"`, which averages positions first and is cheaper',
    ),
    "grafting": Option(
        None,
        grafting,
        'size of a layer\'s update: a number (its root mean square), `"rms"` (0.2), `"adam"`, '
        '`"sgd"`, or `None` for the raw natural gradient',
    ),
    "kl_clip": Option(
        None,
        optional(number),
        "bound on the quadratic change of the loss over all layers; only with `grafting=None`, "
        "since grafting sets the size of an update afterwards",
    ),
    "grad_worker_fraction": Option(
        1.0, fraction, "share of the processes that keep the preconditioner of a layer"
    ),
    "skip_layers": Option(
        (), names, "names of modules, parameters or types that the fallback trains"
    ),
    "capture_tied": Option(
        False,
        flag,
        "whether a weight that another module, such as an embedding, has as well is captured from "
        "the calls of its layers",
    ),
    "capture_embeddings": Option(
        False,
        flag,
        "whether `Embedding` layers have curvature, too; their input factor has a row for every "
        "index",
    ),
    "fallback": Option(
        "adamw",
        partial(choices, supported=FALLBACK),
        'for all other parameters: `"adamw"`, `"sgd"`, or `"error"` to refuse them',
    ),
    **{
        f"fallback_{name}": Option(
            option.default, option.check, f"of the fallback: {option.meaning}"
        )
        for name, option in FALLBACK_OPTIONS.items()
    },
}
"""Hyper-parameters of the step itself, whatever the rule."""

DAMPING: Options = {
    "damping": Option(
        None,
        optional(number),
        "added to the curvature; `None` for `relative_damping` times its mean eigenvalue",
    ),
    "relative_damping": Option(
        0.03, number, "share of the mean eigenvalue that `damping=None` stands for"
    ),
}
"""Damping of the curvature of a layer."""


def chosen(options: Options, arguments: Mapping[str, object]) -> Group:
    """Hyper-parameters among some arguments, with defaults for the others.

    Args:
        options: The hyper-parameters.
        arguments: Values by name, for example ``locals()``; ``fallback_options`` is spelt out.
    """
    group = {name: arguments.get(name, option.default) for name, option in options.items()}
    if "fallback_options" in arguments:
        group |= fallback_settings(group["fallback"], arguments["fallback_options"])
    return group


def check(options: Options, group: Group, given: Group) -> None:
    """Check all hyper-parameters of a group, and bring those in ``given`` to their stored form.

    Args:
        options: The hyper-parameters.
        group: Values of all of them.
        given: Those of the group that were set, changed in place.

    Raises:
        TypeError: For a value of the wrong type.
        ValueError: For a value out of range.
    """
    if "fallback_options" in given:
        settings = fallback_settings(group["fallback"], given.pop("fallback_options"))
        given.update({k: v for k, v in settings.items() if k not in given})
    for name in REFUSED:
        if given.get(name):
            raise ValueError(f"{name}: got {given[name]!r} in a parameter group. Supported: False.")
    for name, option in options.items():
        stored = option.check(name, given.get(name, group[name]))
        if name in given:
            given[name] = stored


def fallback_settings(kind: object, given: object) -> Group:
    """Flat group entries of the fallback: ``fallback_<option>``.

    Raises:
        TypeError: If the options are not a dict.
        ValueError: For an unknown kind or option, or a value out of range.
    """
    choices("fallback", kind, FALLBACK)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"fallback_options: got {given!r}. Supported: a dict or None.")
    values = {name: option.default for name, option in FALLBACK_OPTIONS.items()}
    for key, value in given.items() if given else ():
        choices("fallback_options", key, values)
        values[key] = FALLBACK_OPTIONS[key].check(f"fallback_options[{key!r}]", value)
    return {f"fallback_{key}": value for key, value in values.items()}


def take_aliases(
    arguments: dict[str, object],
    given: Mapping[str, object],
    known: Mapping[str, str],
    signature: Callable[..., object],
) -> None:
    """Put arguments under their names here, as if they had been given so.

    Args:
        arguments: Values of all arguments, changed in place.
        given: Other arguments.
        known: What each of them is called here.
        signature: The function whose defaults tell whether an argument was given.

    Raises:
        TypeError: For an unknown argument, or one that was given twice.
    """
    parameters = inspect.signature(signature).parameters
    for alias, value in given.items():
        if alias not in known:
            refuse_unknown(alias, [*parameters, *known])
        name = known[alias]
        twice = [key for key in given if known.get(key) == name and key != alias]
        if twice or arguments[name] != parameters[name].default:
            raise TypeError(f"Got {twice[0] if twice else name!r} and its alias {alias!r}.")
        arguments[name] = value


def refuse_unknown(name: str, known: Iterable[str]) -> None:
    """Raise for an argument that there is not, with the one that it looks like.

    Raises:
        TypeError: Always.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise TypeError(f"Got an unexpected argument {name!r}.{hint}")


def warn_near_misses(group: Mapping[str, object], known: Iterable[str]) -> None:
    """Warn of an unknown key of a parameter group that looks like a known one."""
    known = list(known)
    for key in group.keys() - set(known):
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            warn(
                f"Parameter group has the unknown key {key!r}; did you mean {close[0]!r}? "
                "Unknown keys are kept and ignored."
            )
