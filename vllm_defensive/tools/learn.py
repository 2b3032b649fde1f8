"""`python -m vllm_defensive.learn MODEL`: the command, and its way into servers (`--kv-eviction-learn`)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from vllm_defensive import learned
from vllm_defensive.settings.engine import KEY

_OWN = ("--kv-eviction", "--kv_eviction")


class Stopped(KeyboardInterrupt):
    """A signal came. Not an error, so that nobody on the way takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped; the same command goes on from what was seen so far")
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 2 after one line about a mistake; 128 and the signal's number if one stopped it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported; the progress is what counts
    _stay_in_this_process()
    job, engine_args = parse(sys.argv[1:] if argv is None else argv)
    from vllm_defensive.tools.learn_run import learn

    try:
        with _signals():
            print(f"learned: {learn(job, engine_args)}")
    except (ValueError, OSError) as error:
        print(f"{learned.COMMAND}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\n{learned.COMMAND}: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    return 0


def parse(argv: Sequence[str]) -> tuple[Any, Any]:
    """(`Job`, vLLM's `EngineArgs`) of a command line. A mistake ends the process, with one line and exit code 2."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_defensive.tools.learn_engine import LENGTH
    from vllm_defensive.tools.learn_run import TOKENS, Job

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            sys.stderr.write(f"{self.prog}: error: {message}\n")  # without the usage of all of vLLM's arguments
            raise SystemExit(2)

    parser = Parser(prog=learned.COMMAND, description="Make a learned score of a model, and try it.")
    group = parser.add_argument_group("Learning", "What is learned from; all other arguments are the engine's.")
    group.add_argument("model_tag", metavar="MODEL", help="a model's folder, or a name on the hub")
    group.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="plain texts, or .jsonl with a field text or context; .gz, .xz and .bz2 are unpacked (default: Python's "
        "documentation and library, and what the model itself writes)",
    )
    group.add_argument("--tokens", type=int, default=TOKENS, help="how many to learn from, those held back included")
    group.add_argument("--length", type=int, help=f"tokens of a text (default: {LENGTH}, or fewer)")
    group.add_argument("--out", type=Path, metavar="FILE", help="the file (default: where a server looks for it)")
    group.add_argument("--no-check", action="store_true", help="do not try it on the texts that were held back")
    EngineArgs.add_cli_args(parser)
    for given in argv:
        if given.startswith(_OWN):
            parser.error(f"{given}: this command chooses its own; leave it out")
    args = parser.parse_args(list(argv))
    args.model = args.model_tag
    if KEY in (args.additional_config or {}):
        parser.error(f"--additional-config: {KEY}: this command chooses its own; leave it out")
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: choose 1 or more")
    try:
        job = Job(tuple(args.texts), args.tokens, args.length, args.out, check=not args.no_check)
        return job, EngineArgs.from_cli_args(args)
    except (ValueError, OSError) as error:
        parser.error(f"{args.model}: {_one_line(error)}")


def in_own_process(engine_args: Any) -> None:
    """Make the score of the model that these arguments name, for an engine that is yet to start, in a process of its
    own: its memory is free again when it ends. Nothing is done if another process makes it meanwhile.

    engine_args: vLLM's, or a server's. Raises ValueError with the command's line.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_own_process, args=(engine_args, theirs), name="kv-eviction-learn")
    process.start()
    theirs.close()
    try:
        process.join()
        said = ours.recv() if ours.poll() else ""
    except EOFError:
        said = ""
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        raise ValueError(said or f"no learned score was made, see above; try {learned.COMMAND} {engine_args.model}")


def _in_own_process(engine_args: Any, pipe: Any) -> None:
    _stay_in_this_process()
    from vllm_defensive.tools.learn_run import Job, learn

    try:
        with _signals():
            learn(Job(unless_there=True), engine_args)
    except (ValueError, OSError) as error:
        pipe.send(_one_line(error))
        sys.exit(2)
    except Stopped as stopped:
        pipe.send(str(stopped))
        sys.exit(128 + stopped.number)


def _stay_in_this_process() -> None:
    """An engine core of its own would get the signals too, and while it starts nobody would hear that it ended."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@contextmanager
def _signals() -> Iterator[None]:
    """Signals that ask for an end raise Stopped; the second one ends the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_line(error: Exception) -> str:
    """What went wrong, for people."""
    if isinstance(error, ValidationError):  # whose own text is a heading, and what vLLM said below it
        text = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
