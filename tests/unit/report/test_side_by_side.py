"""samples.md: the same prompts answered by every model, told apart, in the comparison's order, as plain text."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import from_dict
from megatron_spin.errors import RunDirError
from megatron_spin.report.side_by_side import WIDTH, read_shown, samples_markdown
from megatron_spin.run.directory import RunDir
from tests.support.tiny import write_jsonl

MODELS = ("baselines/sft", "baselines/more", "iteration_0", "iteration_1")


def row(index: int, model: str, **changes: Any) -> dict[str, Any]:
    answers = {
        "greedy": f"greedy {model}",
        "sampled": f"sampled {model}",
        "cut": ["sampled"] if model == "baselines/sft" else [],
    }
    return {"index": index, "prompt": f"prompt {index}", "real": f"real {index}", **answers, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    raw = {
        "name": "n",
        "model": {"hf": "m"},
        "data": {"path": "d"},
        "spin": {"iterations": 2},
        "baselines": {"more": {}},
    }
    RunDir(tmp_path / "run").open(from_dict(raw))
    for model in MODELS:
        write_jsonl(tmp_path / "run" / model / "samples.jsonl", [row(index, model) for index in (9, 2, 4)])
    return tmp_path / "run"


def test_everyone_answers_the_same_prompt(run: Path) -> None:
    shown = read_shown(run, count=2, decoding="sampled")
    assert [(item.index, item.prompt) for item in shown] == [(9, "prompt 9"), (2, "prompt 2")]
    assert shown[0].answers == [
        ("real", "real 9", False),
        ("SFT", "sampled baselines/sft", True),
        ("more", "sampled baselines/more", False),
        ("SPIN 0", "sampled iteration_0", False),
        ("SPIN 1", "sampled iteration_1", False),
    ]
    greedy = read_shown(run, count=9, decoding="greedy")
    assert len(greedy) == 3
    assert greedy[0].answers[1] == ("SFT", "greedy baselines/sft", False)


def test_an_unfinished_run_has_fewer_models_and_an_old_one_knows_no_cuts(run: Path) -> None:
    for model in ("iteration_1", "baselines/more"):
        (run / model / "samples.jsonl").unlink()
    old = row(2, "baselines/sft")
    del old["cut"]
    write_jsonl(run / "baselines/sft/samples.jsonl", [old])
    (shown,) = read_shown(run, count=5, decoding="sampled")
    assert [answer.name for answer in shown.answers] == ["real", "SFT", "SPIN 0"]
    assert shown.index == 2
    assert not any(answer.cut for answer in shown.answers)


def test_text_stays_text(run: Path) -> None:
    """Nothing in an answer is Markdown: heading and fence stay inside the block, and wrapping loses no word."""
    text = "#### 18 **bold**\n\n````python\nx = 1\n````\n  " + "word " * 60
    write_jsonl(run / "iteration_0/samples.jsonl", [row(9, "iteration_0", sampled=text)])
    page = samples_markdown(read_shown(run, count=1, decoding="sampled"), name="n", decoding="sampled")
    lines = page.splitlines()
    fence = "`" * 5
    start = lines.index(f"{fence}text")
    end = lines.index(fence)
    inside = lines[start + 1 : end]
    assert inside[:2] == ["#### 18 **bold**", ""]
    assert "````python" in inside
    assert max(map(len, inside)) <= WIDTH
    assert " ".join(inside).split() == text.split()
    assert "  word word" in "\n".join(inside)
    assert [line for line in lines[:start] if line.startswith("**")] == [
        "**real**",
        "**SFT** (cut)",
        "**more**",
        "**SPIN 0**",
    ]
    assert "one sample at temperature 1" in page
    assert "SFT is the model that the run began with" in page
    assert page.endswith("\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(9, "x", prompt="another")], "SPIN 0 answered another prompt 9"),
        ([row(1, "x")], "no prompt in common"),
        ([{"prompt": "p"}], "is damaged .KeyError"),
    ],
)
def test_files_that_do_not_belong_together(run: Path, rows: list[dict[str, Any]], message: str) -> None:
    write_jsonl(run / "iteration_0/samples.jsonl", rows)
    with pytest.raises(RunDirError, match=message):
        read_shown(run, count=3, decoding="sampled")


def test_half_a_line_and_no_run(run: Path, tmp_path: Path) -> None:
    path = run / "iteration_0/samples.jsonl"
    path.write_text(json.dumps(row(9, "x"))[:-5])
    with pytest.raises(RunDirError, match="is damaged"):
        read_shown(run, count=3, decoding="sampled")
    for model in MODELS:
        (run / model / "samples.jsonl").unlink()
    with pytest.raises(RunDirError, match=r"has no samples.jsonl yet"):
        read_shown(run, count=3, decoding="sampled")
    with pytest.raises(RunDirError, match="is not a run directory"):
        read_shown(tmp_path, count=3, decoding="sampled")
