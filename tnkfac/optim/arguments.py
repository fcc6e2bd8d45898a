"""Checks of hyper-parameters: every message names argument, value and choices."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature import check_structure

GRAFTING = ("rms", "adam", "sgd", None)
INIT = ("first_batch", "identity")
FALLBACK = ("adamw", "sgd", "error")
LOSS_AVERAGE = ("batch", "batch+sequence", None)
APPROX = ("expand", "reduce")


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


def structure_pair(value: Any) -> tuple[str, str]:
    """One structure name for both factors, or a pair, as a pair.

    Raises:
        TypeError: If it is neither.
        ValueError: If a name is unknown.
    """
    pair = (value, value) if isinstance(value, str) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"structures: got {value!r}. Supported: a name or a pair of names.")
    try:
        return check_structure(pair[0]), check_structure(pair[1])
    except (TypeError, ValueError) as error:
        raise type(error)(f"structures: {str(error).removeprefix('structure: ')}") from None


def dtype_pair(value: Any) -> tuple[str | None, str | None]:
    """One dtype for both factors, or a pair, as names that a checkpoint can hold.

    Raises:
        TypeError: If it is not a floating-point dtype, None, or a pair of these.
    """
    pair = value if isinstance(value, tuple | list) else (value, value)
    names: list[str | None] = []
    for entry in pair:
        dtype = getattr(torch, entry, entry) if isinstance(entry, str) else entry
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"preconditioner_dtype: got {value!r}. Supported: a floating-point torch.dtype, "
                "None, or a pair of these."
            )
        names.append(None if dtype is None else str(dtype).removeprefix("torch."))
    if len(names) != 2:
        raise TypeError(f"preconditioner_dtype: got {value!r}. Supported: one dtype or a pair.")
    return names[0], names[1]


def warn_near_misses(group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Warn of an unknown key of a parameter group that looks like a known one."""
    known = list(known)
    for key in group.keys() - set(known):
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            warnings.warn(
                f"Parameter group has the unknown key {key!r}; did you mean {close[0]!r}? "
                "Unknown keys are kept and ignored.",
                stacklevel=4,
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
