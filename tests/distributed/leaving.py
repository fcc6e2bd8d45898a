"""The end of a process of a distributed test."""

import os
import sys

import torch.distributed as dist


def leave() -> None:
    """End at once, when all is done and said, without the destructors of libraries.

    After sharded runs one process in some hundred aborts behind its last line ("terminate called
    without an active exception", no Python frame left), and torchrun takes that for a failure of
    the run. The cause is not known. What is tested is over by then; how a process ends is not.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
