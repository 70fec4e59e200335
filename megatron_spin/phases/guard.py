"""The guard phase of an iteration: gathers what there is to look at, says and records what the guards found, and carries it out. No torch.

``state.json`` holds, under ``guards``, each iteration's verdicts, what they came to, and the settings they were made with; under ``result``,
which model the run has come to. Verdicts stand while those settings stand: with others the phase is to be done again, unless the policy has
already become the opponent (``rotate:T`` is done; ``finish:0`` for DPO, whose one iteration is guarded alike).
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_spin.config import Config, at_iteration, has_evaluation
from megatron_spin.errors import GuardError, RunDirError
from megatron_spin.evaluation.guards import Measures, Verdict, judge, outcome
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.io import read_json, read_json_lines
from megatron_spin.run.directory import RunDir
from megatron_spin.spin.objective import num_iterations, objective_class

ENDS = ("rotate", "finish")
"""Phases that complete an iteration: of self-play, and of DPO."""


def guard(config: Config, run_dir: RunDir, iteration: int) -> None:
    """Looks at ``iteration``; warnings go to stderr, verdicts into ``state.json``, and after a rollback the previous model is the result.

    Raises:
        RunDirError: the configuration has no such iteration, or what it left is not complete.
        GuardError: a guard whose action is ``stop`` tripped; the phase is not done, so that the next run comes here again.
    """
    started = time.monotonic()
    verdicts = judge(config.guards, _measures(config, run_dir, iteration))
    came_to = outcome(verdicts)
    _say(verdicts, run_dir, iteration)
    with run_dir.changing_state() as state:
        state["phases"].pop(
            f"guard:{iteration}", None
        )  # from other settings: an old judgement must not stand for the new one
        if state.get("guards", {}).get(str(iteration), {}).get("outcome") == "rollback":  # nor what it came to
            state.pop("result", None)
            if iteration:
                state["result"] = result(config, run_dir, iteration - 1, "the last iteration that is complete")
        state.setdefault("guards", {})[str(iteration)] = {
            "outcome": came_to,
            "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
            "settings": _settings(config),
        }
        if came_to == "rollback":
            names = ", ".join(verdict.guard for verdict in verdicts if verdict.tripped and verdict.action == "rollback")
            previous = iteration - 1 if iteration else None
            state["result"] = result(config, run_dir, previous, f"iteration {iteration} was rolled back ({names})")
    tripped = [verdict for verdict in verdicts if verdict.tripped and verdict.action == came_to]
    if came_to == "stop":
        keys = " and ".join(f"guards.{verdict.guard}.action=warn" for verdict in tripped)
        lines = " | ".join(f"guard {verdict.guard}: {verdict.line}" for verdict in tripped)
        raise GuardError(
            f"iteration {iteration} was stopped by {lines}. To go on as it is: {keys}, or another threshold"
        )
    run_dir.mark_done(f"guard:{iteration}", seconds=time.monotonic() - started, outcome=came_to)
    if came_to == "rollback":
        for verdict in tripped:
            print(f"rollback: guard {verdict.guard}, iteration {iteration}: {verdict.line}", file=sys.stderr)
        print(f"the result is {describe(run_dir)}; no later iteration is run", file=sys.stderr)


def settled(config: Config, run_dir: RunDir, iteration: int) -> bool:
    """Whether the guards have judged ``iteration`` and the judgement stands."""
    if not run_dir.is_done(f"guard:{iteration}"):
        return False
    return any(run_dir.is_done(f"{end}:{iteration}") for end in ENDS) or _record(run_dir, iteration).get(
        "settings"
    ) == _settings(config)


def rolled_back(config: Config, run_dir: RunDir) -> int | None:
    """The iteration that was rolled back, if one was and its guards still have the settings of then."""
    for iteration in range(num_iterations(config)):
        if _record(run_dir, iteration).get("outcome") == "rollback" and settled(config, run_dir, iteration):
            return iteration
    return None


def played(config: Config, run_dir: RunDir) -> int:
    """How many iterations are trained: all, or those up to the one that was rolled back."""
    last = rolled_back(config, run_dir)
    return num_iterations(config) if last is None else last + 1


def result(config: Config, run_dir: RunDir, iteration: int | None, why: str) -> dict[str, Any]:
    """The entry of ``state.json`` that says where the run's result is; ``iteration`` None: the model that the run began with."""
    hf = run_dir.opponent_hf(config, 0 if iteration is None else iteration + 1)
    # Not resolved: whether a model goes along when the run directory is moved or copied is a matter of names, not of where links lead.
    named, root = Path(os.path.abspath(hf)), os.path.abspath(run_dir.root)
    return {
        "hf": str(named.relative_to(root) if named.is_relative_to(root) else hf.resolve()),
        "iteration": iteration,
        "why": why,
    }


def result_hf(run_dir: RunDir) -> Path:
    """Hugging Face directory of the run's result, absolute: ``state.json`` names a model inside the run directory from there.

    Raises:
        RunDirError: the run has come to no result yet.
    """
    state = read_json(run_dir.state)
    if "result" not in state:
        raise RunDirError(f"{run_dir.root} has no result yet: run tools/spin.sh until its first iteration is complete")
    return run_dir.root.resolve() / state["result"]["hf"]


def describe(run_dir: RunDir) -> str:
    """The run's result in words, with its path; raises as :func:`result_hf`."""
    hf, entry = result_hf(run_dir), read_json(run_dir.state)["result"]
    return f"{model_name(entry)}, {hf} ({entry['why']})"


def model_name(entry: dict[str, Any]) -> str:
    """Which model a result is, in words."""
    return "the model that the run began with" if entry["iteration"] is None else f"iteration {entry['iteration']}"


def _measures(config: Config, run_dir: RunDir, iteration: int) -> Measures:
    if not objective_class(config).compares() or not 0 <= iteration < num_iterations(config):
        raise RunDirError(
            f"iteration {iteration} has nothing to guard: the config has iterations 0 to {num_iterations(config) - 1} of "
            f"training.objective={config.training.objective}, and guards are for objectives that compare answers"
        )
    evaluates = has_evaluation(config)
    for phase in ("train", "export", *(["evaluate"] if evaluates else [])):
        if not run_dir.is_done(f"{phase}:{iteration}"):
            raise RunDirError(
                f"guard:{iteration} must wait for {phase}:{iteration}: run tools/spin.sh, which runs all phases in order"
            )
    target = run_dir.target(iteration=iteration)
    opponent = run_dir.target(iteration=iteration - 1) if iteration else run_dir.target(baseline="sft")
    return Measures(
        beta=at_iteration(config.spin.beta, iteration),
        steps=read_json_lines(target.metrics),
        pairs=read_json(target.pairs / "manifest.json"),
        policy=Evaluation.read(target.eval) if evaluates else None,
        opponent=Evaluation.read(opponent.eval) if evaluates else None,
    )


def _say(verdicts: list[Verdict], run_dir: RunDir, iteration: int) -> None:
    """Prints what every guard saw, and on stderr what it warns of; what cannot be looked at is named in the first iteration that lacks it."""
    for verdict in verdicts:
        if verdict.tripped is not None:
            print(f"  {verdict.guard:<16} {'TRIPPED' if verdict.tripped else 'ok':<8} {verdict.said}")
        if verdict.tripped and verdict.action == "warn":
            print(f"warning: guard {verdict.guard}, iteration {iteration}: {verdict.line}", file=sys.stderr)
    unseen: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.tripped is None:
            unseen.setdefault(verdict.said, []).append(verdict.guard)
    before = {
        entry["said"] for entry in _record(run_dir, iteration - 1).get("verdicts", []) if entry["tripped"] is None
    }
    for why in unseen.keys() - before:
        print(f"warning: guards {', '.join(unseen[why])} could not look: {why}", file=sys.stderr)


def _record(run_dir: RunDir, iteration: int) -> dict[str, Any]:
    state = read_json(run_dir.state) if run_dir.state.exists() else {}
    record: dict[str, Any] = state.get("guards", {}).get(str(iteration), {})
    return record


def _settings(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config.guards)
