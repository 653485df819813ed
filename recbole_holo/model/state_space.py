"""What the state space models share: vectors of items in, hidden states out, parts of a history, bundles of events."""

from __future__ import annotations

from torch import Tensor

from recbole_holo.data.sequences import recent_events
from recbole_holo.errors import ConfigError
from recbole_holo.layers.bundling import Layout, TemporalBundling
from recbole_holo.layers.carried import Carried
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.model.items import known
from recbole_holo.model.settings import one_of, positive_int
from recbole_holo.model.stepping import Stepping

SCHEDULES = ("constant", "grow", "mixed")


class StateSpaceRecommender(Stepping, SequenceRecommender):
    """A model that reads vectors of items one after the other, and carries a state.

    A model gives :meth:`encode_vectors`, and calls :meth:`make_items`.

    **Bundling** (``bundle_size`` k above 1): the events before the latest ``bundle_recent`` enter the encoder k at a
    time (:class:`~recbole_holo.layers.bundling.TemporalBundling`), in training and in evaluation alike, so that it
    reads a long history in nearly a k-th of the steps. Training windows start ``bundle_recent`` apart then, and every
    training event is a target once, among the latest of its window. ``bundle_schedule`` says which k a training step
    has: ``constant``; ``grow``: 1, 2, 4 … up to k, each for an equal part of the run; ``mixed``: these in turn, step by
    step, for a model that is to be run at any of them. ``bundle_inference`` is k outside training, 1 to
    ``bundle_size``. Positions of a model that counts them are those of the tokens.

    Config keys: ``bundle_size`` (int), ``bundle_recent`` (int, ~ = a quarter of MAX_ITEM_LIST_LENGTH),
    ``bundle_schedule`` (constant | grow | mixed), ``bundle_inference`` (int, ~ = bundle_size).
    """

    carries_state = True
    binds_attributes = True
    bundles_events = True
    reads_event_time = True

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.bundling: TemporalBundling | None = None
        self.bundle_schedule = one_of("bundle_schedule", config["bundle_schedule"] or "constant", SCHEDULES)
        largest = 1 if config["bundle_size"] is None else positive_int("bundle_size", config["bundle_size"])
        recent, size = recent_events(config), config["bundle_inference"]
        if recent is None:
            return
        if config["train_steps_at_once"] is not None:
            remedy = "a history is read in parts without bundles: leave it at ~, or bundle_size at 1"
            raise ConfigError("train_steps_at_once", config["train_steps_at_once"], remedy)
        self.bundling = TemporalBundling(config["hidden_size"], largest, recent)
        if size is not None:
            if positive_int("bundle_inference", size) > largest:
                raise ConfigError(
                    "bundle_inference", size, f"the model has roles for windows of up to {largest} events"
                )
            self.bundling.size = size

    def set_progress(self, done: float, step: int) -> None:
        """Before a training step: the part of the run that is done, 0 to below 1, and the number of the step."""
        if self.bundling is None:
            return
        largest = len(self.bundling.roles)
        sizes = [*(2**i for i in range((largest - 1).bit_length())), largest]  # 1, 2, 4 … and the largest
        number = {"constant": -1, "grow": int(done * len(sizes)), "mixed": step % len(sizes)}[self.bundle_schedule]
        self.bundling.training_size = sizes[number]

    def encode_vectors(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        """Vectors of items ``[B, L, d]`` → hidden states ``[B, L, d]``; causal, so pads on the right move nothing."""
        raise NotImplementedError

    def hidden_states(self, item_seq: Tensor, carried: Carried | None = None, gaps: Tensor | None = None) -> Tensor:
        if self.bundling is None or carried is not None:
            return self.encode_vectors(self.embed_events(item_seq, gaps), carried)
        hidden, layout = self.token_states(item_seq, gaps)
        return hidden if layout is None else layout.spread(hidden)

    def token_states(self, item_seq: Tensor, gaps: Tensor | None = None) -> tuple[Tensor, Layout | None]:
        if self.bundling is None:
            return super().token_states(item_seq, gaps)
        lengths = (item_seq > 0).sum(1)
        tokens, layout = self.bundling(item_seq, lengths, self.embed_items)
        if self.event_time is not None:  # a bundle of sums is the sum of two bundles
            tokens = tokens + self.bundling(known(gaps, item_seq), lengths, self.embed_gaps)[0]
        return self.encode_vectors(tokens), layout
