"""An experiment: a YAML file with seeds and arms. An arm is the quickstart's self-play with some keys changed."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_spin.config.parsing import Loader
from megatron_spin.errors import ConfigError
from megatron_spin.run.directory import RunDir


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train, run once per seed."""

    overrides: dict[str, Any]
    """Keys of the configuration (with dots) and their values."""
    data: str = "spin"
    """The training file among those of make_problems.py, without its suffix."""
    after: str | None = None
    """The arm whose last policy this one starts from; None: the SFT model."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parsed YAML file."""

    name: str
    title: str
    seeds: list[int]
    arms: dict[str, Arm]
    best: dict[str, list[str]]
    """Rows that take, for each seed, the one of several rows with the best sampled exact match."""
    columns: dict[str, str]
    """Further columns of the table: title, and a share in ``eval.json``."""
    claims: list[tuple[str, str]]
    """Pairs of rows (left, right): for how many seeds was the left one's sampled exact match higher?"""

    def run_dir(self, root: Path, seed: int, arm: str) -> RunDir:
        """The directory below ``root`` for ``arm`` with ``seed``. Equal arms of different experiments share one run."""
        return RunDir(root / f"seed_{seed}" / self._key(arm))

    def _key(self, name: str) -> str:
        """Ten hexadecimal digits of the hash of everything in which arms differ."""
        arm = self.arms[name]
        what = [arm.overrides, arm.data, self._key(arm.after) if arm.after is not None else None]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def read_experiment(path: Path) -> Experiment:
    """Reads and checks an experiment.

    Raises:
        ConfigError: the file is missing, is not YAML, has an unknown key, or names an arm that does not exist.
    """
    try:
        raw = yaml.load(path.read_text(), Loader=Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"experiment {path} cannot be read ({error}): give one of the YAML files in examples/experiments/"
        ) from None
    known = {"title", "seeds", "common", "arms", "best", "columns", "claims"}
    if not isinstance(raw, dict) or not {"title", "seeds", "arms"} <= set(raw) <= known:
        raise ConfigError(
            f"experiment {path}: it needs title, seeds and arms, and may have common, best, columns and claims"
        )
    arms = {}
    for name, settings in raw["arms"].items():
        merged = {**raw.get("common", {}), **settings}
        special = {key: merged.pop(key) for key in ("data", "after") if key in merged}
        arms[name] = Arm(merged, **special)
    for name, arm in arms.items():
        if arm.after is not None and (arm.after not in arms or list(arms).index(arm.after) >= list(arms).index(name)):
            raise ConfigError(f"experiment {path}: arm {name} comes after {arm.after}, which is no arm above it")
    claims = [(left, right) for left, right in raw.get("claims", [])]
    return Experiment(
        path.stem, raw["title"], list(raw["seeds"]), arms, raw.get("best", {}), raw.get("columns", {}), claims
    )
