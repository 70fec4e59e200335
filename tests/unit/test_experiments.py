"""The experiments' definitions, and their tables against hand-made evaluations."""

from pathlib import Path

import pytest

from examples.experiments import table
from examples.experiments.experiment import Experiment, read_experiment
from examples.experiments.run import Runner
from megatron_spin.config import from_dict, load_config
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.io import write_json
from megatron_spin.parallel.setup import choose_device
from megatron_spin.spin.objective import num_iterations
from tests.support.runs import REPOSITORY

FILES = sorted((REPOSITORY / "examples" / "experiments").glob("*.yaml"))

DEFINITION = """
title: T
seeds: [1, 2]
arms:
  a: {spin.iterations: 1}
  a again: {spin.iterations: 1}
  b: {after: a, spin.iterations: 2}
best:
  best of all: [a/0, b/0]
claims:
  - [b/1, a/0]
  - [best of all, a/sft]
columns: {not ended %: truncated_fraction}
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_definition_can_be_read_and_names_rows_that_will_be_there(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.title and experiment.seeds and experiment.arms
    choose_device("cpu")  # before Megatron is imported
    from megatron_spin.training.optimizer import optimizer_config

    runner = Runner(Path("out"), engine="vllm")
    rows = set(experiment.best)
    for name, arm in experiment.arms.items():
        config = load_config(
            REPOSITORY / "examples/quickstart/spin.yaml", runner.settings(arm, Path("data"), Path("hf"))
        )
        optimizer_config(config, learning_rate=1.0)
        rows |= {f"{name}/{label}" for label in ("sft", *config.baselines, *range(num_iterations(config)))}
    named = {row for claim in experiment.claims for row in claim} | {
        row for parts in experiment.best.values() for row in parts
    }
    assert named <= rows


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    path = tmp_path / "t.yaml"
    path.write_text(DEFINITION)
    return read_experiment(path)


def measure(experiment: Experiment, root: Path, seed: int, arm: str, label: str, matched: float) -> None:
    run_dir = experiment.run_dir(root, seed, arm)
    raw = {
        "name": "t",
        "model": {"hf": "m"},
        "data": {"path": "d"},
        "spin": {"iterations": 2 if arm == "b" else 1},
        "baselines": {},
    }
    run_dir.open(from_dict({**raw, "generation": {"engine": ["hf"]}}))
    run_dir.mark_done("prepare", seconds=1.0)
    target = run_dir.target(baseline="sft") if label == "sft" else run_dir.target(iteration=int(label))
    values = {
        "model": "0" * 64,
        "num_prompts": 4,
        "exact_match_sampled": matched,
        "exact_match_greedy": 1.0,
        "nll_per_token": 0.5,
        "likelihood": {"mix": {"nll_per_token": 0.25}},
        "truncated_fraction": 0.1,
        "patterns": {"careless": {"sampled": 0.2, "exact_match_without": None}},
    }
    write_json(target.eval, values)


def test_alike_arms_share_a_run_and_others_do_not(experiment: Experiment, tmp_path: Path) -> None:
    a, again, b = (experiment.run_dir(tmp_path, 1, arm).root for arm in ("a", "a again", "b"))
    assert a == again != b and experiment.run_dir(tmp_path, 2, "a").root != a


def test_means_spreads_and_claims(experiment: Experiment, tmp_path: Path) -> None:
    for seed, (sft, a, first, second) in {1: (0.5, 0.6, 0.4, 0.7), 2: (0.5, 0.6, 0.8, 0.5)}.items():
        for arm, label, matched in (("a", "sft", sft), ("a", "0", a), ("b", "0", first), ("b", "1", second)):
            measure(experiment, tmp_path, seed, arm, label, matched)
    rows = table.measured(experiment, tmp_path)
    cells = {row[0]: row[1:] for row in table.table(experiment, rows).rows}
    assert cells["SFT"][:2] == ["2", "50.0 ± 0.0"] and cells["b, iteration 0"][1] == "60.0 ± 28.3"
    assert cells["a, iteration 0"][3:] == ["20.0 ± 0.0", "–", "0.5000 ± 0.0000", "0.2500 ± 0.0000", "10.0 ± 0.0"]  # noqa: RUF001
    assert cells["best of all"][1] == "70.0 ± 14.1"  # 0.6 and 0.8
    lines = table.claims(experiment, rows)
    assert lines[0] == "- b, iteration 1 above a, iteration 0: 1 of 2 seeds, by 0.0 ± 10.0 points"
    assert lines[1].startswith("- best of all above a, sft: 2 of 2 seeds, by 20.0")
    by_seed = {row[0]: row[1:] for row in table.by_seed(experiment, rows).rows}
    assert by_seed["b, iteration 1"] == ["70.0", "50.0"]
    measure(experiment, tmp_path, 1, "b", "sft", 0.9)  # the model that b began with is a's
    again = {row[0]: row[1:] for row in table.table(experiment, table.measured(experiment, tmp_path)).rows}
    assert again["SFT"] == cells["SFT"]
    block = table.block(tmp_path / "t.yaml", experiment, tmp_path)
    assert "Not finished: a (seed 1)" in block and "t.yaml --engine hf`, on " in block and block.count("cores of") == 1


def test_nothing_measured_is_said(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="has no finished evaluation"):
        table.block(tmp_path / "t.yaml", experiment, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: T\nseeds: [1]\n", "needs title, seeds and arms"),
        ("title: T\nseeds: [1]\narms: {a: {}}\nclaim: []\n", "needs title, seeds and arms"),
        ("title: T\nseeds: [1]\narms: {b: {after: a}, a: {}}\n", "arm b comes after a, which is no arm above it"),
        ("[", "cannot be read"),
    ],
)
def test_bad_definitions(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_experiment(tmp_path / "e.yaml")
