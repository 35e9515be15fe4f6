"""Decode steps on a GPU as CUDA graphs: one launch in place of the hundreds of a model's own forward, each of which
takes the CPU longer than a small model's arithmetic takes the GPU.

A graph is captured from whatever feeds the tokens, for one number of rows and one length of the cache. It lives no
longer than the rollouts it was captured in, so nothing that happens to the model between them makes it stale.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from rl_backspace.fused import is_changed

FEWER = 4  # a step of so many times fewer rows than a graph is for is worth a graph of its own


class Network(Protocol):
    """What feeds tokens: `backbone.Backbone`, `fused.Fused`, or one of them captured."""

    def prefill(self, ids: Tensor, first: int = 0) -> tuple[Tensor, DynamicCache]: ...

    def decode(self, ids: Tensor, pointers: Tensor, cache: Any) -> Tensor: ...


class Captured:
    """Feeds tokens as `network` does; from its third step of a shape on, by replaying a graph.

    A step with fewer rows than its graph feeds token 0 at the first position of some that are free; a prompt that moves
    in there overwrites it.

    Args:
        network: what is captured, as it is now.
        causal: its model.
        rows: most rows of a step.
    """

    def __init__(self, network: Network, causal: Any, rows: int):
        self.network, self.causal, self.rows = network, causal, rows
        self.ids, self.pointers = torch.zeros(2, rows, dtype=torch.long, device=causal.device)
        self.length = 0  # of the cache that the graphs are for
        self.graphs: dict[int, tuple[Any, Tensor] | None] = {}  # by rows; None: fed once, which set up what that needs

    def prefill(self, ids: Tensor, first: int = 0) -> tuple[Tensor, DynamicCache]:
        return self.network.prefill(ids, first)

    def decode(self, ids: Tensor, pointers: Tensor, cache: Any) -> Tensor:
        """As `network`'s; the result is overwritten by the next step."""
        if self.causal in uncaptured:
            return self.network.decode(ids, pointers, cache)
        if cache.length != self.length:
            self.length, self.graphs = cache.length, {}
        count, rows = len(ids), self.rows
        while count <= rows // FEWER:
            rows //= FEWER
        self.ids[:count], self.pointers[:count] = ids, pointers
        self.ids[count:rows], self.pointers[count:rows] = 0, 0
        if rows not in self.graphs:
            self.graphs[rows] = None
            with _lock:
                return self._apart(rows, cache)[:count]
        if self.graphs[rows] is None:
            try:
                self.graphs[rows] = self._capture(rows, cache)
            except RuntimeError:  # something in its forward waits for the GPU, or is not to be captured
                uncaptured.add(self.causal)
                return self.network.decode(ids, pointers, cache)
        graph, hidden = self.graphs[rows]  # type: ignore[misc]
        graph.replay()
        return hidden[:count]

    def _apart(self, rows: int, cache: Any, graph: Any = None) -> Tensor:
        """A step on a stream of its own, where libraries set up what they cannot while it is captured; with `graph` it
        is captured and not taken."""
        stream = torch.cuda.current_stream(self.ids.device)
        side, keeper = _beside(stream)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            if graph is None:
                hidden = self.network.decode(self.ids[:rows], self.pointers[:rows], cache)
            else:
                graph.capture_begin(keeper.pool(), capture_error_mode="thread_local")
                try:
                    hidden = self.network.decode(self.ids[:rows], self.pointers[:rows], cache)
                finally:
                    graph.capture_end()
        stream.wait_stream(side)
        return hidden

    def _capture(self, rows: int, cache: Any) -> tuple[Any, Tensor]:
        graph, caching = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        with _lock:
            torch.set_autocast_cache_enabled(False)  # it would hold copies of weights that are gone at the next replay
            try:
                return graph, self._apart(rows, cache, graph)
            finally:
                torch.set_autocast_cache_enabled(caching)


uncaptured: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose steps cannot be
_lock = threading.Lock()  # of the streams that are captured


@functools.cache
def _beside(stream: Any) -> tuple[Any, Any]:
    """For steps of this stream another stream to capture them on, and a graph that does nothing but keep their memory:
    without one, each run's would only be given back when the GPU's is full."""
    side, keeper = torch.cuda.Stream(stream.device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        keeper.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=stream.device)
        keeper.capture_end()
    return side, keeper


def can_capture(causal: Any) -> bool:
    """Whether a model's steps may be captured: it is on one GPU, and nobody hooks into it, since a replay calls no
    hooks."""
    if causal.device.type != "cuda" or causal in uncaptured or is_changed(causal.base_model):
        return False
    return all(parameter.device == causal.device for parameter in causal.parameters())
