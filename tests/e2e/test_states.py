"""Models with recurrent layers (gated delta net, Mamba 2, short convolutions), and with layers that attend in chunks:
what is beside the global layers stays as it is, and these are evicted as in any other model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.engines import (
    MIXED,
    Answer,
    assert_all_returned,
    audit_of,
    audits_of,
    engine,
    generate,
    largest_difference,
    metrics_of,
    pool_of,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.e2e.test_hybrid_reference import FLOAT_NOISE, assert_equal_to_masked
from tests.e2e.test_reuse import BATCHED, DOCUMENT, requests, run
from tests.engine.test_states import forget_states
from tests.masked_transformer import MaskedTransformer
from tests.tiny_model import (
    write_tiny_granite_hybrid,
    write_tiny_lfm2,
    write_tiny_llama4,
    write_tiny_nemotron_h,
    write_tiny_qwen3_5,
)

pytestmark = pytest.mark.e2e


class Model(NamedTuple):
    """block: tokens. small: blocks that six requests outgrow. noise: of log-probabilities, where a prompt is cut into
    other chunks. cached: vLLM's functions on CPUs take what its prefix cache asks for; those of Mamba 2 do not take
    such small blocks, and those of short convolutions answer otherwise then. plain: stock vLLM answers as transformers
    does; with short convolutions on CPUs it depends on who else is in the batch."""

    write: Callable[[Path], Path]
    block: int
    small: int = 0
    dtype: str = "float32"
    noise: float = 1e-4  # a few hundred float32 roundings of logits up to 16
    cached: bool = True
    plain: bool = True

    @property
    def judged(self) -> tuple[float, float]:
        """How far an answer may be from the masked reference, and how far it is at least from the full one."""
        return max(FLOAT_NOISE, self.noise), max(100 * FLOAT_NOISE, self.noise)


MODELS = {
    # On CPUs that can, vLLM's gated delta net computes in bf16 alone: four of its steps, where logits are up to 16.
    "qwen3_5": Model(write_tiny_qwen3_5, 96, 36, dtype="bfloat16", noise=0.25),
    "granite_hybrid": Model(write_tiny_granite_hybrid, 96, 30, cached=False),
    "nemotron_h": Model(write_tiny_nemotron_h, 96, cached=False, plain=False),  # transformers' has no `self_attn`
    "lfm2": Model(write_tiny_lfm2, 32, cached=False, plain=False),
    "llama4": Model(write_tiny_llama4, 32, 70),
}
CACHED = [name for name, model in MODELS.items() if model.cached]
EIGHT_BITS = 0.1  # of log-probabilities, where 0.024 were measured
PLAIN = [name for name, model in MODELS.items() if model.plain]
NIGHTLY = (pytest.mark.slow, pytest.mark.nightly)
KEEP = 0.3


def models(names: Any = MODELS, at_once: tuple[str, ...] = ()) -> Any:
    """at_once: those that a change waits for."""
    cases = [pytest.param(name, marks=() if name in at_once else NIGHTLY) for name in names]
    return pytest.mark.parametrize("name", cases)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Folder of each model, which is made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name].write(tmp_path_factory.mktemp(name) / "model")
        return made[name]

    yield folder


def engine_of(folder: Path, name: str, *policy: str, **settings: Any) -> Any:
    model = MODELS[name]
    return engine(folder, *policy, **{"dtype": model.dtype, "enable_prefix_caching": model.cached, **settings})


def largest_until_a_tie(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """`largest_difference`, up to where two tokens were so close that rounding chose; not at the first one."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
        assert same
        found.append(float((a.logprobs[:same] - b.logprobs[:same]).abs().max()))
    return max(found)


@models(at_once=("llama4",))
def test_keep_all_equals_stock(folder_of: Callable[[str], Path], name: str) -> None:
    """To the bit where the same is computed; within rounding where the prefix cache cuts prompts otherwise."""
    model, prompts, start = MODELS[name], random_prompts(MIXED), partial(engine_of, folder_of(name), name)
    with start(enable_prefix_caching=False) as llm:
        expected = generate(llm, prompts, 24)
    with start("keep-all", enable_prefix_caching=False) as llm:
        assert largest_difference(generate(llm, prompts, 24), expected) == 0
        assert scheduler_of(llm).eviction_manager.block_size == model.block
        assert worker_of(llm)._runtime._view.pages_per_block == model.block // 32, "pages have 32 tokens"
        assert len(scheduler_of(llm).kv_cache_config.kv_cache_groups) == 3
        assert metrics_of(llm)["vllm:kv_eviction_requests"] == sum(length >= max(33, model.block) for length in MIXED)
        assert_all_returned(llm)
    if not model.cached:
        return
    with start("keep-all") as llm:
        for turn in range(2):
            answers = generate(llm, prompts, 24)
            assert largest_until_a_tie(answers, expected) <= model.noise
            hits = sum(answer.cached_tokens for answer in answers)
            assert hits > 0.8 * sum(MIXED) if turn else hits == 0
        assert_all_returned(llm)


@models(at_once=("llama4",))
def test_what_is_dropped_goes_back(folder_of: Callable[[str], Path], name: str) -> None:
    block = MODELS[name].block
    with engine_of(folder_of(name), name, "layer-defensivekv", keep=0.25) as llm:
        generate(llm, random_prompts([1000] * 3), 8)
        kept = math.ceil((0.25 * 1000 - 1000 % block) / block)
        metrics = metrics_of(llm)
        assert metrics["vllm:kv_eviction_requests"] == 3
        assert metrics["vllm:kv_eviction_freed_blocks"] == 3 * (1000 // block - kept)
        assert_all_returned(llm)


@models(PLAIN)
def test_answers_equal_the_masked_reference(folder_of: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """At the prompt's end, in the middle of a block, and where a block ends; the second time from the prefix cache."""
    reference, prompts = MaskedTransformer(folder_of(name)), random_prompts((300, 601, 260, 1000), seed=6)
    with engine_of(folder_of(name), name, "snapkv", keep=KEEP, audit=str(tmp_path), reuse="off") as llm:
        exact = generate(llm, prompts, 12, [{"kv_eviction": "none"}] * len(prompts))
        for prompt, answer in zip(prompts, exact, strict=True):
            expected = reference.answer_logprobs(prompt, answer.tokens, None)
            assert float((answer.logprobs - expected).abs().max()) <= MODELS[name].noise
        for boundary in (None, 250, 2 * MODELS[name].block):
            for policy in ("layer-defensivekv", "random-uneven", "h2o"):
                own: dict[str, Any] = {"kv_eviction": policy}
                if boundary is not None:
                    own["kv_eviction_boundary"] = boundary
                answers = generate(llm, prompts, 12, [own] * len(prompts))
                assert_equal_to_masked(reference, tmp_path, prompts, answers, *MODELS[name].judged)
                for prompt, answer in zip(prompts, answers, strict=True):
                    assert audit_of(tmp_path, answer.request_id).stop == (boundary or len(prompt))
        assert_all_returned(llm)


@models(CACHED, at_once=("llama4",))
def test_a_packing_is_adopted_with_the_state_at_its_end(folder_of: Callable[[str], Path], name: str) -> None:
    with engine_of(folder_of(name), name, "snapkv", keep=KEEP) as llm:
        stop = DOCUMENT // MODELS[name].block * MODELS[name].block
        adopted, alone = run(llm, ("snapkv", "16"))
        assert [answer.cached_tokens for answer in adopted] == [stop, stop]
        noise = max(BATCHED, MODELS[name].noise)
        assert largest_until_a_tie(adopted, alone) <= noise
        assert metrics_of(llm)["vllm:kv_eviction_adoptions"] == 2
        # Without what another group had of the document it is read, and packed, once more.
        prompts, own = requests(("snapkv", "16"), 3)
        other = scheduler_of(llm).eviction_manager.outlook.other_managers[0]
        if other.get_num_skipped_tokens(stop) < stop:  # else it is at the end of a chunk, and nothing before is seen
            assert forget_states(pool_of(llm), other.kv_cache_group_id)
            again = generate(llm, prompts[1:2], 24, own[:1])
            assert again[0].cached_tokens < stop
            assert largest_until_a_tie(again, alone[:1]) <= noise
            assert metrics_of(llm)["vllm:kv_eviction_adoptions"] == 2
            assert generate(llm, prompts[2:], 24, own[:1])[0].cached_tokens == stop
        assert_all_returned(llm)


@models(PLAIN)
def test_thrown_out_requests_equal_the_masked_reference(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """Evicted at the end of their prompts, then at a boundary; six together outgrow the pool while they answer. In bf16
    by places alone, for scores may be rounded otherwise when they are evicted anew."""
    policy = "snapkv" if MODELS[name].dtype == "float32" else "streamingllm"
    noise, effect = MODELS[name].judged
    reference, prompts = MaskedTransformer(folder_of(name)), random_prompts([300] * 6, seed=9)
    blocks = MODELS[name].small
    small = {"max_model_len": 512, "num_gpu_blocks_override": blocks, "audit": str(tmp_path), "reuse": "off"}
    with engine_of(folder_of(name), name, policy, keep=0.4, **small) as llm:
        before = 0.0
        for fields, evicted_at in (({}, 300), ({"kv_eviction_boundary": 230}, 230)):
            answers = generate(llm, prompts, 200, [fields] * len(prompts))
            assert metrics_of(llm)["vllm:num_preemptions"] > before
            before = metrics_of(llm)["vllm:num_preemptions"]
            assert all(audit_of(tmp_path, answer.request_id).stop == evicted_at for answer in answers)
            assert_equal_to_masked(reference, tmp_path, prompts, answers, 2 * noise, effect)
            assert_all_returned(llm)


@models(PLAIN)
def test_answers_that_are_evicted_and_bounded_prompts_keep_states(folder_of: Callable[[str], Path], name: str) -> None:
    """Keeping all, however often it is packed, wherever a prompt is cut, and whoever is thrown out half-way."""
    prompts, start = random_prompts((700, 40, 1333)), partial(engine_of, folder_of(name), name)
    with start() as llm:
        expected = generate(llm, prompts, 150)
    again = {"answers": "evict", "interval": 70, "prompts": "bounded", "prompt_interval": 150}
    with start("keep-all", **again) as llm:
        assert largest_until_a_tie(generate(llm, prompts, 150), expected) <= MODELS[name].noise
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.repeats >= 8
        assert_all_returned(llm)


@models(PLAIN)
@pytest.mark.parametrize("policy", ["snapkv", "streamingllm"])
def test_what_is_evicted_again_equals_the_masked_reference(
    folder_of: Callable[[str], Path], name: str, policy: str, tmp_path: Path
) -> None:
    """Prompts in parts of less than a block and of more, answers, and what was packed packed anew."""
    noise, effect = MODELS[name].judged
    reference, prompts = MaskedTransformer(folder_of(name)), random_prompts((700, 1000), seed=3)
    own = {"answers": "evict", "interval": 70, "prompts": "bounded", "prompt_interval": 150, "budget": 288}
    with engine_of(folder_of(name), name, policy, audit=str(tmp_path), **own) as llm:
        answers = generate(llm, prompts, 150)
        assert_all_returned(llm)
    for prompt, answer in zip(prompts, answers, strict=True):
        audits = audits_of(tmp_path, answer.request_id)
        assert len(audits) > 2
        seen = [(audit.first_reader, audit.mask()) for audit in audits]
        expected, without = (reference.answer_logprobs(prompt, answer.tokens, again=some) for some in (seen, seen[:-1]))
        error, last = (float((answer.logprobs - found).abs().max()) for found in (expected, without))
        print(f"{len(prompt)} tokens, {len(audits)} times: {error:.1e} from the masked reference, {last:.2f} without")
        assert error <= 2 * noise
        assert last > effect, "else the last eviction was not seen"


@models(["granite_hybrid"])
def test_pages_of_fewer_bits_are_parts_of_a_block_too(folder_of: Callable[[str], Path], name: str) -> None:
    """All of a prompt in codes of 8 bits: what is read of them is what stock reads, but for these."""
    prompts, start = random_prompts((300, 1000)), partial(engine_of, folder_of(name), name)
    with start() as llm:
        expected = generate(llm, prompts, 12)
    with start("halokv", keep=1.0, widths="8") as llm:
        answers = generate(llm, prompts, 12)
        metrics = metrics_of(llm)
        assert metrics["vllm:kv_eviction_kept_tokens"] == sum(map(len, prompts))
        assert metrics["vllm:kv_eviction_held_tokens"] < 0.7 * sum(map(len, prompts))
        found = largest_until_a_tie(answers, expected)
        print(f"{found:.1e} from stock")
        assert 0 < found <= EIGHT_BITS
        assert_all_returned(llm)


def test_nothing_is_repeated(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repetition would move the states; what is done instead, and what blocks cost, is said."""
    from vllm import SamplingParams

    from vllm_defensive.worker import worker

    said: list[str] = []
    monkeypatch.setattr(worker.logger, "info", lambda message, *values, **more: said.append(message % values))
    with engine_of(folder_of("lfm2"), "lfm2", "kvzip", keep=KEEP) as llm:
        (told,) = [line for line in said if "layers are evicted" in line]
        assert "2 of 6 layers" in told and "32 tokens" in told and told.endswith("scored by its window")
        params = SamplingParams(max_tokens=4, ignore_eos=True, extra_args={"kv_eviction_report": 1})
        (output,) = llm.generate([{"prompt_token_ids": random_prompts([400])[0]}], params, use_tqdm=False)
        assert output.kv_transfer_params["kv_eviction"]["policy"] == "halokv"
        assert metrics_of(llm)["vllm:kv_eviction_echo_tokens"] == 0
