"""A CUDA graph: what a function launches, recorded once and started as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

Results = tuple[torch.Tensor, ...]


class Graph:
    """Of a function of one tensor, into which every replay puts other values.

    It runs once before, which compiles kernels. What it reads beside its argument has to stay where it is.
    """

    def __init__(self, run: Callable[[torch.Tensor], Results], inputs: torch.Tensor):
        self._inputs, self._graph = inputs, torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(inputs.device)
        aside.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(aside):
            run(inputs)
        torch.cuda.current_stream(inputs.device).wait_stream(aside)
        with torch.cuda.graph(self._graph):
            self._results = run(inputs)

    def replay(self, inputs: torch.Tensor) -> Results:
        """Results for other inputs; the next replay overwrites them."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._results
