"""`python -m vllm_defensive.learn`: its arguments, one line for each mistake, and the whole command on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engines import quick_start
from vllm_defensive import learned
from vllm_defensive.settings.engine import KEY
from vllm_defensive.tools import learn, learn_run
from vllm_defensive.tools.learn_state import State

ERROR = "python -m vllm_defensive.learn: error: "


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """What the command says of a mistake, which is one line."""
    try:
        code: Any = learn.main([str(part) for part in argv])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith(ERROR))
    assert code == 2 and said.endswith(f"{line}\n") and "Traceback" not in said
    return line.removeprefix(ERROR)


def test_arguments_are_ours_or_the_engines(tmp_path: Path) -> None:
    model = str(tmp_path)
    job, args = learn.parse(
        [model, "--texts", "a", "b", "--tokens", "99", "--length", "70", "--no-check", "--dtype", "float16"]
    )
    assert (job.texts, job.tokens, job.length, job.out, job.check) == (("a", "b"), 99, 70, None, False)
    assert (args.model, args.dtype) == (model, "float16")
    job, args = learn.parse([model])
    assert (job.texts, job.tokens, job.length, job.check) == ((), 64 * 960, None, True)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: MODEL"),
        (["model", "--tokenz", "9"], "unrecognized arguments: --tokenz 9"),
        (["model", "--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["model", "--tokens", "0"], "--tokens 0: choose 1 or more"),
        (["model", "--kv-eviction-keep", "0.2"], "--kv-eviction-keep: this command chooses its own; leave it out"),
        (
            ["model", "--additional-config", json.dumps({KEY: {"policy": "snapkv"}})],
            "--additional-config: kv_eviction: this command chooses its own; leave it out",
        ),
    ],
)
def test_wrong_arguments_are_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert refused(capsys, *argv).startswith(message)


def test_what_cannot_be_done_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Before an engine is started."""
    assert str(tmp_path / "none") in refused(capsys, tmp_path / "none")
    assert refused(capsys, tiny_model, "--texts", tmp_path / "none") == (
        f"--texts {tmp_path / 'none'}: No such file or directory"
    )
    assert refused(capsys, tiny_model, "--length", "2017") == (
        "--length 2017: a text and what of it is repeated at once must fit 4096 tokens; choose 64 to 2016"
    )
    (tmp_path / "file").touch()
    assert refused(capsys, tiny_model, "--out", tmp_path / "file" / "a").endswith(": Not a directory")


def test_the_engine_is_a_plain_one_with_our_settings(tiny_model: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    given = AsyncEngineArgs(
        model=str(tiny_model),
        additional_config={"other": 1, KEY: {"policy": "auto", "learn": True}},
        data_parallel_size=2,
        speculative_config={"method": "ngram", "num_speculative_tokens": 2},
        tensor_parallel_size=2,
        enable_log_requests=True,
    )
    made = learn_run.prepared(given)
    assert type(made) is EngineArgs and not hasattr(made, "enable_log_requests")
    assert (made.data_parallel_size, made.speculative_config, made.tensor_parallel_size) == (1, None, 2)
    assert made.additional_config["other"] == 1 and made.additional_config[KEY]["learning"] is True
    assert (given.data_parallel_size, given.additional_config[KEY]["policy"]) == (2, "auto"), "the caller's own"


@pytest.mark.parametrize(
    "length, given, expected",
    [
        (None, None, (960, 2 * 960 + 64)),
        (100, None, (100, 264)),
        (None, 600, (268, 600)),
        (1984, None, (1984, 4032)),
    ],
)
def test_texts_are_as_long_as_they_can_be_repeated(
    tiny_model: Path, length: int | None, given: int | None, expected: tuple[int, int]
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(tiny_model), max_model_len=given)
    assert learn_run.lengths(length, arguments) == expected


def test_nothing_is_learned_of_a_model_whose_states_a_repetition_would_move(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from tests.tiny_model import write_tiny_lfm2

    arguments = EngineArgs(model=str(write_tiny_lfm2(tmp_path / "model")))
    with pytest.raises(ValueError, match="nothing can be learned of it, for its recurrent layers"):
        learn_run.lengths(None, arguments)


def test_a_learning_goes_on_from_what_it_wrote_last_and_only_its_own(tmp_path: Path) -> None:
    out, texts = tmp_path / "deep" / "a.safetensors", [[1, 2], [3]]
    state = State(out, "this")
    with state.locked():
        assert state.load() is None
        for done in (1, 2):
            Path(f"{state.sums(done)}.rank0.safetensors").touch()
            state.save(texts, done)
        assert state.load() == (texts, 2) == State(out, "this").load()
        assert State(out, "that").load() is None
        assert [file.name for file in state.folder.glob("sums*")] == ["sums-2.rank0.safetensors"]
        Path(f"{state.sums(2)}.rank0.safetensors").unlink()
        assert state.load() is None, "without its sums it is worth nothing"
        state.remove()
        assert not state.folder.exists()
    with state.locked():
        assert state.load() is None


# -- with an engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shared_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command's engine outlives it, and serves it again."""
    made, original = [], learn_run._engine

    @contextmanager
    def engine(arguments: Any) -> Iterator[Any]:
        if not made:
            context = original(arguments)
            with quick_start():
                made.append((context, context.__enter__()))
        yield made[0][1]

    monkeypatch.setattr(learn_run, "_engine", engine)
    yield
    for context, _ in made:
        context.__exit__(None, None, None)


def stopping_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A signal comes while the engine has this batch. Returns what grows by the size of each batch."""
    seen, original = [], learn_run.Learning._show

    def show(self: Any, texts: Any, policy: str) -> None:
        original(self, texts, policy)
        if policy == learn_run.TEACHER:
            seen.append(len(texts))
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(learn_run.Learning, "_show", show)
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("shared_engine")
def test_the_command_is_stopped_goes_on_and_a_server_finds_what_it_wrote(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learned, "path_for", lambda of_model: tmp_path / f"{of_model}.safetensors")
    monkeypatch.setattr(learn_run, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(learn_run, "BATCH", 4)
    argv = [str(tiny_model), "--length", "256", "--tokens", "5120", "--block-size", "32"]
    seen = stopping_at(4, monkeypatch)
    assert learn.main(argv) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("learn: stopped; the same command goes on from what was seen so far\n")
    assert sum(seen) == 2 + 3 * 4 and learned.find(learned.fingerprint(str(tiny_model))) is None

    # The same texts at one go, for another file.
    (state,) = tmp_path.glob("*.part/state.json")
    again = tmp_path / "whole.part" / "state.json"
    again.parent.mkdir()
    again.write_text(json.dumps({**json.loads(state.read_text()), "done": 0}))

    assert learn.main(argv) == 0
    assert sum(seen) == 2 + 3 * 4 + 20 - (2 + 2 * 4), "the batch that was cut off is seen again, and no other"
    (found,) = tmp_path.glob("*.safetensors")
    assert learned.find(learned.fingerprint(str(tiny_model)))[0] == str(found) and not list(
        tmp_path.glob(f"{found.name}.part")
    )
    said = capsys.readouterr().out
    assert str(found) in said and "question comes later, 0.2" in said and "R2 on texts held back" in said
    score = learned.load(found)
    assert score.facts.tokens == 18 * (256 - 4) and score.facts.turned == [True] * 3
    tried = re.search("balance with the window's scores, and KL of all tasks: (.*)", said)
    assert tried is not None
    losses = {float(b): float(loss) for b, loss in (part.split(": ") for part in tried[1].split(", "))}
    assert len(losses) == 4 and float(f"{score.facts.balance:.3g}") == min(losses, key=losses.__getitem__) > 0
    assert len(score.facts.checks) == 3 * 2 * 3 and all(kl > 0 for kl in score.facts.checks.values())

    assert learn.main([*argv, "--no-check", "--out", str(tmp_path / "whole")]) == 0
    whole = learned.load(tmp_path / "whole")
    torch.testing.assert_close(whole.weight_LHX, score.weight_LHX, rtol=1e-3, atol=1e-4)
    assert whole.facts.r2 == pytest.approx(score.facts.r2, abs=1e-3) and whole.facts.checks == {}

    (tmp_path / "short.txt").write_text("too short")
    line = refused(capsys, *argv, "--texts", tmp_path / "short.txt")
    assert line.startswith(f"--texts {tmp_path / 'short.txt'}: no two texts of 256 tokens")


@pytest.mark.slow
def test_an_engine_goes_by_the_score_that_is_found(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    from tests.e2e.engines import engine, scheduler_of

    of_model = learned.fingerprint(str(tiny_model))
    monkeypatch.setattr(learned, "path_for", lambda of_model: tmp_path / f"{of_model}.safetensors")
    facts = learned.Facts(
        version=1, fingerprint=of_model, model="tiny", turned=[True] * 3, texts=[], tokens=1, r2=[0.5] * 3
    )
    weight_LHX = 0.1 * torch.randn(3, 2, 2 * 32 + 1, generator=torch.Generator().manual_seed(0))
    learned.LearnedScore(facts=facts, weight_LHX=weight_LHX).save(learned.path_for(str(of_model)))
    with engine(tiny_model, "learnedkv", max_model_len=1024) as llm:
        prompt = {"prompt_token_ids": [5 + i % 400 for i in range(700)]}
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.requests == 1


@pytest.mark.slow
def test_in_a_process_of_its_own_a_mistake_comes_back_as_the_commands_line(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    with pytest.raises(ValueError, match=r"^[^\n]*Invalid repository ID or local directory[^\n]*$"):
        learn.in_own_process(AsyncEngineArgs(model=str(tmp_path)))
