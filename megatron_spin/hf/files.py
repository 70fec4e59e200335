"""The files of a Hugging Face model directory: its config, and its tensors one at a time. No Megatron."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_spin.errors import CheckpointError
from megatron_spin.hf.assets import check_directory, read_json_object

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The dtypes that a model can have, by their names in the configuration."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_HEADER_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_NAMES = {"fp32": "F32", "bf16": "BF16"}
"""Names of dtypes in the header of a safetensors file."""


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a file says of one tensor."""

    file: str
    dtype: str
    """Its name in safetensors."""
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a Hugging Face directory by name, from one ``model.safetensors`` or several files with an index.

    Making one reads every header, so that a truncated or missing file is found before anything is loaded. The bytes of
    a tensor are read on demand. No file stays open: what a process has read from a mapped file counts as its memory for
    as long as the file is.

    Raises:
        CheckpointError: no safetensors, a file that the index names is missing, or a file is corrupted.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.directory = Path(hf_dir)
        self._headers = self._read_headers()

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._headers)

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return self._headers[name].shape

    def dtype(self, name: str) -> torch.dtype | None:
        """Floating point dtype from the header; None if the tensor holds anything else, as in a quantized model."""
        return _HEADER_DTYPES.get(self._headers[name].dtype)

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the file's own dtype; its memory is the file's, mapped for as long as it lives.

        Raises:
            CheckpointError: the file cannot be read, or the tensor is not floating point.
        """
        if self.dtype(name) is None:
            raise CheckpointError(
                f"tensor {name} in {self.directory} is not floating point: "
                "quantized models are not supported, use a full one"
            )
        path = self.directory / self._headers[name].file
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read from {path} ({error}): copy the model again") from None

    def _read_headers(self) -> dict[str, _Header]:
        check_directory(self.directory)
        if (self.directory / SINGLE_FILE).is_file():
            return self._headers_of(SINGLE_FILE)
        weight_map = _weight_map(self.directory)
        present = {file: self._headers_of(file) for file in sorted(set(weight_map.values()))}
        headers = {}
        for name, file in weight_map.items():
            if name not in present[file]:
                raise CheckpointError(
                    f"tensor {name} is not in {self.directory / file}, where {INDEX_FILE} says it is: "
                    "copy the model again"
                )
            headers[name] = present[file][name]
        return headers

    def _headers_of(self, file: str) -> dict[str, _Header]:
        path = self.directory / file
        headers = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    header = opened.get_slice(name)
                    headers[name] = _Header(file, header.get_dtype(), tuple(header.get_shape()))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, but {INDEX_FILE} names it: copy the model again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is corrupted or truncated ({error}): copy the model again") from None
        return headers


def weight_files(hf_dir: Path) -> list[str]:
    """Names of the files that hold the weights, the index among them if there is one.

    Raises:
        CheckpointError: there are no safetensors, or the index is damaged.
    """
    check_directory(hf_dir)
    if (hf_dir / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    return [INDEX_FILE, *sorted(set(_weight_map(hf_dir).values()))]


def _weight_map(hf_dir: Path) -> dict[str, str]:
    """Tensor name to file name, from the index."""
    index = hf_dir / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{hf_dir} holds neither {SINGLE_FILE} nor {INDEX_FILE}: save it with transformers' save_pretrained"
        )
    weight_map: dict[str, str] | None = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map: copy the model again")
    return weight_map


def write_safetensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes ``tensors`` as ``model.safetensors``, or as numbered files with an index beyond ``max_shard_bytes``.

    Each tensor goes to disk as it comes; one at a time is in memory.

    Args:
        shapes: of all tensors, by name, in the order in which they come.
        dtype: ``fp32`` or ``bf16``, of all tensors.
        max_shard_bytes: a tensor that would make a file larger begins the next one; none is split.

    Raises:
        OSError: the disk is full or not writable, with the system's error number.
    """
    itemsize = DTYPES[dtype].itemsize
    sizes = {name: torch.Size(shape).numel() * itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    incoming = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        with open(directory / file_name, "wb") as file:
            file.write(_file_header(names, shapes, sizes, _HEADER_NAMES[dtype]))
            for expected in names:
                name, tensor = next(incoming)
                assert (name, tuple(tensor.shape), tensor.dtype) == (expected, tuple(shapes[name]), DTYPES[dtype])
                if tensor.numel():  # an empty tensor has no bytes to view
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _file_header(
    names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str
) -> bytes:
    """The beginning of a safetensors file whose tensors follow each other in the order of ``names``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, start + sizes[name]]}
        start += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes, as safetensors' own do
    return len(text).to_bytes(8, "little") + text
