"""What README and docs show works: snippets run, links resolve, two commands start everything.

Every Python snippet is complete: it runs alone, in a namespace of its own.
"""

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import tnkfac

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {
    f"{page.name} {number}": snippet
    for page in PAGES
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    )
}


TABLES = runpy.run_path(str(ROOT / "docs/options.py"))
OPTION_PAGES: dict[Path, Any] = TABLES["PAGES"]


@pytest.mark.parametrize("name", SNIPPETS)
def test_every_python_snippet_runs_on_its_own(name: str) -> None:
    exec(compile(SNIPPETS[name], name, "exec"), {"__name__": "snippet"})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 10


def test_quick_start_is_two_commands_of_one_line() -> None:
    section = re.search(r"^## Quick start\n(.*?)(?=^## )", README, re.M | re.S)
    assert section is not None
    blocks = re.findall(r"^```bash\n(.*?)^```", section[1], re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) == 2
    assert "examples/digits.py" in lines[0]
    assert "pytest" in lines[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", OPTION_PAGES, ids=lambda page: page.name)
def test_tables_of_options_are_those_of_the_code(page: Path) -> None:
    """Written by `python docs/options.py`."""
    text = page.read_text(encoding="utf-8")
    assert TABLES["written"](text, OPTION_PAGES[page]) == text


@pytest.mark.parametrize("optimizer", OPTION_PAGES.values())
def test_signatures_have_the_defaults_of_the_options(optimizer: Any) -> None:
    parameters = inspect.signature(optimizer).parameters
    options = optimizer.rule.options
    shown = {name for name in options if not name.startswith("fallback_")}
    assert shown <= parameters.keys()
    assert {name: parameters[name].default for name in shown} == {
        name: options[name].default for name in shown
    }


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
