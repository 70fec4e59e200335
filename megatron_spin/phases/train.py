"""The training phase of one iteration or baseline: checks, the opponent's scores, then training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spin.config import Config
from megatron_spin.conversion.identity import streamed_identity
from megatron_spin.conversion.load import load_hf
from megatron_spin.conversion.parity import PROBE_FILE, parity_sample
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.errors import GateError, RunDirError
from megatron_spin.hf.assets import CHECKPOINT_ASSETS, copy_assets, read_hf_config
from megatron_spin.log import logger
from megatron_spin.parallel.check import check_config
from megatron_spin.parallel.collectives import gather_objects, on_rank_zero
from megatron_spin.parallel.kernels import announce, layer_spec
from megatron_spin.parallel.layout import alignment
from megatron_spin.parallel.setup import choose_device, initialize, join
from megatron_spin.parallel.stack import Stack, resolve_stack, stack_changes
from megatron_spin.phases.opponent import Opponent, check_made_for, read_opponent
from megatron_spin.phases.training_inputs import Inputs, read_inputs
from megatron_spin.processes import world_size
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.run.result import num_played
from megatron_spin.run.resume import STACK, as_started
from megatron_spin.spin.gate import first_loss
from megatron_spin.spin.objective import AnswerLogps, Objective
from megatron_spin.training.assembly import Policy, build_policy
from megatron_spin.training.checkpoint import load_checkpoint
from megatron_spin.training.forward_step import reported_names
from megatron_spin.training.metrics import MetricsWriter
from megatron_spin.training.optimizer import OVERLAPS, optimizer_config
from megatron_spin.training.scoring import ScoreCache, check_scores
from megatron_spin.training.tracker import latest_step

PROBE_EXAMPLES = 4
"""Examples whose token log-probs are kept for the export gate: enough to see a wrong weight, quick on one device."""


class Train:
    """The phase; every rank runs it."""

    def __init__(self, config: Config, run_dir: RunDir, target: Target) -> None:
        self.config = config
        self.run_dir = run_dir
        self.target = target

    def check(self) -> None:
        """Checks settings and layout, and reads what is trained on. Raises as :func:`read_inputs`."""
        self._device = choose_device(self.config.device, deterministic=self.config.training.deterministic)
        ranks = join(self.config.parallel, self._device)
        self.config = on_rank_zero(ranks, lambda: as_started(self.run_dir, self.config))
        check_config(self.config, self._device.type, world_size=world_size())
        optimizer_config(self.config, learning_rate=1.0)
        inputs = read_inputs(self.config, self.run_dir, self.target)
        self._inputs = dataclasses.replace(inputs, plan=on_rank_zero(ranks, lambda: inputs.plan))
        seen = gather_objects((len(inputs.examples), inputs.pairs), ranks)
        if len(set(seen)) > 1:
            raise RunDirError(
                f"the ranks see different examples in {self.run_dir.root} ({seen}): its file system shows some of them "
                "an older state; run again"
            )
        reported_names(self._inputs.objective)  # refuses names that are taken

    def run(self) -> dict[str, Any]:
        """Trains. Raises as :func:`train`."""
        train(self.config, self.run_dir, self.target, self._inputs, self._device)
        details: dict[str, Any] = {"steps": self._inputs.plan.total, "examples": len(self._inputs.examples)}
        details[STACK] = resolve_stack(self.config, self._device).as_record()
        if self.target.baseline is not None:
            # So that preflight can tell whether a baseline's step count is stale.
            details["iterations"] = num_played(self.config, self.run_dir)
        return details


def train(config: Config, run_dir: RunDir, target: Target, inputs: Inputs, device: torch.device) -> None:
    """Trains ``target`` to its last step, from wherever it is; every rank runs it.

    Raises:
        GateError: the opponent, its scores or the first loss are not what they must be.
        RunDirError, CheckpointError, DataError: inputs are missing or do not fit.
    """
    dims = initialize(config.parallel, device)
    logger.info(announce(dims, config))
    stack = on_rank_zero(dims, lambda: resolve_stack(config, device))
    if inputs.pairs is not None:
        opponent = on_rank_zero(dims, lambda: _opponent(config, run_dir, target))
        inputs = dataclasses.replace(inputs, opponent=opponent)
    policy = build_policy(
        config,
        inputs.examples,
        dims=dims,
        peak=inputs.plan.peak,
        global_batch_size=inputs.sampler.global_batch_size,
    )
    overlapped = [name for name in OVERLAPS if getattr(policy.model[0].ddp_config, name)]
    if overlapped:
        logger.info(f"communication overlaps computation: {', '.join(overlapped)}")
    logger.info(inputs.describe())

    done = on_rank_zero(dims, lambda: latest_step(target.checkpoints)) or 0
    source = run_dir.opponent_checkpoint(target.iteration or 0)
    if not done:
        _load_start(policy, source)
        if inputs.opponent is not None:
            _check_policy_is_opponent(config, policy, inputs.opponent)
    reference = None
    # A training that only lacks what follows its last step needs no scores.
    if inputs.objective.needs_reference and done < inputs.plan.total:
        reference, is_opponent_loaded = _reference(config, run_dir, target, inputs, policy, stack=stack, fresh=not done)
        if is_opponent_loaded and not done:
            _load_start(policy, source)
    gate = None
    if inputs.opponent is not None and not done:
        gate = _first_loss_gate(config, inputs, policy, reference)
    state = {
        "opponent": inputs.opponent and inputs.opponent.identity,
        "pairs": inputs.pairs,
        "total": inputs.plan.total,
        "peak": inputs.plan.peak,
        "objective": _objective_text(inputs.objective),
    }
    if done:
        loaded = load_checkpoint(target.checkpoints, policy.model, dims=dims, optimizer=policy.optimizer)
        _check_same_training(target, state, loaded)
        logger.info(f"resumed from step {done} of {inputs.plan.total}")
        changed = stack_changes(loaded.get(STACK, stack.as_record()), stack)
        if changed:
            logger.info(f"other rounding than before step {done}, since these changed: {', '.join(changed)}")
    else:
        assets = target.checkpoints / CHECKPOINT_ASSETS
        on_rank_zero(dims, lambda: copy_assets(source / CHECKPOINT_ASSETS, assets))

    trainer = policy.trainer(inputs.objective, reference, inputs.sampler, inputs.plan)
    writer = MetricsWriter(
        target.metrics,
        target.tensorboard,
        step=done,
        total=inputs.plan.total,
        label=f"train {target.label}",
        ranks=dims,
    )
    with writer:
        trainer.run(
            writer,
            checkpoints=target.checkpoints,
            done=done,
            every=config.training.checkpoint_every,
            keep=config.training.keep_checkpoints,
            resharding=config.training.checkpoint_resharding,
            state={**state, STACK: stack.as_record()},
            gate=gate,
        )
    _write_probe(target, policy)


def _opponent(config: Config, run_dir: RunDir, target: Target) -> Opponent:
    """The opponent, for which the pairs must have been made."""
    opponent = read_opponent(config, run_dir, target.iteration or 0)
    check_made_for(opponent, target, PairsManifest.load(target.pairs), config)
    return opponent


def _load_start(policy: Policy, source: Path) -> None:
    """Loads the weights that an iteration starts from: fp32 main weights unrounded, moments and schedule fresh."""
    load_checkpoint(source, policy.model, dims=policy.dims, optimizer=policy.optimizer, moments=False)


def _check_policy_is_opponent(config: Config, policy: Policy, opponent: Opponent) -> None:
    """Compares the weights in memory with the model that generated the answers."""
    hf_config = read_hf_config(Path(config.model.hf))
    expected = opponent.shared_identity
    found = streamed_identity(policy.model, hf_config, policy.dims, config.precision.shared_dtype)
    if found != expected:
        raise GateError(
            f"the policy's weights ({found[:12]}) are not the opponent's ({expected[:12]}), which generated the "
            "answers: a checkpoint or the exported model was changed since; export again or restore it"
        )


def _reference(
    config: Config,
    run_dir: RunDir,
    target: Target,
    inputs: Inputs,
    policy: Policy,
    *,
    stack: Stack,
    fresh: bool,
) -> tuple[np.ndarray, bool]:
    """The opponent's scores, from the cache or computed now.

    Args:
        stack: what the policy computes with.
        fresh: the policy holds the weights that the iteration starts from.

    Returns:
        [N, r] scores, and whether the policy now holds the exported opponent's weights in place of its own.
    """
    opponent = inputs.opponent and inputs.opponent.identity
    key = {"opponent": opponent, "pairs": inputs.pairs, "numerics": _numerics(config, policy)}
    # Which prompts share a microbatch, and so its padding, depends on the global batch, too.
    cut = [policy.global_batch_size, config.training.micro_batch_size, alignment(config)]
    cache = ScoreCache(target.pairs, inputs.objective.answers, key, cut, stack.as_record())
    scores = cache.load(policy.dims, any_cut=not fresh)
    if scores is not None:
        logger.info(f"opponent scores of {len(scores)} pairs from {cache.file}")
        return scores, False
    must_load = not fresh or not _exports_as_it_computes(config)
    if must_load:
        opponent_hf = run_dir.opponent_hf(config, target.iteration or 0)
        load_hf(policy.model, opponent_hf, policy.dims, through=config.precision.export_dtype)
    scores = policy.score(progress=True)
    cache.save(scores, policy.dims)
    return scores, must_load


def _exports_as_it_computes(config: Config) -> bool:
    """Whether the exported opponent, in the policy's dtype, has the very weights that the policy computes with."""
    return config.precision.dtype == config.precision.shared_dtype


def _numerics(config: Config, policy: Policy) -> dict[str, Any]:
    """What the last bits of a score depend on besides the cut into microbatches; if it changed, all are scored anew."""
    dims = policy.dims
    return {
        "dtype": config.precision.dtype,
        "layer_spec": layer_spec(config, dims.device.type),
        "device": dims.device.type,
        "layout": [dims.tp_size, dims.pp_size, config.parallel.sequence_parallel],
    }


def _first_loss_gate(
    config: Config, inputs: Inputs, policy: Policy, reference: np.ndarray | None
) -> Callable[[float], None] | None:
    """Checks the scores of the first batch and returns the check of its loss; None where the two need not agree."""
    if reference is not None and not _exports_as_it_computes(config):
        logger.info(
            f"the opponent was exported in {config.precision.export_dtype} and the policy computes in "
            f"{config.precision.dtype}: the first loss need not be that of policy = opponent"
        )
        return None
    batch = inputs.sampler.batch(0)
    answers = inputs.objective.answers
    checked = check_scores(reference, policy.model, policy.batcher, batch, answers=answers, dims=policy.dims)
    scores = torch.from_numpy(checked.fresh if reference is None else reference[batch])
    if reference is not None:
        logger.info(
            f"opponent scores agree with the policy at step 0 within {checked.difference:.1e} nats "
            f"(allowed {checked.tolerance:.1e})"
        )
    examples = [inputs.examples[index] for index in batch]
    logps = AnswerLogps(
        policy=scores,
        reference=None if reference is None else scores,
        lengths=torch.tensor([example.lengths for example in examples], dtype=torch.float32),
        identical=torch.tensor([example.identical for example in examples]),
    )
    return first_loss(inputs.objective, logps, checked.tolerance).check


def _check_same_training(target: Target, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Whether a checkpoint belongs to the training that is to continue: its opponent, pairs, steps, rate, objective."""
    for name, value in now.items():
        # A checkpoint of an earlier version does not name its objective.
        if then.get(name, value if name == "objective" else None) != value:
            raise RunDirError(
                f"{target.checkpoints} was trained with {name} {then.get(name)}, but now it is {value}: restore what "
                f"changed, or delete {target.checkpoints} to train anew"
            )


def _objective_text(objective: Objective) -> str:
    """Class and parameters of the objective, for comparison."""
    kind = type(objective)
    return f"{kind.__module__}.{kind.__qualname__} {dataclasses.asdict(objective)}"


def _write_probe(target: Target, policy: Policy) -> None:
    """Keeps token log-probs of a few sequences beside the checkpoint, for the export gate; a collective."""
    sequences = []
    for example in policy.batcher.examples[:PROBE_EXAMPLES]:
        sequences += [(list(example.prompt_ids), list(answer)) for answer in example.answers]
    sample = parity_sample(policy.model, sequences, alignment=policy.batcher.alignment, dims=policy.dims)
    on_rank_zero(policy.dims, lambda: sample.save(target.checkpoints / PROBE_FILE))
