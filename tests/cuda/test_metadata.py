"""What stands between vLLM's metadata and its own builders: every field of a batch has its place, and models that reach
into the metadata find what they look for."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention import backend as vllm_backend
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.cuda.wheel import fetched
from tests.releases import RELEASES
from vllm_defensive.worker.cuda import backend
from vllm_defensive.worker.cuda.backend import EvictionMetadata, _rest


def _sources() -> dict[str, Path]:
    """Of the vLLM that runs, and of the supported releases whose Python half is at hand."""
    files = {release: fetched(release) / "vllm/v1/attention/backend.py" for release in RELEASES}
    return {"here": Path(vllm_backend.__file__), **{release: file for release, file in files.items() if file.exists()}}


@pytest.mark.parametrize("source", _sources().values(), ids=_sources().keys())
def test_every_field_of_a_batch_has_its_place(source: Path) -> None:
    """A field that comes with a new vLLM is a decision: it fails here until somebody has made it."""
    (found,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == CommonAttentionMetadata.__name__
    )
    fields = [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    known = backend.BY_ROW + backend.BY_TOKEN + backend.RENUMBERED + backend.STILL_TRUE + backend.NEVER_THERE
    assert sorted(fields) == sorted(known)


def batch(**fields: Any) -> CommonAttentionMetadata:
    """Rows of 1, 1, 5 and 20 new tokens, padded to 32."""
    starts = torch.tensor([0, 1, 2, 7, 27], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([50, 60, 70, 20], dtype=torch.int32),
        num_reqs=4,
        num_actual_tokens=27,
        max_query_len=20,
        max_seq_len=70,
        block_table_tensor=torch.arange(16).view(4, 4),
        slot_mapping=torch.arange(32),
        req_idx=np.arange(4),
        **fields,
    )


def test_vllm_sees_the_other_rows_as_if_they_were_all_and_evicted_ones_as_long_as_their_query() -> None:
    common = batch()
    rest = _rest(common, 2, 2, ((2, 3),))
    assert rest.query_start_loc.tolist() == [0, 5, 25] == rest.query_start_loc_cpu.tolist()
    assert rest.seq_lens.tolist() == [5, 20] and common.seq_lens.tolist() == [50, 60, 70, 20]
    assert (rest.num_reqs, rest.num_actual_tokens) == (2, 25)
    assert rest.block_table_tensor[0].tolist() == [8, 9, 10, 11] and rest.slot_mapping[0] == 2
    assert rest.req_idx.tolist() == [2, 3]


def test_images_stay_with_their_rows_and_dummies_have_none() -> None:
    spans = {0: [(1, 4)], 1: [], 2: [(10, 30)], 3: [(2, 9), (12, 15)]}
    assert _rest(batch(mm_req_doc_ranges=spans), 2, 2, ()).mm_req_doc_ranges == {0: [(10, 30)], 1: [(2, 9), (12, 15)]}
    assert _rest(batch(mm_req_doc_ranges=spans), 2, 2, ((2, 3),)).mm_req_doc_ranges == {1: [(2, 9), (12, 15)]}
    assert _rest(batch(mm_req_doc_ranges=spans), 0, 0, ((3, 4),)).mm_req_doc_ranges == {r: spans[r] for r in range(3)}
    assert _rest(batch(), 2, 2, ()).mm_req_doc_ranges is None


@pytest.mark.parametrize("first", [0, 2])
def test_whatever_is_of_a_row_or_a_token_is_cut_with_it(first: int) -> None:
    """And nothing that was worked out for the whole batch is taken for the rest's, dummies or not."""
    by_row = {name: np.arange(4) if name == "req_idx" else torch.arange(4) for name in backend.BY_ROW[1:]}
    whole = batch()
    for name, value in {**by_row, "positions": torch.arange(32), "causal": torch.arange(4)}.items():
        setattr(whole, name, value)
    whole.compute_num_computed_tokens()
    rest = _rest(whole, first, first, ((3, 4),))
    for name in (*by_row, "causal"):
        assert getattr(rest, name).tolist() == list(range(first, 4)), name
    for name in backend.BY_TOKEN:
        assert getattr(rest, name).tolist() == list(range(first, 32)), name
    query_lens = torch.tensor([1, 1, 5, 20])[first:]
    expected = (torch.tensor([50, 60, 70, 20])[first:] - query_lens).tolist()
    assert rest.compute_num_computed_tokens().tolist() == [*expected[:-1], 0]


def metadata(stock: Any) -> EvictionMetadata:
    return EvictionMetadata(num_actual_tokens=4, captures=(), echoes=(), stock=stock, stock_from=1, ours=())


def test_models_reach_through_to_the_metadata_below() -> None:
    stock = SimpleNamespace(num_actual_tokens=3, mm_prefix_range_tensor=1)
    ours = metadata(stock)
    assert ours.mm_prefix_range_tensor == 1 and not hasattr(ours, "unknown")
    ours.mm_prefix_range_tensor, ours.num_actual_tokens = None, 5
    assert (stock.mm_prefix_range_tensor, stock.num_actual_tokens, ours.num_actual_tokens) == (None, 3, 5)
    assert not hasattr(metadata(None), "mm_prefix_range_tensor")


@pytest.mark.parametrize("rows", ["prompts", "decode"])
def test_gemma4_takes_the_look_ahead_off_its_global_layers(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.forward_context

    names = ("mm_prefix_range", "mm_prefix_range_tensor", "mm_prefix_query_range_tensor")
    full, sliding = (SimpleNamespace(**dict.fromkeys(names, 1)) for _ in range(2))
    layers = {"m.layers.0.attn": sliding, "m.layers.5.attn": metadata(full if rows == "prompts" else None)}
    monkeypatch.setattr(vllm.forward_context, "get_forward_context", lambda: SimpleNamespace(attn_metadata=layers))
    _gemma4s("_clear_mm_prefix_for_full_attn_layers")(SimpleNamespace(_full_attn_layer_idxs={5}))
    assert {getattr(sliding, name) for name in names} == {1}
    assert {getattr(full, name) for name in names} == {None if rows == "prompts" else 1}


def _gemma4s(name: str) -> Any:
    """A method of vLLM's model, out of its source: to import that takes libraries for images."""
    origin = importlib.util.find_spec("vllm.model_executor.models.gemma4_mm").origin  # type: ignore[union-attr]
    nodes = ast.walk(ast.parse(Path(str(origin)).read_text()))
    (method,) = (node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    made: dict[str, Any] = {}
    exec(compile(ast.Module([method], []), str(origin), "exec"), made)
    return made[name]
