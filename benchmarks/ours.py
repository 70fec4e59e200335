"""Runs Megatron-SPIN's own tools on the benchmark's pairs and reads the figures that the run recorded.

The step times and token counts are those of metrics.jsonl, the memory is that of the phase's record in state.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.workload import (
    Measurement,
    Workload,
    model_directory,
    preferences_file,
    read_steps,
    read_workload,
    write_json,
)
from megatron_spin import cli, machine
from megatron_spin.errors import GateError
from megatron_spin.io import read_json

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "benchmarks" / "ours.yaml"


SEED = 0
"""Of the order of pairs."""


def run_before_training(directory: Path, run_dir: Path, overrides: Sequence[str]) -> None:
    """Prepares and imports in ``run_dir``, each tool in a process of its own.

    Raises:
        SystemExit: a tool failed; its message is on stderr.
    """
    config, *of_workload = settings(directory, read_workload(directory))
    given = [*of_workload, *overrides, "--run-dir", str(run_dir)]
    model = ["--hf", str(model_directory(directory)), "--checkpoint", str(run_dir / "base")]
    run_tool("prepare.py", config, *given)
    run_tool("import_hf.py", "--config", config, *given, *model)


def training_arguments(directory: Path, run_dir: Path, overrides: Sequence[str]) -> list[str]:
    """The arguments of tools/train.py."""
    given = [*settings(directory, read_workload(directory)), *overrides]
    return [*given, "--run-dir", str(run_dir), "--iteration", "0"]


def settings(directory: Path, workload: Workload) -> list[str]:
    """The configuration file, then the overrides that the workload stands for."""
    answer = workload.max_answer_length + 1  # the end token
    return [
        str(CONFIG),
        f"model.hf={model_directory(directory)}",
        f"data.path={preferences_file(directory)}",
        f"data.max_prompt_length={workload.max_prompt_length}",
        f"data.max_length={workload.max_prompt_length + answer}",
        f"generation.max_new_tokens={answer}",
        f"training.global_batch_size={workload.pairs_per_step}",
        f"training.micro_batch_size={workload.pairs_per_step}",
        f"training.steps={workload.steps}",
        f"training.seed={SEED}",
    ]


def run_tool(tool: str, *arguments: str) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def recorded(directory: Path, run_dir: Path) -> Measurement:
    """What the finished run in ``run_dir`` recorded of the steps that count.

    Raises:
        GateError: the run trained on other pairs than the other rows do.
    """
    workload = read_workload(directory)
    lines = (run_dir / "iteration_0" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    expected = [sum(pair.num_tokens for pair in step) for step in read_steps(directory)]
    tokens = [row["tokens"] for row in rows]
    if tokens != expected:
        raise GateError(f"{run_dir} trained on {tokens} tokens per step, but the workload has {expected}")
    train = read_json(run_dir / "state.json")["phases"]["train:0"]
    return Measurement(
        pairs=sum(workload.measured([row["pairs"] for row in rows])),
        tokens=sum(workload.measured(tokens)),
        seconds=workload.measured([row["seconds"] for row in rows]),
        peak_mb=1024 * train["peak_memory_gib"],
        grad_norm=rows[0]["grad_norm"],
        versions=machine.versions(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path, metavar="DIR", help="what benchmarks.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="measurement to write (JSON)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings, for example of a layout")
    arguments = parser.parse_intermixed_args()
    run_dir = arguments.out.with_suffix(".run")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_before_training(arguments.workload, run_dir, arguments.overrides)
    run_tool("train.py", *training_arguments(arguments.workload, run_dir, arguments.overrides))
    write_json(arguments.out, recorded(arguments.workload, run_dir))
    shutil.rmtree(run_dir)  # its checkpoint is some ten times the model


if __name__ == "__main__":
    cli.run(main)
