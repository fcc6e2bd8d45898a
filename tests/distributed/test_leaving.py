"""The end of processes that have trained together."""

import sys
from pathlib import Path

import pytest

from distributed.launching import launch
from tnkfac.optim.distributed import leave

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
