"""CUDA graphs on paper: what vLLM would capture is remembered, and a replay computes it again.

A replay runs the model with the metadata of the capture, as a graph does: what the host learns later is not seen,
only what it has written into buffers. That is what this can show; not that the operations could be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_capturing: list[Graph] = []
replays = [0]


class Graph:
    """In the place of `torch.cuda.CUDAGraph`."""

    forward: Callable[[], None]

    def replay(self) -> None:
        replays[0] += 1
        self.forward()


class capture:  # in the place of the class `torch.cuda.graph`
    """While it is open, a model's forward pass is remembered as the graph's."""

    def __init__(self, graph: Graph, *args: Any, **kwargs: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        _capturing.append(self._graph)

    def __exit__(self, *exc_info: object) -> None:
        assert hasattr(_capturing.pop(), "forward"), "nothing was captured"


def install() -> None:
    """Make vLLM's graph manager hand us the forward passes that it captures."""
    import torch
    from vllm.v1.worker.gpu import cudagraph_utils

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.cuda.graph_pool_handle = lambda: (0, 0)
    original = cudagraph_utils.CudaGraphManager.capture

    def capture_all(self: Any, create_forward_fn: Any, *args: Any, **kwargs: Any) -> None:
        def create(*create_args: Any, **create_kwargs: Any) -> Callable[[Any], None]:
            forward = create_forward_fn(*create_args, **create_kwargs)

            def remember_or_run(mode: Any) -> None:
                if _capturing:
                    _capturing[-1].forward = lambda: forward(mode)
                else:
                    forward(mode)

            return remember_or_run

        original(self, create, *args, **kwargs)

    cudagraph_utils.CudaGraphManager.capture = capture_all
