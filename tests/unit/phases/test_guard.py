"""The guard phase on the files of an iteration: what it records, and that it can be run again at any time."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import Config, from_dict
from megatron_spin.data.pairs import PairsManifest
from megatron_spin.errors import GuardError, RunDirError
from megatron_spin.io import read_json, write_json
from megatron_spin.phases.frame import carry_out
from megatron_spin.phases.guard import Guard
from megatron_spin.run.directory import RunDir
from megatron_spin.run.result import is_settled, num_played, result_hf, result_of, rolled_back
from megatron_spin.run.state import COMPLETE
from tests.unit.evaluation.test_guards import curve, evaluation

pytestmark = pytest.mark.usefixtures("narration")


def config_of(tmp_path: Path, **guards: Any) -> Config:
    raw = {
        "name": "n",
        "model": {"hf": str(tmp_path / "model")},
        "data": {"path": "d"},
        "evaluation": {"held_out_fraction": 0.1},
    }
    return from_dict({**raw, "spin": {"iterations": 3}, "guards": guards})


def guard(config: Config, run_dir: RunDir, iteration: int) -> None:
    """Carries out the guard phase."""
    target = run_dir.target(iteration=iteration)
    carry_out("guard", config, run_dir, lambda: Guard(config, run_dir, target), target=target)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run whose first iteration is healthy and complete; the held-out NLL of the second is twice as high."""
    run_dir = RunDir(tmp_path / "run")
    write_json(run_dir.target(baseline="sft").eval, evaluation().to_json())
    for iteration, nll in enumerate((0.9, 1.8)):
        target = run_dir.target(iteration=iteration)
        write_json(target.eval, evaluation(nll_per_token=nll).to_json())
        manifest = PairsManifest("o", "d", ("real", "generated"), 10, {"identical": 1}, "i")
        write_json(target.pairs / "manifest.json", dataclasses.asdict(manifest))
        target.metrics.write_text("".join(json.dumps(row) + "\n" for row in curve()))
        for kind in ("train", "export", "evaluate"):
            run_dir.mark_done(f"{kind}:{iteration}", seconds=1.0)
    return run_dir


def complete(run_dir: RunDir, config: Config, iteration: int) -> None:
    """Records the end of an iteration, as the rotate phase does."""
    result = dataclasses.asdict(result_of(config, run_dir, iteration, COMPLETE))
    run_dir.mark_done(f"rotate:{iteration}", seconds=1.0, result=result)


def test_a_healthy_iteration_passes_with_its_figures(
    run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    guard(config, run_dir, 0)
    record = read_json(run_dir.state)["guards"]["0"]
    assert record["outcome"] == "pass" and len(record["verdicts"]) == 7 and is_settled(config, run_dir, 0)
    assert {verdict["guard"]: verdict["value"] for verdict in record["verdicts"]}["nll_rise"] == pytest.approx(-0.1)
    shown = capsys.readouterr()
    assert not shown.err and shown.out.count(" ok ") == 7


def test_a_rollback_goes_to_the_iteration_before(
    run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, nll_rise={"action": "rollback"})
    guard(config, run_dir, 0)
    assert rolled_back(config, run_dir) is None and num_played(config, run_dir) == 3
    guard(config, run_dir, 1)
    assert rolled_back(config, run_dir) == 1 and num_played(config, run_dir) == 2
    entry = read_json(run_dir.state)["result"]
    assert entry == {"hf": "iteration_0/hf", "iteration": 0, "why": "iteration 1 was rolled back (nll_rise)"}
    shown = capsys.readouterr().err
    assert (
        f"the result is iteration 0, {tmp_path}/run/iteration_0/hf (iteration 1 was" in shown
        and "no later iteration is run" in shown
    )
    assert rolled_back(config_of(tmp_path), run_dir) is None and not is_settled(config_of(tmp_path), run_dir, 1)


def test_a_result_moves_with_the_run_and_the_model_it_began_with_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # both are mostly given relative to where the user stands
    config, run_dir = from_dict({"name": "n", "model": {"hf": "model"}, "data": {"path": "d"}}), RunDir(Path("run"))
    run_dir.mark_done("train:0", seconds=1.0)
    with pytest.raises(RunDirError, match="run has no result yet"):
        result_hf(run_dir)
    for iteration, stored, moved in (
        (0, "iteration_0/hf", "moved/iteration_0/hf"),
        (None, str(tmp_path / "model"), "model"),
    ):
        run_dir.mark_done(
            "rotate:0", seconds=1.0, result=dataclasses.asdict(result_of(config, run_dir, iteration, "w"))
        )
        assert read_json(run_dir.state)["result"]["hf"] == stored
        os.rename("run", "moved")
        assert result_hf(RunDir(Path("moved"))) == tmp_path / moved
        os.rename("moved", "run")
    began_inside = from_dict({"name": "n", "model": {"hf": str(tmp_path / "run/model")}, "data": {"path": "d"}})
    assert result_of(began_inside, run_dir, None, "w").hf == "model"


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_rollback_that_is_lifted_leaves_no_result_behind(run_dir: RunDir, tmp_path: Path, action: str) -> None:
    complete(run_dir, config_of(tmp_path), 0)
    guard(config_of(tmp_path, nll_rise={"action": "rollback"}), run_dir, 1)
    lifted = config_of(tmp_path, nll_rise={"action": action})
    with contextlib.suppress(GuardError):
        guard(lifted, run_dir, 1)
    entry = read_json(run_dir.state)["result"]
    assert (entry["iteration"], entry["why"]) == (0, "the last iteration that is complete")
    assert num_played(lifted, run_dir) == 3


def test_killed_between_judgement_and_mark_it_judges_again(run_dir: RunDir, tmp_path: Path) -> None:
    config = config_of(tmp_path, nll_rise={"action": "rollback"})
    guard(config, run_dir, 1)
    whole = read_json(run_dir.state)
    judged = run_dir.record("guard:1")
    assert judged is not None
    run_dir.write_record(dataclasses.replace(judged, finished=None))
    assert "guard:1" not in read_json(run_dir.state)["phases"]
    assert not is_settled(config, run_dir, 1) and rolled_back(config, run_dir) is None
    guard(config, run_dir, 1)
    again = read_json(run_dir.state)
    assert again["guards"] == whole["guards"] and again["result"] == whole["result"] and is_settled(config, run_dir, 1)


def test_a_stop_is_recorded_and_no_earlier_judgement_lets_it_pass(run_dir: RunDir, tmp_path: Path) -> None:
    guard(config_of(tmp_path), run_dir, 1)
    stop = config_of(tmp_path, nll_rise={"action": "stop"}, length={"action": "stop"})
    for _ in range(2):
        with pytest.raises(
            GuardError, match=r"guard nll_rise: held-out NLL .*threshold is 0\.05: .* guards\.nll_rise\.action=warn"
        ):
            guard(stop, run_dir, 1)
        assert not is_settled(stop, run_dir, 1) and read_json(run_dir.state)["guards"]["1"]["outcome"] == "stop"


def test_what_cannot_be_seen_is_said_once(run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for iteration in (0, 1):
        target = run_dir.target(iteration=iteration)
        rows = [json.loads(line) for line in target.metrics.read_text().splitlines()]
        target.metrics.write_text("".join(json.dumps({**row, "identical": None}) + "\n" for row in rows))
        guard(config_of(tmp_path), run_dir, iteration)
    assert capsys.readouterr().err.count("guards saturated could not look: metrics.jsonl has no identical") == 1
