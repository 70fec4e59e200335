"""A user's own objectives, named in the configuration alone, through the driver: the two of examples/objectives."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.feather
import pytest
from PIL import Image

from megatron_spin.config import load_config
from megatron_spin.report.plot import plot
from megatron_spin.report.results import compared_models, read_results
from megatron_spin.run.directory import RunDir
from tests.support.runs import forget, metrics, one_line, run_driver

SPACE = "training.objective=examples.objectives.space:Space"
TSPIN = "training.objective=examples.objectives.tspin:Tspin"
ITERATION = ("training.steps=3", "spin.reuse_previous=false", "evaluation.path=null", "baselines={}")
STEPS = 3
BETA = 0.3
"""As in the tiny configuration."""


def played(generated: tuple[Path, Path], place: Path, *arguments: str) -> tuple[Path, str]:
    """Continues a copy of the run ``generated`` with another objective; returns its directory and its stderr."""
    config, run = generated
    shutil.copytree(run, place / "run")
    (place / "run/config.yaml").unlink()  # so that it is a run of whatever configuration continues it
    forget(place / "run", "generate:0")  # the answers stay, and the pairs are made anew for the objective
    ran = run_driver(config, "--run-dir", place / "run", *ITERATION, *arguments)
    assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return place / "run", ran.stderr


def verdicts(run: Path) -> dict[str, dict[str, Any]]:
    """What each guard said of iteration 0."""
    judged = json.loads((run / "state.json").read_text())["guards"]["0"]["verdicts"]
    return {verdict["guard"]: verdict for verdict in judged}


def looked(run: Path) -> set[str]:
    """The guards that could look."""
    return {name for name, verdict in verdicts(run).items() if verdict["tripped"] is not None}


def names(run: Path) -> list[str]:
    """How tables call the models of a run."""
    return [name for name, _ in compared_models(load_config(run / "config.yaml"), RunDir(run))]


# --------------------------------------------------------------------------------------------------------------- SPACE


@pytest.fixture(scope="module")
def space(generated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one iteration of SPACE with mu = 3, judged."""
    arguments = (SPACE, "spin.parameters.mu=3", "--until", "guard:0")
    run, _ = played(generated, tmp_path_factory.mktemp("space"), *arguments)
    return run


def test_space_starts_at_its_own_loss(space: Path) -> None:
    steps = metrics(space / "iteration_0/metrics.jsonl")
    assert len(steps) == STEPS
    assert steps[0]["loss"] == pytest.approx(math.log(4) + 3 * math.log(4 / 3), abs=1e-4)
    assert steps[0]["real_reward"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["generated_reward"] == pytest.approx(0, abs=1e-4)


def test_space_learns(space: Path) -> None:
    last = metrics(space / "iteration_0/metrics.jsonl")[-1]
    assert last["margin"] == pytest.approx(last["real_reward"] - last["generated_reward"])
    assert last["margin"] > 0.05
    assert last["loss"] < math.log(4) + 3 * math.log(4 / 3) - 0.05


def test_guards_read_the_rewards_of_space_as_those_of_spin(space: Path) -> None:
    assert looked(space) == {"real_logps_fall", "converged", "saturated"}
    # The guard gets the opponent's log-probs back from rewards, spin.beta and log-probs.
    opponents = []
    for step in metrics(space / "iteration_0/metrics.jsonl"):
        opponents.append(step["real_logps"] - step["real_reward"] / BETA)
    said = verdicts(space)["real_logps_fall"]["said"]
    assert f"went from {sum(opponents) / STEPS:.4g} to" in said


def test_tables_call_it_space(space: Path) -> None:
    assert names(space) == ["SFT", "SPACE 0", "SPACE 1"]


# -------------------------------------------------------------------------------------------------------------- T-SPIN


@pytest.fixture(scope="module")
def tspin(generated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of two iterations of T-SPIN, and what the driver said on stderr."""
    arguments = (TSPIN, "spin.parameters.alpha=0.5", "--until", "train:1")
    return played(generated, tmp_path_factory.mktemp("tspin"), *arguments)


def pair_columns(run: Path, iteration: int) -> dict[str, list[Any]]:
    table = pyarrow.feather.read_table(run / f"iteration_{iteration}/pairs/pairs.arrow")
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


def test_pairs_of_tspin_have_three_answers(tspin: tuple[Path, str]) -> None:
    """In iteration 0 the opponent is the initial model; in iteration 1 its answers to the same prompts come back."""
    run, _ = tspin
    before, after = pair_columns(run, 0), pair_columns(run, 1)
    assert len(before["index"]) == len(after["index"]) == 40
    assert before["initial_ids"] == before["generated_ids"]
    initial = dict(zip(before["index"], before["generated_ids"], strict=True))
    assert dict(zip(after["index"], after["initial_ids"], strict=True)) == initial
    assert after["initial_ids"] != after["generated_ids"]
    assert after["initial_ids"] != after["real_ids"]


@pytest.mark.parametrize("iteration", [0, 1])
def test_tspin_reports_both_margins_and_no_rewards(tspin: tuple[Path, str], iteration: int) -> None:
    run, _ = tspin
    steps = metrics(run / f"iteration_{iteration}/metrics.jsonl")
    assert len(steps) == STEPS
    for step in steps:
        margin = 0.5 * (step["real_logps"] - step["generated_logps"])
        history_margin = 0.5 * (step["generated_logps"] - step["initial_logps"])
        assert step["margin"] == pytest.approx(margin, abs=1e-4)
        assert step["history_margin"] == pytest.approx(history_margin, abs=1e-4)
        assert (step["history_margin"] == 0) == (iteration == 0)
        assert step["real_reward"] is None


@pytest.mark.parametrize("iteration", [0, 1])
def test_nothing_is_scored_for_tspin(tspin: tuple[Path, str], iteration: int) -> None:
    run, _ = tspin
    assert not (run / f"iteration_{iteration}/pairs/scores.safetensors").exists()


def test_a_guard_says_that_tspin_has_no_rewards(tspin: tuple[Path, str]) -> None:
    run, said = tspin
    assert looked(run) == {"converged", "saturated"}
    assert "real_logps_fall could not look: metrics.jsonl has no real_reward" in said


def test_the_report_of_tspin_leaves_rewards_out(tspin: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = tspin
    assert names(run) == ["SFT", "T-SPIN 0", "T-SPIN 1"]
    plot(read_results(run), tmp_path / "report.png")
    panels = 2  # loss and accuracy
    assert Image.open(tmp_path / "report.png").width == panels * 440


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SPACE, "spin.parameters.nu=3"], "spin.parameters.nu is not a parameter"),
        ([SPACE, "spin.parameters.mu=[1, 0]"], "spin.parameters.mu=0.0 must be greater than 0"),
        (["training.objective=examples.objectives.space:AnswerLogps"], "is not a subclass of"),
        (["training.objective=examples.objectives.space:Nowhere"], "module examples.objectives.space has no Nowhere"),
    ],
)
def test_mistakes_cost_one_line(
    generated: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    config, _ = generated
    ran = run_driver(config, "--run-dir", tmp_path / "run", "--dry-run", *arguments)
    assert message in one_line(ran, status=2)
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
