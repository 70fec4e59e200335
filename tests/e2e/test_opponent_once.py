"""A training's opponent is read by rank 0 alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import metrics, run_tool, tiny_yaml
from tests.support.world import worlds


def train(config_path: Path, run: Path, models: list[Path]) -> None:
    """Iteration 0; rank r finds the model at ``models[r]``."""
    import torch.distributed as dist

    from megatron_spin.config import load_config
    from megatron_spin.parallel.setup import choose_device
    from megatron_spin.run.directory import RunDir

    choose_device("cpu")
    from megatron_spin.phases.train import Train

    run_dir = RunDir(run)
    config = load_config(config_path, [f"model.hf={models[dist.get_rank()]}"])
    phase = Train(config, run_dir, run_dir.target(iteration=0))
    phase.check()
    phase.run()


def test_only_rank_0_reads_the_opponents_weights(tmp_path: Path) -> None:
    config, run = tiny_yaml(tmp_path), tmp_path / "run"
    run_tool("prepare.py", config, "--run-dir", run)
    run_tool("import_hf.py", "--config", config, "--run-dir", run)
    run_tool("generate.py", config, "--run-dir", run, "--iteration", 0)
    without_weights = tmp_path / "without_weights"
    shutil.copytree(tmp_path / "model", without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    with worlds() as world:
        world(2).run(train, config, run, [tmp_path / "model", without_weights])
    assert metrics(run / "iteration_0/metrics.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
