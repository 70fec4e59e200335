"""What a run measured, read from its directory: evaluations, training curves, times, and the data's own share of each pattern. No torch."""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_spin.config import Config, load_config
from megatron_spin.data.rows import load_rows
from megatron_spin.data.templates import load_tokenizer
from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json
from megatron_spin.phases.guard import model_name
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.spin.objective import Objective, num_iterations, objective_class


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One model of the comparison."""

    name: str
    """As people say it: ``SFT``, ``SFT +92 steps`` (continued on the same data), ``SPIN 0``, ``DPO``."""
    iteration: int | None
    """The self-play iteration; None for a baseline."""
    values: dict[str, Any]
    """What its ``eval.json`` holds."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """Wall time of one phase, or of phases of one kind."""

    name: str
    seconds: float
    count: int = 1
    memory: float | None = None
    """Largest resident memory of a process that it saw, in GiB; None where it was not recorded."""


@dataclasses.dataclass(frozen=True)
class Results:
    """A run as a report shows it."""

    root: Path
    config: Config
    evaluated: list[Evaluated]
    """In the order of the comparison: the model as it came, continued SFT, then the iterations; only those that have been measured."""
    curves: list[list[dict[str, Any]]]
    """``metrics.jsonl`` of each iteration."""
    phases: list[Phase]
    """In the order in which they finished."""
    data_patterns: dict[str, float]
    """Share of the training data's real answers that each of ``evaluation.patterns`` finds."""
    prompts: int
    """Prompts that were trained on."""
    notes: list[str]
    """What guards that tripped had to say, in the order of the iterations, and which model is the result."""
    finished: str
    """When the last phase finished, ISO 8601 in UTC."""
    machines: list[str]
    """What the phases ran on, with versions: more than one if the run moved or was updated."""

    @property
    def seconds(self) -> float:
        """Wall time of all phases together."""
        return sum(phase.seconds for phase in self.phases)

    def by_kind(self) -> list[Phase]:
        """The phases summed by kind (``generate``, ``train`` ...), the slowest first; the baselines' count as kinds of their own."""
        kinds: dict[str, list[Phase]] = collections.defaultdict(list)
        for phase in self.phases:
            kind, _, label = phase.name.partition(":")
            kinds[f"{kind}, baselines" if label in self.config.baselines else kind].append(phase)
        sums = [
            Phase(
                kind,
                sum(phase.seconds for phase in phases),
                len(phases),
                max((phase.memory for phase in phases if phase.memory), default=None),
            )
            for kind, phases in kinds.items()
        ]
        return sorted(sums, key=lambda phase: -phase.seconds)


def read_results(root: Path) -> Results:
    """Reads the run directory ``root``, finished or not.

    Raises:
        RunDirError: it is no run directory, nothing in it has been measured yet, or one of its files is damaged.
    """
    run_dir = RunDir(root)
    if not run_dir.config.is_file():
        raise RunDirError(
            f"{root} is not a run directory (it has no config.yaml): give the --run-dir of a run, for example runs/NAME"
        )
    config = load_config(run_dir.config)
    state = read_json(run_dir.state) if run_dir.state.exists() else {"phases": {}}
    phases = state["phases"]
    evaluated = [
        Evaluated(name, target.iteration, read_json(target.eval))
        for name, target in players(config, run_dir)
        if target.eval.exists()
    ]
    curves = [_read_metrics(run_dir.target(iteration=t).metrics) for t in range(num_iterations(config))]
    curves = [curve for curve in curves if curve]
    if not evaluated and not curves:
        raise RunDirError(f"{root} has neither an eval.json nor a metrics.jsonl yet: run tools/spin.sh first")
    patterns, prompts = _data_patterns(config, run_dir)
    return Results(
        root=root,
        config=config,
        evaluated=evaluated,
        curves=curves,
        phases=[
            Phase(name, float(phase["seconds"]), memory=phase.get("peak_memory_gib")) for name, phase in phases.items()
        ],
        data_patterns=patterns,
        prompts=prompts,
        notes=_notes(state, objective_class(config)),
        finished=max((phase["finished"] for phase in phases.values()), default=""),
        machines=state.get("machines", []),
    )


def players(config: Config, run_dir: RunDir) -> list[tuple[str, Target]]:
    """Name and place of each model of the comparison, measured or not: the model as it came, continued SFT, then the iterations."""
    phases = read_json(run_dir.state)["phases"] if run_dir.state.exists() else {}
    steps = {name.partition(":")[2]: phase["steps"] for name, phase in phases.items() if "steps" in phase}
    objective = objective_class(config)
    baselines = config.baselines if objective.compares() else {}
    continued = {name: f"SFT +{steps[name]} steps" if name in steps else name for name in baselines}
    times = collections.Counter(continued.values())
    for name, baseline in baselines.items():
        # As many steps at another rate is another model.
        if times[continued[name]] > 1 and baseline.learning_rate is not None:
            continued[name] += f", lr {baseline.learning_rate:g}"
    targets = [(objective.start_label, run_dir.target(baseline="sft"))]
    targets += [(label, run_dir.target(baseline=name)) for name, label in continued.items()]
    return targets + [(objective.title(t), run_dir.target(iteration=t)) for t in range(num_iterations(config))]


def _notes(state: dict[str, Any], objective: type[Objective]) -> list[str]:
    notes = []
    for iteration, judged in sorted(state.get("guards", {}).items(), key=lambda item: int(item[0])):
        for verdict in judged["verdicts"]:
            if verdict["tripped"]:
                notes.append(
                    f"Guard {verdict['guard']} ({verdict['action']}) after {objective.title(int(iteration))}: {verdict['said']}."
                )
    if (result := state.get("result")) is not None:
        notes.append(f"The result is {model_name(result)} ({result['why']}).")
    return notes


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; one that is still being written may end in half a line, which is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _data_patterns(config: Config, run_dir: RunDir) -> tuple[dict[str, float], int]:
    """Share of the training answers that each pattern finds, and how many prompts there are."""
    path = run_dir.data / "train.parquet"
    if not path.exists():
        return {}, 0
    rows = load_rows(path)
    if not config.evaluation.patterns:
        return {}, len(rows)
    decode = _decoder(Path(config.model.hf), run_dir)
    if decode is None:
        return {}, len(rows)
    texts = decode([row.real_ids for row in rows])
    return {
        name: sum(re.search(pattern, text) is not None for text in texts) / len(texts)
        for name, pattern in config.evaluation.patterns.items()
    }, len(rows)


def _decoder(hf: Path, run_dir: RunDir) -> Callable[[Sequence[Sequence[int]]], list[str]] | None:
    """Ids to texts without special tokens; by the copy of the tokenizer in the run where the model itself has gone."""
    for directory in (hf, run_dir.base / "hf"):
        if (directory / "tokenizer_config.json").exists():
            tokenizer = load_tokenizer(directory)
            return lambda batch: [
                str(text) for text in tokenizer.batch_decode([list(ids) for ids in batch], skip_special_tokens=True)
            ]
    return None
