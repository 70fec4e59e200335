"""The frame of every phase: what it calls in which order, what it refuses, what it records."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import Config, from_dict, load_config
from megatron_spin.errors import ConfigError, DataError, GateError, RunDirError
from megatron_spin.phases.frame import carry_out
from megatron_spin.run.directory import RunDir

pytestmark = pytest.mark.usefixtures("narration")


class Recorded:
    """A phase that notes what is called and what was there at that time."""

    def __init__(self, run_dir: RunDir, *, refuses: Exception | None = None, fails: Exception | None = None) -> None:
        self.run_dir = run_dir
        self.refuses = refuses
        self.fails = fails
        self.calls = ["started"]

    def check(self) -> None:
        self.calls.append(f"check, {'open' if self.run_dir.config.exists() else 'closed'}")
        if self.refuses is not None:
            raise self.refuses

    def run(self) -> dict[str, Any]:
        self.calls.append(f"run, {'open' if self.run_dir.config.exists() else 'closed'}")
        if self.fails is not None:
            raise self.fails
        return {"steps": 5}


@pytest.fixture
def config() -> Config:
    baselines = {"more": {"steps": 3}}
    raw = {"name": "n", "model": {"hf": "m"}, "data": {"path": "d"}, "spin": {"iterations": 2}, "baselines": baselines}
    return from_dict(raw)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def train(config: Config, phase: Recorded, iteration: int = 0) -> None:
    target = phase.run_dir.target(iteration=iteration)
    carry_out("train", config, phase.run_dir, lambda: phase, target=target)


def test_check_comes_before_the_run_directory_and_the_record_last(
    config: Config, run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = Recorded(run_dir)
    train(config, phase)
    assert phase.calls == ["started", "check, closed", "run, open"]
    assert load_config(run_dir.config) == config
    record = run_dir.record("train:0")
    assert record is not None
    assert record.details == {"steps": 5}
    assert record.machines
    assert "train:0 finished in 0.0 s" in capsys.readouterr().out
    assert "train:0 [rank 0] train:0 finished in 0.0 s" in run_dir.log.read_text()


def test_a_phase_that_is_done_is_not_even_made(
    config: Config, run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir.mark_done("train:0", seconds=1.0)

    def start() -> Recorded:
        raise AssertionError("its imports take seconds")

    carry_out("train", config, run_dir, start, target=run_dir.target(iteration=0))
    assert "train:0 is already done" in capsys.readouterr().out


def test_what_is_refused_leaves_nothing(config: Config, run_dir: RunDir) -> None:
    with pytest.raises(DataError, match="no rows"):
        train(config, Recorded(run_dir, refuses=DataError("no rows")))
    assert not run_dir.root.exists()


def test_what_fails_is_not_done(config: Config, run_dir: RunDir) -> None:
    with pytest.raises(GateError, match="differs"):
        train(config, Recorded(run_dir, fails=GateError("it differs")))
    assert not run_dir.is_done("train:0")
    assert not run_dir.state.exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"iteration": 2}, r"iteration 2 is not in this run: it has 0 to 1 \(spin.iterations=2"),
        ({"iteration": -1}, "iteration -1 is not in this run"),
        ({"baseline": "less"}, "baseline less is not in this run: it has sft, more; add it under baselines"),
    ],
)
@pytest.mark.parametrize("kind", ["generate", "train", "export", "evaluate", "guard", "rotate"])
def test_an_unknown_target_is_one_error_for_all_phases(
    config: Config, run_dir: RunDir, kind: str, target: dict[str, Any], message: str
) -> None:
    phase = Recorded(run_dir)
    with pytest.raises(ConfigError, match=message):
        carry_out(kind, config, run_dir, lambda: phase, target=run_dir.target(**target))
    assert phase.calls == ["started"]
    assert not run_dir.root.exists()


def test_the_run_of_another_configuration_is_refused_first(config: Config, run_dir: RunDir) -> None:
    run_dir.open(config)
    run_dir.mark_done("prepare", seconds=1.0)
    phase = Recorded(run_dir)
    with pytest.raises(RunDirError, match=r"other values of data\.seed"):
        train(from_dict({"name": "n", "model": {"hf": "m"}, "data": {"path": "d", "seed": 1}}), phase)
    assert phase.calls == ["started"]
