"""``tools/import_hf.py``."""

import argparse
from pathlib import Path

from megatron_spin import cli
from megatron_spin.commands import conversion
from megatron_spin.errors import ConfigError
from megatron_spin.phases.frame import Phase, carry_out


def _parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(
        description="Hugging Face directory to Megatron checkpoint (step 0), alone or under torchrun, at any parallel "
        "layout."
    )
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face model directory (default: the config's model.hf)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="checkpoint directory to write (default: RUN_DIR/base)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="dtype of the weights (default: the config's precision.dtype, else the model's own)",
    )
    conversion.add_arguments(parser)
    return cli.parse(parser)


def main() -> None:
    """Imports a model, as a phase of a run or alone."""
    arguments = _parse_arguments()
    run = conversion.read_run(arguments)
    if run is None:
        phase = _start(arguments, None)
        phase.check()
        phase.run()
    else:
        carry_out("import", run.config, run.run_dir, lambda: _start(arguments, run))


def _start(arguments: argparse.Namespace, run: conversion.Run | None) -> Phase:
    hf, checkpoint = arguments.hf, arguments.checkpoint
    if run is not None:
        conversion.check_is_own(checkpoint, run.run_dir.base)
        hf = hf or Path(run.config.model.hf)
        checkpoint = run.run_dir.base
    if hf is None or checkpoint is None:
        raise ConfigError(
            "--hf and --checkpoint are both needed without --config: give the model's directory and the one to write"
        )

    from megatron_spin.hf.assets import read_hf_config, stored_dtype
    from megatron_spin.parallel.setup import choose_device

    dtype = arguments.dtype
    if dtype is None:
        dtype = run.config.precision.dtype if run is not None else stored_dtype(read_hf_config(hf))
    config = conversion.conversion_config(arguments, run, hf_dir=hf, dtype=dtype)
    choose_device(
        config.device, deterministic=config.training.deterministic
    )  # before Megatron is imported, by the next line
    from megatron_spin.phases.import_model import ImportModel

    return ImportModel(config, checkpoint)
