import pytest
from tests.e2e.engines import *
from tests.reference_model import *
from tests.learned_scores import score_of
from vllm_defensive import audit
@pytest.mark.parametrize("policy", ["learnedkv","halokv","snapkv","layer-defensivekv", "tova","h2o"])
def test_ref(tiny_model, tmp_path, policy):
    prompts = random_prompts((100, 300, 33, 517))
    ref=ReferenceLlama(tiny_model)
    score={}
    if "learned" in policy:
        score_of(ref, tiny_model, tmp_path/"s.safetensors"); score={"learned": str(tmp_path/"s.safetensors")}
    with engine(tiny_model, policy, dtype="float32", answers="evict", interval=64, budget=128, audit=str(tmp_path), **score) as llm:
        ours = generate(llm, prompts, 300)
        print(policy, scheduler_of(llm).eviction_manager.lifecycle.totals)
        assert_all_returned(llm)
    for p, a in zip(prompts, ours):
        ev=audits_of(tmp_path, a.request_id)
        masks=[e.mask() for e in ev]
        want=decode_logprobs(ref,p,a.tokens,None,again=[(e.first_reader, e.mask()) for e in ev])
        full=decode_logprobs(ref,p,a.tokens,None)
        one=decode_logprobs(ref,p,a.tokens,masks[0])
        print(policy, len(p), [(e.stop, e.packed_blocks, e.repeat, int(e.kept_counts.min()), int(e.kept_counts.max())) for e in ev], "ERR", (a.logprobs-want).abs().max(), "full", (a.logprobs-full).abs().max(), "first only", (a.logprobs-one).abs().max())
