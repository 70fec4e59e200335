"""``samples.jsonl``: one line per prompt, the same when read."""

from pathlib import Path

import pytest

from megatron_spin.errors import RunDirError
from megatron_spin.evaluation.samples import PromptAnswers, read_samples, write_samples

FIRST = PromptAnswers(
    7, "question", "real\u2028answer", "greedy\nanswer", "sampled", cut=("sampled",), opponent="other"
)
SECOND = PromptAnswers(3, "question", "real", "greedy", "sampled", cut=(), rejected="worse")
THIRD = PromptAnswers(5, "question", "real", "greedy", "sampled", cut=())


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_samples(path, [FIRST, SECOND, THIRD])
    assert read_samples(path) == {7: FIRST, 3: SECOND, 5: THIRD}
    lines = path.read_text().split("\n")
    assert lines[1] == (
        '{"index": 3, "prompt": "question", "real": "real", "greedy": "greedy", "sampled": "sampled", '
        '"rejected": "worse", "cut": []}'
    )
    assert list(FIRST.to_json()) == ["index", "prompt", "real", "greedy", "sampled", "opponent", "cut"]


def test_half_a_line_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_samples(path, [FIRST, SECOND])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RunDirError, match="is damaged"):
        read_samples(path)
