import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.layers import SSM_INITS, LatentMamba2, Mamba, Mamba2

# As documented for mamba_ssm.Mamba(64) and mamba_ssm.Mamba2(64, d_state=64, headdim=64).
MAMBA_SHAPES = {
    "A_log": (128, 16),
    "D": (128,),
    "in_proj.weight": (256, 64),
    "conv1d.weight": (128, 1, 4),
    "conv1d.bias": (128,),
    "x_proj.weight": (36, 128),
    "dt_proj.weight": (128, 4),
    "dt_proj.bias": (128,),
    "out_proj.weight": (64, 128),
}
MAMBA2_SHAPES = {
    "dt_bias": (2,),
    "A_log": (2,),
    "D": (2,),
    "in_proj.weight": (386, 64),
    "conv1d.weight": (256, 1, 4),
    "conv1d.bias": (256,),
    "norm.weight": (128,),
    "out_proj.weight": (64, 128),
}
LATENT = {"n_heads": 3, "d_head": 8, "d_state": 5, "headdim": 4}
BLOCKS = {
    "mamba": lambda **options: Mamba(20, d_state=5, **options),
    "mamba2": lambda **options: Mamba2(20, d_state=5, headdim=8, **options),
    "mamba2 groups": lambda **options: Mamba2(20, d_state=5, headdim=5, ngroups=2, **options),
    "latent": lambda **options: nn.Sequential(
        nn.Unflatten(-1, (3, 8)), LatentMamba2(**LATENT, **options), nn.Flatten(-2)
    ),
}
WIDTHS = {"mamba": 20, "mamba2": 20, "mamba2 groups": 20, "latent": 24}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def steps(bias: Tensor) -> Tensor:
    return F.softplus(bias.detach())


class TestParameters:
    def test_names_and_shapes_are_those_of_mamba_ssm(self):
        assert shapes(Mamba(64)) == MAMBA_SHAPES
        assert shapes(Mamba2(64, d_state=64, headdim=64)) == MAMBA2_SHAPES
        with_bias = shapes(Mamba(64, bias=True, conv_bias=False))
        assert with_bias.keys() - MAMBA_SHAPES.keys() == {"in_proj.bias", "out_proj.bias"}
        assert MAMBA_SHAPES.keys() - with_bias.keys() == {"conv1d.bias"}

    def test_all_are_float32(self):
        for build in BLOCKS.values():
            assert {p.dtype for p in build().parameters()} == {torch.float32}

    def test_number(self):
        assert sum(p.numel() for p in Mamba(64, d_state=32).parameters()) == 38_784

    def test_latent_ones_are_stacked(self):
        latent, single = LatentMamba2(**LATENT), Mamba2(8, d_state=5, headdim=4)
        assert shapes(latent) == {name: (3, *shape) for name, shape in shapes(single).items()}

    def test_what_no_optimiser_should_decay_is_marked(self):
        for build in BLOCKS.values():
            marked = {n.split(".")[-1] for n, p in build().named_parameters() if getattr(p, "_no_weight_decay", False)}
            assert {"A_log", "D"} <= marked <= {"A_log", "D", "dt_bias"}
        assert Mamba2(16).dt_bias._no_weight_decay
        assert LatentMamba2(2, 16).dt_bias._no_weight_decay

    @pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
    def test_load_from_mamba_ssm(self, name):
        mamba_ssm = pytest.importorskip("mamba_ssm", exc_type=Exception)
        ours = {"Mamba": Mamba, "Mamba2": Mamba2}[name](64, d_state=16)
        theirs = getattr(mamba_ssm, name)(64, d_state=16)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


class TestForward:
    @pytest.mark.parametrize("name", BLOCKS)
    @pytest.mark.parametrize("length", [1, 3, 40])
    def test_shape_and_agreement_with_float64(self, name, length):
        block, x = BLOCKS[name](), torch.randn(2, length, WIDTHS[name])
        y = block(x)
        assert y.shape == x.shape
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in block.named_parameters()}
        double = BLOCKS[name]().double()
        double.load_state_dict(block.state_dict())
        expected = double(x.double())
        expected.square().sum().backward()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        for n, p in double.named_parameters():
            scale = max(p.grad.abs().max().item(), 1e-3)
            torch.testing.assert_close(gradients[n].double(), p.grad, rtol=0, atol=2e-5 * scale, msg=n)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_right_pads_change_nothing(self, name):
        block, x = BLOCKS[name]().eval(), torch.randn(3, 30, WIDTHS[name])
        lengths = [30, 17, 1]
        padded = x.clone()
        for row, length in enumerate(lengths):
            padded[row, length:] = 50.0
        y, found = block(x), block(padded)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(found[row, :length], y[row, :length], rtol=0, atol=0)
            torch.testing.assert_close(block(x[row : row + 1, :length])[0], y[row, :length], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_autocast(self, name):
        block, x = BLOCKS[name](), torch.randn(2, 9, WIDTHS[name])
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        assert y.dtype == torch.bfloat16
        expected = block(x)
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())

    @pytest.mark.parametrize("options", [{}, {"ngroups": 2}, {"conv_bias": False}, {"d_conv": 2}])
    def test_latent_heads_are_blocks_side_by_side(self, options):
        latent, x = LatentMamba2(**LATENT, **options), torch.randn(2, 70, 3, 8)
        heads = [latent.head(i) for i in range(3)]
        y, expected = latent(x), torch.stack([head(x[:, :, i]) for i, head in enumerate(heads)], 2)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        for name, parameter in latent.named_parameters():
            stacked = torch.stack([head.get_parameter(name).grad for head in heads])
            torch.testing.assert_close(parameter.grad, stacked, rtol=1e-4, atol=1e-4 * stacked.abs().max().item())

    def test_a_latent_head_is_a_copy(self):
        latent = LatentMamba2(**LATENT)
        with torch.no_grad():
            latent.head(1).D.fill_(7.0)
        assert (latent.D == 1).all()


class TestInitialisation:
    """Statistics over many channels."""

    @staticmethod
    def mamba(how: str) -> Mamba:
        return Mamba(512, d_state=8, ssm_init=how).requires_grad_(False)

    @staticmethod
    def mamba2(how: str) -> Mamba2:
        return Mamba2(512, d_state=8, headdim=1, ssm_init=how).requires_grad_(False)

    def test_official(self):
        for module, bias in ((m := self.mamba("official"), m.dt_proj.bias), (m := self.mamba2("official"), m.dt_bias)):
            step = steps(bias)
            assert 0.001 * 0.99 <= step.min() < 0.0012
            assert 0.09 < step.max() <= 0.1 * 1.01
            # log-uniform: the mean of the logarithm is in the middle, that of the value is not
            assert step.log().mean().exp() == pytest.approx(0.01, rel=0.1)
            assert (module.D == 1).all()
        mamba = self.mamba("official")
        assert mamba.dt_proj.weight.abs().max() <= 32**-0.5
        assert mamba.dt_proj.weight.std() == pytest.approx(32**-0.5 / math.sqrt(3), rel=0.05)
        torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 9).expand(1024, 8))
        rates = self.mamba2("official").A_log.exp()
        assert 1 <= rates.min() < 1.2
        assert 15.8 < rates.max() <= 16.001

    def test_range_of_steps(self):
        step = steps(Mamba(512, dt_min=0.01, dt_max=0.02, dt_init_floor=0.015).dt_proj.bias)
        assert step.min() == pytest.approx(0.015, rel=1e-3)
        assert step.max() == pytest.approx(0.02, rel=0.01)

    def test_linear(self):
        bias = self.mamba("linear").dt_proj.bias
        assert bias.abs().max() <= 32**-0.5
        assert bias.std() == pytest.approx(32**-0.5 / math.sqrt(3), rel=0.1)
        assert (self.mamba2("linear").dt_bias == 0).all()

    def test_recbole(self):
        mamba = self.mamba("recbole")
        torch.testing.assert_close(steps(mamba.dt_proj.bias), torch.full((1024,), math.log(2)))
        for linear in (mamba.in_proj, mamba.x_proj, mamba.dt_proj, mamba.out_proj):
            assert linear.weight.std() == pytest.approx(0.02, rel=0.05)
        assert mamba.conv1d.weight.abs().max() > 0.4  # untouched: U(±1/2)
        torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 9).expand(1024, 8))
        mamba2 = self.mamba2("recbole")
        assert mamba2.in_proj.weight.std() == pytest.approx(0.02, rel=0.05)
        assert 0.001 * 0.99 <= steps(mamba2.dt_bias).min() < 0.0012  # belongs to no Linear

    def test_xavier(self):
        mamba = self.mamba("xavier")
        for weight in (mamba.in_proj.weight, mamba.x_proj.weight, mamba.dt_proj.weight, mamba.A_log):
            assert weight.std() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.05)
        assert 0.001 * 0.99 <= steps(mamba.dt_proj.bias).min() < 0.0012
        assert (mamba.D == 1).all()

    @pytest.mark.parametrize("how", SSM_INITS)
    def test_latent_blocks_start_like_single_ones(self, how):
        latent = LatentMamba2(256, 16, d_state=4, headdim=1, ssm_init=how).requires_grad_(False)
        single = self.mamba2(how)
        assert latent.dt_bias.mean() == pytest.approx(single.dt_bias.mean().item(), abs=0.3)
        assert (latent.dt_bias[0] != latent.dt_bias[1]).any() or how == "linear"

    @pytest.mark.parametrize("how", SSM_INITS)
    def test_every_start_trains(self, how):
        for block in (Mamba(16, ssm_init=how), Mamba2(16, d_state=8, ssm_init=how)):
            y = block(torch.randn(2, 12, 16))
            y.sum().backward()
            assert y.isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"d_state": 257}, r"d_state: 257 .*at most 256"),
            ({"d_state": 0}, r"d_state: 0 .*integer above 0"),
            ({"d_conv": 5}, r"d_conv: 5 .*2, 3 or 4"),
            ({"d_conv": 1}, r"d_conv: 1 .*2, 3 or 4"),
            ({"expand": 1.5}, r"expand: 1.5 .*integer above 0"),
            ({"ssm_init": "offical"}, r"ssm_init: 'offical' .*did you mean official"),
        ],
    )
    @pytest.mark.parametrize("block", [lambda **o: Mamba(16, **o), lambda **o: LatentMamba2(2, 16, **o)])
    def test_sizes(self, block, options, message):
        with pytest.raises(ConfigError, match=message):
            block(**options)

    def test_mamba(self):
        with pytest.raises(ConfigError, match=r"dt_rank: 'full' "):
            Mamba(16, dt_rank="full")
        with pytest.raises(ConfigError, match=r"d_model: -4 "):
            Mamba(-4)

    def test_mamba2(self):
        with pytest.raises(ConfigError, match=r"headdim: 24 .*must divide the inner width expand·d_model = 64"):
            Mamba2(32, headdim=24)
        with pytest.raises(ConfigError, match=r"ngroups: 3 .*number of heads, 4"):
            Mamba2(32, headdim=16, ngroups=3)
        with pytest.raises(ConfigError, match=r"A_init_range"):
            Mamba2(32, A_init_range=(0, 16))
        with pytest.raises(ConfigError, match=r"n_heads: 0 "):
            LatentMamba2(0, 16)

    def test_default_head_width_divides(self):
        assert [Mamba2(d).headdim for d in (64, 32, 24, 50, 7)] == [64, 64, 48, 50, 14]
