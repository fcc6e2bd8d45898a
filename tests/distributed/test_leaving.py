"""The end of processes that have trained together."""

import shutil
import sys
from pathlib import Path

import pytest

from distributed.launching import HERE, launch, python
from tnkfac.optim.distributed import leave

ROOT = HERE.parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


def test_without_other_processes_there_is_nothing_to_leave() -> None:
    leave()


@LINUX
def test_no_thread_outlives_its_process_group(tmp_path: Path) -> None:
    """While models and optimizers are there; one that a variable refers to ends at exit."""
    text = launch("parting.py", 2, str(tmp_path))
    assert text.count(" left\n") == 2 * 5
    assert text.count("with a variable 2 True\n") == 2
    assert text.count("at exit 0\n") == 2


@LINUX
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("what", ["sharded", "ddp", "example"])
def test_no_process_aborts_while_threads_are_slow(what: str) -> None:
    """Without :func:`leave`, every second one of the first kind does."""
    runs = "3" if what == "example" else "10"
    text = python(str(ROOT / "benchmarks" / "ending.py"), "--runs", runs, "--what", what)
    assert "0 processes aborted, 0 runs did not end well" in text
