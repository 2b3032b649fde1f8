"""`python -m benchmarks.learned --model DIR --texts longbench-e=FILE --out FILE`

What a learned score is worth on texts of other kinds than those that it was learned from, what more of them would add,
and what it would add to read all heads of a layer instead of a token's own. Kinds: prose and code (Python's), what the
model itself writes, and files of one's own (as `python -m vllm_defensive.learn` reads them). What is printed, FILE has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import ensure_model
from vllm_defensive import learned
from vllm_defensive.tools import learn_checks, learn_texts
from vllm_defensive.tools.learn_engine import LENGTH, TEACHER, prepared
from vllm_defensive.worker.learned import FLOOR, Lessons, foretold_share, solve
from vllm_defensive_kernels.learned import SINKS, unrotate

KEEP, TESTED = 0.2, 3
CURVE = (1, 2, 8, 16)
"""Texts of each kind."""
Texts = list[list[int]]


class BothLessons(Lessons):
    """Beside each head's own sums, those of all heads of a layer together: their features, 1, and all targets."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.layers: dict[int, Tensor] = {}

    def add(self, layer: int, key_HTD: Tensor, value_HTD: Tensor, peak_HT: Tensor) -> None:
        super().add(layer, key_HTD, value_HTD, peak_HT)
        position_T = torch.arange(key_HTD.shape[1])
        parts = [unrotate(key_HTD, position_T, self._rotations[layer]), value_HTD.float()]
        rows_TF = torch.cat(parts, dim=-1).transpose(0, 1).flatten(1)
        targets_TH = peak_HT.clamp_min(FLOOR).log().T
        rows_TY = torch.cat([rows_TF, torch.ones_like(targets_TH[:, :1]), targets_TH], dim=1)[SINKS:].double()
        self.layers[layer] = self.layers.get(layer, 0) + rows_TY.T @ rows_TY


def whole_layer(gram_YY: Tensor, heads: int) -> Tensor:
    """The sums of each head's target on all heads' features: `[H, F + 2, F + 2]`."""
    features = len(gram_YY) - heads
    rows = [[*range(features), features + head] for head in range(heads)]
    return torch.stack([gram_YY[row][:, row] for row in rows])


class Learner:
    """An engine, and the sums of what it has seen."""

    def __init__(self, model: Path) -> None:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        arguments = prepared(EngineArgs(model=str(model), dtype="bfloat16", max_model_len=2 * LENGTH + 512))
        self.llm, self._model = LLM(**vars(arguments)), model
        self.encoder = learn_texts.Encoder(self.llm.get_tokenizer())
        self._worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.llm.collective_rpc("watch_rotation")
        self._generate([self.encoder.encode("The first of many words.")], max_tokens=1)
        (self.turned,) = self.llm.collective_rpc("start_learning")

    def see(self, texts: Texts) -> tuple[Tensor, dict[int, Tensor]]:
        """Their sums: by head, and by layer."""
        evictor = self._worker._evictor
        layers, heads, rows = evictor.lessons.gram_LHYY.shape[:3]
        evictor.lessons = lessons = BothLessons(layers, heads, (rows - 2) // 2, evictor.lessons._rotations)
        self._generate(texts, max_tokens=2, extra_args={"kv_eviction": TEACHER, "kv_eviction_keep": 0.5})
        return lessons.gram_LHYY, lessons.layers

    def write(self, beginnings: Texts) -> Texts:
        outputs = self._generate(beginnings, temperature=1.0, seed=1, max_tokens=LENGTH)
        pairs = zip(beginnings, outputs, strict=True)
        return [[*beginning, *output.outputs[0].token_ids][:LENGTH] for beginning, output in pairs]

    def divergence(self, weight_LHX: Tensor | None, texts: Texts) -> dict[str, float]:
        """Mean KL by task, of learnedkv with these weights, or of halokv."""
        policy = "halokv" if weight_LHX is None else "learnedkv"
        if weight_LHX is not None:
            facts = learned.Facts(
                version=learned.VERSION, fingerprint=None, model="", turned=self.turned, texts=[], tokens=0, r2=[]
            )
            with TemporaryDirectory() as folder:
                path = Path(folder) / "score.safetensors"
                learned.LearnedScore(facts=facts, weight_LHX=weight_LHX.float()).save(path)
                self.llm.collective_rpc("load_learned", args=(str(path),))
        self._worker._evictor.lessons = None
        rng, answers = random.Random(0), []
        for text in texts:
            asked = learn_checks.questions(text, self.encoder, rng, 2 * LENGTH)
            asked = [question for question in asked if question.task != "window"]
            learn_checks.remember(self.llm, asked)
            learn_checks.compare(self.llm, asked, {"": (policy, KEEP)})
            answers.append(learn_checks.take(self.llm))
        return {name.split()[1]: kl for name, kl in learn_checks.means(answers).items()}

    def _generate(self, prompts: Texts, **sampling: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(ignore_eos=True, detokenize=False, **{"temperature": 0.0, **sampling})
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def texts_of_each_kind(learner: Learner, files: Mapping[str, str], count: int) -> dict[str, Texts]:
    rng, encoder = random.Random(7), learner.encoder
    sources = {"prose": learn_texts.prose(rng), "code": learn_texts.code()}
    for kind, file in files.items():
        documents = learn_texts.read(file)
        sources[kind] = rng.sample(documents, min(4 * count, len(documents)))
    kinds = {
        kind: [text for text, _ in zip(learn_texts.cut(documents, encoder, LENGTH, rng), range(count), strict=False)]
        for kind, documents in sources.items()
    }
    beginnings = [learn_texts.beginning(("written", "chat")[i % 2], i // 2, encoder) for i in range(count)]
    return {**kinds, "own writing": learner.write(beginnings)}


def mean_r2(gram: Tensor, weight: Tensor) -> float:
    return round(float(foretold_share(gram, weight).mean()), 3)


def of_layers(sums: Sequence[Mapping[int, Tensor]], heads: int) -> Tensor:
    """All heads' features: `[L, H, F + 2, F + 2]`."""
    return torch.stack([whole_layer(sum(part[i] for part in sums), heads) for i in sorted(sums[0])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learned", description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--texts", nargs="*", default=[], metavar="KIND=FILE", help="further kinds")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    began, learner = time.monotonic(), Learner(chosen.model or ensure_model())
    files = dict(named.split("=", 1) for named in chosen.texts)
    kinds = texts_of_each_kind(learner, files, TESTED + CURVE[-1])
    tested = {kind: learner.see(texts[:TESTED]) for kind, texts in kinds.items()}
    steps: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for kind, texts in kinds.items():
        for first, last in zip((0, *CURVE), CURVE, strict=False):
            steps[kind].append(learner.see(texts[TESTED + first : TESTED + last]))
            print(f"{kind}: {last} texts, {time.monotonic() - began:.0f} s", flush=True)
    own = {kind: torch.stack([gram for gram, _ in parts]).sum(0) for kind, parts in steps.items()}
    weights = {kind: solve(gram) for kind, gram in own.items()}
    weights["all kinds"] = solve(torch.stack(list(own.values())).sum(0))
    heads = next(iter(own.values())).shape[1]
    every = of_layers([sums for parts in steps.values() for _, sums in parts], heads)
    all_tested = of_layers([sums for _, sums in tested.values()], heads)
    own_tested = torch.stack([gram for gram, _ in tested.values()]).sum(0)
    curve = {}
    for i, count in enumerate(CURVE):
        gram = torch.stack([parts[j][0] for parts in steps.values() for j in range(i + 1)]).sum(0)
        curve[count * len(kinds)] = mean_r2(own_tested, solve(gram))
    found = {
        "model": learner._model.name,
        "r2": {a: {b: mean_r2(tested[b][0], w) for b in kinds} for a, w in weights.items()},
        "kl": {
            a: {b: learner.divergence(w, kinds[b][:TESTED]) for b in kinds}
            for a, w in {"halokv": None, **weights}.items()
        },
        "texts": curve,
        "own head": mean_r2(own_tested, weights["all kinds"]),
        "all heads": mean_r2(all_tested, solve(every)),
        "seconds": round(time.monotonic() - began),
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
