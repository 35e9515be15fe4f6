"""Decode steps on a GPU as CUDA graphs: one launch in place of the hundreds of a model's own forward, each of which
takes the CPU longer than a small model's arithmetic takes the GPU.

A graph is captured from whatever feeds the tokens, for one number of rows and one length of the cache. It lives no
longer than the rollouts it was captured in, so nothing that happens to the model between them makes it stale.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rl_backspace.fused import TOKENS, is_changed, name_of

# their steps never wait for the GPU, which cannot be captured; tests say so
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX", "GPT2", "Phi", "Gemma2", "Gemma3Text")
SOURCES = ("torch", "transformers", "peft")  # of their parts; quantised layers come from elsewhere
FEWER = 4  # a step of so many times fewer rows than a graph is for is worth a graph of its own


class Network(Protocol):
    """What feeds tokens: `backbone.Backbone`, `fused.Fused`, or one of them captured."""

    def prefill(self, ids: Tensor, first: int = 0) -> tuple[Tensor, DynamicCache]: ...

    def decode(self, ids: Tensor, pointers: Tensor, cache: Any) -> Tensor: ...


class Captured:
    """Feeds tokens as `network` does; from the second step of a shape on, by replaying a graph.

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
        self.cache: Any = None  # that the graphs are for
        self.length = 0  # and its
        self.graphs: dict[int, tuple[Any, Tensor] | None] = {}  # by rows; None: fed once, which set up what that needs
        self.fits = True  # into the GPU's memory

    def prefill(self, ids: Tensor, first: int = 0) -> tuple[Tensor, DynamicCache]:
        return self.network.prefill(ids, first)

    def decode(self, ids: Tensor, pointers: Tensor, cache: Any) -> Tensor:
        """As `network`'s; the result is overwritten by the next step."""
        if self.causal in uncaptured or not self.fits:
            return self.network.decode(ids, pointers, cache)
        _only(self)
        if cache is not self.cache or cache.length != self.length:
            self.cache, self.length, self.graphs = cache, cache.length, {}
        count, rows = len(ids), self.rows
        while count <= rows // FEWER:
            rows //= FEWER
        self.ids[:count], self.pointers[:count] = ids, pointers
        self.ids[count:rows], self.pointers[count:rows] = 0, 0
        hidden = self._step(rows, cache)
        return self.network.decode(ids, pointers, cache) if hidden is None else hidden[:count]

    def _step(self, rows: int, cache: Any) -> Tensor | None:
        """Hidden states (rows, H); None where that cannot be done, and nothing was."""
        try:
            if rows not in self.graphs:
                self.graphs[rows] = None
                return self._feed(rows, cache)
            graph, hidden = self.graphs[rows] or self._capture(rows, cache)
        except torch.OutOfMemoryError:
            self.fits, self.graphs = False, {}
            return None
        except RuntimeError:  # of the libraries below, since a step that ends well waits for nothing
            uncaptured.add(self.causal)
            return None
        self.graphs[rows] = graph, hidden
        graph.replay()
        return hidden

    def _feed(self, rows: int, cache: Any) -> Tensor:
        """A step on the stream that graphs are captured on, where libraries set up what they cannot in a capture."""
        with _aside(self.ids.device):
            return self.network.decode(self.ids[:rows], self.pointers[:rows], cache)

    def _capture(self, rows: int, cache: Any) -> tuple[Any, Tensor]:
        """The graph of a step, which is not taken yet, and where its result will be."""
        graph, caching = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would hold copies of weights that are gone at the next replay
        try:
            with _aside(self.ids.device) as keeper, _capturing(graph, keeper):
                return graph, self.network.decode(self.ids[:rows], self.pointers[:rows], cache)
        finally:
            torch.set_autocast_cache_enabled(caching)


uncaptured: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose steps turned out not to be what they are
_last: list[weakref.ref[Captured]] = []  # the one that has graphs


def _only(mine: Captured) -> None:
    """Of rollouts that take turns only one keeps its graphs: what goes with another's takes memory from them."""
    for other in _last:
        if (had := other()) is not None and had is not mine:
            had.graphs = {}
    _last[:] = [weakref.ref(mine)]


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[Any]:
    """Inside, work goes to another stream, after what was there before and ahead of what comes; its `_keeper`."""
    stream = torch.cuda.current_stream(device)
    side, keeper = _keeper(stream)
    side.wait_stream(stream)
    try:
        with torch.cuda.stream(side):
            yield keeper
    finally:
        stream.wait_stream(side)


@contextlib.contextmanager
def _capturing(graph: Any, keeper: Any = None) -> Iterator[None]:
    """Inside, work is put into a graph, whose memory is from where the keeper's is."""
    graph.capture_begin(*([keeper.pool()] if keeper else []), capture_error_mode="thread_local")
    try:
        yield
    finally:
        try:
            graph.capture_end()
        except RuntimeError:  # torch 2.11 leaves allocator and random generator as in a capture
            if keeper:
                for mend in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                    with contextlib.suppress(RuntimeError):  # 2.13 has done the first
                        mend(torch.cuda.current_device(), keeper.pool())
                _keeper.cache_clear()
                _keeper(torch.cuda.default_stream())  # a capture that ends well puts the generator back
            raise


@functools.cache
def _keeper(stream: Any) -> tuple[Any, Any]:
    """For the steps of a stream: another stream to capture them on, and a graph that does nothing but keep their
    memory. Without one, each run's would only be given back when the GPU's is full."""
    side, graph = torch.cuda.Stream(stream.device), torch.cuda.CUDAGraph()
    with torch.inference_mode(False), torch.cuda.stream(side), _capturing(graph):
        torch.zeros(1, device=stream.device)
    return side, graph


def rotary(config: Any) -> list[dict[str, Any]]:
    """What a text config says of its rotary embeddings; some families have several, by layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def can_capture(causal: Any, settled: Collection[Any]) -> bool:
    """Whether a model's steps may be captured here: on one GPU, nothing in it but what is known, nobody who hooks into
    it, since a replay calls no hooks, and in the main thread, since threads would share streams.

    Args:
        settled: layers that are not called (`fused.Settled`).
    """
    if causal.device.type != "cuda" or causal in uncaptured or not never_waits(causal, settled):
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    return all(parameter.device == causal.device for parameter in causal.parameters())


def never_waits(causal: Any, settled: Collection[Any] = ()) -> bool:
    """Whether a model is of `FAMILIES`, as it stands in transformers, and each part of it is too; and no adapter puts
    rows into a weight at each step, whose numbers come from the CPU."""
    body = causal.base_model
    known = type(body).__name__ in [f"{family}Model" for family in FAMILIES]
    known = known and all(part.get("rope_type") != "dynamic" for part in rotary(causal.config.get_text_config()))
    parts = all(type(part).__module__.partition(".")[0] in SOURCES for part in causal.modules())
    tokens = [part for part in causal.modules() if name_of(part) == TOKENS and part not in settled]
    known = known and all(part.disable_adapters != part.merged for part in tokens)  # then it puts nothing in
    return known and parts and not is_changed(body) and all(type(p) is nn.Parameter for p in causal.parameters())
