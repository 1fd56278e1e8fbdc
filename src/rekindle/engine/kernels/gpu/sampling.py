"""The choice of tokens on a GPU, as `engine.draw` defines it.

The likeliest tokens of all rows take one launch: a row is divided among programs, each of which leaves the best it saw,
and whoever reads them takes the best of those. Draws take a second launch of one program a row, whose logits stay in
the L2 cache. It never sorts: it searches the distance at which a running count or sum of weights passes its target, by
halving the range until the tokens left in it fit the program's registers. Both ends of a range move on to distances
that tokens have, and so a search over many equal ones is short.

Weights are added as integers, in units of 2^-44 of the likeliest's, so that a sum depends on no order of adding; what
is over 31 nats less likely than the likeliest weighs nothing.

Suffixes: R rows, V vocabulary, P programs of a row, C tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from rekindle.engine.draw import NOT_FINITE, Draw
from rekindle.engine.transfer import to_device

_MAX_PROGRAMS = 32
"""Programs that a row is divided among at most; whoever reads their results reads so many."""

_BLOCK = 4096
_WARPS = 8

_RESIDENT = 2048
"""Tokens held in registers once the range of a search has no more."""

_MAX_ID = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_UNITS = tl.constexpr(float(1 << 44))
_NATS = tl.constexpr(32.0)
_HALVINGS_OF_VALUE = tl.constexpr(24)
"""Halvings of the range of a distance before the range of its bits is halved, which ends after 31 at the latest."""


def choose_on_gpu(logits_RV: torch.Tensor, draws: Sequence[Draw | None]) -> Callable[[], list[int]]:
    """See `engine.draw.Choose`. The host waits when it asks for the tokens and at no other time."""
    num_rows, vocabulary = logits_RV.shape
    num_programs = min(_MAX_PROGRAMS, triton.cdiv(vocabulary, _BLOCK))
    best_RP = torch.empty(num_rows, num_programs, dtype=torch.int64, device=logits_RV.device)
    _likeliest_kernel[(num_rows, num_programs)](
        logits_RV,
        best_RP,
        logits_RV.stride(0),
        vocabulary,
        NUM_PROGRAMS=num_programs,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    if all(draw is None for draw in draws):
        return lambda: _tokens_of(best_RP.cpu())
    token_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    _draw_kernel[(num_rows,)](
        logits_RV,
        best_RP,
        to_device([_settings(draw) for draw in draws], torch.float64, logits_RV.device),
        torch.empty(num_rows, _RESIDENT, dtype=torch.int32, device=logits_RV.device),
        token_R,
        logits_RV.stride(0),
        vocabulary,
        NUM_PROGRAMS=num_programs,
        BLOCK_PROGRAMS=triton.next_power_of_2(num_programs),
        RESIDENT=_RESIDENT,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return token_R.tolist


def _settings(draw: Draw | None) -> tuple[float, ...]:
    """What the kernel reads of a row; a rate of 0 asks for the likeliest token."""
    if draw is None:
        return (0.0, 0.0, 1.0, 0.0, 0.0)
    return (-1.0 / draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.uniform)


def _tokens_of(best_RP: torch.Tensor) -> list[int]:
    """The likeliest tokens, from what the programs of `_likeliest_kernel` left."""
    best_R = best_RP.amax(1)
    rank_R = (best_R >> 32).int()
    highest_R = torch.where(rank_R < 0, rank_R ^ _MAX_ID.value, rank_R).view(torch.float32)
    tokens_R = (best_R & _MAX_ID.value) ^ _MAX_ID.value
    return torch.where(highest_R.isfinite(), tokens_R, NOT_FINITE).tolist()


@triton.jit
def _flipped(bits):
    """Between the bits of a float32 and an integer that sorts as the number does."""
    return tl.where(bits < 0, bits ^ _MAX_ID, bits)


@triton.jit
def _likeliest_kernel(logits, best, row_stride, vocabulary, NUM_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest logit, its rank in the upper half of an integer, with the lowest id that has it, inverted, in the
    lower. NaN ranks above all numbers."""
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best_C = tl.full([BLOCK], -(2**63), tl.int64)
    for start in range(0, vocabulary, NUM_PROGRAMS * BLOCK):
        id_C = start + program * BLOCK + tl.arange(0, BLOCK)
        logit_C = tl.load(logits + row * row_stride + id_C, mask=id_C < vocabulary, other=-float("inf"))
        logit_C = tl.where(logit_C == 0.0, 0.0, logit_C)  # -0 is no less than 0
        bits_C = logit_C.to(tl.int32, bitcast=True)
        rank_C = tl.where((bits_C & _MAX_ID) > _INFINITY, _MAX_ID, _flipped(bits_C))
        best_C = tl.maximum(best_C, (rank_C.to(tl.int64) << 32) | (id_C ^ _MAX_ID).to(tl.int64))
    tl.store(best + row * NUM_PROGRAMS + program, tl.max(best_C, axis=0))


@triton.jit
def _distances(logits, highest, vocabulary, start, BLOCK: tl.constexpr):
    """Of one block of tokens: their distances, as numbers and as bits, which sort alike; -1 beyond the vocabulary."""
    id_C = start + tl.arange(0, BLOCK)
    distance_C = highest - tl.load(logits + id_C, mask=id_C < vocabulary, other=-float("inf"))
    return distance_C, tl.where(id_C < vocabulary, distance_C.to(tl.int32, bitcast=True), -1)


@triton.jit
def _units(weight):
    return (weight * _UNITS).to(tl.int64)


@triton.jit
def _sums(bits_C, weight_C, limit, least_weight):
    """Of tokens up to a distance, given by its bits, and of a least weight: what they add to the number and the weight;
    and distances that rise to the last one up to the limit and fall to the first one after it."""
    inside_C = (bits_C >= 0) & (bits_C <= limit)
    counted_C = inside_C & (weight_C >= least_weight)
    units_C = tl.where(counted_C, _units(weight_C), 0)
    return counted_C.to(tl.int32), units_C, tl.where(inside_C, bits_C, 0), tl.where(bits_C > limit, bits_C, _MAX_ID)


@triton.jit
def _totals(logits, highest, vocabulary, rate, limit, least_weight, BLOCK: tl.constexpr):
    """As `_sums`, of all tokens: number, weight, and the distances on both sides of the limit."""
    count_C = tl.zeros([BLOCK], tl.int32)
    mass_C = tl.zeros([BLOCK], tl.int64)
    last_C = tl.zeros([BLOCK], tl.int32)
    next_C = tl.full([BLOCK], _MAX_ID, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        distance_C, bits_C = _distances(logits, highest, vocabulary, start, BLOCK)
        counted_C, units_C, inside_C, outside_C = _sums(bits_C, tl.exp(distance_C * rate), limit, least_weight)
        count_C += counted_C
        mass_C += units_C
        last_C, next_C = tl.maximum(last_C, inside_C), tl.minimum(next_C, outside_C)
    return tl.sum(count_C, axis=0), tl.sum(mass_C, axis=0), tl.max(last_C, axis=0), tl.min(next_C, axis=0)


@triton.jit
def _middle(low, high, halvings):
    """Bits of a distance from `low` to just under `high`; from infinity the way down leads by doubling."""
    low_value, high_value = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    value = tl.where(high == _INFINITY, 2.0 * low_value + 8.0, 0.5 * low_value + 0.5 * high_value)
    by_value = tl.maximum(low, tl.minimum(value.to(tl.int32, bitcast=True), high - 1))
    return tl.where(halvings < _HALVINGS_OF_VALUE, by_value, low + (high - low) // 2)


@triton.jit
def _gathered(logits, highest, vocabulary, low, high, scratch, RESIDENT: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the distances from `low` to `high`, in no order, padded with the highest integer."""
    found = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        _, bits_C = _distances(logits, highest, vocabulary, start, BLOCK)
        inside_C = (bits_C >= low) & (bits_C <= high)
        place_C = found + tl.cumsum(inside_C.to(tl.int32), axis=0) - 1
        tl.store(scratch + place_C, bits_C, mask=inside_C & (place_C < RESIDENT))
        found += tl.sum(inside_C.to(tl.int32), axis=0)
    tl.debug_barrier()  # threads read what others have written
    place_C = tl.arange(0, RESIDENT)
    resident_C = tl.load(scratch + place_C, mask=place_C < found, other=_MAX_ID)
    tl.debug_barrier()  # and the next search writes over it
    return resident_C


@triton.jit
def _search(
    logits,
    highest,
    vocabulary,
    rate,
    counts,
    target,
    high,
    high_count,
    scratch,
    RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least distance, up to `high`, with which the running sum of the weights, or the count if `counts`, passes the
    target; how many tokens lie that near, and the number and weight of those that lie nearer.

    `high_count` bounds the number of tokens up to `high`.
    """
    low = tl.full((), 0, tl.int32)
    below_count = tl.full((), 0, tl.int32)
    below_mass = tl.full((), 0, tl.int64)
    halvings = tl.full((), 0, tl.int32)
    while (low < high) & (high_count - below_count > RESIDENT):
        middle = _middle(low, high, halvings)
        count, mass, last, next_one = _totals(logits, highest, vocabulary, rate, middle, 0.0, BLOCK)
        passes = tl.where(counts, count.to(tl.int64), mass) > target
        high, high_count = tl.where(passes, last, high), tl.where(passes, count, high_count)
        low = tl.where(passes, low, next_one)
        below_count, below_mass = tl.where(passes, below_count, count), tl.where(passes, below_mass, mass)
        halvings += 1
    if low < high:
        bits_C = _gathered(logits, highest, vocabulary, low, high, scratch, RESIDENT, BLOCK)
        distance_C = tl.where(bits_C == _MAX_ID, _INFINITY, bits_C).to(tl.float32, bitcast=True)
        weight_C = tl.exp(distance_C * rate)
        outer_count, outer_mass = below_count, below_mass
        while low < high:
            middle = _middle(low, high, halvings)
            counted_C, units_C, inside_C, outside_C = _sums(bits_C, weight_C, middle, 0.0)
            count, mass = outer_count + tl.sum(counted_C, axis=0), outer_mass + tl.sum(units_C, axis=0)
            passes = tl.where(counts, count.to(tl.int64), mass) > target
            high = tl.where(passes, tl.max(inside_C, axis=0), high)
            high_count = tl.where(passes, count, high_count)
            low = tl.where(passes, low, tl.min(outside_C, axis=0))
            below_count, below_mass = tl.where(passes, below_count, count), tl.where(passes, below_mass, mass)
            halvings += 1
    return low, high_count, below_count, below_mass


@triton.jit
def _token_at_distance(logits, highest, vocabulary, bits, rank, BLOCK: tl.constexpr):
    """The token of that rank, or else the last, by id among those of one distance."""
    token = tl.full((), 0, tl.int64)
    seen = tl.full((), 0, tl.int64)
    start = tl.full((), 0, tl.int32)
    while (seen <= rank) & (start < vocabulary):
        _, bits_C = _distances(logits, highest, vocabulary, start, BLOCK)
        equal_C = (bits_C == bits).to(tl.int64)
        count = tl.sum(equal_C, axis=0)
        if count > 0:
            eligible_C = (equal_C > 0) & (seen + tl.cumsum(equal_C, axis=0) <= rank + 1)
            token = tl.max(tl.where(eligible_C, start + tl.arange(0, BLOCK), 0), axis=0).to(tl.int64)
        seen += count
        start += BLOCK
    return token


@triton.jit
def _token_in_order_of_ids(logits, highest, vocabulary, rate, target, BLOCK: tl.constexpr):
    """The first token with which the running sum of all weights, in the order of ids, passes the target."""
    token = tl.full((), 0, tl.int64)
    reached = tl.full((), 0, tl.int64)
    start = tl.full((), 0, tl.int32)
    while (reached <= target) & (start < vocabulary):
        distance_C, _ = _distances(logits, highest, vocabulary, start, BLOCK)
        units_C = _units(tl.exp(distance_C * rate))
        mass = tl.sum(units_C, axis=0)
        if reached + mass > target:
            short_C = (reached + tl.cumsum(units_C, axis=0) <= target).to(tl.int32)
            token = (start + tl.sum(short_C, axis=0)).to(tl.int64)
        reached += mass
        start += BLOCK
    return token


@triton.jit
def _draw_filtered(
    logits,
    highest,
    vocabulary,
    rate,
    top_k,
    top_p,
    uniform,
    count,
    mass,
    scratch,
    RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A draw from the tokens that top_k and top_p leave of the nearest `count`, which weigh `mass` together.

    Three searches, each within the range the last one has left: for the end of top_k, for that of top_p, and for the
    token. What is cut may be a part of several tokens at one distance, of which the lowest ids stay.
    """
    high = (-1.0 / rate * _NATS).to(tl.int32, bitcast=True)
    high_count = tl.full((), vocabulary, tl.int32)
    rank = tl.full((), 0, tl.int64)
    for search in range(3):
        if (search == 2) | ((search == 1) & (top_p < 1.0)) | ((search == 0) & (top_k > 0) & (top_k < count)):
            share = tl.where(search == 1, tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64) - 1, 0)
            drawn = tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1)
            target = tl.where(search == 0, (top_k - 1).to(tl.int64), tl.where(search == 1, share, drawn))
            bits, high_count, below_count, below_mass = _search(
                logits,
                highest,
                vocabulary,
                rate,
                search == 0,
                target,
                tl.where(search == 0, _INFINITY, high),
                high_count,
                scratch,
                RESIDENT,
                BLOCK,
            )
            units = _units(tl.exp(bits.to(tl.float32, bitcast=True) * rate))
            by_mass = (target - below_mass) // tl.maximum(units, 1)
            rank = tl.where(search == 0, (top_k - 1 - below_count).to(tl.int64), by_mass)
            mass = below_mass + (rank + 1) * units
            high = tl.minimum(high, bits)
    return _token_at_distance(logits, highest, vocabulary, high, rank, BLOCK)


@triton.jit
def _draw_kernel(
    logits,
    best,
    settings,
    scratch,
    token_R,
    row_stride,
    vocabulary,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    program_P = tl.minimum(tl.arange(0, BLOCK_PROGRAMS), NUM_PROGRAMS - 1)
    likeliest = tl.max(tl.load(best + row * NUM_PROGRAMS + program_P), axis=0)
    highest = _flipped((likeliest >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    token = (likeliest & _MAX_ID) ^ _MAX_ID
    settings += row * 5
    rate = tl.load(settings).to(tl.float32)
    logits += row * row_stride
    scratch += row * RESIDENT
    if not (tl.abs(highest) < float("inf")):
        token = tl.full((), _NOT_FINITE, tl.int64)
    elif rate != 0.0:
        top_k = tl.load(settings + 1).to(tl.int32)
        top_p, min_p, uniform = tl.load(settings + 2), tl.load(settings + 3), tl.load(settings + 4)
        count, mass, _, _ = _totals(logits, highest, vocabulary, rate, _INFINITY, min_p.to(tl.float32), BLOCK)
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            token = _draw_filtered(
                logits, highest, vocabulary, rate, top_k, top_p, uniform, count, mass, scratch, RESIDENT, BLOCK
            )
        else:
            target = tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1)
            token = _token_in_order_of_ids(logits, highest, vocabulary, rate, target, BLOCK)
    tl.store(token_R + row, token)
