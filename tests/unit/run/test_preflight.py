"""What is refused before anything starts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.commands.plan import check_all
from megatron_spin.config import from_dict, to_yaml
from megatron_spin.errors import CheckpointError, ConfigError, DataError, RunDirError, SpinError
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import Plan
from tests.support.runs import environment


def test_preflight_accepts_and_touches_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan(from_dict(raw), RunDir(tmp_path / "run"))
    check_all(plan, plan.phases())
    assert not (tmp_path / "run").exists()


def test_preflight_of_a_usual_run_on_a_cpu_imports_nothing_that_takes_seconds(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "spin.yaml").write_text(to_yaml(from_dict(raw)))
    script = (
        "import sys; sys.argv = ['plan.py', sys.argv[1], '--check']; from megatron_spin.commands import plan; "
        "plan.main(); assert not {'torch', 'transformers', 'pandas'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "spin.yaml")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    assert "phase=prepare status=todo" in ran.stdout


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"path": "nowhere.jsonl"}}, DataError, "data.path=nowhere.jsonl does not exist"),
        ({"evaluation": {"path": "nowhere.jsonl"}}, DataError, "evaluation.path=nowhere.jsonl does not exist"),
        ({"model": {"hf": "nowhere"}}, CheckpointError, "model.hf=nowhere holds no config.json"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, ConfigError, "=3 .*4"),
        ({"parallel": {"nproc_per_node": 3}}, ConfigError, "global_batch_size=64 .* 3 data parallel"),
        (
            {"training": {"optimizer": {"optimizer": "lion"}}},
            ConfigError,
            "optimizer='lion' is not there: choose one of adam, rmsprop, sgd",
        ),
        (
            {"training": {"optimizer": {"optimiser": "adam"}}},
            ConfigError,
            "training.optimizer.optimiser is not a field",
        ),
    ],
)
def test_preflight_refuses(
    raw: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: type[SpinError], message: str
) -> None:
    plan = Plan(from_dict(raw | changes), RunDir(tmp_path / "run"))
    with pytest.raises(error, match=message) as raised:
        check_all(plan, plan.phases())
    assert "\n" not in str(raised.value) and raised.value.exit_status == 2


def test_preflight_refuses_baselines_with_the_steps_of_fewer_iterations(raw: dict[str, Any], tmp_path: Path) -> None:
    """They were finished after two iterations, or one was rolled back; now three are played."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.mark_done("train:b", seconds=1.0, steps=92, iterations=2)
    for steps in ("same_steps", 92):
        config = from_dict(raw | {"spin": {"iterations": 3}, "baselines": {"b": {"steps": steps}}})
        plan = Plan(config, run_dir)
        if steps == 92:
            check_all(plan, plan.phases())
            continue
        with pytest.raises(
            RunDirError,
            match=r"baselines.b \(same_steps\) was trained with the steps of 2 iterations, but 3 are played now",
        ):
            check_all(plan, plan.phases())


def test_preflight_refuses_a_run_of_another_configuration(raw: dict[str, Any], tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open(from_dict(raw))
    run_dir.mark_done("prepare", seconds=1.0)
    (run_dir.target(iteration=0).checkpoints / "iter_0000001").mkdir(parents=True)
    changed = from_dict(raw | {"spin": {"iterations": 3, "beta": 0.7}})
    plan = Plan(changed, run_dir)
    with pytest.raises(RunDirError, match=r"other values of spin\.beta:"):
        check_all(plan, plan.phases())
    assert run_dir.config.read_text() == to_yaml(from_dict(raw))


def test_preflight_refuses_a_model_that_no_disk_holds(raw: dict[str, Any], tmp_path: Path) -> None:
    os.truncate(tmp_path / "model/model.safetensors", 10**13)  # sparse: takes no space
    plan = Plan(from_dict(raw), RunDir(tmp_path / "run"))
    with pytest.raises(RunDirError, match="one trained model takes up to"):
        check_all(plan, plan.phases())
