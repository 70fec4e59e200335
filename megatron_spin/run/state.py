"""``state.json``: a run's records in one file, for scripts and people; nothing in the package reads it. No torch.

The package reads it for one purpose: a run directory of an earlier version has it in place of records.
"""

import dataclasses
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from megatron_spin.io import atomic_writer, json_text, read_json
from megatron_spin.run import records
from megatron_spin.run.records import PhaseRecord, kind_and_label

JUDGEMENT = ("outcome", "verdicts", "settings")
"""Details of a guard's record that ``guards`` holds."""
COMPLETE = "the last iteration that is complete"
"""Why a model is the result, unless an iteration was rolled back."""
RESULT = "result"
"""Detail of a record that has made a model the run's result."""
APART = ("verdicts", "settings", RESULT)
"""Details that are not repeated under ``phases``."""


def snapshot(all_records: list[PhaseRecord]) -> dict[str, Any]:
    """``phases``, ``machines``, ``guards`` and ``result`` of a run; the last three only if there are any."""
    state: dict[str, Any] = {"phases": {}}
    machines: list[str] = []
    guards: dict[str, Any] = {}
    for record in all_records:
        kind, label = kind_and_label(record.phase)
        if kind == "guard" and "verdicts" in record.details:
            guards[label] = {key: record.details[key] for key in JUDGEMENT}
        if record.finished is None:
            continue
        state["phases"][record.phase] = phase_entry(record)
        machines += [machine for machine in record.machines if machine not in machines]
    if machines:
        state["machines"] = machines
    if guards:
        state["guards"] = dict(sorted(guards.items(), key=lambda item: int(item[0])))
    result = latest_result(all_records)
    if result is not None:
        state[RESULT] = result
    return state


def phase_entry(record: PhaseRecord) -> dict[str, Any]:
    measured: dict[str, Any] = {"finished": record.finished, "seconds": record.seconds}
    if record.peak_memory_gib is not None:
        measured["peak_memory_gib"] = record.peak_memory_gib
    return measured | {key: value for key, value in record.details.items() if key not in APART}


def latest_result(all_records: list[PhaseRecord]) -> dict[str, Any] | None:
    """Which model the run has come to: what the latest iteration says that was completed or rolled back."""
    latest, result = -1, None
    for record in all_records:
        label = kind_and_label(record.phase)[1]
        if RESULT in record.details and int(label) > latest:
            latest, result = int(label), record.details[RESULT]
    return result


def write_snapshot(root: Path) -> None:
    """Writes ``state.json`` from the records.

    Two phases may finish at the same time. Each writes the file and then looks again: whoever writes last has seen the
    records of both, so the file ends complete.
    """
    path = root / "state.json"
    while True:
        # As text, since a verdict may hold NaN, which does not equal itself.
        text = json_text(snapshot(records.read_records(root)))
        if path.exists() and path.read_text() == text:
            return
        with atomic_writer(path) as file:
            file.write(text)


def records_of(state: dict[str, Any]) -> list[PhaseRecord]:
    """The records that an earlier version kept as a ``state.json``; their snapshot is that file again."""
    details: dict[str, dict[str, Any]] = {}
    measured: dict[str, dict[str, Any]] = {}
    for phase, entry in state["phases"].items():
        rest = dict(entry)
        measured[phase] = {key: rest.pop(key) for key in ("finished", "seconds", "peak_memory_gib") if key in rest}
        details[phase] = rest
    for iteration, judged in state.get("guards", {}).items():
        details[f"guard:{iteration}"] = {**details.get(f"guard:{iteration}", {}), **judged}
    if RESULT in state:
        details.setdefault(_phase_of_result(state), {})[RESULT] = state[RESULT]
        # The iterations before it are the result again if a rollback is lifted.
        for phase in state["phases"]:
            kind, label = kind_and_label(phase)
            if kind in ("rotate", "finish") and label.isdigit() and RESULT not in details[phase]:
                hf = f"iteration_{label}/hf"
                details[phase][RESULT] = {"hf": hf, "iteration": int(label), "why": COMPLETE}
    found = [
        PhaseRecord(phase, **{"finished": None, **measured.get(phase, {})}, details=of_phase)
        for phase, of_phase in details.items()
    ]
    found.sort(key=lambda record: record.order)
    return _with_machines(found, tuple(state.get("machines", ())))


def _phase_of_result(state: dict[str, Any]) -> str:
    """The phase that made a model the result: an iteration's end, or the guard that rolled the next one back."""
    iteration = state[RESULT]["iteration"]
    following = 0 if iteration is None else iteration + 1
    if state.get("guards", {}).get(str(following), {}).get("outcome") == "rollback":
        return f"guard:{following}"
    return f"rotate:{iteration}" if f"rotate:{iteration}" in state["phases"] else f"finish:{iteration}"


def _with_machines(found: list[PhaseRecord], machines: tuple[str, ...]) -> list[PhaseRecord]:
    """Which phase ran on which of several machines was not kept: the first finished record takes them all."""
    for index, record in enumerate(found):
        if record.finished is not None:
            found[index] = dataclasses.replace(record, machines=machines)
            break
    return found


def adopt(root: Path) -> None:
    """Gives a run directory of an earlier version, which has ``state.json`` and no records, its records.

    All of them appear at once. If several processes do this at the same time, one succeeds, with the same files.
    """
    folder, path = records.directory(root), root / "state.json"
    if folder.exists() or not path.exists():
        return
    draft = root / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        for record in records_of(read_json(path)):
            records.write_record(draft, record)
        os.rename(draft, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def all_records(root: Path) -> list[PhaseRecord]:
    """The records of a run, also of one that an earlier version made; changes nothing."""
    if not records.directory(root).exists() and (root / "state.json").exists():
        return records_of(read_json(root / "state.json"))
    return records.read_records(root)
