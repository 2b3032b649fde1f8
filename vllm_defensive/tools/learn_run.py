"""Make a learned score of a model: what a repeated text would attend to, foretold from each token's key and value.

An engine runs each text with the policy that repeats it, the workers add up what they see, and the weights follow in
closed form. Then they are tried on texts that were held back, and written to where a server finds them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load

from vllm_defensive import learned
from vllm_defensive.tools import learn_checks, learn_texts
from vllm_defensive.tools.learn_engine import JOINED, LEAST_LENGTH, TEACHER, fingerprint, lengths, prepared
from vllm_defensive.tools.learn_state import State

TOKENS = 61_440
SAVE_SECONDS = 20.0
"""A learning that is stopped loses what so many seconds saw, and a batch."""
BATCH = 8
"""Texts that the engine is given at once."""
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of the estimated balance, which are tried."""
USUAL_SHARE = 0.5
"""Which is taken where nothing is tried."""
HELD_BACK = 10
"""Every which text is not learned from."""
# Engine arguments on which the sums depend, beside the model.
_DECIDE = "dtype quantization kv_cache_dtype tensor_parallel_size seed tokenizer hf_overrides load_format"


@dataclass(frozen=True)
class Job:
    """What is asked for, beside the engine.

    texts: files; none: the default texts. tokens: of all texts. length: of one; None: see `lengths`. out: None: where
    the model's file belongs. unless_there: do nothing if another process has made the file while this one waited.
    """

    texts: tuple[str, ...] = ()
    tokens: int = TOKENS
    length: int | None = None
    out: Path | None = None
    check: bool = True
    unless_there: bool = False


def learn(job: Job, engine_args: Any) -> Path:
    """Make the file, and return its path.

    engine_args: vLLM's `EngineArgs`, or a server's. Raises ValueError for what cannot be done, and OSError where
    nothing can be written.
    """
    began = time.monotonic()
    engine_args = prepared(engine_args)
    length, engine_args.max_model_len = lengths(job.length, engine_args)
    documents = [text for path in job.texts for text in learn_texts.read(path)]
    with ExitStack() as stack:
        state = _begin(job, engine_args, length, stack)
        if state is not None and job.unless_there and _is_usable(state.out):
            return state.out
        of_model = fingerprint(engine_args)
        llm = stack.enter_context(_engine(engine_args))
        if state is None or (job.out is None and fingerprint(engine_args) != of_model):
            state = _begin(job, engine_args, length, stack)  # the engine has fetched the model, or the rest of it
        if state is None:
            raise ValueError(
                f"{engine_args.model}: has no weight files by which a server would know it; give --out FILE"
            )
        score = Learning(job, engine_args, length, state, llm).run(documents)
        score.save(state.out)
        state.remove()
    print(f"in {time.monotonic() - began:.0f} s")
    return state.out


def _is_usable(path: Path) -> bool:
    try:
        learned.load(path)
    except ValueError:
        return False
    return True


def _begin(job: Job, engine_args: Any, length: int, stack: ExitStack) -> State | None:
    """What there is of this learning, and nobody else at it; None: it is not known yet where it belongs."""
    of_model = fingerprint(engine_args)
    out = job.out or (None if of_model is None else learned.path_for(of_model))
    if out is None:
        return None
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in job.texts]
    engine = [str(getattr(engine_args, name)) for name in _DECIDE.split()]
    what = [learned.VERSION, engine_args.model, of_model, length, job.tokens, files, engine]
    state = State(out, hashlib.sha256(json.dumps(what).encode()).hexdigest())
    stack.enter_context(state.locked())
    return state


class Learning:
    """One learning: an engine that is there, and what has been seen so far."""

    def __init__(self, job: Job, engine_args: Any, length: int, state: State, llm: Any) -> None:
        if (tokenizer := llm.get_tokenizer()) is None:
            raise ValueError(f"{engine_args.model}: is served without a tokenizer, and texts are what is learned from")
        self._job, self._args, self._length, self._state, self._llm = job, engine_args, length, state, llm
        self._encoder = learn_texts.Encoder(tokenizer)

    def run(self, documents: Sequence[str]) -> learned.LearnedScore:
        """documents: the user's; none: the default texts."""
        texts, done = self._state.load() or (self._texts(documents), 0)
        held_back = texts[HELD_BACK - 1 :: HELD_BACK] or texts[-1:]
        learned_from = [
            text for i, text in enumerate(texts[: len(texts) - (len(texts) < HELD_BACK)], 1) if i % HELD_BACK
        ]
        turned = self._start(texts[0], self._state.sums(done) if done else None)
        self._go_through(texts, [*held_back, *learned_from], len(held_back), done)
        score = self._solve(turned)
        self._load(score)
        estimate = self._estimate(held_back)
        if not self._job.check:
            return _with_facts(score, balance=estimate * USUAL_SHARE)
        rng, room = random.Random(self._args.seed), self._args.max_model_len
        asked = [learn_checks.questions(text, self._encoder, rng, room) for text in held_back]
        return self._checked(_with_facts(score, balance=self._balance(asked, estimate)), asked)

    def _texts(self, documents: Sequence[str]) -> list[list[int]]:
        count, seed = max(self._job.tokens // self._length, 2), self._args.seed
        if self._job.texts:
            return learn_texts.given(self._job.texts, documents, self._encoder, self._length, count, seed)
        return learn_texts.defaults(self._encoder, self._length, count, seed, self._write)

    def _write(self, beginnings: list[list[int]]) -> list[list[int]]:
        """Whole texts that the model has written, of these beginnings."""
        from vllm.sampling_params import SamplingParams

        params = [
            SamplingParams(
                temperature=1.0,
                seed=self._args.seed + i,
                max_tokens=max(self._length - len(beginning), 1),
                ignore_eos=True,
                detokenize=False,
            )
            for i, beginning in enumerate(beginnings)
        ]
        prompts = [{"prompt_token_ids": beginning} for beginning in beginnings]
        outputs = self._llm.generate(prompts, params, use_tqdm=_writing)
        written = (list(output.outputs[0].token_ids) for output in outputs)
        return [[*beginning, *text][: self._length] for beginning, text in zip(beginnings, written, strict=True)]

    def _start(self, text: list[int], sums: str | None) -> list[bool]:
        """Have the workers add up from here on. Returns which layers turn their keys."""
        from vllm.sampling_params import SamplingParams

        workers = self._llm.collective_rpc
        if (refusal := workers("watch_rotation")[0]) is None:
            prompt = {"prompt_token_ids": text[:LEAST_LENGTH]}
            self._llm.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
            if not isinstance(found := workers("start_learning", args=(sums,))[0], str):
                return list(found)
            refusal = found
        raise ValueError(f"{self._args.model}: nothing can be learned of this model: {refusal}")

    def _go_through(self, texts: list[list[int]], ordered: list[list[int]], held_back: int, done: int) -> None:
        """Have the workers see all of `ordered` from `done` on, of which the first are held back."""
        from tqdm import tqdm

        if not done:
            self._state.save(texts, 0)
        saved = time.monotonic()
        with tqdm(desc="learning", total=len(ordered), initial=done, unit="text") as bar:
            while done < len(ordered):
                end = min(done + BATCH, held_back if done < held_back else len(ordered))
                self._llm.collective_rpc("hold_back", args=(done < held_back,))
                self._show(ordered[done:end], TEACHER)
                bar.update(end - done)
                done = end
                if time.monotonic() - saved >= SAVE_SECONDS or done == len(ordered):
                    self._llm.collective_rpc("save_lessons", args=(self._state.sums(done),))
                    self._state.save(texts, done)
                    saved = time.monotonic()

    def _show(self, texts: Sequence[list[int]], policy: str) -> None:
        """Have the workers evict these texts by a policy."""
        from vllm.sampling_params import SamplingParams

        # Of one that asks for a single token nobody reads what is kept, so that it is not evicted.
        params = SamplingParams(
            temperature=0,
            max_tokens=2,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_eviction": policy, "kv_eviction_keep": 0.5},
        )
        self._llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)

    def _solve(self, turned: list[bool]) -> learned.LearnedScore:
        of_ranks = [load(found) for found in self._llm.collective_rpc("learned_so_far")]
        weight_LHX, r2_LH = (torch.cat([found[name] for found in of_ranks], dim=1) for name in ("weight_LHX", "r2_LH"))
        tokens = int(of_ranks[0]["tokens"])
        if not tokens or not bool(weight_LHX.isfinite().all()):
            raise ValueError("no text was repeated, as the KV cache is too small for it; give it more memory")
        facts = learned.Facts(
            version=learned.VERSION,
            fingerprint=fingerprint(self._args),
            model=Path(self._args.model).name if Path(self._args.model).is_dir() else self._args.model,
            turned=turned,
            texts=list(self._job.texts or learn_texts.DEFAULTS),
            tokens=tokens,
            r2=r2_LH.mean(dim=1).tolist(),
        )
        print(f"{tokens:,} tokens learned from; R2 on texts held back {float(r2_LH.mean()):.2f}, by layer:")
        print(" ".join(f"{r2:.2f}" for r2 in facts.r2), flush=True)
        return learned.LearnedScore(facts=facts, weight_LHX=weight_LHX)

    def _estimate(self, held_back: list[list[int]]) -> float:
        """The balance that brings the score onto the window's scale, by what both say of texts held back."""
        for first in range(0, len(held_back), BATCH):
            self._show(held_back[first : first + BATCH], JOINED)
        of_ranks = self._llm.collective_rpc("end_learning")
        return math.exp(fmean(map(math.log, of_ranks)))

    def _balance(self, asked: list[list[learn_checks.Question]], estimate: float) -> float:
        """The share of the estimate at which the joined policy loses least, all tasks together."""
        from tqdm import tqdm

        keep, answers = learn_checks.KEEPS[-1], []
        for questions in tqdm(asked, desc="balancing", unit="text"):
            learn_checks.remember(self._llm, questions)
            for share in SHARES:
                self._llm.collective_rpc("set_balance", args=(share * estimate,))
                learn_checks.compare(self._llm, questions, {str(share): (JOINED, keep)})
            answers.append(learn_checks.take(self._llm))
        found = learn_checks.means(answers)
        losses = {share: learn_checks.lost(found, str(share)) for share in SHARES}
        best = min(losses, key=losses.__getitem__)
        told = ", ".join(f"{share * estimate:.3g}: {loss:.4f}" for share, loss in losses.items())
        print(f"balance with the window's scores, and KL of all tasks: {told}", flush=True)
        return best * estimate

    def _load(self, score: learned.LearnedScore) -> None:
        unchecked = self._state.folder / "unchecked.safetensors"
        score.save(unchecked)
        self._llm.collective_rpc("load_learned", args=(str(unchecked),))

    def _checked(self, score: learned.LearnedScore, asked: list[list[learn_checks.Question]]) -> learned.LearnedScore:
        """The score, and in its facts what it does beside halokv."""
        from tqdm import tqdm

        self._load(score)
        answers = []
        for questions in tqdm(asked, desc="checking", unit="text"):
            learn_checks.remember(self._llm, questions)
            learn_checks.compare(self._llm, questions, learn_checks.SETTINGS)
            answers.append(learn_checks.take(self._llm))
        checks = learn_checks.means(answers)
        print(learn_checks.table(checks), flush=True)
        window_keep = learn_checks.window_keep(checks)
        where = "" if window_keep is None else f", and without one at ratios from {window_keep:g} on"
        print(f"auto will go by it behind a boundary{where}")
        return _with_facts(score, checks=checks, window_keep=window_keep)


def _with_facts(score: learned.LearnedScore, **found: Any) -> learned.LearnedScore:
    return score.model_copy(update={"facts": score.facts.model_copy(update=found)})


def _writing(*args: Any, **settings: Any) -> Any:
    """vLLM's progress bar, under another name."""
    from tqdm import tqdm

    return tqdm(*args, **{**settings, "desc": "writing texts"})


@contextmanager
def _engine(engine_args: Any) -> Iterator[Any]:
    from vllm.entrypoints.llm import LLM

    llm = LLM(**vars(engine_args))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
