"""The quickstart itself, at full size with real vLLM: what a stranger sees, and what the README claims of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import REPOSITORY

SCRIPT = str(REPOSITORY / "examples/quickstart/quickstart.sh")
ROWS = ("baselines/sft", "baselines/sft_continued", "baselines/sft_continued_2x", "iteration_0", "iteration_1")


def quickstart(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "COLUMNS": "100"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


def evaluations(out: Path) -> dict[str, dict[str, Any]]:
    return {row: json.loads((out / "spin" / row / "eval.json").read_text()) for row in ROWS}


def check_that_it_ended_well(ran: subprocess.CompletedProcess[str], out: Path, seconds: float) -> None:
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    table = ran.stdout[ran.stdout.index("== 5.") :]
    print(f"{seconds:.0f} s\n{table}")
    for name in ("SFT", "SPIN 0", "SPIN 1", "held-out data", "generate", "tensorboard --logdir"):
        assert name in table
    assert 0 < (out / "spin/report.png").stat().st_size < 150_000 and (out / "spin/report.md").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_word_problems(tmp_path: Path) -> None:
    out, started = tmp_path / "quick start", time.monotonic()  # a blank in the path, which scripts like to trip over
    ran = quickstart(f"OUT={out}", timeout=2300)
    check_that_it_ended_well(ran, out, time.monotonic() - started)
    measured = evaluations(out)
    careless = {row: values["patterns"]["careless"]["sampled"] for row, values in measured.items()}
    matched = {row: values["exact_match_sampled"] for row, values in measured.items()}
    # The claim: SFT has the habit of its pool (40%), self-play goes below the 20% of its own data, and sampled
    # answers get better.
    assert careless["baselines/sft"] > 0.3 and measured["baselines/sft"]["patterns"]["careless"]["real"] == 0
    assert careless["iteration_0"] < careless["baselines/sft"] - 0.1
    assert matched["iteration_0"] > matched["baselines/sft"] + 0.05
    assert all(values["num_prompts"] == 512 and values["exact_match_greedy"] > 0.5 for values in measured.values())

    before = (out / "spin/state.json").read_bytes()
    again = quickstart(f"OUT={out}", timeout=300)  # all done: only the report
    assert again.returncode == 0, again.stderr
    assert (out / "spin/state.json").read_bytes() == before and "train:1: already done" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_users_own_data(tmp_path: Path) -> None:
    data = os.environ.get("SPIN_GSM8K")
    if data is None:
        pytest.skip("SPIN_GSM8K is unset: set it to a question/answer file such as gsm8k's train.jsonl")
    out, started = tmp_path / "own", time.monotonic()
    ran = quickstart(f"DATA={data}", f"OUT={out}", timeout=2900)
    check_that_it_ended_well(ran, out, time.monotonic() - started)
    measured = evaluations(out)
    assert measured["iteration_0"]["opponent_accuracy"] is not None
    assert all(0 < values["nll_per_token"] < 6 and values["truncated_fraction"] < 1 for values in measured.values())
    # The rows held out by the two stages are the same, so none that is measured on was trained on.
    identities = {
        json.loads((out / stage / "data/manifest.json").read_text())["counts"]["held_out"] for stage in ("sft", "spin")
    }
    assert len(identities) == 1
    assert held_out(out / "spin") & trained(out / "sft") == set()


def trained(run_dir: Path) -> set[int]:
    """Row numbers that a run trained on."""
    from megatron_spin.data.rows import load_rows

    return {row.index for row in load_rows(run_dir / "data/train.arrow")}


def held_out(run_dir: Path) -> set[int]:
    from megatron_spin.data.rows import load_rows

    return {row.index for row in load_rows(run_dir / "data/eval.arrow")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["EVAL=x.jsonl"], "EVAL=x.jsonl goes together with DATA"),
        (["ENGINE=gpt"], "ENGINE=gpt is unknown"),
        (["SEED=one"], "SEED=one is not a number"),
        (["FILE=x"], "argument FILE=x is unknown"),
    ],
)
def test_mistakes_cost_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    ran = quickstart(*arguments, f"OUT={tmp_path / 'out'}", timeout=30)
    assert (
        ran.returncode == 2
        and ran.stderr.startswith("error: ")
        and len(ran.stderr.splitlines()) == 1
        and message in ran.stderr
    )
    assert not (tmp_path / "out").exists()


def test_it_says_what_it_takes() -> None:
    ran = quickstart("--help", timeout=30)
    assert ran.returncode == 0 and all(f"{name}=" in ran.stdout for name in ("DATA", "EVAL", "OUT", "ENGINE", "SEED"))
