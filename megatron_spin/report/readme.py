"""The block of a README that shows a run: table, picture, where the time went, machine and versions. No torch."""

import os
from pathlib import Path

from megatron_spin.errors import RunDirError
from megatron_spin.phases.guard import played
from megatron_spin.report.results import Results
from megatron_spin.report.table import comparison, markdown
from megatron_spin.run.directory import RunDir


def run_block(results: Results, *, picture: Path, readme: Path) -> str:
    """Markdown of what ``results`` hold, with the picture's path relative to ``readme``.

    Raises:
        RunDirError: the run has evaluated nothing yet, or has not finished.
    """
    expected = 1 + len(results.config.baselines) + played(results.config, RunDir(results.root))
    if not results.evaluated or len(results.evaluated) < expected:
        raise RunDirError(
            f"{results.root} has not finished: its figures would be incomplete; run the same tools/spin.sh command again"
        )
    path = os.path.relpath(picture, readme.parent)
    kinds = ", ".join(f"{phase.name} {phase.seconds:.0f} s" for phase in results.by_kind() if phase.seconds >= 1)
    machine = f"Measured {results.finished[:10]}" + (f" on {'; '.join(results.machines)}." if results.machines else ".")
    time = f"The run took {results.seconds / 60:.1f} minutes: {kinds}."
    parts = [markdown(comparison(results)), f"![training curves and what was measured]({path})", f"{machine} {time}"]
    return "\n\n".join(parts)


def replace_block(path: Path, block: str, *, name: str = "run") -> str:
    """The text of ``path`` with ``block`` between the markers of ``name``.

    Raises:
        RunDirError: the file is missing, or does not have each marker once, in order.
    """
    begin, end = markers(name)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise RunDirError(f"{path} does not exist: give the file that has {begin} and {end}") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise RunDirError(f"{path} must have {begin} and after it {end}, once each: put them where the figures belong")
    return f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}"


def markers(name: str) -> tuple[str, str]:
    """The comments between which the figures of ``name`` stand."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
