"""The contract on the CUDA platform: as vLLM is imported there, and what our classes for it take over."""

from __future__ import annotations

import importlib

from tests.compat.overrides import NOT_OURS, narrower, overridden, promises, unlisted
from vllm_defensive.compat import contract
from vllm_defensive.compat.names import BY_SIDE


def our_classes() -> list[type]:
    from vllm_defensive.engine import kv_manager, scheduler, spec
    from vllm_defensive.serving import prometheus
    from vllm_defensive.worker.cuda import flash, triton, worker

    modules = [kv_manager, scheduler, spec, prometheus, flash, triton, worker]
    made = {c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__}
    return sorted((c for c in made if any(b.__module__.startswith("vllm.") for b in c.__mro__)), key=str)


def test_vllm_keeps_it() -> None:
    assert contract.worker_sides() == ("worker", "cuda")
    for side in contract.all_sides():
        for module in BY_SIDE[side]:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                # A package that this release needs beside those of the environment; its module is read instead.
                assert error.name and error.name.partition(".")[0] != "vllm"
    assert contract.check(contract.all_sides()) == []


def test_every_method_that_overrides_vllms_is_in_the_table_and_takes_what_that_takes() -> None:
    assert sum(1 for cls in our_classes() for _ in overridden(cls)) > 30
    assert set().union(*map(unlisted, our_classes())) == set()
    assert set().union(*map(narrower, our_classes())) == set()


def test_our_backends_promise_nothing_that_was_not_looked_at() -> None:
    from vllm_defensive.worker.cuda.flash import EvictionFlashBackend, EvictionFlashImpl
    from vllm_defensive.worker.cuda.triton import EvictionTritonBackend, EvictionTritonImpl

    for ours, impl in ((EvictionFlashBackend, EvictionFlashImpl), (EvictionTritonBackend, EvictionTritonImpl)):
        stock = ours.__mro__[1]
        assert any(promises(stock).values()) and set(promises(stock)) <= NOT_OURS
        assert not any(promises(ours).values()) and not any(promises(impl).values())
