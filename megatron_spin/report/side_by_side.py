"""What each model answered to the same held-out prompts, beside the real answer: the paper's Figure 1 for any run.

No torch.
"""

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_spin.errors import RunDirError
from megatron_spin.evaluation import samples
from megatron_spin.evaluation.samples import PromptAnswers
from megatron_spin.report.results import compared_models, open_run

Decoding = Literal["sampled", "greedy"]
WIDTH = 110
"""Columns at which long lines are wrapped: a code block on a page does not wrap them."""


class NamedAnswer(NamedTuple):
    """One answer to a prompt."""

    name: str
    """``real``, or the model's display name."""
    text: str
    cut: bool
    """Whether it was cut before its end token."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """One prompt and who answered what."""

    index: int
    """Row number of the prompt in the data file, from 0."""
    prompt: str
    """As the model reads it, template included, without special tokens."""
    answers: list[NamedAnswer]
    """The real one, then each model's in the order of the comparison."""


def read_shown(root: Path, *, count: int, decoding: Decoding) -> list[Shown]:
    """The first ``count`` prompts for which every measured model of the run ``root`` shows its answer.

    Raises:
        RunDirError: it is no run directory, nothing was measured yet, or the models answered different prompts.
    """
    run_dir, config = open_run(root)
    by_model = {}
    for name, target in compared_models(config, run_dir):
        path = target.directory / "samples.jsonl"
        if path.exists():
            by_model[name] = samples.read_samples(path)
    if not by_model:
        raise RunDirError(
            f"{root} has no samples.jsonl yet: run tools/spin.sh first, with evaluation.path or "
            "evaluation.held_out_fraction"
        )
    first = next(iter(by_model.values()))
    shared = [index for index in first if all(index in answers for answers in by_model.values())]
    if not shared:
        raise RunDirError(f"the samples.jsonl files in {root} have no prompt in common: evaluate the models again")
    shown = []
    for index in shared[:count]:
        shown.append(_shown({name: answers[index] for name, answers in by_model.items()}, decoding))
    return shown


def _shown(by_model: Mapping[str, PromptAnswers], decoding: Decoding) -> Shown:
    """The answers of all models to one prompt."""
    first = next(iter(by_model.values()))
    answers = [NamedAnswer("real", first.real, "real" in first.cut)]
    for name, own in by_model.items():
        if (own.prompt, own.real) != (first.prompt, first.real):
            raise RunDirError(f"{name} answered another prompt {own.index} than the others: evaluate the models again")
        text = own.sampled if decoding == "sampled" else own.greedy
        answers.append(NamedAnswer(name, text, decoding in own.cut))
    return Shown(first.index, first.prompt, answers)


def samples_markdown(shown: Sequence[Shown], *, name: str, decoding: Decoding) -> str:
    """The page ``samples.md``: a section per prompt, a block of plain text per answer.

    Args:
        name: of the run.
        decoding: which answers these are, for the explanation.
    """
    how = "one sample at temperature 1 each" if decoding == "sampled" else "greedy decoding"
    explanation = f"Held-out prompts, {how}; lines longer than {WIDTH} columns are wrapped."
    if shown and shown[0].answers[1].name == "SFT":
        explanation += " SFT is the model that the run began with."
    if any(answer.cut for item in shown for answer in item.answers):
        explanation += " An answer marked as cut did not end within the longest answer allowed."
    parts = [f"# {name}: who answers what", explanation]
    for item in shown:
        parts += [f"## Prompt {item.index}", _block(item.prompt)]
        for answer in item.answers:
            mark = " (cut)" if answer.cut else ""
            parts += [f"**{answer.name}**{mark}", _block(answer.text)]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """``text`` as a code block, in which nothing is Markdown; its fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [f"{fence}text"]
    for line in text.strip("\n").split("\n"):
        wrapped = textwrap.wrap(line, WIDTH, replace_whitespace=False, expand_tabs=False, break_on_hyphens=False)
        lines += wrapped or [""]
    lines.append(fence)
    return "\n".join(lines)
