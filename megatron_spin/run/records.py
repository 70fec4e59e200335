"""What each phase leaves behind when it ends: a file of its own, ``RUN/phases/KIND_LABEL.json``. No torch.

A phase writes only its own record, so that phases can run at the same time on one run directory without a lock. Which
phases are done, which machines took part and which model is the result follow from the records (:mod:`.state`).
"""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from megatron_spin import machine
from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json, write_json

KINDS = ("prepare", "import", "generate", "train", "export", "evaluate", "guard", "rotate", "finish")
"""What comes before the colon in a phase's name, in the order of the plan."""


def kind_and_label(phase: str) -> tuple[str, str]:
    """``train:0`` is ("train", "0"), ``prepare`` is ("prepare", "")."""
    kind, _, label = phase.partition(":")
    return kind, label


@dataclasses.dataclass(frozen=True)
class PhaseRecord:
    """What is known of a phase that has run."""

    phase: str
    """Its name: ``prepare``, ``train:0``, ``export:sft_continued`` ..."""
    finished: str | None
    """When it finished, ISO 8601 in UTC. None: it has left something, but must run again (a guard that stopped)."""
    seconds: float = 0.0
    """Wall time."""
    peak_memory_gib: float | None = None
    """Resident memory of the largest process that the recording one has seen; of rank 0, if there were several."""
    machines: tuple[str, ...] = ()
    """What it ran on, with versions. Several only for the first record of a run that an earlier version made."""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the phase tells of itself, as plain data."""

    @classmethod
    def now(cls, phase: str, *, seconds: float, details: dict[str, Any], is_done: bool = True) -> "PhaseRecord":
        """The record of a phase that ends now, in this process."""
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(
            phase=phase,
            finished=finished if is_done else None,
            seconds=round(seconds, 3),
            peak_memory_gib=round(machine.peak_memory(), 3),
            machines=(machine.machine_line(),),
            details=details,
        )

    @property
    def order(self) -> tuple[str, int, int, str]:
        """Sorts records by the time they finished; within one second, by the plan."""
        kind, label = kind_and_label(self.phase)
        position = 10**9  # the baselines come last
        if label in ("", "sft"):
            position = -1
        elif label.isdigit():
            position = int(label)
        return (self.finished or "", position, KINDS.index(kind) if kind in KINDS else len(KINDS), self.phase)


def directory(root: Path) -> Path:
    """Where the records of the run in ``root`` are."""
    return root / "phases"


def read_records(root: Path) -> list[PhaseRecord]:
    """All records, in the order in which the phases finished.

    Raises:
        RunDirError: a record is not JSON, or not a record.
    """
    return sorted((_read(path) for path in directory(root).glob("*.json")), key=lambda record: record.order)


def read_record(root: Path, phase: str) -> PhaseRecord | None:
    """The record of one phase; None if it has left none. Raises as :func:`read_records`."""
    path = _path(directory(root), phase)
    return _read(path) if path.exists() else None


def write_record(folder: Path, record: PhaseRecord) -> None:
    """Writes a record into ``folder``, whole or not at all."""
    write_json(_path(folder, record.phase), dataclasses.asdict(record))


def _path(folder: Path, phase: str) -> Path:
    return folder / f"{phase.replace(':', '_')}.json"


def _read(path: Path) -> PhaseRecord:
    raw = read_json(path)
    known = {field.name for field in dataclasses.fields(PhaseRecord)}
    if not isinstance(raw, dict) or not {"phase", "finished"} <= raw.keys() <= known:
        raise RunDirError(f"{path} is no record of a phase: another version wrote it, or it is damaged; restore it")
    return PhaseRecord(**{**raw, "machines": tuple(raw.get("machines", ()))})
