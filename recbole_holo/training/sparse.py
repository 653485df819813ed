"""Training with sparse gradients: Adam that updates the rows of a batch's items only, and what it needs around it.

With ``sparse_embedding`` the gradient of an item table is a sparse tensor of the rows that a batch looked up. A step of
plain Adam reads and writes the table, its gradient and two moments whole, which for a million items is nearly all of
the step's time; here it costs what the batch's rows cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, optim

from recbole_holo.errors import ConfigError, nearest


class LazyRows(optim.Optimizer):
    r"""Mixed in before Adam or AdamW: parameters with a sparse gradient are updated in its rows only.

    Parameters with a dense gradient are updated by the class that follows, and one optimizer holds both: arguments,
    groups, state and state dict are Adam's, so that schedules, gradient scaling and checkpoints need to know nothing,
    and a run may be continued with or without ``sparse_embedding``.

    A row that a batch did not look up keeps its moments and its value: neither its momentum moves it on, nor weight
    decay shrinks it. That is the rule of :class:`torch.optim.SparseAdam` (which takes no weight decay and no dense
    gradients), and of TensorFlow's LazyAdam; where every batch holds every row it is Adam itself. Bias correction
    counts the steps of the table, not of the row.

    ``fused`` and ``foreach`` concern dense gradients; ``amsgrad`` and ``maximize`` are refused.
    """

    decoupled: bool

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, **settings)
        for name in ("amsgrad", "maximize"):
            if self.defaults[name]:
                raise ValueError(f"{name}: True has no form for sparse gradients; leave it out")
        # Fused Adam unscales gradients inside its kernel; the rows updated here need the scaler to do it before.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.is_sparse:
                    self._update_rows(parameter, gradient.coalesce(), group)
                    sparse.append((parameter, gradient))
                    parameter.grad = None  # the class that follows passes it over
        super().step()
        for parameter, gradient in sparse:
            parameter.grad = gradient
        return loss

    def _update_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            on_device = group["fused"] or group["capturable"]
            state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        step = state["step"].add_(1).double()
        rows, g = gradient.indices()[0], gradient.values()
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]

        value = parameter.index_select(0, rows)
        if self.decoupled:
            value.mul_(1 - lr * decay)
        else:
            g = g.add(value, alpha=decay)
        mean = state["exp_avg"].index_select(0, rows).lerp_(g, 1 - beta1)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = square.sqrt().div_((1 - beta2**step).sqrt()).add_(group["eps"])
        value.sub_(mean.div(scale).mul_(lr / (1 - beta1**step)))
        parameter.index_copy_(0, rows, value)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)


class LazyAdam(LazyRows, optim.Adam):
    """:class:`LazyRows` with weight decay as Adam's: an L2 term of the gradient."""

    decoupled = False


class LazyAdamW(LazyRows, optim.AdamW):
    """:class:`LazyRows` with weight decay as AdamW's: apart from the gradient."""

    decoupled = True


LAZY = {"adam": LazyAdam, "adamw": LazyAdamW}


def lazy_optimizer(learner: str) -> type[LazyRows]:
    """The optimizer for sparse gradients in the place of RecBole's ``learner`` (adam | adamw).

    Raises:
        ConfigError: another learner, which has no form for both kinds of gradient.
    """
    if learner.lower() not in LAZY:
        raise ConfigError("learner", learner, f"sparse_embedding needs one of its own; {nearest(learner, LAZY)}")
    return LAZY[learner.lower()]


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, **kwargs: Any) -> Tensor:
    """:func:`torch.nn.utils.clip_grad_norm_`, which fails on sparse gradients, for gradients of both kinds."""
    return torch.nn.utils.clip_grad_norm_([_with_dense_gradient(p) for p in parameters], max_norm, **kwargs)


def _with_dense_gradient(parameter: Tensor) -> Tensor:
    """A stand-in whose gradient is the values of the parameter's sparse one, each row once; scaling one scales both."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()
    values = parameter.grad.values()
    stand_in = torch.empty_like(values)
    stand_in.grad = values
    return stand_in


def average_gradient(gradient: Tensor) -> Tensor:
    """The mean over processes of a sparse gradient, which each of them must have, if without a row.

    The rows of all are gathered, padded to the most that one of them has.
    """
    gradient = gradient.coalesce()
    parts = [gradient.indices()[0], gradient.values()]
    counts = [int(count) for count in _all_gather(torch.tensor([len(parts[0])], device=gradient.device))]
    most = max(counts)
    rows, values = (
        torch.cat(
            [
                gathered[:count]
                for gathered, count in zip(
                    _all_gather(torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])),
                    counts,
                    strict=True,
                )
            ]
        )
        for part in parts
    )
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values / len(counts), gradient.shape).coalesce()


def _all_gather(tensor: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, tensor)
    return gathered
