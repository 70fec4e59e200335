"""A disk that fills up while training writes: one line, status 2, nothing half-written, and the run goes on once
there is room.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY, command, environment, metrics, run_tool


def test_checkpoint_on_a_full_disk(fresh: tuple[Path, Path], trained: tuple[Path, Path]) -> None:
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs user namespaces for a small file system of its own")
    config, run = fresh
    checkpoints = run / "iteration_0/checkpoints"
    checkpoints.mkdir(parents=True)
    # A file system smaller than one checkpoint, seen by this process tree alone.
    script = 'mount -t tmpfs -o size=900k none "$0" && shift 0 && "$@"; status=$?; ls -A "$0"; exit $status'
    train = command("train.py", config, "--run-dir", run, "--iteration", 0)
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, str(checkpoints), *train],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        check=False,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "no space left" in errors[0], result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    assert result.stdout.split()[-1] == "hf", "the half-written checkpoint must be gone"
    shutil.rmtree(run / "iteration_0/tensorboard", ignore_errors=True)
    run_tool("train.py", config, "--run-dir", run, "--iteration", 0)
    assert metrics(run / "iteration_0/metrics.jsonl") == metrics(trained[1] / "iteration_0/metrics.jsonl")
