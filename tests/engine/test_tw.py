import random, pytest
from tests.engine.harness import Harness, text
@pytest.mark.parametrize("policy", ["streamingllm","keep-all","snapkv","halokv"])
def test_walk(tiny_model, policy):
   for asynchronous, drafts in ((False,0),(True,0),(False,4)):
    for seed in range(2):
      rng = random.Random(seed)
      h = Harness(tiny_model, num_blocks=30, policy=policy, asynchronous=asynchronous, drafts=drafts, chunk=96, max_model_len=1024, keep=0.5, answers="evict", interval=64, budget=160)
      pre=0
      for _ in range(600):
        if len(h.live)<6 and rng.random()<.3:
            h.add(text(rng.randrange(1,200), rng.randrange(300)), max_tokens=rng.choice([1,20,300,600]))
        if h.live and rng.random()<.02: h.abort(rng.choice(h.live))
        pre+=len(h.step().preempted_req_ids or ())
        h.check()
      h.run(9000)
      h.assert_all_returned()
      rep=sum(e.score.since is not None for e in h.evictions)
      print(policy, asynchronous, drafts, seed, "evictions", len(h.evictions), "repeats", rep, "preempted", pre, h.manager.lifecycle.totals.cancelled)
