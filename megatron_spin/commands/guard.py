"""``tools/guard.py``."""

from megatron_spin import cli
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.run.directory import RunDir


def main() -> None:
    """Judges an iteration."""
    parser = cli.config_parser(
        "Judge whether an iteration is fit to become the opponent: warn, stop (status 2) or roll back, as `guards` in "
        "the config says."
    )
    parser.add_argument("--iteration", type=int, required=True, metavar="T", help="self-play iteration, from 0")
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    target = run_dir.target(iteration=arguments.iteration)

    def start() -> Phase:
        from megatron_spin.phases.guard import Guard

        return Guard(config, run_dir, target)

    carry_out("guard", config, run_dir, start, target=target)
