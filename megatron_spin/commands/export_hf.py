"""``tools/export_hf.py``."""

import argparse
from pathlib import Path

from megatron_spin import cli
from megatron_spin.commands import conversion
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.parallel.collectives import on_rank_zero
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.processes import Ranks, rank, world_size
from megatron_spin.run.directory import Target


def _parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(
        description="Megatron checkpoint to Hugging Face directory, alone or under torchrun, at any parallel layout."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="checkpoint directory; its latest step counts (default: the target's checkpoints)",
    )
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face directory to write (default: the target's hf)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="dtype of the files (default: the config's precision.export, else the checkpoint's own)",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--iteration", type=int, metavar="T", help="with --config: self-play iteration, from 0")
    target.add_argument("--baseline", metavar="NAME", help="with --config: a name under `baselines`")
    conversion.add_arguments(parser)
    return cli.parse(parser)


def main() -> None:
    """Exports a checkpoint, as a phase of a run or alone."""
    arguments = _parse_arguments()
    is_named = arguments.iteration is not None or arguments.baseline is not None
    if is_named != (arguments.config is not None):
        raise ConfigError("--config goes together with --iteration T or --baseline NAME: give both or neither")
    run = conversion.read_run(arguments)
    if run is None:
        phase = _start(arguments, None, None)
        phase.check()
        phase.run()
    else:
        target = run.run_dir.target(iteration=arguments.iteration, baseline=arguments.baseline)
        carry_out("export", run.config, run.run_dir, lambda: _start(arguments, run, target), target=target)


def _start(arguments: argparse.Namespace, run: conversion.Run | None, target: Target | None) -> Phase:
    hf, checkpoint = arguments.hf, arguments.checkpoint
    if run is not None and target is not None:
        phase, run_dir = f"train:{target.label}", run.run_dir
        if not on_rank_zero(Ranks(rank(), world_size()), lambda: run_dir.is_done(phase)):
            raise RunDirError(
                f"train:{target.label} has not finished: finish it first, or export without --config to look at a "
                "checkpoint"
            )
        conversion.check_is_own(checkpoint, target.checkpoints)
        conversion.check_is_own(hf, target.hf)
        hf, checkpoint = target.hf, target.checkpoints
    if hf is None or checkpoint is None:
        raise ConfigError(
            "--checkpoint and --hf are both needed without --config: give the checkpoint's directory and the one to "
            "write"
        )

    from megatron_spin.hf.assets import CHECKPOINT_ASSETS, read_hf_config, stored_dtype
    from megatron_spin.parallel.setup import choose_device

    assets = checkpoint / CHECKPOINT_ASSETS
    dtype = arguments.dtype
    if dtype is None:
        dtype = run.config.precision.export_dtype if run is not None else stored_dtype(read_hf_config(assets))
    compute_dtype = run.config.precision.dtype if run is not None else dtype
    config = conversion.conversion_config(arguments, run, hf_dir=assets, dtype=compute_dtype)
    choose_device(
        config.device, deterministic=config.training.deterministic
    )  # before Megatron is imported, by the next line
    from megatron_spin.phases.export_model import ExportModel

    return ExportModel(config, checkpoint, hf, dtype=dtype)
