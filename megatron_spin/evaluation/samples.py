"""``samples.jsonl``: the answers of one model to the first held-out prompts, for reading. No torch."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_spin.errors import RunDirError
from megatron_spin.io import atomic_writer

SHOWN = 20
"""Prompts whose answers are kept."""

Answered = Literal["real", "greedy", "sampled"]


@dataclasses.dataclass(frozen=True)
class PromptAnswers:
    """One line: a prompt and the answers to it, all without special tokens."""

    index: int
    """Row number of the prompt in the data file, from 0."""
    prompt: str
    """As the model reads it, template included."""
    real: str
    greedy: str
    sampled: str
    cut: tuple[Answered, ...]
    """Which of the three answers were cut before their end token."""
    opponent: str | None = None
    """The opponent's sample, if there is an opponent that generates."""
    rejected: str | None = None
    """The rejected answer of a preference row."""

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"index": self.index, "prompt": self.prompt, "real": self.real}
        values |= {"greedy": self.greedy, "sampled": self.sampled}
        if self.opponent is not None:
            values["opponent"] = self.opponent
        if self.rejected is not None:
            values["rejected"] = self.rejected
        values["cut"] = list(self.cut)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PromptAnswers":
        """The record of one line; files of earlier versions have no ``cut``."""
        return cls(
            index=values["index"],
            prompt=values["prompt"],
            real=values["real"],
            greedy=values["greedy"],
            sampled=values["sampled"],
            cut=tuple(values.get("cut", ())),
            opponent=values.get("opponent"),
            rejected=values.get("rejected"),
        )


def write_samples(path: Path, shown: Sequence[PromptAnswers]) -> None:
    with atomic_writer(path) as file:
        for answers in shown:
            file.write(json.dumps(answers.to_json(), ensure_ascii=False) + "\n")


def read_samples(path: Path) -> dict[int, PromptAnswers]:
    """The lines by the prompt's row number.

    Raises:
        RunDirError: the file is damaged.
    """
    shown = {}
    try:
        # Not splitlines(): it also splits at characters that the answers may hold, such as U+2028.
        for line in path.read_text().rstrip("\n").split("\n"):
            answers = PromptAnswers.from_json(json.loads(line))
            shown[answers.index] = answers
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunDirError(f"{path} is damaged ({type(error).__name__}: {error}): evaluate that model again") from None
    return shown
