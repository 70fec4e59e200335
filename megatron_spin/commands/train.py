"""``tools/train.py``."""

from megatron_spin import cli
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.run.directory import RunDir


def main() -> None:
    """Trains an iteration or a baseline."""
    parser = cli.config_parser(
        "Train one iteration or baseline: score the opponent once, check, train, checkpoint. Run it under torchrun "
        "with one process per GPU (or CPU rank): torchrun --nproc-per-node N tools/train.py CONFIG --run-dir DIR "
        "--iteration T. Run it again to resume."
    )
    cli.add_target(parser)
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    target = run_dir.target(iteration=arguments.iteration, baseline=arguments.baseline)

    def start() -> Phase:
        from megatron_spin.parallel.setup import choose_device

        choose_device(
            config.device, deterministic=config.training.deterministic
        )  # before Megatron is imported, by the next line
        from megatron_spin.phases.train import Train

        return Train(config, run_dir, target)

    carry_out("train", config, run_dir, start, target=target)
