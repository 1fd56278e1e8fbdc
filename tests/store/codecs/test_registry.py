"""Which codecs are offered: those that prove themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rekindle.errors import ConfigurationError
from rekindle.store.codecs.general import RawCodec
from rekindle.store.codecs.interface import CodecUnavailable, ElementType, Format
from rekindle.store.codecs.qpl import qpl_streams
from rekindle.store.codecs.registry import codec_for, codec_named, probe, probed_codecs
from rekindle.store.safetensors_file import Bytes

ALWAYS = {"raw", "planes-deflate/zlib"}


class _Forgetful(RawCodec):
    """Loses every byte but the length."""

    name = "forgetful"

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        return b"x" if len(frame) > 1 else None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        out[:] = bytes(len(out))


class _Raising(_Forgetful):
    """Raises what no codec should."""

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        raise KeyError("surprise")


def test_every_codec_works_here_or_says_why_not() -> None:
    for probed in probed_codecs():
        assert (probed.codec is None) == bool(probed.reason)
        if probed.codec is not None:
            assert (probed.codec.name, probed.codec.format) == (probed.name, probed.format)
    assert {probed.name for probed in probed_codecs() if probed.codec} >= ALWAYS


def test_a_codec_that_changes_bytes_is_not_offered() -> None:
    probed = probe("forgetful", Format.RAW, _Forgetful)
    assert probed.codec is None
    assert "came back changed" in probed.reason


def test_a_codec_that_raises_anything_is_reported_and_not_offered() -> None:
    probed = probe("raising", Format.RAW, _Raising)
    assert probed.codec is None
    assert "KeyError: 'surprise'" in probed.reason


def test_a_codec_that_cannot_be_made_gives_its_reason() -> None:
    def make() -> RawCodec:
        raise CodecUnavailable("no such device")

    assert probe("absent", Format.RAW, make).reason == "no such device"


def test_unknown_and_absent_codecs_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="no codec 'zpi'; known are raw"):
        codec_named("zpi")
    absent = next(probed for probed in probed_codecs() if probed.codec is None)
    with pytest.raises(ConfigurationError, match=f"codec {absent.name} cannot be used here: "):
        codec_named(absent.name)


def test_the_fastest_that_works_reads_a_format() -> None:
    working = [p.name for p in probed_codecs() if p.codec is not None and p.format is Format.DEFLATE_PLANES]
    assert codec_for(Format.DEFLATE_PLANES).name == working[0]


def python(script: str, absent: list[str]) -> str:
    script = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n{script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_deflate_planes_need_no_library_but_xxhash() -> None:
    script = (
        "from rekindle.store.codecs.registry import probed_codecs\n"
        "print(*(p.name if p.codec else f'{p.name}!' for p in probed_codecs()))"
    )
    found = python(script, ["lz4", "zstandard", "blosc2", "isal"]).split()
    assert set(found) >= ALWAYS | {"lz4!", "zstd!", "planes-zstd!", "blosc2-shuffle!", "planes-deflate/isal!"}


def test_without_xxhash_nothing_is_packed_and_the_remedy_is_named() -> None:
    script = (
        "from rekindle.store.codecs.registry import codec_for\n"
        "from rekindle.store.codecs.interface import Format\n"
        "try: codec_for(Format.RAW)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    found = python(script, ["xxhash"])
    assert found.startswith("ConfigurationError")
    assert "pip install 'rekindle[store]'" in found


def test_a_missing_qpl_is_told() -> None:
    with pytest.raises(CodecUnavailable, match="no-such-qpl"):
        qpl_streams("software", "/nowhere/no-such-qpl.so")


QPL = """
#include <stdint.h>
int qpl_get_job_size(int path, uint32_t* size) { *size = 1024; return path == 1 ? 503 : 0; }
int qpl_init_job(int path, void* job) { (void)path; (void)job; return 0; }
int qpl_execute_job(void* job) { uint32_t* total_out = (uint32_t*)((char*)job + 28); BODY }
"""


@pytest.fixture
def fake_qpl(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A library with QPL's names, whose inflate does what the test says."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "qpl.c", tmp_path / "libqpl.so"
    source.write_text(QPL.replace("BODY", request.param))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.parametrize(
    ("fake_qpl", "reason"),
    [
        ("*(volatile int*)0 = 1; return (int)*total_out;", "ended its process by signal"),
        ("(void)total_out; return 221;", "QPL gave status 221"),
        ("*total_out = 4096; return 0;", "a known stream came out wrong"),
    ],
    indirect=["fake_qpl"],
    ids=["crashes", "refuses", "does nothing"],
)
def test_a_qpl_that_is_not_what_we_take_it_for_is_told_and_harms_nothing(fake_qpl: str, reason: str) -> None:
    with pytest.raises(CodecUnavailable, match=reason):
        qpl_streams("software", fake_qpl)


@pytest.mark.parametrize("fake_qpl", ["(void)total_out; return 0;"], indirect=True)
def test_a_qpl_without_its_accelerator_is_told(fake_qpl: str) -> None:
    with pytest.raises(CodecUnavailable, match="QPL gave status 503"):
        qpl_streams("iaa", fake_qpl)
