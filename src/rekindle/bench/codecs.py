"""What each codec makes of real weights: size, and the rates of packing and unpacking, against memcpy and entropy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rekindle.bench.hardware import Hardware
from rekindle.errors import InvalidRequest
from rekindle.store.codecs.interface import FRAME_BYTES, ElementType
from rekindle.store.codecs.measure import Measured, measure
from rekindle.store.codecs.planes import entropy_bits, split
from rekindle.store.codecs.registry import probed_codecs
from rekindle.store.model_source import NUMPY_DTYPES, SourceTensor, converted
from rekindle.store.safetensors_file import DTYPE_BYTES, TensorEntry, tensor_index

DTYPES = ("BF16", "F16", "F32")
_SYNTHETIC_DEVIATION = 0.02
_NUM_COPIES = 5


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes to pack, of one dtype; `source` says where they come from."""

    dtype: str
    source: str
    content: bytes


@dataclass(frozen=True, slots=True)
class DtypeResult:
    """All codecs on the weights of one dtype. `entropy_share` is the least share of the bytes that coding each plane's
    bytes one by one can reach (their order-0 entropy, with one code for all of the data)."""

    dtype: str
    source: str
    num_bytes: int
    entropy_share: float
    memcpy_bytes_s: float
    codecs: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class CodecsReport:
    """Everything one run found. `unavailable` maps codecs to reasons."""

    version: str
    hardware: Hardware
    num_threads: int
    results: tuple[DtypeResult, ...]
    unavailable: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one tensor lies."""

    label: str
    path: Path
    entry: TensorEntry


def weights_of(files: Sequence[tuple[str, Path]], num_bytes: int) -> list[Weights]:
    """Up to `num_bytes` of each dtype from safetensors files, given with their labels: of every tensor the same share.

    Where no file has a dtype, F32 weights are rounded to it; where there are none either, weights are drawn.

    Raises:
        InvalidRequest: a file cannot be read or is no safetensors file, or none has weights of these dtypes.
    """
    try:
        tensors = [
            _Tensor(label, path, entry)
            for label, path in files
            for entry in tensor_index(path, rejected=InvalidRequest).values()
            if entry.num_bytes
        ]
        found = {dtype: _read([each for each in tensors if each.entry.dtype == dtype], num_bytes) for dtype in DTYPES}
    except OSError as error:
        raise InvalidRequest(f"{error.filename} cannot be read: {error.strerror}", field="data") from error
    if files and not any(found.values()):
        labels = ", ".join(label for label, _ in files)
        raise InvalidRequest(f"no tensors of {', '.join(DTYPES)} in {labels}", field="data")
    return [found[dtype] or _rounded(found["F32"], dtype) or _drawn(dtype, num_bytes) for dtype in DTYPES]


def measure_weights(weights: Weights, threads: ThreadPoolExecutor, say: Callable[[str], None]) -> DtypeResult:
    """Every codec that works here, on these weights."""
    figures = []
    for probed in probed_codecs():
        if probed.codec is not None:
            say(f"{weights.dtype}: {probed.name}")
            figures.append(measure(probed.codec, weights.content, weights.dtype, threads))
    return DtypeResult(
        dtype=weights.dtype,
        source=weights.source,
        num_bytes=len(weights.content),
        entropy_share=_entropy_share(weights),
        memcpy_bytes_s=_copy_rate(weights.content, threads),
        codecs=tuple(figures),
    )


HEADER = ("CODEC", "SIZE", "RATIO", "PACK GB/s", "UNPACK GB/s", "OF memcpy")


def rows(result: DtypeResult) -> list[tuple[str, ...]]:
    """The result's table under `HEADER`, memcpy and the entropy bound first."""
    bound = result.entropy_share
    return [
        ("memcpy", "", "", "", f"{result.memcpy_bytes_s / 1e9:.2f}", ""),
        ("entropy bound", f"{bound:.3f}", _ratio(bound), "", "", ""),
        *(
            (
                figures.codec,
                f"{figures.share:.3f}",
                _ratio(figures.share),
                f"{figures.pack_bytes_s / 1e9:.2f}",
                f"{figures.unpack_bytes_s / 1e9:.2f}",
                f"{figures.unpack_bytes_s / result.memcpy_bytes_s:.2f}",
            )
            for figures in result.codecs
        ),
    ]


def _read(tensors: Sequence[_Tensor], num_bytes: int) -> Weights | None:
    """The same share of each of these tensors, which are of one dtype."""
    if not tensors:
        return None
    dtype = tensors[0].entry.dtype
    share = min(1.0, num_bytes / sum(tensor.entry.num_bytes for tensor in tensors))
    width, parts = DTYPE_BYTES[dtype], []
    for tensor in tensors:
        with tensor.path.open("rb") as file:
            file.seek(tensor.entry.offset)
            parts.append(file.read(-(-round(tensor.entry.num_bytes * share) // width) * width))
    labels = dict.fromkeys(tensor.label for tensor in tensors)
    return Weights(dtype, ", ".join(labels), b"".join(parts))


def _rounded(weights: Weights | None, dtype: str) -> Weights | None:
    if weights is None:
        return None
    values = np.frombuffer(weights.content, NUMPY_DTYPES["F32"])
    tensor = SourceTensor(weights.source, "F32", values.shape, lambda: iter([values]))
    return Weights(dtype, f"{weights.source} (F32 rounded to {dtype})", b"".join(converted(tensor, dtype)))


def _drawn(dtype: str, num_bytes: int) -> Weights:
    num_elements = max(1, num_bytes // DTYPE_BYTES[dtype])
    values = np.random.default_rng(0).standard_normal(num_elements, np.float32) * np.float32(_SYNTHETIC_DEVIATION)
    tensor = SourceTensor("synthetic", "F32", values.shape, lambda: iter([values]))
    source = f"synthetic weights, normal with deviation {_SYNTHETIC_DEVIATION:g}"
    return Weights(dtype, source, b"".join(converted(tensor, dtype)))


def _entropy_share(weights: Weights) -> float:
    planes = split(memoryview(weights.content), ElementType.of(weights.dtype))
    return sum(map(entropy_bits, planes)) / (8 * len(planes))


def _copy_rate(content: bytes, threads: ThreadPoolExecutor) -> float:
    source = np.frombuffer(content, np.uint8)
    target = source.copy()
    starts = range(0, len(source), FRAME_BYTES)

    def copy(start: int) -> None:
        np.copyto(target[start : start + FRAME_BYTES], source[start : start + FRAME_BYTES])

    durations_s = []
    for _ in range(_NUM_COPIES):
        started_s = time.perf_counter()
        list(threads.map(copy, starts))
        durations_s.append(time.perf_counter() - started_s)
    return len(source) / min(durations_s)


def _ratio(share: float) -> str:
    return f"{1 / share:.2f}"
