"""The report of a run, finished or not: the numbers of its files in table, Markdown, picture and README."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spin import machine
from megatron_spin.config import Config, from_dict
from megatron_spin.data.rows import Row, save_rows
from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json, write_json
from megatron_spin.report.plot import plot
from megatron_spin.report.results import compared_models, read_results
from megatron_spin.report.table import DASH, comparison, markdown, report_markdown, times
from megatron_spin.run.directory import RunDir
from scripts.update_readme import OVERVIEW, markers, replace_block, run_block
from tests.support.runs import REPOSITORY, environment
from tests.support.tiny import tiny_tokenizer, write_jsonl

BEGIN, END = markers("run")

STEPS = 8


def evaluation(*, matched: float, careless: float, opponent: float | None) -> dict[str, Any]:
    return {
        "model": "0" * 64,
        "num_prompts": 12,
        "nll_per_token": 0.5 - matched / 4,
        "nll_per_token_error": 0.01,
        "exact_match_sampled": matched,
        "exact_match_sampled_error": 0.02,
        "exact_match_greedy": matched + 0.1,
        "exact_match_greedy_error": 0.03,
        "mean_response_tokens": 20.5,
        "mean_real_tokens": 21.25,
        "truncated_fraction": 0.0,
        "identical_fraction": 0.25,
        "opponent_accuracy": opponent,
        "patterns": {"careless": {"sampled": careless, "real": 0.0, "exact_match_without": matched + 0.05}},
        "likelihood": {"mix": {"nll_per_token": 0.25, "nll_per_token_error": 0.01}},
        "samples": 3,
    }


def sample(index: int, label: str) -> dict[str, Any]:
    """A line of samples.jsonl: what the model ``label`` answered to prompt ``index``."""
    answers = {"greedy": f"greedy of {label}", "sampled": f"sampled of {label}\n#### {index}"}
    return {
        "index": index,
        "prompt": f"question {index}",
        "real": f"real {index}",
        **answers,
        "cut": ["sampled"] if label == "sft" else [],
    }


def metrics(path: Path, *, start: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    constant = {
        "real_logps": -3.0,
        "generated_logps": -4.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 9,
        "pairs": 4,
        "seconds": 1.0,
    }
    rows = [
        {
            "step": step,
            "loss": start - step / 100,
            "margin": step / 10,
            "accuracy": 0.5 + step / 20,
            "real_reward": step / 50,
            "generated_reward": -step / 40,
            **constant,
        }
        for step in range(1, STEPS + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(directory: Path, **evaluation_keys: Any) -> Config:
    return from_dict(
        {
            "name": "sample",
            "model": {"hf": str(directory / "model")},
            "data": {"path": "d.jsonl"},
            "spin": {"iterations": 2},
            "evaluation": {"path": "e.jsonl", "samples": 3, "patterns": {"careless": "w1 w2"}, **evaluation_keys},
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory with what a finished run leaves, as far as a report reads it."""
    config = config_of(tmp_path)
    run_dir = RunDir(tmp_path / "run")
    run_dir.open(config)
    tokenizer = tiny_tokenizer(tmp_path / "model")
    answers = ["w1 w2 w3"] + ["w3 w4"] * 3
    rows = [
        Row(i, [3], tokenizer(text, add_special_tokens=False)["input_ids"], False) for i, text in enumerate(answers)
    ]
    save_rows(run_dir.data / "train.arrow", rows)
    measured = [
        (run_dir.target(baseline="sft"), 0.6, 0.4, None),
        (run_dir.target(baseline="sft_continued"), 0.7, 0.25, None),
        (run_dir.target(baseline="sft_continued_2x"), 0.75, 0.24, None),
        (run_dir.target(iteration=0), 0.85, 0.05, 0.9),
        (run_dir.target(iteration=1), 0.9, 0.04, 0.7),
    ]
    for target, matched, careless, opponent in measured:
        write_json(target.eval, evaluation(matched=matched, careless=careless, opponent=opponent))
        write_jsonl(target.directory / "samples.jsonl", [sample(index, target.label) for index in (7, 3, 5)])
    for iteration in (0, 1):
        metrics(run_dir.target(iteration=iteration).metrics, start=0.69)
    run_dir.mark_done("prepare", seconds=1.0)
    for label, steps in (("0", 8), ("1", 8), ("sft_continued", 16), ("sft_continued_2x", 32)):
        run_dir.mark_done(f"train:{label}", seconds=10.0, steps=steps, examples=4)
    run_dir.mark_done("evaluate:0", seconds=5.0)
    # What each took is this process's own: numbers that a test can name, and none, as before it was recorded.
    for phase, memory in (("train:0", 1.5), ("train:1", 2.5), ("prepare", None)):
        record = run_dir.record(phase)
        assert record is not None
        run_dir.write_record(dataclasses.replace(record, peak_memory_gib=memory))
    return run_dir


def test_what_the_habit_leaves_and_more_files_have_columns_of_their_own(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    shutil.copytree(run.root, other.root)
    other.config.unlink()
    other.open(config_of(tmp_path, answer_pattern="(w1)", likelihood={"mix": "m.jsonl"}))
    table = comparison(read_results(other.root))
    assert table.titles[-2:] == ["right without careless", "NLL/token, mix"]
    cells = {row[0]: row[-2:] for row in table.rows}
    assert cells["SPIN 1"] == ["95.0%", "0.2500"] and cells["held-out data"] == [DASH, DASH]
    assert all(len(row) == len(table.titles) for row in table.rows)
    assert len(comparison(read_results(other.root), narrow=True).titles) == len(table.titles) - 2


def test_rows_in_the_order_of_the_comparison(run: RunDir) -> None:
    table = comparison(read_results(run.root))
    assert [row[0] for row in table.rows] == [
        "SFT",
        "SFT +16 steps",
        "SFT +32 steps",
        "SPIN 0",
        "SPIN 1",
        "held-out data",
        "training data",
    ]
    assert all(len(row) == len(table.titles) for row in table.rows)


def test_cells_are_the_files_numbers(run: RunDir) -> None:
    table = comparison(read_results(run.root))
    cells = dict(zip(table.titles, next(row for row in table.rows if row[0] == "SPIN 0"), strict=True))
    assert cells["exact match, sampled"] == "85.0% ± 2.0%" and cells["greedy"] == "95.0% ± 3.0%"
    assert cells["beats opponent"] == "90.0%" and cells["careless"] == "5.0%" and cells["tokens"] == "20.5"
    narrow = comparison(read_results(run.root), narrow=True)
    assert "85.0%" in narrow.rows[3] and not any("±" in cell for row in narrow.rows for cell in row)


def test_the_datas_own_share_stands_beside(run: RunDir) -> None:
    results = read_results(run.root)
    assert results.data_patterns == {"careless": 0.25} and results.prompts == 4
    rows = {row[0]: row for row in comparison(results).rows}
    assert (
        rows["training data"][-1] == "25.0%"
        and rows["held-out data"][-1] == "0.0%"
        and rows["held-out data"][-2] == "21.2"
    )


def test_numbers_that_do_not_apply_are_dashes(run: RunDir) -> None:
    table = comparison(read_results(run.root))
    rows = {row[0]: dict(zip(table.titles, row, strict=True)) for row in table.rows}
    assert rows["SFT"]["beats opponent"] == "–"  # noqa: RUF001


def test_times_are_summed_by_kind(run: RunDir) -> None:
    rows = {row[0]: row[1:] for row in times(read_results(run.root)).rows}
    assert rows["train"] == ["2", "20.0", "43%", "2.5"] and rows["train, baselines"][:3] == ["2", "20.0", "43%"]
    assert rows["prepare"] == ["1", "1.0", "2%", "–"]  # noqa: RUF001
    assert rows["all"][:3] == ["", "46.0", ""] and float(rows["all"][3]) >= 2.5


def test_as_many_steps_at_another_rate_has_another_name(run: RunDir, tmp_path: Path) -> None:
    baselines = {
        "plain": {},
        "high": {"learning_rate": 1e-4},
        "low": {"learning_rate": 1e-6},
        "long": {"learning_rate": 1e-4},
    }
    raw = dataclasses.asdict(config_of(tmp_path))
    for label, steps in (("plain", 24), ("high", 24), ("low", 24), ("long", 48)):
        run.mark_done(f"train:{label}", seconds=1.0, steps=steps, examples=4)
    names = [name for name, _ in compared_models(from_dict({**raw, "baselines": baselines}), run)]
    assert names == [
        "SFT",
        "SFT +24 steps",
        "SFT +24 steps, lr 0.0001",
        "SFT +24 steps, lr 1e-06",
        "SFT +48 steps",
        "SPIN 0",
        "SPIN 1",
    ]


def test_memory_is_recorded_in_gib(tmp_path: Path) -> None:
    """Of a child that has ended, too: vLLM's process is the largest of a generation."""
    script = "import json, subprocess, sys; from pathlib import Path; "
    script += "from megatron_spin.run.directory import RunDir; run = RunDir(Path(sys.argv[1])); "
    child = "x = bytearray(300 * 2**20); x[::4096] = b'1' * len(x[::4096])"
    script += f"subprocess.run([sys.executable, '-c', {child!r}]); "
    # Behind a shell: what a process counts as its own begins with the memory of the one that it was forked from.
    command = [
        "bash",
        "-c",
        '"$@"; exit',
        "bash",
        sys.executable,
        "-c",
        script + "run.mark_done('a', seconds=1)",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, env=environment(), timeout=60)
    assert 0.3 < read_json(tmp_path / "state.json")["phases"]["a"]["peak_memory_gib"] < 0.5


def test_markdown_is_a_table(run: RunDir) -> None:
    lines = markdown(comparison(read_results(run.root))).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("|-:")
    text = report_markdown(read_results(run.root), picture=Path("x/report.png"))
    assert "![training curves and results](report.png)" in text and "Where the time went" in text


def test_the_picture_is_small_and_the_same_each_time(run: RunDir, tmp_path: Path) -> None:
    results = read_results(run.root)
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        plot(results, picture)
    first, second = (picture.read_bytes() for picture in pictures)
    assert first.startswith(b"\x89PNG") and first == second and len(first) < 150_000


@pytest.mark.parametrize(
    "left", [["iteration_1"], ["iteration_1", "baselines"], ["baselines", "iteration_0/eval.json", "iteration_1"]]
)
def test_an_unfinished_run_shows_what_there_is(run: RunDir, tmp_path: Path, left: list[str]) -> None:
    import shutil

    for name in left:
        path = run.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    results = read_results(run.root)
    plot(results, tmp_path / "picture.png")
    assert report_markdown(results, picture=tmp_path / "picture.png")
    with pytest.raises(RunDirError, match="has not finished"):
        run_block(results, picture=tmp_path / "picture.png", page=tmp_path / "README.md")


def test_half_a_line_of_metrics_is_left_out(run: RunDir) -> None:
    path = run.target(iteration=1).metrics
    path.write_text(path.read_text()[:-20])
    assert len(read_results(run.root).curves[1]) == STEPS - 1


def test_without_patterns_or_matches_other_panels_stand_in(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "run2").mkdir()
    other = RunDir(tmp_path / "run2")
    other.open(config_of(tmp_path, patterns={}))
    values = evaluation(matched=0.0, careless=0.0, opponent=None)
    write_json(other.target(baseline="sft").eval, {**values, "exact_match_greedy": 0.0, "patterns": {}})
    results = read_results(other.root)
    plot(results, tmp_path / "p.png")
    assert "careless" not in comparison(results).titles


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is not a run directory"):
        read_results(tmp_path)
    RunDir(tmp_path / "empty").open(config_of(tmp_path))
    with pytest.raises(RunDirError, match="neither an eval"):
        read_results(tmp_path / "empty")


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / name), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(COLUMNS="80"), timeout=120, check=False
    )


def test_the_tool_fits_a_terminal_and_updates_a_readme(run: RunDir, tmp_path: Path) -> None:
    shown = tool("tools/report.py", run.root)
    assert shown.returncode == 0, shown.stderr
    assert "…" not in shown.stdout and "SPIN 1" in shown.stdout and "tensorboard --logdir" in shown.stdout
    assert (run.root / "report.png").stat().st_size < 150_000 and "SPIN 1" in (run.root / "report.md").read_text()
    assert "samples.md" in shown.stdout and (run.root / "samples.md").read_text().count("## Prompt") == 3
    greedy = tool("tools/report.py", run.root, "--samples", 1, "--greedy")
    assert greedy.returncode == 0 and (run.root / "samples.md").read_text().count("greedy of 1") == 1
    negative = tool("tools/report.py", run.root, "--samples", -1)
    assert (
        negative.returncode == 2
        and negative.stderr.count("\n") == 1
        and "--samples -1 must be at least 0" in negative.stderr
    )

    refused = tool("tools/report.py", tmp_path / "nowhere")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "is not a run directory" in refused.stderr


def test_a_readme_and_a_page_are_updated(run: RunDir, tmp_path: Path) -> None:
    assert tool("tools/report.py", run.root).returncode == 0
    readme, page, picture = tmp_path / "README.md", tmp_path / "docs/page.md", tmp_path / "docs/run.png"
    page.parent.mkdir()
    for path in (readme, page):
        path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # again: the same
        updated = tool("scripts/update_readme.py", run.root, "--readme", readme, "--page", page, "--picture", picture)
        assert updated.returncode == 0, updated.stderr
        for path in (readme, page):
            text = path.read_text()
            assert text.startswith(f"before\n{BEGIN}\n")
            assert text.endswith(f"{END}\nafter\n")
            assert "old" not in text
            assert "| SPIN 1 | 90.0% ± 2.0% |" in text
            assert "cores" in text
            assert "torch 2" in text
            assert str(tmp_path) not in text
        assert "(docs/run.png)" in readme.read_text()
        assert "(run.png)" in page.read_text()
    assert picture.read_bytes() == (run.root / "report.png").read_bytes()


def test_the_readme_has_the_first_columns_and_the_page_all(run: RunDir, tmp_path: Path) -> None:
    results = read_results(run.root)
    everything = comparison(results).titles
    short = run_block(results, picture=tmp_path / "run.png", page=tmp_path / "README.md", short=True)
    titles = [cell.strip() for cell in short.splitlines()[0].strip("|").split("|")]
    assert titles == ["", *OVERVIEW, "careless"]
    assert len(titles) <= 6
    assert len(everything) > 6
    # Every row has the cells that the same row has in the whole table.
    whole = {row[0]: dict(zip(everything, row, strict=True)) for row in comparison(results).rows}
    for line in short.splitlines()[2:]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells == [whole[cells[0]][title] for title in titles]


@pytest.mark.parametrize("text", ["no markers", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_the_markers(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(RunDirError, match="once each"):
        replace_block(tmp_path / "README.md", "x")


def test_a_run_names_each_machine_it_ran_on_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path)
    for phase, name in (("prepare", "here"), ("import", "here"), ("train:0", "there")):
        monkeypatch.setattr(machine, "machine_line", lambda name=name: name)
        run_dir.mark_done(phase, seconds=1.0)
    assert read_json(run_dir.state)["machines"] == ["here", "there"]


def test_the_machine_has_a_name() -> None:
    assert "cores of" in machine.machine_name() and "GiB" in machine.machine_name()
