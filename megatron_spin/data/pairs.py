"""Training pairs: each prompt with its real answer and the answers that it is compared with. No torch.

A pair file has one column of token ids per answer, ``real_ids`` first; its manifest names them. SPIN has two answers,
other objectives may have more.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from megatron_spin.data.rows import TOKENS, hash_values, read_table, write_columns
from megatron_spin.errors import DataError, RunDirError
from megatron_spin.io import read_json, write_json

TWO_ANSWERS = ("real", "generated")
"""The answers of a manifest that does not name them."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt with its real answer and at least one other answer."""

    index: int
    """Row number of the prompt in the source file, from 0."""
    iteration: int
    """The iteration whose opponent generated."""
    prompt_ids: list[int]
    answers: tuple[list[int], ...]
    """The real answer, the generated one, then any others, in the order of the objective's ``answers``."""
    finish_reason: Literal["stop", "length"]
    """``stop``: the generated answer ends with the end token; ``length``: it was cut and has none."""

    @property
    def real_ids(self) -> list[int]:
        return self.answers[0]

    @property
    def generated_ids(self) -> list[int]:
        """The answer of the opponent, or the rejected answer of a preference row."""
        return self.answers[1]

    def values(self) -> list[Any]:
        """The columns of the pair file in order."""
        return [self.index, self.iteration, self.prompt_ids, *self.answers, self.finish_reason]


def schema(answers: Sequence[str]) -> pa.Schema:
    """Columns of a pair file with these answers."""
    fields = [("index", pa.int64()), ("iteration", pa.int64()), ("prompt_ids", TOKENS)]
    fields += [(f"{answer}_ids", TOKENS) for answer in answers]
    fields.append(("finish_reason", pa.string()))
    return pa.schema(fields)


@dataclasses.dataclass(frozen=True)
class BuiltPairs:
    """Pairs and how they came about."""

    pairs: list[Pair]
    counts: dict[str, int]
    """``own`` and ``previous`` (pairs kept of each), ``truncated`` (own generated answers that did not end),
    ``dropped`` (those of them that were left out), ``identical`` (kept pairs whose real and generated answers are the
    same).
    """


def build_pairs(
    own: Sequence[Pair], *, truncated: Literal["keep", "drop"], previous: Sequence[Pair] = ()
) -> BuiltPairs:
    """The iteration's own pairs in their order, then ``previous`` ones.

    Raises:
        DataError: no pair is left.
    """
    kept = list(own)
    if truncated == "drop":
        kept = [pair for pair in own if pair.finish_reason == "stop"]
    if not kept:
        raise DataError(
            f"none of the opponent's {len(own)} answers ended within generation.max_new_tokens, and "
            "generation.truncated=drop leaves none: raise the one or set the other to keep"
        )
    pairs = [*kept, *previous]
    counts = {
        "own": len(kept),
        "previous": len(previous),
        "truncated": sum(pair.finish_reason == "length" for pair in own),
        "dropped": len(own) - len(kept),
        "identical": sum(pair.real_ids == pair.generated_ids for pair in pairs),
    }
    return BuiltPairs(pairs, counts)


@dataclasses.dataclass(frozen=True)
class PairsManifest:
    """``manifest.json`` beside the pairs."""

    opponent: str
    """Identity of the model that generated."""
    data: str
    """Identity of the prepared rows."""
    answers: tuple[str, ...]
    """Names of the answers of each pair."""
    num_pairs: int
    counts: dict[str, int]
    """As :attr:`BuiltPairs.counts`."""
    identity: str
    """Hash of the pairs."""

    @classmethod
    def load(cls, directory: Path) -> "PairsManifest":
        """The manifest in ``directory``.

        Raises:
            RunDirError: it is missing or damaged.
        """
        path = directory / "manifest.json"
        raw = read_json(path)
        try:
            answers = tuple(raw.get("answers", TWO_ANSWERS))
            return cls(**{**raw, "answers": answers})
        except (AttributeError, TypeError) as error:
            raise RunDirError(
                f"{path} is damaged ({error}): restore it, or delete {directory} and generate again"
            ) from None


def save_pairs(
    directory: Path, built: BuiltPairs, *, answers: Sequence[str], opponent: str, data: str
) -> PairsManifest:
    """Writes ``pairs.parquet``, then ``manifest.json``; returns the manifest.

    Args:
        answers: names of the answers of each pair.
        opponent: identity of the model that generated.
        data: identity of the prepared rows.
    """
    write_columns(directory / "pairs.parquet", [pair.values() for pair in built.pairs], schema(answers))
    manifest = PairsManifest(
        opponent=opponent,
        data=data,
        answers=tuple(answers),
        num_pairs=len(built.pairs),
        counts=built.counts,
        identity=_identity(built.pairs),
    )
    write_json(directory / "manifest.json", dataclasses.asdict(manifest))
    return manifest


def load_pairs(path: Path, *, answers: Sequence[str] | None = None) -> tuple[list[Pair], PairsManifest]:
    """The pairs in the directory ``path`` and their manifest.

    Args:
        answers: which answers the pairs must have, in this order; None takes any.

    Raises:
        RunDirError: they are missing, damaged, not what the manifest says, or have other answers.
    """
    manifest = PairsManifest.load(path)
    if answers is not None and manifest.answers != tuple(answers):
        raise RunDirError(
            f"{path} holds the answers {', '.join(manifest.answers)}, but the objective compares {', '.join(answers)}: "
            f"restore the objective, or delete {path.parent} to generate again"
        )
    pairs = []
    for row in read_table(path / "pairs.parquet", schema(manifest.answers)):
        pairs.append(
            Pair(
                index=row["index"],
                iteration=row["iteration"],
                prompt_ids=row["prompt_ids"],
                answers=tuple(row[f"{answer}_ids"] for answer in manifest.answers),
                finish_reason=row["finish_reason"],
            )
        )
    if _identity(pairs) != manifest.identity:
        raise RunDirError(
            f"{path / 'pairs.parquet'} is not what its manifest.json says: restore the file, or delete {path} and "
            "generate again (for DPO: use a new --run-dir)"
        )
    return pairs, manifest


def previous_pairs(path: Path, *, iteration: int, data: str, answers: Sequence[str]) -> list[Pair]:
    """The pairs in ``path`` that ``iteration`` itself generated.

    Raises:
        RunDirError: as :func:`load_pairs`, or they were made from other data.
    """
    pairs, manifest = load_pairs(path, answers=answers)
    if manifest.data != data:
        raise RunDirError(f"{path} was made from other data than this run's: restore data/, or use a new --run-dir")
    return [pair for pair in pairs if pair.iteration == iteration]


def _identity(pairs: Iterable[Pair]) -> str:
    return hash_values(pair.values() for pair in pairs)
