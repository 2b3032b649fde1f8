"""Load that tries to break a server: `python -m benchmarks.soak`. One file, for it is one tool from load to verdict.

Requests of mixed length, policy, ratio, boundary and protected prefix arrive at random over HTTP, in a pool too small
for them, so that some are preempted. A third of the clients hang up at a random moment; wrong requests are mixed in.
Then a fresh server answers the same requests one at a time. The run passes if

  - every wrong request got HTTP 400 that names its field, and every other client that stayed got its answer;
  - every token that was received is the one of the calm run (unless it is a tie there, as far as float32 can tell);
  - requests were preempted, and at the end no block of the pool is held;
  - the logs have no error, other than vLLM's line about each refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import Server, commit
from benchmarks.tiny_model import write_tiny_llama
from vllm_defensive.policy import PRESETS, public_names

MAX_MODEL_LEN = 1024
BLOCK_SIZE = 32
POOL_BLOCKS = 73  # the longest request and what is kept of it, as much again, and vLLM's null block
LONGEST_ANSWER = 300
FIRST_TOKEN, VOCABULARY = 2, 512  # ordinary tokens of the tiny model
NAME = "tiny"
JSON = {"Content-Type": "application/json"}
# What two tokens' log-probabilities may differ by and still be in either order, as batches and chunks are added up in
# other orders: a few times the largest error that float32 makes on this model (tests/e2e/test_memory.py).
TIE = 1e-3
FLAGS = (
    "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN),
    "--block-size", str(BLOCK_SIZE), "--max-num-batched-tokens", "512", "--num-gpu-blocks-override", str(POOL_BLOCKS),
    # Whether a prefix is shared depends on who else is there, and so would the answers.
    "--kv-eviction", "layer-defensivekv", "--kv-eviction-keep", "0.3", "--kv-eviction-min-tokens", "64",
    "--kv-eviction-shared", "evict",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # one core a server: the model is tiny


@dataclass
class Case:
    """A request, what its client does, and what came of it.

    arrival: seconds from the start. patience: seconds after which the client hangs up, or None. enough: tokens after
    which it hangs up (of a stream), or None. refused: the field that a 400 must name, or None for a right request.
    """

    number: int
    arrival: float
    prompt: list[int]
    max_tokens: int
    fields: dict[str, Any]
    stream: bool
    patience: float | None = None
    enough: int | None = None
    refused: str | None = None
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: str | None = None

    def body(self, **more: Any) -> str:
        """JSON of a completion request. NaN goes out as it is: servers must bear it."""
        return json.dumps(
            {
                "model": NAME, "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True, "vllm_xargs": self.fields or None, **more,
            }
        )  # fmt: skip


def make_cases(count: int, rate: float, seed: int) -> list[Case]:
    """`count` requests, arriving as a Poisson process of `rate` a second; about one in ten of them is wrong."""
    rng = random.Random(seed)
    documents = [[rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(rng.randrange(200, 700))] for _ in range(8)]
    cases, now = [], 0.0
    for number in range(count):
        now += rng.expovariate(rate)
        shared = rng.choice(documents) if rng.random() < 0.5 else []
        own = rng.choice((rng.randrange(1, 40), rng.randrange(40, 300), rng.randrange(300, 900)))
        prompt = shared + [rng.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(own)]
        prompt = prompt[: MAX_MODEL_LEN - LONGEST_ANSWER]
        max_tokens = rng.randrange(1, LONGEST_ANSWER if rng.random() < 0.2 else 60)
        case = Case(number, now, prompt, max_tokens, right_fields(rng, len(prompt)), rng.random() < 0.5)
        fate = rng.random()
        if fate < 0.1:
            case.refused, wrong = wrong_fields(rng, len(prompt))
            case.fields |= wrong
        elif fate < 0.1 + 1 / 3:
            if case.stream and rng.random() < 0.5:
                case.enough = rng.randrange(0, case.max_tokens)
            else:
                case.patience = rng.expovariate(1 / 3)
        cases.append(case)
    return cases


def right_fields(rng: random.Random, num_tokens: int) -> dict[str, Any]:
    """Random `vllm_xargs` that a server takes; none for the server's own settings."""
    fields: dict[str, Any] = {}
    if rng.random() < 0.8:
        fields["kv_eviction"] = rng.choice(["none", *(n for n in public_names() if not PRESETS[n].learned)])
    if rng.random() < 0.7:
        fields["kv_eviction_keep"] = rng.choice([rng.uniform(0.01, 1), 0.2, 1])
    if rng.random() < 0.3:
        fields["kv_eviction_boundary"] = rng.randint(1, num_tokens)
    if rng.random() < 0.3:
        fields["kv_eviction_protect"] = rng.randint(0, num_tokens)
    return fields


def wrong_fields(rng: random.Random, num_tokens: int) -> tuple[str, dict[str, Any]]:
    """(field, what to send in it) that must be refused."""
    name, value = rng.choice(
        [
            ("kv_eviction", rng.choice(["snapkb", "", 3, "keep-all"])),
            ("kv_eviction_keep", rng.choice([0, -0.5, 1.5, float("nan"), float("inf"), "half", [0.2]])),
            ("kv_eviction_boundary", rng.choice([0, -1, num_tokens + 1, 2**62, 0.5, "end"])),
            ("kv_eviction_protect", rng.choice([-1, num_tokens + 1, 1.5, "all"])),
            ("kv_eviction_ratio", 0.2),
        ]
    )
    return name, {name: value}


# -- the storm --------------------------------------------------------------------------------------------------------


async def send_all(url: str, cases: Sequence[Case]) -> None:
    """Send each request at its time, and wait until the last client has its answer or has hung up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a client that leaves closes its own
    async with httpx.AsyncClient(base_url=url, headers=JSON, limits=limits, timeout=300) as client:
        start = time.monotonic()

        async def run(case: Case) -> None:
            await asyncio.sleep(case.arrival - (time.monotonic() - start))
            try:
                await asyncio.wait_for(_ask(client, case), case.patience)
            except TimeoutError:
                pass  # this client has hung up
            except (httpx.HTTPError, ValueError, KeyError) as error:
                case.error = repr(error)

        await asyncio.gather(*(run(case) for case in cases))


async def _ask(client: httpx.AsyncClient, case: Case) -> None:
    headers = {"X-Request-Id": f"{'wrong' if case.refused else 'right'}-{case.number}"}
    if not case.stream:
        reply = await client.post("/v1/completions", content=case.body(), headers=headers)
        if case.refused:
            _check_refusal(case, reply)
            return
        reply.raise_for_status()
        case.tokens, case.finished = reply.json()["choices"][0]["token_ids"], True
        return
    async with client.stream("POST", "/v1/completions", content=case.body(stream=True), headers=headers) as reply:
        if case.refused:
            await reply.aread()
            _check_refusal(case, reply)
            return
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if case.enough is not None and len(case.tokens) >= case.enough:
                return
            if line == "data: [DONE]":
                case.finished = True
            elif line.startswith("data: "):
                case.tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"] or []


def _check_refusal(case: Case, reply: httpx.Response) -> None:
    """Of a stream, too, the status must be 400: not 200, and an error for its first event."""
    if reply.status_code != 400 or (case.refused or "") not in reply.json()["error"]["message"]:
        case.error = f"wrong {case.refused}: {reply.status_code} {reply.text[:300]}"


def wait_until_idle(server: Server, seconds: float = 60) -> float:
    """Share of the pool that is held once nobody runs or waits. One more request makes the figures fresh."""
    body = Case(0, 0, [FIRST_TOKEN] * 8, 1, {}, False).body()
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TimeoutException):  # a pool that is not given back has no room for it
            httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON, timeout=60).raise_for_status()
        busy = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
        usage = server.metric("vllm:kv_cache_usage_perc")
        if (not busy and not usage) or time.monotonic() > deadline:
            return usage
        time.sleep(1)


def errors_in(log: Path) -> list[str]:
    """Lines of a server's log that should not be there. vLLM writes one, as an error, for each request it refuses."""
    lines = log.read_text(errors="replace").splitlines()
    suspicious = [x for x in lines if re.search(r"\b(ERROR|CRITICAL|Traceback|AssertionError)\b", x)]
    return [line for line in suspicious if not re.search(r"Exception caught\. Request id: cmpl-wrong-\d+$", line)]


# -- the calm ---------------------------------------------------------------------------------------------------------


def compare(url: str, cases: Sequence[Case]) -> tuple[int, list[str]]:
    """Ask again one at a time. Returns the number of ties, and a line for each answer that was wrong."""
    ties, wrong = 0, []
    with httpx.Client(base_url=url, headers=JSON, timeout=300) as client:
        for case in cases:
            reply = client.post("/v1/completions", content=case.body(logprobs=5, return_tokens_as_token_ids=True))
            choice = reply.raise_for_status().json()["choices"][0]
            expected = choice["token_ids"]
            if case.tokens == expected[: len(case.tokens)] and (not case.finished or len(case.tokens) == len(expected)):
                continue
            first = next((i for i, (a, b) in enumerate(zip(case.tokens, expected, strict=False)) if a != b), None)
            gap = float("inf")
            if first is not None:
                likely = choice["logprobs"]["top_logprobs"][first]
                found = likely.get(f"token_id:{case.tokens[first]}", float("-inf"))
                gap = likely[f"token_id:{expected[first]}"] - found
            if gap <= TIE:
                ties += 1
            else:
                wrong.append(
                    f"request {case.number}: token {first} of {len(case.tokens)} differs by {gap:.4f}: {case.fields}"
                )
    return ties, wrong


# -- the report -------------------------------------------------------------------------------------------------------


def soak(count: int, rate: float, sample: int | None, seed: int, folder: Path) -> dict[str, Any]:
    """Run it all. sample: how many answers to compare, None for all. folder: takes the model and the logs."""
    tested = commit()  # now: by the end of the run another may be checked out
    model = write_tiny_llama(folder / "model")
    cases = make_cases(count, rate, seed)
    logs = [folder / "storm.log", folder / "calm.log"]
    with Server(model, FLAGS, logs[0]) as server:
        asyncio.run(send_all(server.url, cases))
        usage = wait_until_idle(server)
        preemptions = server.metric("vllm:num_preemptions_total")
        evicted = server.metric("vllm:kv_eviction_requests_total")
        errors = errors_in(logs[0])
    received = [case for case in cases if case.tokens]
    if sample is not None and sample < len(received):
        received = random.Random(seed).sample(received, sample)
    with Server(model, FLAGS, logs[1]) as server:
        ties, wrong = compare(server.url, received)
        errors += errors_in(logs[1])
    failed = [f"request {case.number}: {case.error}" for case in cases if case.error]
    stayed = [case for case in cases if not case.refused and case.patience is None and case.enough is None]
    failed += [f"request {case.number}: no answer" for case in stayed if not case.finished and not case.error]
    left = [case for case in cases if not case.refused and not case.finished and not case.error]
    return {
        "commit": tested,
        "requests": count,
        "rate": rate,
        "seed": seed,
        "finished": sum(case.finished for case in cases),
        "hung_up_before_a_token": sum(not case.tokens for case in left),
        "hung_up_amid_the_answer": sum(bool(case.tokens) for case in left),
        "refused_with_400": sum(case.refused is not None and not case.error for case in cases),
        "of_them_streams": sum(case.refused is not None and case.stream and not case.error for case in cases),
        "preemptions": int(preemptions),
        "evicted_prompts": int(evicted),
        "answers_compared": len(received),
        "tokens_compared": sum(len(case.tokens) for case in received),
        "ties": ties,
        "wrong_answers": wrong,
        "failed_requests": failed,
        "pool_usage_at_the_end": usage,
        "errors_in_the_log": errors,
        "passed": bool(preemptions and evicted and not (wrong or failed or usage or errors)),
    }


def markdown(summary: dict[str, Any], command: str) -> str:
    """The summary as a page."""
    rows = [(name.replace("_", " "), len(v) if isinstance(v, list) else v) for name, v in summary.items()]
    lines = ["# Soak", "", "```", command, "```", "", "| what | figure |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=25, help="mean arrivals a second")
    parser.add_argument("--compare", type=int, help="answers to compare with the calm run (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write summary.json and summary.md into this folder")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as scratch:
        summary = soak(arguments.requests, arguments.rate, arguments.compare, arguments.seed, Path(scratch))
    command = f"python -m benchmarks.soak {' '.join(sys.argv[1:])}".rstrip()
    text = markdown(summary, command)
    print(text, *summary["wrong_answers"], *summary["failed_requests"], *summary["errors_in_the_log"][:40], sep="\n")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "summary.json").write_text(json.dumps({"command": command, **summary}, indent=1) + "\n")
        (arguments.out / "summary.md").write_text(text)
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
