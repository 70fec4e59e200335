"""One process at a time carries out a phase of a run, whoever starts it. No torch."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from megatron_spin.errors import RunDirError
from megatron_spin.log import logger

SECONDS_TO_WAIT = 3.0
"""How long what a killed phase leaves behind may take to end."""


class PhaseLock(contextlib.AbstractContextManager["PhaseLock"]):
    """The lock of a phase, released at the end of the block or of the process, however it ends."""

    def __init__(self, root: Path, phase: str) -> None:
        self._path = root / ".locks" / phase.replace(":", "_")
        self._phase = phase
        self._file: IO[str] | None = None

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            RunDirError: another process has it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self._path, "a+")  # noqa: SIM115  # open as long as the lock is held
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    file.close()
                    raise RunDirError(
                        f"{self._phase} of {self._path.parents[1]} is under way in another process ({holder}): wait "
                        "for it, or stop it"
                    ) from None
            except OSError as error:
                logger.warning(
                    f"{self._path} cannot be locked ({error.strerror}): make sure that nothing else works on this run"
                )
                break
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
