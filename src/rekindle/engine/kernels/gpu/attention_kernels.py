"""The kernels behind `attention`; see there for what they promise.

Shape suffixes: S sequences (a block of them), M the rows of a tile, which are query positions x heads of a group,
N keys of a block, D head size padded to a power of two, W splits of a context; for the others see `interface`.
"""

import triton
import triton.language as tl

_SEQUENCE_BLOCK = tl.constexpr(256)


@triton.jit
def _locate(work, before, sequence_S, count_S):
    """Pieces of work are counted through the sequences, `before` of them ahead of this block. Returns, if piece `work`
    is in the block, 1 + its sequence and its number there, else zeros; and how many lie ahead of the next block."""
    end_S = before + tl.cumsum(count_S, 0)
    first_S = end_S - count_S
    is_mine_S = (work >= first_S) & (work < end_S)
    sequence = tl.sum(tl.where(is_mine_S, sequence_S + 1, 0), 0)
    return sequence, tl.sum(tl.where(is_mine_S, work - first_S, 0), 0), before + tl.sum(count_S, 0)


@triton.jit
def _split_context(
    context,
    window,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """(first key, tokens of a split, number of splits) for the last position of each context."""
    begin = context * 0
    if HAS_WINDOW:
        begin = tl.maximum(context - window, 0) // BLOCK_KEYS * BLOCK_KEYS
    num_keys = context - begin
    tokens = tl.maximum(tl.cdiv(tl.cdiv(num_keys, MAX_SPLITS), BLOCK_KEYS) * BLOCK_KEYS, MIN_SPLIT_TOKENS)
    return begin, tokens, tl.cdiv(num_keys, tokens)


@triton.jit
def _count_splits(
    query_start_S1,
    context_S,
    first_sequence,
    num_sequences,
    window,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The sequences of a block and into how many splits each falls; 0 for one that has not exactly one row."""
    sequence_S = first_sequence + tl.arange(0, _SEQUENCE_BLOCK)
    is_one_S = sequence_S < num_sequences
    start_S = tl.load(query_start_S1 + sequence_S, mask=is_one_S, other=0)
    end_S = tl.load(query_start_S1 + sequence_S + 1, mask=is_one_S, other=0)
    lengths_S = tl.load(context_S + sequence_S, mask=is_one_S, other=0)
    _, _, num_splits_S = _split_context(lengths_S, window, MIN_SPLIT_TOKENS, MAX_SPLITS, BLOCK_KEYS, HAS_WINDOW)
    return sequence_S, tl.where(end_S - start_S == 1, num_splits_S, 0)


@triton.jit
def _walk(
    q_MD,
    sum_M,
    maximum_M,
    mixed_MD,
    position_M,
    begin,
    end,
    keys_at,
    pages_at,
    page_stride,
    token_stride,
    window,
    score_scale,
    softcap,
    exponent_scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Let the rows of a tile see keys `begin .. end`. Without IS_MASKED all of them see every key, and the range is of
    whole blocks. Both variants must compute the same bits: products are fused explicitly, not as a compiler sees fit.
    Softmax state: `maximum` of the scores before the exponent's scale, `sum` of the weights, `mixed` values."""
    dim_D = tl.arange(0, BLOCK_DIM)
    key_in_block_N = tl.arange(0, BLOCK_KEYS)
    is_dim_D = dim_D < HEAD_DIM
    # Pages are looked up one block ahead, outside the chain that Triton pipelines: it would halve the depth for it.
    page_N = tl.load(pages_at + (begin + key_in_block_N) // PAGE_TOKENS, mask=begin + key_in_block_N < end, other=0)
    for first in range(begin, end, BLOCK_KEYS):
        key_N = first + key_in_block_N
        is_key_N = key_N < end
        token_N = page_N.to(tl.int64) * page_stride + key_N % PAGE_TOKENS * token_stride
        next_key_N = key_N + BLOCK_KEYS
        page_N = tl.load(pages_at + next_key_N // PAGE_TOKENS, mask=next_key_N < end, other=0)
        key_at_ND = keys_at + token_N[:, None] + dim_D[None, :]
        value_at_ND = key_at_ND + NUM_KV_HEADS * HEAD_DIM
        if IS_MASKED:
            # Values past the end must read as zero: a weight of zero times a NaN left in a page would be NaN.
            is_loaded_ND = is_key_N[:, None] & is_dim_D[None, :]
            k_ND = tl.load(key_at_ND, mask=is_loaded_ND, other=0.0)
            v_ND = tl.load(value_at_ND, mask=is_loaded_ND, other=0.0)
        elif HEAD_DIM == BLOCK_DIM:
            k_ND = tl.load(key_at_ND)
            v_ND = tl.load(value_at_ND)
        else:
            k_ND = tl.load(key_at_ND, mask=is_dim_D[None, :], other=0.0)
            v_ND = tl.load(value_at_ND, mask=is_dim_D[None, :], other=0.0)

        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
            score_MN = tl.fma(-2.0 * softcap, 1.0 / (tl.exp2(score_MN * score_scale) + 1.0), softcap)
        if IS_MASKED:
            is_seen_MN = is_key_N[None, :] & (key_N[None, :] <= position_M[:, None])
            if HAS_WINDOW:
                is_seen_MN = is_seen_MN & (key_N[None, :] > position_M[:, None] - window)
            score_MN = tl.where(is_seen_MN, score_MN, -float("inf"))
        new_maximum_M = tl.maximum(maximum_M, tl.max(score_MN, 1))
        base_M = tl.where(new_maximum_M == -float("inf"), 0.0, new_maximum_M)
        weight_MN = tl.exp2(tl.fma(score_MN, exponent_scale, (base_M * -exponent_scale)[:, None]))
        kept_M = tl.exp2((maximum_M - base_M) * exponent_scale)
        sum_M = tl.fma(sum_M, kept_M, tl.sum(weight_MN, 1))
        mixed_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, mixed_MD * kept_M[:, None], input_precision="ieee")
        maximum_M = new_maximum_M
    return sum_M, maximum_M, mixed_MD


@triton.jit(
    do_not_specialize=["num_sequences", "layer", "table_splits", "pages_stride", "window"],
    do_not_specialize_on_alignment=["query_start_S1", "context_S", "pages_SM"],
)
def single_row_kernel(
    qkv_TE,
    kv_PLBCD,
    out_TE,
    partial_SWHD,
    weight_SWH,
    query_start_S1,
    context_S,
    pages_SM,
    num_sequences,
    layer,
    table_splits,
    qkv_stride,
    pages_stride,
    page_stride,
    layer_stride,
    token_stride,
    window,
    score_scale,
    softcap,
    exponent_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """A piece of work is one kv head's share of one split of one sequence; programs take them in turn. Writes the
    output if there is one split, else the split's partial result and the logarithm of its weight."""
    head_M = tl.arange(0, BLOCK_ROWS)
    dim_D = tl.arange(0, BLOCK_DIM)
    is_value_MD = (head_M < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]

    num_pieces = 0
    for first_sequence in range(0, num_sequences, _SEQUENCE_BLOCK):
        _, num_splits_S = _count_splits(
            query_start_S1, context_S, first_sequence, num_sequences, window,
            MIN_SPLIT_TOKENS, MAX_SPLITS, BLOCK_KEYS, HAS_WINDOW,
        )  # fmt: skip
        num_pieces += tl.sum(num_splits_S, 0)

    for piece in range(tl.program_id(0), num_pieces * NUM_KV_HEADS, tl.num_programs(0)):
        kv_head = piece % NUM_KV_HEADS
        found = 0
        split = 0
        before = 0
        for first_sequence in range(0, num_sequences, _SEQUENCE_BLOCK):
            sequence_S, num_splits_S = _count_splits(
                query_start_S1, context_S, first_sequence, num_sequences, window,
                MIN_SPLIT_TOKENS, MAX_SPLITS, BLOCK_KEYS, HAS_WINDOW,
            )  # fmt: skip
            here, place, before = _locate(piece // NUM_KV_HEADS, before, sequence_S, num_splits_S)
            found += here
            split += place
        sequence = found - 1
        context = tl.load(context_S + sequence)
        row = tl.load(query_start_S1 + sequence).to(tl.int64)
        first_key, split_tokens, num_splits = _split_context(
            context, window, MIN_SPLIT_TOKENS, MAX_SPLITS, BLOCK_KEYS, HAS_WINDOW
        )
        begin = first_key + split * split_tokens

        at_MD = (kv_head * GROUP + head_M)[:, None] * HEAD_DIM + dim_D[None, :]
        q_MD = tl.load(qkv_TE + row * qkv_stride + at_MD, mask=is_value_MD, other=0.0)
        sum_M, maximum_M, mixed_MD = _walk(
            q_MD,
            tl.zeros([BLOCK_ROWS], tl.float32),
            tl.full([BLOCK_ROWS], -float("inf"), tl.float32),
            tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32),
            tl.zeros([BLOCK_ROWS], tl.int32) + context - 1,
            begin,
            tl.minimum(begin + split_tokens, context),
            kv_PLBCD + tl.cast(layer, tl.int64) * layer_stride + kv_head * HEAD_DIM,
            pages_SM + tl.cast(sequence, tl.int64) * pages_stride,
            page_stride, token_stride, window, score_scale, softcap, exponent_scale,
            NUM_KV_HEADS, HEAD_DIM, PAGE_TOKENS, BLOCK_KEYS, BLOCK_DIM, HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
        result_MD = mixed_MD / sum_M[:, None]
        if num_splits == 1:
            out_at_MD = out_TE + row * (NUM_KV_HEADS * GROUP * HEAD_DIM) + at_MD
            tl.store(out_at_MD, result_MD.to(out_TE.dtype.element_ty), mask=is_value_MD)
        else:
            first_head = (tl.cast(sequence, tl.int64) * table_splits + split) * (NUM_KV_HEADS * GROUP)
            tl.store(partial_SWHD + first_head * HEAD_DIM + at_MD, result_MD, mask=is_value_MD)
            weight_at_M = weight_SWH + first_head + kv_head * GROUP + head_M
            tl.store(weight_at_M, tl.fma(maximum_M, exponent_scale, tl.log2(sum_M)), mask=head_M < GROUP)


@triton.jit(
    do_not_specialize=["table_splits", "window"], do_not_specialize_on_alignment=["query_start_S1", "context_S"]
)
def combine_kernel(
    out_TE,
    partial_SWHD,
    weight_SWH,
    query_start_S1,
    context_S,
    table_splits,
    window,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One head of one sequence: the mean of its splits' results by their weights. The sum always runs over MAX_SPLITS
    terms, so that its order does not depend on the table's width."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(query_start_S1 + sequence).to(tl.int64)
    num_rows = tl.load(query_start_S1 + sequence + 1) - row
    _, _, num_splits = _split_context(
        tl.load(context_S + sequence), window, MIN_SPLIT_TOKENS, MAX_SPLITS, BLOCK_KEYS, HAS_WINDOW
    )
    if (num_rows != 1) | (num_splits <= 1):
        return
    split_W = tl.arange(0, MAX_SPLITS)
    dim_D = tl.arange(0, BLOCK_DIM)
    is_split_W = split_W < num_splits
    place_W = (sequence * table_splits + split_W) * NUM_HEADS + head
    log_weight_W = tl.load(weight_SWH + place_W, mask=is_split_W, other=-float("inf"))
    partial_WD = tl.load(
        partial_SWHD + place_W[:, None] * HEAD_DIM + dim_D[None, :],
        mask=is_split_W[:, None] & (dim_D < HEAD_DIM)[None, :],
        other=0.0,
    )
    weight_W = tl.exp2(log_weight_W - tl.max(log_weight_W, 0))
    result_D = tl.sum(partial_WD * weight_W[:, None], 0) / tl.sum(weight_W, 0)
    out_at_D = out_TE + (row * NUM_HEADS + head) * HEAD_DIM + dim_D
    tl.store(out_at_D, result_D.to(out_TE.dtype.element_ty), mask=dim_D < HEAD_DIM)


@triton.jit(
    do_not_specialize=["num_sequences", "layer", "pages_stride", "window"],
    do_not_specialize_on_alignment=["query_start_S1", "context_S", "pages_SM"],
)
def tile_kernel(
    qkv_TE,
    kv_PLBCD,
    out_TE,
    query_start_S1,
    context_S,
    pages_SM,
    num_sequences,
    layer,
    qkv_stride,
    pages_stride,
    page_stride,
    layer_stride,
    token_stride,
    window,
    score_scale,
    softcap,
    exponent_scale,
    SKIP_SINGLE_ROWS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One kv head's share of a tile of adjacent query positions. A sequence's last tile, with most keys, is first."""
    TILE_QUERIES: tl.constexpr = BLOCK_ROWS // GROUP
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    work = tl.program_id(0) // NUM_KV_HEADS
    found = 0
    place = 0
    before = 0
    for first_sequence in range(0, num_sequences, _SEQUENCE_BLOCK):
        sequence_S = first_sequence + tl.arange(0, _SEQUENCE_BLOCK)
        is_one_S = sequence_S < num_sequences
        start_S = tl.load(query_start_S1 + sequence_S, mask=is_one_S, other=0)
        num_rows_S = tl.load(query_start_S1 + sequence_S + 1, mask=is_one_S, other=0) - start_S
        num_tiles_S = tl.cdiv(num_rows_S, TILE_QUERIES)
        if SKIP_SINGLE_ROWS:
            num_tiles_S = tl.where(num_rows_S == 1, 0, num_tiles_S)
        here, place_here, before = _locate(work, before, sequence_S, num_tiles_S)
        found += here
        place += place_here
    if found == 0:
        return
    sequence = found - 1
    start = tl.load(query_start_S1 + sequence)
    num_rows = tl.load(query_start_S1 + sequence + 1) - start
    context = tl.load(context_S + sequence)
    first_query = (tl.cdiv(num_rows, TILE_QUERIES) - 1 - place) * TILE_QUERIES
    first_position = context - num_rows + first_query

    row_M = tl.arange(0, BLOCK_ROWS)
    dim_D = tl.arange(0, BLOCK_DIM)
    query_M = first_query + row_M // GROUP
    is_row_M = (row_M < TILE_QUERIES * GROUP) & (query_M < num_rows)
    is_value_MD = is_row_M[:, None] & (dim_D < HEAD_DIM)[None, :]
    at_MD = (kv_head * GROUP + row_M % GROUP)[:, None] * HEAD_DIM + dim_D[None, :]
    token_M = (start + query_M).to(tl.int64)
    q_MD = tl.load(qkv_TE + (token_M * qkv_stride)[:, None] + at_MD, mask=is_value_MD, other=0.0)

    end = tl.minimum(first_position + TILE_QUERIES, context)
    position_M = tl.minimum(first_position + row_M // GROUP, end - 1)  # rows of no query see what the last one sees
    keys_at = kv_PLBCD + tl.cast(layer, tl.int64) * layer_stride + kv_head * HEAD_DIM
    pages_at = pages_SM + tl.cast(sequence, tl.int64) * pages_stride
    sum_M = tl.zeros([BLOCK_ROWS], tl.float32)
    maximum_M = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    mixed_MD = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    if HAS_WINDOW:
        begin = tl.maximum(first_position + 1 - window, 0) // BLOCK_KEYS * BLOCK_KEYS
    else:
        begin = (first_position + 1) // BLOCK_KEYS * BLOCK_KEYS
        sum_M, maximum_M, mixed_MD = _walk(
            q_MD, sum_M, maximum_M, mixed_MD, position_M, 0, begin,
            keys_at, pages_at, page_stride, token_stride, window, score_scale, softcap, exponent_scale,
            NUM_KV_HEADS, HEAD_DIM, PAGE_TOKENS, BLOCK_KEYS, BLOCK_DIM, HAS_WINDOW, HAS_SOFTCAP, False,
        )  # fmt: skip
    sum_M, maximum_M, mixed_MD = _walk(
        q_MD, sum_M, maximum_M, mixed_MD, position_M, begin, end,
        keys_at, pages_at, page_stride, token_stride, window, score_scale, softcap, exponent_scale,
        NUM_KV_HEADS, HEAD_DIM, PAGE_TOKENS, BLOCK_KEYS, BLOCK_DIM, HAS_WINDOW, HAS_SOFTCAP, True,
    )  # fmt: skip
    out_at_MD = out_TE + (token_M * (NUM_KV_HEADS * GROUP * HEAD_DIM))[:, None] + at_MD
    tl.store(out_at_MD, (mixed_MD / sum_M[:, None]).to(out_TE.dtype.element_ty), mask=is_value_MD)
