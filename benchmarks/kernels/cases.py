"""Inputs of each op at the sizes of a model, with what it moves and computes, its check, and its rivals. The ops are
called by `worker.cuda.launches`, as in an engine. One file, for each op is one class beside the others.

Bytes are those that must be moved (every input read once, or once a pass where two passes are inherent; every output
written once), so that a share of the copy bandwidth below 1 is room for improvement, whatever the kernel really reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_defensive.packing import Format, Packing, Region
from vllm_defensive.policy import PRESETS, LayerScores, Selection
from vllm_defensive.worker.cuda import launches
from vllm_defensive_kernels import (
    DecodeWorkspace,
    PackedState,
    PagedKV,
    RaggedTokens,
    WindowScores,
    formulas,
    gram_factor,
    reference,
)


@dataclass(frozen=True)
class Shape:
    """A model and its cache. layers: as many as the eviction ops work on at once."""

    layers: int = 32
    heads: int = 8
    group: int = 4
    head_size: int = 128
    hidden: int = 4096
    page_tokens: int = 16
    window: int = 32
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def width(self) -> int:
        """Bytes of one K or one V."""
        return self.head_size * self.dtype.itemsize


LLAMA_8B = Shape()
# By the value norm that they take; the latter is the one that the guide recommends.
POLICIES = {"L1": PRESETS["layer-defensivekv"], "L2": PRESETS["halokv"]}
TINY = Shape(2, 2, 2, 32, 64, 16, 8, torch.float32, "cpu")


@dataclass(frozen=True)
class Case:
    """One measurement. check raises when the op is wrong here. rivals: what else does the same, by name."""

    op: str
    size: str
    run: Callable[[], object]
    check: Callable[[], None]
    bytes: int
    flops: int
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError where two results differ by more than `tolerance` of the largest entry or are not finite."""
    assert bool(actual.isfinite().all()), "an entry is not finite"
    error = float((actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    assert error <= tolerance, f"off by {error:.1e} of the largest entry, allowed {tolerance:.0e}"


def make_cache(shape: Shape, blocks: int, layers: int) -> PagedKV:
    """Random pages in vLLM's CUDA layout, filled in place: at full size a temporary copy would not fit."""
    size = (layers, blocks, shape.heads, shape.page_tokens, 2 * shape.head_size)
    cache = torch.empty(size, dtype=shape.dtype, device=shape.device)
    for layer in cache:
        layer.normal_()
    return PagedKV.from_layers(list(cache))


def shuffled(count: int, shape: Shape) -> Tensor:
    """Block ids 1 to count in no order, as after hours of serving; block 0 is vLLM's null block."""
    return (torch.randperm(count, device=shape.device) + 1).int()


def zipf_pages(heads: int, total: int, most: int) -> Tensor:
    """Pages of each head falling as 1/rank in a shuffled order, at least 1 and at most `most`, summing to `total`."""
    assert heads <= total <= heads * most, f"{total} pages do not fit {heads} heads of 1 to {most}"
    rank = torch.arange(1, heads + 1, dtype=torch.float64)[torch.randperm(heads)]
    low, high = 0.0, float(total * heads * most)  # bisection for the scale at which the clamped counts sum to total
    for _ in range(100):
        middle = (low + high) / 2
        counts = (middle / rank).floor().clamp(1, most).long()
        low, high = (middle, high) if int(counts.sum()) <= total else (low, middle)
    counts = (low / rank).floor().clamp(1, most).long()
    while missing := total - int(counts.sum()):
        room = (counts < most).nonzero().flatten()[:missing]
        counts[room] += 1
    return counts


def eviction_cases(shape: Shape, tokens: int, keep: float) -> Iterator[Case]:
    """The ops that a prompt's eviction runs, all layers together (value_norm: one layer)."""
    L, H, G, N, D, W = shape.layers, shape.heads, shape.group, shape.page_tokens, shape.head_size, shape.window
    blocks = tokens // N
    kept = max(round(keep * blocks), -(-W // N) + 1)
    pages = make_cache(shape, blocks + kept + 1, L)
    ids = shuffled(blocks + kept, shape)
    table, fresh = ids[:blocks], ids[blocks:]
    query = torch.randn(L, W, H * G, D, dtype=shape.dtype, device=shape.device)
    scored = RaggedTokens.of([tokens - W], shape.device)
    size = f"{tokens} tokens, {L} layers"
    last = slice(L - 1, L)  # checks and rivals look at one layer

    def dense(data_PND: Tensor) -> Tensor:
        return torch.stack([reference.gather_head(data_PND, pages, L - 1, head, table, tokens) for head in range(H)])

    key, value = dense(pages.key_PND), dense(pages.value_PND)
    attend = torch.compile(formulas.window_attention) if shape.device == "cuda" else formulas.window_attention

    def scores_in_torch() -> Tensor:
        attention = attend(query[-1], key, D**-0.5)[..., : tokens - W]
        return formulas.aggregate_defensive(attention, 5)

    def observe(group: slice) -> WindowScores:
        return launches.observe(POLICIES["L2"], query, pages, group, table[None], scored, scale=D**-0.5, key_scale=1.0)

    def check_scores() -> None:
        result = observe(last)
        one = replace(pages, layer_page_L=pages.layer_page_L[last])
        options = {"aggregate": "defensive", "pool": 5, "clamp": True, "scale": D**-0.5, "key_scale": 1.0}
        score, mean = reference.window_scores(query[last, None], one, table[None], scored, **options)
        close(result.score_LHT, score, 1e-4)  # both in fp32, in different orders
        close(result.mean_LHT, mean, 1e-4)

    yield Case(
        "window_scores",
        size,
        lambda: [observe(group) for group in launches.layer_groups(pages, scored.total)],
        check_scores,
        2 * L * H * tokens * shape.width + 2 * L * H * tokens * 4,
        2 * 2 * W * G * H * tokens * D * L,
        {"torch, compiled, dense K, 1 layer": scores_in_torch},
    )

    projection = torch.randn(shape.hidden, H * G * D, dtype=shape.dtype, device=shape.device)
    slices = projection.view(shape.hidden, H * G, D).permute(1, 2, 0)
    factor = gram_factor(slices)
    rivals: dict[str, dict[str, Callable[[], object]]] = {
        "L1": {"torch, dense V": lambda: formulas.value_norm_l1(value, slices)},
        "L2": {"torch, dense V": lambda: formulas.value_norm_l2(value, factor)},
    }
    norm = torch.empty(H, tokens - W, device=shape.device)
    for name, weight in (("L1", slices), ("L2", factor)):

        def weigh(
            name: str = name, weight: Tensor = weight, tokens: RaggedTokens = scored, out: Tensor = norm
        ) -> Tensor:
            launches.weigh(POLICIES[name], pages, L - 1, table[None], tokens, weight, value_scale=1.0, out_HT=out)
            return out

        def check(name: str = name, weight: Tensor = weight) -> None:
            few = RaggedTokens.of([min(512, tokens - W)], shape.device)
            expected, actual = (torch.empty(H, few.total, device=shape.device) for _ in range(2))
            reference.value_norm(
                pages, L - 1, table[None], few, weight.float(), order=int(name[1]), value_scale=1.0, out_HT=expected
            )
            close(weigh(name, weight, few, actual), expected, 1e-4)

        yield Case(
            f"value_norm {name}",
            f"{tokens} tokens, 1 layer",
            weigh,
            check,
            H * tokens * shape.width + weight.numel() * weight.element_size() + H * tokens * 4,
            2 * H * G * D * weight.shape[2] * tokens,
            rivals[name],
        )

    score = torch.rand(L, H, blocks * N, device=shape.device)
    score[..., -W:] = float("inf")
    layers = [LayerScores(score_HE) for score_HE in score]
    packing = Packing(Region(tokens, 0, W, N, N), tuple(fresh.tolist()), Format.plain(N))

    def choose() -> Selection:
        (selection,) = launches.choose(POLICIES["L2"], layers, packing)
        return selection

    chosen = choose()
    offset, token_PN = chosen.offset_O, chosen.tokens_PN

    def check_selection() -> None:
        again = choose()
        ranked, order = score.view(L * H, -1).sort(dim=-1, descending=True, stable=True)
        count = again.pages_LH.view(-1, 1)
        gains, page = formulas.page_gains(ranked, N), torch.arange(blocks, device=shape.device)
        assert int(count.sum()) == kept * L * H, "page counts do not add up"
        assert gains[page < count].min() >= gains[page >= count].max(), "a page would have gained more elsewhere"
        kept_RE = torch.empty_like(order).scatter_(
            1, order, torch.arange(blocks * N, device=shape.device).expand_as(order)
        )
        positions = (kept_RE < count * N).nonzero()[:, 1].int()
        assert torch.equal(again.tokens_PN.flatten(), positions), "tokens differ"

    yield Case("select", size, choose, check_selection, score.numel() * 4 + token_PN.numel() * 4, 0)

    def pack() -> None:
        launches.pack(pages, table, (chosen,), fresh, packing)

    def check_copy() -> None:
        pack()
        packed = pages.of_packed(fresh)
        for row in (0, L * H // 2, L * H - 1):
            own = slice(*offset[row : row + 2].tolist())
            kept_PN = token_PN[own].long()
            origin = pages.page_of(row // H, row % H, table[kept_PN // N])
            for data in (pages.key_PND, pages.value_PND):
                assert torch.equal(data[packed[own]], data[origin, kept_PN % N]), "a page differs"

    def copy_in_torch() -> None:
        token_T = token_PN.flatten()
        reference.compact(pages, table, offset, token_T, pages, fresh, key_scale=1.0, value_scale=1.0)

    yield Case(
        "compact",
        f"{size}, keep {keep}",
        pack,
        check_copy,
        2 * 2 * token_PN.numel() * shape.width + token_PN.numel() * 4,
        0,
        {"torch": copy_in_torch},
    )


def decode_case(shape: Shape, rows: int, tokens: int, keep: float) -> Case:
    """One layer's decode step of `rows` requests whose heads keep uneven numbers of pages."""
    H, G, N, D = shape.heads, shape.group, shape.page_tokens, shape.head_size
    layers = 2  # pages of two layers share blocks, as those of all layers do in an engine
    blocks = tokens // N
    kept = max(round(keep * blocks), 1)
    pages = make_cache(shape, rows * (kept + 1) + 1, layers)
    ids = shuffled(rows * (kept + 1), shape)
    state = PackedState.empty(rows, kept, layers, H, shape.device)
    state.fresh_SK.copy_(ids[: rows * kept].view(rows, kept))
    state.growth_S.fill_(blocks)
    counts = torch.stack([zipf_pages(layers * H, kept * layers * H, blocks) for _ in range(rows)])
    state.offset_SO[:, 1:].copy_(counts.cumsum(1))
    table = torch.zeros(rows, blocks + 1, dtype=torch.int32, device=shape.device)
    table[:, blocks] = ids[rows * kept :]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=shape.device)
    lens = torch.full((rows,), tokens + N // 2, dtype=torch.int32, device=shape.device)
    slots = torch.randperm(rows, device=shape.device).int()
    query = torch.randn(rows, H * G, D, dtype=shape.dtype, device=shape.device)
    out = torch.empty_like(query)
    space = DecodeWorkspace.empty(rows, H * G, 64, D, torch.device(shape.device))
    decoded = launches.PackedRows(slice(0, rows), table, starts, lens, slots, 1, space)
    keys = int(counts[:, H:].sum()) * N + rows * H * (N // 2)

    def decode() -> None:
        launches.attend(decoded, query, pages, 1, state, out, scale=D**-0.5, key_scale=1.0, value_scale=1.0)

    def check() -> None:
        decode()
        few = min(rows, 4)
        expected = torch.empty_like(query[:few])
        reference.ragged_paged_decode(
            query[:few], pages, 1, table[:few], starts[: few + 1], lens[:few], slots[:few], state,
            out_TQD=expected, scale=D**-0.5, key_scale=1.0, value_scale=1.0,
        )  # fmt: skip
        close(out[:few], expected, 1e-2 if shape.dtype != torch.float32 else 1e-5)  # 1e-2: a bf16 rounding step

    return Case(
        "ragged_paged_decode",
        f"{rows} x {tokens} tokens, keep {keep}, 1 layer",
        decode,
        check,
        2 * keys * shape.width + 2 * query.numel() * query.element_size(),
        4 * keys * G * D,
        rival_decodes(shape, rows, keys // (rows * H), query),
    )


def rival_decodes(shape: Shape, rows: int, mean_keys: int, query: Tensor) -> dict[str, Callable[[], object]]:
    """Decode over the same number of bytes, spread evenly over heads: the easier problem."""
    H, N, D = shape.heads, shape.page_tokens, shape.head_size
    key = torch.randn(rows, H, mean_keys, D, dtype=shape.dtype, device=shape.device)
    value = torch.randn_like(key)
    query_RQ1D = query.unsqueeze(2)

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query_RQ1D, key, value, enable_gqa=True)

    rivals: dict[str, Callable[[], object]] = {"SDPA, dense even heads": sdpa}
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except (ImportError, RuntimeError, AttributeError):
        return rivals
    blocks, version = -(-mean_keys // N), get_flash_attn_version()
    paged = torch.randn(2, rows * blocks, N, H, D, dtype=shape.dtype, device=shape.device)
    table = torch.randperm(rows * blocks, device=shape.device).int().view(rows, blocks)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=shape.device)
    lens = torch.full((rows,), mean_keys, dtype=torch.int32, device=shape.device)
    rivals["FlashAttention (vLLM), paged even heads"] = lambda: flash_attn_varlen_func(
        query, paged[0], paged[1], max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=mean_keys, seqused_k=lens,
        block_table=table, softmax_scale=D**-0.5, causal=True, fa_version=version,
    )  # fmt: skip
    return rivals
