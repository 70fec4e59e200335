"""Shows where the time of a training step goes: runs tools/train.py on the benchmark's workload under torch's profiler.

The profiler itself slows the step by some percent; the shares are what counts.
"""

import argparse
import datetime
import runpy
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.workload import read_workload
from megatron_spin import machine

STEPS = 8
"""How many steps are profiled, after the workload's warm-up."""
KINDS = (
    ("optimizer", ("Optimizer.step",)),
    ("cross entropy", ("CrossEntropy",)),
    ("attention", ("_scaled_dot_product",)),
    ("linear layers", ("aten::mm", "aten::addmm", "aten::bmm")),
    ("copies and concatenations", ("aten::copy_", "aten::cat", "aten::fill_", "aten::index")),
    ("reductions", ("aten::sum", "aten::mean", "aten::linalg_vector_norm", "aten::max", "aten::amax")),
    ("other operations", ("aten::", "c10d::")),
)
"""Kinds of work with parts of the names that the profiler gives them; the first that fits takes an operation's time."""
REST = "Python and the rest"


class StepProfiler:
    """Profiles the optimizer steps after ``skipped``, told by torch's own hook at the end of each."""

    def __init__(self, skipped: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.skipped = skipped
        self.done = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.started = 0.0
        self.seconds = 0.0

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done == self.skipped:
            self.profiler.start()
            self.started = time.perf_counter()
        elif self.done == self.skipped + STEPS:
            self.seconds = time.perf_counter() - self.started
            self.profiler.stop()


def by_kind(events: Iterable[Any], seconds: float) -> dict[str, float]:
    """Seconds per step of each kind, from the profiler's events of ``seconds`` of wall time."""
    times = {kind: 0.0 for kind, _ in KINDS} | {REST: seconds}
    for event in events:
        kind = kind_of(event)
        if kind is not None:
            times[kind] += event.self_cpu_time_total / 1e6
            times[REST] -= event.self_cpu_time_total / 1e6
    return {kind: total / STEPS for kind, total in times.items()}


def kind_of(event: Any) -> str | None:
    """The first of :data:`KINDS` that fits the event or one of its callers."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for kind, parts in KINDS:
        if any(part in name for part in parts for name in names):
            return kind
    return None


def table(times: dict[str, float]) -> str:
    """Kinds with milliseconds per step and their share, as Markdown."""
    total = sum(times.values())
    lines = ["| | ms per step | share |", "| --- | ---: | ---: |"]
    for kind, seconds in times.items():
        lines.append(f"| {kind} | {1000 * seconds:,.0f} | {seconds / total:.0%} |")
    return "\n".join(lines)


def profile_training(workload: Path, run_dir: Path) -> dict[str, float]:
    """Trains in ``run_dir`` in this process; returns the seconds per step of each kind."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    shape = read_workload(workload)
    profiler = StepProfiler(shape.warmup_steps)
    overrides = [f"training.steps={shape.warmup_steps + STEPS}"]
    ours.run_before_training(workload, run_dir, overrides)
    hook = register_optimizer_step_post_hook(profiler)
    tool = str(ours.REPOSITORY / "tools" / "train.py")
    sys.argv = [tool, *ours.training_arguments(workload, run_dir, overrides)]
    runpy.run_path(tool, run_name="__main__")
    hook.remove()
    return by_kind(profiler.profiler.events(), profiler.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workload", type=Path, metavar="DIR", help="what benchmarks.prepare wrote: runs/bench/workload after make bench"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown file that gets the table, too")
    arguments = parser.parse_args()
    run_dir = arguments.workload.with_name("profile.run")
    shutil.rmtree(run_dir, ignore_errors=True)
    text = table(profile_training(arguments.workload, run_dir))
    text += f"\n\n{STEPS} steps, measured {datetime.date.today()} on {machine.machine_name()}. {machine.versions()}."
    shutil.rmtree(run_dir)
    print(f"\n{text}")
    if arguments.page is not None:
        from scripts.update_readme import replace_block

        arguments.page.write_text(replace_block(arguments.page, text, name="profile"))


if __name__ == "__main__":
    main()
