"""Reading parts of safetensors files, memory-mapped.

The format is a length, a JSON header and raw arrays; the library's NumPy reader has no
bfloat16, which most published weights are in.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensor(NamedTuple):
    """Where an array lies; ``array`` maps it without reading it."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def array(self) -> np.ndarray:
        """A read-only memory map; slices of it read only their pages."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_json(file: Path) -> Any:
    """Content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error


def read_header(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of one file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no safetensors file, or of an unknown dtype.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: truncated, or not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: not a safetensors file ({error})") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name} has dtype {entry['dtype']}; known are "
                f"{', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(
                f"{file}: truncated: {name} should end at byte {8 + length + end}, the "
                f"file has {size}"
            )
        tensors[name] = Tensor(file, 8 + length + begin, shape, dtype)
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of a checkpoint folder, single or sharded.

    Raises:
        FileNotFoundError: no such folder, or a shard of the index is missing.
        ValueError: no safetensors in it; pickles are refused.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of weights")
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not weight_map:
            raise ValueError(f"{folder / INDEX}: no weight_map")
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder}: only pickled weights ({pickles[0]}), which can run code "
                "when they are read. Convert them once, where you trust them: "
                "AutoModel.from_pretrained(folder).save_pretrained(folder, "
                "safe_serialization=True)"
            )
        raise ValueError(f"{folder}: expected {SINGLE} or {INDEX}")
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {name}, which is missing")
        tensors |= read_header(folder / name)
    return tensors
