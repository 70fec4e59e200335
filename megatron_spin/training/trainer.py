"""The training loop: one optimizer step after another through Megatron's schedule, measured and checkpointed."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_spin.data.batcher import Batcher
from megatron_spin.data.sampler import BatchSampler
from megatron_spin.errors import GateError
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.pipeline import run_schedule, speaks_for_replica
from megatron_spin.spin.objective import Objective
from megatron_spin.training.checkpoint import Resharding, save_checkpoint
from megatron_spin.training.forward_step import objective_forward_step, reported_names
from megatron_spin.training.metrics import MetricsWriter, metrics_row
from megatron_spin.training.optimizer import set_learning_rate
from megatron_spin.training.schedule import StepPlan


@dataclasses.dataclass
class Trainer:
    """Everything a step needs; :mod:`megatron_spin.training.assembly` puts it together."""

    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    objective: Objective
    batcher: Batcher
    reference: np.ndarray | None
    """[N, r] fp32: the opponent's log-probs of all answers, if the objective needs them."""
    sampler: BatchSampler
    plan: StepPlan
    dims: ParallelDims

    def __post_init__(self) -> None:
        self._forward_step = objective_forward_step(self.objective)
        self._names = reported_names(self.objective)
        self._has_failed = False
        """Whether this rank could not write a row."""
        self._a_rank_has_failed = False

    def forward_backward(self, indices: np.ndarray) -> dict[str, float]:
        """Accumulates the mean gradient of the examples ``indices`` into ``main_grad``.

        Returns:
            The mean of each reported value over the global batch, on every rank.
        """
        batches = self.batcher.microbatches(indices, self.reference)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._means(run_schedule(self._forward_step, self.model, batches))

    def step(self, step: int, gate: Callable[[float], None] | None = None) -> dict[str, Any]:
        """Takes optimizer step ``step`` (from 0) and returns its row for metrics.jsonl.

        Args:
            gate: checks the loss before any weight changes.

        Raises:
            GateError: the gate refuses, or the loss or a gradient is not finite; the weights of the last checkpoint
                are untouched.
        """
        started = time.perf_counter()
        indices = self.sampler.batch(step)
        means = self.forward_backward(indices)
        rate = self.plan.learning_rate(step)
        set_learning_rate(self.optimizer, rate)
        self._require_finite(step, "loss", means["loss"])
        if gate is not None:
            gate(means["loss"])
        with megatron_region():
            _, grad_norm, _ = self.optimizer.step()
            norm = float(self.optimizer.get_grad_norm() if grad_norm is None else grad_norm)
        self._require_finite(step, "gradient norm", norm)
        tokens = sum(self.batcher.examples[i].num_tokens for i in indices)
        return metrics_row(
            step + 1,
            means,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            pairs=len(indices),
            seconds=time.perf_counter() - started,
        )

    def run(
        self,
        writer: MetricsWriter,
        *,
        checkpoints: Path,
        done: int,
        every: int,
        keep: int,
        resharding: Resharding,
        state: dict[str, Any],
        gate: Callable[[float], None] | None,
    ) -> None:
        """Takes steps ``done`` to the last, with a checkpoint every ``every`` steps and after the last.

        The last one holds main weights alone: each iteration starts with fresh moments.

        Args:
            keep: how many of the newest checkpoints stay.
            resharding: the layouts that a checkpoint within the iteration can be loaded into.
            state: plain data kept in each checkpoint.
            gate: checks the first loss, before the first step of an iteration, if that is among these.
        """
        for step in range(done, self.plan.total):
            row = self.step(step, gate if step == 0 else None)
            if self._a_rank_has_failed:
                writer.sync()  # raises
            writer.write(row)
            self._has_failed = writer.failure is not None
            if (step + 1) % every == 0 or step + 1 == self.plan.total:
                writer.sync()
                save_checkpoint(
                    checkpoints,
                    step + 1,
                    self.model,
                    dims=self.dims,
                    optimizer=self.optimizer,
                    moments=step + 1 < self.plan.total,
                    resharding=resharding,
                    state=state,
                    keep=keep,
                )

    def _means(self, results: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        total = torch.zeros(len(self._names) + 1, 2, dtype=torch.float64, device=self.dims.device)
        if speaks_for_replica(self.dims):
            for result in results:
                total[:-1] += torch.stack([result[name] for name in self._names]).double()
        # The last row counts the ranks that could not write their metrics: that needs no exchange of its own.
        total[-1] = float(self._has_failed)
        torch.distributed.all_reduce(total)
        *sums, (num_failed, _) = total.tolist()
        self._a_rank_has_failed = num_failed > 0
        return {name: total / count for name, (total, count) in zip(self._names, sums, strict=True)}

    def _require_finite(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise GateError(
                f"the {name} of step {step + 1} is {value}: the last checkpoint is untouched; "
                "lower training.learning_rate or find the bad batch"
            )
