"""In torch: the operations of vLLM and FlashAttention that a small Llama calls on its way, and that are compiled, or
would take the interpreter minutes."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import torch
from torch import Tensor

_FRAGMENTS: list[torch.library.Library] = []  # operations live as long as these


def install() -> None:
    """Put empty modules where vLLM imports its compiled ones, and define what they would have registered."""
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C"):
        sys.modules[name] = types.ModuleType(name)
    core, cache = (torch.library.Library(name, "FRAGMENT") for name in ("_C", "_C_cache_ops"))
    _FRAGMENTS.extend((core, cache))
    for name in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_scaled_mm_supports_fp4",
        "cutlass_group_gemm_supported",
        "cutlass_sparse_scaled_mm_supported",
    ):
        _define(core, f"{name}(int capability) -> bool", lambda capability: False)
    for name in ("weak_ref_tensor", "get_cuda_view_from_cpu_tensor"):
        _define(core, f"{name}(Tensor(a) tensor) -> Tensor(a)", lambda tensor: tensor.view(tensor.shape))
    _define(core, "silu_and_mul(Tensor(a!) out, Tensor input) -> ()", _silu_and_mul)
    _define(core, "gelu_tanh_and_mul(Tensor(a!) out, Tensor input) -> ()", _gelu_tanh_and_mul)
    _define(
        cache,
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
        " Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
        reshape_and_cache_flash,
    )


def finish() -> None:
    """Give vLLM's attention backends the functions below, in the place of those whose names they have taken by now."""
    from vllm.v1.attention.backends import flash_attn, triton_attn

    flash_attn.flash_attn_varlen_func = attention
    flash_attn.get_scheduler_metadata = lambda *args, **kwargs: None
    triton_attn.unified_attention = attention
    triton_attn.triton_reshape_and_cache_flash = reshape_and_cache_flash


def _define(library: torch.library.Library, schema: str, function: Any) -> None:
    library.define(schema)
    library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")


def _silu_and_mul(out: Tensor, input: Tensor) -> None:
    gate, up = input.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    gate, up = input.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


def reshape_and_cache_flash(
    key_THD: Tensor, value_THD: Tensor, key_cache_BNHD: Tensor, value_cache_BNHD: Tensor, slot_T: Tensor,
    kv_cache_dtype: str, k_scale: Tensor, v_scale: Tensor,
) -> None:  # fmt: skip
    """Write new keys and values; those that pad a batch have slot -1."""
    real = slot_T >= 0
    slots = slot_T[real]
    tokens = key_cache_BNHD.shape[1]
    for cache, new, scale in ((key_cache_BNHD, key_THD, k_scale), (value_cache_BNHD, value_THD, v_scale)):
        new = new[: slot_T.shape[0]][real]
        cache[slots // tokens, slots % tokens] = (new / scale if "fp8" in kv_cache_dtype else new).to(cache.dtype)


def attention(
    *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, block_table: Tensor,
    softmax_scale: float, causal: bool = True, window_size: Any = None, softcap: float = 0,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, mm_prefix_range: Tensor | None = None,
    sinks: Tensor | None = None, s_aux: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Causal attention over paged keys, a row of the batch at a time. q: `[T, Q, D]`; k, v: `[B, N, H, D]`.

    window_size: (how far a query looks back or -1, 0 or -1). mm_prefix_range: int `[rows, ranges, 2]`, first and last
    position between which all see all, of empty ranges the same. sinks, s_aux: a logit more of each query head."""
    assert causal
    sinks = s_aux if sinks is None else sinks
    before, ahead = tuple(window_size or (-1, -1))
    assert ahead <= 0
    starts, page, group = cu_seqlens_q.tolist(), k.shape[1], q.shape[1] // k.shape[2]
    scales = [1.0 if scale is None else scale.flatten()[0] for scale in (k_descale, v_descale)]
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end == begin:
            continue
        length = int(seqused_k[row])
        blocks = block_table[row, : -(-length // page)].long()
        keys, values = (
            (x[blocks].flatten(0, 1)[:length].float() * scale).repeat_interleave(group, dim=1)
            for x, scale in zip((k, v), scales, strict=True)
        )
        logits = torch.einsum("tqd,sqd->qts", q[begin:end].float(), keys) * softmax_scale
        seen = _seen(length - (end - begin), length, before, () if mm_prefix_range is None else mm_prefix_range[row])
        logits = (softcap * torch.tanh(logits / softcap) if softcap else logits).masked_fill(~seen, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)], dim=-1)
        weights = logits.softmax(-1)[..., :length]
        out[begin:end] = torch.einsum("qts,sqd->tqd", weights, values).to(out.dtype)
    return out


def _seen(first: int, length: int, before: int, ranges: Any) -> Tensor:
    """Which keys the queries at positions `[first, length)` see. -> bool `[T, S]`."""
    query_T1, key_S = torch.arange(first, length)[:, None], torch.arange(length)
    seen = key_S <= query_T1
    if before >= 0:
        seen &= query_T1 - key_S <= before
    for begin, last in (tuple(r.tolist()) for r in ranges):
        if begin < last:
            seen |= (query_T1 >= begin) & (query_T1 <= last) & (key_S >= begin) & (key_S <= last)
    return seen
