"""Runs of the real tools in processes of their own, and a tiny run to begin from."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import sft_rows, tiny_model, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(REPOSITORY),
}


def command(tool: str, *arguments: object, ranks: int = 1) -> list[str]:
    """The command line of ``tools/TOOL``, under torchrun when it has more than one rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(REPOSITORY / "tools" / tool), *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **extra}


def run_tool(
    tool: str, *arguments: object, ranks: int = 1, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a tool to its end; with ``check`` a failure raises with the end of its output."""
    result = subprocess.run(
        command(tool, *arguments, ranks=ranks),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=REPOSITORY,
    )
    if check and result.returncode:
        raise AssertionError(f"{tool} ended with {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result


def run_driver(
    *arguments: object, cwd: Path | None = None, check: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs ``tools/spin.sh`` to its end; with ``check`` a failure raises with the end of its output."""
    result = subprocess.run(
        [str(REPOSITORY / "tools/spin.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(PYTHON=sys.executable),
        cwd=cwd,
        check=False,
    )
    if check:
        assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


def one_line(result: subprocess.CompletedProcess[str], status: int | None = None) -> str:
    """The one error line of a run that ended with ``status``; None: with 1 or 2."""
    expected = (1, 2) if status is None else (status,)
    assert result.returncode in expected, f"{result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    return lines[0]


def forget(run: Path, *phases: str) -> None:
    """Makes ``phases`` of a run ones that have not run, as if they had been killed before their end."""
    for phase in phases:
        (run / "phases" / f"{phase.replace(':', '_')}.json").unlink()


def tiny_yaml(directory: Path, **sections: Any) -> Path:
    """Writes a tiny model, its data and a configuration that trains in seconds; returns the configuration's path."""
    tiny_model(directory / "model")
    write_jsonl(directory / "train.jsonl", sft_rows(40, seed=1))
    write_jsonl(directory / "eval.jsonl", sft_rows(8, seed=2))
    raw: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "model": {"hf": str(directory / "model"), "make_vocab_size_divisible_by": 8},
        "precision": {"dtype": "fp32"},
        "data": {"path": str(directory / "train.jsonl"), "template": "none", "max_length": 40},
        "generation": {"engine": "hf", "max_new_tokens": 10, "shard_size": 16, "batch_size": 16},
        "evaluation": {"path": str(directory / "eval.jsonl"), "num_prompts": 8},
        "spin": {"iterations": 2, "beta": 0.3},
        "training": {
            "epochs": 1,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
        },
        "baselines": {"sft_continued": {"steps": "same_steps"}},
    }
    for name, section in sections.items():
        raw[name] = {**raw[name], **section} if isinstance(raw.get(name), dict) else section
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl without their times, which alone may differ between equal runs."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
