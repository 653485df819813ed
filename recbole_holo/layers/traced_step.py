"""One step of a stack of layers, traced from its own code into what the C++ kernels run."""

from __future__ import annotations

import operator
from logging import getLogger
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from recbole_holo.layers.carried import Carried, Recurrent
from recbole_holo.layers.dropout import Dropout
from recbole_holo.layers.feed_forward import FeedForward, SwiGLU
from recbole_holo.layers.rope import Rotary
from recbole_holo.ops._step_native import NativeStep
from recbole_holo.ops.step_program import Step, StepProgram

LEAVES = (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Identity, Dropout, FeedForward, SwiGLU, Rotary, Recurrent)
# Of a tensor [B, 1, …] that lies in rows: other shapes of the same numbers.
VIEWS = ("squeeze", "unsqueeze", "flatten", "unflatten")
FUNCTIONS = {
    operator.add: "add",
    torch.add: "add",
    operator.mul: "multiply",
    torch.mul: "multiply",
    F.silu: "silu",
    F.gelu: "gelu",
}


class NotTraceable(Exception):
    """What a stack does that has no operation here."""


class _Recorded(Carried):
    """Blocks appear in the trace as modules."""

    def step(self, layer: Recurrent, hidden: Tensor) -> Tensor:
        return layer(hidden)


class _StandIn(nn.Module):
    """A module that appears in a trace as one operation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._stands_for = [module]  # in a list, so that it is no part of this one

    def forward(self, x: fx.Proxy, *_position: fx.Proxy) -> fx.Proxy:
        return x.tracer.create_proxy("call_function", self._stands_for[0], (x,), {}, name="module")


def _with_stand_ins(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the tree of modules that has all in common with it but the :data:`LEAVES`.

    :class:`torch.fx.Tracer` changes classes of PyTorch for the whole process while it traces: a model that is called in
    another thread would be traced with this one. A stack of stand-ins is traced by calling it, and nobody notices.
    """
    if module not in made:
        if isinstance(module, LEAVES):
            made[module] = _StandIn(module)
        else:
            copied = made[module] = object.__new__(type(module))
            children = {n: c if c is None else _with_stand_ins(c, made) for n, c in module._modules.items()}
            copied.__dict__.update({**vars(module), "_modules": children})
    return made[module]


def _trace(model: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, position = (fx.Proxy(graph.placeholder(name), tracer) for name in ("x", "position"))
    stack: Any = _with_stand_ins(model, {})
    result = stack.encode_vectors(x, _Recorded(position, in_place=True))  # type: ignore[arg-type]
    graph.output(result.node)
    return graph


@torch.no_grad()
def step_program(model: nn.Module, width: int, places: dict[nn.Module, tuple[int, int]]) -> StepProgram | None:
    """``model.encode_vectors`` of one step as a program, or None where it does something that has no operation.

    Args:
        model: in evaluation mode, on a CPU, in float32; its parameters are copied.
        width: d of its input and output.
        places: of every :class:`~recbole_holo.layers.carried.Recurrent`, where its states are in a state's numbers.
    """
    try:
        return StepProgram(width, _Translation(_trace(model), width, places).steps)
    except (NotTraceable, fx.proxy.TraceError, TypeError, NotImplementedError) as error:
        getLogger("recbole_holo").info("a step of %s runs module by module: %s", type(model).__name__, error)
        return None


class _Translation:
    """A graph as steps. Values are numbered as they are made; views have the number of what they show."""

    def __init__(self, graph: fx.Graph, width: int, places: dict[nn.Module, tuple[int, int]]) -> None:
        self.places = places
        self.steps: list[Step] = []
        self.widths = [width]
        values: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                if node.name == "x":
                    values[node] = 0
            elif node.op == "output":
                result = values[node.args[0]]
                if result != len(self.steps):
                    raise NotTraceable("its result is not made last")
            else:
                values[node] = self._value(node, values)

    def _value(self, node: fx.Node, values: dict[fx.Node, int]) -> int:
        if isinstance(node.target, nn.Module):
            return self._module(node.target, values[node.args[0]])  # type: ignore[index]
        if node.op == "call_method" and node.target in VIEWS:
            return values[node.args[0]]  # type: ignore[index]
        if node.op == "call_function" and node.target in FUNCTIONS:
            kind = FUNCTIONS[node.target]
            numbers = [one for one in node.args if isinstance(one, (int, float))]
            reads = [values[one] for one in node.args if isinstance(one, fx.Node)]
            if kind == "multiply" and len(numbers) == 1:
                return self._made("scale", reads, self.widths[reads[0]], number=float(numbers[0]))
            if not numbers and len({self.widths[one] for one in reads}) == 1:
                return self._made(kind, reads, self.widths[reads[0]])
        raise NotTraceable(f"{node.op} {node.target}")

    def _made(self, kind: str, reads: list[int], width: int, **others: Any) -> int:
        self.steps.append(Step(kind, reads, width, **others))
        self.widths.append(width)
        return len(self.steps)

    def _module(self, module: nn.Module, x: int) -> int:
        if isinstance(module, (nn.Identity, Dropout)):  # in evaluation
            return x
        if isinstance(module, nn.Linear):
            return self._made("linear", [x], module.out_features, weight=module.weight, bias=module.bias)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            kind = "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"
            eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
            given = {"weight": module.weight, "bias": getattr(module, "bias", None), "number": eps}
            if tuple(module.normalized_shape) != (self.widths[x],):
                raise NotTraceable(f"a norm over {module.normalized_shape}")
            return self._made(kind, [x], self.widths[x], **given)
        if isinstance(module, FeedForward):
            return self._module(module.w_2, self._made("gelu", [up := self._module(module.w_1, x)], self.widths[up]))
        if isinstance(module, SwiGLU):
            gate, up = self._module(module.gate, x), self._module(module.up, x)
            open_ = self._made("silu", [gate], self.widths[gate])
            return self._module(module.down, self._made("multiply", [open_, up], self.widths[up]))
        if isinstance(module, Rotary):
            frequencies = module.frequencies(self.widths[x] // module.heads)
            return self._made("rotate", [x], self.widths[x], weight=frequencies, heads=module.heads)
        if isinstance(module, Recurrent):
            block = module.make_stepper()
            if isinstance(block, NativeStep):
                conv, ssm = self.places[module]
                return self._made(block.kind, [x], self.widths[x], block=block, conv=conv, ssm=ssm)
        raise NotTraceable(type(module).__name__)
