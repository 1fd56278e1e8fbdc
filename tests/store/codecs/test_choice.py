"""When packing pays: the rule, and the reasons it gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.store.codecs.choice import MIN_SAVING, Purpose, choose_codec
from rekindle.store.codecs.interface import FRAME_BYTES
from rekindle.store.codecs.measure import Measured, measure, sample
from rekindle.store.codecs.registry import codec_named
from rekindle.units import GIB

GB = 1e9


def figures(codec: str, share: float, unpack: float, pack: float = 1.0) -> Measured:
    """Rates in GB/s."""
    return Measured(codec, 10**6, round(share * 10**6), pack * GB, unpack * GB)


PLANES = figures("planes", 0.667, 5.0, 2.0)
ZSTD = figures("zstd", 0.78, 1.9)
DENSE = figures("dense", 0.663, 1.2, 0.2)
LZ4 = figures("lz4", 0.996, 9.0)


def test_a_slow_link_gains_by_what_packing_saves() -> None:
    choice = choose_codec(10**9, [PLANES, ZSTD, LZ4], 1 * GB, Purpose.TRANSFER)
    assert (choice.codec, choice.kept_bytes) == ("planes", 667_000_000)
    assert choice.ready_s == pytest.approx(0.667)


def test_a_link_faster_than_every_decoder_gets_plain_bytes() -> None:
    choice = choose_codec(10**9, [PLANES, ZSTD, DENSE], 6 * GB, Purpose.TRANSFER)
    assert choice.codec is None
    assert (choice.ready_s, choice.kept_bytes) == (pytest.approx(1 / 6), 10**9)
    assert "it unpacks no faster than the link's 6.00 GB/s" in choice.reasons[0]
    assert choice.reasons[-1] == "left as it is: no codec pays for transfer"


def test_between_link_and_decoder_the_decoder_sets_the_time() -> None:
    choice = choose_codec(10**9, [PLANES], 4 * GB, Purpose.TRANSFER)
    assert choice.ready_s == pytest.approx(1 / 5)


def test_for_memory_the_smallest_wins_unless_loading_again_would_be_quicker() -> None:
    assert choose_codec(GIB, [ZSTD, PLANES], 1.5 * GB, Purpose.MEMORY).codec == "planes"
    assert choose_codec(GIB, [ZSTD], 2.5 * GB, Purpose.MEMORY).codec is None


def test_of_codecs_that_are_as_good_the_quickest_is_taken() -> None:
    for purpose in Purpose:
        assert choose_codec(GIB, [DENSE, PLANES], 0.5 * GB, purpose).codec == "planes"


def test_packing_that_takes_too_long_is_refused() -> None:
    choice = choose_codec(10**9, [DENSE], 1 * GB, Purpose.MEMORY, max_pack_s=2.0)
    assert choice.codec is None
    assert "packing takes 5000.0 ms, at most 2000.0 ms are allowed" in choice.reasons[0]


def test_a_codec_that_saves_nothing_is_refused_however_fast() -> None:
    choice = choose_codec(GIB, [LZ4], 0.1 * GB, Purpose.MEMORY)
    assert choice.codec is None
    assert "saves less than 5%" in choice.reasons[0]


rates = st.integers(5, 10_000).map(lambda hundredths: hundredths / 100)
measured = st.lists(
    st.builds(figures, st.sampled_from(["a", "b", "c"]), st.floats(0.01, 1.0), rates, rates), max_size=5
)


@given(num_bytes=st.integers(1, 10**12), measured=measured, link=rates, purpose=st.sampled_from(Purpose))
def test_what_is_chosen_is_ready_sooner_and_takes_less(
    num_bytes: int, measured: list[Measured], link: float, purpose: Purpose
) -> None:
    choice = choose_codec(num_bytes, measured, link * GB, purpose)
    plain_s = num_bytes / (link * GB)
    pays = [m for m in measured if m.unpack_bytes_s > link * GB and m.share <= 1 - MIN_SAVING]
    assert (choice.codec is None) == (not pays)
    assert len(choice.reasons) == len(measured) + 1
    if choice.codec is not None:
        assert choice.ready_s < plain_s
        assert choice.kept_bytes <= num_bytes
        assert choice.codec in {m.codec for m in pays}


def test_a_sample_is_whole_frames_from_all_over() -> None:
    content = b"".join(bytes([index]) * FRAME_BYTES for index in range(8))
    assert sample(content, 4 * FRAME_BYTES) == b"".join(bytes([index]) * FRAME_BYTES for index in (0, 2, 4, 6))
    assert sample(b"short", FRAME_BYTES) == b"short"


def test_measuring_tells_sizes_and_rates() -> None:
    found = measure(codec_named("planes-deflate/zlib"), bytes(FRAME_BYTES), "BF16", repeats=1)
    assert (found.codec, found.num_bytes) == ("planes-deflate/zlib", FRAME_BYTES)
    assert found.share < 0.001
    assert min(found.pack_bytes_s, found.unpack_bytes_s) > 0
