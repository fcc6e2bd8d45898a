"""Every command that README and docs show is run: here, or by the test named in the table."""

import os
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in block.splitlines()
]
ELSEWHERE = {
    "python examples/digits.py": (".ci/run", 'commands="$(quick_start)"'),
    "python -m pytest -n 2 --dist worksteal": (".ci/run", 'commands="$(quick_start)"'),
    "python examples/trainers/with_lightning.py": (
        "tests/test_trainers.py",
        'script.main(["--epochs", "3", "--out"',
    ),
    "./check": ("check", "python -m pytest"),
    "python examples/imagenet.py": ("tests/test_imagenet.py", "def test_the_commands_of_its_page("),
    "torchrun --nproc-per-node=8 examples/imagenet.py": (
        "tests/test_imagenet.py",
        "def test_the_commands_of_its_page(",
    ),
}
"""How a command starts, and the file and line that run it."""

SEEN = list(dict.fromkeys(command for _, line in COMMANDS for command in line.split(" && ")))
INSTALLS = [command for command in SEEN if " pip install " in command]
HERE = [
    command
    for command in SEEN
    if command not in INSTALLS and not any(command.startswith(start) for start in ELSEWHERE)
]


def test_there_are_commands() -> None:
    assert len(HERE) >= 5
    assert len(INSTALLS) >= 3


@pytest.mark.parametrize("command", HERE)
def test_a_command_runs_as_it_stands(command: str, tmp_path: Path) -> None:
    """In a folder of its own, where only scripts and pages of the repository are seen."""
    for name in ("examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    program, *words = shlex.split(command)
    assert program == "python"
    if words[0].startswith("examples/trainers/with_"):
        pytest.importorskip(Path(words[0]).stem.removeprefix("with_"))
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize("command", INSTALLS)
def test_what_is_installed_is_declared(command: str) -> None:
    """A test installs nothing; those of the quick start are run where everything is checked."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    (wanted,) = re.findall(r'-e "\.\[([\w,]+)\]"', command)
    assert set(wanted.split(",")) <= set(extras)


@pytest.mark.parametrize("start", ELSEWHERE)
def test_all_others_are_run_elsewhere(start: str) -> None:
    assert any(command.startswith(start) for command in SEEN)
    file, text = ELSEWHERE[start]
    assert text in (ROOT / file).read_text(encoding="utf-8")
