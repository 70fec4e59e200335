"""The guard phase of an iteration: judges what it left, says and records the judgement. No torch.

The record holds the verdicts, what they come to (``outcome``) and the settings they were made with; after a rollback
also which model is now the result. A stop is recorded without being finished: the next run comes here again.
"""

import dataclasses
import time
from typing import Any

from megatron_spin.config import Config, at_iteration, has_evaluation
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.errors import ConfigError, GuardError, RunDirError
from megatron_spin.evaluation.guards import Measures, Verdict, judge, outcome
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.log import logger
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.run.records import PhaseRecord
from megatron_spin.run.result import guard_settings, result_of
from megatron_spin.run.step_metrics import load_step_metrics
from megatron_spin.spin.objective import objective_class


class Guard:
    """The phase."""

    def __init__(self, config: Config, run_dir: RunDir, target: Target) -> None:
        assert target.iteration is not None
        self.config = config
        self.run_dir = run_dir
        self.target = target
        self.iteration = target.iteration

    def check(self) -> None:
        """Gathers what the guards look at.

        Raises:
            ConfigError: the objective sets no answers against each other.
            RunDirError: what the iteration left is not complete.
        """
        config = self.config
        if not objective_class(config).compares():
            raise ConfigError(
                f"iteration {self.iteration} has nothing to guard: training.objective={config.training.objective} "
                "compares no answers"
            )
        evaluates = has_evaluation(config)
        for phase in ("train", "export", "evaluate") if evaluates else ("train", "export"):
            if not self.run_dir.is_done(f"{phase}:{self.iteration}"):
                raise RunDirError(
                    f"guard:{self.iteration} must wait for {phase}:{self.iteration}: run tools/spin.sh, which runs all "
                    "phases in order"
                )
        opponent = self.run_dir.target(baseline="sft")
        if self.iteration > 0:
            opponent = self.run_dir.target(iteration=self.iteration - 1)
        self._measures = Measures(
            beta=at_iteration(config.spin.beta, self.iteration),
            steps=load_step_metrics(self.target.metrics),
            pairs=PairsManifest.load(self.target.pairs),
            policy=Evaluation.load(self.target.eval) if evaluates else None,
            opponent=Evaluation.load(opponent.eval) if evaluates else None,
        )

    def run(self) -> dict[str, Any]:
        """Judges.

        Raises:
            GuardError: a guard whose action is ``stop`` tripped; the judgement is recorded, the phase is not done.
        """
        started = time.monotonic()
        verdicts = judge(self.config.guards, self._measures)
        decision = outcome(verdicts)
        decisive = [verdict for verdict in verdicts if verdict.tripped and verdict.action == decision]
        self._say(verdicts)
        details: dict[str, Any] = {
            "outcome": decision,
            "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
            "settings": guard_settings(self.config),
        }
        if decision == "stop":
            seconds = time.monotonic() - started
            record = PhaseRecord.now(f"guard:{self.iteration}", seconds=seconds, details=details, is_done=False)
            self.run_dir.write_record(record)
            raise GuardError(self._reason_to_stop(decisive))
        if decision == "rollback":
            details["result"] = self._roll_back(decisive)
        return details

    def _reason_to_stop(self, decisive: list[Verdict]) -> str:
        lines = " | ".join(f"guard {verdict.guard}: {verdict.line}" for verdict in decisive)
        keys = " and ".join(f"guards.{verdict.guard}.action=warn" for verdict in decisive)
        return f"iteration {self.iteration} was stopped by {lines}. To continue as it is: {keys}, or another threshold"

    def _roll_back(self, decisive: list[Verdict]) -> dict[str, Any]:
        """Makes the model before this iteration the run's result; returns it as plain data."""
        previous = self.iteration - 1 if self.iteration > 0 else None
        names = ", ".join(verdict.guard for verdict in decisive)
        why = f"iteration {self.iteration} was rolled back ({names})"
        result = result_of(self.config, self.run_dir, previous, why)
        for verdict in decisive:
            logger.warning(f"rollback: guard {verdict.guard}, iteration {self.iteration}: {verdict.line}")
        logger.warning(f"the result is {result.line(self.run_dir)}; no later iteration is run")
        return dataclasses.asdict(result)

    def _say(self, verdicts: list[Verdict]) -> None:
        """What every guard saw, and what it warns of. What cannot be looked at is named once per run."""
        unseen: dict[str, list[str]] = {}
        for verdict in verdicts:
            if verdict.tripped is None:
                unseen.setdefault(verdict.said, []).append(verdict.guard)
                continue
            logger.info(f"  {verdict.guard:<16} {'TRIPPED' if verdict.tripped else 'ok':<8} {verdict.said}")
            if verdict.tripped and verdict.action == "warn":
                logger.warning(f"guard {verdict.guard}, iteration {self.iteration}: {verdict.line}")
        for why in unseen.keys() - self._said_before():
            logger.warning(f"guards {', '.join(unseen[why])} could not look: {why}")

    def _said_before(self) -> set[str]:
        """Why guards could not look at the iteration before."""
        record = self.run_dir.record(f"guard:{self.iteration - 1}")
        verdicts = record.details.get("verdicts", []) if record is not None else []
        return {verdict["said"] for verdict in verdicts if verdict["tripped"] is None}
