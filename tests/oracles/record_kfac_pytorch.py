"""Record factors and gradients of kfac-pytorch as ``tests/data/kfac_pytorch.json``.

Run by hand, only if the cases change, with its sources (github.com/gpauloski/kfac-pytorch, version
0.4.1; it is not on PyPI) on the path::

    PYTHONPATH=tests:path/to/kfac-pytorch python tests/oracles/record_kfac_pytorch.py

The numbers in the repository come from its modules, layers and hooks without their communication,
which one process does not need.
"""

import json
from importlib import import_module
from typing import Any

from torch import Tensor

from oracles.kfac_pytorch_cases import CASES, RECORD_FILE, TRAPS, Trap, run, trap_input
from oracles.singd_cases import probe


def main() -> None:
    """Write the file: one line per case."""
    kfac = import_module("kfac.preconditioner").KFACPreconditioner
    made: list[Any] = []

    def precondition(model: Any, **options: Any) -> Any:
        made.append(kfac(model, **options))
        return made[-1]

    def step(model: Any) -> dict[str, Any]:
        layers = dict(made[-1]._layers.values())
        return {
            "A": {name: probe(layer.a_factor) for name, layer in layers.items()},
            "B": {name: probe(layer.g_factor) for name, layer in layers.items()},
            "gradients": [float(f"{g:.8g}") for p in model.parameters() for g in p.grad.flatten()],
        }

    def trap(name: str) -> dict[str, Any]:
        model = Trap(**TRAPS[name])
        preconditioner = kfac(model, factor_decay=0.5, kl_clip=None)
        try:
            model(trap_input()).backward()
            preconditioner.step()
        except (RuntimeError, TypeError) as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        factor: Tensor = preconditioner._layers[model.conv][1].a_factor
        return {"A": factor.tolist()}

    lines = [f'"{case.name}": {json.dumps(run(case, precondition, step))}' for case in CASES]
    traps = [f'"{name}": {json.dumps(trap(name))}' for name in TRAPS]
    text = '{"kfac-pytorch": "0.4.1", "dtype": "float64", "cases": {\n' + ",\n".join(lines)
    RECORD_FILE.write_text(text + '\n}, "traps": {\n' + ",\n".join(traps) + "\n}}\n")


if __name__ == "__main__":
    main()
