"""The formulas that kernels and policies share, dense and in plain torch: the one place where each of them is written.

Axes: L layers, H KV heads, G query heads per KV head, Q = H*G query heads (the G of head 0 first), W window,
S prompt tokens, T scored tokens, E evictable tokens, N tokens a page, J pages a head could fill, D head size,
M hidden size, R rows that are treated alike (heads, layers, or all of them at once).

Scores are float32 whatever the model's dtype: in bf16 only a tenth of them would be distinct. Nothing here reads
a value back from a device, so on CUDA nothing waits for it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a temporary of which several should stay in a core's own cache.
CACHE_ELEMENTS = 2**16
# Elsewhere a launch costs more than memory traffic; the bound keeps temporaries at tens of MB beside a full KV cache.
DEVICE_ELEMENTS = 2**22
# Scores that are sorted at a time: enough to keep a GPU busy, few enough that a prompt of 128K tokens needs no gigabyte
# beside a full KV cache.
SORT_ELEMENTS = 2**22
# Rows that a GPU sorts at a time at least, about one a multiprocessor: fewer are sorted by torch as one, and twice.
SORT_ROWS = 128
# Of one tile of a prompt's attention: 4 MB in float32.
ACCUMULATED_ELEMENTS = 2**20

STAGE_ONE_MASS = 0.9
HALF_BUDGET_EPSILON = 1e-4
CAKE_GAMMA = 200.0
CAKE_SPREAD, CAKE_CHANGE = 1 / 1.6, 1 / 0.6
PYRAMID_STEEPNESS = 20  # the last layer's budget is the mean divided by this


def on_host(tensor: Tensor) -> bool:
    """Whether one may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def temporary_elements(tensor: Tensor) -> int:
    """Elements that one temporary may have on `tensor`'s device."""
    return CACHE_ELEMENTS if on_host(tensor) else DEVICE_ELEMENTS


# ------------------------------------------------------------------------------------------------ attention and pooling


def window_attention(
    query_WQD: Tensor,
    key_HSD: Tensor,
    scale: float,
    there_HS: Tensor | None = None,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> Tensor:
    """Attention of the last W queries over all S keys, causal. Any float dtype -> fp32 [H, G, W, S], with void_Q one
    column more: see `softmax`. there_HS, cap: as in `window_logits`."""
    logits_HGWS = window_logits(query_WQD, key_HSD, scale, there_HS, cap)
    return softmax(logits_HGWS, None if void_Q is None else void_Q.view(logits_HGWS.shape[:2]))


def softmax(logits_HGWS: Tensor, void_HG: Tensor | None = None) -> Tensor:
    """Shares of attention. Same shape, unless there is void_HG, any float dtype: the logit of nothing, of each query
    head (the attention sinks of gpt-oss). Nothing is like a key behind all others, whose value is zero, and its share a
    column more: [H, G, W, S + 1]."""
    if void_HG is not None:
        void_HG11 = void_HG.to(logits_HGWS.dtype)[..., None, None]
        logits_HGWS = torch.cat([logits_HGWS, void_HG11.expand(*logits_HGWS.shape[:-1], 1)], dim=-1)
    return logits_HGWS.softmax(dim=-1)


def window_logits(
    query_WQD: Tensor, key_HSD: Tensor, scale: float, there_HS: Tensor | None = None, cap: float = 0.0
) -> Tensor:
    """What `window_attention` is the softmax of; of keys that lie behind the query, -inf. -> fp32 [H, G, W, S].

    there_HS: bool, the tokens that a head still has; of others the logits are -inf.
    cap: logits are bent to cap * tanh(logit / cap), which stays within +-cap (Gemma 2); 0: they are not.
    Both factors are widened before the product: rounded logits would make most scores equal.
    """
    window, query_heads, head_size = query_WQD.shape
    heads, tokens, _ = key_HSD.shape
    assert query_heads % heads == 0, f"{query_heads} query heads do not divide over {heads} KV heads"
    assert tokens >= window, f"{tokens} keys are fewer than the {window} window queries"
    group = query_heads // heads
    query_HRD = query_WQD.movedim(1, 0).float().mul(scale).reshape(heads, group * window, head_size)
    logits_HGWS = torch.bmm(query_HRD, key_HSD.float().mT).view(heads, group, window, tokens)
    if cap:
        logits_HGWS = logits_HGWS.div_(cap).tanh_().mul_(cap)
    future_WW = torch.ones(window, window, dtype=torch.bool, device=key_HSD.device).triu(1)
    logits_HGWS[..., tokens - window :].masked_fill_(future_WW, float("-inf"))
    if there_HS is not None:
        logits_HGWS.masked_fill_(~there_HS[:, None, None, :], float("-inf"))
    return logits_HGWS


def window_sums(values_T: Tensor, kernel: int) -> Tensor:
    """Sum of each `kernel` consecutive entries of the last axis. [..., T + kernel - 1] -> [..., T].

    Sums of 1, 2, 4, ... entries, put together by the binary digits of `kernel`: passes over memory cost more than
    additions.
    """
    length, power_T, size, offset = values_T.shape[-1] - kernel + 1, values_T, 1, 0
    total_T: Tensor | None = None
    while True:
        if kernel & size:
            piece_T = power_T[..., offset : offset + length]
            total_T = piece_T if total_T is None else total_T + piece_T
            offset += size
        if 2 * size > kernel:
            assert total_T is not None, f"a window of {kernel} entries is empty"
            return total_T
        power_T = power_T[..., :-size] + power_T[..., size:]
        size *= 2


def sum_neighbours(values_T: Tensor, kernel: int, first: int = 0, last: int | None = None) -> Tensor:
    """Sum of the `kernel` (odd) entries around each entry of [first, last), zeros beyond the ends of the last axis."""
    assert kernel % 2 == 1, f"pool kernel {kernel} has no centre"
    tokens, reach = values_T.shape[-1], kernel // 2
    last = tokens if last is None else last
    missing = (max(reach - first, 0), max(last + reach - tokens, 0))
    around_T = values_T[..., max(first - reach, 0) : last + reach]
    return window_sums(torch.nn.functional.pad(around_T, missing) if any(missing) else around_T, kernel)


def pool_tokens(values_T: Tensor, kernel: int) -> Tensor:
    """Average over `kernel` neighbours, divided by `kernel` at the ends too (SnapKV, arXiv 2404.14469). Same shape."""
    return values_T if kernel == 1 else sum_neighbours(values_T, kernel) / kernel


def mass_preserving_scale(attention_T: Tensor, kernel: int) -> Tensor:
    """What to multiply `sum_neighbours` by, row by row, so that each row keeps its sum. [..., T] -> [..., 1].

    Summing neighbours is a symmetric operator, so its row sum needs no pooled row: sum_t (Bx)_t = sum_t x_t (B1)_t.
    """
    cover_T = sum_neighbours(attention_T.new_ones(attention_T.shape[-1]), kernel)
    mass = attention_T.sum(dim=-1, keepdim=True)
    pooled_mass = (attention_T @ cover_T).unsqueeze(-1)
    # A row whose mass lies in the window altogether underflows to zeros: it stays zero instead of 0 / 0.
    return mass / pooled_mass.clamp_min(torch.finfo(mass.dtype).tiny)


def pool_preserving_mass(attention_T: Tensor, kernel: int) -> Tensor:
    """Pool along tokens, then rescale so that each row keeps its sum (DefensiveKV, arXiv 2510.13334). Same shape."""
    if kernel == 1:
        return attention_T
    return sum_neighbours(attention_T, kernel) * mass_preserving_scale(attention_T, kernel)


# ---------------------------------------------------------------------------------------------------------- aggregation


def aggregate_mean(attention_HGWT: Tensor) -> Tensor:
    """Mean over the window and the group, without pooling. fp32 [H, G, W, T] -> fp32 [H, T].

    Pooling is linear: pooling this row equals the mean of the pooled rows, at 1/(G*W) of the price.
    """
    return attention_HGWT.mean(dim=(1, 2))


def clamp_to_mean(peak_T: Tensor) -> Tensor:
    """Raise every token to the mean of its row: the prior-risk correction of DefensiveKV. Same shape."""
    return torch.maximum(peak_T, peak_T.mean(dim=-1, keepdim=True))


def aggregate_peak(attention_HGWT: Tensor, kernel: int) -> Tensor:
    """Largest mass-preservingly pooled attention over the window and the group. fp32 [H, G, W, T] -> fp32 [H, T].

    Works on tiles of tokens, so that the pooled rows never leave the caches; the tiling changes no bit of the result.
    On CPU the tiles are larger than elsewhere in this file: each costs eight calls of little work.
    """
    if kernel == 1:
        return attention_HGWT.amax(dim=(1, 2))
    tokens = attention_HGWT.shape[-1]
    scale = mass_preserving_scale(attention_HGWT, kernel)
    tile = max(64, min(4 * temporary_elements(attention_HGWT), DEVICE_ELEMENTS) // scale.numel())
    peaks = []
    for first in range(0, tokens, tile):
        pooled = sum_neighbours(attention_HGWT, kernel, first, min(first + tile, tokens))
        peaks.append(pooled.mul_(scale).amax(dim=(1, 2)))
    return torch.cat(peaks, dim=-1)


def halo(scores_HT: Tensor, reach: int, weight: float) -> Tensor:
    """Give each token at least `weight` of the best score within `reach` tokens of it. Same shape, [H, T] or [L, H, T].

    Pooling lends a peak's neighbours its score too, but takes it off the peak; here the peak keeps all of it.
    """
    best_HT = torch.nn.functional.max_pool1d(scores_HT, 2 * reach + 1, stride=1, padding=reach)
    return torch.maximum(scores_HT, weight * best_HT)


def aggregate_defensive(attention_HGWT: Tensor, kernel: int) -> Tensor:
    """Worst case instead of average, and nobody below the head's mean (DefensiveKV, arXiv 2510.13334).

    fp32 [H, G, W, T] -> fp32 [H, T].
    """
    return clamp_to_mean(aggregate_peak(attention_HGWT, kernel))


def attention_tiles(
    query_CQD: Tensor,
    key_HSD: Tensor,
    scale: float,
    elements: int,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> Iterator[Tensor]:
    """`window_attention` of the last C queries to keys, some of them at a time: fp32 [H, G, W, seen], each of as many
    keys as its last query sees. A tile has at most `elements`, but Q*S for one query, never S*S."""
    chunk, query_heads, _ = query_CQD.shape
    tokens = key_HSD.shape[1]
    key_HSD = key_HSD.float()
    tile = max(1, elements // (query_heads * tokens))
    for first in range(0, chunk, tile):
        query_WQD = query_CQD[first : first + tile]
        seen = tokens - chunk + first + len(query_WQD)
        yield window_attention(query_WQD, key_HSD[:, :seen], scale, None, cap, void_Q)[..., :seen]


def accumulate_attention(
    mass_HS: Tensor,
    query_CQD: Tensor,
    key_HSD: Tensor,
    scale: float,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> None:
    """Add to each of the S keys the attention that the last C queries pay it, causal, summed over the queries and
    averaged over the group (H2O, arXiv 2306.14048). In place, fp32 [H, S]."""
    share = mass_HS.shape[0] / query_CQD.shape[1]
    for attention_HGWS in attention_tiles(query_CQD, key_HSD, scale, ACCUMULATED_ELEMENTS, cap, void_Q):
        mass_HS[:, : attention_HGWS.shape[-1]] += attention_HGWS.sum(dim=(1, 2)).mul_(share)


def entropy(attention_X: Tensor) -> Tensor:
    """- sum A log A over all entries, zeros included. -> scalar."""
    return -torch.special.xlogy(attention_X, attention_X).sum()


def layer_preference(spread_2: Tensor) -> Tensor:
    """How much of the budget a layer wants, from (entropy, variance over the window) of its attention (CAKE,
    arXiv 2503.12491). -> scalar."""
    return spread_2[0].clamp_min(0) ** CAKE_SPREAD * spread_2[1] ** CAKE_CHANGE


# ---------------------------------------------------------------------------------------------------------- value norms


def value_norm_l1(value_HTD: Tensor, output_QDM: Tensor) -> Tensor:
    """mean_g || v_t Wo_{h,g} ||_1 (CriticalKV, arXiv 2502.03805). [H, T, D], [Q, D, M] -> fp32 [H, T].

    With bf16 values and weights the products are rounded to bf16 once (relative error of the norm 1e-4), and on CPU
    the sum of a row too (1e-3, at most 4e-3); other dtypes are computed in float32.
    """
    heads, tokens, _ = value_HTD.shape
    group, hidden = output_QDM.shape[0] // heads, output_QDM.shape[-1]
    if not value_HTD.dtype == output_QDM.dtype == torch.bfloat16:
        value_HTD, output_QDM = value_HTD.float(), output_QDM.float()
    # A bf16 sum accumulates in float32 inside; asking for a float32 result halves its speed on CPU.
    total_dtype = value_HTD.dtype if value_HTD.device.type == "cpu" else torch.float32
    norm_HT = torch.zeros(heads, tokens, dtype=torch.float32, device=value_HTD.device)
    tile = max(64, 8 * temporary_elements(value_HTD) // hidden)
    for head in range(heads):
        for first in range(0, tokens, tile):
            value_TD = value_HTD[head, first : first + tile]
            for output_DM in output_QDM[head * group : (head + 1) * group]:
                norm_HT[head, first : first + tile] += (value_TD @ output_DM).abs_().sum(dim=-1, dtype=total_dtype)
    return norm_HT / group


def gram_factor(output_QDM: Tensor) -> Tensor:
    """Factor C of Wo Wo^T = C C^T of each query head: `||v C||_2 = ||v Wo||_2` without the hidden axis.

    Any float dtype [Q, D, M] -> the same dtype [Q, D, min(D, M)], computed in fp32, once at load.
    """
    # Wo^T = Q R with orthonormal Q, so Wo Wo^T = R^T R.
    return torch.linalg.qr(output_QDM.float().mT, mode="r").R.mT.contiguous().to(output_QDM.dtype)


def value_norm_l2(value_HTD: Tensor, factor_QDC: Tensor) -> Tensor:
    """mean_g || v_t C_{h,g} ||_2, the L2 norm of what `value_norm_l1` measures. [H, T, D], [Q, D, C] -> fp32 [H, T].

    factor_QDC: `gram_factor` of the output projection's slices, M/D times cheaper, or the slices themselves.
    With bf16 values and factors the products are rounded to bf16 once (relative error of the norm 1e-3); other dtypes
    are computed in float32.
    """
    heads, tokens, _ = value_HTD.shape
    group, columns = factor_QDC.shape[0] // heads, factor_QDC.shape[-1]
    if not value_HTD.dtype == factor_QDC.dtype == torch.bfloat16:
        value_HTD, factor_QDC = value_HTD.float(), factor_QDC.float()
    factor_HDX = factor_QDC.unflatten(0, (heads, group)).transpose(1, 2).flatten(2)
    # Not float32 throughout: tests let these formulas compute in float64.
    wide = torch.float32 if value_HTD.dtype == torch.bfloat16 else value_HTD.dtype
    norm_HT = torch.empty(heads, tokens, dtype=torch.float32, device=value_HTD.device)
    tile = max(64, 8 * temporary_elements(value_HTD) // (group * columns))
    for head in range(heads):
        for first in range(0, tokens, tile):
            product_TX = value_HTD[head, first : first + tile] @ factor_HDX[head]
            norm_TG = torch.linalg.vector_norm(product_TX.unflatten(-1, (group, columns)), dim=-1, dtype=wide)
            norm_HT[head, first : first + tile] = norm_TG.mean(dim=-1)
    return norm_HT


# ------------------------------------------------------------------------------------------------- stages of CriticalKV


def certain_by_mass(attention_RT: Tensor, mass: Tensor | float, cap: int) -> Tensor:
    """The largest entries of each row that together stay below `mass` of its sum, at most `cap`. -> bool [R, T].

    mass: a number, or what broadcasts against `attention_RT`, whose rows may have several axes.
    The entry that crosses the threshold is left out, as the reference leaves it out. Ties: the lowest token wins.
    """
    share_RT = attention_RT / attention_RT.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(attention_RT.dtype).tiny)
    sorted_RT = sort_down(share_RT)
    count_R = (sorted_RT.cumsum(dim=-1) < mass).sum(dim=-1)
    # A row of zeros never crosses the threshold; it has nothing certain.
    count_R = torch.where(count_R == attention_RT.shape[-1], 0, count_R).clamp_max(max(cap, 0))
    return keep_best(share_RT, count_R, sorted_RT)


# ------------------------------------------------------------------------------------------------------------ selection


def rows_at_once(scores_RE: Tensor, *, thrifty: bool) -> int:
    """Rows of such scores that are sorted at a time. thrifty: by somebody who has no memory for `SORT_ROWS`."""
    least = 1 if thrifty or on_host(scores_RE) else SORT_ROWS
    return max(least, SORT_ELEMENTS // scores_RE.shape[-1])


def sort_down(scores_RE: Tensor) -> Tensor:
    """Each row's values from the largest to the smallest. Same shape."""
    if not on_host(scores_RE):
        return scores_RE.sort(dim=-1, descending=True).values
    # NumPy sorts with vector instructions: on one core 20 times faster than torch, which carries an index along.
    sorted_RE = scores_RE.clone(memory_format=torch.contiguous_format)
    sorted_RE.numpy().sort(axis=-1)
    return sorted_RE.flip(-1)


def last_value(sorted_RE: Tensor, count_R: Tensor) -> Tensor:
    """The smallest of the first `count` values of each sorted row; of an empty choice, +inf. -> [R, 1].

    The columns may stand for pages, each with its last value: the first column is then not the row's largest value.
    """
    count_R1 = count_R.long().unsqueeze(-1)
    return sorted_RE.gather(-1, (count_R1 - 1).clamp_min(0)).masked_fill(count_R1 == 0, float("inf"))


def keep_best(scores_RE: Tensor, count_R: Tensor, sorted_RE: Tensor | None = None) -> Tensor:
    """Mark the `count` largest scores of each row. fp32 [R, E], int [R] -> bool [R, E], exactly `count` a row.

    `sorted_RE`: the same rows sorted downwards, where the caller has them. Ties: the lowest index wins.
    """
    return keep_down_to(
        scores_RE, count_R, last_value(sort_down(scores_RE) if sorted_RE is None else sorted_RE, count_R)
    )


def keep_down_to(scores_RE: Tensor, count_R: Tensor, last_R1: Tensor) -> Tensor:
    """`keep_best` for a caller who knows the smallest score to keep, `last_value(sorted_RE, count_R)`.

    A threshold and a running count of the ties need no stable sort and no permutation. On CPU only rows where a tie
    falls on the threshold are counted, which is most of the time and seldom needed.
    """
    if not on_host(scores_RE):
        return _first_down_to(scores_RE, count_R, last_R1)
    keep_RE = scores_RE >= last_R1
    over_R = keep_RE.sum(dim=-1, dtype=torch.int32) != count_R
    if over_R.any():
        keep_RE[over_R] = _first_down_to(scores_RE[over_R], count_R[over_R], last_R1[over_R])
    return keep_RE


def _first_down_to(scores_RE: Tensor, count_R: Tensor, last_R1: Tensor) -> Tensor:
    above_RE = scores_RE > last_R1
    tied_RE = scores_RE == last_R1
    room_R1 = count_R.unsqueeze(-1) - above_RE.sum(dim=-1, keepdim=True)
    return above_RE | (tied_RE & (tied_RE.cumsum(dim=-1, dtype=torch.int32) <= room_R1))


def page_gains(sorted_RE: Tensor, page_size: int) -> Tensor:
    """Score that each further page of N tokens would add: sums of runs of N. fp32 [R, E] sorted downwards -> [R, J].

    A run with a forced (+inf) token gains +inf. There is no -inf, so no sum is NaN.
    """
    return sorted_RE.unflatten(-1, (-1, page_size)).sum(dim=-1)


def allocate_pages(gains_UHJ: Tensor, budget_pages: int | Tensor) -> Tensor:
    """Give each unit's `budget_pages` pages to the heads that gain most. fp32 [U, H, J] -> int64 [U, H].

    A head's gains fall with j, so the greedy choice is the exact optimum of Ada-KV's objective under paging
    (arXiv 2407.11550). A unit is whatever shares one budget: a layer, or all layers with their heads in one row.
    budget_pages: of all units alike, or of each, int64 [U].
    """
    units, heads, pages = gains_UHJ.shape
    if isinstance(budget_pages, int):
        assert 0 <= budget_pages <= heads * pages, f"{budget_pages} pages for {heads} heads of at most {pages}"
        budget_pages = torch.full((units,), budget_pages, device=gains_UHJ.device)
    if heads == 1:
        return budget_pages.unsqueeze(1)
    keep_UX = keep_best(gains_UHJ.flatten(1), budget_pages)
    return keep_UX.view(units, heads, pages).sum(dim=-1)


def linear_weights(layers: int, device: torch.device) -> Tensor:
    """Weights that fall linearly from the first layer to the last, with mean 1 (PyramidKV, arXiv 2406.02069). [L]"""
    last = 1 / PYRAMID_STEEPNESS
    return torch.linspace(2 - last, last, layers, device=device) if layers > 1 else torch.ones(1, device=device)


def proportional_pages(weight_L: Tensor, forced_J: Tensor, budget_pages: int) -> Tensor:
    """Split `budget_pages` over layers in proportion to their weights, at most J and at least the forced ones each.

    Page j of a layer bids weight / (j + 1/2): handing pages to the highest bids rounds proportions to the nearest
    whole numbers (Sainte-Laguë), and a larger budget takes no page away. Where no weight is above zero, all are equal.
    fp32 [L], bool [J] -> int64 [L].
    """
    page_J = torch.arange(forced_J.shape[0], device=weight_L.device) + 0.5
    weight_L = weight_L.nan_to_num(nan=0.0)
    weight_L = torch.where(weight_L.amax() > 0, weight_L, 1.0)
    bids_LJ = torch.where(forced_J, float("inf"), weight_L.unsqueeze(-1) / page_J)
    return allocate_pages(bids_LJ.unsqueeze(0), budget_pages).flatten()
