"""Writes the tables of finished experiments into a Markdown file, between its markers; shows them on the terminal.

A row is one model of one arm: mean and standard deviation over the seeds that have finished, and how many those are.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from examples.experiments.experiment import Experiment, read_experiment
from megatron_spin import cli
from megatron_spin.config import at_iteration, load_config
from megatron_spin.errors import RunDirError
from megatron_spin.evaluation.record import Evaluation, PatternMeasures
from megatron_spin.io import atomic_writer, read_json
from megatron_spin.report.results import compared_models
from megatron_spin.report.table import DASH, Table, markdown
from megatron_spin.run.directory import RunDir
from megatron_spin.run.result import num_played, rolled_back
from scripts.update_readme import replace_block

Value = Callable[[Evaluation], float | None]
"""Takes one number of an evaluation."""


def _careless(evaluation: Evaluation) -> PatternMeasures:
    """How careless answers, those without a check, fare."""
    return evaluation.answers.patterns["careless"]


def _matched(evaluation: Evaluation) -> float:
    """The exact match that claims are about."""
    value = evaluation.answers.exact_match_sampled.value
    assert value is not None, "an evaluation has at least one prompt"
    return value


def _named(key: str) -> Value:
    return lambda evaluation: evaluation.measure(key).value


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _nats(value: float) -> str:
    return f"{value:.4f}"


COLUMNS: dict[str, tuple[Value, Callable[[float], str]]] = {
    "sampled exact match %": (_matched, _percent),
    "greedy %": (_named("exact_match_greedy"), _percent),
    "careless %": (lambda evaluation: _careless(evaluation).sampled, _percent),
    "careful ones right %": (lambda evaluation: _careless(evaluation).exact_match_without, _percent),
    "NLL/token, clean": (_named("nll_per_token"), _nats),
    "NLL/token, the data's mix": (lambda evaluation: evaluation.logps.likelihood["mix"].value, _nats),
}


def measured(experiment: Experiment, root: Path) -> dict[str, dict[int, Evaluation]]:
    """The evaluations by row (``ARM/sft``, ``ARM/BASELINE``, ``ARM/ITERATION``, then the ``best`` ones) and by seed."""
    rows: dict[str, dict[int, Evaluation]] = {}
    for arm in experiment.arms:
        for seed in experiment.seeds:
            run_dir = experiment.run_dir(root, seed, arm)
            for name, evaluation in _evaluations(run_dir).items():
                rows.setdefault(f"{arm}/{name}", {})[seed] = evaluation
    for name, others in experiment.best.items():
        missing = [other for other in others if other not in rows]
        if missing:
            continue
        seeds = set.intersection(*(set(rows[other]) for other in others))
        rows[name] = {seed: max((rows[other][seed] for other in others), key=_matched) for seed in sorted(seeds)}
    return rows


def _evaluations(run_dir: RunDir) -> dict[str, Evaluation]:
    if not run_dir.config.exists():
        return {}
    evaluations = {}
    for _, target in compared_models(load_config(run_dir.config), run_dir):
        if target.eval.exists():
            evaluations[target.label] = Evaluation.load(target.eval)
    return evaluations


def table(experiment: Experiment, rows: dict[str, dict[int, Evaluation]]) -> Table:
    """Means and spreads. The SFT model, the same in every arm of a seed, is shown once."""
    shown: dict[str, dict[int, Evaluation]] = {}
    for name, by_seed in rows.items():
        arm, _, label = name.partition("/")
        if label == "sft" and experiment.arms[arm].after is not None:
            continue  # it began with another arm's policy
        shown.setdefault("SFT" if label == "sft" else _words(experiment, name), {}).update(by_seed)
    columns = COLUMNS | {title: (_named(key), _percent) for title, key in experiment.columns.items()}
    cells = [
        [name, str(len(by_seed)), *(_cell(by_seed.values(), *column) for column in columns.values())]
        for name, by_seed in shown.items()
    ]
    return Table(["", "seeds", *columns], cells, [])


def _words(experiment: Experiment, row: str) -> str:
    arm, slash, label = row.partition("/")
    if not slash:
        return row
    label = f"iteration {label}" if label.isdigit() else label.replace("_", " ")
    return label if len(experiment.arms) == 1 else f"{arm}, {label}"


def _cell(evaluations: Iterable[Evaluation], value: Value, text: Callable[[float], str]) -> str:
    values = [found for found in map(value, evaluations) if found is not None]
    if not values:
        return DASH
    spread = f" ± {text(statistics.stdev(values))}" if len(values) > 1 else ""
    return text(statistics.fmean(values)) + spread


def claims(experiment: Experiment, rows: dict[str, dict[int, Evaluation]]) -> list[str]:
    """One line per claim: the seeds on which the left row's sampled exact match is higher, and the mean difference."""
    lines = []
    for left, right in experiment.claims:
        first, second = rows.get(left, {}), rows.get(right, {})
        gains = [_matched(first[seed]) - _matched(second[seed]) for seed in first if seed in second]
        if not gains:
            lines.append(f"- {_words(experiment, left)} above {_words(experiment, right)}: not measured")
            continue
        error = f" ± {_percent(statistics.stdev(gains) / math.sqrt(len(gains)))}" if len(gains) > 1 else ""
        held = f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
        held += f", by {_percent(statistics.fmean(gains))}{error} points"
        lines.append(f"- {_words(experiment, left)} above {_words(experiment, right)}: {held}")
    return lines


def by_seed(experiment: Experiment, rows: dict[str, dict[int, Evaluation]]) -> Table:
    """Sampled exact match of every row and seed."""
    names = [
        name for name in rows if not name.endswith("/sft") or name == f"{next(iter(experiment.arms))}/sft"
    ]  # the same in all arms
    cells = [
        [
            _words(experiment, name),
            *(_percent(_matched(rows[name][seed])) if seed in rows[name] else DASH for seed in experiment.seeds),
        ]
        for name in names
    ]
    return Table(["sampled exact match % by seed", *map(str, experiment.seeds)], cells, [])


def block(path: Path, experiment: Experiment, root: Path, *, short: bool = False) -> str:
    """The Markdown of one experiment; the ``short`` one has the claims alone.

    Raises:
        RunDirError: nothing of it has been measured.
    """
    rows = measured(experiment, root)
    if not rows:
        raise RunDirError(
            f"{root / experiment.name} has no finished evaluation: run examples/experiments/run.py {path} first"
        )
    missing = [
        f"{arm} (seed {seed})"
        for arm in experiment.arms
        for seed in experiment.seeds
        if not _complete(experiment.run_dir(root, seed, arm))
    ]
    claimed = "\n".join(claims(experiment, rows))
    if short:
        return claimed
    parts = [markdown(table(experiment, rows)), claimed, markdown(by_seed(experiment, rows))]
    parts += [f"Not finished: {', '.join(missing)}."] if missing else []
    parts += [
        f"`.venv/bin/python -m examples.experiments.run {path}{_engine(experiment, root)}`"
        f"{_machines(experiment, root)}."
    ]
    return "\n\n".join(part for part in parts if part)


def _engine(experiment: Experiment, root: Path) -> str:
    """The --engine that the runs had, where it is not the default."""
    configs = [experiment.run_dir(root, seed, arm).config for arm in experiment.arms for seed in experiment.seeds]
    engines: set[str] = set()
    for path in configs:
        if path.exists():
            engine: Literal["vllm", "hf"] = at_iteration(load_config(path).generation.engine, 0)
            engines.add(engine)
    return "".join(f" --engine {engine}" for engine in sorted(engines - {"vllm"}))


def _machines(experiment: Experiment, root: Path) -> str:
    """What the runs ran on, each once; empty where they did not record it."""
    states = [experiment.run_dir(root, seed, arm).state for arm in experiment.arms for seed in experiment.seeds]
    names = list(
        dict.fromkeys(name for state in states if state.exists() for name in read_json(state).get("machines", []))
    )
    return f", on {'; '.join(names)}" if names else ""


def _complete(run_dir: RunDir) -> bool:
    if not run_dir.config.exists():
        return False
    config = load_config(run_dir.config)
    done = [run_dir.target(baseline=name).done.exists() for name in config.baselines]
    done += [
        run_dir.target(iteration=t).done.exists()
        for t in range(num_played(config, run_dir))
        if t != rolled_back(config, run_dir)
    ]
    return all(done)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/experiments"),
        metavar="DIR",
        help="--out of run.py (default: %(default)s)",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE.md",
        help="Markdown files with the markers of these experiments",
    )
    parser.add_argument(
        "--short", type=Path, nargs="*", default=[], metavar="FILE.md", help="the same, for the claims alone"
    )
    parsed = parser.parse_args(arguments)
    for path in parsed.experiments:
        experiment = read_experiment(path)
        text = block(path, experiment, parsed.out)
        print(f"# {experiment.title}\n\n{text}\n")
        shorter = block(path, experiment, parsed.out, short=True)
        for document, content in [
            *((document, text) for document in parsed.docs),
            *((document, shorter) for document in parsed.short),
        ]:
            replaced = replace_block(document, content, name=experiment.name)
            with atomic_writer(document) as file:
                file.write(replaced)


if __name__ == "__main__":
    cli.run(main)
