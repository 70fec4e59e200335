"""Prompts and answers of SFT or preference data, from a local JSONL, JSON or Parquet file in five formats. No torch."""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_spin.errors import DataError

PREFERENCES = "prompt/chosen/rejected"
Rejected: TypeAlias = Literal["needed", "taken", "ignored"]
"""Whether rejected answers are read: always, in files that have them, or never."""
FORMATS: dict[str, tuple[str, ...]] = {
    "prompt/response": ("prompt", "response"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "messages": ("messages",),
    PREFERENCES: ("prompt", "chosen", "rejected"),
}
"""Row formats by name, with the columns that each needs (``input`` may be missing). The first that fits is taken."""


@dataclasses.dataclass(frozen=True)
class SourceRow:
    """One row of a data file: a prompt and its answer."""

    index: int
    """Row number in the file, from 0; empty lines don't count."""
    prompt: str
    answer: str
    system: str | None = None
    """System message before the prompt, if the row has one."""
    rejected: str | None = None
    """The answer that ``answer`` was preferred to, if the row has one."""


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """The usable rows of a file."""

    rows: list[SourceRow]
    read: int
    """Rows in the file."""
    dropped: dict[str, int]
    """Rows left out, by reason: ``empty_prompt``, ``empty_answer``, ``several_turns``."""
    format: str
    """A key of :data:`FORMATS`."""


class DroppedRow(Exception):  # noqa: N818 (it leaves a row out; it is no error)
    """A row that is left out and counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_source_rows(path: Path, *, rejected: Rejected = "ignored") -> SourceRows:
    """Reads a JSONL, JSON or Parquet file, checks each row and drops those without a prompt or an answer.

    Args:
        rejected: ``needed`` requires rejected answers, ``taken`` reads them if the file has them, whatever other
            columns it has.

    Raises:
        DataError: no such file, unknown suffix, malformed content, unknown columns, a value of the wrong type, or no
            row at all. Errors name JSON lines by number from 1, rows of arrays and Parquet files from 0.
    """
    file = _open(Path(path))
    # One format for the whole file, by its columns: a row that lacks one of them has an empty text there.
    name = _format_of(file.columns, path, rejected)
    convert = _CONVERTERS[name]
    kept: list[SourceRow] = []
    dropped = collections.Counter[str]()
    num_read = 0
    for where, values in file.rows():
        try:
            kept.append(_not_empty(convert(values, num_read, where)))
        except DroppedRow as row:
            dropped[row.reason] += 1
        num_read += 1
    return SourceRows(kept, num_read, dict(dropped), name)


def _not_empty(row: SourceRow) -> SourceRow:
    if not row.prompt.strip():
        raise DroppedRow("empty_prompt")
    if not row.answer.strip() or (row.rejected is not None and not row.rejected.strip()):
        raise DroppedRow("empty_answer")
    return row


# ------------------------------------------------------------------------------------------------------ files


@dataclasses.dataclass(frozen=True)
class _DataFile:
    columns: list[str]
    """Names of all columns, in the order in which they first occur."""
    rows: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]
    """Reads the file: where each row is (path and line, for messages), and its values by column."""


def _open(path: Path) -> _DataFile:
    if not path.exists():
        raise DataError(f"data file {path} does not exist: give the path of a JSONL, JSON or Parquet file")
    if not path.is_file():
        raise DataError(f"data file {path} is not a file: give the path of one JSONL, JSON or Parquet file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _open_parquet(path)
    if suffix in (".jsonl", ".json"):
        return _open_json(path)
    raise DataError(
        f"data file {path} ends in {suffix or 'no suffix'}: name it .jsonl, .json or .parquet, by what it holds"
    )


def _open_parquet(path: Path) -> _DataFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def unreadable(error: Exception) -> DataError:
        problem = f"data file {path} cannot be read as parquet ({type(error).__name__}: {error})"
        return DataError(f"{problem}: write it again")

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = 0
        try:
            for batch in parquet.iter_batches():
                for values in batch.to_pylist():
                    yield f"{path} row {number}", values
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise unreadable(error) from None

    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's own error: the command line names it
        raise unreadable(error) from None
    if not parquet.metadata.num_rows:
        raise DataError(f"data file {path} holds no rows: give a file with at least one")
    return _DataFile(list(parquet.schema_arrow.names), rows)


def _open_json(path: Path) -> _DataFile:
    # By content, not by suffix: JSON Lines under the name .json are common.
    with open(path, "rb") as file:
        first = file.read(4096).lstrip()[:1]
    rows = functools.partial(_array_rows if first == b"[" else _line_rows, path)
    # The file is read twice. The format depends on the columns of all rows, and keeping the parsed rows until these are
    # known would take several times the file's size in memory.
    columns: dict[str, None] = {}
    empty = True
    for where, values in rows():
        empty = False
        if not isinstance(values, dict):
            problem = f"{where} holds {_kind(values)}, not an object"
            raise DataError(f"{problem}: each row needs columns such as prompt and response")
        columns.update(dict.fromkeys(values))
    if empty:
        raise DataError(f"data file {path} holds no rows: give a file with at least one")
    return _DataFile(list(columns), rows)


def _array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_bytes()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON ({error.msg}): correct it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        _check_surrogates(text, row, where)
        yield where, row


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{where} is not JSON ({error.msg} at column {error.colno})"
                raise DataError(f"{problem}: correct or remove the line") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8 text ({error.reason}): convert the file") from None
            _check_surrogates(line, row, where)
            yield where, row


def _check_surrogates(text: bytes, row: Any, where: str) -> None:
    r"""Refuses half of a surrogate pair, which JSON can hold as ``\ud83d`` and no tokenizer accepts."""
    if b"\\ud" not in text and b"\\uD" not in text:
        return
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff): correct the row") from None


# --------------------------------------------------------------------------------------------------- formats


def _format_of(columns: list[str], path: Path, rejected: Rejected) -> str:
    lacking = [column for column in FORMATS[PREFERENCES] if column not in columns]
    if rejected == "needed" and lacking:
        raise DataError(
            f"data file {path} has no column {lacking[0]}: training.objective=dpo needs prompt, chosen and rejected"
        )
    if rejected != "ignored" and not lacking:
        return PREFERENCES
    for name, needed in FORMATS.items():
        if set(needed) <= set(columns):
            return name
    found = ", ".join(columns) or "(none)"
    raise DataError(f"data file {path} has the columns {found}: it needs those of {' or '.join(FORMATS)}; rename them")


def _text(values: Mapping[str, Any], column: str, where: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {_kind(value)}, not text: correct the row")
    return value


def _prompt_response(values: Mapping[str, Any], index: int, where: str) -> SourceRow:
    return SourceRow(index, _text(values, "prompt", where), _text(values, "response", where))


def _question_answer(values: Mapping[str, Any], index: int, where: str) -> SourceRow:
    return SourceRow(index, _text(values, "question", where), _text(values, "answer", where))


def _instruction(values: Mapping[str, Any], index: int, where: str) -> SourceRow:
    prompt = _text(values, "instruction", where)
    extra = _text(values, "input", where)
    if extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    return SourceRow(index, prompt, _text(values, "output", where))


def _messages(values: Mapping[str, Any], index: int, where: str) -> SourceRow:
    system, prompt, answer = first_turn(values["messages"], where)
    return SourceRow(index, prompt, answer, system)


def _preference(values: Mapping[str, Any], index: int, where: str) -> SourceRow:
    prompt = _text(values, "prompt", where)
    system: str | None = None
    answers = []
    for column in ("chosen", "rejected"):
        value = values[column]
        if isinstance(value, list):
            turns = sum(isinstance(message, dict) and message.get("role") == "user" for message in value)
            # The prompt column holds one turn. Of a longer conversation, everything before it would be lost.
            if turns > 1:
                raise DroppedRow("several_turns")
            own_system, asked, value = first_turn(value, f"{where}: {column}")
            if asked and prompt and asked.strip() != prompt.strip():
                raise DataError(
                    f"{where}: {column} answers {asked[:40]!r}, not the row's prompt {prompt[:40]!r}: correct the row"
                )
            system = own_system if system is None else system
        elif not isinstance(value, str | None):
            raise DataError(f"{where}: {column} is {_kind(value)}, neither text nor messages: correct the row")
        answers.append(value or "")
    return SourceRow(index, prompt, answers[0], system, answers[1])


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], int, str], SourceRow]] = {
    "prompt/response": _prompt_response,
    "instruction/input/output": _instruction,
    "question/answer": _question_answer,
    "messages": _messages,
    PREFERENCES: _preference,
}
"""Values by column, row number and where the row is, to the row; raises :class:`DroppedRow` or DataError."""


def first_turn(messages: Any, where: str) -> tuple[str | None, str, str]:
    """System message (or None), first user message and the assistant's answer to it.

    The paper trains on the first turn alone. A conversation without an answer gives an empty one, which the caller
    drops and counts.

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
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise DataError(
                f"{where}: messages holds {_kind(message)} without a text role and a text content: correct the row"
            )
        turns.append((role, content or ""))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    for (role, _), expected in zip(turns[:2], ("user", "assistant"), strict=False):
        if role != expected:
            raise DataError(
                f"{where}: a message of role {role!r} stands where the first turn's {expected!r} must: correct the row"
            )
    prompt = turns[0][1] if turns else ""
    answer = turns[1][1] if len(turns) > 1 else ""
    return system, prompt, answer


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
