"""What can be checked before anything is started, so that a mistake costs seconds and not a night. No torch."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_spin.config import Config, Engine, at_iteration
from megatron_spin.errors import CheckpointError, ConfigError, DataError, RunDirError
from megatron_spin.io import read_json
from megatron_spin.log import logger
from megatron_spin.machine import version_of
from megatron_spin.run.devices import check_torch, check_vllm, generation_groups, gpus_of, installed_vllm
from megatron_spin.run.estimate import DiskEstimate, estimate_disk
from megatron_spin.run.plan import Plan, PlannedPhase
from megatron_spin.run.result import num_played
from megatron_spin.spin.objective import build_objective, num_iterations

WEIGHT_FILES = ("*.safetensors",)


def check(plan: Plan, phases: Sequence[PlannedPhase]) -> None:
    """Checks what those of ``phases`` that are still to do will need; training's own settings are for another room.

    Raises:
        SpinError: the first thing that is missing or cannot be, in one line.
    """
    todo = [phase for phase in phases if phase.status == "todo"]
    if not todo:
        return
    config = plan.config
    plan.run_dir.check(config)
    _check_baselines(plan)
    for iteration in range(num_iterations(config)):
        build_objective(config, iteration)  # the parameters of a late iteration must not fail after days of training
    check_torch(gpus_of(config), version_of("torch"))
    _check_model(Path(config.model.hf))
    kinds = [phase.kind for phase in todo]
    if "prepare" in kinds:
        _check_data(config)
    _check_engines(config, [phase for phase in todo if phase.kind in ("generate", "evaluate")])
    disk = estimate_disk(
        config, _num_parameters(Path(config.model.hf)), imports=kinds.count("import"), models=kinds.count("train")
    )
    _check_disk(plan.run_dir.root, disk)


def _check_baselines(plan: Plan) -> None:
    """A finished baseline must have the steps of as many iterations as are played now.

    More iterations, or a rollback that was lifted, would make it stale.
    """
    now = num_played(plan.config, plan.run_dir)
    for name, baseline in plan.config.baselines.items():
        record = plan.run_dir.record(f"train:{name}")
        then = record.details.get("iterations", now) if record is not None else now
        if isinstance(baseline.steps, str) and then != now:
            raise RunDirError(
                f"baselines.{name} ({baseline.steps}) was trained with the steps of {then} iterations, but {now} are "
                "played now: give it another name under baselines, where it is trained anew"
            )


def _check_model(hf: Path) -> None:
    if not (hf / "config.json").is_file():
        raise CheckpointError(
            f"model.hf={hf} holds no config.json: give the directory of a Hugging Face model (it is not downloaded)"
        )
    if not any(any(hf.glob(pattern)) for pattern in WEIGHT_FILES):
        raise CheckpointError(
            f"model.hf={hf} holds no weights (*.safetensors): give the directory of a complete Hugging Face model"
        )


def _check_data(config: Config) -> None:
    for key, path in config.data_files.items():
        if not Path(path).exists():
            raise DataError(f"{key}={path} does not exist: give a JSONL, JSON or Parquet file of SFT data")


def _check_engines(config: Config, phases: Sequence[PlannedPhase]) -> None:
    engines: set[Engine] = set()
    for phase in phases:
        iteration = int(phase.label) if phase.label.isdigit() else 0
        engines.add(at_iteration(config.generation.engine, iteration))
        generation_groups(config, iteration, gpus_of(config))
    for engine in engines:
        module = {"vllm": "vllm", "hf": "transformers"}[engine]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"generation.engine={engine} needs the Python package {module}, which {sys.executable} lacks: run "
                "`make setup`"
            )
    installed = installed_vllm()
    if "vllm" in engines and installed:  # without a distribution it is a checkout, which the engine asks itself
        check_vllm(config.device, gpus_of(config), installed)


def _num_parameters(hf: Path) -> int:
    """Parameters of the model in ``hf``, by the size of its files."""
    weights = sum(file.stat().st_size for pattern in WEIGHT_FILES for file in hf.glob(pattern))
    model = read_json(hf / "config.json")
    return weights // (4 if model.get("dtype", model.get("torch_dtype")) == "float32" else 2)


def _check_disk(root: Path, disk: DiskEstimate) -> None:
    """Refuses a run that cannot finish its next model, warns if it cannot finish all."""
    existing = root
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < disk.next_model:
        raise RunDirError(
            f"{existing} has {_gb(free)} free, one trained model takes up to {_gb(disk.next_model)} while it is made: "
            "free some space, lower training.keep_checkpoints or choose another --run-dir"
        )
    if free < disk.peak:
        logger.warning(
            f"{existing} has {_gb(free)} free, this run takes up to {_gb(disk.peak)} and leaves {_gb(disk.resident)}: "
            "free some space or lower training.keep_checkpoints"
        )


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
