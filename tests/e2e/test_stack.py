"""A run that goes on with other devices, kernels or versions."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from megatron_spin.io import sha256
from tests.support.runs import REPOSITORY, command, environment, metrics, one_line

STEPS = 5


def train(config: Path, run: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Trains with ``paths`` before everything else that Python can import."""
    return subprocess.run(
        command("train.py", config, "--run-dir", run, "--iteration", 0),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(PYTHONPATH=":".join(map(str, [*paths, REPOSITORY]))),
        cwd=REPOSITORY,
        check=False,
    )


def score_elsewhere(finished: Path, run: Path, **changes: Any) -> None:
    """Gives ``run`` the scores of ``finished`` as another machine would have made them: half a nat apart."""
    for file in (finished / "iteration_0/pairs").glob("scores.*"):
        shutil.copy(file, run / "iteration_0/pairs")
    file, manifest = (run / "iteration_0/pairs" / name for name in ("scores.safetensors", "scores.json"))
    tensors = safetensors.numpy.load_file(file)
    tensors["real_logps"] = tensors["real_logps"] + np.float32(0.5)
    safetensors.numpy.save_file(tensors, file)
    content = json.loads(manifest.read_text())
    content["stack"] |= changes
    content["sha256"] = sha256(file)
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("changes", [{"device": "NVIDIA A100-SXM4-80GB"}, {"versions": {"torch": "2.6.0"}}])
def test_scores_of_another_stack_are_computed_again(
    fresh: tuple[Path, Path], trained: tuple[Path, Path], changes: dict[str, Any]
) -> None:
    config, run = fresh
    score_elsewhere(trained[1], run, **changes)
    result = train(config, run)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(run / "iteration_0/metrics.jsonl") == metrics(trained[1] / "iteration_0/metrics.jsonl")


def test_what_changed_after_a_checkpoint_is_said(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, finished = trained
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "phases/train_0.json").unlink()
    checkpoints = run / "iteration_0/checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    shutil.rmtree(checkpoints / f"iter_{STEPS:07d}")
    metadata = tmp_path / "site/flash_attn-2.7.4.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.7.4\n")
    result = train(config, run, tmp_path / "site")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "other rounding than before step 2, since these changed: flash-attn None -> 2.7.4" in result.stdout
    assert "opponent scores of 40 pairs from" in result.stdout


def test_the_layer_spec_stays_what_the_run_started_with(fresh: tuple[Path, Path]) -> None:
    config, run = fresh
    path = run / "phases/import.json"
    record = json.loads(path.read_text())
    assert record["details"]["stack"]["layer_spec"] == "local"
    record["details"]["stack"]["layer_spec"] = "transformer_engine"
    record["details"]["stack"]["device"] = "NVIDIA H100 80GB HBM3"
    path.write_text(json.dumps(record))
    error = one_line(train(config, run), status=2)
    assert "layer_spec=transformer_engine" in error
    assert "continue where both are" in error or "set layer_spec: local" in error
