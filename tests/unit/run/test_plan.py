"""The plan of a run: its phases and their order, what is done, and what is refused before anything starts."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import Config, from_dict
from megatron_spin.errors import ConfigError, DeviceError, RunDirError
from megatron_spin.io import read_json
from megatron_spin.phases.frame import carry_out
from megatron_spin.phases.rotate import Rotate
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import CommandLines, Plan, PlannedPhase, as_text, end_of_iteration, num_ranks
from megatron_spin.run.preflight import check
from tests.support.judgements import judged

pytestmark = pytest.mark.usefixtures("narration")
FOLLOWING = ("train", "export", "evaluate", "finish")
"""The phases of a baseline."""


def commands(config: Config, root: Path, *overrides: str) -> CommandLines:
    return CommandLines(
        config=config, run_dir=RunDir(root), config_path="c.yaml", overrides=overrides, tools=Path("tools")
    )


def rotate(config: Config, run_dir: RunDir, iteration: int) -> None:
    """The phase that completes ``iteration``."""
    target = run_dir.target(iteration=iteration)
    carry_out(end_of_iteration(config), config, run_dir, lambda: Rotate(config, run_dir, target), target=target)


def assigned(line: str, *names: str) -> list[str]:
    """What bash makes of a line for the driver: the values of ``names``, then the words of ``command``."""
    values = " ".join(f'"${name}"' for name in names)
    script = f"""eval "$1"; printf '%s\\0' {values} "${{command[@]}}\""""
    ran = subprocess.run(["bash", "-uc", script, "bash", line], capture_output=True, text=True, check=True)
    return ran.stdout.split("\0")[:-1]


def phases(raw: dict[str, Any], root: Path, until: str | None = None) -> list[str]:
    return [phase.name for phase in Plan(from_dict(raw), RunDir(root)).phases(until)]


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
    config = from_dict(raw)
    for phase in Plan(config, run_dir).phases("evaluate:0"):
        run_dir.mark_done(phase.name, seconds=1.0)
    judged(run_dir, config, "pass")
    rotate(config, run_dir, 0)
    assert run_dir.is_done("finish:0")
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
    config = from_dict(raw)
    planned = {phase.name: phase for phase in Plan(config, RunDir(tmp_path)).phases()}
    lines = commands(config, tmp_path, "spin.beta=0.2")
    run = str(tmp_path)
    assert lines.of(planned["train:1"]) == (
        "tools/train.py",
        "c.yaml",
        "spin.beta=0.2",
        "--run-dir",
        run,
        "--iteration",
        "1",
    )
    assert lines.of(planned["train:more"])[-2:] == ("--baseline", "more")
    exported = lines.of(planned["export:0"])
    assert exported[exported.index("--checkpoint") + 1] == f"{run}/iteration_0/checkpoints"
    assert exported[exported.index("--hf") + 1] == f"{run}/iteration_0/hf"
    ranks = {assigned(line, "phase")[0]: assigned(line, "ranks")[0] for line in text(planned.values(), lines)}
    assert (ranks["train:1"], ranks["generate:1"], ranks["import"], ranks["export:1"]) == ("4", "1", "4", "4")


def text(phases: Iterable[PlannedPhase], lines: CommandLines) -> list[str]:
    """The lines of the phases, without the first one for the run."""
    return list(as_text(list(phases), lines))[1:]


def test_text_is_assignments_that_bash_reads_back(raw: dict[str, Any], tmp_path: Path) -> None:
    config, root = from_dict(raw), tmp_path / "it's a run"
    plan = Plan(config, RunDir(root))
    odd = ("data.path=a\tb 'c'", "name=$HOME", "spin.beta=")
    first, *others = as_text(plan.phases("import"), commands(config, root, *odd))
    assert assigned(f"{first} command=()", "run_dir", "result") == [str(root), ""]
    expected = ["prepare", "todo", "1", "false", "read, check and tokenize the data"]
    expected += ["tools/prepare.py", "c.yaml", *odd, "--run-dir", str(root)]
    assert assigned(others[0], "phase", "status", "ranks", "replan", "what") == expected
    with pytest.raises(ConfigError, match="holds a newline"):
        list(as_text(plan.phases(), commands(config, root, "a\nb")))


def test_done_phases_and_the_marker(raw: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir = from_dict(raw), RunDir(tmp_path / "run")
    plan = Plan(config, run_dir)
    with pytest.raises(RunDirError, match="rotate:0 must wait for generate:0, train:0"):
        rotate(config, run_dir, 0)
    for phase in plan.phases("evaluate:0"):
        run_dir.mark_done(phase.name, seconds=1.0)
    judged(run_dir, config, "pass")
    assert [phase.name for phase in plan.phases("rotate:0") if not phase.is_done] == ["rotate:0"]
    rotate(config, run_dir, 0)
    rotate(config, run_dir, 0)
    assert run_dir.is_done("rotate:0") and "train:0" in read_json(run_dir.target(iteration=0).done)
    result = read_json(run_dir.state)["result"]
    assert result["iteration"] == 0 and result["hf"] == "iteration_0/hf"
    first = next(as_text(plan.phases(), commands(config, run_dir.root)))
    assert str(tmp_path / "run/iteration_0/hf") in assigned(f"{first} command=()", "result")[0]


def test_a_rollback_leaves_out_what_comes_after_it_until_the_settings_change(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    config, run_dir = from_dict(raw), RunDir(tmp_path / "run")
    plan = Plan(config, run_dir)
    for phase in plan.phases("evaluate:0"):
        run_dir.mark_done(phase.name, seconds=1.0)
    judged(run_dir, config, "rollback")
    left_out = ["rotate:0", *(f"{kind}:1" for kind in ("generate", "train", "export", "evaluate", "guard", "rotate"))]
    assert [phase.name for phase in plan.phases() if phase.is_left_out] == left_out
    following = [f"{kind}:more" for kind in FOLLOWING]
    assert [phase.name for phase in plan.phases() if phase.status == "todo"] == following
    assert plan.phases("train:1")[-1].is_left_out  # --until still knows it
    lines = text(plan.phases("train:1"), commands(config, run_dir.root))
    name, status, what, *_ = assigned(lines[-1], "phase", "status", "what")
    assert (name, status) == ("train:1", "skip") and "iteration 0 was rolled back" in what
    check(plan, plan.phases("rotate:1"))
    with pytest.raises(RunDirError, match="rotate:0 is left out, since iteration 0 was rolled back"):
        rotate(config, run_dir, 0)
    changed = Plan(from_dict(raw | {"guards": {"nll_rise": {"threshold": 0.2}}}), run_dir)
    assert [phase.name for phase in changed.phases() if not phase.is_done][:2] == ["guard:0", "rotate:0"]
    assert not any(phase.is_left_out for phase in changed.phases())


def test_once_the_policy_is_the_opponent_the_judgement_stands(raw: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir = from_dict(raw), RunDir(tmp_path / "run")
    for phase in Plan(config, run_dir).phases("rotate:0"):
        run_dir.mark_done(phase.name, seconds=1.0)
    judged(run_dir, config, "warn")
    changed = Plan(from_dict(raw | {"guards": {"nll_rise": {"action": "stop"}}}), run_dir)
    assert all(phase.is_done for phase in changed.phases("rotate:0"))


def test_num_ranks(raw: dict[str, Any]) -> None:
    raw["parallel"] = {"tensor_model_parallel_size": 2}
    assert num_ranks(from_dict(raw)) == 2
    raw["parallel"]["nproc_per_node"] = 4
    assert num_ranks(from_dict(raw)) == 4
    raw["parallel"]["nproc_per_node"] = 1
    with pytest.raises(DeviceError, match=r"nproc_per_node=1 is not a multiple of the 2"):
        num_ranks(from_dict(raw))
