"""Training pairs: for each prompt the real answer and the opponent's, of this iteration and, if reused, of the one before. No torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from megatron_spin.data.rows import TOKENS, hash_rows, read_table, write_table
from megatron_spin.errors import DataError, RunDirError
from megatron_spin.io import read_json, write_json

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("iteration", pa.int64()),
        ("prompt_ids", TOKENS),
        ("real_ids", TOKENS),
        ("generated_ids", TOKENS),
        ("finish_reason", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A real and a generated answer to the same prompt."""

    index: int
    """Row number of the prompt in the source file, from 0."""
    iteration: int
    """The iteration whose opponent generated."""
    prompt_ids: list[int]
    real_ids: list[int]
    generated_ids: list[int]
    """Ends with the end token if ``finish_reason`` is ``stop``; has none if it is ``length``."""
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class BuiltPairs:
    """Pairs and how they came about."""

    pairs: list[Pair]
    counts: dict[str, int]
    """``own`` and ``previous`` (pairs kept of each), ``truncated`` (own generated answers that did not end), ``dropped`` (those of them
    that were left out), ``identical`` (kept pairs whose two answers are the same)."""


def build_pairs(
    generated: Sequence[Mapping[str, Any]],
    *,
    iteration: int,
    truncated: Literal["keep", "drop"],
    previous: Sequence[Pair] = (),
) -> BuiltPairs:
    """Own pairs from the objects of the shards, in their order, then ``previous`` ones.

    Raises:
        DataError: no pair is left.
    """
    own = [Pair(iteration=iteration, **row) for row in generated]
    unfinished = sum(pair.finish_reason == "length" for pair in own)
    kept = own if truncated == "keep" else [pair for pair in own if pair.finish_reason == "stop"]
    pairs = [*kept, *previous]
    if not kept:
        raise DataError(
            f"none of the opponent's {len(own)} answers ended within generation.max_new_tokens, and generation.truncated=drop leaves none: "
            "raise the one or set the other to keep"
        )
    counts = {
        "own": len(kept),
        "previous": len(previous),
        "truncated": unfinished,
        "dropped": len(own) - len(kept),
        "identical": sum(pair.real_ids == pair.generated_ids for pair in pairs),
    }
    return BuiltPairs(pairs, counts)


def save_pairs(directory: Path, built: BuiltPairs, *, opponent: str, data: str) -> dict[str, Any]:
    """Writes ``pairs.parquet``, then ``manifest.json``, which is returned."""
    write_table(directory / "pairs.parquet", built.pairs, SCHEMA)
    manifest = {
        "opponent": opponent,
        "data": data,
        "num_pairs": len(built.pairs),
        "counts": built.counts,
        "identity": hash_rows(built.pairs),
    }
    write_json(directory / "manifest.json", manifest)
    return manifest


def load_pairs(path: Path) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs in the directory ``path`` and their manifest.

    Raises:
        RunDirError: they are missing, damaged, or not what the manifest says.
    """
    manifest = read_json(path / "manifest.json")
    pairs = [Pair(**row) for row in read_table(path / "pairs.parquet", SCHEMA)]
    if hash_rows(pairs) != manifest["identity"]:
        raise RunDirError(
            f"{path / 'pairs.parquet'} is not what its manifest.json says: restore the file, or delete {path} and generate again "
            "(for DPO: use a new --run-dir)"
        )
    return pairs, manifest


def previous_pairs(path: Path, *, iteration: int, data: str) -> list[Pair]:
    """The pairs in ``path`` that ``iteration`` itself generated.

    Raises:
        RunDirError: as :func:`load_pairs`, or they were made from other data.
    """
    pairs, manifest = load_pairs(path)
    if manifest["data"] != data:
        raise RunDirError(f"{path} was made from other data than this run's: restore data/, or use a new --run-dir")
    return [pair for pair in pairs if pair.iteration == iteration]
