"""``tools/generate.py``."""

from megatron_spin import cli
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.run.directory import RunDir


def main() -> None:
    """Generates the answers of an iteration's opponent."""
    parser = cli.config_parser(
        "Generate the opponent's answers of one iteration, and write the training pairs. Run it again to continue."
    )
    parser.add_argument("--iteration", type=int, metavar="T", required=True, help="self-play iteration, from 0")
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    target = run_dir.target(iteration=arguments.iteration)

    def start() -> Phase:
        from megatron_spin.phases.generate import Generate

        return Generate(config, run_dir, target)

    carry_out("generate", config, run_dir, start, target=target)
