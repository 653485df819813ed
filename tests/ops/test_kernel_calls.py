"""The calls of the fused kernels, with stand-ins of mamba-ssm 2.3.2's signatures and layouts: no GPU needed.

What the real kernels compute is tested in tests/cuda.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.layers import LatentMamba2, Mamba, Mamba2
from recbole_holo.ops import backend, causal_conv1d, selective_scan, state_space_dual, state_space_dual_with_state
from recbole_holo.ops.causal_conv1d import causal_conv1d_reference
from recbole_holo.ops.mamba2_block import gated_rms_norm
from recbole_holo.ops.mamba_block import MambaState
from recbole_holo.ops.selective_scan import selective_scan_reference
from recbole_holo.ops.state_space_dual import DualArguments, _reference, state_space_dual_reference


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    assert {t.dtype for t in (u, delta, B, C, z) if t is not None} == {u.dtype}
    assert {t.dtype for t in (A, D, delta_bias) if t is not None} == {torch.float32}
    u, delta, B, C, z = (None if t is None else t.transpose(1, 2) for t in (u, delta, B, C, z))
    return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    assert x.shape[1] == weight.shape[0]
    if x.stride(2) != 1:  # channels-last
        assert x.stride(1) == 1
        assert x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == x.storage_offset() % 8 == 0
    return causal_conv1d_reference(x.transpose(1, 2), weight, bias, activation).transpose(1, 2)


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_reference(x.transpose(1, 2), conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, order = delta_proj_weight.shape[1], A.shape[1]
    delta, b, c = F.linear(x, x_proj_weight).split([rank, order, order], -1)
    y = selective_scan_reference(
        x, F.linear(delta, delta_proj_weight), A, b, c, D, z.transpose(1, 2), delta_bias, delta_softplus
    )
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    assert {t.dtype for t in (x, B, C)} == {x.dtype}
    y, last = _reference(DualArguments(x, dt, A, B, C, D, dt_bias, dt_softplus), initial_states)
    return (y, last) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    (heads,) = D.shape
    width = heads * headdim
    channels = conv1d_weight.shape[0]
    assert channels % 8 == 0
    assert zxbcdt.shape[-1] % 8 == 0
    shared = (channels - width) // 2
    z, xbc, dt = zxbcdt.split([width, channels, heads], -1)
    x, b, c = causal_conv1d_reference(xbc, conv1d_weight, conv1d_bias, activation).split([width, shared, shared], -1)
    y = state_space_dual_reference(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        b.unflatten(-1, (ngroups, -1)),
        c.unflatten(-1, (ngroups, -1)),
        D,
        dt_bias,
    )
    return gated_rms_norm(y.flatten(-2), z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    """``x [batch, D]``, ``conv_state [batch, D, W - 1]`` in place."""
    assert x.dtype == conv_state.dtype
    assert conv_state.shape == (*x.shape, weight.shape[1] - 1)
    extended = torch.cat([conv_state, x.unsqueeze(-1)], -1)
    conv_state.copy_(extended[..., 1:])
    y = (extended.float() * weight.float()).sum(-1) + (0 if bias is None else bias.float())
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """``state [batch, (H,) D, N]`` in place; with heads, one number a head has strides of 0 over the rest."""
    heads = state.dim() == 4
    if heads:
        assert (A.stride(-1), A.stride(-2), dt.stride(-1), dt_bias.stride(-1)) == (0, 0, 0, 0)
        shared = state.shape[1] // B.shape[1]
        B, C = (t.repeat_interleave(shared, 1).unsqueeze(2) for t in (B, C))
    else:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    dt = F.softplus(dt.float() + dt_bias) if dt_softplus else dt.float() + dt_bias
    state.copy_(torch.exp(dt.unsqueeze(-1) * A) * state + (dt * x).unsqueeze(-1) * B)
    y = (state * C).sum(-1) + D * x
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


STAND_INS = {
    "selective_scan": selective_scan_fn,
    "causal_conv1d": causal_conv1d_fn,
    "mamba_block": mamba_inner_fn,
    "state_space_dual": mamba_chunk_scan_combined,
    "mamba2_block": mamba_split_conv1d_scan_combined,
    "mamba_step": selective_state_update,
    "mamba2_step": selective_state_update,
    "causal_conv1d_step": causal_conv1d_update,
}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Every operation goes to its stand-in; the list says which were called."""
    made: list[str] = []

    def kernel(op: str):
        made.append(op)
        return STAND_INS[op]

    packages = {op: operation.kernel.package for op, operation in backend._OPERATIONS.items()}
    monkeypatch.setattr(backend, "choose", lambda op, tensor: packages[op])
    monkeypatch.setattr(backend, "kernel", kernel)
    return made


def check(module: torch.nn.Module, x: Tensor, calls: list[str], monkeypatch, expected_calls: list[str]) -> None:
    y = module(x)
    assert calls == expected_calls
    monkeypatch.undo()
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)


def test_mamba(calls, monkeypatch):
    check(Mamba(16, d_state=4, bias=True), torch.randn(2, 9, 16), calls, monkeypatch, ["mamba_block"])


def test_mamba2(calls, monkeypatch):
    block = Mamba2(16, d_state=8, headdim=4)  # 8 heads: all sizes multiples of 8
    check(block, torch.randn(2, 9, 16), calls, monkeypatch, ["mamba2_block"])


def test_latent_mamba2(calls, monkeypatch):
    block = LatentMamba2(4, 8, d_state=8, headdim=8, ngroups=2)
    check(block, torch.randn(2, 9, 4, 8), calls, monkeypatch, ["mamba2_block"])


@pytest.mark.parametrize("sizes", [{"d_state": 8, "headdim": 16}, {"d_state": 5, "headdim": 4}])
def test_mamba2_of_uneven_sizes_is_composed(calls, monkeypatch, caplog, sizes):
    with caplog.at_level("INFO", "recbole_holo"):
        monkeypatch.setattr(backend, "_used", {})
        block = Mamba2(16, **sizes)
        check(block, torch.randn(2, 9, 16), calls, monkeypatch, ["causal_conv1d", "state_space_dual"])
    assert "mamba2_block: composed" in caplog.text
    assert "takes multiples of 8" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_the_scan(calls, dtype):
    u, delta, z = torch.randn(3, 2, 6, 5)
    B, C = torch.randn(2, 2, 6, 3)
    y = selective_scan(u.to(dtype), delta, -torch.rand(5, 3), B, C, torch.ones(5), z, torch.zeros(5).to(dtype), True)
    assert (y.shape, y.dtype) == ((2, 6, 5), dtype)
    assert calls == ["selective_scan"]


def test_types_of_the_dual(calls):
    x, dt, B = torch.randn(2, 6, 2, 4).bfloat16(), torch.randn(2, 6, 2), torch.randn(2, 6, 1, 3)
    y = state_space_dual(x, dt, -torch.rand(2), B, B)
    assert (y.shape, y.dtype) == ((2, 6, 2, 4), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dual_from_a_state_to_a_state(calls, dtype):
    x, dt, B, A = torch.randn(2, 8, 2, 4), torch.randn(2, 8, 2), torch.randn(2, 8, 1, 3), -torch.rand(2)
    x, B = x.to(dtype), B.to(dtype)
    expected = state_space_dual_reference(x.double(), dt.double(), A.double(), B.double(), B.double())
    state, outputs = None, []
    for part in (slice(0, 3), slice(3, 8)):
        y, state = state_space_dual_with_state(x[:, part], dt[:, part], A, B[:, part], B[:, part], initial_state=state)
        assert (y.dtype, state.dtype, state.shape) == (dtype, torch.float32, (2, 2, 4, 3))
        outputs.append(y)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=tolerance, atol=tolerance)
    assert calls == ["state_space_dual"] * 2


def test_parts_of_a_latent_mamba2(calls, monkeypatch):
    block, x = LatentMamba2(4, 8, d_state=8, headdim=8, ngroups=2), torch.randn(2, 9, 4, 8)
    first, state = block.forward_from(x[:, :4], None)
    rest, _ = block.forward_from(x[:, 4:], state)
    assert calls == ["causal_conv1d", "state_space_dual"] * 2
    monkeypatch.undo()
    torch.testing.assert_close(torch.cat([first, rest], 1), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "start"), [(16, 16), (16, 3), (9, 0)])
def test_layouts_of_the_convolution(calls, channels, start):
    x, weight = torch.randn(2, 6, 32)[..., start : start + channels], torch.randn(channels, 4)
    torch.testing.assert_close(causal_conv1d(x, weight), causal_conv1d_reference(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "width", "op"),
    [
        (lambda: Mamba(16, d_state=4, bias=True, d_conv=3), (16,), "mamba_step"),
        (lambda: Mamba2(16, d_state=8, headdim=4, ngroups=2), (16,), "mamba2_step"),
        (lambda: LatentMamba2(4, 8, d_state=6, headdim=8, ngroups=2), (4, 8), "mamba2_step"),
    ],
    ids=["mamba", "mamba2", "latent"],
)
def test_steps(calls, monkeypatch, make, width, op, dtype):
    """States lie in rows of a larger table, as a recommender keeps them."""
    block, x = make().eval(), torch.randn(3, *width)
    shapes = [(3, *shape) for shape in block.state_shapes()]
    sizes = [torch.Size(shape[1:]).numel() for shape in shapes]
    table = torch.randn(3, sum(sizes))
    views = MambaState(*(t.view(shape) for t, shape in zip(table.split(sizes, 1), shapes, strict=True)))
    before = MambaState(*(t.clone() for t in views))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = block.step(x, views)
    assert calls[0] == op
    assert set(calls) == {op, "causal_conv1d_step"}
    monkeypatch.undo()
    with torch.no_grad():
        expected, after = block.forward_from(x.unsqueeze(1), before)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(y.float(), expected[:, 0], rtol=tolerance, atol=tolerance)
    for tensor, wanted in zip(views, after, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=tolerance, atol=tolerance)
