"""The plan of a run: which phases there are, in which order, what each runs, and which are done. No torch.

The driver (tools/spin.sh) asks for it as text and only walks through it: everything that needs thought is here.
"""

import dataclasses
import difflib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_spin.config import Config, has_evaluation
from megatron_spin.errors import ConfigError
from megatron_spin.run.devices import gpus_of, num_ranks
from megatron_spin.run.directory import RunDir, Target
from megatron_spin.run.records import kind_and_label
from megatron_spin.run.result import ENDS, is_done, read_result, rolled_back
from megatron_spin.spin.objective import num_iterations, objective_class


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """One phase of the plan."""

    name: str
    """As in its record: ``prepare``, ``train:0``, ``export:sft_continued`` ..."""
    what: str
    """What it does, in words."""
    is_done: bool = False
    is_left_out: bool = False
    """A guard rolled an iteration back, so that this phase is not to be run."""

    @property
    def kind(self) -> str:
        return kind_and_label(self.name)[0]

    @property
    def label(self) -> str:
        return kind_and_label(self.name)[1]

    @property
    def status(self) -> str:
        """``done``, ``skip`` (left out) or ``todo``."""
        if self.is_left_out:
            return "skip"
        return "done" if self.is_done else "todo"


class Plan:
    """All phases of ``config`` in ``run_dir``."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self.config = config
        self.run_dir = run_dir

    def phases(self, until: str | None = None) -> list[PlannedPhase]:
        """The phases in order, up to and including ``until``.

        Raises:
            ConfigError: ``until`` names no phase of this plan.
        """
        last = rolled_back(self.config, self.run_dir)
        phases = []
        for name, what in self._outline():
            if last is not None and _continues_from(name, last):
                phases.append(PlannedPhase(name, f"left out, since iteration {last} was rolled back", is_left_out=True))
            else:
                phases.append(PlannedPhase(name, what, is_done=is_done(self.config, self.run_dir, name)))
        if until is None:
            return phases
        names = [phase.name for phase in phases]
        if until not in names:
            nearest = difflib.get_close_matches(until, names, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the phases are {', '.join(names)}"
            raise ConfigError(f"--until {until} is not a phase of this run: {hint}")
        return phases[: names.index(until) + 1]

    def phases_of(self, target: Target) -> list[PlannedPhase]:
        """The phases of one iteration or baseline, in order."""
        return [phase for phase in self.phases() if phase.label == target.label]

    def _outline(self) -> Iterator[tuple[str, str]]:
        """Name of each phase, and what it does."""
        objective, iterations = objective_class(self.config), num_iterations(self.config)
        yield "prepare", "read, check and tokenize the data"
        yield "import", "turn the Hugging Face model into a Megatron checkpoint"
        if objective.compares() and has_evaluation(self.config):
            yield "evaluate:sft", "measure the model that the run starts from"
        for iteration in range(iterations):
            if objective.generates:
                yield f"generate:{iteration}", "the opponent answers every prompt"
            yield from self._train_and_measure(str(iteration), objective.task)
            if objective.compares():
                yield f"guard:{iteration}", "judge whether the policy is fit to continue with"
            what = f"the policy becomes the opponent of iteration {iteration + 1}"
            if iteration + 1 == iterations:
                what = "the run's last policy is complete"
            yield f"{end_of_iteration(self.config)}:{iteration}", what
        if not objective.compares():
            return
        # Last, because the self-play is what the run was started for; baselines share only data and base with it.
        for name, baseline in self.config.baselines.items():
            yield from self._train_and_measure(name, f"continue SFT to compare with ({baseline.steps})")
            yield f"finish:{name}", "the baseline is complete"

    def _train_and_measure(self, label: str, what: str) -> Iterator[tuple[str, str]]:
        yield f"train:{label}", what
        yield f"export:{label}", "write it as a Hugging Face model and compare log-probs"
        if has_evaluation(self.config):
            yield f"evaluate:{label}", "measure it on held-out prompts"


def end_of_iteration(config: Config) -> str:
    """The kind of phase that completes an iteration."""
    return "rotate" if objective_class(config).generates else "finish"


def _continues_from(name: str, iteration: int) -> bool:
    """Whether a phase builds on ``iteration``: the end of that iteration, or any phase of a later one."""
    kind, label = kind_and_label(name)
    if not label.isdigit():
        return False
    return int(label) > iteration or (int(label) == iteration and kind in ENDS)


TOOLS = {
    "prepare": "prepare.py",
    "import": "import_hf.py",
    "generate": "generate.py",
    "train": "train.py",
    "export": "export_hf.py",
    "evaluate": "evaluate.py",
    "guard": "guard.py",
    "rotate": "rotate.py",
    "finish": "rotate.py",
}
"""The command of each kind of phase."""


@dataclasses.dataclass(frozen=True)
class CommandLines:
    """How the phases of a run are started: the tools' paths and arguments, without the Python interpreter."""

    config: Config
    run_dir: RunDir
    config_path: str
    overrides: Sequence[str]
    tools: Path
    """Directory of the tools."""

    def of(self, phase: PlannedPhase) -> tuple[str, ...]:
        """The words of the command line of ``phase``."""
        tool = str(self.tools / TOOLS[phase.kind])
        root = str(self.run_dir.root)
        if phase.kind == "import":
            paths = (self.config.model.hf, str(self.run_dir.base))
        elif phase.kind == "export":
            target = self.run_dir.labelled(phase.label)
            paths = (str(target.hf), str(target.checkpoints))
        else:
            # Overrides directly behind CONFIG: argparse takes positional arguments in one go.
            return (tool, self.config_path, *self.overrides, "--run-dir", root, *_target_flags(phase.label))
        # The conversion tools also work without a run and take the configuration as an option.
        hf, checkpoint = paths
        run = ("--config", self.config_path, "--run-dir", root)
        return (tool, *self.overrides, "--hf", hf, "--checkpoint", checkpoint, *_target_flags(phase.label), *run)


def _target_flags(label: str) -> tuple[str, ...]:
    if not label:
        return ()
    return ("--iteration" if label.isdigit() else "--baseline", label)


def as_text(phases: Sequence[PlannedPhase], commands: CommandLines) -> Iterator[str]:
    """Shell assignments for the driver, one line per phase behind a first line for the run.

    The first line assigns ``run_dir``, ``devices`` (what the run uses, in words) and ``result`` (the result so far in
    words, or nothing). The others assign
    ``phase``, ``status`` (as :attr:`PlannedPhase.status`), ``ranks``, ``replan`` (whether the phase may change the
    plan), ``what`` and the array ``command``.

    Raises:
        ConfigError: a word of a command holds a newline.
        DeviceError: the number of ranks cannot be had on this machine.
    """
    result = read_result(commands.run_dir)
    line = "" if result is None else result.line(commands.run_dir)
    ranks = {"train": num_ranks(commands.config)}
    ranks["import"] = ranks["export"] = commands.config.parallel.weights_size
    gpus = gpus_of(commands.config)
    of_run = {
        "run_dir": str(commands.run_dir.root),
        "devices": str(gpus) if gpus.names else "the CPU",
        "result": line,
    }
    yield " ".join(f"{key}={shlex.quote(value)}" for key, value in of_run.items())
    for phase in phases:
        words = commands.of(phase)
        for word in words:
            if "\n" in word:
                raise ConfigError(f"argument {word!r} holds a newline: paths and overrides must be on one line")
        fields = {
            "phase": phase.name,
            "status": phase.status,
            "ranks": str(ranks.get(phase.kind, 1)),
            "replan": "true" if phase.kind == "guard" else "false",
            "what": phase.what,
        }
        assignments = " ".join(f"{key}={shlex.quote(value)}" for key, value in fields.items())
        yield f"{assignments} command=({shlex.join(words)})"
