"""YAML and ``key=value`` overrides into frozen dataclasses, by their annotations: every key known, every value of its type, or one line that names
the key.
"""

import dataclasses
import difflib
import re
import types
import typing
from typing import Any, Literal

import yaml

from megatron_spin.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML 1.1 takes 5e-7 for a string, since it has no dot; everybody who writes it means a number."""


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
    """Converts plain data into the annotated type ``kind``.

    Raises:
        ConfigError: unknown or missing key, or a value of another type; ``path``, the dotted key, stands in the message.
    """
    if dataclasses.is_dataclass(kind):
        return _parse_section(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return parse(option, value, path)
            except ConfigError:
                continue
    elif origin is Literal:
        if value is False and "off" in arguments:  # YAML 1.1 reads a bare off as false
            return "off"
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
    elif origin is list:
        if isinstance(value, list) and value:
            return [parse(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {str(key): parse(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    elif (
        kind is Any
        or (kind is type(None) and value is None)
        or (isinstance(value, bool) and kind is bool)
        or (kind in (int, str) and type(value) is kind)
    ):
        return value
    elif kind is float and type(value) in (int, float):
        return float(value)
    raise ConfigError(f"{path}: {value!r} is not {_describe(kind)}")


def _parse_section(kind: type, value: Any, path: str) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {value!r} is not a section with keys")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    parsed = {}
    for key, item in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            hint = (
                f"did you mean {f'{path}.{nearest[0]}' if path else nearest[0]}?"
                if nearest
                else f"known keys: {', '.join(fields)}"
            )
            raise ConfigError(f"unknown config key {where}: {hint}")
        parsed[key] = parse(hints[key], item, where)
    for name, field in fields.items():
        if name not in parsed and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"config key {f'{path}.{name}' if path else name} is missing: it has no default")
    return kind(**parsed)


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(option) for option in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list with a value an iteration ({_describe(arguments[0])})"
    names: dict[Any, str] = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return "a mapping" if origin is dict else names.get(kind, str(kind))


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; an empty one stays as it is."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat
