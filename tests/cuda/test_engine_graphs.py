"""Decode batches run from graphs: what they read after a capture lies in buffers that the steps since have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import graphs
from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e.engines import assert_all_returned, audit_of, generate, random_prompts
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e

TOKENS = 8


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_replayed_decode_equals_the_masked_reference(model: Path, tmp_path: Path, kernels: str) -> None:
    """Evicted and un-evicted rows side by side, batches that shrink below their graph's size, slots that are used again
    by others, and a prompt whose last chunk is one token, which a graph of the whole model must not swallow."""
    arguments = {"dtype": "float32", "enforce_eager": False, "max_num_seqs": 4, "audit": str(tmp_path)}
    if MODE == "pretend":  # nothing compiled, so no graphs in pieces
        sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 4]}
        arguments["compilation_config"] = {"custom_ops": ["none"], "mode": 0, **sizes}
    turns = [
        (("snapkv", "none", "random-uneven"), (140, 60, 70)),
        (("layer-defensivekv",), (129,)),
        (("none",) * 2, (61, 62)),
    ]
    arguments["kv_cache_memory_bytes"] = None  # on a GPU, too, vLLM measures here, and the worker sets its part aside
    reference = ReferenceLlama(model)
    with engine(model, "snapkv", **arguments) as llm:
        for seed, (policies, lengths) in enumerate(turns):
            prompts = random_prompts(lengths, seed=seed)
            graphs.replays[0] = 0
            answers = generate(llm, prompts, TOKENS, extra_args=[{"kv_eviction": policy} for policy in policies])
            for policy, prompt, answer in zip(policies, prompts, answers, strict=True):
                kept_LHT = None if policy == "none" else audit_of(tmp_path, answer.request_id).mask()
                expected = decode_logprobs(reference, prompt, answer.tokens, kept_LHT)
                assert (answer.logprobs - expected).abs().max() <= 1e-4, policy  # float32 roundings of logits up to 16
            # All steps after the prompts' last chunks, and these not: nobody could keep queries there.
            assert MODE != "pretend" or graphs.replays[0] == TOKENS - 1
        assert_all_returned(llm)
