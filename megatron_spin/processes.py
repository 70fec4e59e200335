"""No process outlives the one that started it: an orphan would hold the run directory's lock and the driver's pipes."""

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
    """The same for every process that this one forks from now on, as Megatron does to write a checkpoint."""
    os.register_at_fork(after_in_child=die_with_parent)
