"""Megatron checkpoint to Hugging Face directory, alone or under torchrun."""

from megatron_spin import cli
from megatron_spin.commands.export_hf import main

if __name__ == "__main__":
    cli.run(main)
