"""Tables with columns of token ids: written batch by batch, memory-mapped, and hashed by what they hold. No torch.

The files are Arrow IPC files (Feather version 2). All processes of a machine that map one share its pages, and only the
pages that are read are in memory. Where there is no ``NAME.arrow``, ``NAME.parquet`` of an earlier version is read.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_spin.errors import RunDirError
from megatron_spin.io import atomic_writer

TOKENS = pa.list_(pa.int32())
ROWS_PER_BATCH = 1024
"""Enough for Arrow's vectorized functions; few enough that a batch of the longest answers fits 32-bit offsets."""
_TABULATED_IDS = 1 << 18
"""Ids below this have their text looked up in a table; every vocabulary of today is smaller."""


class TokenColumn:
    """One sequence of token ids per row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        # The numbers of the chunks' first rows, then that of all rows.
        self._starts = [0, *itertools.accumulate(len(chunk) for chunk in chunks)]
        self._offsets = [_view(chunk.offsets) for chunk in chunks]
        self._values = [_view(chunk.values) for chunk in chunks]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> np.ndarray:
        """The ids of ``row``, [length] int32: a view of the file, not a copy."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        chunk = bisect.bisect_right(self._starts, row) - 1
        first = row - self._starts[chunk]
        start, end = self._offsets[chunk][first : first + 2]
        return self._values[chunk][start:end]


class Table:
    """A file of :func:`write_table`, memory-mapped."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Opens ``path``, whose suffix is ``.arrow``, or the Parquet file of the same name.

        Raises:
            RunDirError: it is missing or damaged, or has other columns.
        """
        self.path = _existing(path)
        with _damage_named(self.path):
            if self.path.suffix == ".arrow":
                table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
            else:
                import pyarrow.parquet as pq  # here, not above: only the files of earlier versions need it

                # Not pq.read_table: it imports pyarrow.dataset, and with it pandas.
                with pq.ParquetFile(self.path) as file:
                    table = file.read()
        if not table.schema.equals(schema):
            raise RunDirError(
                f"{self.path} has the columns {table.schema.names}, not {schema.names}: another version wrote it; "
                "use a new --run-dir"
            )
        self._table = table
        self._tokens = {}
        with _damage_named(self.path):
            for field in schema:
                if field.type == TOKENS:
                    self._tokens[field.name] = TokenColumn(table.column(field.name))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def tokens(self, name: str) -> TokenColumn:
        """A column of token ids."""
        return self._tokens[name]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [rows]."""
        return np.concatenate([_view(chunk) for chunk in self._table.column(name).chunks])

    def row(self, number: int) -> dict[str, Any]:
        """The values of one row as plain data, by column."""
        values: dict[str, Any] = {}
        for name in self._table.column_names:
            tokens = self._tokens.get(name)
            values[name] = self._table.column(name)[number].as_py() if tokens is None else tokens[number].tolist()
        return values

    def identity(self) -> str:
        """Hash of all rows as :func:`identity_of` gives it.

        It reads the file beside the mapping, so that the pages of a large one do not stay in this process.

        Raises:
            RunDirError: the file is damaged.
        """
        with _damage_named(self.path):
            return identity_of(self._read_batches())

    def _read_batches(self) -> Iterator[pa.RecordBatch]:
        if self.path.suffix == ".arrow":
            with pa.OSFile(str(self.path)) as file:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)
        else:
            yield from self._table.to_batches(max_chunksize=ROWS_PER_BATCH)


def write_table(path: Path, rows: Iterable[Sequence[Any]], schema: pa.Schema) -> str:
    """Writes ``rows``, given as their values in the order of ``schema``, whole or not at all; returns their identity.

    A Parquet file of the same name, which an earlier version wrote, is removed.
    """
    with atomic_writer(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:

        def written() -> Iterator[pa.RecordBatch]:
            for batch in record_batches(rows, schema):
                writer.write_batch(batch)
                yield batch

        identity = identity_of(written())
    path.with_suffix(".parquet").unlink(missing_ok=True)
    return identity


def record_batches(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """``rows`` in batches of :data:`ROWS_PER_BATCH`."""
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, ROWS_PER_BATCH)):
        columns = []
        for number, field in enumerate(schema):
            columns.append(pa.array([row[number] for row in batch], field.type))
        yield pa.record_batch(columns, schema=schema)


def identity_of(batches: Iterable[pa.RecordBatch]) -> str:
    """sha256 over one line of JSON per row, a list of its values without spaces; hexadecimal.

    The lines are put together column by column: a million rows of 300 tokens take seconds.
    """
    digest = hashlib.sha256()
    for batch in batches:
        if not batch.num_rows:
            continue
        columns = [_json_texts(column) for column in batch.columns]
        lines = pc.binary_join_element_wise("[", pc.binary_join_element_wise(*columns, ","), "]\n", "")
        ends = np.frombuffer(lines.buffers()[1], np.int32)
        digest.update(memoryview(lines.buffers()[2])[ends[0] : ends[len(lines)]])
    return digest.hexdigest()


def _json_texts(column: pa.Array) -> pa.Array:
    """Each value of ``column`` as JSON."""
    if column.type != TOKENS:
        texts = pc.cast(column, pa.string())
        # Words such as "stop", in which nothing needs to be escaped.
        return pc.binary_join_element_wise('"', texts, '"', "") if column.type == pa.string() else texts
    values = column.flatten()
    texts = _texts_with_comma(values)
    # The texts of all ids are contiguous, so those of one row are one text, which only needs offsets of its own.
    ends = np.frombuffer(texts.buffers()[1], np.int32)
    offsets = _view(column.offsets)
    row_ends = np.ascontiguousarray(ends[offsets - offsets[0]])
    rows = pa.StringArray.from_buffers(len(column), pa.py_buffer(row_ends), texts.buffers()[2])
    return pc.binary_join_element_wise("[", pc.ascii_rtrim(rows, ","), "]", "")


def _texts_with_comma(ids: pa.Array) -> pa.Array:
    """The decimal text of each id, with a comma behind it."""
    bounds = pc.min_max(ids).as_py()
    if len(ids) and bounds["min"] >= 0 and bounds["max"] < _TABULATED_IDS:
        return _tabulated_texts().take(ids)
    return pc.binary_join_element_wise(pc.cast(ids, pa.string()), "", ",")


@functools.cache
def _tabulated_texts() -> pa.Array:
    ids = pa.array(np.arange(_TABULATED_IDS, dtype=np.int32))
    return pc.binary_join_element_wise(pc.cast(ids, pa.string()), "", ",")


def _view(numbers: pa.Array) -> np.ndarray:
    """``numbers`` without a copy; not ``to_numpy``, which imports pandas."""
    if numbers.null_count:
        raise pa.ArrowInvalid("a number is missing")
    dtype = numbers.type.to_pandas_dtype()
    if not len(numbers):
        return np.zeros(0, dtype)
    values = np.frombuffer(numbers.buffers()[1], dtype)
    return values[numbers.offset : numbers.offset + len(numbers)]


def is_written(path: Path) -> bool:
    """Whether there is a table of this name."""
    return any(candidate.exists() for candidate in _candidates(path))


def _candidates(path: Path) -> tuple[Path, Path]:
    """``path``, and the Parquet file that an earlier version wrote in its place."""
    return path, path.with_suffix(".parquet")


def _existing(path: Path) -> Path:
    for candidate in _candidates(path):
        if candidate.exists():
            return candidate
    raise RunDirError(
        f"{path} is missing: an earlier phase has not run; run tools/spin.sh, which runs all of them in order"
    )


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise RunDirError(f"{path} is damaged ({error}): delete it and run the phase that wrote it again") from None
