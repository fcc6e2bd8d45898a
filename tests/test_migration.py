"""The diffs of docs/migration.md, applied to a loop of each package's form, train."""

import re

import pytest

from oracles.migration_task import LOOPS, PAGE, train

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
LOOP_OF = {
    "kfac-pytorch": "kfac_pytorch",
    "KFAC-Pytorch": "kfac_optimizer",
    "asdl": "asdl",
    "singd": "singd",
    "curvlinops": "curvlinops",
}
"""The loop that belongs to a section."""
DIFFS = [
    (f"{package} {number}", loop, diff)
    for package, loop in LOOP_OF.items()
    for section in re.findall(rf"^## {package}\n(.*?)(?=^## |\Z)", PAGE_TEXT, re.M | re.S)
    for number, diff in enumerate(re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S))
]
RECORDED = {
    "kfac_pytorch": (0.40913917521584114, 1e-4),  # float32 decompositions there
    "singd": (0.6732998302557952, 1e-12),
    "curvlinops": (0.3968600999340036, 1e-9),
}
"""Last loss of the loop with the package that it is for, and how exactly it is met."""


def applied(diff: str, program: str) -> str:
    """The program with every hunk of a diff changed, each found in exactly one place."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert program.count(before) == 1, f"not found exactly once:\n{before}"
        program = program.replace(before, after)
    return program


def test_every_loop_has_a_diff() -> None:
    assert {loop for _, loop, _ in DIFFS} == {path.stem for path in LOOPS.glob("*.py")}
    assert len(DIFFS) == len(re.findall("^```diff", PAGE_TEXT, re.M)) > len(LOOP_OF)


@pytest.mark.parametrize(("loop", "diff"), [d[1:] for d in DIFFS], ids=[d[0] for d in DIFFS])
def test_the_changed_loop_trains(loop: str, diff: str) -> None:
    program = applied(diff, (LOOPS / f"{loop}.py").read_text(encoding="utf-8"))
    assert not re.search(r"^(from|import) (kfac|optimizers|asdl|singd|curvlinops)", program, re.M)
    losses, model = train(program, loop)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
    if loop in RECORDED:
        expected, tolerance = RECORDED[loop]
        assert losses[-1] == pytest.approx(expected, rel=tolerance)
