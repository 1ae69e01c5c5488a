"""Reading parts of safetensors files, and writing them array by array.

The format is a length, a JSON header and raw arrays; the library's NumPy reader has no
bfloat16, which most published weights are in, and its writer wants all arrays at once.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
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
    """Where an array lies; ``parts`` reads slices of it."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def parts(self) -> "Parts":
        """To be indexed with a slice per axis."""
        return Parts(self)


class Parts:
    """An array in a file; ``parts[2:4, :8]`` reads those bytes and no others.

    Not a memory map: that reads whole pages and those that follow, and where columns
    are cut into short pieces that is the whole array.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getitem__(self, cut: tuple[slice, ...]) -> np.ndarray:
        """A slice for each of one or two axes, steps of 1."""
        file, offset, shape, dtype = self.tensor
        bounds = [part.indices(size)[:2] for part, size in zip(cut, shape, strict=True)]
        (first, last), *inner = bounds
        width = prod(shape[1:])
        start, stop = inner[0] if inner else (0, 1)
        size = dtype.itemsize
        with file.open("rb", buffering=0) as stream:
            if stop - start == width:
                stream.seek(offset + first * width * size)
                found = np.fromfile(stream, dtype, (last - first) * width)
            else:
                found = np.empty((last - first, stop - start), dtype)
                for row, into in enumerate(found.view(np.uint8), first):
                    at = offset + (row * width + start) * size
                    if os.preadv(stream.fileno(), [into], at) != into.nbytes:
                        raise ValueError(f"{file}: truncated")
        return found.reshape([end - begin for begin, end in bounds])


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


class Planned(NamedTuple):
    """An array that is to be written."""

    name: str
    shape: tuple[int, ...]
    # Asked for when its turn has come; on all processes alike. None where another
    # process writes.
    fetch: Callable[[], np.ndarray | None]


def write_folder(
    folder: Path,
    arrays: Sequence[Planned],
    dtype: np.dtype,
    shard_bytes: int,
    write: bool = True,
) -> list[str]:
    """Write arrays one after the other; no more than one is in memory.

    Args:
        folder: gets one file, or shards with their index.
        arrays: in the order in which they are asked for.
        dtype: of the files.
        shard_bytes: of a file at most; a larger array has one of its own.
        write: False to ask for the arrays only, as another process needs it.

    Returns:
        Names of the files.
    """
    shards: list[list[Planned]] = [[]]
    room = shard_bytes
    for array in arrays:
        size = prod(array.shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(array)
        room -= size
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    total = 0
    for name, shard in zip(names, shards, strict=True):
        if not write:
            for array in shard:
                array.fetch()
            continue
        total += _write_file(folder / name, shard, dtype)
    if write and count > 1:
        weight_map = {
            array.name: name
            for name, shard in zip(names, shards, strict=True)
            for array in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _write_file(file: Path, arrays: Iterable[Planned], dtype: np.dtype) -> int:
    """One file; bytes of its arrays."""
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for array in arrays:
        begin, end = end, end + prod(array.shape) * dtype.itemsize
        header[array.name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at multiples of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            content = array.fetch()
            assert content is not None
            assert content.shape == array.shape, array.name
            stream.write(np.ascontiguousarray(content, dtype).view(np.uint8).data)
    return end
