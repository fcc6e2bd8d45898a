"""What the README shows works: snippets run, links resolve, two commands start everything.

Every Python snippet is complete: it runs alone, in a namespace of its own.
"""

import inspect
import re
from pathlib import Path

import pytest

import tnkfac

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_python_snippet_runs_on_its_own(number: int) -> None:
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {"__name__": "snippet"})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


def test_quick_start_is_two_commands_of_one_line() -> None:
    section = re.search(r"^## Quick start\n(.*?)(?=^## )", README, re.M | re.S)
    assert section is not None
    blocks = re.findall(r"^```bash\n(.*?)^```", section[1], re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) == 2
    assert "examples/digits.py" in lines[0]
    assert "pytest" in lines[1]


def test_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) >= 4
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_options_table_has_every_argument_with_its_default() -> None:
    parameters = inspect.signature(tnkfac.SINGD).parameters
    section = README.split("## Options")[1].split("## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*)\|", section, re.M))
    assert rows.keys() == parameters.keys()
    given = {name: default.strip("` ") for name, default in rows.items()}
    assert given.pop("params") == ""
    assert {name: eval(text) for name, text in given.items()} == {
        name: parameters[name].default for name in given
    }
