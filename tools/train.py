"""Trains one self-play iteration, or one continued-SFT baseline: scores the opponent once, checks, trains, checkpoints."""

import os

from megatron_spin import cli


def main() -> None:
    parser = cli.config_parser(
        "Train one iteration or baseline. Run it under torchrun with one process a GPU (or CPU rank): "
        "torchrun --nproc-per-node N tools/train.py CONFIG --run-dir DIR --iteration T. Run it again to resume."
    )
    cli.add_target(parser)
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)

    from megatron_spin.parallel.setup import check_config, choose_device
    from megatron_spin.run.directory import RunDir

    run_dir = RunDir(root)
    target = run_dir.target(iteration=arguments.iteration, baseline=arguments.baseline)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if run_dir.is_done(f"train:{target.label}"):
        if rank == 0:
            print(f"train:{target.label} is already done")
        return
    device = choose_device(config.device)
    check_config(config, device, world_size=world_size)

    from megatron_spin.phases.train import (
        read_inputs,
        train,
    )  # after choose_device, which installs the CPU adapter before Megatron
    from megatron_spin.training.optimizer import optimizer_config

    optimizer_config(config, learning_rate=1.0)
    inputs = read_inputs(config, run_dir, target)
    if rank == 0:
        run_dir.open(config)
    train(config, run_dir, target, inputs, device)


if __name__ == "__main__":
    cli.run(main)
