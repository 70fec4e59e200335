"""Puts together what training needs: model, optimizer, batcher and objective. Training and tests both build it here."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_spin.config import Config
from megatron_spin.data.batcher import Batcher, Example
from megatron_spin.data.sampler import BatchSampler
from megatron_spin.models.provider import build_model
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.layout import alignment
from megatron_spin.spin.objective import Objective
from megatron_spin.training.optimizer import wrap_and_optimize
from megatron_spin.training.schedule import StepPlan
from megatron_spin.training.scoring import score
from megatron_spin.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model that is trained, its optimizer, and the examples cut for this rank; its weights are not loaded yet."""

    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batcher: Batcher
    global_batch_size: int
    dims: ParallelDims

    def score(self, *, progress: bool = False) -> np.ndarray:
        """Summed log-probs of all answers under the weights of now, [N, r] fp32, on every rank; a collective."""
        everything = np.arange(len(self.batcher.examples))
        return score(
            self.model,
            self.batcher,
            everything,
            batch_size=self.global_batch_size,
            dims=self.dims,
            progress=progress,
        )

    def trainer(
        self, objective: Objective, reference: np.ndarray | None, sampler: BatchSampler, plan: StepPlan
    ) -> Trainer:
        """The trainer of ``objective``; ``reference`` [N, r] are the opponent's scores if the objective needs them."""
        return Trainer(
            model=self.model,
            optimizer=self.optimizer,
            objective=objective,
            batcher=self.batcher,
            reference=reference,
            sampler=sampler,
            plan=plan,
            dims=self.dims,
        )


def build_policy(
    config: Config, examples: Sequence[Example], *, dims: ParallelDims, peak: float, global_batch_size: int
) -> Policy:
    """Builds the policy for ``examples``; ``peak`` is the highest learning rate, which Megatron's optimizer is told."""
    model, optimizer = wrap_and_optimize(build_model(config, dims), config, dims=dims, learning_rate=peak)
    batcher = Batcher(
        examples=examples,
        micro_batch_size=config.training.micro_batch_size,
        alignment=alignment(config),
        dp_rank=dims.dp_rank,
        dp_size=dims.dp_size,
        device=dims.device,
    )
    return Policy(model, optimizer, batcher, global_batch_size, dims)
