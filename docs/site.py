"""Hooks of mkdocs: pages may link to files of the repository, which the site then has copies of."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

README = "README.md"
ROLE = re.compile(r":(?:math|class|func|meth|mod|data|attr):<code>~?")
MATH = re.compile(r":math:<code>.*?</code>", re.S)
SIGNS = {r"\otimes": "⊗", r"\approx": "≈", r"\lambda": "λ", "^{-1}": "⁻¹", "^T": "ᵀ"}
SIGNS |= {r"\mathrm{vec}\,": "vec"}
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to outside of this folder."""
    root = Path(config["docs_dir"]).parent
    wanted = {
        link
        for page in Path(config["docs_dir"]).glob("*.md")
        for link in OUTSIDE.findall(page.read_text(encoding="utf-8"))
    }
    for link in sorted(wanted - {README}):
        files.append(File.generated(config, f"files/{link}", abs_src_path=str(root / link)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Point links at the copies, and at the first page in the place of the README."""
    markdown = markdown.replace(f"](../{README}", "](index.md")
    return OUTSIDE.sub(r"](files/\1", markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Leave out the roles of docstrings, which Markdown does not know; write formulas plainly."""
    html = MATH.sub(lambda found: plainly(found[0]), html)
    return ROLE.sub("<code>", html)


def plainly(formula: str) -> str:
    """A formula of a docstring without LaTeX."""
    for command, sign in SIGNS.items():
        formula = formula.replace(command, sign)
    return formula
