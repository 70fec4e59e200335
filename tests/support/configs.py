"""Configurations that need no files."""

from pathlib import Path
from typing import Any

import yaml

from megatron_spin.config import Config, from_dict

MINIMAL: dict[str, Any] = {"name": "run", "model": {"hf": "model"}, "data": {"path": "data.jsonl"}}
"""What every configuration must have."""


def build(**sections: Any) -> Config:
    """:data:`MINIMAL` with ``sections``."""
    return from_dict({**MINIMAL, **sections})


def write_yaml(directory: Path, value: object) -> Path:
    """Writes ``value``, text as it is, as ``config.yaml`` into ``directory``; returns its path."""
    path = directory / "config.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path
