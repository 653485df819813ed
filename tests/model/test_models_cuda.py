"""Every model on the fused kernels against the same model on a CPU in float64; runs where there is a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from .conftest import STATE_SPACE, build_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and the fused kernels")

# the kernels use fast math; relative to the largest value of each tensor
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 6e-2}
SIZES = {"hidden_size": 64, "d_state": 16, "headdim": 16, "chunk_size": 64, "MAX_ITEM_LIST_LENGTH": 70}


def batch(n_items: int = 30, lengths: tuple[int, ...] = (70, 33, 1, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(1, n_items, (len(lengths), max(lengths)), generator=generator)
    targets = torch.randint(1, n_items, items.shape, generator=generator)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return torch.where(valid, items, 0), torch.where(valid, targets, 0)


def loss_and_gradients(model, items, targets) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    hidden = model.hidden_states(items)
    supervised = targets > 0
    scores = model.score_all(hidden[supervised])
    loss = torch.nn.functional.cross_entropy(scores, targets[supervised])  # no random negatives
    loss.backward()
    return hidden, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, name: str) -> None:
    error = (got.detach().double().cpu() - wanted.detach()).abs().max() / wanted.detach().abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_on_cuda_equals_the_cpu(preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    reference = build_tiny(preset, **SIZES).double()
    model = copy.deepcopy(reference).float().cuda()
    items, targets = batch()
    hidden, loss, gradients = loss_and_gradients(reference, items, targets)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        got_hidden, got_loss, got_gradients = loss_and_gradients(model, items.cuda(), targets.cuda())
    valid = items > 0
    assert_close(got_hidden[valid.cuda()], hidden[valid], TOLERANCE[dtype], "hidden")
    assert_close(got_loss, loss, TOLERANCE[dtype], "loss")
    assert gradients.keys() == got_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(got_gradients[name], gradient, 5 * TOLERANCE[dtype], name)


def test_a_model_trained_on_cuda_scores_the_same_on_a_cpu(preset: str) -> None:
    model = build_tiny(preset, **SIZES).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    items, targets = (t.cuda() for t in batch())
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(model.hidden_states(items)[targets > 0], targets[targets > 0]).backward()
        optimizer.step()
    model.eval()
    on_cpu = build_tiny(preset, seed=1, **SIZES)
    on_cpu.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    lengths = (items > 0).sum(1)
    with torch.no_grad():
        scores = model.score_all(model.forward(items, lengths))
        assert_close(scores, on_cpu.score_all(on_cpu.forward(items.cpu(), lengths.cpu())).double(), 5e-3, "scores")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"bundle_size": 3, "bundle_recent": 5}], ids=["plain", "bundled"])
@pytest.mark.parametrize("name", STATE_SPACE)
def test_steps_and_prefill_on_cuda(
    name: str, settings: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    reference = build_tiny(name, **SIZES, **settings).double()
    model = copy.deepcopy(reference).float().cuda()
    items, _ = batch()
    lengths = (items > 0).sum(1)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = reference.forward(items, lengths)
        state = model.encode(items.cuda())
        assert_close(model.last_hidden(state), expected, TOLERANCE[dtype], "prefilled")
        more = torch.randint(1, 30, (len(items), 7))
        for column in more.T:
            hidden, state = model.step(column.cuda(), state)
        whole = torch.zeros(len(items), items.shape[1] + 7, dtype=torch.int64)
        for row, n in enumerate(lengths.tolist()):
            whole[row, : n + 7] = torch.cat([items[row, :n], more[row]])
        if name != "RecMamba" or reference.position_embedding is None:
            assert_close(hidden, reference.forward(whole, lengths + 7), 2 * TOLERANCE[dtype], "stepped")


def test_a_recommender_on_cuda_says_what_one_on_a_cpu_says() -> None:
    from recbole_holo.inference import Event, Recommender
    from tests.inference.conftest import served

    model, items = served(**SIZES)
    answers = []
    for net in (model, copy.deepcopy(model).cuda()):
        recommender = Recommender(net, items)
        recommender.update_many([Event(f"u{n % 7}", f"i{1 + n * n % 39}") for n in range(100)])
        answers.append([recommender.recommend(f"u{n}", k=5) for n in range(7)])
    for one, other in zip(*answers, strict=True):
        for a, b in zip(one.suggestions, other.suggestions, strict=True):
            assert abs(a.score - b.score) < 5e-3 * max(1, abs(a.score))
