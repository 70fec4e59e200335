"""``tools/prepare.py``."""

from megatron_spin import cli
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.run.directory import RunDir


def main() -> None:
    """Prepares the data of a run."""
    parser = cli.config_parser(
        "Read, check and tokenize the data into RUN_DIR/data, with a held-out part if the config asks for one."
    )
    config, root = cli.read_config(cli.parse(parser))
    run_dir = RunDir(root)

    def start() -> Phase:
        from megatron_spin.phases.prepare import Prepare

        return Prepare(config, run_dir)

    carry_out("prepare", config, run_dir, start)
