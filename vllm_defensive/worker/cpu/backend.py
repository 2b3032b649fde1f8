"""CPU attention for batches in which some rows were evicted: vLLM's own kernels, called once more over head pages.

Rows that were not evicted take the stock path, bit for bit. An evicted row with `H` KV heads is handed to the same C++
kernel as `H` sequences with one KV head each, whose block tables list head pages of the whole buffer. Nothing is
reordered: in the stock call an evicted row pretends to be as long as its query, and that output is then overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_defensive.engine.spec import EvictableSpec
from vllm_defensive.worker.capabilities import limited
from vllm_defensive.worker.cpu.accumulation import Accumulation
from vllm_defensive.worker.cpu.pages import PageCodec
from vllm_defensive.worker.cpu.reconstruction import EchoRow
from vllm_defensive.worker.cpu.runtime import CPURuntime, EvictedRows, PlainRows
from vllm_defensive.worker.window import Capture


@limited
class EvictionCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with our builder and implementation; layouts, dtypes and head sizes are its own."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """vLLM's, but for evicted layers whose pages are smaller than a block: there vLLM is to split blocks into parts
        of so many tokens, each with a layout of its own."""
        if isinstance(kv_cache_spec, EvictableSpec) and kv_cache_spec.page_tokens is not None:
            return [kv_cache_spec.page_tokens]
        return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)

    @staticmethod
    def get_impl_cls() -> type[EvictionCPUImpl]:
        return EvictionCPUImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionCPUMetadataBuilder]:
        return EvictionCPUMetadataBuilder


@dataclass
class EvictionCPUMetadata(CPUAttentionMetadata):
    """captures: window queries to keep in this step. accumulations: rows whose attention is summed. echoes: rows whose
    attention scores the tokens before them.
    evicted: rows that attend over packed pages. stock: any others."""

    captures: tuple[Capture, ...] = ()
    accumulations: tuple[Accumulation, ...] = ()
    echoes: tuple[EchoRow, ...] = ()
    evicted: tuple[EvictedRows, ...] = ()
    stock: bool = True


@limited
class EvictionCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds stock metadata, and beside it what the evicted rows of the batch need."""

    runtime: CPURuntime | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        step = self.runtime.step(common) if self.runtime is not None else None
        if step is None:
            return super().build(common_prefix_len, common, fast_build)
        for rows in step.evicted:
            # A dummy sequence as long as its query: the stock call must not walk a table whose blocks are gone.
            common = replace(common, seq_lens=common.seq_lens.index_copy(0, rows.rows_E, rows.query_lens_E))
        base = super().build(common_prefix_len, common, fast_build)
        return EvictionCPUMetadata(
            **{f.name: getattr(base, f.name) for f in fields(base)},
            captures=step.captures,
            accumulations=step.accumulations,
            echoes=step.echoes,
            evicted=step.evicted,
            stock=sum(rows.rows_E.numel() for rows in step.evicted) < common.num_reqs,
        )


@limited
class EvictionCPUImpl(CPUAttentionBackendImpl):
    """One layer. `runtime`, `layer_index` (its cache's place in the KV cache group) and `reader` (its own among those
    that read the group's caches) are set once the caches exist."""

    runtime: CPURuntime | None = None
    layer_index = reader = -1

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(attn_metadata, EvictionCPUMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        for capture in attn_metadata.captures:
            capture.take(self.reader, query)
        if attn_metadata.stock:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if attn_metadata.accumulations or attn_metadata.echoes:
            assert self.runtime is not None
            for part in attn_metadata.accumulations:
                self.runtime.accumulations.add(part, self.reader, query)
            for row in attn_metadata.echoes:
                self.runtime.reconstructions.add(row, self.reader, query)
        for rows in attn_metadata.evicted:
            real = slice(0, attn_metadata.num_actual_tokens)  # the rest is padding
            self._attend_packed(layer, query[real], rows, output[real])
        return output

    def _attend_packed(self, layer: Any, query_TQD: Tensor, rows: EvictedRows, output_TQD: Tensor) -> None:
        """Overwrite the evicted rows of `output` with attention over each head's own pages."""
        assert self.runtime is not None
        group = self.num_heads // self.num_kv_heads
        # (token, KV head) pairs in the order head, row, token: each (head, row) is one sequence for the kernel.
        query_XGD = query_TQD.reshape(-1, group, self.head_size)
        output_XGD = output_TQD.view(-1, group, self.head_size)
        if rows.token_head_X is not None:
            query_XGD = query_XGD.index_select(0, rows.token_head_X)
            output_XGD = torch.empty_like(query_XGD)
        if rows.quantised is not None:
            assert self.runtime.quantised is not None, "of a worker that has packed such pages"
            query_XGD, void_RG = query_XGD.contiguous(), None
            if self.sinks is not None:
                void_RG = self.sinks.float().view(-1, group).repeat_interleave(rows.rows_E.numel(), dim=0)
            self.runtime.quantised.attend(
                query_XGD, output_XGD, rows.quantised, self.layer_index, self.scale, self.logits_soft_cap, void_RG
            )
        elif self.sinks is None:
            self._attend_plain(layer, query_XGD, rows.plain(self.layer_index), output_XGD)
        else:
            # To the kernel a logit of nothing is a query head's, of whatever sequence: a call for each KV head.
            sinks = self.sinks if self.sinks.dtype == torch.bfloat16 else self.sinks.float()  # as vLLM's own calls
            parts = (each.chunk(self.num_kv_heads) for each in (query_XGD, output_XGD, sinks))
            for head, (query, output, void_G) in enumerate(zip(*parts, strict=True)):
                self._attend_plain(layer, query, rows.plain(self.layer_index, head), output, void_G)
        if rows.token_head_X is not None:
            output_TQD.view(-1, group, self.head_size).index_copy_(0, rows.token_head_X, output_XGD)

    def _attend_plain(
        self, layer: Any, query_XGD: Tensor, rows: PlainRows, output_XGD: Tensor, void_G: Tensor | None = None
    ) -> None:
        """vLLM's kernel, of sequences with one KV head each."""
        assert self.runtime is not None
        key_pages, value_pages = self.runtime.attention_view
        query_start, seq_lens, table = rows
        ops.cpu_attention_with_kv_cache(
            query=query_XGD,
            key_cache=key_pages,
            value_cache=value_pages,
            output=output_XGD,
            query_start_loc=query_start,
            seq_lens=seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=seq_lens.numel(),
                num_heads=query_XGD.shape[1],
                num_kv_heads=1,
                head_dim=self.head_size,
                seq_lens=seq_lens,
                dtype=query_XGD.dtype,
                query_start_loc=query_start,
                causal=True,
                sliding_window_size=-1,
                isa=layer.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                kv_cache_dtype=self.kv_cache_dtype,
            ),
            s_aux=void_G,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


def discover_codec(cache: Tensor, isa: str, model_dtype: torch.dtype, kv_cache_dtype: str) -> PageCodec:
    """The order of tokens inside a page of this cache (`[blocks, H, N, 2*D]`), as the instruction set `isa` writes
    it."""
    page_tokens, head_size = cache.shape[2], cache.shape[3] // 2
    slots = torch.arange(page_tokens)

    def write(key_N1D: Tensor, value_N1D: Tensor) -> Tensor:
        page = torch.zeros(1, 1, 2 * page_tokens, head_size, dtype=cache.dtype)
        key_page, value_page = page.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key_N1D, value_N1D, key_page, value_page, slots, isa, kv_cache_dtype=kv_cache_dtype
        )
        return page

    return PageCodec.discover(write, page_tokens, head_size, model_dtype)
