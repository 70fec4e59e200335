"""Files that are there whole or not at all, JSON and hashes. No torch."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_spin.errors import RunDirError


@contextlib.contextmanager
def atomic_writer(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path``, which it replaces if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids alone would not do: two hosts that share a file system may have the same.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_text(value: Any) -> str:
    """``value`` as indented JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all."""
    with atomic_writer(path) as file:
        file.write(json_text(value))


def read_json(path: Path) -> Any:
    """Reads a JSON file of the run directory.

    Raises:
        RunDirError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunDirError(
            f"{path} is missing: an earlier phase has not run; run tools/spin.sh, which runs all of them in order"
        ) from None
    except json.JSONDecodeError as error:
        raise RunDirError(f"{path} is not JSON ({error}): delete it and run the phase again") from None


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file of the run directory; none if it does not exist.

    A last line without a line break is left out: its writer was killed, or is still writing it.

    Raises:
        RunDirError: a complete line is not JSON.
    """
    if not path.exists():
        return []
    # Not splitlines(): it also splits at characters that JSON may hold, such as U+2028.
    lines = path.read_text().split("\n")[:-1]
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunDirError(f"{path} line {number} is not JSON ({error}): restore the file") from None
    return values


def sha256(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
