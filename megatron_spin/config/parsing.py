"""Plain data into frozen dataclasses, by their annotations.

Every key must be known and every value of its type and in its range; otherwise one line names the key.
"""

import dataclasses
import difflib
import re
import types
import typing
from typing import Annotated, Any, Literal

import yaml

from megatron_spin.config.values import MergedOver, Range, as_list
from megatron_spin.errors import ConfigError


class Loader(yaml.SafeLoader):
    """Reads 5e-7 as a number, which is what everybody who writes it means; YAML 1.1 takes it for text without a dot."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets in ``raw`` what ``override`` (``some.key=value``, the value in YAML) says.

    Raises:
        ConfigError: there is no ``=``, the value is not YAML, or a part of the key before the last is no section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value: write for example spin.beta=0.2")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r} goes through {parent!r}, which is not a section: check the dots")
        node = child
    try:
        node[last] = yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None


def parse(kind: Any, value: Any, path: str) -> Any:
    """Converts plain data into the annotated type ``kind``; ``path`` is the dotted key, for messages.

    Raises:
        ConfigError: unknown or missing key, or a value of another type or out of its range.
    """
    if dataclasses.is_dataclass(kind):
        return _parse_section(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _parse_annotated(arguments[0], arguments[1:], value, path)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(kind, value, path)
    if origin is Literal:
        if value is False and "off" in arguments:  # YAML 1.1 reads a bare off as false
            return "off"
        # 1 equals True, so the type must be compared, too.
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
    elif origin is list:
        if isinstance(value, list) and value:
            return [parse(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {str(key): parse(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    elif kind is float:
        if type(value) in (int, float):
            return float(value)
    elif kind is Any or type(value) is kind:
        return value
    raise ConfigError(f"{path}: {value!r} is not {describe(kind)}")


def _parse_annotated(kind: Any, markers: tuple[Any, ...], value: Any, path: str) -> Any:
    parsed = parse(kind, value, path)
    for marker in markers:
        if isinstance(marker, MergedOver):
            parsed = {**marker.defaults, **parsed}
        if isinstance(marker, Range):
            for item in as_list(parsed):
                _check_range(marker, item, path)
    return parsed


def _check_range(allowed: Range, value: Any, path: str) -> None:
    if not isinstance(value, int | float) or value in allowed:  # null and words have no range
        return
    hint = f": {allowed.hint}" if allowed.hint else ""
    raise ConfigError(f"{path}={value} {allowed.rule}{hint}")


def _parse_union(kind: Any, value: Any, path: str) -> Any:
    """The first member that takes ``value``; if none does and one is of its shape, that member's message is the
    best."""
    best: ConfigError | None = None
    for member in typing.get_args(kind):
        try:
            return parse(member, value, path)
        except ConfigError as error:
            if _has_shape(member, value):
                best = error
    raise best or ConfigError(f"{path}: {value!r} is not {describe(kind)}")


def _has_shape(kind: Any, value: Any) -> bool:
    """Whether ``value`` is a mapping for a section or a mapping, or a list (not empty) for a list."""
    if isinstance(value, list):
        return typing.get_origin(kind) is list and bool(value)
    return isinstance(value, dict) and (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict)


def _parse_section(kind: type, value: Any, path: str) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {value!r} is not a section with keys")
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    parsed = {}
    for key, item in value.items():
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown config key {prefix}{key}: {hint}")
        parsed[key] = parse(hints[key], item, f"{prefix}{key}")
    for name, field in fields.items():
        if name not in parsed and is_required(field):
            raise ConfigError(f"config key {prefix}{name} is missing: it has no default")
    return kind(**parsed)


def is_required(field: "dataclasses.Field[Any]") -> bool:
    """Whether a dataclass field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def describe(kind: Any) -> str:
    """The type ``kind`` in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        members = dict.fromkeys(describe(member) for member in arguments)  # in order, each once
        return " or ".join(members)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list with one value per iteration ({describe(arguments[0])})"
    if origin is dict:
        return "a mapping"
    names: dict[Any, str] = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(kind, str(kind))


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; an empty one stays as it is."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat
