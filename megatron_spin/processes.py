"""Processes that die with the one that started them: an orphan would hold the run directory's lock and the driver's pipes."""

import ctypes
import functools
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """On Linux the kernel kills this process when the thread that started it ends, whatever ends it; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@functools.cache
def forks_die_with_us() -> None:
    """The same for every ``os.fork`` of this process and its forks from now on, as Megatron forks the writers of a checkpoint.

    It holds until the process ends. What ``subprocess`` or multiprocessing's ``spawn`` start is not reached: Python runs no hook there.
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
