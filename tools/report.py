"""Shows what a run measured."""

from megatron_spin import cli
from megatron_spin.commands.report import main

if __name__ == "__main__":
    cli.run(main)
