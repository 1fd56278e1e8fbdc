"""The CPU kernels in C++, called through ctypes.

The libraries are compiled when the package is installed, one per instruction set; the best that this CPU supports is
used. Records that stay the same over a step (batches, the pool, a group) are passed by address and made once; they are
recognised by identity. A `NativeKernels` therefore belongs to one thread at a time.

All results are batch-invariant: a row's bits depend neither on the other rows, nor on the number of threads, nor on how
its context was split into steps. Different instruction sets may round differently.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from rekindle.engine.arena import OWN_ARENA, Arena
from rekindle.engine.kernels.interface import (
    LORA_FIELDS,
    PROJECTIONS,
    AttentionBatch,
    AttentionShape,
    KVPool,
    LoraBatch,
    LoraGroup,
    PackedLinear,
    Rows,
)
from rekindle.engine.kernels.linear import LinearOps
from rekindle.errors import InternalError

VARIANTS = ("avx512bf16", "avx512", "avx2", "baseline")
"""Instruction sets a library may have been compiled for, best first."""

_HEAD_DIM_MULTIPLE = 8
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_ADDRESS, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "rms_norm": (_ADDRESS, _INT64, _INT64, _INT64, _INT64, _INT64, _ADDRESS, _FLOAT, _ADDRESS, _INT),
    "add_rms_norm": (_ADDRESS, _INT64, _ADDRESS, _INT64, _INT64, _INT64, _ADDRESS, _FLOAT, _ADDRESS, _INT),
    "gated_activation": (_ADDRESS, _INT64, _INT64, _INT64, _INT, _ADDRESS, _INT),
    "rope_and_store": (_ADDRESS, _INT64, _ADDRESS, _ADDRESS, _ADDRESS, _INT64, _ADDRESS, _ADDRESS, _INT),
    "attention": (_ADDRESS, _INT64, _ADDRESS, _ADDRESS, _INT64, _ADDRESS, _ADDRESS, _INT),
    "lora": (_ADDRESS, _INT64, _INT64, _ADDRESS, _INT64, _ADDRESS, _INT64, _ADDRESS, _INT),
}


class _AttentionBatchRecord(ctypes.Structure):
    _fields_ = (
        ("query_start", _ADDRESS),
        ("context", _ADDRESS),
        ("pages", _ADDRESS),
        ("slots", _ADDRESS),
        ("num_sequences", _INT64),
        ("num_rows", _INT64),
        ("pages_stride", _INT64),
    )


class _AttentionShapeRecord(ctypes.Structure):
    _fields_ = (
        ("num_heads", _INT64),
        ("num_kv_heads", _INT64),
        ("head_dim", _INT64),
        ("window", _INT64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class _KVPoolRecord(ctypes.Structure):
    _fields_ = (
        ("base", _ADDRESS),
        ("page_tokens", _INT64),
        ("page_stride", _INT64),
        ("layer_stride", _INT64),
        ("token_stride", _INT64),
    )


class _LoraBatchRecord(ctypes.Structure):
    _fields_ = (
        ("row_start", _ADDRESS),
        ("tables", _ADDRESS),
        ("vectors", _ADDRESS),
        ("num_segments", _INT64),
        ("layer_stride", _INT64),
    )


class _LoraGroupRecord(ctypes.Structure):
    _fields_ = (("first", _INT64), ("count", _INT64), ("out_offsets", _ADDRESS), ("out_sizes", _ADDRESS))


@dataclass(frozen=True, slots=True)
class _Bound:
    """A record of C, what it was made from, and the memory it points into."""

    source: object
    address: int
    memory: tuple[object, ...]


def _bind(source: object, record: ctypes.Structure, *memory: object) -> _Bound:
    return _Bound(source, ctypes.addressof(record), (record, *memory))


def _bind_attention_batch(batch: AttentionBatch) -> _Bound:
    tensors = (batch.query_start_S1, batch.context_S, batch.pages_SM.contiguous(), batch.slots_T)
    record = _AttentionBatchRecord(
        *(tensor.data_ptr() for tensor in tensors), len(batch.context), len(batch.slots_T), tensors[2].shape[1]
    )
    return _bind(batch, record, *tensors)


def _bind_shape(shape: AttentionShape) -> _Bound:
    if shape.head_dim % _HEAD_DIM_MULTIPLE:
        raise InternalError(f"native attention has no head size {shape.head_dim}: use `load_native` to choose kernels")
    record = _AttentionShapeRecord(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.window, shape.scale, shape.softcap
    )
    return _bind(shape, record)


def _bind_pool(pool: KVPool) -> _Bound:
    kv_PLBCD = pool.kv_PLBCD
    page_stride, layer_stride, token_stride, *_ = kv_PLBCD.stride()
    record = _KVPoolRecord(kv_PLBCD.data_ptr(), kv_PLBCD.shape[2], page_stride, layer_stride, token_stride)
    return _bind(pool, record, kv_PLBCD)


def _bind_lora_batch(batch: LoraBatch) -> _Bound:
    tensors = (batch.row_start_G1, batch.tables_G, batch.places_G)
    addresses = (tensor.data_ptr() for tensor in tensors)
    record = _LoraBatchRecord(*addresses, len(batch.adapters), len(PROJECTIONS) * LORA_FIELDS)
    return _bind(batch, record, *tensors)


def _bind_group(group: LoraGroup) -> _Bound:
    count = len(group.out_sizes)
    offsets, sizes = (_INT64 * count)(*group.out_offsets), (_INT64 * count)(*group.out_sizes)
    record = _LoraGroupRecord(group.first, count, ctypes.addressof(offsets), ctypes.addressof(sizes))
    return _bind(group, record, offsets, sizes)


class NativeLibrary:
    """One compiled library, for one instruction set: its operations by the dtype they compute in."""

    def __init__(self, variant: str, library: ctypes.CDLL) -> None:
        self.variant = variant
        self.has_linear = bool(library.rekindle_has_linear())
        self.lanes = int(library.rekindle_lanes())
        self._library = library

    def operation(self, name: str) -> dict[torch.dtype, Any]:
        """The functions of one operation, by dtype."""
        return {dtype: self._function(f"{name}_{suffix}", _ARGUMENTS[name]) for dtype, suffix in _SUFFIXES.items()}

    def rms_norm(self) -> dict[tuple[torch.dtype, torch.dtype], Any]:
        """The functions of `rms_norm`, by the dtypes they read and write."""
        suffixes = {(dtype, dtype): suffix for dtype, suffix in _SUFFIXES.items()}
        suffixes[torch.float32, torch.bfloat16] = "f32_bf16"
        arguments = _ARGUMENTS["rms_norm"]
        return {dtypes: self._function(f"rms_norm_{suffix}", arguments) for dtypes, suffix in suffixes.items()}

    def linear(self) -> tuple[Any, Any]:
        """The functions that pack a bf16 weight and that apply it."""
        pack = (_ADDRESS, _INT64, _INT64, _INT64, _ADDRESS, _INT)
        apply = (_ADDRESS, _INT64, _INT64, _INT64, _ADDRESS, _ADDRESS, _ADDRESS, _INT64, _INT64, _INT)
        return self._function("linear_pack", pack), self._function("linear", apply)

    def _function(self, name: str, arguments: tuple[type, ...]) -> Any:
        function = self._library[f"rekindle_{name}"]
        function.argtypes, function.restype = arguments, None
        return function


class NativeLinear:
    """A bf16 linear layer whose weight was regrouped for reading once per step, in memory of the arena."""

    def __init__(self, library: NativeLibrary, weight_NK: Rows, bias_N: Rows | None, arena: Arena) -> None:
        self.out_features, self.in_features = weight_NK.shape
        pack, self._apply = library.linear()
        num_panels = -(-self.out_features // library.lanes)
        words = -(-self.in_features // 2)

        def fill(packed: torch.Tensor) -> None:
            target = packed.data_ptr()
            for block_NK in weight_NK.blocks(library.lanes):
                rows_NK = block_NK if block_NK.stride(1) == 1 else block_NK.contiguous()
                source, stride = rows_NK.data_ptr(), rows_NK.stride(0)
                pack(source, stride, len(rows_NK), self.in_features, target, torch.get_num_threads())
                target += len(rows_NK) * words * packed.itemsize

        self._packed = arena.take(num_panels * words * library.lanes, torch.int32, fill)
        self._packed_address = self._packed.data_ptr()
        self._bias_N = None if bias_N is None else bias_N.whole().clone()
        self._bias_address = None if self._bias_N is None else self._bias_N.data_ptr()

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        rows = x_TK.shape[0]
        outputs = self.out_features
        y_TN = x_TK.new_empty(rows, outputs)
        self._apply(
            x_TK.data_ptr(),
            x_TK.stride(0),
            rows,
            self.in_features,
            self._packed_address,
            self._bias_address,
            y_TN.data_ptr(),
            outputs,
            outputs,
            torch.get_num_threads(),
        )
        return y_TN


class NativeKernels:
    """See `Kernels` for the contract of each operation. Matrix products that have no native form come from `linear`."""

    def __init__(self, library: NativeLibrary, linear: LinearOps) -> None:
        self.library = library
        self._linear = linear
        self._rms_norm = library.rms_norm()
        self._add_rms_norm = library.operation("add_rms_norm")
        self._gated_activation = library.operation("gated_activation")
        self._rope_and_store = library.operation("rope_and_store")
        self._attention = library.operation("attention")
        self._lora = library.operation("lora")
        nothing = _Bound(None, 0, ())
        self._attention_batch, self._pool = nothing, nothing
        self._lora_batches = (nothing, nothing)
        self._shapes: dict[int, _Bound] = {}
        self._groups: dict[int, _Bound] = {}

    @property
    def layout(self) -> str | None:
        return f"panels-{self.library.lanes}" if self.library.has_linear else None

    def pack_linear(self, weight_NK: Rows, bias_N: Rows | None, arena: Arena = OWN_ARENA) -> PackedLinear:
        if self.library.has_linear and weight_NK.dtype == torch.bfloat16:
            return NativeLinear(self.library, weight_NK, bias_N, arena)
        return self._linear.pack(weight_NK, bias_N)

    def multiply(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return self._linear.multiply(x_TK, weight_NK)

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        shape = x_TH.shape
        if len(shape) not in (2, 3):
            return self.rms_norm(x_TH.reshape(-1, shape[-1]), weight_H, eps, dtype).view(shape)
        inner_rows = 1 if len(shape) == 2 else shape[1]
        strides = x_TH.stride()
        out_TH = x_TH.new_empty(shape, dtype=dtype or x_TH.dtype)
        self._rms_norm[x_TH.dtype, out_TH.dtype](
            x_TH.data_ptr(),
            strides[0],
            inner_rows,
            strides[-2],
            shape[0] * inner_rows,
            shape[-1],
            weight_H.data_ptr(),
            eps,
            out_TH.data_ptr(),
            torch.get_num_threads(),
        )
        return out_TH

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> torch.Tensor:
        rows, size = shape = x_TH.shape
        out_TH = x_TH.new_empty(shape)
        self._add_rms_norm[x_TH.dtype](
            x_TH.data_ptr(),
            x_TH.stride(0),
            residual_TH.data_ptr(),
            residual_TH.stride(0),
            rows,
            size,
            weight_H.data_ptr(),
            eps,
            out_TH.data_ptr(),
            torch.get_num_threads(),
        )
        return out_TH

    def rope_and_store(
        self,
        qkv_TE: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        pool: KVPool,
        layer: int,
        batch: AttentionBatch,
        shape: AttentionShape,
    ) -> None:
        self._rope_and_store[qkv_TE.dtype](
            qkv_TE.data_ptr(),
            qkv_TE.stride(0),
            cos_TD.data_ptr(),
            sin_TD.data_ptr(),
            self._pool_address(pool),
            layer,
            self._attention_batch_address(batch),
            self._shape_address(shape),
            torch.get_num_threads(),
        )

    def attention(
        self, qkv_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
    ) -> torch.Tensor:
        out_TE = qkv_TE.new_empty(qkv_TE.shape[0], shape.num_heads * shape.head_dim)
        self._attention[qkv_TE.dtype](
            qkv_TE.data_ptr(),
            qkv_TE.stride(0),
            out_TE.data_ptr(),
            self._pool_address(pool),
            layer,
            self._attention_batch_address(batch),
            self._shape_address(shape),
            torch.get_num_threads(),
        )
        return out_TE

    def gated_activation(self, gate_up_TF: torch.Tensor, activation: str) -> torch.Tensor:
        rows, columns = gate_up_TF.shape
        out_TF = gate_up_TF.new_empty(rows, columns // 2)
        self._gated_activation[gate_up_TF.dtype](
            gate_up_TF.data_ptr(),
            gate_up_TF.stride(0),
            rows,
            columns // 2,
            activation == "silu",
            out_TF.data_ptr(),
            torch.get_num_threads(),
        )
        return out_TF

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        x_stride, _ = x_TK.stride()
        self._lora[x_TK.dtype](
            x_TK.data_ptr(),
            x_stride,
            x_TK.shape[1],
            y_TN.data_ptr(),
            y_TN.stride(0),
            self._lora_batch_address(batch),
            layer,
            self._group_address(group),
            torch.get_num_threads(),
        )

    def _attention_batch_address(self, batch: AttentionBatch) -> int:
        if self._attention_batch.source is not batch:
            self._attention_batch = _bind_attention_batch(batch)
        return self._attention_batch.address

    def _pool_address(self, pool: KVPool) -> int:
        if self._pool.source is not pool:
            self._pool = _bind_pool(pool)
        return self._pool.address

    def _lora_batch_address(self, batch: LoraBatch) -> int:
        """A step may have two batches that take turns."""
        latest, other = self._lora_batches
        if latest.source is not batch:
            latest, other = other if other.source is batch else _bind_lora_batch(batch), latest
            self._lora_batches = latest, other
        return latest.address

    def _shape_address(self, shape: AttentionShape) -> int:
        bound = self._shapes.get(id(shape))
        if bound is None:
            bound = self._shapes[id(shape)] = _bind_shape(shape)
        return bound.address

    def _group_address(self, group: LoraGroup) -> int:
        bound = self._groups.get(id(group))
        if bound is None:
            bound = self._groups[id(group)] = _bind_group(group)
        return bound.address


def supported_libraries() -> list[NativeLibrary]:
    """The libraries that were built and that this CPU can run, best first."""
    if not _share_openmp_runtime():
        return []
    found = []
    for variant in VARIANTS:
        path = _library_path(variant)
        if path is not None and (library := _load(path)) is not None:
            found.append(NativeLibrary(variant, library))
    return found


def load_native(linear: LinearOps, shapes: Iterable[AttentionShape]) -> NativeKernels | None:
    """The native kernels for this CPU, or None where they do not serve attention of these shapes, no library was built
    or torch's OpenMP runtime is not found."""
    if any(shape.head_dim % _HEAD_DIM_MULTIPLE for shape in shapes):
        return None
    libraries = supported_libraries()
    return NativeKernels(libraries[0], linear) if libraries else None


def _library_path(variant: str) -> Path | None:
    directory = Path(__file__).parent / "native"
    candidates = (directory / f"_{variant}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None  # built for another system, or against symbols that this OpenMP runtime lacks
    return library if library.rekindle_is_supported() else None


def _share_openmp_runtime() -> bool:
    """Let libraries loaded from now on use the OpenMP runtime that torch has loaded; False if there is none.

    The kernels are linked against no runtime of their own: two pools of threads would fight over the cores.
    """
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "omp" in line and "/" in line}
    runtimes = [path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    if not runtimes:
        return False
    beside_torch = [path for path in runtimes if "torch" in Path(path).parts or "torch.libs" in Path(path).parts]
    ctypes.CDLL((beside_torch or runtimes)[0], mode=ctypes.RTLD_GLOBAL)
    return True
