"""The run directory: where everything is, and what is done. No torch.

Every file that another phase reads is written under a temporary name and renamed, so that it is there whole or not at
all. A phase is done when its record says so; the record is written last.
"""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_spin.config import Config, to_yaml
from megatron_spin.config.resume import Change
from megatron_spin.errors import ConfigError
from megatron_spin.io import atomic_writer
from megatron_spin.run import state
from megatron_spin.run.records import PhaseRecord, directory, read_record, write_record
from megatron_spin.run.resume import check_resume, record_changes
from megatron_spin.spin.objective import num_iterations


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
        """The training pairs (``pairs.arrow``) and the opponent's scores of them."""
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
        """A snapshot of the records, for scripts; nothing in the package reads it."""
        return self.root / "state.json"

    @property
    def log(self) -> Path:
        """What all phases said."""
        return self.root / "run.log"

    @property
    def data(self) -> Path:
        """What prepare wrote: ``train.arrow``, ``eval.arrow`` and ``manifest.json``."""
        return self.root / "data"

    @property
    def base(self) -> Path:
        """The Megatron checkpoint imported from ``model.hf``."""
        return self.root / "base"

    def target(self, *, iteration: int | None = None, baseline: str | None = None) -> Target:
        return Target(self.root, iteration, baseline)

    def labelled(self, label: str) -> Target:
        """The target of a phase ``KIND:LABEL``."""
        return self.target(iteration=int(label)) if label.isdigit() else self.target(baseline=label)

    def opponent_hf(self, config: Config, iteration: int) -> Path:
        """Hugging Face directory of the opponent: the model that the run starts from, then each previous export."""
        return Path(config.model.hf) if iteration == 0 else self.target(iteration=iteration - 1).hf

    def opponent_checkpoint(self, iteration: int) -> Path:
        """Megatron checkpoint directory of the same weights, in the trainer's own precision."""
        return self.base if iteration == 0 else self.target(iteration=iteration - 1).checkpoints

    def check(self, config: Config) -> list[Change]:
        """What ``config`` changes of the run that is here; changes nothing itself.

        Raises:
            RunDirError: it is no directory, or ``config`` contradicts what is in it.
        """
        if self.config.exists() and self.config.read_text() == to_yaml(config):
            return []
        return check_resume(self, config)

    def open(self, config: Config) -> None:
        """Creates the run directory, or takes over what ``config`` changes. Raises as :meth:`check`."""
        found = self.check(config)
        self.root.mkdir(parents=True, exist_ok=True)
        state.adopt(self.root)
        record_changes(self, found)
        text = to_yaml(config)
        if not self.config.exists() or self.config.read_text() != text:
            with atomic_writer(self.config) as file:
                file.write(text)

    def records(self) -> list[PhaseRecord]:
        """The records of all phases, in the order in which they finished."""
        return state.all_records(self.root)

    def record(self, phase: str) -> PhaseRecord | None:
        """The record of ``phase`` (``prepare``, ``import``, ``generate:0`` ...); None if it has left none."""
        if directory(self.root).exists():
            return read_record(self.root, phase)
        return next((record for record in self.records() if record.phase == phase), None)

    def is_done(self, phase: str) -> bool:
        """Whether ``phase`` has finished."""
        record = self.record(phase)
        return record is not None and record.finished is not None

    def write_record(self, record: PhaseRecord) -> None:
        """Keeps the record of a phase, in place of an earlier one, and brings ``state.json`` up to date."""
        self.root.mkdir(parents=True, exist_ok=True)
        state.adopt(self.root)
        write_record(directory(self.root), record)
        state.write_snapshot(self.root)

    def mark_done(self, phase: str, *, seconds: float, **details: Any) -> None:
        """Records that ``phase`` has finished now, after ``seconds`` of wall time; the last thing a phase does."""
        self.write_record(PhaseRecord.now(phase, seconds=seconds, details=details))


def check_target(config: Config, target: Target) -> None:
    """Refuses a target that the configuration does not have.

    Raises:
        ConfigError: it has no such iteration or baseline.
    """
    count = num_iterations(config)
    if target.iteration is not None and not 0 <= target.iteration < count:
        raise ConfigError(
            f"iteration {target.iteration} is not in this run: it has 0 to {count - 1} (spin.iterations="
            f"{config.spin.iterations}, training.objective={config.training.objective})"
        )
    if target.baseline is not None and target.baseline not in ("sft", *config.baselines):
        raise ConfigError(
            f"baseline {target.baseline} is not in this run: it has {', '.join(['sft', *config.baselines])}; add it "
            "under baselines"
        )
