"""Numbers at the edge of what float32 holds: no NaN, and the plain formulas' answers in float64.

The network's logits are whole numbers, exact in float32: what differs from float64 is flow.py's own
rounding. Shapes: B batch, N tokens of one position, D width, K codes, d code dimension.
"""
import copy

import pytest
import torch
from fakes import SIDE, Fake, d, plain_loss, plain_mean, plain_posterior, point
from torch import nn

import flow
import vq


class Whole(Fake):
    """Features of whole numbers, by class and place alone; logits up to about 20 times `scale`."""

    def __init__(self, outputs, classes, scale):
        super().__init__(outputs, patch=1, D=4, classes=classes)
        self.x_embedder = nn.Identity()
        self.place = nn.Parameter(torch.empty(SIDE * SIDE, 4))
        head = self.final_layer.linear
        for x, largest in [(self.y_embedder.weight, 2), (self.place, 1), (head.weight, 3),
                           (head.bias, 2)]:
            x.data = torch.randint(-largest, largest + 1, x.shape).float()
        head.weight.data *= scale
        head.bias.data *= scale

    def hidden(self, z, t, y):
        return self.y_embedder(y)[:, None] + self.place     # [B,N,D]


def build(K=50, classes=5, scale=1.0, **knobs):
    """Build the method, and the same in float64."""
    torch.manual_seed(0)
    f = flow.Purrception(Whole(K, classes, scale), torch.randn(K, d), **knobs)
    return f, copy.deepcopy(f).double()


def draw(f):
    """Draw z, t, classes, among them the last, and codes, among them the last."""
    z, t, y, codes = point(f)
    y[-1] = f.model.num_classes - 1
    codes[0, 0, 0] = len(f.codebook) - 1
    return z, t, y, codes


def assert_close(ours, exact, atol=0.0):
    """Compare relative to the largest entry. atol: for sums of terms of size 1 that cancel."""
    assert ours.isfinite().all()
    error = (ours.double() - exact).abs().max()
    assert error <= 1e-4 * exact.abs().max() + atol


def assert_nearest(f, codes, z, atol):
    """Check that no code is nearer to z [B,d,h,w] than codes are."""
    z = z.double().movedim(1, -1).unsqueeze(-2)
    distance = (z - f.codebook.double()).norm(dim=-1)
    chosen = distance.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    assert (chosen - distance.amin(-1)).max() <= atol


EXTREMES = {
    "plain": {},
    "logits of ten thousand": {"scale": 500.0},
    "as many codes as there may be": {"K": vq.EMPTY},
    "one class": {"classes": 1},
    "ten thousand classes": {"classes": 10_000},
    "one code": {"K": 1},
}
EXTREME = pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)


@EXTREME
@pytest.mark.parametrize("tau", [2 ** -20, 2 ** -10, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@torch.no_grad()
def test_posterior_mean_velocity_and_one_step_are_the_plain_formulas(extreme, tau, cfg):
    f, double = build(**extreme)
    z, _, y, _ = draw(f)
    t = torch.full((3,), 0.75)
    mu = plain_mean(double, z, t, y, tau, cfg)
    assert_close(f.posterior(z, t, y, tau, cfg), plain_posterior(double, z, t, y, tau, cfg))
    assert_close(f.mean(z, t, y, tau, cfg), mu, 1e-6)
    assert_close(f.velocity(z, t, y, tau, cfg), (mu - z) / 0.25)
    assert_nearest(f, f.sample(y, 1, tau, cfg, noise=z), mu, 1e-4)


@EXTREME
@pytest.mark.parametrize("z_loss", [0.0, 1e-5])
def test_loss_and_gradients_are_the_plain_formulas(extreme, z_loss):
    f, double = build(**extreme, z_loss=z_loss)
    z, t, y, codes = draw(f)
    loss, parts = f.loss(z, t, y, codes)
    exact = plain_loss(double.model(z, t, y), codes, z_loss)
    for ours, theirs in zip([loss, parts["ce"], parts["z"]], exact):
        assert_close(ours.detach(), theirs.detach())
    ours = torch.autograd.grad(loss, list(f.parameters()))
    for a, b in zip(ours, torch.autograd.grad(exact[0], list(double.parameters()))):
        assert_close(a, b, 1e-7)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("K, size", [(60, 1.0), (vq.EMPTY, 1.0), (60, 1e-6), (60, 1e6), (1, 1.0)])
def test_nearest_is_the_nearest_even_where_each_code_is_there_twice(K, size, autocast):
    f, _ = build(K)
    f.codebook = (2 + f.codebook) * size                    # not around 0, where squares are small
    f.codebook[K // 2:2 * (K // 2)] = f.codebook[:K // 2]
    z, _, _, codes = draw(f)
    z = (2 + z) * size
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nearest = f.nearest(z)
        again = f.nearest(f.embed(codes))
    assert nearest.shape == codes.shape and nearest.dtype == torch.int64
    assert_nearest(f, nearest, z, 1e-4 * size)
    assert f.embed(again).equal(f.embed(codes))             # whichever of the two


@pytest.mark.parametrize("K", [1, 3, vq.EMPTY])
def test_a_code_of_probability_zero_is_never_picked(K):
    pi = torch.rand(4, K, generator=torch.Generator().manual_seed(0)).softmax(1)
    pi = nn.functional.pad(pi, (1, 1))                      # no first and no last code
    uniform = torch.tensor([0.0, 0.25, 0.75, 1 - 2 ** -24])
    picked = flow.pick(pi, uniform)
    assert picked.shape == (4, 1) and pi.gather(1, picked).all()
    total = pi.double().cumsum(1).gather(1, picked).squeeze(1)
    assert (total > uniform - 1e-4).all()
    assert (total - pi.gather(1, picked).squeeze(1) < uniform + 1e-4).all()
