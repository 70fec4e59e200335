"""Which model a run has come to, as its records tell. No torch.

A complete iteration is the run's result until a later one is; after a rollback it is the model before it. A guard's
judgement holds as long as the guards have the settings it was made with, and for good once the policy has become the
opponent (``rotate:T`` is done, or ``finish:0`` without self-play).
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from megatron_spin.config import Config
from megatron_spin.errors import RunDirError
from megatron_spin.run.directory import RunDir
from megatron_spin.run.records import kind_and_label
from megatron_spin.run.state import latest_result
from megatron_spin.spin.objective import num_iterations

ENDS = ("rotate", "finish")
"""Phases that complete an iteration: of self-play, and of an objective without."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The model that a run has come to."""

    hf: str
    """Its Hugging Face directory: relative to the run directory if it is inside, so that the run can be moved."""
    iteration: int | None
    """The iteration that made it; None: the model that the run started from."""
    why: str
    """Why it is this one."""

    @property
    def name(self) -> str:
        """Which model it is, in words."""
        return "the model that the run began with" if self.iteration is None else f"iteration {self.iteration}"

    def path(self, run_dir: RunDir) -> Path:
        """Its Hugging Face directory, absolute."""
        return run_dir.root.resolve() / self.hf

    def line(self, run_dir: RunDir) -> str:
        """The result in words, with its path."""
        return f"{self.name}, {self.path(run_dir)} ({self.why})"


def result_of(config: Config, run_dir: RunDir, iteration: int | None, why: str) -> Result:
    """The model of ``iteration`` (None: the model that the run started from) as a result."""
    hf = run_dir.opponent_hf(config, 0 if iteration is None else iteration + 1)
    # Not resolved: whether a model moves along with the run directory depends on its name, not on where links lead.
    path = Path(os.path.abspath(hf))
    root = os.path.abspath(run_dir.root)
    name = path.relative_to(root) if path.is_relative_to(root) else hf.resolve()
    return Result(hf=str(name), iteration=iteration, why=why)


def read_result(run_dir: RunDir) -> Result | None:
    """The run's result so far; None before its first iteration is complete."""
    entry = latest_result(run_dir.records())
    return Result(**entry) if entry is not None else None


def result_hf(run_dir: RunDir) -> Path:
    """Hugging Face directory of the run's result, absolute.

    Raises:
        RunDirError: the run has no result yet.
    """
    result = read_result(run_dir)
    if result is None:
        raise RunDirError(f"{run_dir.root} has no result yet: run tools/spin.sh until its first iteration is complete")
    return result.path(run_dir)


def is_done(config: Config, run_dir: RunDir, phase: str) -> bool:
    """Whether ``phase`` need not be run again; a guard must if its settings have changed since."""
    kind, label = kind_and_label(phase)
    if kind == "guard":
        return is_settled(config, run_dir, int(label))
    return run_dir.is_done(phase)


def is_settled(config: Config, run_dir: RunDir, iteration: int) -> bool:
    """Whether the guards have judged ``iteration`` and the judgement holds."""
    record = run_dir.record(f"guard:{iteration}")
    if record is None or record.finished is None:
        return False
    if any(run_dir.is_done(f"{end}:{iteration}") for end in ENDS):
        return True
    return record.details.get("settings") == guard_settings(config)


def guard_settings(config: Config) -> dict[str, Any]:
    """The settings that a judgement depends on, as plain data."""
    return dataclasses.asdict(config.guards)


def rolled_back(config: Config, run_dir: RunDir) -> int | None:
    """The iteration that was rolled back, if one was and the judgement holds."""
    for iteration in range(num_iterations(config)):
        record = run_dir.record(f"guard:{iteration}")
        if record is None or record.details.get("outcome") != "rollback":
            continue
        if is_settled(config, run_dir, iteration):
            return iteration
    return None


def num_played(config: Config, run_dir: RunDir) -> int:
    """How many iterations are trained: all, or those up to the one that was rolled back."""
    last = rolled_back(config, run_dir)
    return num_iterations(config) if last is None else last + 1
