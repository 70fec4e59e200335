"""The run directory: where everything lies, and what is done. No torch.

Every file that another phase reads is written under a temporary name and renamed, so that it is there whole or not at all; a phase is done
when ``state.json`` says so, which is written last.
"""

import contextlib
import dataclasses
import datetime
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_spin import machine
from megatron_spin.config import Config, to_yaml
from megatron_spin.io import atomic_writer, read_json, write_json
from megatron_spin.run.resume import check_resume, record_changes


@dataclasses.dataclass(frozen=True)
class Target:
    """What a phase works on: one self-play iteration, or one named baseline."""

    root: Path
    iteration: int | None = None
    baseline: str | None = None

    @property
    def label(self) -> str:
        """The name behind the colon in a phase, for example ``0`` or ``sft_continued``."""
        return str(self.iteration) if self.baseline is None else self.baseline

    @property
    def directory(self) -> Path:
        return self.root / (f"iteration_{self.iteration}" if self.baseline is None else f"baselines/{self.baseline}")

    @property
    def generated(self) -> Path:
        """Shards of generated answers with their manifests."""
        return self.directory / "generated"

    @property
    def pairs(self) -> Path:
        """The training pairs (``pairs.parquet``) and the opponent's scores of them."""
        return self.directory / "pairs"

    @property
    def checkpoints(self) -> Path:
        """Megatron torch_dist checkpoints, with the tracker file."""
        return self.directory / "checkpoints"

    @property
    def hf(self) -> Path:
        """The exported Hugging Face model."""
        return self.directory / "hf"

    @property
    def tensorboard(self) -> Path:
        return self.directory / "tensorboard"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def eval(self) -> Path:
        return self.directory / "eval.json"

    @property
    def done(self) -> Path:
        """Marker that the whole iteration or baseline is finished."""
        return self.directory / "DONE"


class RunDir:
    """Paths and state of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def data(self) -> Path:
        """What prepare wrote: ``train.parquet``, ``eval.parquet`` and ``manifest.json``."""
        return self.root / "data"

    @property
    def base(self) -> Path:
        """The Megatron checkpoint imported from ``model.hf``."""
        return self.root / "base"

    def target(self, *, iteration: int | None = None, baseline: str | None = None) -> Target:
        return Target(self.root, iteration, baseline)

    def opponent_hf(self, config: Config, iteration: int) -> Path:
        """Hugging Face directory of the opponent of ``iteration``: the model the run began with, then each previous export."""
        return Path(config.model.hf) if iteration == 0 else self.target(iteration=iteration - 1).hf

    def opponent_checkpoint(self, iteration: int) -> Path:
        """Megatron checkpoint directory of the same weights, in the trainer's own precision."""
        return self.base if iteration == 0 else self.target(iteration=iteration - 1).checkpoints

    def open(self, config: Config) -> None:
        """Creates the run directory, or checks that ``config`` does not contradict it, and records what changed.

        Raises:
            RunDirError: ``config`` contradicts what is in the directory.
        """
        text = to_yaml(config)
        if self.config.exists() and self.config.read_text() == text:
            return
        changes = check_resume(self, config)
        self.root.mkdir(parents=True, exist_ok=True)
        record_changes(self, changes)
        with atomic_writer(self.config) as file:
            file.write(text)

    def is_done(self, phase: str) -> bool:
        """Whether ``phase`` (``prepare``, ``import``, ``generate:0`` ...) has finished."""
        return self.state.exists() and phase in read_json(self.state)["phases"]

    def mark_done(self, phase: str, *, seconds: float, **details: Any) -> None:
        """Records that ``phase`` has finished, the memory it took, and the machine if it is a new one; the last thing a phase does.

        ``seconds`` of wall time and ``details`` (plain data) are kept. ``peak_memory_gib`` is that of the largest process seen from the calling
        one: with several ranks, of rank 0.
        """
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        measured = {
            "finished": finished,
            "seconds": round(seconds, 3),
            "peak_memory_gib": round(machine.peak_memory(), 3),
        }
        with self.changing_state() as state:
            state["phases"][phase] = {**measured, **details}
            machines: list[str] = state.setdefault("machines", [])
            if (here := machine.describe()) not in machines:
                machines.append(here)

    @contextlib.contextmanager
    def changing_state(self) -> Iterator[dict[str, Any]]:
        """What ``state.json`` holds, to be changed: written when the block ends without an exception."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".state.lock", "w") as lock:  # two tools run by hand must not lose each other's entry
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = read_json(self.state) if self.state.exists() else {"phases": {}}
            yield state
            write_json(self.state, state)
