"""Judgements of the guards, without anything to judge."""

import dataclasses

from megatron_spin.config import Config
from megatron_spin.run.directory import RunDir
from megatron_spin.run.records import PhaseRecord
from megatron_spin.run.result import guard_settings, result_of


def judged(run_dir: RunDir, config: Config, outcome: str, iteration: int = 0) -> None:
    """Records a judgement as the guard phase does."""
    details = {"outcome": outcome, "verdicts": [], "settings": guard_settings(config)}
    if outcome == "rollback":
        previous = iteration - 1 if iteration else None
        details["result"] = dataclasses.asdict(result_of(config, run_dir, previous, "rolled back"))
    record = PhaseRecord.now(f"guard:{iteration}", seconds=1.0, details=details, is_done=outcome != "stop")
    run_dir.write_record(record)
