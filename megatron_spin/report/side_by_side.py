"""What each model answered to the same held-out prompts, side by side with the real answer: the paper's Figure 1 for one's own run. No torch."""

import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_spin.config import load_config
from megatron_spin.errors import RunDirError
from megatron_spin.report.results import players
from megatron_spin.run.directory import RunDir

Decoding = Literal["sampled", "greedy"]
WIDTH = 110
"""Columns at which long lines are wrapped: a code block on a page does not wrap them."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """One prompt and who answered what."""

    index: int
    """Row number of the prompt in the data file, from 0."""
    prompt: str
    """As the model read it, template included, without special tokens."""
    answers: list[tuple[str, str, bool]]
    """Name, text and whether the answer was cut before it ended: the real one, then each model's in the order of the comparison."""


def read_samples(root: Path, *, count: int, decoding: Decoding) -> list[Shown]:
    """The first ``count`` prompts that every measured model of the run ``root`` shows; an unfinished run has fewer models.

    Raises:
        RunDirError: it is no run directory, nothing was measured yet, or the models answered different prompts.
    """
    run_dir = RunDir(root)
    if not run_dir.config.is_file():
        raise RunDirError(
            f"{root} is not a run directory (it has no config.yaml): give the --run-dir of a run, for example runs/NAME"
        )
    models = {
        name: target.directory / "samples.jsonl" for name, target in players(load_config(run_dir.config), run_dir)
    }
    rows = {name: _read(path) for name, path in models.items() if path.exists()}
    if not rows:
        raise RunDirError(
            f"{root} has no samples.jsonl yet: run tools/spin.sh first, with evaluation.path or evaluation.held_out_fraction"
        )
    first = next(iter(rows.values()))
    shared = [index for index in first if all(index in own for own in rows.values())][:count]
    if not shared:
        raise RunDirError(f"the samples.jsonl files in {root} have no prompt in common: evaluate the models again")
    return [_shown([(name, own[index]) for name, own in rows.items()], decoding) for index in shared]


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Lines of a samples.jsonl by the prompt's row number."""
    try:
        return {row["index"]: row for row in map(json.loads, path.read_text().splitlines())}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunDirError(f"{path} is damaged ({type(error).__name__}: {error}): evaluate that model again") from None


def _shown(models: Sequence[tuple[str, dict[str, Any]]], decoding: Decoding) -> Shown:
    _, first = models[0]
    for name, row in models:
        if (row["prompt"], row["real"]) != (first["prompt"], first["real"]):
            raise RunDirError(
                f"{name} answered another prompt {row['index']} than the others: evaluate the models again"
            )
    answers = [("real", first["real"], "real" in first.get("cut", []))]
    answers += [(name, row[decoding], decoding in row.get("cut", [])) for name, row in models]
    return Shown(first["index"], first["prompt"], answers)


def samples_markdown(shown: Sequence[Shown], *, name: str, decoding: Decoding) -> str:
    """The page, ``samples.md``: a section a prompt, a block of plain text an answer.

    Args:
        name: of the run.
        decoding: which answers these are, for the explanation.
    """
    how = "one sample at temperature 1 each" if decoding == "sampled" else "greedy decoding"
    parts = [f"# {name}: who answers what", f"Held-out prompts, {how}; lines longer than {WIDTH} columns are wrapped."]
    if shown and shown[0].answers[1][0] == "SFT":
        parts[1] += " SFT is the model that the run began with."
    if any(cut for item in shown for _, _, cut in item.answers):
        parts[1] += " An answer marked as cut had not ended after as many tokens as answers may have."
    for item in shown:
        parts += [f"## Prompt {item.index}", _block(item.prompt)]
        for who, text, cut in item.answers:
            parts += [f"**{who}**{' (cut)' if cut else ''}", _block(text)]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """``text`` as a code block, in which nothing is taken for Markdown; its fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [piece for line in text.strip("\n").split("\n") for piece in _wrapped(line)]
    return "\n".join([f"{fence}text", *lines, fence])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, replace_whitespace=False, expand_tabs=False, break_on_hyphens=False) or [""]
