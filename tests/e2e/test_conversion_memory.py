"""What import and export need: each rank its own shard and little more, gates included."""

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.runs import REPOSITORY, command, environment
from tests.support.tiny import tiny_model

HIDDEN, FFN, LAYERS, VOCABULARY = 1024, 4096, 10, 4096
RANKS = 2
TP2 = ("--tensor-model-parallel-size", RANKS)


def peak(tool: str, *arguments: object) -> int:
    """Bytes of resident memory of the largest rank of ``tool``, over its whole life."""
    # Not the system's ru_maxrss: a process inherits that of the one that started it, here pytest's.
    largest = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(
            command(tool, *arguments, ranks=RANKS), stdout=errors, stderr=errors, env=environment(), cwd=REPOSITORY
        )
        while process.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in process.children():
                    largest = max(largest, high_water_mark(rank.pid))
        errors.seek(0)
        assert process.returncode == 0, errors.read()[-3000:]
    return largest


def high_water_mark(pid: int) -> int:
    """The kernel's own record of the process's largest resident memory so far, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **sizes: Any) -> Path:
        tiny_model(tmp_path / name / "hf", tied=False, dtype=torch.bfloat16, scale=0.02, **sizes)
        return tmp_path / name / "hf"

    return make


@pytest.mark.skipif(sys.platform != "linux", reason="the largest resident memory of a process is in Linux's /proc")
def test_a_rank_needs_its_shard_and_little_more(model: Callable[..., Path]) -> None:
    """On two tensor parallel ranks, of which the first compares with transformers and writes the files.

    Beside its shard it may hold 0.3 of that, the largest weight twice (its shards, and the whole that they make), and
    the copies that Megatron's dist_checkpointing makes of the two halves of a gated MLP's matrix, in training's
    checkpoints as well.
    """
    small = model("small")
    large = model("large", hidden=HIDDEN, heads=16, kv_heads=8, ffn=FFN, layers=LAYERS, vocabulary=VOCABULARY)
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert weights > 300e6, "the noise of an interpreter's memory must be small against it"
    gated = 2 * HIDDEN * FFN * LAYERS * 2
    largest = 2 * (2 * HIDDEN * FFN) * 2
    allowed = 1.3 * weights / RANKS + gated / RANKS + largest
    checkpoints = {hf: hf.parent / "base" for hf in (small, large)}
    base, imported = (peak("import_hf.py", "--hf", hf, "--checkpoint", checkpoints[hf], *TP2) for hf in checkpoints)
    exported = peak("export_hf.py", "--checkpoint", checkpoints[large], "--hf", large.parent / "out", *TP2)
    for name, found in (("import", imported), ("export", exported)):
        used = found - base
        print(f"{name}: {used / 1e6:.0f} MB for a shard of {weights / RANKS / 1e6:.0f} MB")
        assert used > weights / RANKS, "the shard itself must show, else this measures nothing"
        assert used < allowed, f"{name} takes {used / 1e6:.0f} MB, {allowed / 1e6:.0f} MB are allowed"
