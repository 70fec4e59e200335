"""The plan of a run: which phases there are, in which order, what each runs, and which are done. No torch.

The driver (tools/spin.sh) asks for it as text and does nothing but walk through it, so everything that needs thought is here.
"""

import dataclasses
import difflib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_spin.config import Config, has_evaluation
from megatron_spin.errors import ConfigError, DeviceError, RunDirError
from megatron_spin.io import read_json, write_json
from megatron_spin.phases.guard import ENDS, describe, result, rolled_back, settled
from megatron_spin.run.directory import RunDir
from megatron_spin.spin.objective import num_iterations, objective_class


@dataclasses.dataclass(frozen=True)
class Step:
    """One phase of the plan."""

    phase: str
    """Name as in ``state.json``: ``prepare``, ``train:0``, ``export:sft_continued`` ..."""
    what: str
    """What it does, in words, for the narration."""
    command: tuple[str, ...]
    """Words after the Python interpreter: the tool's path and its arguments."""
    processes: int = 1
    """How many ranks run the command; more than 1 needs a launcher."""
    done: bool = False
    left_out: bool = False
    """A guard rolled an iteration back, so that this one is not to be run."""


class Plan:
    """All phases of ``config`` in ``run_dir``; ``arguments`` are the words (config path and overrides) that every command begins with."""

    def __init__(self, config: Config, run_dir: RunDir, *, arguments: Sequence[str], tools: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self._arguments = tuple(arguments)
        self._tools = tools

    def steps(self, until: str | None = None) -> list[Step]:
        """The phases in order, up to and including ``until``.

        Raises:
            ConfigError: ``until`` names no phase of this plan.
            DeviceError: the number of processes cannot be had on this machine.
        """
        done = set(read_json(self.run_dir.state)["phases"]) if self.run_dir.state.exists() else set()
        steps = self._without_rolled_back(
            [dataclasses.replace(step, done=self._is_done(step.phase, done)) for step in self._all()]
        )
        if until is None:
            return steps
        names = [step.phase for step in steps]
        if until not in names:
            nearest = difflib.get_close_matches(until, names, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the phases are {', '.join(names)}"
            raise ConfigError(f"--until {until} is not a phase of this run: {hint}")
        return steps[: names.index(until) + 1]

    def _is_done(self, phase: str, done: set[str]) -> bool:
        kind, _, label = phase.partition(":")
        return settled(self.config, self.run_dir, int(label)) if kind == "guard" else phase in done

    def _without_rolled_back(self, steps: list[Step]) -> list[Step]:
        """``steps`` with those marked that a rollback leaves out: the rotation of the iteration that was rolled back, and all later iterations."""
        last = rolled_back(self.config, self.run_dir)
        if last is None:
            return steps
        what = f"left out, for iteration {last} was rolled back"
        return [
            dataclasses.replace(step, what=what, left_out=True) if _comes_after(step.phase, last) else step
            for step in steps
        ]

    def _all(self) -> Iterator[Step]:
        config, objective, evaluates = self.config, objective_class(self.config), has_evaluation(self.config)
        iterations = num_iterations(config)
        yield self._step("prepare", "read, check and tokenize the data", "prepare.py")
        base = ("--hf", config.model.hf, "--checkpoint", str(self.run_dir.base))
        yield self._bare("import", "turn the Hugging Face model into a Megatron checkpoint", "import_hf.py", *base)
        plays = objective.compares()
        if plays and evaluates:
            yield self._step(
                "evaluate:sft", "measure the model that the run begins with", "evaluate.py", "--baseline", "sft"
            )
        for iteration in range(iterations):
            if objective.generates:
                what = "the opponent answers every prompt"
                yield self._step(f"generate:{iteration}", what, "generate.py", "--iteration", str(iteration))
            yield from self._train_and_measure(f"{iteration}", "--iteration", objective.task)
            if plays:
                yield self._step(
                    f"guard:{iteration}",
                    "look whether the policy is fit to go on with",
                    "guard.py",
                    "--iteration",
                    str(iteration),
                )
            last = iteration + 1 == iterations
            what = (
                "the run's last policy is complete"
                if last
                else f"the policy becomes the opponent of iteration {iteration + 1}"
            )
            yield self._finish("rotate" if objective.generates else "finish", str(iteration), what)
        # The baselines come last: whoever started a self-play wants its result first, and they share nothing with it but data and base.
        for name in config.baselines if plays else ():
            yield from self._train_and_measure(
                name, "--baseline", f"continue SFT to compare with ({config.baselines[name].steps})"
            )
            yield self._finish("finish", name, "the baseline is complete")

    def _train_and_measure(self, label: str, flag: str, what: str) -> Iterator[Step]:
        target = (
            self.run_dir.target(iteration=int(label)) if flag == "--iteration" else self.run_dir.target(baseline=label)
        )
        train = self._step(f"train:{label}", what, "train.py", flag, label)
        yield dataclasses.replace(train, processes=processes(self.config))
        paths = ("--checkpoint", str(target.checkpoints), "--hf", str(target.hf))
        yield self._bare(
            f"export:{label}",
            "write it as a Hugging Face model and compare log-probs",
            "export_hf.py",
            *paths,
            flag,
            label,
        )
        if has_evaluation(self.config):
            yield self._step(f"evaluate:{label}", "measure it on held-out prompts", "evaluate.py", flag, label)

    def _step(self, phase: str, what: str, tool: str, *flags: str) -> Step:
        # Overrides directly behind CONFIG: argparse takes positional arguments in one go.
        return Step(
            phase, what, (str(self._tools / tool), *self._arguments, "--run-dir", str(self.run_dir.root), *flags)
        )

    def _bare(self, phase: str, what: str, tool: str, *flags: str) -> Step:
        """A tool that works without a run, too, and takes the configuration as options."""
        config, *overrides = self._arguments
        run = ("--config", config, "--run-dir", str(self.run_dir.root))
        return Step(phase, what, (str(self._tools / tool), *overrides, *flags, *run))

    def _finish(self, verb: str, label: str, what: str) -> Step:
        return self._step(f"{verb}:{label}", what, "plan.py", "--finish", f"{verb}:{label}")


def _comes_after(phase: str, iteration: int) -> bool:
    """Whether ``phase`` would go on from ``iteration``: its end, or anything of a later one."""
    kind, _, label = phase.partition(":")
    return label.isdigit() and (int(label) > iteration or (int(label) == iteration and kind in ENDS))


def processes(config: Config) -> int:
    """How many training processes to start on this machine.

    Raises:
        DeviceError: there are fewer GPUs than one copy of the model needs, or their number is no multiple of it.
    """
    replica, wanted = config.parallel.replica_size, config.parallel.nproc_per_node
    gpus = gpu_count(config)
    count = wanted or gpus or replica
    if config.device == "cuda" and not gpus:
        raise DeviceError(
            "device=cuda, but no GPU is visible to torch: use device=cpu or auto, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if count % replica:
        origin = "parallel.nproc_per_node" if wanted else "the number of GPUs"
        raise DeviceError(
            f"{origin}={count} is not a multiple of the {replica} processes that a model replica needs (tensor x pipeline x context"
            f" parallel sizes): set parallel.nproc_per_node={replica} or change the parallel sizes"
        )
    if gpus and count > gpus:
        raise DeviceError(
            f"training needs {count} processes, one a GPU, but {gpus} GPUs are visible: lower the parallel sizes or use device=cpu"
        )
    return count


def gpu_count(config: Config) -> int:
    """GPUs that training would use; torch is asked (it alone knows whether it can use them) only where the driver's tool sees one."""
    if config.device == "cpu" or shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False, timeout=60)
    if seen.returncode or b"GPU" not in seen.stdout:
        return 0
    import torch  # two seconds, spent only on a machine with a GPU

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def as_text(steps: Sequence[Step], run_dir: RunDir) -> Iterator[str]:
    """Lines for the driver: the run directory and, once there is one, the result in words; then ``phase, status, processes, what, command...``.

    TABs separate. A status is ``done``, ``skip`` (left out by a rollback) or ``todo``.

    Raises:
        ConfigError: a word of a command holds a TAB or a newline.
    """
    state = read_json(run_dir.state) if run_dir.state.exists() else {}
    yield f"run-dir\t{run_dir.root}" + (f"\t{describe(run_dir)}" if "result" in state else "")
    for step in steps:
        status = "skip" if step.left_out else "done" if step.done else "todo"
        words = (step.phase, status, str(step.processes), step.what, *step.command)
        for word in words:
            if not word or "\t" in word or "\n" in word:
                raise ConfigError(
                    f"argument {word!r} is empty or holds a tab or a newline: paths and overrides must be plain words"
                )
        yield "\t".join(words)


def finish(plan: Plan, phase: str) -> None:
    """Writes the ``DONE`` marker of an iteration (``rotate:T``, or ``finish:T`` without self-play) or of a baseline (``finish:NAME``).

    A complete iteration is the run's result until a later one is.

    Raises:
        RunDirError: a phase before it has not been done, or a guard rolled the iteration back.
    """
    started, run_dir = time.monotonic(), plan.run_dir
    if run_dir.is_done(phase):
        print(f"{phase} already done")
        return
    label = phase.partition(":")[2]
    *steps, last = [step for step in plan.steps(phase) if step.phase.endswith(f":{label}")]
    if last.left_out:
        raise RunDirError(f"{phase} is {last.what}: change the guards' settings to have it judged again")
    missing = [step.phase for step in steps if not step.done]
    if missing:
        raise RunDirError(
            f"{phase} must wait for {', '.join(missing)}: run tools/spin.sh, which runs all phases in order"
        )
    phases = read_json(run_dir.state)["phases"]
    target = run_dir.target(iteration=int(label)) if label.isdigit() else run_dir.target(baseline=label)
    write_json(target.done, {step.phase: phases[step.phase] for step in steps})
    if label.isdigit():
        with run_dir.changing_state() as state:
            state["result"] = result(plan.config, run_dir, int(label), "the last iteration that is complete")
    run_dir.mark_done(phase, seconds=time.monotonic() - started)
