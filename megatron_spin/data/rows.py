"""The tokenized SFT rows as prepare leaves them: Parquet in, Parquet out, with a hash of what they hold. No torch."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_spin.errors import RunDirError
from megatron_spin.io import atomic_writer

REJECTED = "eval_rejected.parquet"
"""Beside ``eval.parquet``: the same prompts with the rejected answers."""
TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [("index", pa.int64()), ("prompt_ids", TOKENS), ("real_ids", TOKENS), ("real_truncated", pa.bool_())]
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt with its SFT answer, as token ids."""

    index: int
    """Row number in the source file, from 0."""
    prompt_ids: list[int]
    """With template and BOS, up to where the answer begins."""
    real_ids: list[int]
    """The answer; ends with the end token exactly once unless it was cut."""
    real_truncated: bool
    """Whether the answer was cut, and so has no end token."""


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes ``rows``, whole or not at all."""
    write_table(path, rows, SCHEMA)


def load_rows(path: Path) -> list[Row]:
    """The rows of ``train.parquet`` or ``eval.parquet``.

    Raises:
        RunDirError: the file is missing or damaged.
    """
    return [Row(**row) for row in read_table(path, SCHEMA)]


def hash_rows(rows: Iterable[Any]) -> str:
    """Identity of a sequence of flat dataclasses: sha256 over their fields in order, hexadecimal."""
    return hash_values(list(vars(row).values()) for row in rows)


def hash_values(rows: Iterable[list[Any]]) -> str:
    """As :func:`hash_rows`, of rows that are given as their values."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def write_table(path: Path, rows: Sequence[Any], schema: pa.Schema) -> None:
    """Writes flat dataclasses with the fields of ``schema`` as Parquet, whole or not at all."""
    write_columns(path, [[getattr(row, name) for name in schema.names] for row in rows], schema)


def write_columns(path: Path, rows: Sequence[Sequence[Any]], schema: pa.Schema) -> None:
    """As :func:`write_table`, of rows that are given as their values in the order of ``schema``."""
    columns = {name: [row[column] for row in rows] for column, name in enumerate(schema.names)}
    with atomic_writer(path, "wb") as file:
        pq.write_table(pa.table(columns, schema=schema), file)


def read_table(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    """Rows of a Parquet file as plain data; raises RunDirError where it is missing, damaged or has other columns."""
    try:
        # Not pq.read_table: it imports pyarrow.dataset, and with it pandas.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise RunDirError(
            f"{path} is missing: an earlier phase has not run; run tools/spin.sh, which runs all of them in order"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise RunDirError(f"{path} is damaged ({error}): delete it and run the phase that wrote it again") from None
    if not table.schema.equals(schema):
        raise RunDirError(
            f"{path} has the columns {table.schema.names}, not {schema.names}: another version wrote it; "
            "use a new --run-dir"
        )
    return table.to_pylist()
