"""The processes of a phase: their ranks, and that none outlives the one that started it. No torch.

An orphan would hold the run directory's lock and the driver's pipes.
"""

import ctypes
import dataclasses
import functools
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def rank() -> int:
    """This process's rank, as its launcher numbers it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many ranks the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among those of a phase."""

    rank: int
    world_size: int


def die_with_parent() -> None:
    """On Linux the kernel kills this process when the thread that started it ends; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@functools.cache
def forks_die_with_us() -> None:
    """The same for every later ``os.fork`` of this process and its forks: Megatron forks the writers of a checkpoint.

    It holds until the process ends. Python runs no hook for what ``subprocess`` or multiprocessing's ``spawn`` start.
    """
    parent = 0

    def before() -> None:
        nonlocal parent
        parent = os.getpid()

    def after() -> None:
        die_with_parent()
        if os.getppid() != parent:  # it was gone before the kernel was asked
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=after)
