"""The training loop: one optimizer step after another through Megatron's schedule, measured and checkpointed."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_spin.data.batches import BatchSampler, Example, collate, microbatch_indices
from megatron_spin.errors import GateError
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.pipeline import run_schedule, sum_over_ranks
from megatron_spin.training.checkpoint import save_checkpoint
from megatron_spin.training.forward_step import ForwardStep
from megatron_spin.training.metrics import PAIR_METRICS, SFT_METRICS, MetricsWriter
from megatron_spin.training.optimizer import learning_rate, set_learning_rate
from megatron_spin.training.scoring import BatchShape


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps, at which rates."""

    total: int
    peak: float
    decay: str
    warmup_fraction: float

    def rate(self, step: int) -> float:
        """Learning rate of step ``step``, from 0."""
        return learning_rate(
            step, total=self.total, peak=self.peak, schedule=self.decay, warmup_fraction=self.warmup_fraction
        )


@dataclasses.dataclass
class Trainer:
    """Everything a step needs. ``scores`` [N, 2] are the opponent's log-probs for SPIN, None for SFT."""

    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    forward_step: ForwardStep
    examples: Sequence[Example]
    scores: np.ndarray | None
    sampler: BatchSampler
    shape: BatchShape
    schedule: Schedule
    dims: ParallelDims

    def forward_backward(self, indices: np.ndarray) -> dict[str, float]:
        """Accumulates the mean gradient of ``examples[indices]`` into ``main_grad`` and returns the mean of each reported value."""
        batches = self._microbatches(indices)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._mean(run_schedule(self.forward_step, self.model, batches))

    def step(self, step: int) -> dict[str, Any]:
        """Does optimizer step ``step`` (from 0) and returns the contract's row of it.

        Raises:
            GateError: the loss or a gradient is not finite; the weights of the last checkpoint are untouched.
        """
        started = time.perf_counter()
        indices = self.sampler.batch(step)
        named = self.forward_backward(indices)
        rate = self.schedule.rate(step)
        set_learning_rate(self.optimizer, rate)
        self._require_finite(step, "loss", named["loss"])
        with megatron_region():
            _, grad_norm, _ = self.optimizer.step()
            norm = float(self.optimizer.get_grad_norm() if grad_norm is None else grad_norm)
        self._require_finite(step, "gradient norm", norm)
        chosen = [self.examples[i] for i in indices]
        tokens = sum(len(e.prompt_ids) * len(e.responses) + sum(map(len, e.responses)) for e in chosen)
        row: dict[str, Any] = {"step": step + 1, **{name: named.get(name) for name in PAIR_METRICS}}
        row |= {"grad_norm": norm, "learning_rate": rate, "tokens": tokens, "pairs": len(chosen)}
        # Neither side of a pair of equal answers can win; whoever reads the accuracy needs to know how many there were.
        row["identical"] = (
            None
            if self.scores is None
            else sum(list(e.responses[0]) == list(e.responses[1]) for e in chosen) / len(chosen)
        )
        return {**row, "seconds": round(time.perf_counter() - started, 6)}

    def run(
        self,
        writer: MetricsWriter,
        *,
        checkpoints: Path,
        done: int,
        every: int,
        keep: int,
        state: dict[str, Any],
        gate: Callable[[float], None] | None,
    ) -> None:
        """Steps ``done`` .. ``schedule.total`` - 1, with a checkpoint every ``every`` steps and after the last; the newest ``keep`` stay.

        Args:
            gate: checks the first loss when this is the very first step of an iteration.
        """
        for step in range(done, self.schedule.total):
            row = self.step(step)
            if gate is not None and step == 0:
                gate(row["loss"])
            writer.write(row)
            if (step + 1) % every == 0 or step + 1 == self.schedule.total:
                writer.sync()
                save_checkpoint(
                    checkpoints, step + 1, self.model, dims=self.dims, optimizer=self.optimizer, state=state, keep=keep
                )

    def _microbatches(self, indices: np.ndarray) -> list[Any]:
        own = microbatch_indices(
            indices, micro_batch_size=self.shape.micro_batch_size, dp_rank=self.dims.dp_rank, dp_size=self.dims.dp_size
        )
        return [
            collate(
                [self.examples[i] for i in part],
                length=self.shape.length,
                device=self.dims.device,
                opponent_logps=None if self.scores is None else self.scores[part],
            )
            for part in own
        ]

    def _mean(self, results: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        names = SFT_METRICS if self.scores is None else PAIR_METRICS
        local = torch.zeros(len(names), 2, dtype=torch.float64, device=self.dims.device)
        for result in results:
            local += torch.stack([result[name] for name in names]).double()
        sums = sum_over_ranks(local, self.dims).tolist()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True)}

    def _require_finite(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise GateError(
                f"the {name} of step {step + 1} is {value}: the last checkpoint is untouched; lower training.learning_rate or find the bad batch"
            )
