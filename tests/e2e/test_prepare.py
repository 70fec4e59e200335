"""tools/prepare.py: what it writes, and one clear line with status 2 for input that is wrong."""

from pathlib import Path

import yaml

from megatron_spin.data.rows import load_rows
from tests.support.runs import run_tool
from tests.support.tiny import sft_rows, tiny_model, write_jsonl


def test_command_line(tmp_path: Path) -> None:
    """A malformed line gives one line and status 2 and leaves nothing; the corrected file works; a rerun is done."""
    data, config, run = tmp_path / "d.jsonl", tmp_path / "c.yaml", tmp_path / "run"
    tiny_model(tmp_path / "model")
    raw = {
        "name": "t",
        "model": {"hf": str(tmp_path / "model")},
        "data": {"path": str(data), "template": "none", "max_length": 32},
        "generation": {"max_new_tokens": 6},
        "evaluation": {"held_out_fraction": 0.2, "num_prompts": None},
    }
    write_jsonl(data, sft_rows(10))
    good = data.read_text()
    data.write_text(good + '{"prompt": "w1", "response"\n')
    config.write_text(yaml.safe_dump(raw))
    arguments = (config, "--run-dir", run)
    result = run_tool("prepare.py", *arguments, check=False)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert f"error: {data} line 11 is not JSON" in result.stderr
    assert not run.exists()
    data.write_text(good)
    result = run_tool("prepare.py", *arguments)
    assert "prompts to train on" in result.stdout
    assert "tokenize d.jsonl: 10 rows in 0:0" in result.stdout  # there is no terminal for a bar
    assert "\r" not in result.stdout
    assert not result.stderr
    assert len(result.stdout.splitlines()) < 20
    assert len(load_rows(run / "data" / "train.arrow")) == 8
    assert len(load_rows(run / "data" / "eval.arrow")) == 2
    assert "already done" in run_tool("prepare.py", *arguments).stdout
