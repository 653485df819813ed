from functools import partial

import pytest
import torch
from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.ops import causal_conv1d
from recbole_holo.ops.causal_conv1d import _causal_conv1d_shifted, causal_conv1d_reference

FORMS = {"native": causal_conv1d, "torch": _causal_conv1d_shifted}


def conv_inputs(length: int, channels: int, width: int, bias: bool = True) -> list[Tensor | None]:
    x, weight = torch.randn(3, length, channels), torch.randn(channels, width)
    return [x, weight, torch.randn(channels) if bias else None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 33, 200])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_values_and_gradients(compare, form, length, activation):
    options = {"activation": activation}
    bias = length % 2 == 1
    function = FORMS[form] if bias else lambda x, w, _, **o: FORMS[form](x, w, None, **o)
    compare(partial(function, **options), partial(causal_conv1d_reference, **options), conv_inputs(length, 9, 4, bias))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 130])
def test_widths(compare, width, channels):
    compare(
        partial(causal_conv1d, activation="silu"),
        partial(causal_conv1d_reference, activation="silu"),
        conv_inputs(6, channels, width),
    )


def test_reference_by_hand():
    x, weight, bias = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3)
    expected = torch.zeros_like(x)
    for t in range(5):
        expected[:, t] = bias + sum(weight[:, 3 - back] * x[:, t - back] for back in range(min(t, 3) + 1))
    torch.testing.assert_close(causal_conv1d_reference(x, weight, bias), expected)


def test_slice_of_a_projection(compare):
    def sliced(function):
        return lambda xz, weight, bias: function(xz.chunk(2, -1)[1], weight, bias, "silu")

    inputs = [torch.randn(2, 6, 10), torch.randn(5, 4), torch.randn(5)]
    compare(sliced(causal_conv1d), sliced(causal_conv1d_reference), inputs)


def test_right_pads_change_nothing():
    x, weight, bias = conv_inputs(12, 8, 4)
    padded = torch.cat([x[:, :7], torch.full_like(x[:, 7:], 1e3)], 1)
    for function in (causal_conv1d, causal_conv1d_reference):
        torch.testing.assert_close(function(padded, weight, bias)[:, :7], function(x, weight, bias)[:, :7])


@pytest.mark.parametrize("threads", [2, 5])
def test_steps_are_shared_out_when_there_are_few_sequences(compare, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in (1, 9, 100):
            inputs = [torch.randn(1, length, 16), torch.randn(16, 4), torch.randn(16)]
            compare(
                partial(causal_conv1d, activation="silu"), partial(causal_conv1d_reference, activation="silu"), inputs
            )
    finally:
        torch.set_num_threads(before)


def test_half_precision():
    x, weight, bias = conv_inputs(12, 8, 4)
    y = causal_conv1d(x.bfloat16(), weight, bias, "silu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, causal_conv1d_reference(x.bfloat16().float(), weight, bias, "silu").bfloat16())


def test_unknown_activation():
    with pytest.raises(ConfigError, match=r"activation: 'gelu'.*silu"):
        causal_conv1d(*conv_inputs(3, 2, 4), "gelu")
