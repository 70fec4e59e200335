"""The opponent of an iteration answers every prompt; its answers beside the real ones are the training pairs."""

from megatron_spin import cli
from megatron_spin.commands.generate import main

if __name__ == "__main__":
    cli.run(main)
