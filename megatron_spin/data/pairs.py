"""Training pairs: each prompt with its real answer and the answers that it is compared with. No torch.

A pair file has one column of token ids per answer, ``real_ids`` first; its manifest names them. SPIN has two answers,
other objectives may have more.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from megatron_spin.data.lazy import LazySequence
from megatron_spin.data.table import TOKENS, Table, write_table
from megatron_spin.errors import DataError, RunDirError
from megatron_spin.io import read_json, write_json

FILE = "pairs.arrow"
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


@dataclasses.dataclass
class BuiltPairs:
    """An iteration's own pairs in their order, then previous ones; they are counted as they are iterated over.

    Neither pairs nor counts need to fit in memory: ``own`` and ``previous`` may be read from files as they are asked
    for.
    """

    own: Iterable[Pair]
    _: dataclasses.KW_ONLY
    truncated: Literal["keep", "drop"]
    """Whether own generated answers that did not end are kept."""
    previous: Iterable[Pair] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Complete after an iteration: ``own`` and ``previous`` (pairs kept of each), ``truncated`` (own generated answers
    that did not end), ``dropped`` (those of them that were left out), ``identical`` (kept pairs whose real and
    generated answers are the same).
    """

    def __iter__(self) -> Iterator[Pair]:
        """
        Raises:
            DataError: no own pair is left.
        """
        counts = dict.fromkeys(("own", "previous", "truncated", "dropped", "identical"), 0)
        for pair in self.own:
            is_truncated = pair.finish_reason == "length"
            counts["truncated"] += is_truncated
            if is_truncated and self.truncated == "drop":
                counts["dropped"] += 1
                continue
            counts["own"] += 1
            counts["identical"] += pair.real_ids == pair.generated_ids
            yield pair
        if not counts["own"]:
            raise DataError(
                f"none of the opponent's {counts['dropped']} answers ended within generation.max_new_tokens, and "
                "generation.truncated=drop leaves none: raise the one or set the other to keep"
            )
        for pair in self.previous:
            counts["previous"] += 1
            counts["identical"] += pair.real_ids == pair.generated_ids
            yield pair
        self.counts = counts


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
    """Writes ``pairs.arrow``, then ``manifest.json``; returns the manifest.

    Args:
        answers: names of the answers of each pair.
        opponent: identity of the model that generated.
        data: identity of the prepared rows.

    Raises:
        DataError: no pair is left; nothing is written.
    """
    identity = write_table(directory / FILE, (pair.values() for pair in built), schema(answers))
    manifest = PairsManifest(
        opponent=opponent,
        data=data,
        answers=tuple(answers),
        num_pairs=built.counts["own"] + built.counts["previous"],
        counts=built.counts,
        identity=identity,
    )
    write_json(directory / "manifest.json", dataclasses.asdict(manifest))
    return manifest


class PairsFile:
    """The pairs in a directory and their manifest; the pairs are memory-mapped and read as they are asked for."""

    def __init__(self, directory: Path, *, answers: Sequence[str] | None = None) -> None:
        """Opens the pairs; what they hold is only checked by :meth:`check`.

        Args:
            answers: which answers the pairs must have, in this order; None takes any.

        Raises:
            RunDirError: they are missing or damaged, have other columns or other answers.
        """
        self.manifest = PairsManifest.load(directory)
        if answers is not None and tuple(answers) != self.manifest.answers:
            raise RunDirError(
                f"{directory} holds the answers {', '.join(self.manifest.answers)}, but the objective compares "
                f"{', '.join(answers)}: restore the objective, or delete {directory.parent} to generate again"
            )
        self.directory = directory
        self.table = Table(directory / FILE, schema(self.manifest.answers))

    def check(self) -> None:
        """Reads all pairs once, in seconds per million.

        Raises:
            RunDirError: they are not those of the manifest.
        """
        if self.table.identity() != self.manifest.identity:
            raise RunDirError(
                f"{self.table.path} is not what its manifest.json says: restore the file, or delete {self.directory} "
                "and generate again (for DPO: use a new --run-dir)"
            )

    def pair(self, number: int) -> Pair:
        row = self.table.row(number)
        return Pair(
            index=row["index"],
            iteration=row["iteration"],
            prompt_ids=row["prompt_ids"],
            answers=tuple(row[f"{answer}_ids"] for answer in self.manifest.answers),
            finish_reason=row["finish_reason"],
        )


def load_pairs(path: Path, *, answers: Sequence[str] | None = None) -> tuple[Sequence[Pair], PairsManifest]:
    """The pairs in the directory ``path``, each read when it is asked for, and their manifest.

    Args:
        answers: which answers the pairs must have, in this order; None takes any.

    Raises:
        RunDirError: they are missing, damaged, not those of the manifest, or have other answers.
    """
    file = PairsFile(path, answers=answers)
    file.check()
    return LazySequence(file.pair, range(len(file.table))), file.manifest


def previous_pairs(path: Path, *, iteration: int, data: str, answers: Sequence[str]) -> Sequence[Pair]:
    """The pairs in ``path`` that ``iteration`` itself generated, each read when it is asked for.

    Raises:
        RunDirError: as :func:`load_pairs`, or they were made from other data.
    """
    file = PairsFile(path, answers=answers)
    file.check()
    if file.manifest.data != data:
        raise RunDirError(f"{path} was made from other data than this run's: restore data/, or use a new --run-dir")
    return LazySequence(file.pair, np.flatnonzero(file.table.numbers("iteration") == iteration))
