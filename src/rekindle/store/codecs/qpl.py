"""Inflate through Intel's Query Processing Library: on an In-Memory Analytics Accelerator, or in its own software.

The library has no Python binding; the job record below is that of its C header (qpl 1.x, 64-bit). A library that is not
what this module takes it for could end the process, so it proves itself in a process of its own first:
`python -m rekindle.store.codecs.qpl PATH LIBRARY`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np

from rekindle.store.codecs.entropy import huffman_only
from rekindle.store.codecs.interface import CodecUnavailable
from rekindle.store.codecs.planes import Plane
from rekindle.store.safetensors_file import Bytes

PATHS = {"iaa": 1, "software": 2}
"""Where the library decodes."""

_OPERATION_DECOMPRESS = 0
_FIRST, _LAST = 1, 2
_STATUS_OK = 0
_ANY_NODE = -1
_PROOF_S = 20.0

_UINT32, _ADDRESS = ctypes.c_uint32, ctypes.c_void_p


class _Job(ctypes.Structure):
    """The fields that inflate reads and writes, at the header's offsets; `qpl_get_job_size` says how many follow."""

    _fields_ = (
        ("next_in", _ADDRESS),
        ("available_in", _UINT32),
        ("total_in", _UINT32),
        ("next_out", _ADDRESS),
        ("available_out", _UINT32),
        ("total_out", _UINT32),
        ("operation", _UINT32),
        ("flags", _UINT32),
        ("unused", ctypes.c_uint8 * (188 - 40)),
        ("numa_id", ctypes.c_int32),
    )


class QplStreams:
    """Streams inflated by one path of the library, with a job of its own for each thread."""

    def __init__(self, path: str, library_name: str) -> None:
        self._path = PATHS[path]
        self._library = ctypes.CDLL(library_name)
        self._library.qpl_get_job_size.argtypes = (ctypes.c_int, ctypes.POINTER(_UINT32))
        self._library.qpl_init_job.argtypes = (ctypes.c_int, _ADDRESS)
        self._library.qpl_execute_job.argtypes = (_ADDRESS,)
        self._of_thread = threading.local()
        self._job()

    def encode(self, stream: Plane) -> bytes:
        """See `StreamCoder`."""
        return huffman_only(stream)

    def decode(self, streams: Sequence[memoryview], sizes: Sequence[int]) -> Sequence[Bytes]:
        """See `StreamCoder`."""
        return [self._decode(stream, size) for stream, size in zip(streams, sizes, strict=True)]

    def _decode(self, stream: memoryview, size: int) -> Bytes:
        source, out = np.frombuffer(stream, np.uint8), np.empty(size, np.uint8)
        job = self._job()
        job.operation, job.flags, job.numa_id = _OPERATION_DECOMPRESS, _FIRST | _LAST, _ANY_NODE
        job.next_in, job.available_in, job.total_in = source.ctypes.data, len(source), 0
        job.next_out, job.available_out, job.total_out = out.ctypes.data, size, 0
        status = self._library.qpl_execute_job(ctypes.byref(job))
        if status != _STATUS_OK or job.total_out != size:
            raise ValueError(f"QPL gave status {status} and {job.total_out} bytes, expected {size}")
        return out.data

    def _job(self) -> _Job:
        job: _Job | None = getattr(self._of_thread, "job", None)
        if job is None:
            size = _UINT32()
            status = self._library.qpl_get_job_size(self._path, ctypes.byref(size))
            if status != _STATUS_OK or size.value < ctypes.sizeof(_Job):
                raise CodecUnavailable(f"QPL gave status {status} and a job of {size.value} bytes")
            self._of_thread.memory = ctypes.create_string_buffer(size.value)
            job = self._of_thread.job = _Job.from_buffer(self._of_thread.memory)
            status = self._library.qpl_init_job(self._path, ctypes.byref(job))
            if status != _STATUS_OK:
                del self._of_thread.job
                raise CodecUnavailable(f"QPL cannot use this path here: status {status}")
        return job


def qpl_streams(path: str, library_name: str | None = None) -> QplStreams:
    """Inflate by `path`, one of `PATHS`, of the library that the linker finds unless one is named.

    Raises:
        CodecUnavailable: there is no library or no accelerator, or it did not decode a known stream.
    """
    library_name = library_name or ctypes.util.find_library("qpl")
    if library_name is None:
        raise CodecUnavailable("libqpl.so is not installed")
    command = [sys.executable, "-m", __name__, path, library_name]
    try:
        proof = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROOF_S)
    except subprocess.TimeoutExpired as error:
        raise CodecUnavailable(f"{library_name} took longer than {_PROOF_S:g} s to decode a known stream") from error
    if proof.returncode < 0:
        raise CodecUnavailable(f"{library_name} ended its process by signal {-proof.returncode}")
    if proof.returncode:
        raise CodecUnavailable(f"{library_name}: {(proof.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return QplStreams(path, library_name)


def _prove(path: str, library_name: str) -> None:
    plain = np.arange(4096, dtype=np.uint32).astype(np.uint8) % 23
    streams = QplStreams(path, library_name)
    if bytes(streams.decode([memoryview(huffman_only(plain))], [len(plain)])[0]) != plain.tobytes():
        raise CodecUnavailable("a known stream came out wrong")


if __name__ == "__main__":
    _prove(*sys.argv[1:])
