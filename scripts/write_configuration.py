"""Writes docs/configuration.md, the reference of all configuration keys, from the dataclasses of the sections."""

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_spin.config import BaselineConfig, Config, GuardsConfig
from megatron_spin.config.guards import Guard
from megatron_spin.config.parsing import is_required
from megatron_spin.config.resume import Use, uses_of
from megatron_spin.config.values import Range

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

`scripts/write_configuration.py` writes this page from `megatron_spin/config/`; change it there.

A configuration is a YAML file. Every tool takes overrides after it, with dots between the parts of a key and the value
in YAML: `tools/spin.sh spin.yaml spin.beta=0.2 training.learning_rate='[5e-7, 1e-7]'`. Unknown keys, values of another
type and values out of range are errors that name the key. `examples/configs/` has complete files.

- **Per iteration**: a scalar is the same value in every iteration. A list gives one value per iteration, from iteration
  0; if it is short, its last value repeats.
- **May change**: a run may be continued with another value of a setting until a phase that depends on it is done or has
  left something that it would take up again (a shard, a checkpoint). `train:T` stands for the train phase of each
  iteration: a list may change the values of iterations that are not trained yet. Every change is recorded in
  `config_changes.jsonl` in the run directory; a change that contradicts what was made is refused.
- **Paths** may be written another way, or lead to another place with the same content, at any time.
"""
ORDER = ("prepare", "import", "evaluate", "generate", "train", "export")
"""Kinds of phases in the order in which a run comes to them."""


COLUMNS = ("key", "type", "default", "range", "may change", "meaning")


def page() -> str:
    """The whole page."""
    sections = [HEAD, _section("Top level", Config, "")]
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name == "baselines":
            sections.append(_section("`baselines.NAME`", BaselineConfig, "baselines.NAME."))
        elif field.name == "guards":
            sections.append(_guards())
        elif dataclasses.is_dataclass(hints[field.name]):
            sections.append(_section(f"`{field.name}`", hints[field.name], f"{field.name}."))
    return "\n".join(sections)


def _section(title: str, kind: type, prefix: str) -> str:
    """A heading, the docstring of ``kind`` and the table of its fields, whose keys begin with ``prefix``."""
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = []
    for field in dataclasses.fields(kind):
        has_own_section = dataclasses.is_dataclass(hints[field.name]) or field.name == "baselines"
        if not has_own_section:
            rows.append(_row(field.name, kind, field.name, prefix + field.name))
    return _table(title, kind, rows)


def _guards() -> str:
    """All guards in one table, since they share their keys."""
    rows = [_row("NAME.action", Guard, "action", "guards")]
    for name, kind in typing.get_type_hints(GuardsConfig).items():
        row = _row(f"{name}.threshold", kind, "threshold", "guards")
        row[-1] = f"{markdown(inspect.getdoc(kind) or '', one_line=True)}<br>Default: {row[-1]}"
        rows.append(row)
    return _table("`guards`", GuardsConfig, rows)


def _row(name: str, kind: type, field_name: str, key: str) -> list[str]:
    """The cells of the field ``field_name`` of ``kind``, which the page calls ``name``; ``key`` is its dotted key."""
    [field] = [field for field in dataclasses.fields(kind) if field.name == field_name]
    hint = typing.get_type_hints(kind, include_extras=True)[field_name]
    meaning = markdown(field_docs(kind)[field_name], one_line=True)
    return [f"`{name}`", type_text(hint), default_text(field), range_text(hint), change_text(key), meaning]


def _table(title: str, kind: type, rows: list[list[str]]) -> str:
    lines = [f"## {title}", "", markdown(inspect.getdoc(kind) or ""), ""]
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, ""])


def field_docs(kind: type) -> dict[str, str]:
    """The docstring after each field of the dataclass ``kind`` and of its bases; empty where there is none."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            docs[statement.target.id] = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def markdown(text: str, *, one_line: bool = False) -> str:
    """A docstring as Markdown: code in single backticks, references by their last name."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = text.replace("``", "`")
    if one_line:
        text = text.replace("\n\n", "<br>").replace("\n", " ")
    return text


def type_text(kind: Any) -> str:
    """The type ``kind`` in a few words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        lists = [member for member in arguments if typing.get_origin(member) is list]
        others = [type_text(member) for member in arguments if member not in lists]
        return " or ".join(others) + (", per iteration" if lists else "")
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of names to {type_text(arguments[1])}"
    names: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}
    return "`null`" if kind is type(None) else names[kind]


def default_text(field: "dataclasses.Field[Any]") -> str:
    """The default of a field in YAML."""
    if is_required(field):
        return "required"
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"`{value:.1e}`".replace("e-0", "e-")
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def range_text(kind: Any) -> str:
    """The range beside a field; empty without one."""
    for marker in getattr(kind, "__metadata__", ()):
        if isinstance(marker, Range):
            return marker.interval
    return ""


def change_text(key: str) -> str:
    """Until when the value of ``key`` may change in a run."""
    until = [_until(use) for use in uses_of(key) if use.phases]
    return "until " + "; ".join(until) if until else "always"


def _until(use: Use) -> str:
    kinds = sorted(use.phases, key=ORDER.index)
    if use.own_baseline:
        return "`train:NAME`"
    if use.part is not None:
        return f"`{kinds[0]}` for {use.part.name}"
    if use.by_iteration:
        return " and ".join(f"`{kind}:T`" for kind in kinds)
    if kinds[0] in ("prepare", "import"):
        return f"`{kinds[0]}`"
    return f"the first `{kinds[0]}`" + (f" from iteration {use.from_iteration} on" if use.from_iteration else "")


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
