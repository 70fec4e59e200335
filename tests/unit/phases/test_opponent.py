"""Where the opponent of an iteration is, and that it is what was exported and what the pairs were made for."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from megatron_spin.config import Config, from_dict
from megatron_spin.conversion.identity import identity
from megatron_spin.data.pairs import TWO_ANSWERS, PairsManifest
from megatron_spin.errors import GateError, RunDirError
from megatron_spin.phases.opponent import check_made_for, read_opponent
from megatron_spin.run.directory import RunDir
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(directory)
    return directory


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def config_of(model: Path, objective: str = "spin") -> Config:
    raw = {"name": "n", "model": {"hf": str(model)}, "data": {"path": "d"}, "precision": {"dtype": "fp32"}}
    return from_dict({**raw, "training": {"objective": objective}})


def test_the_first_opponent_is_the_model_that_the_run_starts_from(model: Path, run_dir: RunDir) -> None:
    opponent = read_opponent(config_of(model), run_dir, 0)
    assert (opponent.hf, opponent.checkpoint) == (model, run_dir.base)
    assert opponent.identity == identity(model, "fp32")


def test_later_ones_are_what_the_iteration_before_exported(model: Path, run_dir: RunDir) -> None:
    config, target = config_of(model), run_dir.target(iteration=0)
    with pytest.raises(RunDirError, match="iteration 0 must be trained and exported first"):
        read_opponent(config, run_dir, 1)
    shutil.copytree(model, target.hf)
    run_dir.mark_done("export:0", seconds=1.0, identity=identity(model, "fp32"))
    opponent = read_opponent(config, run_dir, 1)
    assert (opponent.hf, opponent.checkpoint) == (target.hf, target.checkpoints)
    run_dir.mark_done("export:0", seconds=1.0, identity="1" * 64)
    with pytest.raises(RunDirError, match=r"but iteration 0 exported 111111111111\.\.\.: its weights were changed"):
        read_opponent(config, run_dir, 1)


@pytest.mark.parametrize(
    ("objective", "remedy"),
    [("spin", r"delete .*generated and .*pairs and generate again"), ("dpo", "a new --run-dir")],
)
def test_pairs_of_another_opponent_are_refused(model: Path, run_dir: RunDir, objective: str, remedy: str) -> None:
    config, target = config_of(model, objective), run_dir.target(iteration=0)
    opponent = read_opponent(config, run_dir, 0)
    manifest = PairsManifest(
        opponent=opponent.identity, data="d", answers=TWO_ANSWERS, num_pairs=1, counts={}, identity="p"
    )
    check_made_for(opponent, target, manifest, config)
    with pytest.raises(GateError, match=f"pairs was made for opponent 000000000000, but {model} is .*{remedy}"):
        check_made_for(opponent, target, dataclasses.replace(manifest, opponent="0" * 64), config)
