"""A file operation that fails: one kind of operation on one path, of this process, wherever in the program it is.

Python's audit events tell of every operation before it is done, and what a hook raises takes its place. Operations of
native code (pyarrow, safetensors) have no events; torch's checkpoint reader and writer are Python.
"""

import contextlib
import errno
import os
import re
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
TEMPORARY = re.compile(r"\.\d+\.[0-9a-f]{8}(?=\.tmp$)")
"""What differs from process to process in the names of temporary files."""


class Faults:
    """Notes the operations under a directory and lets one of them fail, as often as it is tried."""

    def __init__(self) -> None:
        self.directory: str | None = None
        """None: nothing is noted."""
        self.failing: str | None = None
        """The operation that fails: its kind and path."""
        self.seen: list[str] = []
        """What was done, in order, each once."""

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.directory is None or event not in OPERATIONS or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(self.directory):
            return
        operation = f"{event} {TEMPORARY.sub('', os.path.relpath(path, self.directory))}"
        if operation not in self.seen:
            self.seen.append(operation)
        if operation == self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


_faults: Faults | None = None


@contextlib.contextmanager
def failing(directory: Path, operation: str | None) -> Iterator[Faults]:
    """Within the block ``operation`` (as :attr:`Faults.seen` has them) under ``directory`` fails with EIO."""
    global _faults
    if _faults is None:
        _faults = Faults()
        sys.addaudithook(_faults.hook)  # for the life of the process: hooks cannot be removed
    _faults.seen, _faults.failing = [], operation
    _faults.directory = os.path.abspath(directory)
    try:
        yield _faults
    finally:
        _faults.directory = None
