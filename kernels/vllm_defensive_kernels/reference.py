"""What every op computes, in plain PyTorch: dense, row by row and head by head. Runs anywhere, also without Triton.

Same signatures as the kernels' wrappers, which check the arguments; the formulas themselves are in `formulas`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vllm_defensive_kernels import echo, formulas, quantised
from vllm_defensive_kernels.learned import Rotation, foretold_peaks
from vllm_defensive_kernels.pages import PackedSource, PackedState, PagedKV, RaggedTokens


def gather_head(pages_PND: Tensor, pages: PagedKV, layer: int, head: int, table_B: Tensor, tokens: int) -> Tensor:
    """K or V of one head's first `tokens` positional tokens, in the dtype of the cache. -> [T, D]."""
    blocks = -(-tokens // pages.page_tokens)
    return pages_PND[pages.page_of(layer, head, table_B[:blocks])].flatten(0, 1)[:tokens]


def _gather_heads(pages_PND: Tensor, pages: PagedKV, layer: int, table_B: Tensor, tokens: int) -> Tensor:
    heads = range(pages.num_kv_heads)
    return torch.stack([gather_head(pages_PND, pages, layer, head, table_B, tokens) for head in heads])


def window_scores(
    query_LRWQD: Tensor, pages: PagedKV, table_RB: Tensor, tokens: RaggedTokens, *,
    aggregate: str, pool: int, clamp: bool, scale: float, key_scale: float, cap: float = 0.0,
    void_LQ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reference of `window.window_scores`."""
    layers, _, window, _, _ = query_LRWQD.shape
    score_LHT = torch.empty(layers, pages.num_kv_heads, tokens.total, device=query_LRWQD.device)
    mean_LHT = torch.empty_like(score_LHT)
    for layer in range(layers):
        for row, span in enumerate(tokens.spans()):
            scored = tokens.counts[row]
            if scored == 0:
                continue
            key_HSD = _gather_heads(pages.key_PND, pages, layer, table_RB[row], scored + window)
            attention = formulas.window_attention(
                query_LRWQD[layer, row], key_HSD.float(), scale * key_scale,
                cap=cap, void_Q=None if void_LQ is None else void_LQ[layer],
            )[..., :scored]  # fmt: skip
            mean_HT = formulas.aggregate_mean(attention)
            if aggregate == "mean":
                score_HT = formulas.pool_tokens(mean_HT, pool)
            else:
                score_HT = formulas.aggregate_peak(attention, pool)
                score_HT = formulas.clamp_to_mean(score_HT) if clamp else score_HT
            score_LHT[layer, :, span], mean_LHT[layer, :, span] = score_HT, mean_HT
    return score_LHT, mean_LHT


def reconstruction_scores(
    query_TQD: Tensor, pages: PagedKV, layer: int, table_1B: Tensor, *, peak_HS: Tensor, scored: tuple[int, int],
    first: int, normalised: str, sink: int, scale: float, key_scale: float, cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> None:  # fmt: skip
    """Reference of `reconstruction.reconstruction_scores`."""
    key_HXD = _gather_heads(pages.key_PND, pages, layer, table_1B[0], first + len(query_TQD))
    echo.reconstruct_attention(
        peak_HS, query_TQD, key_HXD, scale * key_scale, scored=scored, first=first, normalised=normalised, sink=sink,
        cap=cap, void_Q=void_Q,
    )  # fmt: skip


def value_norm(
    pages: PagedKV, layer: int, table_RB: Tensor, tokens: RaggedTokens, output_QDC: Tensor, *,
    order: int, value_scale: float, out_HT: Tensor,
) -> Tensor:  # fmt: skip
    """Reference of `norms.value_norm`."""
    for row, span in enumerate(tokens.spans()):
        value_HTD = _gather_heads(pages.value_PND, pages, layer, table_RB[row], tokens.counts[row])
        value_HTD = value_HTD if value_HTD.dtype == output_QDC.dtype else value_HTD.float()
        if order == 1:
            norm_HT = formulas.value_norm_l1(value_HTD, output_QDC)
        else:
            norm_HT = formulas.value_norm_l2(value_HTD, output_QDC)
        out_HT[:, span] = norm_HT * value_scale
    return out_HT


def learned_scores(
    pages: PagedKV, layer: int, table_RB: Tensor, tokens: RaggedTokens, weight_HX: Tensor, rotation: Rotation | None, *,
    key_scale: float, value_scale: float, out_HT: Tensor,
) -> Tensor:  # fmt: skip
    """Reference of `foretold.learned_scores`."""
    for row, (count, span) in enumerate(zip(tokens.counts, tokens.spans(), strict=True)):
        key_HTD = _gather_heads(pages.key_PND, pages, layer, table_RB[row], count).float() * key_scale
        value_HTD = _gather_heads(pages.value_PND, pages, layer, table_RB[row], count).float() * value_scale
        position_T = torch.arange(count, device=key_HTD.device)
        out_HT[:, span] = foretold_peaks(key_HTD, value_HTD, position_T, weight_HX, rotation)
    return out_HT


def learned_page_scores(
    pages: PagedKV, page_P: Tensor, row_P: Tensor, position_PN: Tensor, weight_RX: Tensor, rotation: Rotation | None, *,
    key_scale: float, value_scale: float,
) -> Tensor:  # fmt: skip
    """Reference of `foretold.learned_page_scores`: a page is a head of N tokens."""
    key_PND, value_PND = pages.key_PND[page_P].float() * key_scale, pages.value_PND[page_P].float() * value_scale
    score_PN = foretold_peaks(key_PND, value_PND, position_PN.clamp_min(0), weight_RX[row_P], rotation)
    return score_PN.masked_fill_(position_PN < 0, 0.0)


def list_kept(
    score_RE: Tensor, last_R1: Tensor, offset_O: Tensor, *, pages: int, page_tokens: int, first_token: int,
    taken_R: Tensor | None = None, taken_last_R1: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Reference of `selection.list_kept`."""
    candidates, slots_R = score_RE.shape[1], offset_O.diff() * page_tokens
    taken = 0 if taken_R is None else taken_R
    upto_R = (taken + slots_R).clamp_max(candidates)
    keep_RE = formulas.keep_down_to(score_RE, upto_R, last_R1)
    if taken_R is not None:
        assert taken_last_R1 is not None
        keep_RE &= ~formulas.keep_down_to(score_RE, taken_R, taken_last_R1)
    # NumPy finds the marks on one core 5 to 9 times faster than torch, and 20 times faster than a running count does.
    flat_X = torch.from_numpy(keep_RE.cpu().numpy().reshape(-1).nonzero()[0]).to(score_RE.device)
    if len(flat_X) == pages * page_tokens:
        return flat_X.remainder_(candidates).int().add_(first_token).view(pages, page_tokens)
    token_X = torch.full((pages * page_tokens,), -1, dtype=torch.int32, device=score_RE.device)
    count_R, row_X = upto_R - taken, flat_X // candidates
    shift_R = offset_O[:-1] * page_tokens - (count_R.cumsum(0) - count_R)  # from a place among all to one in the pages
    place_X = torch.arange(len(flat_X), device=flat_X.device) + shift_R[row_X]
    token_X[place_X] = flat_X.remainder_(candidates).int().add_(first_token)
    return token_X.view(pages, page_tokens)


def compact(
    source: PagedKV, table_B: Tensor, offset_O: Tensor, token_T: Tensor, target: PagedKV, fresh_K: Tensor, *,
    packed: PackedSource | None = None, key_scale: float, value_scale: float,
) -> None:  # fmt: skip
    """Reference of `compaction.compact`."""
    target_P, heads = target.of_packed(fresh_K), source.num_kv_heads
    flat = torch.arange(len(target_P), dtype=offset_O.dtype, device=token_T.device)
    owner_P1 = torch.searchsorted(offset_O[1:].contiguous(), flat, right=True)[:, None]
    token_PN = token_T.view(-1, target.page_tokens).long()
    there_PN, token_PN = token_PN >= 0, token_PN.clamp_min(0)
    nth_PN = token_PN // source.page_tokens
    if packed is None:
        source_PN = source.page_of(owner_P1 // heads, owner_P1 % heads, table_B[nth_PN])
    else:
        owner_P1 = owner_P1.clamp_max(len(offset_O) - 2)  # of pages behind all heads', which stay as they are
        packed_P, behind_PN = source.of_packed(packed.fresh_K), (nth_PN - packed.most_pages).clamp_min(0)
        flat_PN = (packed.offset_O[owner_P1] + nth_PN).clamp_max(len(packed_P) - 1)
        source_PN = torch.where(
            nth_PN < packed.most_pages,
            packed_P[flat_PN],
            source.page_of(owner_P1 // heads, owner_P1 % heads, table_B[behind_PN.clamp_max(len(table_B) - 1)]),
        )
    pairs = ((source.key_PND, target.key_PND, key_scale), (source.value_PND, target.value_PND, value_scale))
    for source_PND, target_PND, scale in pairs:
        kept_PND = rescale(source_PND[source_PN, token_PN % source.page_tokens], target_PND.dtype, scale)
        target_PND[target_P] = torch.where(there_PN[:, :, None], kept_PND, target_PND[target_P])


def compact_quantised(
    source: PagedKV, table_B: Tensor, offset_O: Tensor, token_Pn: Tensor, target: PagedKV, fresh_K: Tensor, *,
    page_class: str, first_page: int,
) -> None:  # fmt: skip
    """Reference of `quantised_compaction.compact_quantised`."""
    pages, heads = len(token_Pn), source.num_kv_heads
    target_P = target.of_packed(fresh_K)[first_page : first_page + pages]
    flat = torch.arange(pages, dtype=offset_O.dtype, device=token_Pn.device)
    owner_P1 = torch.searchsorted(offset_O[1:].contiguous(), flat, right=True)[:, None]
    count_P, token_Pn = (token_Pn >= 0).sum(1), token_Pn.clamp_min(0).long()
    source_Pn = source.page_of(owner_P1 // heads, owner_P1 % heads, table_B[token_Pn // source.page_tokens])
    place = source_Pn, token_Pn % source.page_tokens
    page_PY = quantised.pack_pages(
        source.key_PND[place], source.value_PND[place], count_P, target.page_shape, page_class, channel_major=False
    )
    target.row_PNY[target_P] = page_PY.view(-1, *target.row_PNY.shape[1:])


def rescale(value: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Multiply in fp32 and convert, saturating at the ends of an fp8 format; the same bits where nothing changes."""
    if value.dtype == dtype and scale == 1.0:
        return value
    value = value.float() * scale
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        limit = torch.finfo(dtype).max
        value = value.clamp(-limit, limit)
    return value.to(dtype)


def packed_rows(
    pages: PagedKV, layer: int, head: int, table_B: Tensor, seq_len: int, slot: int, state: PackedState
) -> tuple[Tensor, Tensor]:
    """Page and place in it of every key that one head of one row has left as it was, in order. int64 `[T]` each."""
    row, page_tokens = layer * pages.num_kv_heads + head, pages.page_tokens
    shared = growth = first = last = 0
    if slot >= 0:
        shared, growth = int(state.shared_S[slot]), int(state.growth_S[slot])
        first, last = state.offset_SO[slot, row : row + 2].tolist()
    segments = (
        pages.page_of(layer, head, table_B[:shared]),
        pages.of_packed(state.fresh_SK[slot])[first:last],
        pages.page_of(layer, head, table_B[growth : -(-seq_len // page_tokens)]),
    )
    length = (shared + last - first - growth) * page_tokens + seq_len
    index = torch.arange(length, device=table_B.device)
    return torch.cat(segments)[index // page_tokens], index % page_tokens


def coded_rows(pages: PagedKV, layer: int, head: int, slot: int, state: PackedState) -> tuple[Tensor, Tensor]:
    """Keys and values of one head of one row that lie in quantised pages, class after class. fp32 `[T, D]` each."""
    heads, shape = pages.num_layers * pages.num_kv_heads, pages.page_shape
    nothing_TD = torch.empty(0, pages.head_size, device=pages.key_PND.device)
    parts = [(nothing_TD, nothing_TD)]
    if slot >= 0:
        left = int(state.growth_S[slot] - state.shared_S[slot]) * pages.page_tokens  # the most that it can have
        for c, name in enumerate(state.classes):
            row = c * heads + layer * pages.num_kv_heads + head
            first, last = state.offset_SO[slot, row : row + 2].tolist()
            held = min((last - first) * shape.tokens(name), left)
            left -= held
            if name in state.coded:
                row_PNY = pages.row_PNY[pages.of_packed(state.fresh_SK[slot])[first:last]]
                key_PnD, value_PnD = quantised.unpack_pages(row_PNY.flatten(1), shape, name, channel_major=False)
                parts.append((key_PnD.flatten(0, 1)[:held], value_PnD.flatten(0, 1)[:held]))
    key, value = zip(*parts, strict=True)
    return torch.cat(key), torch.cat(value)


def ragged_paged_decode(
    query_TQD: Tensor, pages: PagedKV, layer: int, table_RB: Tensor, query_start_R1: Tensor, seq_len_R: Tensor,
    slot_R: Tensor, state: PackedState, *, out_TQD: Tensor, scale: float, key_scale: float, value_scale: float,
    cap: float = 0.0, void_Q: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Reference of `decode.ragged_paged_decode`."""
    group = query_TQD.shape[1] // pages.num_kv_heads
    starts, seq_lens, slots = query_start_R1.tolist(), seq_len_R.tolist(), slot_R.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        for head in range(pages.num_kv_heads if end > begin else 0):
            place = packed_rows(pages, layer, head, table_RB[row], seq_lens[row], slots[row], state)
            coded = coded_rows(pages, layer, head, slots[row], state)
            plain = pages.key_PND[place].float(), pages.value_PND[place].float()  # they end with the row's queries
            key_TD, value_TD = (torch.cat(each) for each in zip(coded, plain, strict=True))
            heads = slice(head * group, (head + 1) * group)
            logits_QGT = query_TQD[begin:end, heads].float() @ key_TD.T * (scale * key_scale)
            logits_QGT = cap * torch.tanh(logits_QGT / cap) if cap else logits_QGT
            # The row's last query token sees all keys, the one before it all but one, and so on.
            future = torch.ones(logits_QGT.shape[::2], dtype=torch.bool, device=key_TD.device)
            future = future.triu(key_TD.shape[0] - (end - begin) + 1)[:, None]
            logits_QGT = logits_QGT.masked_fill(future, float("-inf"))
            if void_Q is not None:  # a key more, whose value is zero
                void_QG1 = void_Q[heads].to(logits_QGT.dtype)[None, :, None].expand(end - begin, -1, 1)
                logits_QGT, value_TD = (
                    torch.cat([logits_QGT, void_QG1], -1),
                    torch.nn.functional.pad(value_TD, (0, 0, 0, 1)),
                )
            weight_QGT = logits_QGT.softmax(-1).nan_to_num(0.0)
            out_TQD[begin:end, heads] = (weight_QGT @ value_TD * value_scale).to(out_TQD.dtype)
    return out_TQD
