"""Which layer of a model runs while its trainer takes a step, and meters of what a layer takes meanwhile.

:class:`Trace` tells a meter of every change: :class:`Clock`, :class:`KeptBytes`, :class:`CudaPeak`, :class:`CpuPeak`.
:mod:`recbole_holo.profiling` makes a table of what they measure.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAD, OTHER, OPTIMIZER = "head and loss", "other", "optimizer step"
Key = tuple[str, str]  # (phase, row); the phases are forward, backward, optimizer and score


class Trace:
    """Tells ``change`` which row runs from now on, for the steps inside the block.

    A row is a layer, or ``head and loss`` (the loss and the scores outside the encoder), ``other`` (the encoder outside
    its layers, and the trainer between loss and optimizer) or ``optimizer step``. Forward, a layer's row begins and
    ends with its call, an inner row interrupting the outer one. Backward, the nodes of autograd run in the opposite
    order of their creation: nodes created while a row ran forward are a row's run backward, and begin with the first.

    Args:
        trainer: a trainer of RecBole or this package; its model, optimizers and evaluation steps are listened to.
        layers: the layers by the names of their rows.
        change: called with (phase, row), or with None when nothing runs that counts.
    """

    def __init__(self, trainer: Any, layers: dict[str, nn.Module], change: Callable[[Key | None], None]) -> None:
        self.trainer, self.layers, self.change = trainer, layers, change
        self.phase: str | None = None
        self.in_loss = False
        self.stack: list[str] = []
        self.starts: list[tuple[int, str]] = []  # (number of the next autograd node, row that creates it)

    def __enter__(self) -> Trace:
        self.exits = ExitStack()
        model = self.trainer.model
        for name, layer in self.layers.items():
            before = layer.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            after = layer.register_forward_hook(lambda *_: self._leave(), always_call=True)
            self.exits.callback(before.remove)
            self.exits.callback(after.remove)
        for name in dir(type(model)):
            if re.fullmatch(r"calculate_\w*loss", name):  # knowledge-aware models have several
                self._wrap(model, name, self._loss)
        for name in ("_full_sort_batch_eval", "_neg_sample_batch_eval"):
            self._wrap(self.trainer, name, self._scores)
        for name in ("forward", "token_states", "hidden_states"):
            if hasattr(type(model), name):
                self._wrap(model, name, self._encoder)
        optimizers = [value for value in vars(self.trainer).values() if isinstance(value, torch.optim.Optimizer)]
        for optimizer in {id(optimizer): optimizer for optimizer in optimizers}.values():
            begin = optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer", OPTIMIZER))
            end = optimizer.register_step_post_hook(lambda *_: self._end())
            self.exits.callback(begin.remove)
            self.exits.callback(end.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.exits.close()

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        before = vars(owner).get(name)
        setattr(owner, name, partial(around, getattr(owner, name)))
        self.exits.callback(partial(setattr, owner, name, before) if before else partial(delattr, owner, name))

    def _loss(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.in_loss:  # one loss calls another
            return method(*args, **kwargs)
        self.in_loss = True
        self._begin("forward", HEAD)
        losses = method(*args, **kwargs)
        self.change(None)
        self._follow_backward(losses if isinstance(losses, tuple) else (losses,))
        self._begin("forward", OTHER)
        self.in_loss = False
        return losses

    def _scores(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin("score", HEAD)
        scores = method(*args, **kwargs)
        self._end()
        return scores

    def _encoder(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._enter(OTHER)
        try:
            return method(*args, **kwargs)
        finally:
            self._leave()

    def _begin(self, phase: str, row: str) -> None:
        self.phase, self.stack = phase, [row]
        self._tell()

    def _end(self) -> None:
        self.phase, self.stack = None, []
        self.change(None)

    def _enter(self, row: str) -> None:
        self.stack.append(row)
        self._tell()

    def _leave(self) -> None:
        self.stack.pop()
        self._tell()

    def _tell(self) -> None:
        if self.phase is not None and self.stack:
            self.starts.append((torch.autograd._get_sequence_nr(), self.stack[-1]))
            self.change((self.phase, self.stack[-1]))

    def _follow_backward(self, losses: tuple[Tensor, ...]) -> None:
        """Hooks on the autograd nodes at which, backward, another row begins."""
        numbers = [number for number, _ in self.starts]
        waiting = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
        nodes = {}
        while waiting:
            node = waiting.pop()
            if node not in nodes and not node.name().endswith("AccumulateGrad"):
                nodes[node] = self.starts[max(bisect_right(numbers, node._sequence_nr()) - 1, 0)][1]
                waiting += [following for following, _ in node.next_functions if following is not None]
        running: str | None = None
        for node in sorted(nodes, key=lambda node: node._sequence_nr(), reverse=True):
            if nodes[node] != running:
                node.register_prehook(partial(self._run_backward, nodes[node], running is None))
                running = nodes[node]
        self.starts.clear()

    def _run_backward(self, row: str, first: bool, _gradients: Any) -> None:
        if first:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self.change(("forward", OTHER)))
        self.change(("backward", row))


# ---------------------------------------------------------------------- what is measured
class Clock:
    """The time of every row."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[tuple[Key | None, Any]] = []

    def change(self, key: Key | None) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((key, event))
        else:
            self.marks.append((key, perf_counter()))

    def seconds(self) -> dict[Key, float]:
        if self.cuda:
            torch.cuda.synchronize()
        total: dict[Key, float] = defaultdict(float)
        for (key, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if key is not None:
                total[key] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return total


class KeptBytes:
    """The bytes that autograd keeps, by the row that makes it keep them."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.seen: dict[int, Any] = {}  # with the storages themselves, so that no address is used twice
        self.row: str | None = None
        for module in model.modules():
            own = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
            self._see(value for value in own if isinstance(value, Tensor))

    def hold(self, batch: Any) -> None:
        """Leaves the tensors of ``batch`` out."""
        self._see(batch[key] for key in batch.columns)

    def _see(self, tensors: Any) -> int:
        new = 0
        for tensor in tensors:
            for storage in _storages(tensor):
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage
                    new += storage.nbytes()
        return new

    def change(self, key: Key | None) -> None:
        self.row = key[1] if key is not None and key[0] == "forward" else None

    def pack(self, tensor: Tensor) -> Tensor:
        new = self._see([tensor])
        if self.row is not None:
            self.bytes[self.row] += new
        return tensor


class CudaPeak:
    """The most memory in use in every row, beyond what was in use before, as the allocator of a GPU counts it."""

    def __init__(self) -> None:
        self.peaks: dict[Key, int] = {}
        self.key: Key | None = None

    def __enter__(self) -> None:
        self.before = torch.cuda.memory_allocated()

    def __exit__(self, *error: object) -> None:
        self.change(None)

    def change(self, key: Key | None) -> None:
        if self.key is not None:
            used = torch.cuda.max_memory_allocated() - self.before
            self.peaks[self.key] = max(self.peaks.get(self.key, 0), used)
        torch.cuda.reset_peak_memory_stats()
        self.key = key


class CpuPeak(TorchDispatchMode):
    """The same from the storages of the tensors that operations return; those that existed before count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[Key, int] = {}
        self.key: Key | None = None
        self.used = 0
        self.known: dict[int, Any] = {}

    def change(self, key: Key | None) -> None:
        self.key = key
        self._note()

    def _note(self) -> None:
        if self.key is not None:
            self.peaks[self.key] = max(self.peaks.get(self.key, 0), self.used)

    def _see(self, values: Any, new: bool) -> None:
        for value in tree_leaves(values):
            for storage in _storages(value) if isinstance(value, Tensor) else ():
                if storage._cdata not in self.known:
                    size = storage.nbytes() if new else 0
                    self.known[storage._cdata] = ref(storage, partial(self._forget, storage._cdata, size))
                    self.used += size

    def _forget(self, address: int, size: int, _reference: Any) -> None:
        del self.known[address]
        self.used -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), new=False)
        result = function(*args, **(kwargs or {}))
        self._see(result, new=True)
        self._note()
        return result


def _storages(tensor: Tensor) -> list[Any]:
    """The storages of a tensor, dense or sparse."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    if tensor.layout == torch.sparse_csr:
        return [part.untyped_storage() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    return [tensor.untyped_storage()] if tensor.layout == torch.strided else []
