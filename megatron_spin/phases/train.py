"""The training phase of one iteration or baseline: inputs and checks, the opponent's scores, training, and what the export gate needs."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spin.config import Config, at_iteration
from megatron_spin.conversion.export import stream_hf
from megatron_spin.conversion.load import load_hf
from megatron_spin.conversion.parity import PROBE_FILE, parity_sample
from megatron_spin.data.batches import BatchSampler, Example, sequence_length
from megatron_spin.data.pairs import load_pairs
from megatron_spin.data.rows import load_rows
from megatron_spin.errors import GateError, RunDirError
from megatron_spin.hf.assets import CHECKPOINT_ASSETS, copy_assets
from megatron_spin.hf.files import read_hf_config
from megatron_spin.hf.identity import IdentityHasher, identity
from megatron_spin.io import read_json
from megatron_spin.models.provider import build_model
from megatron_spin.parallel.collectives import raised_everywhere
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.kernels import announce, layer_spec
from megatron_spin.parallel.layout import alignment
from megatron_spin.parallel.setup import initialize
from megatron_spin.phases.guard import played
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.spin.objective import num_iterations
from megatron_spin.training.checkpoint import carry_over_main_weights, latest_step, load_checkpoint
from megatron_spin.training.forward_step import sft_forward_step, spin_forward_step
from megatron_spin.training.metrics import MetricsWriter
from megatron_spin.training.optimizer import wrap_and_optimize
from megatron_spin.training.scoring import BatchShape, ScoreCache, check_scores, score
from megatron_spin.training.trainer import Schedule, Trainer

PROBE_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is trained on, checked before a process group exists."""

    examples: list[Example]
    schedule: Schedule
    opponent: str | None
    """Identity of the opponent that generated; None for SFT."""
    pairs: str | None
    """Identity of the pairs; None for SFT."""


def read_inputs(config: Config, run_dir: RunDir, target: Target) -> Inputs:
    """The examples and the step plan of ``target``.

    Raises:
        RunDirError: the target is not in the configuration, an earlier phase has not finished, or the pairs were made by another opponent.
        DataError: too few examples for one batch.
    """
    if target.baseline is not None and target.baseline not in config.baselines:
        raise RunDirError(
            f"baseline {target.baseline!r} is not in the config: it has {', '.join(config.baselines) or 'none'} (sft is not trained)"
        )
    if target.iteration is not None and not 0 <= target.iteration < num_iterations(config):
        raise RunDirError(
            f"iteration {target.iteration} is not in 0..{num_iterations(config) - 1}: raise spin.iterations"
        )
    iteration = target.iteration or 0
    training = config.training
    schedule = functools.partial(Schedule, decay=training.schedule, warmup_fraction=training.warmup_fraction)
    if target.baseline is not None or training.objective == "sft":
        examples = [Example(row.prompt_ids, (row.real_ids,)) for row in load_rows(run_dir.data / "train.parquet")]
        baseline = config.baselines[target.baseline] if target.baseline is not None else None
        peak = at_iteration(training.learning_rate, iteration)
        if baseline is None:
            return Inputs(
                examples, schedule(total=total_steps(config, iteration, len(examples)), peak=peak), None, None
            )
        steps = baseline.steps if isinstance(baseline.steps, int) else _spin_steps(config, run_dir)
        total = 2 * steps if baseline.steps == "same_sequences" else steps
        return Inputs(
            examples,
            schedule(total=total, peak=peak if baseline.learning_rate is None else baseline.learning_rate),
            None,
            None,
        )
    pairs, manifest = load_pairs(target.pairs)
    opponent = identity(run_dir.opponent_hf(config, iteration), config.precision.export_dtype)
    if manifest["opponent"] != opponent:
        again = (
            f"delete {target.generated} and {target.pairs} and generate again"
            if training.objective == "spin"
            else "use a new --run-dir"
        )
        raise GateError(
            f"{target.pairs} was made for opponent {manifest['opponent'][:12]}, but {run_dir.opponent_hf(config, iteration)} is "
            f"{opponent[:12]}: restore that model, or {again}"
        )
    examples = [Example(pair.prompt_ids, (pair.real_ids, pair.generated_ids)) for pair in pairs]
    total = total_steps(config, iteration, len(examples))
    return Inputs(
        examples,
        schedule(total=total, peak=at_iteration(training.learning_rate, iteration)),
        opponent,
        manifest["identity"],
    )


def total_steps(config: Config, iteration: int, num_examples: int) -> int:
    """Optimizer steps of an iteration: ``training.steps``, or whole batches of ``training.epochs``."""
    steps = at_iteration(config.training.steps, iteration)
    sampler = BatchSampler(num_examples, config.training.global_batch_size, config.training.seed)
    return steps or at_iteration(config.training.epochs, iteration) * sampler.steps_per_epoch


def _spin_steps(config: Config, run_dir: RunDir) -> int:
    """Optimizer steps of all SPIN iterations that are played, from their pairs."""
    manifests = [read_json(run_dir.target(iteration=t).pairs / "manifest.json") for t in range(played(config, run_dir))]
    return sum(total_steps(config, t, manifest["num_pairs"]) for t, manifest in enumerate(manifests))


def train(config: Config, run_dir: RunDir, target: Target, inputs: Inputs, device: torch.device) -> None:
    """Trains ``target`` to its last step, from wherever it stands; run by every rank.

    Raises:
        GateError: the opponent, its scores or the first loss are not what they must be.
        RunDirError, CheckpointError, DataError: inputs are missing or do not fit.
    """
    started = time.perf_counter()
    dims = initialize(config.parallel, device)
    say: Callable[[str], None] = print if dims.rank == 0 else (lambda message: None)
    say(announce(dims, config))
    trainer = _trainer(config, inputs, dims)
    _describe(inputs, trainer, say)

    done = latest_step(target.checkpoints) or 0
    source = run_dir.opponent_checkpoint(target.iteration or 0)
    if not done:
        _begin(config, trainer, source, first=target.iteration in (None, 0))
    gate = None
    if inputs.opponent is not None:
        gate = _score(config, run_dir, target, inputs, trainer, resumed=done > 0, say=say)
    state = {
        "opponent": inputs.opponent,
        "pairs": inputs.pairs,
        "total": trainer.schedule.total,
        "peak": trainer.schedule.peak,
    }
    if done:
        loaded = load_checkpoint(target.checkpoints, trainer.model, dims=dims, optimizer=trainer.optimizer)
        _check_same_training(target, state, loaded)
        say(f"resumed from step {done} of {trainer.schedule.total}")
    elif dims.rank == 0:
        copy_assets(source / CHECKPOINT_ASSETS, target.checkpoints / CHECKPOINT_ASSETS)

    label = f"train {target.label}"
    with MetricsWriter(
        target.metrics, target.tensorboard, step=done, total=trainer.schedule.total, label=label, enabled=dims.rank == 0
    ) as writer:
        every, keep = config.training.checkpoint_every, config.training.keep_checkpoints
        trainer.run(writer, checkpoints=target.checkpoints, done=done, every=every, keep=keep, state=state, gate=gate)
    _write_probe(target, trainer)
    if dims.rank == 0:
        seconds = time.perf_counter() - started
        iterations = (
            {} if target.baseline is None else {"iterations": played(config, run_dir)}
        )  # of whose steps a baseline has as many
        run_dir.mark_done(
            f"train:{target.label}",
            seconds=seconds,
            steps=trainer.schedule.total,
            examples=len(inputs.examples),
            **iterations,
        )


def _check_same_training(target: Target, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Whether a checkpoint belongs to the very training that is to go on: its opponent, pairs, steps and rate."""
    for name, value in now.items():
        if then.get(name) != value:
            raise RunDirError(
                f"{target.checkpoints} was trained with {name} {then.get(name)}, but now it is {value}: restore what changed, "
                f"or delete {target.checkpoints} to train anew"
            )


def _trainer(config: Config, inputs: Inputs, dims: ParallelDims) -> Trainer:
    training = config.training
    sampler = BatchSampler(len(inputs.examples), training.global_batch_size, training.seed)
    length = sequence_length(inputs.examples, alignment(config))
    shape = BatchShape(training.global_batch_size, training.micro_batch_size, length)
    model, optimizer = wrap_and_optimize(
        build_model(config, dims), config, dims=dims, learning_rate=inputs.schedule.peak
    )
    return Trainer(model, optimizer, sft_forward_step(), inputs.examples, None, sampler, shape, inputs.schedule, dims)


def _describe(inputs: Inputs, trainer: Trainer, say: Callable[[str], None]) -> None:
    unit = "pairs" if inputs.opponent is not None else "sequences"
    dropped = trainer.sampler.dropped_per_epoch
    note = f"; {dropped} {unit} an epoch fill no whole batch and are dropped, others each epoch" if dropped else ""
    say(
        f"{len(inputs.examples)} {unit}, {trainer.schedule.total} steps of {trainer.shape.global_batch_size}, {trainer.shape.length} positions{note}"
    )


def _begin(config: Config, trainer: Trainer, source: Path, *, first: bool) -> None:
    """Loads the weights an iteration starts from: fp32 main weights unrounded, moments and schedule fresh."""
    if (
        first or config.precision.dtype == "fp32"
    ):  # an imported checkpoint has no main weights; fp32 weights are their own
        load_checkpoint(source, trainer.model, dims=trainer.dims)
        trainer.optimizer.reload_model_params()
    else:
        load_checkpoint(source, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer)
        carry_over_main_weights(trainer.optimizer)


def _score(
    config: Config,
    run_dir: RunDir,
    target: Target,
    inputs: Inputs,
    trainer: Trainer,
    *,
    resumed: bool,
    say: Callable[[str], None],
) -> Callable[[float], None] | None:
    """Gives the trainer its scores and the SPIN step; returns the check of the first loss, where the policy is the opponent."""
    assert target.iteration is not None and inputs.opponent is not None
    precision, dims = config.precision, trainer.dims
    same = precision.export_dtype == precision.dtype
    if not resumed:
        _check_policy_is_opponent(config, inputs, trainer)
    cache = ScoreCache(
        target.pairs, {"opponent": inputs.opponent, "pairs": inputs.pairs, "numerics": _numerics(config, trainer)}
    )
    scores = cache.load()
    if scores is None:
        if (
            resumed or not same
        ):  # the model does not hold the opponent's weights now: load them, the caller loads the policy again
            load_hf(trainer.model, run_dir.opponent_hf(config, target.iteration), dims, through=precision.export_dtype)
        everything = np.arange(len(inputs.examples))
        scores = score(trainer.model, inputs.examples, everything, shape=trainer.shape, dims=dims, progress=True)
        if dims.rank == 0:
            cache.save(scores)
        torch.distributed.barrier()
        if not resumed and not same:
            _begin(config, trainer, run_dir.opponent_checkpoint(target.iteration), first=target.iteration == 0)
    else:
        say(f"opponent scores of {len(scores)} pairs from {cache.file}")
    beta, loss = at_iteration(config.spin.beta, target.iteration), config.spin.loss
    sft_weight = at_iteration(config.spin.sft_weight, target.iteration)
    trainer.scores, trainer.forward_step = scores, spin_forward_step(beta=beta, loss=loss, sft_weight=sft_weight)
    if resumed:
        return None
    if not same:
        say(
            f"the opponent was exported in {precision.export_dtype} and the policy computes in {precision.dtype}: the first loss need not be loss(0)"
        )
        return None
    gate = check_scores(
        scores, trainer.model, trainer.examples, trainer.sampler.batch(0), shape=trainer.shape, dims=dims
    )
    say(
        f"opponent scores agree with the policy at step 0 within {gate.difference:.1e} nats (allowed {gate.tolerance:.1e})"
    )
    return functools.partial(gate.check_first_loss, beta=beta, loss=loss, sft_weight=sft_weight)


def _numerics(config: Config, trainer: Trainer) -> dict[str, Any]:
    """Everything that the last bits of a score depend on: a cache made otherwise is made anew, not taken for a tampered one."""
    dims, shape = trainer.dims, trainer.shape
    return {
        "dtype": config.precision.dtype,
        "fp8": config.precision.fp8,
        "layer_spec": layer_spec(config, dims.device),
        "device": dims.device.type,
        "layout": [dims.tp_size, dims.pp_size, config.parallel.sequence_parallel],
        "microbatch": [shape.micro_batch_size, shape.length],
    }


def _check_policy_is_opponent(config: Config, inputs: Inputs, trainer: Trainer) -> None:
    hasher = IdentityHasher(config.precision.export_dtype)
    for name, tensor in stream_hf(
        trainer.model, read_hf_config(Path(config.model.hf)), trainer.dims, config.precision.export_dtype
    ):
        hasher.add(name, tensor)
    with raised_everywhere(trainer.dims):
        if trainer.dims.rank == 0 and hasher.hexdigest() != inputs.opponent:
            raise GateError(
                f"the policy's weights ({hasher.hexdigest()[:12]}) are not the opponent's ({(inputs.opponent or '')[:12]}), which generated "
                "the answers: a checkpoint or the exported model was changed since; export again or restore it"
            )


def _write_probe(target: Target, trainer: Trainer) -> None:
    """Keeps the trainer's token log-probs of a few sequences beside the checkpoint, for the export gate to compare; a collective."""
    sequences = [
        (example.prompt_ids, response)
        for example in trainer.examples[:PROBE_EXAMPLES]
        for response in example.responses
    ]
    probe = parity_sample(trainer.model, sequences, dims=trainer.dims)
    if trainer.dims.rank == 0:
        probe.save(target.checkpoints / PROBE_FILE)
