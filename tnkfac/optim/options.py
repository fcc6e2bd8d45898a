"""Checks of hyper-parameters: every message names argument, value and choices."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature import check_factor_structure, check_structure, warn

Group = dict[str, Any]
"""A parameter group, with its hyper-parameters."""
GRAFTING = ("rms", "adam", "sgd", None)
INIT = ("first_batch", "identity")
FALLBACK = ("adamw", "sgd", "error")
LOSS_AVERAGE = ("batch", "batch+sequence", None)
APPROX = ("expand", "reduce")
REFUSED = ("maximize", "differentiable")
"""Keys of groups of torch's optimizers that change what a step does, and are not to be had here."""


def choices(name: str, value: object, supported: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``supported``.

    Raises:
        ValueError: If it is not.
    """
    supported = tuple(supported)
    if value not in supported:
        raise ValueError(f"{name}: got {value!r}. Supported: {', '.join(map(repr, supported))}.")


def number(name: str, value: Any, least: float = 0.0, below: float | None = None) -> None:
    """Raise unless ``value`` is a number in ``[least, below)``. Tensors on a device are trusted.

    Raises:
        TypeError: If it is no number.
        ValueError: If it lies outside.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, not a scalar.")
        if value.device.type != "cpu":
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}. Supported: a number.")
    if not value >= least or (below is not None and not value < below):
        end = "" if below is None else f" and below {below:g}"
        raise ValueError(f"{name}: got {value!r}. Supported: at least {least:g}{end}.")


def flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is a bool.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}. Supported: a bool, True or False.")


def interval(name: str, value: Any) -> None:
    """Raise unless ``value`` is a positive int or a callable of the step.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not positive.
    """
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}. Supported: a positive int, a callable.")
    if value < 1:
        raise ValueError(f"{name}: got {value!r}. Supported: a positive int, a callable.")


def whole(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an int of at least ``least``.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}. Supported: an int of at least {least}.")
    if value < least:
        raise ValueError(f"{name}: got {value!r}. Supported: an int of at least {least}.")


def names(name: str, value: Any) -> tuple[str, ...]:
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


def take_aliases(
    defaults: dict[str, Any],
    given: Mapping[str, Any],
    known: Mapping[str, str],
    signature: Callable[..., Any],
) -> None:
    """Put arguments under their names here, as if they had been given so.

    Args:
        defaults: Values of all arguments, changed in place.
        given: Other arguments.
        known: What each of them is called here.
        signature: The function whose defaults tell whether an argument was given.

    Raises:
        TypeError: For an unknown argument, or one that was given twice.
    """
    parameters = inspect.signature(signature).parameters
    for alias, value in given.items():
        if alias not in known:
            close = difflib.get_close_matches(alias, [*parameters, *known], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"Got an unexpected argument {alias!r}.{hint}")
        name = known[alias]
        twice = [other for other in given if known.get(other) == name and other != alias]
        if twice or defaults[name] != parameters[name].default:
            raise TypeError(f"Got {twice[0] if twice else name!r} and its alias {alias!r}.")
        defaults[name] = value


def shared(group: Mapping[str, Any], given: dict[str, Any]) -> None:
    """Check the hyper-parameters that all optimizers have; bring ``given`` to its stored form.

    Raises:
        TypeError: For a value of the wrong type.
        ValueError: For a value out of range.
    """
    flag("capture_embeddings", group.get("capture_embeddings", False))
    if "fallback_options" in given:
        settings = fallback_settings(str(group["fallback"]), given.pop("fallback_options"))
        given.update({k: v for k, v in settings.items() if k not in given})
    for name in REFUSED:
        if given.get(name):
            raise ValueError(f"{name}: got {given[name]!r} in a parameter group. Supported: False.")
    number("lr", group["lr"])
    number("momentum", group["momentum"], below=1.0)
    if group["damping"] is not None:
        number("damping", group["damping"])
    number("relative_damping", group["relative_damping"])
    number("weight_decay", group["weight_decay"])
    if not callable(group["loss_average"]):
        choices("loss_average", group["loss_average"], LOSS_AVERAGE)
    choices("kfac_approx", group["kfac_approx"], APPROX)
    grafting(group["grafting"])
    choices("fallback", group["fallback"], FALLBACK)
    if group["kl_clip"] is not None:
        number("kl_clip", group["kl_clip"])
    fraction = group["grad_worker_fraction"]
    number("grad_worker_fraction", fraction)
    if fraction > 1:
        raise ValueError(f"grad_worker_fraction: got {fraction}. Supported: 0 to 1.")
    flag("decoupled_weight_decay", group["decoupled_weight_decay"])
    given["skip_layers"] = names("skip_layers", group["skip_layers"])
    flag("capture_tied", group["capture_tied"])


def grafting(value: Any) -> None:
    """Raise unless this can be the size of a layer's update.

    Raises:
        TypeError: If it is no name, number or None.
        ValueError: For an unknown name, or a number that is not positive.
    """
    named = value is None or isinstance(value, str)
    if value not in GRAFTING if named else isinstance(value, bool) or value == 0:
        listed = ", ".join(map(repr, GRAFTING))
        raise ValueError(f"grafting: got {value!r}. Supported: {listed}, a positive number.")
    if not named:
        number("grafting", value)


def structure_pair(value: Any, factors: bool = False) -> tuple[str, str]:
    """One structure name for both factors, or a pair, as a pair.

    Args:
        value: What was given.
        factors: Whether only structures of factors will do.

    Raises:
        TypeError: If it is neither.
        ValueError: If a name is unknown.
    """
    pair = (value, value) if isinstance(value, str) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"structures: got {value!r}. Supported: a name or a pair of names.")
    try:
        check = check_factor_structure if factors else check_structure
        return check(pair[0]), check(pair[1])
    except (TypeError, ValueError) as error:
        raise type(error)(f"structures: {str(error).removeprefix('structure: ')}") from None


def dtype_pair(value: Any) -> tuple[str | None, str | None]:
    """One dtype for both factors, or a pair, as names that a checkpoint can hold.

    Raises:
        TypeError: If it is not a floating-point dtype, None, or a pair of these.
    """
    pair = value if isinstance(value, tuple | list) else (value, value)
    found = [None if entry is None else _dtype_name(entry) for entry in pair]
    if len(found) != 2 or "" in found:
        raise TypeError(
            f"preconditioner_dtype: got {value!r}. Supported: a floating-point torch.dtype, "
            "None, or a pair of these."
        )
    return found[0], found[1]


def dtype_name(name: str, value: Any) -> str:
    """A dtype as a name that a checkpoint can hold.

    Raises:
        TypeError: If it is not a floating-point dtype.
    """
    found = _dtype_name(value)
    if not found:
        raise TypeError(f"{name}: got {value!r}. Supported: a floating-point torch.dtype.")
    return found


def _dtype_name(value: Any) -> str:
    """Name of a floating-point dtype; empty for anything else."""
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return str(dtype).removeprefix("torch.") if floating else ""


def warn_near_misses(group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Warn of an unknown key of a parameter group that looks like a known one."""
    known = list(known)
    for key in group.keys() - set(known):
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            warn(
                f"Parameter group has the unknown key {key!r}; did you mean {close[0]!r}? "
                "Unknown keys are kept and ignored."
            )


def fallback_settings(kind: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Flat group entries of the fallback: ``fallback`` and ``fallback_<option>``.

    Raises:
        TypeError: If the options are not a dict.
        ValueError: For an unknown kind or option, or a value out of range.
    """
    choices("fallback", kind, FALLBACK)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"fallback_options: got {options!r}. Supported: a dict or None.")
    settings: dict[str, Any] = {
        "lr": None,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": None,
        "momentum": None,
    }
    for key, value in (options or {}).items():
        choices("fallback_options", key, settings)
        if key == "betas":
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"fallback_options['betas']: got {value!r}. Supported: a pair.")
            for beta in value:
                number("fallback_options['betas']", beta, below=1.0)
            value = tuple(value)
        elif value is not None:
            number(f"fallback_options[{key!r}]", value)
        settings[key] = value
    return {"fallback": kind, **{f"fallback_{key}": value for key, value in settings.items()}}
