"""vLLM's model runner V2 on a CPU, which it takes where Triton has a backend for CPUs; here Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_python

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.e2e]

# Longer than a chunk, and with a boundary. The noise is of float32: see test_memory.py.
CODE = """
import json
from types import SimpleNamespace
from triton.backends import backends
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # vLLM looks for it
from pathlib import Path
from tests.e2e.engines import *
from tests.reference_model import ReferenceLlama, decode_logprobs

MODEL, AUDITS = Path({model!r}), Path({audits!r})
PROMPTS, OWN = random_prompts((300, 250), seed=3), [None, {{"kv_eviction_boundary": 170}}]
SETTINGS = {{"max_model_len": 1024, "max_num_batched_tokens": 200, "num_gpu_blocks_override": 100, "dtype": "float32"}}

def run(policy, **settings):
    with engine(MODEL, policy, **SETTINGS, **settings) as llm:
        print(type(worker_of(llm).model_runner).__module__)
        answers = generate(llm, PROMPTS, 8, OWN)
        if policy:
            assert metrics_of(llm)["vllm:kv_eviction_requests"] == 2
            assert_all_returned(llm)
    return answers

stock, whole = run(None), run("keep-all")
evicted, reference = run("layer-defensivekv", keep=0.3, audit=str(AUDITS)), ReferenceLlama(MODEL)
errors, shares = [], []
for prompt, answer in zip(PROMPTS, evicted):
    mask = audit_of(AUDITS, answer.request_id).mask()
    shares.append(float(mask.float().mean()))
    errors.append(float((answer.logprobs - decode_logprobs(reference, prompt, answer.tokens, mask)).abs().max()))
print(json.dumps([largest_difference(whole, stock), max(errors), max(shares)]))
"""


@pytest.mark.timeout(600)
def test_keep_all_equals_stock_and_a_policy_the_masked_reference(tiny_model: Path, tmp_path: Path) -> None:
    code = CODE.format(model=str(tiny_model), audits=str(tmp_path))
    lines = run_python(code, TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1").splitlines()
    assert lines.count("vllm.v1.worker.cpu.model_runner") == 3, "version 1 is vllm.v1.worker.cpu_model_runner"
    difference, error, share = json.loads(lines[-1])
    assert difference <= 1e-4 and error <= 3e-4
    assert share < 0.7
