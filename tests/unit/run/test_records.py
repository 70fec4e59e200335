"""The records of phases, and state.json, which is made from them."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spin.config import from_dict
from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json, write_json
from megatron_spin.report.results import compared_models
from megatron_spin.run.directory import RunDir
from megatron_spin.run.records import PhaseRecord, read_record, read_records
from megatron_spin.run.result import read_result
from megatron_spin.run.state import records_of, snapshot
from tests.support.runs import environment

SETTINGS = {"nll_rise": {"action": "warn", "threshold": 0.05}}
VERDICTS = [{"guard": "nll_rise", "action": "warn", "tripped": False, "value": -0.1, "said": "it fell"}]
EARLIER: dict[str, Any] = {
    "phases": {
        "prepare": {"finished": "2026-11-25T10:00:00+00:00", "seconds": 1.5, "peak_memory_gib": 0.4, "prompts": 8},
        "import": {"finished": "2026-11-25T10:00:01+00:00", "seconds": 2.0, "peak_memory_gib": 0.5, "identity": "a"},
        "generate:0": {
            "finished": "2026-11-25T10:00:01+00:00",
            "seconds": 1.0,
            "peak_memory_gib": 0.5,
            "opponent": "a",
        },
        "train:0": {"finished": "2026-11-25T10:00:02+00:00", "seconds": 9.0, "steps": 5},
        "export:0": {"finished": "2026-11-25T10:00:03+00:00", "seconds": 3.0, "peak_memory_gib": 0.5, "identity": "b"},
        "guard:0": {"finished": "2026-11-25T10:00:03+00:00", "seconds": 0.1, "peak_memory_gib": 0.1, "outcome": "pass"},
        "rotate:0": {"finished": "2026-11-25T10:00:03+00:00", "seconds": 0.1, "peak_memory_gib": 0.1},
        "train:more": {"finished": "2026-11-25T10:00:03+00:00", "seconds": 4.0, "peak_memory_gib": 0.6, "steps": 10},
    },
    "machines": ["here", "there"],
    "guards": {"0": {"outcome": "pass", "verdicts": VERDICTS, "settings": SETTINGS}},
    "result": {"hf": "iteration_0/hf", "iteration": 0, "why": "the last iteration that is complete"},
}
"""A state.json as it was when it was the only record; from its baseline's training on, later ones had no memory."""

STOPPED = {**EARLIER["guards"]["0"], "outcome": "stop"}
ROLLED_BACK = {**EARLIER["guards"]["0"], "outcome": "rollback"}


def without(*phases: str) -> dict[str, Any]:
    return {name: entry for name, entry in EARLIER["phases"].items() if name not in phases}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(EARLIER, id="complete"),
        pytest.param({"phases": {}}, id="nothing done"),
        pytest.param({"phases": without("guard:0", "rotate:0"), "machines": ["here"]}, id="not judged"),
        pytest.param(
            {"phases": without("guard:0", "rotate:0"), "machines": ["here"], "guards": {"0": STOPPED}}, id="stopped"
        ),
        pytest.param(
            {
                "phases": {**without("rotate:0"), "guard:0": {**EARLIER["phases"]["guard:0"], "outcome": "rollback"}},
                "machines": ["here"],
                "guards": {"0": ROLLED_BACK},
                "result": {"hf": "/models/start", "iteration": None, "why": "iteration 0 was rolled back (nll_rise)"},
            },
            id="rolled back",
        ),
        pytest.param(
            {
                **EARLIER,
                "guards": {**EARLIER["guards"], "1": ROLLED_BACK},
                "result": {**EARLIER["result"], "why": "iteration 1 was rolled back (nll_rise)"},
            },
            id="second iteration rolled back, not yet marked",
        ),
    ],
)
def test_a_state_of_an_earlier_version_is_the_snapshot_of_its_records(state: dict[str, Any]) -> None:
    assert snapshot(records_of(state)) == state
    assert list(snapshot(records_of(state))["phases"]) == list(state["phases"])


@pytest.fixture
def earlier(tmp_path: Path) -> RunDir:
    """A run directory that an earlier version left: state.json and no records."""
    run_dir = RunDir(tmp_path / "run")
    write_json(run_dir.state, EARLIER)
    return run_dir


def test_reading_a_run_of_an_earlier_version_changes_nothing(earlier: RunDir) -> None:
    config = from_dict({"name": "n", "model": {"hf": "m"}, "data": {"path": "d"}, "baselines": {"more": {"steps": 10}}})
    assert earlier.is_done("train:0")
    assert not earlier.is_done("evaluate:0")
    assert [name for name, _ in compared_models(config, earlier)][:2] == ["SFT", "SFT +10 steps"]
    result = read_result(earlier)
    assert result is not None
    assert result.iteration == 0
    assert [path.name for path in earlier.root.iterdir()] == ["state.json"]


def test_opened_for_writing_it_gets_its_records(earlier: RunDir) -> None:
    before = earlier.records()
    earlier.open(from_dict({"name": "n", "model": {"hf": "m"}, "data": {"path": "d"}}))
    assert read_records(earlier.root) == before
    assert sorted(path.name for path in (earlier.root / "phases").iterdir()) == sorted(
        f"{phase.replace(':', '_')}.json" for phase in EARLIER["phases"]
    )
    assert read_json(earlier.state) == EARLIER


def test_its_next_phase_adds_to_what_was_done(earlier: RunDir) -> None:
    earlier.mark_done("evaluate:0", seconds=1.0)
    state = read_json(earlier.state)
    assert list(state["phases"]) == [*EARLIER["phases"], "evaluate:0"]
    assert state["machines"][:2] == ["here", "there"]
    assert state["guards"] == EARLIER["guards"]
    assert not list(earlier.root.glob(".*"))


def test_a_record_holds_what_it_was_given(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.mark_done("train:0", seconds=1.23456, steps=5)
    raw = json.loads((tmp_path / "phases/train_0.json").read_text())
    assert raw.keys() == {"phase", "finished", "seconds", "peak_memory_gib", "machines", "details"}
    assert raw["details"] == {"steps": 5}
    record = read_record(tmp_path, "train:0")
    assert record == PhaseRecord(**{**raw, "machines": tuple(raw["machines"])})
    assert record is not None and record.seconds == 1.235


def test_a_phase_that_must_run_again_is_not_in_the_state(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.write_record(PhaseRecord.now("guard:0", seconds=1.0, details=dict(STOPPED), is_done=False))
    assert not run_dir.is_done("guard:0")
    assert read_json(run_dir.state) == {"phases": {}, "guards": {"0": STOPPED}}


def test_a_verdict_may_be_no_number(tmp_path: Path) -> None:
    verdicts = [{**VERDICTS[0], "value": math.nan}]
    RunDir(tmp_path).mark_done("guard:0", seconds=1.0, outcome="warn", verdicts=verdicts, settings=SETTINGS)
    assert math.isnan(read_json(tmp_path / "state.json")["guards"]["0"]["verdicts"][0]["value"])


def test_phases_are_in_the_order_in_which_they_finished(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    names = ["prepare", "import", "evaluate:sft", "train:0", "guard:0", "rotate:0", "generate:1", "finish:more"]
    for name in reversed(names):
        record = PhaseRecord.now(name, seconds=1.0, details={})
        run_dir.write_record(dataclasses.replace(record, finished="2026-11-25T10:00:00+00:00"))
    assert list(read_json(run_dir.state)["phases"]) == names  # within one second, by the plan
    last = run_dir.record("prepare")
    assert last is not None
    run_dir.write_record(dataclasses.replace(last, finished="2026-11-25T10:00:01+00:00"))
    assert list(read_json(run_dir.state)["phases"]) == [*names[1:], "prepare"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.mark_done("train:0", seconds=1.0)
    (tmp_path / "phases/train_0.json").write_text("{")
    with pytest.raises(RunDirError, match=r"train_0\.json is not JSON"):
        run_dir.is_done("train:0")


@pytest.mark.parametrize("text", ["[]", "{}", '{"phase": "train:0", "finished": null, "newer": 1}'])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.mark_done("train:0", seconds=1.0)
    (tmp_path / "phases/train_0.json").write_text(text)
    with pytest.raises(RunDirError, match=r"train_0\.json is no record of a phase"):
        run_dir.is_done("train:0")


def test_a_lifted_rollback_of_an_earlier_version_leaves_the_iteration_before() -> None:
    """The guards judge iteration 1 again, and it is not rolled back: the result is iteration 0, as before."""
    state = {
        **EARLIER,
        "guards": {**EARLIER["guards"], "1": ROLLED_BACK},
        "result": {**EARLIER["result"], "why": "iteration 1 was rolled back (nll_rise)"},
    }
    records = [record for record in records_of(state) if record.phase != "guard:1"]
    assert snapshot(records)["result"] == EARLIER["result"]


FINISH_MANY = """
import sys
from pathlib import Path
from megatron_spin.run.directory import RunDir

for number in range(int(sys.argv[2]), int(sys.argv[2]) + 20):
    RunDir(Path(sys.argv[1])).mark_done(f"train:{number}", seconds=1.0)
"""


@pytest.mark.parametrize("state", [None, EARLIER], ids=["new run", "run of an earlier version"])
def test_phases_that_finish_at_the_same_time_leave_the_whole_state(
    tmp_path: Path, state: dict[str, Any] | None
) -> None:
    if state is not None:
        write_json(tmp_path / "state.json", state)
    processes = []
    for start in range(1, 81, 20):
        command = [sys.executable, "-c", FINISH_MANY, str(tmp_path), str(start)]
        processes.append(subprocess.Popen(command, env=environment()))
    assert [process.wait(120) for process in processes] == [0] * 4
    expected = {f"train:{number}" for number in range(1, 81)} | set((state or {"phases": {}})["phases"])
    assert set(read_json(tmp_path / "state.json")["phases"]) == expected
    assert snapshot(read_records(tmp_path)) == read_json(tmp_path / "state.json")
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
