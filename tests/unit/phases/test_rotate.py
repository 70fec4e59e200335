"""What completes an iteration or a baseline, and what cannot be completed."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import from_dict
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.phases.rotate import Rotate
from megatron_spin.run.directory import RunDir

RAW: dict[str, Any] = {
    "name": "t",
    "device": "cpu",
    "model": {"hf": "m"},
    "data": {"path": "d"},
    "spin": {"iterations": 1},
    "baselines": {"more": {"steps": 3}},
}


@pytest.mark.parametrize("evaluation", [{}, {"path": "held_out.jsonl"}])
def test_the_model_that_the_run_starts_from_is_never_completed(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    run_dir = RunDir(tmp_path)
    config = from_dict({**RAW, "evaluation": evaluation})
    with pytest.raises(ConfigError, match="sft is never completed: the plan has no rotate or finish phase for it"):
        Rotate(config, run_dir, run_dir.target(baseline="sft")).check()


def test_plain_sft_has_no_baselines_to_complete(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    config = from_dict({**RAW, "training": {"objective": "sft"}})
    with pytest.raises(ConfigError, match="more is never completed"):
        Rotate(config, run_dir, run_dir.target(baseline="more")).check()


@pytest.mark.parametrize("target", [{"baseline": "more"}, {"iteration": 0}])
def test_it_waits_for_what_comes_before(tmp_path: Path, target: dict[str, Any]) -> None:
    run_dir = RunDir(tmp_path)
    with pytest.raises(RunDirError, match=r"must wait for .*train:"):
        Rotate(from_dict(RAW), run_dir, run_dir.target(**target)).check()
