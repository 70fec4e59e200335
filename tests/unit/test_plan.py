"""The plan of a run: its phases and their order, what is done, and what is refused before anything starts."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import Config, from_dict, to_yaml
from megatron_spin.errors import CheckpointError, ConfigError, DataError, DeviceError, RunDirError, SpinError
from megatron_spin.io import read_json
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import Plan, as_text, finish, processes
from megatron_spin.run.preflight import check

FOLLOWING = ("train", "export", "evaluate", "finish")
"""The phases of a baseline."""


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A configuration whose files exist, for a model of 4 heads and 2 layers on the CPU."""
    (tmp_path / "model").mkdir()
    shape = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
    }
    shape |= {"hidden_size": 8, "vocab_size": 16}
    (tmp_path / "model/config.json").write_text(json.dumps(shape))
    (tmp_path / "model/model.safetensors").write_bytes(bytes(100))
    (tmp_path / "data.jsonl").write_text("{}\n")
    return {
        "name": "planned",
        "device": "cpu",
        "model": {"hf": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "data.jsonl")},
        "evaluation": {"held_out_fraction": 0.1},
        "generation": {"engine": "hf"},
        "spin": {"iterations": 2},
        "baselines": {"more": {"steps": 3}},
    }


def plan_of(config: Config, root: Path) -> Plan:
    return Plan(config, RunDir(root), arguments=["c.yaml", "spin.beta=0.2"], tools=Path("tools"))


def phases(raw: dict[str, Any], root: Path, until: str | None = None) -> list[str]:
    return [step.phase for step in plan_of(from_dict(raw), root).steps(until)]


def test_order_of_self_play(raw: dict[str, Any], tmp_path: Path) -> None:
    rounds = [f"{verb}:{t}" for t in (0, 1) for verb in ("generate", "train", "export", "evaluate", "guard", "rotate")]
    baseline = ["train:more", "export:more", "evaluate:more", "finish:more"]
    assert phases(raw, tmp_path / "run") == ["prepare", "import", "evaluate:sft", *rounds, *baseline]


def test_order_of_sft(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["training"] = {"objective": "sft"}
    assert phases(raw, tmp_path / "run") == ["prepare", "import", "train:0", "export:0", "evaluate:0", "finish:0"]


def test_order_of_dpo(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["training"] = {"objective": "dpo"}
    run_dir = RunDir(tmp_path / "run")
    own = ["train:0", "export:0", "evaluate:0", "guard:0", "finish:0"]
    assert phases(raw, run_dir.root)[: 3 + len(own)] == ["prepare", "import", "evaluate:sft", *own]
    plan = plan_of(from_dict(raw), run_dir.root)
    for step in plan.steps("evaluate:0"):
        run_dir.mark_done(step.phase, seconds=1.0)
    run_dir.mark_done("guard:0", seconds=1.0)
    judged(run_dir, from_dict(raw), "pass")
    finish(plan, "finish:0")
    assert run_dir.target(iteration=0).done.exists()


def test_no_evaluation_without_held_out_data(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["evaluation"] = {}
    assert not any(phase.startswith("evaluate") for phase in phases(raw, tmp_path / "run"))


def test_until_includes_the_phase_and_suggests_the_nearest(raw: dict[str, Any], tmp_path: Path) -> None:
    assert phases(raw, tmp_path / "run", "train:0")[-1] == "train:0"
    with pytest.raises(ConfigError, match="did you mean train:1"):
        phases(raw, tmp_path / "run", "train:9")


def test_commands(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["parallel"] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    steps = {step.phase: step for step in plan_of(from_dict(raw), tmp_path).steps()}
    run = str(tmp_path)
    assert steps["train:1"].command == (
        "tools/train.py",
        "c.yaml",
        "spin.beta=0.2",
        "--run-dir",
        run,
        "--iteration",
        "1",
    )
    assert steps["train:1"].processes == 4 and steps["generate:1"].processes == 1
    assert steps["train:more"].command[-2:] == ("--baseline", "more")
    exported = steps["export:0"].command
    assert exported[exported.index("--checkpoint") + 1] == f"{run}/iteration_0/checkpoints"
    assert exported[exported.index("--hf") + 1] == f"{run}/iteration_0/hf"


def test_text_has_a_line_a_step_and_refuses_tabs(raw: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(from_dict(raw), tmp_path)
    lines = list(as_text(plan.steps("import"), plan.run_dir))
    assert lines[0] == f"run-dir\t{tmp_path}"
    assert lines[1].split("\t")[:3] == ["prepare", "todo", "1"] and lines[1].split("\t")[4:6] == [
        "tools/prepare.py",
        "c.yaml",
    ]
    odd = Plan(plan.config, plan.run_dir, arguments=["a\tb"], tools=Path("tools"))
    with pytest.raises(ConfigError, match="plain words"):
        list(as_text(odd.steps(), odd.run_dir))


def test_done_phases_and_the_marker(raw: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir = from_dict(raw), RunDir(tmp_path / "run")
    plan = plan_of(config, run_dir.root)
    with pytest.raises(RunDirError, match="rotate:0 must wait for generate:0, train:0"):
        finish(plan, "rotate:0")
    for step in plan.steps("guard:0"):
        run_dir.mark_done(step.phase, seconds=1.0)
    judged(run_dir, config, "pass")
    assert [step.phase for step in plan.steps("rotate:0") if not step.done] == ["rotate:0"]
    finish(plan, "rotate:0")
    finish(plan, "rotate:0")
    assert run_dir.is_done("rotate:0") and "train:0" in read_json(run_dir.target(iteration=0).done)
    result = read_json(run_dir.state)["result"]
    assert result["iteration"] == 0 and result["hf"] == "iteration_0/hf"
    assert str(tmp_path / "run/iteration_0/hf") in next(as_text(plan.steps(), run_dir)).split("\t")[2]


def judged(run_dir: RunDir, config: Config, outcome: str, iteration: int = 0) -> None:
    """Records a judgement as the guard phase does."""
    with run_dir.changing_state() as state:
        state.setdefault("guards", {})[str(iteration)] = {
            "outcome": outcome,
            "verdicts": [],
            "settings": dataclasses.asdict(config.guards),
        }


def test_a_rollback_leaves_out_what_comes_after_it_until_the_settings_change(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    config, run_dir = from_dict(raw), RunDir(tmp_path / "run")
    plan = plan_of(config, run_dir.root)
    for step in plan.steps("guard:0"):
        run_dir.mark_done(step.phase, seconds=1.0)
    judged(run_dir, config, "rollback")
    left_out = ["rotate:0", *(f"{kind}:1" for kind in ("generate", "train", "export", "evaluate", "guard", "rotate"))]
    assert [step.phase for step in plan.steps() if step.left_out] == left_out
    assert [step.phase for step in plan.steps() if not step.left_out and not step.done] == [
        f"{kind}:more" for kind in FOLLOWING
    ]
    assert plan.steps("train:1")[-1].left_out  # --until still knows it
    lines = {line.split("\t")[0]: line.split("\t") for line in as_text(plan.steps(), run_dir)}
    assert lines["train:1"][1] == "skip" and "iteration 0 was rolled back" in lines["train:1"][3]
    check(plan, plan.steps("rotate:1"))
    with pytest.raises(RunDirError, match="rotate:0 is left out, for iteration 0 was rolled back"):
        finish(plan, "rotate:0")
    changed = plan_of(from_dict(raw | {"guards": {"nll_rise": {"threshold": 0.2}}}), run_dir.root)
    assert [step.phase for step in changed.steps() if not step.done][:2] == ["guard:0", "rotate:0"]
    assert not any(step.left_out for step in changed.steps())


def test_once_the_policy_is_the_opponent_the_judgement_stands(raw: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir = from_dict(raw), RunDir(tmp_path / "run")
    for step in plan_of(config, run_dir.root).steps("rotate:0"):
        run_dir.mark_done(step.phase, seconds=1.0)
    judged(run_dir, config, "warn")
    changed = plan_of(from_dict(raw | {"guards": {"nll_rise": {"action": "stop"}}}), run_dir.root)
    assert all(step.done for step in changed.steps("rotate:0"))


def test_processes(raw: dict[str, Any]) -> None:
    raw["parallel"] = {"tensor_model_parallel_size": 2}
    assert processes(from_dict(raw)) == 2
    raw["parallel"]["nproc_per_node"] = 4
    assert processes(from_dict(raw)) == 4
    raw["parallel"]["nproc_per_node"] = 1
    with pytest.raises(DeviceError, match=r"nproc_per_node=1 is not a multiple of the 2"):
        processes(from_dict(raw))


def test_preflight_accepts_and_touches_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(from_dict(raw), tmp_path / "run")
    check(plan, plan.steps())
    assert not (tmp_path / "run").exists()


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
    plan = plan_of(from_dict(raw | changes), tmp_path / "run")
    with pytest.raises(error, match=message) as raised:
        check(plan, plan.steps())
    assert "\n" not in str(raised.value) and raised.value.exit_status == 2


def test_preflight_refuses_baselines_with_the_steps_of_fewer_iterations(raw: dict[str, Any], tmp_path: Path) -> None:
    """They were finished after two iterations, or one was rolled back; now three are played."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.mark_done("train:b", seconds=1.0, steps=92, iterations=2)
    for steps in ("same_steps", 92):
        config = from_dict(raw | {"spin": {"iterations": 3}, "baselines": {"b": {"steps": steps}}})
        plan = plan_of(config, run_dir.root)
        if steps == 92:
            check(plan, plan.steps())
            continue
        with pytest.raises(
            RunDirError,
            match=r"baselines.b \(same_steps\) was trained with the steps of 2 iterations, but 3 are played now",
        ):
            check(plan, plan.steps())


def test_preflight_refuses_a_run_of_another_configuration(raw: dict[str, Any], tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open(from_dict(raw))
    run_dir.mark_done("prepare", seconds=1.0)
    (run_dir.target(iteration=0).checkpoints / "iter_0000001").mkdir(parents=True)
    changed = from_dict(raw | {"spin": {"iterations": 3, "beta": 0.7}})
    plan = plan_of(changed, run_dir.root)
    with pytest.raises(RunDirError, match=r"other values of spin\.beta:"):
        check(plan, plan.steps())
    assert run_dir.config.read_text() == to_yaml(from_dict(raw))


def test_preflight_refuses_a_model_that_no_disk_holds(raw: dict[str, Any], tmp_path: Path) -> None:
    os.truncate(tmp_path / "model/model.safetensors", 10**13)  # sparse: takes no space
    plan = plan_of(from_dict(raw), tmp_path / "run")
    with pytest.raises(RunDirError, match="one trained model takes about"):
        check(plan, plan.steps())
