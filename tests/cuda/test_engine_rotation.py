"""Every kind of RoPE once more, of each release of vLLM that this process may be given. No engine is needed for it."""

from tests.worker.test_rotation import (
    test_the_watch_tells_layers_that_turn_from_those_that_own_a_module,
    test_what_a_module_turned_comes_back,
    test_what_cannot_be_undone_is_refused_by_name,
    vllm_config,
)

__all__ = [
    "test_the_watch_tells_layers_that_turn_from_those_that_own_a_module",
    "test_what_a_module_turned_comes_back",
    "test_what_cannot_be_undone_is_refused_by_name",
    "vllm_config",
]
