"""Tensors in safetensors files, whole or in pieces, read slice by slice straight to where they are wanted.

A tensor of a model may itself be sharded (a DTensor): then only this rank's shard is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpoints.errors import CheckpointError

Shape = tuple[int, ...]
# The names that safetensors has for them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**23  # bytes that are hashed and written at once


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that begins at `offset`: what `file` has under `name`."""

    file: Path
    name: str
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files. Nothing is read before it is asked for."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read_into(self, part: Tensor, offset: Shape) -> None:
        """Fills `part`, which begins at `offset` of the whole, in its own dtype and on its own device.

        Raises CheckpointError for a file that cannot be read.
        """
        for piece in self.pieces:
            starts = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            ends = zip(offset, part.shape, piece.offset, piece.shape, strict=True)
            stops = [min(a + n, b + m) for a, n, b, m in ends]
            if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, piece.offset, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, offset, strict=True))
            try:
                # Opened for each slice, since the pages of a mapped file count as this process's until it is closed.
                with safe_open(piece.file, "pt") as file:
                    found = file.get_slice(piece.name)[there] if there else file.get_tensor(piece.name)
                    part[here].copy_(found)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{piece.file} cannot be read ({error}); restore it") from None

    def whole(self) -> Tensor:
        """On the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor, (0,) * len(self.shape))
        return tensor

    def placed_like(self, like: Tensor) -> Tensor:
        """A new tensor of the stored dtype, on the device of `like` and sharded as it is."""
        tensor = torch.empty_like(like, dtype=self.dtype)
        fill(tensor, self)
        return tensor


@torch.no_grad()
def fill(tensor: Tensor, source: StoredTensor | Tensor) -> None:
    """Copies a whole tensor, stored or in memory, into `tensor`; into this rank's shard of it, if it is sharded."""
    local, offset = local_part(tensor)
    if isinstance(source, StoredTensor):
        source.read_into(local, offset)
    else:
        ends = zip(offset, local.shape, strict=True)
        local.copy_(source[tuple(slice(start, start + size) for start, size in ends)])


def fill_parameters(model: nn.Module, sources: Mapping[str, StoredTensor | Tensor]) -> None:
    """Fills a model's parameters, one tensor at a time; `sources` has all of them by name, in their shapes."""
    for name, parameter in model.named_parameters():
        fill(parameter, sources[name])


def local_part(tensor: Tensor) -> tuple[Tensor, Shape]:
    """(what this rank holds of a tensor, where in it that begins)."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), tuple(offset)


def is_written_here(tensor: Tensor, rank: int) -> bool:
    """Whether this rank writes what it holds of a tensor: of replicas the first one does, of a plain tensor rank 0."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    if tensor.numel() == 0:
        return tensor.device_mesh.get_coordinate() == [0] * tensor.device_mesh.ndim
    coordinates = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    first = all(coordinate == 0 for coordinate, placement in coordinates if placement.is_replicate())
    return first and tensor.to_local().numel() > 0


def stored_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, each whole. Raises SafetensorError, or OSError, if it is none."""
    found = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            header = opened.get_slice(name)
            if (dtype := DTYPES.get(header.get_dtype())) is None:
                raise SafetensorError(f"{name} has dtype {header.get_dtype()}, which is not supported")
            shape = tuple(header.get_shape())
            found[name] = StoredTensor(shape, dtype, (Piece(file, name, (0,) * len(shape), shape),))
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Writes contiguous CPU tensors as a safetensors file, durably; {"bytes", "sha256"} of what was to be written.

    safetensors' own writer would have the file read again for its hash.
    """
    # The largest elements first, so that every tensor is aligned, as safetensors has it.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for content in (head, *(_bytes(tensor) for _, tensor in ordered)):
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[file.write(chunk) :]
            size += len(content)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
