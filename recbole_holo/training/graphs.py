"""CUDA graphs of a model's encoder, for batches so small that launching kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.training import distributed

_logger = getLogger("recbole_holo")

SHAPES = 8  # padded lengths that are captured, at most
MOST_POSITIONS = 2**15  # of a batch; beyond, kernels take longer than their launches, and graphs only hold memory


class EncoderGraphs:
    """Replays ``model.hidden_states`` and its backward pass from CUDA graphs, one pair for each shape of a batch.

    A training step of a small recommender is hundreds of kernels of a few microseconds each, nearly all of them in the
    encoder; replaying is two launches. What is left runs as ever: the batch, the loss (whose number of targets changes
    from batch to batch, and which draws negatives), clipping, the fused optimizer, the schedule, gradient scaling. So
    nothing needs fillers, static targets or a capturable optimizer, and any loss works. ``torch.compile`` with
    ``mode="reduce-overhead"`` would do the same behind more machinery: it would first have to trace the fused kernels,
    custom functions that it does not know, and break its graphs around them.

    Shapes are few because the loader rounds padded lengths up (``round_width_to``). A shape is captured when it first
    appears, :func:`torch.cuda.make_graphed_callables` runs it a few times for that, and the random state is put back
    afterwards. All graphs share one memory pool: a backward pass ends before another batch begins, so none needs what
    another left there. The gradients of a shape's graph have buffers of their own.

    Args:
        model: encodes a batch once a step, as :meth:`SequenceRecommender.calculate_loss` does.
        batch_rows: rows of a full batch. Others run without a graph.
        may_fail: a failed capture is a warning, and training goes on without graphs; else it is an error.
    """

    def __init__(self, model: SequenceRecommender, batch_rows: int, may_fail: bool) -> None:
        self.model, self.batch_rows, self.may_fail = model, batch_rows, may_fail
        self._encoders: dict[int, Callable[..., Any]] = {}  # by padded length
        self._pool = torch.cuda.graph_pool_handle()
        self._failed = False

    @classmethod
    def from_config(cls, config, model: nn.Module) -> EncoderGraphs | None:
        """By ``cuda_graphs``: True, False, or auto = wherever they are of use.

        Raises:
            ConfigError: True, and they cannot be used; the message says why.
        """
        wanted = config["cuda_graphs"]
        if wanted not in ("auto", True, False, None):
            raise ConfigError("cuda_graphs", wanted, "use auto, True or False")
        reason = _obstacle(config, model)
        if wanted is True and reason:
            raise ConfigError("cuda_graphs", True, f"{reason}; use auto or False")
        rows = config["train_batch_size"]
        large = rows * config["MAX_ITEM_LIST_LENGTH"] > MOST_POSITIONS if not reason else True
        if not wanted or reason or (wanted == "auto" and large):
            return None
        assert isinstance(model, SequenceRecommender)
        return cls(model, rows, may_fail=wanted == "auto")

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """``model.hidden_states`` replays graphs inside the block, which is for training mode only."""
        eager = self.model.hidden_states

        def hidden_states(item_seq: Tensor, **times: Tensor) -> Tensor:
            if self._failed or len(item_seq) != self.batch_rows:
                return eager(item_seq, **times)
            if item_seq.shape[1] not in self._encoders:
                self._capture(eager, item_seq, times)
                return hidden_states(item_seq, **times)
            return self._encoders[item_seq.shape[1]](item_seq, *times.values())

        object.__setattr__(self.model, "hidden_states", hidden_states)
        try:
            yield
        finally:
            object.__delattr__(self.model, "hidden_states")

    def _capture(self, eager: Callable[..., Tensor], item_seq: Tensor, times: dict[str, Tensor]) -> None:
        module = _Encoder(self.model, eager, list(times))
        given = (item_seq.clone(), *(values.clone() for values in times.values()))
        try:
            with _as_before(item_seq.device, self._pool):
                encoder: Any = torch.cuda.make_graphed_callables(
                    module, given, allow_unused_input=True, pool=self._pool
                )
            self._encoders[item_seq.shape[1]] = encoder
        except RuntimeError as error:
            if not self.may_fail:
                raise
            self._failed = True
            self._encoders.clear()
            _logger.warning(f"cuda_graphs: auto goes on without graphs, the encoder cannot be captured: {error}")


@contextmanager
def _as_before(device: torch.device, pool: Any) -> Iterator[None]:
    """Captures inside the block leave the random state as it was; a capture that fails leaves nothing else behind.

    Where a capture has become invalid, ``CUDAGraph.capture_end`` raises before it has undone what ``capture_begin`` did
    (torch 2.4 to 2.13): the generator still believes that it is captured, so that the next dropout raises; the
    allocator, too, so that emptying its cache raises, as it does before memory runs out; and the thread still issues
    its work to the stream of the capture.
    """
    generator, stream = torch.cuda.default_generators[device.index], torch.cuda.current_stream(device)
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        with suppress(RuntimeError):  # it failed outside a capture: there is nothing to end
            _end_allocating(device.index, pool)
        raise
    generator.set_state(before.get_state())


def _end_allocating(device: int, pool: Any) -> None:
    """PyTorch has no public name for it; its own use of pools ends so, too."""
    of_torch: Any = torch._C
    end = getattr(of_torch, "_cuda_endAllocateToPool", None) or of_torch._cuda_endAllocateCurrentStreamToPool
    end(device, pool)
    of_torch._cuda_releasePool(device, pool)


class _Encoder(nn.Module):
    """One call of ``hidden_states`` as the module that capturing wants, with the model's parameters."""

    def __init__(self, model: nn.Module, encode: Callable[..., Tensor], names: list[str]) -> None:
        super().__init__()
        self.model, self._encode, self._names = model, encode, names

    def forward(self, item_seq: Tensor, *times: Tensor) -> Tensor:
        return self._encode(item_seq, **dict(zip(self._names, times, strict=True)))


def width_multiple(max_length: int) -> int:
    """What padded lengths are rounded up to, so that there are :data:`SHAPES` of them: a multiple of 8."""
    return -(-max_length // (8 * SHAPES)) * 8


def _obstacle(config, model: nn.Module) -> str:
    """Why graphs cannot be used; empty if they can."""
    if config["device"].type != "cuda":
        return "there are no CUDA graphs on a CPU"
    if getattr(type(model), "calculate_loss", None) is not SequenceRecommender.calculate_loss:
        return f"{config['model']} has a training step of its own"
    if config["train_on"] != "sequences" or config["train_batch_tokens"] is not None:
        return "batches must have one number of rows (train_on: sequences, train_batch_tokens: ~)"
    if config["train_steps_at_once"] is not None:
        return "train_steps_at_once runs a batch in parts"
    if (config["bundle_size"] or 1) > 1:
        return "bundled events are made again for the gradient, which a graph cannot hold"
    if config["sparse_embedding"]:
        return "sparse_embedding makes gradients that a graph cannot hold"
    if distributed.world()[1] > 1:
        return "several processes capture in the way of each other's messages"
    return ""
