"""Trains one iteration, or one continued-SFT baseline."""

from megatron_spin import cli
from megatron_spin.commands.train import main

if __name__ == "__main__":
    cli.run(main)
