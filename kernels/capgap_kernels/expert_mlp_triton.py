"""Triton kernels of `expert_mlp`: grouped GEMMs over rows sorted by expert, with gather, activation, gate and scatter
fused into their two ends."""

# N tokens, D hidden, E experts, K choices per token, M = N*K rows in permuted order, F feed-forward width.
# Rows offsets[e]:offsets[e+1] belong to expert e, rows from offsets[E] on to padding ("group E").
# GEMM tiles are BLOCK_M x BLOCK_N over a contraction in steps of BLOCK_K, accumulated in float32.

import torch
import triton
import triton.language as tl
from torch import Tensor

from capgap_kernels.permutation_triton import gather_sum

INTERPRETED = triton.knobs.runtime.interpret

# Under the interpreter tiles are small, so that small tests cross their borders.
ROW_TILES_PER_GROUP = 2 if INTERPRETED else 8
ROWS_PER_SPLIT = 16 if INTERPRETED else 512
# Programs that keep the GPU busy: four waves over an H200's 132 multiprocessors.
WANTED_PROGRAMS = 528
# The gate gradient is summed per GRAIN columns, so that its buffer does not depend on the tuned BLOCK_N.
GRAIN = 16 if INTERPRETED else 64

# Tile sizes (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) to choose from, the widest first.
ROW_SIZES = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 32, 4, 3),
)
# Two accumulators (gate and up) or a long epilogue leave no registers for the widest tile.
WIDE_EPILOGUE_SIZES = (
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 32, 4, 3),
)
# Two stages more: the gathered rows' addresses are loaded stages before the rows themselves.
WEIGHT_SIZES = (
    (128, 256, 64, 8, 5),
    (128, 128, 64, 8, 5),
    (128, 128, 64, 4, 4),
    (64, 64, 32, 4, 5),
)

# Fewer rows than this run in the smallest tiles untuned: wider ones would be empty, and a first call of a few rows must
# not choose for the large ones that follow (SMALL is part of the tuning keys).
SMALL_ROWS = 1024


def configs_of(sizes: tuple[tuple[int, int, int, int, int], ...]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in (((32, 32, 32, 4, 1),) if INTERPRETED else sizes)
    ]


def _fitting(configs: list[triton.Config], named_args: dict[str, object], **options: object) -> list[triton.Config]:
    """Float32 products run on the scalar units (no tf32), where a large tile would only spill."""
    if options["SMALL"]:
        return configs[-1:]
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float32 for arg in _operands(named_args)):
        return [config for config in configs if config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"] <= 64 * 64]
    return configs


def _operands(named_args: dict[str, object]) -> list[object]:
    return [named_args.get(name) for name in ("hidden_ptr", "a_ptr", "grad_ptr", "p_ptr")]


PRUNE = {"early_config_prune": _fitting}


@triton.jit
def _activate(pre, GELU: tl.constexpr):
    if GELU:
        return 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    return pre * tl.sigmoid(pre)


@triton.jit
def _slope(pre, GELU: tl.constexpr):
    if GELU:
        return 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476)) + pre * 0.3989422804014327 * tl.exp(-0.5 * pre * pre)
    share = tl.sigmoid(pre)
    return share * (1.0 + pre * (1.0 - share))


@triton.jit
def _tile_of_program(num_column_tiles, num_row_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles walk together over the columns, so that weights are read from L2."""
    program = tl.program_id(0)
    per_group = GROUP * num_column_tiles
    first = program // per_group * GROUP
    rows_here = min(num_row_tiles - first, GROUP)
    return first + program % per_group % rows_here, program % per_group // rows_here


@triton.jit
def _rows_of_tile(
    tile,
    offsets_ptr,  # [E + 1]
    M,
    E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(group, first row, which of BLOCK_M rows belong to the group); group > E for a tile past the last one.

    Every program finds its own tile from the E+1 offsets: no tile table, no host sync, one static grid. Addresses of
    rows are an int64 of the first row plus int32 within the tile: whole tiles of int64 would spill registers.
    """
    group_G = tl.arange(0, BLOCK_G)
    start_G = tl.load(offsets_ptr + group_G, mask=group_G <= E, other=M)
    stop_G = tl.load(offsets_ptr + group_G + 1, mask=group_G < E, other=M)
    tiles_G = (stop_G - start_G + BLOCK_M - 1) // BLOCK_M
    through_G = tl.cumsum(tiles_G, 0)
    group = tl.sum((through_G <= tile).to(tl.int32), 0)
    here_G = group_G == group
    start = tl.sum(tl.where(here_G, start_G, 0), 0)
    stop = tl.sum(tl.where(here_G, stop_G, 0), 0)
    before = tl.sum(tl.where(here_G, through_G - tiles_G, 0), 0)
    first_row = start + (tile - before) * BLOCK_M
    return group.to(tl.int64), first_row.to(tl.int64), first_row + tl.arange(0, BLOCK_M) < stop


@triton.autotune(
    configs=configs_of(WIDE_EPILOGUE_SIZES),
    key=["D", "F", "GATED", "KEEP", "SMALL"],
    prune_configs_by=PRUNE,
    cache_results=True,
)
@triton.jit
def expand_kernel(
    hidden_ptr,  # [N, D]
    slot_ptr,  # [M]
    offsets_ptr,  # [E + 1]
    w1_ptr,  # [E, F, D]
    b1_ptr,  # [E, F] contiguous or unused
    w3_ptr,  # [E, F, D] or unused
    pre_ptr,  # out [M, F] or unused
    up_ptr,  # out [M, F] or unused
    inner_ptr,  # out [M, F]
    M,
    D,
    F,
    stride_hn,
    stride_hd,
    stride_1e,
    stride_1f,
    stride_1d,
    stride_3e,
    stride_3f,
    stride_3d,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """inner = act(x w1^T + b1) [* (x w3^T)], x gathered from the tokens; `pre` and `up` are kept for the backward."""
    tile, column_tile = _tile_of_program(tl.cdiv(F, BLOCK_N), tl.cdiv(M, BLOCK_M) + E, GROUP)
    expert, first_row, inside_M = _rows_of_tile(tile, offsets_ptr, M, E, BLOCK_G, BLOCK_M)
    if expert >= E:
        return
    token_M = tl.load(slot_ptr + first_row + tl.arange(0, BLOCK_M), mask=inside_M, other=0) // K
    column_N = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < F
    step_K = tl.arange(0, BLOCK_K).to(tl.int64)
    pre_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        inside_K = step_K < D - start
        x_MK = tl.load(
            hidden_ptr + token_M[:, None] * stride_hn + (start + step_K)[None, :] * stride_hd,
            mask=inside_M[:, None] & inside_K[None, :],
            other=0.0,
        )
        w1_KN = tl.load(
            w1_ptr + expert * stride_1e + column_N[None, :] * stride_1f + (start + step_K)[:, None] * stride_1d,
            mask=inside_N[None, :] & inside_K[:, None],
            other=0.0,
        )
        pre_MN = tl.dot(x_MK, w1_KN, pre_MN, input_precision="ieee")
        if GATED:
            w3_KN = tl.load(
                w3_ptr + expert * stride_3e + column_N[None, :] * stride_3f + (start + step_K)[:, None] * stride_3d,
                mask=inside_N[None, :] & inside_K[:, None],
                other=0.0,
            )
            up_MN = tl.dot(x_MK, w3_KN, up_MN, input_precision="ieee")
    if HAS_BIAS:
        pre_MN += tl.load(b1_ptr + expert * F + column_N, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    corner = first_row * F + column_tile.to(tl.int64) * BLOCK_N
    within_MN = tl.arange(0, BLOCK_M)[:, None] * F + tl.arange(0, BLOCK_N)[None, :]
    inside_MN = inside_M[:, None] & inside_N[None, :]
    dtype = inner_ptr.dtype.element_ty
    inner_MN = _activate(pre_MN, GELU)
    if KEEP:
        tl.store(pre_ptr + corner + within_MN, pre_MN.to(dtype), mask=inside_MN)
    if GATED:
        inner_MN = inner_MN * up_MN
        if KEEP:
            tl.store(up_ptr + corner + within_MN, up_MN.to(dtype), mask=inside_MN)
    tl.store(inner_ptr + corner + within_MN, inner_MN.to(dtype), mask=inside_MN)


@triton.jit
def _add_product(
    sum_MN,
    a_ptr,  # [BLOCK_M, C] contiguous
    b_ptr,  # [C, W]
    inside_M,
    column_N,
    C,
    W,
    stride_bc,
    stride_bw,
    BLOCK_K: tl.constexpr,
):
    within_M = tl.arange(0, sum_MN.shape[0])
    step_K = tl.arange(0, BLOCK_K).to(tl.int64)
    for start in range(0, C, BLOCK_K):
        inside_K = step_K < C - start
        a_MK = tl.load(
            a_ptr + within_M[:, None] * C + (start + step_K)[None, :],
            mask=inside_M[:, None] & inside_K[None, :],
            other=0.0,
        )
        b_KN = tl.load(
            b_ptr + (start + step_K)[:, None] * stride_bc + column_N[None, :] * stride_bw,
            mask=inside_K[:, None] & (column_N < W)[None, :],
            other=0.0,
        )
        sum_MN = tl.dot(a_MK, b_KN, sum_MN, input_precision="ieee")
    return sum_MN


@triton.autotune(
    configs=configs_of(ROW_SIZES),
    key=["C", "W", "TWO", "stride_bw", "SMALL"],
    prune_configs_by=PRUNE,
    cache_results=True,
)
@triton.jit
def contract_kernel(
    a_ptr,  # [M, C] contiguous
    b_ptr,  # [E, C, W]
    second_a_ptr,  # [M, C] contiguous or unused
    second_b_ptr,  # [E, C, W] or unused
    bias_ptr,  # [E, W] contiguous or unused
    gate_ptr,  # [M] by slot, or unused
    slot_ptr,  # [M]
    offsets_ptr,  # [E + 1]
    out_ptr,  # out [M, W]: by slot when SCATTER, else in permuted order
    M,
    C,
    W,
    stride_be,
    stride_bc,
    stride_bw,
    stride_se,
    stride_sc,
    stride_sw,
    E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
    TWO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SCATTER: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a b [+ second_a second_b] [+ bias] [* gate] per row; a scattered result has 0 in the rows of padding."""
    tile, column_tile = _tile_of_program(tl.cdiv(W, BLOCK_N), tl.cdiv(M, BLOCK_M) + E + 1, GROUP)
    group, first_row, inside_M = _rows_of_tile(tile, offsets_ptr, M, E, BLOCK_G, BLOCK_M)
    if group > E:
        return
    column_N = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < W
    inside_MN = inside_M[:, None] & inside_N[None, :]
    within_M = tl.arange(0, BLOCK_M)
    slot_M = tl.load(slot_ptr + first_row + within_M, mask=inside_M, other=0)
    out_row_M = slot_M if SCATTER else first_row + within_M
    address_MN = out_row_M[:, None] * W + column_N[None, :]
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if group == E:
        if SCATTER:
            tl.store(out_ptr + address_MN, sum_MN.to(out_ptr.dtype.element_ty), mask=inside_MN)
        return
    sum_MN = _add_product(
        sum_MN,
        a_ptr + first_row * C,
        b_ptr + group * stride_be,
        inside_M,
        column_N,
        C,
        W,
        stride_bc,
        stride_bw,
        BLOCK_K,
    )
    if TWO:
        sum_MN = _add_product(
            sum_MN,
            second_a_ptr + first_row * C,
            second_b_ptr + group * stride_se,
            inside_M,
            column_N,
            C,
            W,
            stride_sc,
            stride_sw,
            BLOCK_K,
        )
    if HAS_BIAS:
        sum_MN += tl.load(bias_ptr + group * W + column_N, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        sum_MN *= tl.load(gate_ptr + slot_M, mask=inside_M, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + address_MN, sum_MN.to(out_ptr.dtype.element_ty), mask=inside_MN)


@triton.autotune(
    configs=configs_of(WIDE_EPILOGUE_SIZES),
    key=["D", "F", "GATED", "SMALL"],
    prune_configs_by=PRUNE,
    cache_results=True,
)
@triton.jit
def expand_backward_kernel(
    grad_ptr,  # [N, D]: upstream gradient
    slot_ptr,  # [M]
    offsets_ptr,  # [E + 1]
    gate_ptr,  # [M] by slot
    w2_ptr,  # [E, D, F]
    pre_ptr,  # [M, F]
    up_ptr,  # [M, F] or unused
    grad_pre_ptr,  # out [M, F]
    grad_up_ptr,  # out [M, F] or unused
    weighted_inner_ptr,  # out [M, F]: gate * inner, what the gradient of w2 multiplies
    gate_part_ptr,  # out [F / GRAIN, M]: <grad w2, inner>, a sum per grain of columns
    M,
    D,
    F,
    stride_gn,
    stride_gd,
    stride_2e,
    stride_2d,
    stride_2f,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient before the activation; `inner` is recomputed from `pre` (and `up`) instead of being kept."""
    tile, column_tile = _tile_of_program(tl.cdiv(F, BLOCK_N), tl.cdiv(M, BLOCK_M) + E, GROUP)
    expert, first_row, inside_M = _rows_of_tile(tile, offsets_ptr, M, E, BLOCK_G, BLOCK_M)
    if expert >= E:
        return
    slot_M = tl.load(slot_ptr + first_row + tl.arange(0, BLOCK_M), mask=inside_M, other=0)
    token_M = slot_M // K
    column_N = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < F
    step_K = tl.arange(0, BLOCK_K).to(tl.int64)
    grad_inner_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        inside_K = step_K < D - start
        grad_MK = tl.load(
            grad_ptr + token_M[:, None] * stride_gn + (start + step_K)[None, :] * stride_gd,
            mask=inside_M[:, None] & inside_K[None, :],
            other=0.0,
        )
        w2_KN = tl.load(
            w2_ptr + expert * stride_2e + (start + step_K)[:, None] * stride_2d + column_N[None, :] * stride_2f,
            mask=inside_K[:, None] & inside_N[None, :],
            other=0.0,
        )
        grad_inner_MN = tl.dot(grad_MK, w2_KN, grad_inner_MN, input_precision="ieee")
    gate_M = tl.load(gate_ptr + slot_M, mask=inside_M, other=0.0).to(tl.float32)
    # The epilogue in two halves: with a whole tile of gradients, values and addresses alive the registers spill.
    left_MH, right_MH = tl.split(tl.reshape(grad_inner_MN, [BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1))
    part_M = tl.zeros([BLOCK_M], tl.float32)
    for half in tl.static_range(2):
        column = column_tile.to(tl.int64) * BLOCK_N + half * (BLOCK_N // 2)
        within_MH = tl.arange(0, BLOCK_M)[:, None] * F + tl.arange(0, BLOCK_N // 2)[None, :]
        inside_MH = inside_M[:, None] & (column + tl.arange(0, BLOCK_N // 2) < F)[None, :]
        corner = first_row * F + column
        grad_inner_MH = left_MH if half == 0 else right_MH
        pre_MH = tl.load(pre_ptr + corner + within_MH, mask=inside_MH, other=0.0).to(tl.float32)
        inner_MH = _activate(pre_MH, GELU)
        grad_pre_MH = gate_M[:, None] * grad_inner_MH * _slope(pre_MH, GELU)
        dtype = grad_pre_ptr.dtype.element_ty
        if GATED:
            up_MH = tl.load(up_ptr + corner + within_MH, mask=inside_MH, other=0.0).to(tl.float32)
            grad_up_MH = gate_M[:, None] * grad_inner_MH * inner_MH
            tl.store(grad_up_ptr + corner + within_MH, grad_up_MH.to(dtype), mask=inside_MH)
            grad_pre_MH *= up_MH
            inner_MH *= up_MH
        tl.store(grad_pre_ptr + corner + within_MH, grad_pre_MH.to(dtype), mask=inside_MH)
        tl.store(weighted_inner_ptr + corner + within_MH, (gate_M[:, None] * inner_MH).to(dtype), mask=inside_MH)
        part_M += tl.sum(tl.where(inside_MH, grad_inner_MH * inner_MH, 0.0), 1)
    row_M = first_row + tl.arange(0, BLOCK_M)
    grain = column_tile.to(tl.int64) * (BLOCK_N // PART)
    for within in tl.static_range(BLOCK_N // PART):
        part_here_M = part_M if within == 0 else tl.zeros([BLOCK_M], tl.float32)
        # A comparison of blocks: Triton 3.9's interpreter makes an integer of a block & a scalar.
        written_M = inside_M & ((grain + within) * PART + tl.zeros([BLOCK_M], tl.int64) < F)
        tl.store(gate_part_ptr + (grain + within) * M + row_M, part_here_M, mask=written_M)


@triton.jit
def gate_gradient_kernel(
    gate_part_ptr,  # [G, M]
    grad_ptr,  # [N, D]: upstream gradient
    b2_ptr,  # [E, D] contiguous or unused
    expert_ptr,  # [N, K]
    position_ptr,  # [N, K]
    end_ptr,  # []: offsets[E]
    grad_gate_ptr,  # out [N, K]
    N,
    M,
    D,
    G,
    stride_gn,
    stride_gd,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """<grad, y> of every slot, y the output of its expert: the parts of <grad w2, inner>, and <grad, b2>."""
    token_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = token_N < N
    end = tl.load(end_ptr)
    for choice in tl.static_range(K):
        slot_N = token_N * K + choice
        position_N = tl.load(position_ptr + slot_N, mask=inside_N, other=0)
        placed_N = inside_N & (position_N < end)
        sum_N = tl.zeros([BLOCK_N], tl.float32)
        part_ptr_N = gate_part_ptr + position_N
        for _ in range(0, G):
            sum_N += tl.load(part_ptr_N, mask=placed_N, other=0.0)
            part_ptr_N += M
        if HAS_BIAS:
            expert_N = tl.load(expert_ptr + slot_N, mask=placed_N, other=0)
            for start in range(0, D, BLOCK_D):
                column_D = start + tl.arange(0, BLOCK_D).to(tl.int64)
                read_ND = placed_N[:, None] & (column_D < D)[None, :]
                grad_ND = tl.load(
                    grad_ptr + token_N[:, None] * stride_gn + column_D[None, :] * stride_gd, mask=read_ND, other=0.0
                )
                b2_ND = tl.load(b2_ptr + expert_N[:, None] * D + column_D[None, :], mask=read_ND, other=0.0)
                sum_N += tl.sum(grad_ND.to(tl.float32) * b2_ND.to(tl.float32), 1)
        tl.store(grad_gate_ptr + slot_N, sum_N, mask=inside_N)


@triton.autotune(
    configs=configs_of(WEIGHT_SIZES),
    key=["I", "J", "SPLITS", "GATHER_P", "GATHER_Q", "SMALL"],
    prune_configs_by=PRUNE,
    cache_results=True,
)
@triton.jit
def weight_gradient_kernel(
    p_ptr,  # [M, I] in permuted order, or [N, I] by token when GATHER_P
    q_ptr,  # [M, J] in permuted order, or [N, J] by token when GATHER_Q
    gate_ptr,  # [M] by slot, or unused
    slot_ptr,  # [M]
    offsets_ptr,  # [E + 1]
    out_ptr,  # out [SPLITS, E, I, J]
    bias_ptr,  # out [SPLITS, E, I] or unused
    I,
    J,
    stride_pm,
    stride_pi,
    stride_qm,
    stride_qj,
    E: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """p^T q over the rows of one expert, in SPLITS parts; and the sum over rows of p (times the gate) for the bias."""
    expert = (tl.program_id(1) // SPLITS).to(tl.int64)
    split = (tl.program_id(1) % SPLITS).to(tl.int64)
    num_column_tiles = tl.cdiv(J, BLOCK_N)
    i_M = (tl.program_id(0) // num_column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j_N = (tl.program_id(0) % num_column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M, inside_N = i_M < I, j_N < J
    start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    rows_per_split = tl.cdiv(tl.cdiv(stop - start, BLOCK_K), SPLITS) * BLOCK_K
    start += split * rows_per_split
    stop = min(stop, start + rows_per_split)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_MO = tl.zeros([BLOCK_M, 16], tl.float32)
    for first in range(start, stop, BLOCK_K):
        row_K = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside_K = row_K < stop
        slot_K = tl.load(slot_ptr + row_K, mask=inside_K, other=0)
        p_row_K = slot_K // K if GATHER_P else row_K
        q_row_K = slot_K // K if GATHER_Q else row_K
        p_KM = tl.load(
            p_ptr + p_row_K[:, None] * stride_pm + i_M[None, :] * stride_pi,
            mask=inside_K[:, None] & inside_M[None, :],
            other=0.0,
        )
        q_KN = tl.load(
            q_ptr + q_row_K[:, None] * stride_qm + j_N[None, :] * stride_qj,
            mask=inside_K[:, None] & inside_N[None, :],
            other=0.0,
        )
        sum_MN = tl.dot(tl.trans(p_KM), q_KN, sum_MN, input_precision="ieee")
        if HAS_BIAS:
            # A sum over rows as a product with a column of gates (or ones), repeated 16 times, the narrowest that
            # tensor cores take: a sum in registers would keep p out of the asynchronous copies.
            weight_K = tl.full([BLOCK_K], 1.0, tl.float32)
            if HAS_GATE:
                weight_K = tl.load(gate_ptr + slot_K, mask=inside_K, other=0.0).to(tl.float32)
            weight_KO = tl.broadcast_to(weight_K[:, None], [BLOCK_K, 16]).to(p_KM.dtype)
            bias_MO = tl.dot(tl.trans(p_KM), weight_KO, bias_MO, input_precision="ieee")
    part = split * E + expert
    tl.store(
        out_ptr + part * I * J + i_M[:, None] * J + j_N[None, :],
        sum_MN.to(out_ptr.dtype.element_ty),
        mask=inside_M[:, None] & inside_N[None, :],
    )
    if HAS_BIAS:
        # Every column tile has the same sum; the first one writes it.
        first_tile_M = tl.program_id(0) % num_column_tiles + tl.zeros([BLOCK_M], tl.int32) == 0
        bias_M = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, bias_MO, 0.0), 1)
        tl.store(bias_ptr + part * I + i_M, bias_M.to(bias_ptr.dtype.element_ty), mask=inside_M & first_tile_M)


def expert_mlp_forward(
    hidden_ND: Tensor,
    gate_NK: Tensor,
    slot_M: Tensor,
    position_NK: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    w3_EFD: Tensor | None,
    *,
    gelu: bool,
    keep_for_backward: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output [N, D], pre [M, F], up [M, F]); the last two None unless kept for the backward. Two launches for one
    choice per token, three for more."""
    num_slots, top_k = slot_M.shape[0], position_NK.shape[1]
    num_experts, width, hidden = w1_EFD.shape
    inner_MF = torch.empty(num_slots, width, dtype=hidden_ND.dtype, device=hidden_ND.device)
    pre_MF = torch.empty_like(inner_MF) if keep_for_backward else None
    up_MF = torch.empty_like(inner_MF) if keep_for_backward and w3_EFD is not None else None
    expand_kernel[lambda meta: (_row_tiles(num_slots, num_experts, meta) * triton.cdiv(width, meta["BLOCK_N"]),)](
        hidden_ND,
        slot_M,
        offsets_E1,
        w1_EFD,
        b1_EF if b1_EF is None else b1_EF.contiguous(),
        w3_EFD,
        pre_MF,
        up_MF,
        inner_MF,
        num_slots,
        hidden,
        width,
        *hidden_ND.stride(),
        *w1_EFD.stride(),
        *(w1_EFD if w3_EFD is None else w3_EFD).stride(),
        E=num_experts,
        K=top_k,
        BLOCK_G=triton.next_power_of_2(num_experts + 1),
        GROUP=ROW_TILES_PER_GROUP,
        GELU=gelu,
        GATED=w3_EFD is not None,
        HAS_BIAS=b1_EF is not None,
        KEEP=keep_for_backward,
        SMALL=num_slots < SMALL_ROWS,
    )
    weights_EFD = w2_EDF.transpose(1, 2)
    if top_k == 1:
        out_ND = _contract(inner_MF, weights_EFD, slot_M, offsets_E1, bias_EW=b2_ED, gate_NK=gate_NK, scatter=True)
    else:
        y_MD = _contract(inner_MF, weights_EFD, slot_M, offsets_E1, bias_EW=b2_ED)
        out_ND = gather_sum(y_MD, position_NK, offsets_E1[-1], gate_NK=gate_NK)
    return out_ND, pre_MF, up_MF


def gradient_before_activation(
    grad_ND: Tensor,
    gate_NK: Tensor,
    slot_M: Tensor,
    offsets_E1: Tensor,
    w2_EDF: Tensor,
    pre_MF: Tensor,
    up_MF: Tensor | None,
    *,
    gelu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(gradient of pre [M, F], of up [M, F], gate * inner [M, F], parts of the gates' gradient [F / GRAIN, M])."""
    (num_slots, width), (num_experts, hidden, _) = pre_MF.shape, w2_EDF.shape
    grad_pre_MF, weighted_inner_MF = torch.empty_like(pre_MF), torch.empty_like(pre_MF)
    grad_up_MF = None if up_MF is None else torch.empty_like(up_MF)
    part_GM = torch.empty(triton.cdiv(width, GRAIN), num_slots, dtype=torch.float32, device=pre_MF.device)
    expand_backward_kernel[
        lambda meta: (_row_tiles(num_slots, num_experts, meta) * triton.cdiv(width, meta["BLOCK_N"]),)
    ](
        grad_ND,
        slot_M,
        offsets_E1,
        gate_NK,
        w2_EDF,
        pre_MF,
        up_MF,
        grad_pre_MF,
        grad_up_MF,
        weighted_inner_MF,
        part_GM,
        num_slots,
        hidden,
        width,
        *grad_ND.stride(),
        *w2_EDF.stride(),
        E=num_experts,
        K=gate_NK.shape[1],
        BLOCK_G=triton.next_power_of_2(num_experts + 1),
        GROUP=ROW_TILES_PER_GROUP,
        PART=GRAIN,
        GELU=gelu,
        GATED=up_MF is not None,
        SMALL=num_slots < SMALL_ROWS,
    )
    return grad_pre_MF, grad_up_MF, weighted_inner_MF, part_GM


def gate_gradient(
    part_GM: Tensor,
    grad_ND: Tensor,
    b2_ED: Tensor | None,
    expert_NK: Tensor,
    position_NK: Tensor,
    end: Tensor,
) -> Tensor:
    """[N, K] float32: the inner product of each token's upstream gradient with the output of its chosen expert."""
    (num_tokens, hidden), (num_parts, num_slots) = grad_ND.shape, part_GM.shape
    grad_gate_NK = torch.empty(position_NK.shape, dtype=torch.float32, device=grad_ND.device)
    block_n = 16
    gate_gradient_kernel[(max(1, triton.cdiv(num_tokens, block_n)),)](
        part_GM,
        grad_ND,
        b2_ED if b2_ED is None else b2_ED.contiguous(),
        expert_NK,
        position_NK,
        end,
        grad_gate_NK,
        num_tokens,
        num_slots,
        hidden,
        num_parts,
        *grad_ND.stride(),
        K=position_NK.shape[1],
        HAS_BIAS=b2_ED is not None,
        BLOCK_N=block_n,
        BLOCK_D=min(256, triton.next_power_of_2(hidden)),
    )
    return grad_gate_NK


def hidden_gradient(
    grad_pre_MF: Tensor,
    grad_up_MF: Tensor | None,
    slot_M: Tensor,
    position_NK: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor | None,
) -> Tensor:
    """[N, D]: the gradient of the hidden states, summed over each token's choices."""
    second = None if grad_up_MF is None or w3_EFD is None else (grad_up_MF, w3_EFD)
    if position_NK.shape[1] == 1:
        return _contract(grad_pre_MF, w1_EFD, slot_M, offsets_E1, second=second, scatter=True)
    grad_x_MD = _contract(grad_pre_MF, w1_EFD, slot_M, offsets_E1, second=second)
    return gather_sum(grad_x_MD, position_NK, offsets_E1[-1])


def weight_gradient(
    p: Tensor,
    q: Tensor,
    slot_M: Tensor,
    offsets_E1: Tensor,
    *,
    top_k: int,
    gather_p: bool = False,
    gather_q: bool = False,
    with_bias: bool = False,
    gate_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(p^T q [E, I, J], sum over rows of p * gate [E, I]) per expert; rows come by token where gathered."""
    num_experts, (width_i, width_j), device = offsets_E1.shape[0] - 1, (p.shape[1], q.shape[1]), p.device
    splits = _row_splits(slot_M.shape[0], num_experts, width_i, width_j)
    # Parts are summed in float32 and in a fixed order: no atomics, so that two runs agree bit for bit.
    dtype = p.dtype if splits == 1 else torch.float32
    out_SEIJ = torch.empty(splits, num_experts, width_i, width_j, dtype=dtype, device=device)
    bias_SEI = torch.empty(splits, num_experts, width_i, dtype=dtype, device=device) if with_bias else None
    weight_gradient_kernel[
        lambda meta: (
            triton.cdiv(width_i, meta["BLOCK_M"]) * triton.cdiv(width_j, meta["BLOCK_N"]),
            num_experts * splits,
        )
    ](
        p,
        q,
        gate_NK,
        slot_M,
        offsets_E1,
        out_SEIJ,
        bias_SEI,
        width_i,
        width_j,
        *p.stride(),
        *q.stride(),
        E=num_experts,
        K=top_k,
        SPLITS=splits,
        GATHER_P=gather_p,
        GATHER_Q=gather_q,
        HAS_BIAS=with_bias,
        HAS_GATE=gate_NK is not None,
        SMALL=slot_M.shape[0] < SMALL_ROWS,
    )
    if splits == 1:
        return out_SEIJ[0], None if bias_SEI is None else bias_SEI[0]
    return out_SEIJ.sum(0).to(p.dtype), None if bias_SEI is None else bias_SEI.sum(0).to(p.dtype)


def _contract(
    a_MC: Tensor,
    b_ECW: Tensor,
    slot_M: Tensor,
    offsets_E1: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    bias_EW: Tensor | None = None,
    gate_NK: Tensor | None = None,
    scatter: bool = False,
) -> Tensor:
    num_slots, (num_experts, contraction, width) = slot_M.shape[0], b_ECW.shape
    out_MW = torch.empty(num_slots, width, dtype=a_MC.dtype, device=a_MC.device)
    second_a_MC, second_b_ECW = (None, None) if second is None else second
    contract_kernel[
        lambda meta: ((_row_tiles(num_slots, num_experts, meta) + 1) * triton.cdiv(width, meta["BLOCK_N"]),)
    ](
        a_MC,
        b_ECW,
        second_a_MC,
        second_b_ECW,
        bias_EW if bias_EW is None else bias_EW.contiguous(),
        gate_NK,
        slot_M,
        offsets_E1,
        out_MW,
        num_slots,
        contraction,
        width,
        *b_ECW.stride(),
        *(b_ECW if second_b_ECW is None else second_b_ECW).stride(),
        E=num_experts,
        BLOCK_G=triton.next_power_of_2(num_experts + 1),
        GROUP=ROW_TILES_PER_GROUP,
        TWO=second is not None,
        HAS_BIAS=bias_EW is not None,
        HAS_GATE=gate_NK is not None,
        SCATTER=scatter,
        SMALL=num_slots < SMALL_ROWS,
    )
    return out_MW


def _row_tiles(num_slots: int, num_experts: int, meta: dict[str, int]) -> int:
    """Row tiles that suffice for any split of the rows: each expert wastes less than one."""
    return int(triton.cdiv(num_slots, meta["BLOCK_M"])) + num_experts


def _row_splits(num_slots: int, num_experts: int, width_i: int, width_j: int) -> int:
    """Parts of an expert's rows: few experts with small weights would leave most of a GPU idle."""
    programs = num_experts * triton.cdiv(width_i, 128) * triton.cdiv(width_j, 128)
    wanted = triton.cdiv(WANTED_PROGRAMS, programs)
    return max(1, min(wanted, 16, num_slots // (num_experts * ROWS_PER_SPLIT)))
