"""What an iteration or a baseline is trained on: examples, objective, order and number of steps."""

import dataclasses
from collections.abc import Sequence

from megatron_spin.config import BaselineConfig, Config, at_iteration
from megatron_spin.data.batcher import Example
from megatron_spin.data.examples import examples_of
from megatron_spin.data.pairs import PairsFile, PairsManifest
from megatron_spin.data.rows import TRAIN, open_rows
from megatron_spin.data.sampler import BatchSampler
from megatron_spin.errors import ConfigError
from megatron_spin.phases.opponent import Opponent
from megatron_spin.processes import rank
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.run.result import num_played
from megatron_spin.spin.objective import Objective, build_objective, objective_class
from megatron_spin.spin.sft import Sft
from megatron_spin.training.schedule import StepPlan


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is trained on, checked before anything is built."""

    examples: Sequence[Example]
    objective: Objective
    sampler: BatchSampler
    plan: StepPlan
    pairs: str | None = None
    """Identity of the pairs; None if the objective compares no answers."""
    opponent: Opponent | None = None
    """None likewise; rank 0 reads it, once there is a process group."""

    def describe(self) -> str:
        """One line: how many examples, steps and, where an epoch has a rest, how many it drops."""
        unit = "pairs" if self.objective.compares() else "sequences"
        line = f"{len(self.examples)} {unit}, {self.plan.total} steps of {self.sampler.global_batch_size}"
        dropped = self.sampler.dropped_per_epoch
        if dropped:
            line += f"; each epoch drops {dropped} {unit} that fill no whole batch, others each time"
        return line


def read_inputs(config: Config, run_dir: RunDir, target: Target) -> Inputs:
    """What ``target`` is trained on.

    Raises:
        ConfigError: the target is the model that the run starts from, which is not trained.
        RunDirError: an earlier phase has not finished.
        DataError: there are too few examples for one batch.
    """
    if target.baseline is not None:
        return _baseline_inputs(config, run_dir, target.baseline)
    iteration = target.iteration or 0
    objective = build_objective(config, iteration)
    pairs_identity = None
    if objective.compares():
        pairs = PairsFile(target.pairs, answers=objective.answers)
        if rank() == 0:  # one rank for all of them: the others map the same file
            pairs.check()
        pairs_identity = pairs.manifest.identity
        examples = examples_of(pairs.table, objective.answers)
    else:
        examples = _real_examples(run_dir)
    return Inputs(
        examples=examples,
        objective=objective,
        sampler=_sampler(config, iteration, len(examples)),
        plan=_plan(
            config,
            total=total_steps(config, iteration, len(examples)),
            peak=at_iteration(config.training.learning_rate, iteration),
        ),
        pairs=pairs_identity,
    )


def _baseline_inputs(config: Config, run_dir: RunDir, name: str) -> Inputs:
    """Continued SFT on the run's own data."""
    if name == "sft":
        raise ConfigError("baseline sft is the model that the run starts from: it is evaluated, not trained")
    baseline = config.baselines[name]
    examples = _real_examples(run_dir)
    peak = baseline.learning_rate
    if peak is None:
        peak = at_iteration(config.training.learning_rate, 0)
    return Inputs(
        examples=examples,
        objective=Sft(),
        sampler=_sampler(config, 0, len(examples)),
        plan=_plan(config, total=_baseline_steps(config, run_dir, baseline), peak=peak),
    )


def _real_examples(run_dir: RunDir) -> Sequence[Example]:
    return examples_of(open_rows(run_dir.data / TRAIN), ("real",))


def _sampler(config: Config, iteration: int, num_examples: int) -> BatchSampler:
    batch_size = at_iteration(config.training.global_batch_size, iteration)
    return BatchSampler(num_examples, batch_size, config.training.seed)


def _plan(config: Config, *, total: int, peak: float) -> StepPlan:
    training = config.training
    return StepPlan(total=total, peak=peak, decay=training.schedule, warmup_fraction=training.warmup_fraction)


def total_steps(config: Config, iteration: int, num_examples: int) -> int:
    """Optimizer steps of an iteration: ``training.steps``, or whole batches of ``training.epochs``."""
    steps = at_iteration(config.training.steps, iteration)
    epochs = at_iteration(config.training.epochs, iteration)
    return steps or epochs * _sampler(config, iteration, num_examples).steps_per_epoch


def _baseline_steps(config: Config, run_dir: RunDir, baseline: BaselineConfig) -> int:
    """A number, or as many steps, or sequences, as all iterations that are played have together."""
    if isinstance(baseline.steps, int):
        return baseline.steps
    num_answers = len(objective_class(config).answers)
    num_steps, num_sequences = 0, 0
    for iteration in range(num_played(config, run_dir)):
        manifest = PairsManifest.load(run_dir.target(iteration=iteration).pairs)
        steps = total_steps(config, iteration, manifest.num_pairs)
        num_steps += steps
        num_sequences += steps * at_iteration(config.training.global_batch_size, iteration) * num_answers
    if baseline.steps == "same_steps":
        return num_steps
    return num_sequences // at_iteration(config.training.global_batch_size, 0)
