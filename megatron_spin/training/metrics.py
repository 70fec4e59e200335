"""What a step reports: ``metrics.jsonl``, tensorboard and progress."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_spin.io import atomic_writer
from megatron_spin.log import Progress
from megatron_spin.parallel.collectives import on_rank_zero
from megatron_spin.processes import Ranks
from megatron_spin.run.step_metrics import load_step_metrics

CONTRACT = ("loss", "margin", "accuracy", "real_logps", "generated_logps", "real_reward", "generated_reward")
"""Means over the prompts of a step that every row has; null where the objective does not report them."""

SHOWN = {
    "loss": "loss",
    "margin": "margin",
    "accuracy": "acc",
    "real_logps": "real logps",
    "generated_logps": "generated logps",
}
"""Columns of a row that its progress shows, and what it calls them."""


def metrics_row(
    step: int,
    means: Mapping[str, float],
    *,
    grad_norm: float,
    learning_rate: float,
    tokens: int,
    pairs: int,
    seconds: float,
) -> dict[str, Any]:
    """The row of metrics.jsonl for ``step`` (from 1): the contract's columns, then what else the objective reports."""
    row: dict[str, Any] = {"step": step}
    for name in CONTRACT:
        row[name] = means.get(name)
    row |= {"grad_norm": grad_norm, "learning_rate": learning_rate, "tokens": tokens, "pairs": pairs}
    # An answer that equals the real one cannot lose to it: readers of the accuracy need their share.
    row["identical"] = means.get("identical")
    for name, value in means.items():
        row.setdefault(name, value)
    row["seconds"] = round(seconds, 6)
    return row


class MetricsWriter:
    """Appends one object per step on rank 0; every rank makes one and uses it in a ``with`` block.

    On resume it first drops the steps that will be done again, so that no step is there twice.

    A row that cannot be written, as on a full disk, raises nothing at once, since the other ranks are on their way to
    the next collective: it is kept as :attr:`failure`, until all ranks ask for it.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, *, step: int, total: int, label: str, ranks: Ranks) -> None:
        """A collective.

        Raises:
            RunDirError, OSError: the file cannot be read, or neither can be written.
        """
        self.enabled = ranks.rank == 0
        self.failure: OSError | None = None
        self._ranks = ranks
        on_rank_zero(ranks, lambda: self._open(jsonl, tensorboard, step))
        self._progress = Progress(label, total=total, done=step, unit="step", shown=self.enabled)

    def _open(self, jsonl: Path, tensorboard: Path, step: int) -> None:
        kept = [row for row in load_step_metrics(jsonl) if row.step <= step]
        with atomic_writer(jsonl) as file:
            for row in kept:
                file.write(json.dumps(row.values) + "\n")
        self._file = open(jsonl, "a")  # noqa: SIM115 (closed in __exit__)
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def __enter__(self) -> "MetricsWriter":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if not self.enabled:
            return
        try:
            self._file.close()
            self._tensorboard.close()
        except OSError:  # what failed before fails again here, and is raised already
            if self.failure is None:
                raise

    def write(self, row: dict[str, Any]) -> None:
        """Writes the row of one step; the keys of the contract, ``step`` from 1. Does nothing after a failure."""
        if not self.enabled or self.failure is not None:
            return
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
        except OSError as error:
            self.failure = error
            return
        note = [f"{label}={row[name]:.4g}" for name, label in SHOWN.items() if row[name] is not None]
        note.append(f"tok/s={row['tokens'] / row['seconds']:.0f}")
        self._progress.update(note=", ".join(note))

    def sync(self) -> None:
        """Makes what was written durable, which a checkpoint relies on; a collective.

        Raises:
            OSError: a row could not be written, on all ranks.
        """
        on_rank_zero(self._ranks, self._sync)

    def _sync(self) -> None:
        if self.failure is not None:
            raise self.failure
        os.fsync(self._file.fileno())
        self._tensorboard.flush()
