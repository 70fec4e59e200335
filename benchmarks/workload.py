"""The work that every row of the table does, and what a row reports.

Every row trains on the same pairs in the same steps, as token ids. Standard library only: TRL's environment holds no
Megatron-SPIN.
"""

import dataclasses
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt with its two answers, as token ids; an answer ends with the end token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences; the prompt counts twice, as in ``metrics.jsonl``."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What ``workload.json`` in the workload's directory says."""

    source: str
    """Where the pairs come from, in words."""
    num_pairs: int
    pairs_per_step: int
    warmup_steps: int
    """Steps that run first and do not count."""
    measured_steps: int
    parameters: int
    """Of the model."""
    max_prompt_length: int
    max_answer_length: int
    """Tokens, the end token not counted."""

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.measured_steps

    def measured(self, per_step: Sequence[T]) -> list[T]:
        """The entries of the steps that count, of a list with one entry per step."""
        return list(per_step[self.warmup_steps : self.steps])


def model_directory(directory: Path) -> Path:
    """The Hugging Face model of the workload in ``directory``."""
    return directory / "model"


def preferences_file(directory: Path) -> Path:
    """All pairs as text: ``prompt``, ``chosen``, ``rejected``."""
    return directory / "preferences.jsonl"


def steps_file(directory: Path) -> Path:
    """One line per step: the pairs that it trains on, as token ids."""
    return directory / "steps.jsonl"


def workload_file(directory: Path) -> Path:
    """The :class:`Workload`; written last, so that it exists only if everything else does."""
    return directory / "workload.json"


def read_workload(directory: Path) -> Workload:
    return Workload(**json.loads(workload_file(directory).read_text()))


def read_steps(directory: Path) -> list[list[Pair]]:
    """The pairs of each step, in the order of training."""
    with open(steps_file(directory)) as file:
        return [[Pair(**pair) for pair in json.loads(line)] for line in file]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one run of one row measured, over the steps that count."""

    pairs: int
    tokens: int
    """Real tokens, without padding; a prompt counts twice."""
    seconds: list[float]
    """Wall time of each step that counts."""
    peak_mb: float
    """Largest resident memory of the process that trains, in MB of 2**20 bytes."""
    grad_norm: float
    """Of the first step of all, before clipping: equal for rows that compute the same thing."""
    versions: str

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.seconds)


def measurement(directory: Path, *, seconds: Sequence[float], grad_norm: float, versions: str) -> Measurement:
    """The measurement of the calling process.

    Args:
        seconds: wall time of every step, the warm-up included.
    """
    workload = read_workload(directory)
    tokens = [sum(pair.num_tokens for pair in step) for step in read_steps(directory)]
    return Measurement(
        pairs=workload.measured_steps * workload.pairs_per_step,
        tokens=sum(workload.measured(tokens)),
        seconds=workload.measured(seconds),
        peak_mb=peak_mb(),
        grad_norm=grad_norm,
        versions=versions,
    )


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB of 2**20 bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # which counts bytes
        kilobytes //= 1024
    return kilobytes / 1024


def write_json(path: Path, value: Any) -> None:
    """Writes a dataclass or plain data under a temporary name, then renames it: the file is complete or missing."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(plain, indent=1) + "\n")
    temporary.replace(path)
