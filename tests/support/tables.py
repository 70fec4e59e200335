"""Tables as earlier versions wrote and hashed them, and large ones that are made in a moment."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from megatron_spin.data.table import ROWS_PER_BATCH, TOKENS


def hashed_line_by_line(rows: Iterable[Sequence[Any]]) -> str:
    """sha256 over one line of JSON per row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(list(row), separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def to_parquet(path: Path) -> None:
    """Puts a Parquet file of the same content in the place of the Arrow file ``path``."""
    pyarrow.parquet.write_table(pyarrow.feather.read_table(path), path.with_suffix(".parquet"))
    path.unlink()


def random_pairs(path: Path, schema: pa.Schema, *, num_pairs: int, seed: int = 0) -> None:
    """Writes a pair file of about 300 tokens per pair."""
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> pa.Array:
        ends = np.concatenate([[0], np.cumsum(generator.integers(1, 200, count))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(generator.integers(0, 32000, ends[-1], np.int32)))

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, num_pairs, ROWS_PER_BATCH):
            count = min(ROWS_PER_BATCH, num_pairs - start)
            columns = []
            for field in schema:
                if field.type == TOKENS:
                    columns.append(tokens(count))
                elif field.name == "index":
                    columns.append(pa.array(np.arange(start, start + count)))
                elif field.name == "iteration":
                    columns.append(pa.array(np.zeros(count, np.int64)))
                else:
                    columns.append(pa.array(["stop"] * count))
            writer.write_batch(pa.record_batch(columns, schema=schema))
