"""Files of random weights to load: the tensors of a model in bfloat16, as safetensors and as PyTorch saves them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from pathlib import Path

import torch

from rekindle.errors import ConfigurationError
from rekindle.store.checksums import write_checked_tensors
from rekindle.store.reading import aligned_buffer, read_file
from rekindle.store.safetensors_file import TensorStream, header_of
from rekindle.units import MIB, format_bytes

_ELEMENT_BYTES = 2
_LAYERS = 16
"""About how many a file holds; the smallest and largest files hold fewer and more."""

_MIN_WIDTH, _MAX_WIDTH = 64, 4096
_PIECE_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """One set of tensors, stored twice. `num_bytes` is the length of the safetensors file."""

    safetensors: Path
    pytorch: Path
    num_tensors: int
    num_bytes: int


def tensor_shapes(num_bytes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder's matrices and norms in bfloat16 that fill `num_bytes` (at least 2), an odd byte aside."""
    left = num_bytes // _ELEMENT_BYTES
    # Per layer: q and o, k and v a quarter as high, gate, up and down 3.5 times as wide; 13 squares in all.
    width = min(max(1 << isqrt(left // (13 * _LAYERS)).bit_length() >> 1, _MIN_WIDTH), _MAX_WIDTH)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in itertools.count():
        for name, (rows, *columns) in _layer(width):
            row = prod(columns)
            shape = (min(rows, left // row), *columns) if left >= row else (left,)
            shapes[f"layers.{layer}.{name}"] = shape
            left -= prod(shape)
            if not left:
                return shapes
    raise AssertionError("layers are counted without end")


@contextmanager
def weight_files(directory: Path, num_bytes: int) -> Iterator[WeightFiles]:
    """Both files in `directory`, synced to the disk; removed when the context ends.

    Raises:
        ConfigurationError: the disk has no room for them.
    """
    free = shutil.disk_usage(directory).free
    if free < 2 * num_bytes + 64 * MIB:
        raise ConfigurationError(
            f"files of {format_bytes(num_bytes)} need twice that in {directory}, which has {format_bytes(free)} free; "
            "leave that size out or choose another --dir"
        )
    safetensors, pytorch = directory / "weights.safetensors", directory / "weights.pt"
    shapes = tensor_shapes(num_bytes)
    streams = [TensorStream(name, "BF16", shape, partial(_random_pieces, shape)) for name, shape in shapes.items()]
    try:
        write_checked_tensors(safetensors, streams, metadata={"format": "pt"}, observe=lambda _: None)
        torch.save(_tensors(safetensors), pytorch)
        for path in (safetensors, pytorch):
            _sync(path)
        yield WeightFiles(safetensors, pytorch, len(streams), safetensors.stat().st_size)
    finally:
        for path in directory.glob("weights.*"):
            path.unlink()


def tensors_of(content: memoryview, name: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file in memory, as views."""
    return {
        tensor: torch.frombuffer(
            content, dtype=torch.bfloat16, count=entry.num_bytes // _ELEMENT_BYTES, offset=entry.offset
        ).view(entry.shape)
        for tensor, entry in header_of(content, name).entries.items()
    }


def _layer(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "input_layernorm.weight", (width,)
    for name, rows in (("q", width), ("k", width // 4), ("v", width // 4), ("o", width)):
        yield f"self_attn.{name}_proj.weight", (rows, width)
    yield "post_attention_layernorm.weight", (width,)
    yield "mlp.gate_proj.weight", (width * 7 // 2, width)
    yield "mlp.up_proj.weight", (width * 7 // 2, width)
    yield "mlp.down_proj.weight", (width, width * 7 // 2)


def _random_pieces(shape: tuple[int, ...]) -> Iterator[bytes]:
    left = torch.Size(shape).numel() * _ELEMENT_BYTES
    while left:
        piece = os.urandom(min(left, _PIECE_BYTES))
        left -= len(piece)
        yield piece


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Each with memory of its own, or `torch.save` would store the whole buffer they are views of."""
    buffer = memoryview(aligned_buffer(path.stat().st_size))
    return {name: view.clone() for name, view in tensors_of(buffer[: read_file(path, buffer)], path.name).items()}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
