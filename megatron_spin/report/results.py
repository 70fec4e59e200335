"""What a run measured, read from its directory. No torch.

Evaluations, training curves, times, and how often the training data themselves show each pattern.
"""

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_spin.config import Config, load_config
from megatron_spin.data.rows import TRAIN, load_rows
from megatron_spin.data.table import is_written
from megatron_spin.data.templates import decode, load_tokenizer
from megatron_spin.errors import RunDirError
from megatron_spin.evaluation.record import Evaluation
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.run.result import Result
from megatron_spin.run.state import snapshot
from megatron_spin.run.step_metrics import StepMetrics, load_step_metrics
from megatron_spin.spin.objective import Objective, num_iterations, objective_class


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One model of the comparison."""

    name: str
    """Display name: ``SFT``, ``SFT +92 steps`` (continued on the same data), ``SPIN 0``, ``DPO``."""
    iteration: int | None
    """The self-play iteration; None for a baseline."""
    evaluation: Evaluation

    def pattern_share(self, name: str) -> float | None:
        """Share of its sampled answers in which the pattern ``name`` is found; None if it was not looked for."""
        measures = self.evaluation.answers.patterns.get(name)
        return None if measures is None else measures.sampled


@dataclasses.dataclass(frozen=True)
class Phase:
    """Wall time of one phase, or of phases of one kind."""

    name: str
    seconds: float
    count: int = 1
    memory: float | None = None
    """Largest resident memory of a process that it saw, in GiB; None if it was not recorded."""


@dataclasses.dataclass(frozen=True)
class Results:
    """A run as a report shows it."""

    root: Path
    config: Config
    evaluated: list[Evaluated]
    """The measured models in the order of the comparison: the starting model, continued SFT, then the iterations."""
    curves: list[list[StepMetrics]]
    """The steps of each iteration."""
    phases: list[Phase]
    """In the order in which they finished."""
    data_patterns: dict[str, float]
    """Share of the training data's real answers that each of ``evaluation.patterns`` finds."""
    prompts: int
    """Prompts that were trained on."""
    notes: list[str]
    """What the guards that tripped found, in the order of the iterations, and which model is the result."""
    finished: str
    """When the last phase finished, ISO 8601 in UTC."""
    machines: list[str]
    """Machines and versions that the phases ran on: more than one if the run moved or was updated."""

    @property
    def seconds(self) -> float:
        """Wall time of all phases together."""
        return sum(phase.seconds for phase in self.phases)

    def by_kind(self) -> list[Phase]:
        """The phases summed by kind (``generate``, ``train`` ...), slowest first; baselines are kinds of their own."""
        kinds: dict[str, list[Phase]] = collections.defaultdict(list)
        for phase in self.phases:
            kind, _, label = phase.name.partition(":")
            if label in self.config.baselines:
                kind = f"{kind}, baselines"
            kinds[kind].append(phase)
        sums = []
        for kind, phases in kinds.items():
            seconds = sum(phase.seconds for phase in phases)
            memory = max((phase.memory for phase in phases if phase.memory), default=None)
            sums.append(Phase(kind, seconds, len(phases), memory))
        return sorted(sums, key=lambda phase: -phase.seconds)


def open_run(root: Path) -> tuple[RunDir, Config]:
    """The run directory ``root`` and its configuration.

    Raises:
        RunDirError: it is no run directory.
    """
    run_dir = RunDir(root)
    if not run_dir.config.is_file():
        raise RunDirError(
            f"{root} is not a run directory (it has no config.yaml): give the --run-dir of a run, for example runs/NAME"
        )
    return run_dir, load_config(run_dir.config)


def read_results(root: Path) -> Results:
    """Reads the run directory ``root``, finished or not.

    Raises:
        RunDirError: it is no run directory, nothing in it has been measured yet, or one of its files is damaged.
    """
    run_dir, config = open_run(root)
    state = snapshot(run_dir.records())
    phases = state["phases"]
    evaluated = []
    for name, target in compared_models(config, run_dir):
        if target.eval.exists():
            evaluated.append(Evaluated(name, target.iteration, Evaluation.load(target.eval)))
    curves = [load_step_metrics(run_dir.target(iteration=t).metrics) for t in range(num_iterations(config))]
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


def compared_models(config: Config, run_dir: RunDir) -> list[tuple[str, Target]]:
    """Display name and place of each model of the comparison, measured or not.

    The starting model comes first, then continued SFT, then the iterations.
    """
    objective = objective_class(config)
    models = [(objective.start_label, run_dir.target(baseline="sft"))]
    if objective.compares():
        for baseline, name in _baseline_names(config, run_dir).items():
            models.append((name, run_dir.target(baseline=baseline)))
    for iteration in range(num_iterations(config)):
        models.append((objective.title(iteration), run_dir.target(iteration=iteration)))
    return models


def _baseline_names(config: Config, run_dir: RunDir) -> dict[str, str]:
    """The display name of each baseline: how many steps it has taken; if that is not unique, its rate, too."""
    trained = [record for record in run_dir.records() if "steps" in record.details]
    steps = {record.phase.partition(":")[2]: record.details["steps"] for record in trained}
    names = {}
    for baseline in config.baselines:
        names[baseline] = f"SFT +{steps[baseline]} steps" if baseline in steps else baseline
    # As many steps at another rate is another model.
    times = collections.Counter(names.values())
    for baseline, settings in config.baselines.items():
        if times[names[baseline]] > 1 and settings.learning_rate is not None:
            names[baseline] += f", lr {settings.learning_rate:g}"
    return names


def _notes(state: dict[str, Any], objective: type[Objective]) -> list[str]:
    notes = []
    for iteration, judged in sorted(state.get("guards", {}).items(), key=lambda item: int(item[0])):
        model = objective.title(int(iteration))
        for verdict in judged["verdicts"]:
            if verdict["tripped"]:
                notes.append(f"Guard {verdict['guard']} ({verdict['action']}) after {model}: {verdict['said']}.")
    if (result := state.get("result")) is not None:
        notes.append(f"The result is {Result(**result).name} ({result['why']}).")
    return notes


def _data_patterns(config: Config, run_dir: RunDir) -> tuple[dict[str, float], int]:
    """Share of the training answers in which each pattern is found, and how many prompts there are."""
    path = run_dir.data / TRAIN
    if not is_written(path):
        return {}, 0
    rows = load_rows(path)
    if not config.evaluation.patterns:
        return {}, len(rows)
    # The run keeps a copy of the tokenizer, for when the model has gone.
    directories = (Path(config.model.hf), run_dir.base / "hf")
    existing = [directory for directory in directories if (directory / "tokenizer_config.json").exists()]
    if not existing:
        return {}, len(rows)
    texts = decode(load_tokenizer(existing[0]), [row.real_ids for row in rows])
    shares = {}
    for name, pattern in config.evaluation.patterns.items():
        num_found = sum(re.search(pattern, text) is not None for text in texts)
        shares[name] = num_found / len(texts)
    return shares, len(rows)
