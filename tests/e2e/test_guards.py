"""Guards provoked for real, through the driver: one iteration whose learning rate ruins the model, and one whose
opponent knows the answers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import forget, metrics, one_line, run_driver, run_tool, tiny_yaml
from tests.support.tiny import fine_tune, sft_rows, write_jsonl


def state(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "state.json").read_text())
    return content


def verdicts(run: Path, iteration: int = 0) -> dict[str, dict[str, Any]]:
    return {verdict["guard"]: verdict for verdict in state(run)["guards"][str(iteration)]["verdicts"]}


def tripped(run: Path, iteration: int = 0) -> set[str]:
    return {name for name, verdict in verdicts(run, iteration).items() if verdict["tripped"]}


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory) of a run that stands before guard:0; a model that ends its answers was trained
    at a rate that ruins it.
    """
    place = tmp_path_factory.mktemp("ruined")
    config = tiny_yaml(
        place,
        training={"learning_rate": 0.05, "schedule": "constant", "warmup_fraction": 0.0, "epochs": 2},
        spin={"iterations": 2, "beta": 0.1},
        generation={"max_new_tokens": 16},
        evaluation={"num_prompts": 24},
        baselines={},
    )
    fine_tune(place / "model", sft_rows(2000, seed=9), steps=100)
    write_jsonl(place / "eval.jsonl", sft_rows(24, seed=2))
    run_driver(config, "--run-dir", place / "run", "--until", "evaluate:0", check=True)
    return config, place / "run"


@pytest.fixture
def run(ruined: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of :func:`ruined` to be judged."""
    shutil.copytree(ruined[1], tmp_path / "run")
    return ruined[0], tmp_path / "run"


def test_a_ruined_model_is_warned_of_and_the_run_goes_on(run: tuple[Path, Path]) -> None:
    config, directory = run
    ran = run_driver(config, "--run-dir", directory, "--until", "rotate:0", check=True)
    assert tripped(directory) >= {"real_logps_fall", "nll_rise", "end_of_answer", "length", "repetition"}, verdicts(
        directory
    )
    warnings = [line for line in ran.stderr.splitlines() if " warning: guard " in line]
    assert len(warnings) == len(tripped(directory)) and all(
        "iteration 0" in line and ".threshold is " in line for line in warnings
    )
    assert state(directory)["result"] == {
        "hf": "iteration_0/hf",
        "iteration": 0,
        "why": "the last iteration that is complete",
    }
    assert ran.stdout.splitlines()[-1].startswith(f"the result is iteration 0, {directory}/iteration_0/hf")
    run_tool("report.py", directory)
    report = (directory / "report.md").read_text()
    assert (
        "Guard nll_rise (warn) after SPIN 0: held-out NLL per token is" in report
        and "The result is iteration 0" in report
    )


def test_stop_stops_again_until_the_user_decides(run: tuple[Path, Path]) -> None:
    config, directory = run
    stop = ("guards.nll_rise.action=stop", "guards.end_of_answer.action=rollback")
    for _ in range(2):
        ran = run_driver(config, "--run-dir", directory, "--until", "rotate:0", *stop)
        error = one_line(ran, 2)
        assert "guard nll_rise: held-out NLL per token is" in error and "guards.nll_rise.action=warn" in error
        assert (
            "guard:0" not in state(directory)["phases"]
            and not (directory / "iteration_0/DONE").exists()
            and "result" not in state(directory)
        )
    ran = run_driver(config, "--run-dir", directory, "--until", "rotate:0", "guards.nll_rise.threshold=1e9", check=True)
    assert (directory / "iteration_0/DONE").exists() and "nll_rise" not in tripped(directory)


def test_rollback_makes_the_previous_model_the_result(run: tuple[Path, Path], ruined: tuple[Path, Path]) -> None:
    config, directory = run
    for again in (False, True):
        before = state(directory)
        ran = run_driver(
            config, "--run-dir", directory, "--until", "generate:1", "guards.repetition.action=rollback", check=True
        )
        assert (again and state(directory) == before) or "rollback: guard repetition, iteration 0: " in ran.stderr
        assert "generate:1: left out, since iteration 0 was rolled back" in ran.stdout
        assert not (directory / "iteration_1").exists() and not (directory / "iteration_0/DONE").exists()
        result = state(directory)["result"]
        assert (
            result["hf"] == str(ruined[1].parent / "model")
            and result["iteration"] is None
            and "repetition" in result["why"]
        )
        assert ran.stdout.splitlines()[-1].startswith("the result is the model that the run began with, ")
    # Other settings have it judged again, and what was judged before must not let it pass.
    for _ in range(2):
        judged = run_tool(
            "guard.py", config, "--run-dir", directory, "--iteration", 0, "guards.repetition.action=stop", check=False
        )
        assert judged.returncode == 2 and "guard repetition" in judged.stderr


def test_a_guard_waits_for_what_it_looks_at(run: tuple[Path, Path]) -> None:
    config, directory = run
    forget(directory, "evaluate:0")
    ran = run_tool("guard.py", config, "--run-dir", directory, "--iteration", 0, check=False)
    assert ran.returncode == 2 and "guard:0 must wait for evaluate:0" in ran.stderr
    ran = run_tool("guard.py", config, "--run-dir", directory, "--iteration", 2, check=False)
    assert ran.returncode == 2 and "iteration 2 is not in this run: it has 0 to 1" in ran.stderr


@pytest.mark.slow
def test_an_opponent_that_knows_the_answers_leaves_nothing_to_learn(tmp_path: Path) -> None:
    config = tiny_yaml(
        tmp_path,
        training={"learning_rate": 1e-5},
        evaluation={"path": None},
        baselines={"more": {"steps": "same_steps", "learning_rate": 1e-5}},
        guards={"converged": {"action": "rollback"}},
    )
    assert fine_tune(tmp_path / "model", sft_rows(40, seed=1), steps=400) < 0.01
    ran = run_driver(config, "--run-dir", tmp_path / "run", check=True)
    assert verdicts(tmp_path / "run")["converged"]["value"] > 0.95 and tripped(tmp_path / "run") == {"converged"}
    blind = [line for line in ran.stderr.splitlines() if "could not look" in line]
    assert [line.partition(" ")[2] for line in blind] == [
        "warning: guards nll_rise, end_of_answer, length, repetition could not look: "
        "there is no evaluation: give evaluation.path or evaluation.held_out_fraction"
    ]
    # The baseline has as many steps as the one iteration that was trained.
    assert (
        len(metrics(tmp_path / "run/baselines/more/metrics.jsonl"))
        == len(metrics(tmp_path / "run/iteration_0/metrics.jsonl"))
        == 5
    )
    assert (tmp_path / "run/baselines/more/DONE").exists() and not (tmp_path / "run/iteration_1").exists()


@pytest.mark.slow
def test_an_opponent_that_is_beaten_at_once(tmp_path: Path) -> None:
    """Real answers that are nothing like the model's: a few steps tell them apart."""
    config = tiny_yaml(
        tmp_path,
        training={"learning_rate": 5e-3, "epochs": 3},
        spin={"iterations": 1},
        evaluation={"path": None},
        baselines={},
    )
    rows = [{"prompt": row["prompt"], "response": "w1 w2 w3"} for row in sft_rows(40, seed=1)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    ran = run_driver(config, "--run-dir", tmp_path / "run", check=True)
    assert tripped(tmp_path / "run") == {"saturated"}, verdicts(tmp_path / "run")
    assert "warning: guard saturated, iteration 0: from step " in ran.stderr
    assert metrics(tmp_path / "run/iteration_0/metrics.jsonl")[-1]["accuracy"] == 1.0
