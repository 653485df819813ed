"""The step of a model as a graph for other runtimes: torch.export and ONNX (``pip install 'recbole-holo[export]'``).

The graph takes ``items [B]``, ``events [B]`` (how many events the state has read; both int64) and ``numbers [B, S]``,
and gives ``scores [B, n_items]`` and the ``numbers`` after the event; B is free. S and where what is in it say
``model.state_layout()``; a new user's numbers are zeros. Tables are folded in, attributes with them. Of a model with
``event_time`` it also takes ``gaps [B]`` (int64), what the catalogue's
:class:`~recbole_holo.data.event_time.GapBuckets` make of the time since the user's event before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.errors import ConfigError, MissingExtra
from recbole_holo.model.stepping import Stepping
from recbole_holo.ops import backend

NAMES = ("items", "events", "numbers")


class StepGraph(nn.Module):
    """One event of a model, without state of its own and without kernels.

    Raises:
        ConfigError: a model that carries no state, or bundles: which windows are complete depends on the data, and a
            graph has no such turns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not isinstance(model, Stepping):
            raise ConfigError("model", type(model).__name__, "only a model with a state has a step")
        if model.state_layout().recent:
            remedy = "when a bundle is complete depends on the history, which a graph cannot follow: use 1"
            raise ConfigError("bundle_inference", model.bundling.size, remedy)  # type: ignore[union-attr]
        model.eval()
        self.model = model
        recommender: Any = model
        with torch.no_grad():
            every = torch.arange(recommender.n_items, device=next(model.parameters()).device)
            self.register_buffer("read", recommender.embed_items(every).clone())
            self.register_buffer("scored", recommender.scored_table().clone())
            self.register_buffer("times", None if model.event_time is None else model.event_time.table().clone())

    read: Tensor
    times: Tensor | None
    scored: Tensor
    model: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Of its inputs."""
        return NAMES if self.times is None else (*NAMES, "gaps")

    def forward(
        self, items: Tensor, events: Tensor, numbers: Tensor, gaps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = F.embedding(items, self.read)
        if self.times is not None:
            assert gaps is not None
            x = x + F.embedding(gaps, self.times)
        hidden, numbers = self.model.read_vectors(x, events, numbers)
        query = F.normalize(hidden, dim=-1) if self.model.cosine else hidden
        return F.linear(query, self.scored, self.model.item_bias), numbers


@torch.no_grad()
def export_step(model: Any) -> torch.export.ExportedProgram:
    """The step by ``torch.export``; ``torch.export.save`` writes it.

    Raises:
        ConfigError: see :class:`StepGraph`.
    """
    graph = StepGraph(model)
    with _plain_operations():
        given = _example(graph)
        graph(*given)  # what is computed once and kept is there before the trace
        batch = torch.export.Dim("batch", min=1)
        shapes = {name: {0: batch} for name in graph.names}
        return torch.export.export(graph, given, dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def export_onnx(model: Any, path: str | os.PathLike[str]) -> None:
    """The step as an ONNX file with the inputs ``items, events, numbers`` and the outputs ``scores, next_numbers``.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ConfigError: see :class:`StepGraph`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("ONNX needs onnx and onnxscript: pip install 'recbole-holo[export]'") from error
    program = export_step(model)
    torch.onnx.export(
        program,
        input_names=[*NAMES, *(["gaps"] if model.event_time is not None else [])],
        output_names=["scores", "next_numbers"],
        dynamo=True,
        external_data=False,
        verbose=False,
    ).save(os.fspath(path))  # type: ignore[union-attr]


def _example(graph: StepGraph) -> tuple[Tensor, ...]:
    state = graph.model.init_state(2)
    given = torch.ones_like(state.events), state.events, state.numbers
    return given if graph.times is None else (*given, torch.ones_like(state.events))


@contextmanager
def _plain_operations() -> Iterator[None]:
    before = backend.get_backend()
    backend.set_backend("reference")
    try:
        yield
    finally:
        backend.set_backend(before)
