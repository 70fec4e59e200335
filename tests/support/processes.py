"""Who is still there."""

import time
from collections.abc import Sequence

import psutil


def survivors(processes: Sequence[psutil.Process], *, seconds: float = 10) -> list[psutil.Process]:
    """Those that still run after ``seconds``, or none as soon as all have ended (an orphan may stay a zombie where
    nobody reaps it).
    """
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
