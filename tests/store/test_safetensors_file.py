"""The safetensors reader and writer, against the `safetensors` library and against damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from rekindle.errors import AdapterRejected, ModelRejected
from rekindle.store.safetensors_file import (
    DATA_ALIGNMENT_BYTES,
    DTYPE_BYTES,
    TensorStream,
    encode_header,
    read_header,
    tensor_index,
    write_tensors,
)

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMPY_NAMES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def stream(name: str, dtype: str, shape: tuple[int, ...], content: bytes, piece_bytes: int = 7) -> TensorStream:
    return TensorStream(
        name, dtype, shape, lambda: (content[at : at + piece_bytes] for at in range(0, len(content), piece_bytes))
    )


@st.composite
def stream_lists(draw: st.DrawFn) -> list[tuple[TensorStream, bytes]]:
    tensors = []
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(sorted(NUMPY_NAMES))), draw(shapes)
        size = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        content = draw(st.binary(min_size=size, max_size=size))
        tensors.append((stream(name, dtype, shape, content), content))
    return tensors


@quick
@given(tensors=stream_lists())
def test_written_files_read_back_here_and_in_the_safetensors_library(
    tmp_path: Path, tensors: list[tuple[TensorStream, bytes]]
) -> None:
    path = tmp_path / "any.safetensors"
    path.unlink(missing_ok=True)
    write_tensors(path, [tensor for tensor, _ in tensors], metadata={"format": "pt"})
    raw = path.read_bytes()

    entries = tensor_index(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        tensor.name: (tensor.dtype, tensor.shape) for tensor, _ in tensors
    }
    with safe_open(path, "np") as library:
        assert set(library.keys()) == set(entries)
        for tensor, content in tensors:
            entry = entries[tensor.name]
            assert raw[entry.offset : entry.offset + entry.num_bytes] == content
            loaded = library.get_tensor(tensor.name)
            assert (loaded.shape, loaded.dtype) == (tensor.shape, np.dtype(NUMPY_NAMES[tensor.dtype]))
            assert loaded.tobytes() == content


@quick
@given(tensors=stream_lists())
def test_data_begins_on_a_page_and_tensors_follow_each_other_in_the_order_given(
    tmp_path: Path, tensors: list[tuple[TensorStream, bytes]]
) -> None:
    path = tmp_path / "any.safetensors"
    path.unlink(missing_ok=True)
    write_tensors(path, [tensor for tensor, _ in tensors])
    section, entries = read_header(path).data, tensor_index(path)
    assert section.offset % DATA_ALIGNMENT_BYTES == 0
    end = section.offset
    for tensor, content in tensors:
        assert entries[tensor.name].offset == end
        end += len(content)
    assert end == section.offset + section.num_bytes == path.stat().st_size


def test_every_piece_is_shown_to_the_observer_once(tmp_path: Path) -> None:
    seen = bytearray()
    content = bytes(range(64))
    write_tensors(tmp_path / "a.safetensors", [stream("x", "U8", (64,), content)], observe=seen.extend)
    assert bytes(seen) == content


@pytest.mark.parametrize("given_bytes", [0, 3, 5])
def test_a_stream_of_another_length_than_its_shape_is_an_error(tmp_path: Path, given_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"x gave {given_bytes} bytes, its shape says 4"):
        write_tensors(tmp_path / "a.safetensors", [stream("x", "U8", (4,), bytes(given_bytes))])


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    twins = [stream("x", "U8", (1,), b"a"), stream("x", "U8", (1,), b"b")]
    with pytest.raises(ValueError, match="'x' occurs twice"):
        write_tensors(tmp_path / "a.safetensors", twins)


def file_with_header(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 6), "b": entry(4, 8)}, "b begins at byte .* and overlaps a"),
        ({"a": entry(0, 3), "b": entry(4, 8)}, "b begins at byte .* and leaves a gap after a"),
        ({"a": entry(1, 8)}, "leaves a gap after the header"),
        ({"a": entry(0, 7)}, "its tensors end at byte .*, the file at"),
        ({"a": entry(0, 9)}, r"a lies at 0\.\.9, outside its 8 bytes"),
        ({"a": entry(-1, 7)}, r"a lies at -1\.\.7"),
        ({"a": entry(8, 0, shape=[8])}, r"a lies at 8\.\.0"),
        ({"a": entry(0, 8, "F32")}, r"a of F32 \[8\] needs 32 bytes, its offsets span 8"),
        ({"a": entry(0, 8, "F7")}, "a has dtype 'F7'"),
        ({"a": entry(0, 8, shape=[-8])}, "entry for tensor a is malformed"),
        ({"a": entry(0, 8, shape=[True] * 8)}, "entry for tensor a is malformed"),
        ({"a": entry(0, 8, shape=["8"])}, "entry for tensor a is malformed"),
        ({"a": [0, 8]}, "entry for tensor a is malformed"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "entry for tensor a is malformed"),
        ({"a": entry(0, 8, shape=[1] * 8 + [8])}, "a has 9 dimensions; at most 8 are supported"),
        ({"a": entry(0, 8, shape=[9])}, "a has a dimension of 9, the file only 8 bytes of data"),
        ({"a": entry(0, 8, shape=[10**4000] * 8)}, "a has a dimension of 10{39}, the file only 8 bytes of data"),
        ({"a": entry(0, 8, shape=[2] * 100_000)}, "a has 100000 dimensions"),
        ([1], "not a JSON object"),
        ({"__metadata__": 1}, "__metadata__ is not a JSON object"),
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "bad.safetensors: "),
        (b"[" * 100_000, "bad.safetensors: "),
    ],
)
def test_a_header_that_lies_is_refused_with_the_file_name(tmp_path: Path, header: Any, reason: str) -> None:
    path = file_with_header(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(ModelRejected, match=reason) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file: it holds 0 bytes"),
        (b"\x01\x00", "not a safetensors file: it holds 2 bytes"),
        (b"\xff" * 16, "its header would be 18446744073709551615 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "truncated: its header ends at 108, the file at 10"),
    ],
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelRejected, match=reason):
        read_header(path)


@quick
@given(position=st.integers(0, 399), value=st.integers(0, 255), cut=st.integers(0, 8))
def test_a_damaged_file_is_either_still_consistent_or_refused(
    tmp_path: Path, position: int, value: int, cut: int
) -> None:
    good = encode_header([stream("a", "F32", (2, 3), b""), stream("b", "U8", (5,), b"")], {"format": "pt"}) + bytes(29)
    raw = bytearray(good[: len(good) - cut])
    raw[position] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        entries = read_header(path).entries
    except ModelRejected:
        return
    for found in entries.values():
        assert 0 <= found.offset <= found.offset + found.num_bytes <= len(raw)


def test_an_empty_tensor_may_have_any_other_dimension(tmp_path: Path) -> None:
    path = file_with_header(tmp_path / "empty.safetensors", {"a": entry(0, 0, shape=[0, 4096])}, b"")
    assert tensor_index(path)["a"].shape == (0, 4096)


def test_the_caller_limits_how_long_a_header_may_be(tmp_path: Path) -> None:
    path = file_with_header(tmp_path / "long.safetensors", {"a": entry(0, 8)}, bytes(8))
    assert read_header(path, max_header_bytes=100).data.num_bytes == 8
    with pytest.raises(ModelRejected, match=r"its header would be \d+ bytes, at most 20 are allowed"):
        read_header(path, max_header_bytes=20)


def test_the_caller_chooses_the_kind_of_refusal(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(AdapterRejected, match="adapter_model"):
        tensor_index(path, rejected=AdapterRejected)
