"""Starting processes on this machine, none of which outlives its test."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
PATHS = (HERE, HERE.parent, HERE.parents[1], HERE.parents[1] / "examples")
LIMIT = 200
"""Seconds after which all processes of a test are killed."""


def launch(script: str, world: int, *arguments: str, restarts: int = 0) -> str:
    """Run a script under torchrun; return what it prints.

    Args:
        script: A file beside this one, or its whole path.
        world: Number of processes.
        *arguments: Of the script.
        restarts: How often torchrun starts all processes anew once one is gone.
    """
    command = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
    command += [f"--nproc-per-node={world}", "--monitor-interval=0.2", str(HERE / script)]
    # restarted processes find what those before them have left in a store that is the agent's
    return python(*command, *arguments, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def python(*arguments: str, **environment: str) -> str:
    """Run Python, and whatever processes it starts, for a limited time; return what is printed."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
            **environment,
        },
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{text[:4000]}\n...\n{text[-4000:]}"
    return text


def scenarios(script: str) -> int:
    """How many a script has."""
    return (HERE / script).read_text(encoding="utf-8").count("\n@scenario\n")
