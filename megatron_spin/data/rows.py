"""The tokenized SFT rows as prepare leaves them, with a hash of what they hold. No torch."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_spin.data.lazy import LazySequence
from megatron_spin.data.table import TOKENS, Table, identity_of, record_batches, write_table

TRAIN = "train.arrow"
EVALUATION = "eval.arrow"
REJECTED = "eval_rejected.arrow"
"""Beside :data:`EVALUATION`: the same prompts with the rejected answers."""
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


def likelihood_file(name: str) -> str:
    """The rows of ``evaluation.likelihood.NAME``."""
    return f"likelihood_{name}.arrow"


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes ``rows``, whole or not at all."""
    write_table(path, _values(rows), SCHEMA)


def open_rows(path: Path) -> Table:
    """The table of a file of rows, memory-mapped. Raises as :class:`megatron_spin.data.table.Table`."""
    return Table(path, SCHEMA)


def load_rows(path: Path) -> Sequence[Row]:
    """The rows of a file, each read when it is asked for.

    Raises:
        RunDirError: the file is missing or damaged.
    """
    table = open_rows(path)
    return LazySequence(lambda number: Row(**table.row(number)), range(len(table)))


def hash_rows(rows: Iterable[Row]) -> str:
    """Identity of ``rows``, as :func:`megatron_spin.data.table.identity_of` gives it."""
    return identity_of(record_batches(_values(rows), SCHEMA))


def _values(rows: Iterable[Row]) -> Iterable[list[Any]]:
    return ([getattr(row, name) for name in SCHEMA.names] for row in rows)
