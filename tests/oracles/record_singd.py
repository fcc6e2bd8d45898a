"""Record trajectories of the ``singd`` package as ``tests/data/singd_0_0_5.json``.

Run by hand, only if the cases change::

    pip install singd==0.0.5
    PYTHONPATH=tests python tests/oracles/record_singd.py

The package is used as released, apart from two things around it. Its helper ``lowest_precision``
refuses float64, which four structures need, and is replaced by one that does not. Four other
structures are in the package but have no name there, and get one.
"""

import json
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from oracles.singd_cases import CASES, RECORD_FILE, Case, flat_weights, probe, train

VERSION = "0.0.5"
UNNAMED = {
    "triltopleftdiag": "TrilTopLeftDiagonalMatrix",
    "trilbottomrightdiag": "TrilBottomRightDiagonalMatrix",
    "triutopleftdiag": "TriuTopLeftDiagonalMatrix",
    "triubottomrightdiag": "TriuBottomRightDiagonalMatrix",
}


def lowest_precision(*dtypes: torch.dtype) -> torch.dtype:
    """Return the narrowest of the data types, float64 allowed."""
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)


def load_singd() -> Any:
    """Return the optimizer class of the installed package, ready for all cases."""
    if version("singd") != VERSION:
        raise SystemExit(f"This needs singd {VERSION}, found {version('singd')}.")
    singd = import_module("singd.optim.optimizer").SINGD
    for name in ("blockdiagonal", "hierarchical", "triltoeplitz", "triutoeplitz"):
        vars(import_module(f"singd.structures.{name}"))["lowest_precision"] = lowest_precision
    for name, class_name in UNNAMED.items():
        structure = getattr(import_module(f"singd.structures.{name}"), class_name)
        singd.SUPPORTED_STRUCTURES[name] = structure
    return singd


def record(case: Case, singd: Any) -> dict[str, Any]:
    """Run one case."""
    optimizers: list[Any] = []

    def make_optimizer(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
        optimizers.append(singd(model, **options))
        return optimizers[0]

    model, losses = train(case, make_optimizer)
    return {
        "case": case.describe(),
        "losses": losses,
        "weights": flat_weights(model),
        "K": {name: probe(K.to_dense()) for name, K in optimizers[0].Ks.items()},
        "C": {name: probe(C.to_dense()) for name, C in optimizers[0].Cs.items()},
    }


def main() -> None:
    """Write the file: one line per case."""
    singd = load_singd()
    lines = [f"{json.dumps(case.name)}: {json.dumps(record(case, singd))}" for case in CASES]
    header = json.dumps({"singd": VERSION, "dtype": "float64"})[:-1]
    RECORD_FILE.parent.mkdir(exist_ok=True)
    RECORD_FILE.write_text(header + ', "cases": {\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
