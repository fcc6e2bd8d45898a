"""Write the tables of options in README.md and docs/kfac.md: `python docs/options.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

import tnkfac

ROOT = Path(__file__).parents[1]
PAGES = {ROOT / "README.md": tnkfac.SINGD, ROOT / "docs/kfac.md": tnkfac.KFAC}
ARGUMENTS = {
    "params": "`model.parameters()`, `model.named_parameters()`, a list of parameter groups, or "
    "the model; layers are found by themselves",
    "fallback_options": "its `lr`, `betas`, `eps`, `weight_decay`, `momentum`",
    "grad_scaler": "a `GradScaler` whose own `step` does not call the optimizer's",
    "process_group": "processes that average gradients by hand",
}
"""What is no hyper-parameter of a group."""
START, END = "| argument | default | meaning |", "\n\n"


def table(optimizer: type[tnkfac.SINGD] | type[tnkfac.KFAC]) -> str:
    """All arguments of a constructor, in the order of its signature."""
    lines = [START, "|---|---|---|"]
    for name, parameter in inspect.signature(optimizer).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        option = optimizer.rule.options.get(name)
        meaning = ARGUMENTS[name] if option is None else option.meaning
        default = parameter.default
        shown = "" if default is parameter.empty else f"`{_spelt(default)}`"
        lines.append(f"| `{name}` | {shown} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _spelt(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return "1e-3" if value == 1e-3 else str(value)


def written(page: str, optimizer: type[tnkfac.SINGD] | type[tnkfac.KFAC]) -> str:
    """A page with its table of options up to date."""
    start = page.index(START)
    end = page.index(END, start)
    return page[:start] + table(optimizer) + page[end:]


if __name__ == "__main__":
    for path, optimizer in PAGES.items():
        path.write_text(written(path.read_text("utf-8"), optimizer), "utf-8")
