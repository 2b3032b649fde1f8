"""CUDA attention for batches with evicted rows: vLLM's own for prompts, our kernel for decode rows, all of them.

Rows with one new token go through `ragged_paged_decode` whether they were evicted or not (an un-evicted row has no
packed page), from buffers that stay where they are: the sequence of operations of a decode batch is fixed by its size,
which is what a CUDA graph of it needs. The other rows take vLLM's path. Among them may be evicted ones, whose prompt
goes on after its boundary: vLLM is shown a dummy in their place, as long as its query, and our kernel overwrites what
comes of it.

The classes here go in front of those of either of vLLM's backends: see `flash.py` and `triton.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_defensive.worker.cuda import launches
from vllm_defensive.worker.cuda.launches import EchoRow, PackedRows
from vllm_defensive.worker.cuda.runtime import CUDARuntime
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive.worker.window import Capture
from vllm_defensive_kernels import DecodeWorkspace


@dataclass
class EvictionMetadata:
    """num_actual_tokens: as in vLLM's own. stock: vLLM's metadata of tokens `[stock_from, ...)`, or None: no such rows.
    ours: rows that our kernel serves, after vLLM. captures: window queries to keep. echoes: rows whose queries score
    the tokens before them.

    Every other attribute is `stock`'s, to read and to write: models reach into the metadata before they attend (Gemma 4
    takes the look-ahead within images off its global layers)."""

    num_actual_tokens: int
    captures: tuple[Capture, ...]
    echoes: tuple[EchoRow, ...]
    stock: Any
    stock_from: int
    ours: tuple[PackedRows, ...]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (stock := vars(self).get("stock")) is None:
            raise AttributeError(name)
        return getattr(stock, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in EvictionMetadata.__dataclass_fields__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.stock, name, value)


class EvictionMetadataBuilder(AttentionMetadataBuilder):
    """Goes in front of a stock builder. `runtime` is set once the caches exist; until then it changes nothing."""

    runtime: CUDARuntime | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_draft_decode_metadata_update = False  # vLLM's set it for each builder, so `limited` cannot

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Batches of one token a row are captured whole; all others are captured in pieces, attention left out."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        common, runtime = common_attn_metadata, self.runtime
        if runtime is None:
            return super().build(common_prefix_len, common, fast_build)
        step = runtime.step(common)
        starts = common.query_start_loc_cpu.numpy()
        first, ours = step.decode_rows, []
        stock, stock_from = None, int(starts[first])
        if first:
            # Padding counts: a graph is as large as it was captured.
            tokens = slice(0, stock_from if first < common.num_reqs else common.num_actual_tokens)
            ours.append(_packed_rows(common, runtime, (0, first), tokens, 1, runtime.workspace))
        for begin, end in step.packed_runs:
            tokens, longest = slice(int(starts[begin]), int(starts[end])), int(np.diff(starts[begin : end + 1]).max())
            ours.append(_packed_rows(common, runtime, (begin, end), tokens, longest, None))
        if first < common.num_reqs:
            stock = super().build(0, _rest(common, first, stock_from, step.packed_runs), fast_build)
        return EvictionMetadata(common.num_actual_tokens, step.captures, step.echoes, stock, stock_from, tuple(ours))

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        if self.runtime is None:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        assert common_attn_metadata.max_query_len == 1, "only decode batches are captured whole"
        return self.build(0, common_attn_metadata)


def _packed_rows(
    common: CommonAttentionMetadata,
    runtime: CUDARuntime,
    rows: tuple[int, int],
    tokens: slice,
    max_query_len: int,
    workspace: DecodeWorkspace | None,
) -> PackedRows:
    first, last = rows
    query_start_R1 = common.query_start_loc[first : last + 1]
    return PackedRows(
        tokens,
        common.block_table_tensor[first:last],
        query_start_R1 - tokens.start if tokens.start else query_start_R1,
        common.seq_lens[first:last],
        runtime.slot_R[first:last],
        max_query_len,
        workspace,
    )


# What becomes of each field of vLLM's metadata in `_rest`; a test looks for one that has no place here.
BY_ROW = ("block_table_tensor", "is_prefilling", "req_idx", "rswa_prefix_lens", "seq_lens_cpu_upper_bound")
BY_TOKEN = ("positions", "slot_mapping")
RENUMBERED = (
    "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "causal",
    "mm_req_doc_ranges", "_num_computed_tokens_cache", "_token_to_req_indices_cache",
)  # fmt: skip
STILL_TRUE = ("max_query_len", "max_seq_len")  # bounds, and the longest query is among the rest
# Of cross attention, context parallelism, Mamba layers and prefills that skip layers: all refused at start.
NEVER_THERE = (
    "encoder_seq_lens", "encoder_seq_lens_cpu", "dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound",
    "replayssm_decode_base_cpu", "logits_indices_padded", "num_logits_indices", "max_logits_per_req",
)  # fmt: skip


def _rest(
    common: CommonAttentionMetadata, first: int, token: int, packed_runs: tuple[tuple[int, int], ...]
) -> CommonAttentionMetadata:
    """The batch from row `first` and token `token` on, as if it were all. Rows of `packed_runs` become as long as their
    query: vLLM must not walk tables whose blocks are gone."""
    seq_lens = common.seq_lens
    if packed_runs:
        seq_lens = seq_lens.clone()
        for begin, end in packed_runs:
            seq_lens[begin:end] = common.query_start_loc[begin + 1 : end + 1] - common.query_start_loc[begin:end]
    return replace(
        common,
        **{name: _from(first, getattr(common, name)) for name in BY_ROW},
        **{name: _from(token, getattr(common, name)) for name in BY_TOKEN},
        query_start_loc=common.query_start_loc[first:] - token,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - token,
        seq_lens=seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - token,
        causal=_from(first, common.causal) if isinstance(common.causal, Tensor) else common.causal,
        mm_req_doc_ranges=_ranges(common.mm_req_doc_ranges, first, packed_runs),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def _from(first: int, values: Any) -> Any:
    return None if values is None else values[first:]


def _ranges(
    spans_of_row: dict[int, list[tuple[int, int]]] | None, first: int, packed_runs: tuple[tuple[int, int], ...]
) -> dict[int, list[tuple[int, int]]] | None:
    """Positions within which queries look ahead (images of prefix-LM models), by row of the rest. Dummies have none:
    theirs are not the positions of the request."""
    if spans_of_row is None:
        return None
    dummies = {row for begin, end in packed_runs for row in range(begin, end)}
    return {row - first: spans for row, spans in spans_of_row.items() if row >= first and row not in dummies}


class EvictionImpl(AttentionImpl):
    """Goes in front of a stock implementation. One layer; `runtime`, `layer_index` (its cache's place in the KV cache
    group), `reader` (its own among those that read the group's caches) and `softmax` are set once the caches exist."""

    runtime: CUDARuntime | None = None
    layer_index = reader = -1
    softmax: Softmax | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # scores and decode want the queries as they are

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attn_metadata, EvictionMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        metadata, runtime, softmax = attn_metadata, self.runtime, self.softmax
        assert runtime is not None and softmax is not None
        for capture in metadata.captures:
            capture.take(self.reader, query)
        for row in metadata.echoes:  # their keys are there: vLLM has written the layer's before it called this
            launches.reconstruct(
                row, query, runtime.pages, self.layer_index, key_scale=layer._k_scale_float, **softmax.arguments
            )
        if metadata.stock is not None:
            rest = slice(metadata.stock_from, None)
            if key is not None:  # a layer that shares another's cache has none
                key, value = key[rest], value[rest]
            super().forward(layer, query[rest], key, value, kv_cache, metadata.stock, output[rest])
        for rows in metadata.ours:
            launches.attend(
                rows,
                query,
                runtime.pages,
                self.layer_index,
                runtime.state,
                output,
                key_scale=layer._k_scale_float,
                value_scale=layer._v_scale_float,
                **softmax.arguments,
            )
        return output
