"""Reading SFT data: every format, and every way a file can be wrong."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_spin.data.reading import FORMATS, SourceRow, first_turn, read_source_rows
from megatron_spin.errors import DataError
from tests.support.tiny import write_jsonl

ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt/response": [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}],
    "instruction/input/output": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "c", "input": "x", "output": "d"},
    ],
    "question/answer": [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "more"},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    ],
    "prompt/chosen/rejected": [
        {"prompt": "a", "chosen": "b", "rejected": "x"},
        {"prompt": "c", "chosen": "d", "rejected": "e"},
    ],
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, ROWS[name])
    elif suffix == "json":
        path.write_text(json.dumps(ROWS[name], indent=1))
    else:
        datasets.Dataset.from_list(ROWS[name]).to_parquet(str(path))
    source = read_source_rows(path)
    assert (source.read, source.dropped, source.format) == (2, {}, name)
    second = {
        "instruction/input/output": SourceRow(1, "c\n\nx", "d"),
        "messages": SourceRow(1, "c", "d", "s"),
        "prompt/chosen/rejected": SourceRow(1, "c", "d", None, "e"),
    }.get(name, SourceRow(1, "c", "d"))
    assert source.rows == [SourceRow(0, "a", "b", None, "x" if name == "prompt/chosen/rejected" else None), second]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_preferences_as_conversations(tmp_path: Path, suffix: str) -> None:
    """UltraFeedback's shape: both columns hold the whole conversation; ``messages`` repeats the chosen one."""

    def talk(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]

    rows = [
        {"prompt": "a", "chosen": talk("a", "b"), "rejected": talk("a", "c"), "messages": talk("a", "b")},
        {
            "prompt": "a",
            "chosen": talk("a", "b", "more", "d"),
            "rejected": talk("a", "b", "more", "e"),
            "messages": talk("a", "b"),
        },
        {"prompt": "a", "chosen": talk("a", "b"), "rejected": talk("a"), "messages": talk("a", "b")},
        {
            "prompt": "f",
            "chosen": [{"role": "system", "content": "s"}, *talk("f", "g")],
            "rejected": talk("f", "h"),
            "messages": talk("f", "g"),
        },
    ]
    path = tmp_path / f"d.{suffix}"
    write_jsonl(path, rows) if suffix == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(str(path))
    source = read_source_rows(path, rejected="needed")
    assert source.rows == [SourceRow(0, "a", "b", None, "c"), SourceRow(3, "f", "g", "s", "h")]
    assert source.dropped == {"several_turns": 1, "empty_answer": 1}
    assert read_source_rows(path).format == "messages"


def test_preferences_without_a_rejected_answer(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no column chosen: training\.objective=dpo needs prompt, chosen and rejected"
    ):
        read_source_rows(write_jsonl(tmp_path / "d.jsonl", ROWS["prompt/response"]), rejected="needed")


def test_json_lines_under_the_name_json_and_text_beyond_ascii(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    text = "gr\u00fc\u00df\u2028 \U0001f600"
    path.write_text(
        f'{{"prompt": "{text}", "response": "b"}}\n\n{{"prompt": "c", "response": "d"}}\n', encoding="utf-8"
    )
    assert read_source_rows(path).rows == [SourceRow(0, text, "b"), SourceRow(1, "c", "d")]


def test_empty_ones_are_dropped_and_counted(tmp_path: Path) -> None:
    answers = [{"prompt": "a", "response": answer} for answer in ("b", "", None)]
    source = read_source_rows(
        write_jsonl(tmp_path / "d.jsonl", [*answers, {"prompt": " \n", "response": "b"}, {"prompt": "a"}])
    )
    assert source.rows == [SourceRow(0, "a", "b")]
    assert source.dropped == {"empty_prompt": 1, "empty_answer": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": "a", \n', r"d\.jsonl line 3 is not JSON"),
        ('{"prompt": "a", "response": "b"}\n[1]\n', r"line 2 holds a list, not an object"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": 5, "response": "b"}\n', r"line 2: prompt is a number, not text"),
        ('{"prompt": "a", "response": ["b"]}\n', r"line 1: response is a list, not text"),
        ('{"instruction": "a", "input": {}, "output": "b"}\n', r"line 1: input is an object, not text"),
        ('{"text": "a", "label": "b"}\n', r"has the columns text, label: it needs those of prompt/response or"),
        ('{"prompt": "a"}\n', r"has the columns prompt:"),
        ('{"messages": "a"}\n', r"line 1: messages is text, not a list"),
        (
            '{"messages": [{"role": "user"}]}\n{"messages": [{"role": "user", "content": 5}]}\n',
            r"line 2: messages holds an object without",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}\n',
            r"line 1: a message of role 'assistant' stands where",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": '
            '[{"role": "user", "content": "z"}, {"role": "assistant", "content": "c"}]}\n',
            r"line 1: rejected answers 'z', not the row's prompt 'a'",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": 5}\n', r"line 1: rejected is a number, neither text nor messages"),
        ('{"prompt": "a", "response": "\\ud83d"}\n', r"line 1 holds half of a surrogate pair"),
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_source_rows(path)


def test_bad_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff", "response": "b"}\n')
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read_source_rows(path)


def test_bad_array_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[{"prompt": "a", "response": "b"},\n{"prompt": }]')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_source_rows(path)


def test_other_columns_may_hold_anything_and_dates_are_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "2024-01-01", "response": "2024-01-01 00:00:00", "source": 1},
        {"prompt": "2024-01-02", "response": "2024-01-02 00:00:00", "source": ["a", {}]},
    ]
    source = read_source_rows(write_jsonl(tmp_path / "d.jsonl", rows))
    assert [(row.prompt, row.answer) for row in source.rows] == [(row["prompt"], row["response"]) for row in rows]


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_dict({"prompt": [], "response": []}).to_parquet(str(path))
    with pytest.raises(DataError, match="holds no rows"):
        read_source_rows(path)


def test_wrong_type_in_parquet_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list([{"prompt": None, "response": "b"}, {"prompt": 5, "response": "b"}]).to_parquet(
        str(path)
    )
    with pytest.raises(DataError, match="row 1: prompt is a number, not text"):
        read_source_rows(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.jsonl", "does not exist"),
        ("d.txt", "ends in .txt"),
        (".", "is not a file"),
        ("bad.parquet", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, message: str) -> None:
    for existing in ("d.txt", "bad.parquet"):
        (tmp_path / existing).write_text("not what the name says")
    with pytest.raises(DataError, match=message):
        read_source_rows(tmp_path / name)


def test_first_turn_of_an_unanswered_conversation_is_empty() -> None:
    assert first_turn([{"role": "user", "content": "a"}], "here") == (None, "a", "")
    assert first_turn([], "here") == (None, "", "")
