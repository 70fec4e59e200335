"""The phase that completes an iteration or a baseline, by the ``DONE`` marker in its directory. No torch.

It is called ``rotate:T`` after an iteration of self-play, whose policy is then the opponent of the next;
otherwise ``finish:T`` or ``finish:NAME``.
"""

import dataclasses
from typing import Any

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.io import write_json
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.run.plan import Plan
from megatron_spin.run.records import kind_and_label
from megatron_spin.run.result import result_of
from megatron_spin.run.state import COMPLETE, phase_entry


class Rotate:
    """The phase, under either name."""

    def __init__(self, config: Config, run_dir: RunDir, target: Target) -> None:
        self.config = config
        self.run_dir = run_dir
        self.target = target

    def check(self) -> None:
        """Finds the phases before it.

        Raises:
            ConfigError: the plan completes no such iteration or baseline.
            RunDirError: a phase before it is not done, or a guard rolled the iteration back.
        """
        phases = Plan(self.config, self.run_dir).phases_of(self.target)
        if not phases or kind_and_label(phases[-1].name)[0] not in ("rotate", "finish"):
            raise ConfigError(
                f"{self.target.label} is never completed: the plan has no rotate or finish phase for it, as "
                "tools/spin.sh --dry-run shows"
            )
        *before, last = phases
        if last.is_left_out:
            raise RunDirError(f"{last.name} is {last.what}: change the guards' settings to have it judged again")
        missing = [phase.name for phase in before if not phase.is_done]
        if missing:
            raise RunDirError(
                f"{last.name} must wait for {', '.join(missing)}: run tools/spin.sh, which runs all phases in order"
            )
        self._before = [phase.name for phase in before]

    def run(self) -> dict[str, Any]:
        """Writes the marker; a complete iteration is the run's result until a later one is."""
        records = [self.run_dir.record(name) for name in self._before]
        write_json(self.target.done, {record.phase: phase_entry(record) for record in records if record is not None})
        if self.target.iteration is None:
            return {}
        return {"result": dataclasses.asdict(result_of(self.config, self.run_dir, self.target.iteration, COMPLETE))}
