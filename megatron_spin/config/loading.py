"""Between YAML and :class:`Config`."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_spin.config import rules
from megatron_spin.config.config import Config
from megatron_spin.config.parsing import Loader, apply_override, parse
from megatron_spin.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, applies ``key=value`` overrides (values are YAML) and checks all that needs no other file.

    Raises:
        ConfigError: unreadable YAML, unknown key (names the nearest known one), wrong type, or a value out of range.
    """
    try:
        raw = yaml.load(path.read_text(), Loader=Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist: give the path of a YAML file, see examples/configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read ({error}): give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config file {path} holds no mapping: its top level needs name, model and data, see examples/configs/"
        )
    for override in overrides:
        apply_override(raw, override)
    return from_dict(raw)


def from_dict(raw: dict[str, Any]) -> Config:
    """Builds and checks a :class:`Config` from plain data; raises like :func:`load_config`."""
    config = typing.cast(Config, parse(Config, raw, ""))
    rules.check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which :func:`load_config` reads back to an equal :class:`Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
