"""Looks whether an iteration is fit to become the opponent: warns, stops (status 2) or rolls back, as `guards` in the config says."""

from megatron_spin import cli
from megatron_spin.phases.guard import guard, settled
from megatron_spin.run.directory import RunDir


def main() -> None:
    parser = cli.config_parser(__doc__ or "")
    parser.add_argument("--iteration", type=int, required=True, metavar="T", help="self-play iteration, from 0")
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    run_dir.open(config)
    if settled(config, run_dir, arguments.iteration):
        print(f"guard:{arguments.iteration} is already done")
        return
    guard(config, run_dir, arguments.iteration)


if __name__ == "__main__":
    cli.run(main)
