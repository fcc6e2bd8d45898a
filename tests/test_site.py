"""The site of the documentation: built without a warning, every page in its menu."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_every_page_is_in_the_menu(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in start or page.stem == "index", page


def test_links_and_pictures_are_there(site: Path) -> None:
    """Those of the pages, and of the menu; none leaves the site for a file of the repository."""
    for page in site.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        links = re.findall(r'(?:href|src)="([^"#?]+)', html)
        local = [link for link in links if not re.match(r"[a-z]+:|//", link)]
        missing = [link for link in local if not (site / link).exists()]
        assert missing == [] or page.name == "404.html", page
        assert "../" not in "".join(local) or page.name == "404.html"


def test_the_reference_is_of_the_docstrings(site: Path) -> None:
    html = (site / "reference.html").read_text(encoding="utf-8")
    for text in ("relative_damping", "sample_fisher", "create_optimizer_v2", "condition_input"):
        assert text in html
    assert ":math:" not in html
    assert ":class:" not in html
    assert not re.search(r"\\[a-z]+|__init__", re.sub(r"<pre>.*?</pre>", "", html, flags=re.S))
