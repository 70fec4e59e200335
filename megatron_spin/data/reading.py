"""SFT or preference data from a local JSONL, JSON or Parquet file: five row formats in, prompts and answers out. No torch."""

import collections
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_spin.errors import DataError

PREFERENCES = "prompt/chosen/rejected"
Rejected: TypeAlias = Literal["needed", "taken", "ignored"]
"""What becomes of rejected answers: DPO needs them, and its evaluation takes them where there are any."""
FORMATS: dict[str, tuple[str, ...]] = {
    "prompt/response": ("prompt", "response"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "messages": ("messages",),
    PREFERENCES: ("prompt", "chosen", "rejected"),
}
"""Row formats by name, with the columns each needs; the first that a file has all columns of is taken (``input`` may be missing)."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One SFT row: what is asked and how it was answered."""

    index: int
    """Row number in the source file, from 0; empty lines don't count."""
    prompt: str
    answer: str
    system: str | None = None
    """System message before the prompt, where the row has one."""
    rejected: str | None = None
    """The answer that lost against ``answer``, where the row has one."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """The usable rows of a file."""

    rows: list[Sample]
    read: int
    """Rows in the file."""
    dropped: dict[str, int]
    """Rows left out, by reason: ``empty_prompt``, ``empty_answer``, ``several_turns``."""
    format: str
    """A key of :data:`FORMATS`."""


def read_samples(path: Path, *, rejected: Rejected = "ignored") -> Samples:
    """Reads ``path`` (``.jsonl``, ``.json`` or ``.parquet``), checks each row and leaves out those without a prompt or an answer.

    With ``rejected`` needed every row must have a rejected answer, too; with taken a file that has them is read for them, whatever else it has.

    Raises:
        DataError: no such file, unknown suffix, malformed (JSON lines are named by number, from 1), unknown columns, a value of the wrong
            type (with its row number, from 0), or no row at all.
    """
    rows = _open(path)
    name = _format_of(list(rows.column_names), path, rejected)
    convert = _CONVERTERS[name]
    samples, dropped = [], collections.Counter[str]()
    for index, row in enumerate(rows):
        sample = convert(row, index, path)
        if isinstance(sample, str):
            dropped[sample] += 1
        elif not sample.prompt.strip():
            dropped["empty_prompt"] += 1
        elif not sample.answer.strip() or (sample.rejected is not None and not sample.rejected.strip()):
            dropped["empty_answer"] += 1
        else:
            samples.append(sample)
    return Samples(samples, len(rows), dict(dropped), name)


def _open(path: Path) -> Any:
    """The file as a ``datasets.Dataset`` in memory."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"data file {path} does not exist: give the path of a JSONL, JSON or Parquet file")
    if not path.is_file():
        raise DataError(f"data file {path} is not a file: give the path of one JSONL, JSON or Parquet file")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".parquet"):
        raise DataError(
            f"data file {path} ends in {suffix or 'no suffix'}: name it .jsonl, .json or .parquet, by what it holds"
        )
    if suffix != ".parquet":
        _check_json(path)
    return _load("parquet" if suffix == ".parquet" else "json", path)


def _load(kind: str, path: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets  # here, not above: it takes a second, for which --help must not wait

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # A cache of its own: the shared one would keep a copy of every file ever read, and may not be writable.
    with tempfile.TemporaryDirectory(prefix="spin_data_") as cache:
        try:
            return datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # datasets wraps whatever pyarrow raises in exceptions of its own
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, OSError) and cause.errno is not None:
                raise cause from None
            raise DataError(
                f"data file {path} cannot be read as {kind} ({type(cause).__name__}: {cause}): write it again"
            ) from None


def _check_json(path: Path) -> None:
    """Checks JSON text row by row, so that an error names its line, which the reader behind ``datasets`` does not."""
    with open(path, "rb") as file:
        first = file.read(4096).lstrip()[:1]
    if first == b"[":
        _check_rows(_array(path), lambda number: f"row {number}", path)
    else:
        _check_rows(_lines(path), lambda number: f"line {number}", path)


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON ({error.msg}): correct it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
    yield from enumerate(rows)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{path} line {number} is not JSON ({error.msg} at column {error.colno})"
                raise DataError(f"{problem}: correct or remove the line") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{path} line {number} is not UTF-8 text ({error.reason}): convert the file") from None
            yield number, value


def _check_rows(rows: Iterable[tuple[int, Any]], where: Callable[[int], str], path: Path) -> None:
    """Every row is an object whose columns of the row format hold text; ``where`` turns a row's number into words."""
    empty = True
    for number, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise DataError(
                f"{path} {where(number)} holds {_kind(row)}, not an object: each row needs columns such as prompt and response"
            )
        name = next((name for name, needed in FORMATS.items() if row.keys() >= set(needed)), None)
        if name == "messages":
            first_turn(row["messages"], f"{path} {where(number)}")
        elif name == PREFERENCES:
            _preference(row, f"{path} {where(number)}")
        elif name is not None:
            for column in (*FORMATS[name], *(("input",) if name == "instruction/input/output" else ())):
                if not isinstance(row.get(column), str | None):
                    raise DataError(
                        f"{path} {where(number)}: {column} is {_kind(row[column])}, not text: correct the row"
                    )
    if empty:
        raise DataError(f"data file {path} holds no rows: give a file with at least one")


def _format_of(columns: list[str], path: Path, rejected: Rejected) -> str:
    lacking = [column for column in FORMATS[PREFERENCES] if column not in columns]
    if rejected == "needed" or (rejected == "taken" and not lacking):
        if lacking:
            raise DataError(
                f"data file {path} has no column {lacking[0]}: training.objective=dpo needs prompt, chosen and rejected"
            )
        return PREFERENCES
    for name, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return name
    found = ", ".join(columns) or "(none)"
    raise DataError(f"data file {path} has the columns {found}: it needs those of {' or '.join(FORMATS)}; rename them")


def _text(row: Mapping[str, Any], column: str, index: int, path: Path) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{path} row {index}: {column} is {_kind(value)}, not text: correct the row")
    return value


def _plain(prompt: str, answer: str) -> Callable[[Mapping[str, Any], int, Path], Sample]:
    return lambda row, index, path: Sample(index, _text(row, prompt, index, path), _text(row, answer, index, path))


def _instruction(row: Mapping[str, Any], index: int, path: Path) -> Sample:
    instruction, extra = _text(row, "instruction", index, path), _text(row, "input", index, path)
    return Sample(
        index, f"{instruction}\n\n{extra}" if extra.strip() else instruction, _text(row, "output", index, path)
    )


def _messages(row: Mapping[str, Any], index: int, path: Path) -> Sample:
    system, prompt, answer = first_turn(row["messages"], f"{path} row {index}")
    return Sample(index, prompt, answer, system)


def _preferences(row: Mapping[str, Any], index: int, path: Path) -> Sample | str:
    found = _preference(row, f"{path} row {index}")
    return found if isinstance(found, str) else Sample(index, *found)


def _preference(row: Mapping[str, Any], where: str) -> tuple[str, str, str | None, str] | str:
    """Prompt, chosen answer, system message and rejected answer, or the reason for leaving the row out."""
    prompt, answers = row["prompt"], []
    system: str | None = None
    if not isinstance(prompt, str | None):
        raise DataError(f"{where}: prompt is {_kind(prompt)}, not text: correct the row")
    for column in ("chosen", "rejected"):
        value = row[column]
        if isinstance(value, list):
            # The prompt column holds one turn: what came before it in a longer conversation would be lost.
            if sum(isinstance(message, dict) and message.get("role") == "user" for message in value) > 1:
                return "several_turns"
            before, asked, value = first_turn(value, f"{where}: {column}")
            if asked and prompt and asked.strip() != prompt.strip():
                raise DataError(
                    f"{where}: {column} answers {asked[:40]!r}, not the row's prompt {prompt[:40]!r}: correct the row"
                )
            system = before if system is None else system
        elif not isinstance(value, str | None):
            raise DataError(f"{where}: {column} is {_kind(value)}, neither text nor messages: correct the row")
        answers.append(value or "")
    return prompt or "", answers[0], system, answers[1]


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], int, Path], Sample | str]] = {
    "prompt/response": _plain("prompt", "response"),
    "instruction/input/output": _instruction,
    "question/answer": _plain("question", "answer"),
    "messages": _messages,
    PREFERENCES: _preferences,
}


def first_turn(messages: Any, where: str) -> tuple[str | None, str, str]:
    """System message (or None), first user message and the assistant's answer to it; the paper trains on the first turn alone.

    A conversation that ends before its first answer gives an empty answer, which the caller drops and counts.

    Raises:
        DataError: not a list of ``{role, content}`` with text in both, or roles out of order; names ``where``.
    """
    if messages is None:
        return None, "", ""
    if not isinstance(messages, list):
        raise DataError(
            f"{where}: messages is {_kind(messages)}, not a list of objects with role and content: correct the row"
        )
    turns = []
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str | None)
        ):
            raise DataError(
                f"{where}: messages holds {_kind(message)} without a text role and a text content: correct the row"
            )
        turns.append((message["role"], message.get("content") or ""))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    for (role, _), expected in zip(turns[:2], ("user", "assistant"), strict=False):
        if role != expected:
            raise DataError(
                f"{where}: a message of role {role!r} stands where the first turn's {expected!r} must: correct the row"
            )
    contents = [content for _, content in turns[:2]] + ["", ""]
    return system, contents[0], contents[1]


def _kind(value: Any) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), type(value).__name__)
