"""The optimizer for sparse gradients, and clipping and averaging of these."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from recbole_holo.errors import ConfigError
from recbole_holo.training.sparse import LazyAdam, LazyAdamW, average_gradient, clip_grad_norm_, lazy_optimizer

SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}
PAIRS = [(LazyAdam, optim.Adam), (LazyAdamW, optim.AdamW)]


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    """A table and a weight, in float64."""
    torch.manual_seed(0)
    return tuple(nn.Parameter(torch.randn(shape, dtype=torch.double)) for shape in ((9, 4), (4, 2)))


def sparse_gradient(rows: list[int], seed: int) -> Tensor:
    values = torch.randn(len(rows), 4, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, (9, 4))


def run(optimizer: optim.Optimizer, parameters: tuple[nn.Parameter, ...], rows: list[list[int]], sparse: bool) -> None:
    """One step for each of ``rows``: the table gets gradients in them, the weight in all."""
    table, weight = parameters
    for seed, some in enumerate(rows):
        gradient = sparse_gradient(some, seed)
        table.grad = gradient if sparse else gradient.to_dense()
        weight.grad = torch.randn(4, 2, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


# ---------------------------------------------------------------------- the optimizer
@pytest.mark.parametrize(("lazy", "plain"), PAIRS)
def test_with_every_row_in_every_step_it_is_adam(lazy, plain):
    ours, theirs = pair(), pair()
    rows = [[*range(9), 3, 3, 7], [*range(9)], [8, *range(9)]]  # repeated rows add up before they are squared
    run(lazy(ours, **SETTINGS), ours, rows, sparse=True)
    run(plain(theirs, **SETTINGS), theirs, rows, sparse=False)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_without_decay_it_is_sparse_adam():
    ours, theirs = pair(), pair()
    settings = {**SETTINGS, "weight_decay": 0.0, "eps": 1e-30}
    rows = [[2, 5], [5, 5, 1], [8], [2, 1, 0]]
    run(LazyAdamW(ours, **settings), ours, rows, sparse=True)
    reference = optim.SparseAdam(theirs[:1], lr=settings["lr"], betas=settings["betas"], eps=settings["eps"])
    run(reference, theirs, rows, sparse=True)
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize(("lazy", "plain"), PAIRS)
def test_rows_outside_the_batch_keep_value_and_moments(lazy, plain):
    ours, theirs = pair(), pair()
    optimizer = lazy(ours, **SETTINGS)
    run(optimizer, ours, [[*range(9)]], sparse=True)
    before = {name: t.clone() for name, t in {"value": ours[0].detach(), **optimizer.state[ours[0]]}.items()}
    run(optimizer, ours, [[4, 6, 4]], sparse=True)
    after = {"value": ours[0].detach(), **optimizer.state[ours[0]]}
    others = [row for row in range(9) if row not in (4, 6)]
    for name in ("value", "exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][others], before[name][others])
        assert (after[name][[4, 6]] != before[name][[4, 6]]).all()
    assert ours[0].grad.is_sparse
    reference = plain(theirs, **SETTINGS)
    run(reference, theirs, [[*range(9)]], sparse=False)
    run(reference, theirs, [[4, 6, 4]], sparse=False)
    torch.testing.assert_close(ours[0][[4, 6]], theirs[0][[4, 6]])
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize(("lazy", "plain"), PAIRS)
def test_state_dicts_are_adams(lazy, plain):
    every_row, table = [[*range(9)]], pair()
    first = plain(table, **SETTINGS)
    run(first, table, every_row, sparse=False)
    state = copy.deepcopy(first.state_dict())
    continued = []
    for make, sparse in ((plain, False), (lazy, True)):
        parameters = tuple(nn.Parameter(p.detach().clone()) for p in table)
        optimizer = make(parameters, **SETTINGS)
        optimizer.load_state_dict(copy.deepcopy(state))
        run(optimizer, parameters, every_row, sparse)
        continued.append((parameters, optimizer.state_dict()))
    for a, b in zip(continued[0][0], continued[1][0], strict=True):
        torch.testing.assert_close(a, b)
    for index, values in continued[0][1]["state"].items():
        torch.testing.assert_close(continued[1][1]["state"][index], values)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling_leaves_the_step_as_it_was(fused):
    results = []
    for scale in (None, 1024.0):
        table, weight = (nn.Parameter(p.detach().float()) for p in pair())
        optimizer = LazyAdamW([table, weight], fused=fused, **SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for items in ([1, 2, 2], [5]):
            optimizer.zero_grad()
            vectors = nn.functional.embedding(torch.tensor(items), table, sparse=True)
            scaler.scale((vectors @ weight).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        # Adam forgives a scale; its moments do not.
        results.append([*optimizer.state[table].values(), *optimizer.state[weight].values(), table, weight])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_scheduler_and_a_closure_reach_both_kinds():
    ours, theirs = pair(), pair()
    optimizers = LazyAdamW(ours, **SETTINGS), optim.AdamW(theirs, **SETTINGS)
    for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
        schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):

            def closure(parameters=parameters, optimizer=optimizer) -> Tensor:
                optimizer.zero_grad()
                vectors = nn.functional.embedding(torch.arange(9), parameters[0], sparse=parameters is ours)
                loss = (vectors @ parameters[1]).square().mean()
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
            schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_what_it_cannot_do_is_refused():
    assert lazy_optimizer("adam") is LazyAdam
    assert lazy_optimizer("AdamW") is LazyAdamW
    with pytest.raises(ConfigError, match=r"^learner: 'sgd'"):
        lazy_optimizer("sgd")
    with pytest.raises(ValueError, match=r"^amsgrad"):
        LazyAdam(pair(), amsgrad=True)


# ---------------------------------------------------------------------- around it
@pytest.mark.parametrize("settings", [{"max_norm": 0.5}, {"max_norm": 100.0}, {"max_norm": 0.5, "norm_type": 1.0}])
def test_clipping_is_that_of_dense_gradients(settings):
    norms, gradients = [], []
    for sparse, clip in ((True, clip_grad_norm_), (False, torch.nn.utils.clip_grad_norm_)):
        table, weight = pair()
        gradient = sparse_gradient([2, 5, 2], 0)  # row 2 twice: its norm is the sum's
        table.grad, weight.grad = gradient if sparse else gradient.to_dense(), torch.ones(4, 2, dtype=torch.double)
        norms.append(clip([table, weight, nn.Parameter(torch.ones(3))], **settings))
        gradients.append((table.grad.to_dense(), weight.grad))
    torch.testing.assert_close(*norms)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


ROWS = [([2, 5, 2], [5, 0]), ([], [4]), ([1], []), ([], [])]


def _average(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    averaged = [average_gradient(sparse_gradient(rows[rank], rank)) for rows in ROWS]
    torch.save(averaged, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_average_gradients_of_different_rows(tmp_path: Path):
    torch.multiprocessing.spawn(_average, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        for (first, second), averaged in zip(ROWS, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert averaged.is_sparse
            assert averaged.indices().tolist() == [sorted({*first, *second})]
            expected = (sparse_gradient(first, 0) + sparse_gradient(second, 1)).to_dense() / 2
            torch.testing.assert_close(averaged.to_dense(), expected)
