"""A file operation that fails: the n-th of this process under a directory, wherever in the program it is.

Python's audit events tell of every operation before it is done, and what a hook raises takes its place. Operations of
native code (pyarrow, safetensors) have no events; torch's checkpoint reader and writer are Python.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

OPERATIONS = (
    "open",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "shutil.copyfile",
)


class Faults:
    """Counts the operations under a directory and fails one of them."""

    def __init__(self) -> None:
        self.directory: str | None = None
        """None: nothing is counted."""
        self.fail_at = 0
        """Number of the operation that fails, from 1; 0: none."""
        self.seen: list[str] = []
        """What was done, in order: operation and path."""

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.directory is None or event not in OPERATIONS or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(self.directory):
            return
        self.seen.append(f"{event} {os.path.relpath(path, self.directory)}")
        if len(self.seen) == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


_faults: Faults | None = None


@contextlib.contextmanager
def failing(directory: Path, *, fail_at: int) -> Iterator[Faults]:
    """Within the block, the operation number ``fail_at`` under ``directory`` fails with EIO."""
    global _faults
    if _faults is None:
        _faults = Faults()
        sys.addaudithook(_faults.hook)  # for the life of the process: hooks cannot be removed
    _faults.seen, _faults.fail_at = [], fail_at
    _faults.directory = os.path.abspath(directory)
    try:
        yield _faults
    finally:
        _faults.directory = None
