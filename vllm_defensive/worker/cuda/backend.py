"""CUDA attention for batches with evicted rows: vLLM's own for prompts, our kernel for decode rows, all of them.

Rows with one new token go through `ragged_paged_decode` whether they were evicted or not (an un-evicted row has no
packed page), from buffers that stay where they are: the sequence of operations of a decode batch is fixed by its size,
which is what a CUDA graph of it needs. The other rows take vLLM's path. Among them may be evicted ones, whose prompt
goes on after its boundary: vLLM is shown a dummy in their place, as long as its query, and our kernel overwrites what
comes of it.

The classes here go in front of those of either of vLLM's backends: see `cuda_flash.py` and `cuda_triton.py`.
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

from vllm_defensive.worker.cuda.runtime import CUDARuntime
from vllm_defensive.worker.window import Capture
from vllm_defensive_kernels import DecodeWorkspace, ragged_paged_decode


@dataclass(frozen=True)
class PackedRows:
    """Neighbouring rows that our kernel serves. tokens: their place in the batch. The tensors, int32, are those that
    the kernel takes; workspace: None where a graph will never look."""

    tokens: slice
    table_RB: Tensor
    query_start_R1: Tensor
    seq_len_R: Tensor
    slot_R: Tensor
    max_query_len: int
    workspace: DecodeWorkspace | None


@dataclass(frozen=True)
class EvictionMetadata:
    """num_actual_tokens: as in vLLM's own. stock: vLLM's metadata of tokens `[stock_from, ...)`, or None: no such rows.
    ours: rows that our kernel serves, after vLLM. captures: window queries to keep."""

    num_actual_tokens: int
    captures: tuple[Capture, ...]
    stock: Any
    stock_from: int
    ours: tuple[PackedRows, ...]


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
        return EvictionMetadata(common.num_actual_tokens, step.captures, stock, stock_from, tuple(ours))

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
    if first == 0:
        return replace(common, seq_lens=seq_lens)

    def rows(values: Any) -> Any:
        return None if values is None else values[first:]

    return replace(
        common,
        query_start_loc=common.query_start_loc[first:] - token,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - token,
        seq_lens=seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - token,
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[token:],
        positions=None if common.positions is None else common.positions[token:],
        is_prefilling=rows(common.is_prefilling),
        seq_lens_cpu_upper_bound=rows(common.seq_lens_cpu_upper_bound),
        req_idx=rows(common.req_idx),
        rswa_prefix_lens=rows(common.rswa_prefix_lens),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class EvictionImpl(AttentionImpl):
    """Goes in front of a stock implementation. One layer; `runtime` and `layer_index` (position in the KV cache group)
    are set once the caches exist."""

    runtime: CUDARuntime | None = None
    layer_index = -1

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
        metadata, runtime = attn_metadata, self.runtime
        assert runtime is not None
        for capture in metadata.captures:
            capture.take(self.layer_index, query)
        if metadata.stock is not None:
            rest = slice(metadata.stock_from, None)
            super().forward(layer, query[rest], key[rest], value[rest], kv_cache, metadata.stock, output[rest])
        for rows in metadata.ours:
            ragged_paged_decode(
                query[rows.tokens],
                runtime.pages,
                self.layer_index,
                rows.table_RB,
                rows.query_start_R1,
                rows.seq_len_R,
                rows.slot_R,
                runtime.state,
                out_TQD=output[rows.tokens],
                max_query_len=rows.max_query_len,
                scale=self.scale,
                key_scale=layer._k_scale_float,
                value_scale=layer._v_scale_float,
                workspace=rows.workspace,
            )
        return output
