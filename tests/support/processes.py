"""Processes of their own, and who of them is still there."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.support.runs import REPOSITORY


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process of its own, with ``path`` before everything else that can be imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=300
    )


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
