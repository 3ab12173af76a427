"""Decoding steps captured as CUDA graphs: one call launches the thousand kernels of a step.

Captured is engine.Decoder.advance, once for each pair of sizes (slots, positions read) that occurs. A graph
is a list of kernels with the addresses they were captured with, so

- what a step reads and writes stays where it is: the decoder's state and given ids and the models' caches are
  allocated once. What it makes lies in a pool of memory of the graphs alone. They share it, for they run one
  after the other, and what is wanted of one is copied before the next is launched;
- nothing in a step may wait for the device, read a value of it or copy from the host's memory: that would
  break a capture half-way, so a step first runs with torch told to raise an error where it would;
- that step runs on the stream of the capture, since cuBLAS takes a workspace at its first use on a stream,
  which would else lie in the pool and be written over.

Each graph is compared with the uncaptured step on the device at hand before it is used.
"""

import warnings

import torch

from ads.stage import errors
from ads.trials import agrees, is_out_of_memory

LEAST_SHARE = 0.9  # of tokens that a captured and an uncaptured step choose alike: sums may round otherwise


def obstacle(models):
    """Why no step of engine.Models can be captured; None where it can be tried."""
    if models.allowed_V.device.type != "cuda":
        return "there is no GPU"
    if models.corruption:
        return "the host corrupts results at each step"
    proxies = models.proxy.models if models.proxy else ()
    kinds = [m.model.config.model_type for m in (models.teacher, *proxies) if m.own_step is None]
    return f"model type {kinds[0]!r} is decoded by the library's own forward" if kinds else None


class Graphs:
    """The captured steps of a decoder, which they do not keep: it is freed at once, and the pool with it."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.captured = {}  # (slots, positions) -> (graph, where its record will be)

    def step(self, decoder, *sizes):
        """The record of decoder.advance(*sizes), captured or to be captured."""
        if sizes not in self.captured:
            return self.first_step(decoder, sizes)
        graph, record_6N = self.captured[sizes]
        graph.replay()
        return record_6N

    def first_step(self, decoder, sizes):
        """Capture, then run uncaptured; where the two differ, no step of the decoder is captured any more."""
        before, reason = decoder.state_6B.clone(), None
        try:
            graph, found, moved_6B = self.capture(decoder, sizes, before)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = errors.reason(error)
        decoder.state_6B.copy_(before)
        wanted = decoder.advance(*sizes)  # last, so that the caches are as if nothing had been captured
        if reason is None and not (
            are_alike(found, wanted) and torch.equal(moved_6B[1:], decoder.state_6B[1:])
        ):
            reason = "what was captured computes something else"
        if reason is None:
            self.captured[sizes] = graph, found[0]
        else:
            decoder.graphs = None
            print(f"cuda_graph: {reason}: steps run uncaptured", flush=True)
        return wanted[0]

    def capture(self, decoder, sizes, before):
        """(graph, its results, state that it leaves) of a step from the state `before`."""
        usual, current = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this does not find all of them
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.stream):
                decoder.advance(*sizes)
        finally:
            torch.cuda.set_sync_debug_mode(usual)
            current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do, such as NCCL's, who ask how far their events are, is no error
        given = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        # a capture that cannot be ended would leave its stream the current one, for whatever comes after
        with torch.cuda.stream(current), torch.cuda.graph(graph, **given):
            found = decoder.advance(*sizes)
        decoder.state_6B.copy_(before)
        graph.replay()
        return graph, found, decoder.state_6B.clone()


def are_alike(found, wanted):
    """Whether (record, logits, Delta) of two steps are the same but for rounding."""
    share = (found[0][0] == wanted[0][0]).double().mean()
    pairs = [(a, b) for a, b in zip(found[1:], wanted[1:], strict=True) if b is not None]
    return bool(share >= LEAST_SHARE) and all(agrees(a, b) for a, b in pairs)
