"""The entry point that vLLM calls in every process (`vllm.general_plugins`).

It imports nothing heavy and only installs the two patches that are inert while the flag is absent. Of vLLM it looks at
the version alone; whether all is there that we lean on is asked where eviction is switched on (`compat/contract.py`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

_commands: list[str] = []  # names of the parsers that got our flags in this process


def register() -> None:
    """Make vLLM know our flags and settings. Never raises: a mistake of ours must not break a stock vLLM command."""
    try:
        from vllm_defensive.compat import contract, serving

        if not contract.is_supported(contract.installed()):
            _register_refusal()
            return
        serving.patch_cli(_add_flags)
        serving.patch_engine_config(_before_engine_config, _after_engine_config)
    except Exception:
        _logger().exception("vllm_defensive could not be loaded; KV eviction is not available")


def _register_refusal() -> None:
    """On a vLLM that we do not know: our flags and settings say so, and vLLM otherwise runs as if we were not there."""
    from vllm_defensive.compat import contract, serving

    try:
        serving.patch_cli(_add_refused_flags)
        serving.patch_engine_config(_refuse, lambda vllm_config, settings: None)
    except Exception as error:
        _logger().warning("%s (%r)", contract.refusal(), error)


def _logger() -> logging.Logger:
    return logging.getLogger("vllm")


def _add_flags(parser: Any) -> None:
    from vllm_defensive.serving.cli import add_flags

    add_flags(parser)
    _commands.append(parser.prog)


def _add_refused_flags(parser: Any) -> None:
    try:
        from vllm_defensive.serving.cli import add_flags

        add_flags(parser, supported=False)
        _commands.append(parser.prog)
    except Exception as error:  # the parser may be another, too
        _logger().warning("vllm_defensive could not add its flags (%r); KV eviction is not available", error)


def _refuse(engine_args: Any) -> None:
    from vllm_defensive.serving.cli import refuse

    with _one_line_for_commands():
        refuse(engine_args)


def _before_engine_config(engine_args: Any) -> Any:
    from vllm_defensive import startup

    with _one_line_for_commands():
        return startup.prepare(engine_args)


def _after_engine_config(vllm_config: Any, settings: Any) -> None:
    from vllm_defensive import limits, startup

    with _one_line_for_commands():
        settings = startup.settle(vllm_config, settings)
        limits.check(vllm_config, settings)
    startup.add_echo_slot(vllm_config, settings)


@contextlib.contextmanager
def _one_line_for_commands() -> Iterator[None]:
    """In a process that parsed vLLM's command line, end with one line and exit code 2; elsewhere let ValueError
    through."""
    try:
        yield
    except ValueError as error:
        if not _commands:
            raise
        sys.stderr.write(f"{_commands[0]}: error: {error}\n")
        raise SystemExit(2) from None
