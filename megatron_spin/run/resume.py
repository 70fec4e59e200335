"""Whether a run may be continued with a configuration: what was made so far, and what contradicts it."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spin.config import Config, load_config
from megatron_spin.config.resume import PHASES, Change, changes
from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json, sha256

if TYPE_CHECKING:
    from megatron_spin.run.directory import RunDir

RECORD = "config_changes.jsonl"
"""One line per setting that changed when the run was continued: time, key, old, new."""


def check_resume(run_dir: "RunDir", config: Config) -> list[Change]:
    """What differs between the run's configuration and ``config``; none of it contradicts what was made.

    Raises:
        RunDirError: ``config`` contradicts what was made.
    """
    if run_dir.root.exists() and not run_dir.root.is_dir():
        raise RunDirError(f"{run_dir.root} is not a directory: choose another --run-dir")
    if not run_dir.config.exists():
        return []
    old = load_config(run_dir.config)
    found = changes(old, config, made_phases(run_dir))
    refused: dict[str, str] = {}
    for change in found:
        reason = _contradiction(run_dir, old, change)
        if reason is not None:
            refused[change.key] = reason
    if refused:
        raise RunDirError(
            f"{run_dir.root} belongs to a run with other values of {', '.join(refused)}: restore them or choose "
            f"another --run-dir ({'; '.join(refused.values())})"
        )
    return found


STACK = "stack"
"""Detail of a phase's record: device, kernels and versions that it ran with."""


def as_started(run_dir: "RunDir", config: Config) -> Config:
    """``config`` with the layer spec that the run started with in place of ``auto``.

    Transformer Engine may have been installed in between, and a run must not change its numbers without a word. A
    machine without a GPU, on which a run may be prepared, has only the local spec and decides nothing.
    """
    if config.layer_spec != "auto" or config.model.provider is not None:
        return config
    for record in run_dir.records():
        stack = record.details.get(STACK, {})
        spec = stack.get("layer_spec", "auto")
        if spec == "transformer_engine" or "CUDA" in stack.get("versions", {}):
            return dataclasses.replace(config, layer_spec=spec)
    return config


def record_changes(run_dir: "RunDir", found: list[Change]) -> None:
    """Appends ``found`` to :data:`RECORD`."""
    if not found:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(run_dir.root / RECORD, "a") as file:
        for change in found:
            entry = {"time": now, "key": change.key, "old": change.old, "new": change.new}
            file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")


def made_phases(run_dir: "RunDir") -> set[str]:
    """The phases that are done, or have left something that they would take up again."""
    made = {phase for phase in ("prepare", "import") if run_dir.is_done(phase)}
    iterations = [run_dir.target(iteration=int(number)) for number in _labels(run_dir.root, "iteration_")]
    baselines = [run_dir.target(baseline=name) for name in _labels(run_dir.root / "baselines", "")]
    for target in iterations + baselines:
        for kind in PHASES:
            phase = f"{kind}:{target.label}"
            if run_dir.is_done(phase):
                made.add(phase)
        # Preferences are pairs that prepare makes, so that what decides about pairs is fixed with them, too.
        if any(target.generated.glob("shard_*.json")) or (target.pairs / "manifest.json").exists():
            made.add(f"generate:{target.label}")
        if any(target.checkpoints.glob("iter_*")):
            made.add(f"train:{target.label}")
    return made


def _labels(directory: Path, prefix: str) -> list[str]:
    """What follows ``prefix`` in the names of the directories in ``directory``."""
    return [path.name.removeprefix(prefix) for path in directory.glob(f"{prefix}*") if path.is_dir()]


def _contradiction(run_dir: "RunDir", old: Config, change: Change) -> str | None:
    """Why ``change`` contradicts what was made, or None."""
    if change.phase is None:
        return None
    if change.is_name and isinstance(change.old, str) and isinstance(change.new, str):
        if Path(change.old).resolve() == Path(change.new).resolve():
            return None
        if change.key == "model.hf":
            return _other_model(run_dir, old, Path(change.new))
        return _other_file(run_dir, change.key, Path(change.new))
    reason = f"{change.phase} was made with {change.key}={change.old}"
    if change.by_iteration:
        reason += ", a list of values changes later iterations alone"
    return reason


def _other_file(run_dir: "RunDir", key: str, path: Path) -> str | None:
    """Why ``path`` is not the data file that prepare read for ``key``, or None."""
    recorded = read_json(run_dir.data / "manifest.json").get("files", {}).get(key)
    if recorded is None:
        return f"the run is older than the record of its data files, so {key} must name the same path"
    if not path.is_file():
        return f"{key}={path} does not exist"
    if sha256(path) != recorded:
        return f"{key}={path} is not the file that prepare read"
    return None


def _other_model(run_dir: "RunDir", old: Config, path: Path) -> str | None:
    """Why ``path`` is not the model that the run began with, or None."""
    from megatron_spin.data.templates import tokenizer_sha
    from megatron_spin.hf.assets import CHECKPOINT_ASSETS
    from megatron_spin.hf.identity import has_identity

    if not (path / "config.json").is_file():
        return f"model.hf={path} holds no config.json"
    if run_dir.is_done("prepare") and tokenizer_sha(path) != read_json(run_dir.data / "manifest.json")["tokenizer"]:
        return f"model.hf={path} has another tokenizer than the one that prepare read"
    imported = run_dir.base / CHECKPOINT_ASSETS / "config.json"
    if imported.is_file():
        differing = _differing_config(imported, path / "config.json")
        if differing:
            return f"model.hf={path} has another config.json than the model that the run began with ({differing[0]})"
    known = _known_identities(run_dir, old)
    if not known:
        return None
    # Weights that agree in fp32 agree in bf16, so that one hash is enough.
    dtype = "fp32" if "fp32" in known else "bf16"
    if not has_identity(path, dtype, known[dtype]):
        return f"model.hf={path} holds other weights than the model that the run began with"
    return None


WRITTEN_BY_TOOLS = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Keys of a model's ``config.json`` that do not change the model: import sets the dtype, transformers the others."""


def _differing_config(before: Path, now: Path) -> list[str]:
    """Keys whose values differ between two ``config.json`` files and change the model."""
    old, new = read_json(before), read_json(now)
    keys = (old.keys() | new.keys()) - set(WRITTEN_BY_TOOLS)
    return sorted(key for key in keys if old.get(key) != new.get(key))


def _known_identities(run_dir: "RunDir", old: Config) -> dict[str, str]:
    """Identity of the model that the run began with, by dtype, from each phase that read it."""
    known = {}
    imported = run_dir.record("import")
    if imported is not None:
        known[imported.details["dtype"]] = imported.details["identity"]
    start = run_dir.target(baseline="sft")
    if start.eval.exists():
        known[old.precision.export_dtype] = read_json(start.eval)["model"]
    pairs = run_dir.target(iteration=0).pairs / "manifest.json"
    if pairs.exists():
        known[old.precision.export_dtype] = read_json(pairs)["opponent"]
    return known
