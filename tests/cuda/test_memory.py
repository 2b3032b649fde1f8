"""What is set aside beside the KV cache covers what is then allocated: byte for byte, where it lasts."""

from __future__ import annotations

import torch
from torch import nn

from vllm_defensive.plan import Reconstruction
from vllm_defensive.worker.cuda.again import Kept
from vllm_defensive.worker.cuda.memory import AGAIN_COPIES, BesideCache, Model, kept_share
from vllm_defensive.worker.cuda.runtime import CUDARuntime
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive_kernels import PagedKV, reconstruction

NOTHING = Projections(nn.Module(), [], 32, 128, keep=False)
LLAMA_8B = Model(32, 32, 8, 128, torch.bfloat16, page_tokens=16)
L, H, Q, N, D, W = 3, 2, 4, 16, 8, 32
REQUESTS, TOKENS, PROMPTS, ECHOES = 6, 1000, 2, 64
CLASSES = ("16", "8", "4")


def bytes_of(*parts: object) -> int:
    """Of all tensors that the parts, or their attributes, are."""
    tensors = [t for part in parts for t in (vars(part).values() if not isinstance(part, torch.Tensor) else [part])]
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))


def test_what_lasts_is_counted_byte_for_byte() -> None:
    model = Model(L, Q, H, D, torch.float32, N)
    counted = BesideCache.of(
        model,
        NOTHING,
        window=W,
        max_tokens=TOKENS,
        max_requests=REQUESTS,
        prompts_at_once=PROMPTS,
        echoes_at_once=ECHOES,
        classes=len(CLASSES),
    )
    windows = WindowQueries(L, W, Q, D, torch.float32)
    pages = PagedKV.from_layers(list(torch.zeros(L, 4, H, N, 2 * D)))
    runtime = CUDARuntime(
        pages, windows, {}, max_requests=REQUESTS, max_blocks=-(-TOKENS // N), num_query_heads=Q, classes=CLASSES
    )
    captures = [windows.plan(str(i), (TOKENS - W, TOKENS), (TOKENS - 8, TOKENS), 0) for i in range(PROMPTS)]
    assert bytes_of(runtime.workspace) == counted.decode
    assert bytes_of(runtime.state, runtime.slot_R) == counted.state
    assert sum(c.window_AWQD.untyped_storage().nbytes() for c in captures if c is not None) == counted.windows
    for name in "ab":  # one at a time: "a" was given up
        runtime.reconstructions.plan(Reconstruction(name, TOKENS, (0, TOKENS), 2 * TOKENS, "all"), (TOKENS, TOKENS + 1))
    peaks = bytes_of(*runtime.reconstructions._seen.values())
    assert peaks + reconstruction.bytes_at_most(ECHOES, Q) == counted.echoes
    assert counted.projections == 0  # tests/worker/test_projections.py has those
    assert counted.total == sum(vars(counted).values())


def test_memory_grows_with_the_longest_prompt_and_stays_small_beside_a_gpu() -> None:
    """Scores' temporaries are measured in `test_engine_quantised.py`."""
    short, long = (
        BesideCache.of(
            LLAMA_8B, NOTHING, window=32, max_tokens=tokens, max_requests=256, prompts_at_once=32, echoes_at_once=0
        )
        for tokens in (8192, 131072)
    )
    assert long.echoes == 0
    # 8 copies of 256 heads' scores, and 17 of those that are weighed at a time, which are all of a short prompt's
    assert short.scores == (8 + 17) * 256 * 8192 * 4
    assert short.total < 0.6 * 2**30 < long.total < 2 * 2**30


def test_evicting_answers_takes_more_scores_at_a_time_and_a_share_of_the_cache() -> None:
    """Of packed pages, wherever they are: what is known of a page is so many bytes, whoever has it."""
    sizes = {"window": 32, "max_tokens": 8192, "max_requests": 256, "prompts_at_once": 32, "echoes_at_once": 0}
    kept, evicted = (BesideCache.of(LLAMA_8B, NOTHING, **sizes, answers=answers) for answers in (False, True))
    assert evicted.scores - kept.scores == AGAIN_COPIES * 256 * 8192 * 4
    assert kept_share(128, torch.bfloat16.itemsize) == 8 / 512
    one_page, of_nobody = torch.zeros(1, N, 2 * D, dtype=torch.float16), Kept.nothing(L * H, N, torch.device("cpu"))
    known = of_nobody.position_PN.nbytes + of_nobody.score_PN.nbytes  # which has one page as well
    assert known == kept_share(D, torch.float16.itemsize) * one_page.nbytes
