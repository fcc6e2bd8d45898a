"""Starting processes on this machine, none of which outlives its test."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 200
"""Seconds after which all processes of a test are killed."""


def launch(script: str, world: int, *arguments: str) -> str:
    """Run a script under torchrun; return what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(HERE / script), *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"},
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, text[-5000:]
    return text


def scenarios(script: str) -> int:
    """How many a script has."""
    return (HERE / script).read_text(encoding="utf-8").count("\n@scenario\n")
