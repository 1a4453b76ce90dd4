"""CFM and DFM: what perfect networks must return."""
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flow import CFM, DFM, Purrception

K = 3


class Fake(nn.Module):
    """A network whose hidden features already are its outputs, f(z, t, y) [B,1,p*p*outputs]."""

    def __init__(self, f, side, outputs, in_channels=4):
        super().__init__()
        self.f, self.input_size, self.num_classes, self.in_channels = f, side, 1, in_channels
        linear = nn.Linear(side * side * outputs, side * side * outputs)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.final_layer = SimpleNamespace(linear=linear)

    def hidden(self, z, t, y):
        return self.f(z, t, y)


def test_cfm_with_a_perfect_network_returns_the_two_points_it_was_taught():
    E = torch.tensor([[2.0, 1.0], [-2.0, -1.0], [9.0, 9.0]])

    def velocity(z, t, y):                                 # of two equally likely points: (E[z1 | z] - z) / (1 - t)
        z, t = z.flatten(1), t[:, None]
        logits = -(z[:, None] - t[:, None] * E[:2]).square().sum(2) / (2 * (1 - t) ** 2)
        return ((logits.softmax(1) @ E[:2] - z) / (1 - t)).unsqueeze(1)

    cfm = CFM(Fake(velocity, 1, 2), E)
    codes = cfm.sample(torch.zeros(2000, dtype=torch.long), steps=100, noise=torch.randn(2000, 2, 1, 1)).flatten()
    share = codes.bincount(minlength=K) / len(codes)
    assert share[2] == 0 and abs(share[0] - 0.5) < 0.05
    z0 = torch.tensor([[0.3, 0.4], [-1.0, 0.2]]).view(2, 2, 1, 1)
    ends = cfm.sample(torch.zeros(2, dtype=torch.long), steps=200, noise=z0)
    assert ends.flatten().tolist() == [0, 1]               # each noise goes to the nearer point


def test_cfm_regresses_z1_minus_z0():
    E, codes = torch.randn(K, 2), torch.tensor([[[0]], [[2]]])
    cfm = CFM(Fake(lambda z, t, y: torch.zeros(2, 1, 2), 1, 2), E, label_dropout=0)
    z0, t = torch.randn(2, 2, 1, 1), torch.tensor([0.2, 0.7])
    loss, parts = cfm(codes, torch.zeros(2, dtype=torch.long), noise=(t, z0, torch.zeros(2, dtype=torch.bool)))
    z1 = E[codes[:, 0, 0]].view(2, 2, 1, 1)
    torch.testing.assert_close(loss, (z1 - z0).square().mean())
    assert list(parts) == ["mse"]


def test_cfm_refuses_what_needs_a_posterior():
    cfm = CFM(Fake(None, 1, 2), torch.randn(K, 2))
    with pytest.raises(ValueError, match="no posterior"):
        cfm.posterior(torch.randn(1, 2, 1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(TypeError):
        cfm.sample(torch.zeros(1, dtype=torch.long), tau=0.9)
    with pytest.raises(TypeError):                         # where the others take tau; not to be taken for cfg
        cfm.sample(torch.zeros(1, dtype=torch.long), 1, 0.9)
    with pytest.raises(TypeError):
        cfm.velocity(torch.randn(1, 2, 1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.long), 0.9)


JOINT = torch.tensor([0.4, 0.0, 0.1, 0.05, 0.25, 0.0, 0.0, 0.1, 0.1]).view(K, K)  # of two positions that depend on each other


class Embedder(nn.Module):
    def forward(self, z):                                  # the codes themselves, for the perfect posterior to read
        return z.unsqueeze(-1).float()


def perfect_dfm():
    """DFM on 1x2 codes, as a 2x2 grid whose lower row is not looked at, with the true posterior of JOINT."""
    table = torch.zeros(K + 1, K + 1, 4, K)
    for a, b in itertools.product(range(K + 1), repeat=2):
        given = JOINT.clone()
        for axis, seen in enumerate((a, b)):
            if seen < K:
                given *= (torch.arange(K) == seen).float().view(*((-1, 1) if axis == 0 else (1, -1)))
        given = given / given.sum().clamp(min=1e-9)
        table[a, b] = torch.stack([given.sum(1), given.sum(0), *[torch.ones(K) / K] * 2])

    def logits(z, t, y):
        a, b = z[:, 0, 0].long().unbind(1)
        return table[a, b].clamp(min=1e-12).log().view(len(z), 1, -1)

    network = Fake(logits, 2, K)
    network.code_embedder = Embedder()
    return DFM(network, torch.randn(K, 2), label_dropout=0)


@pytest.mark.parametrize("steps", [1, 3, 300])
def test_dfm_with_a_perfect_posterior_returns_the_data(steps):
    torch.manual_seed(0)
    n = 20000
    dfm = perfect_dfm()
    codes = dfm.sample(torch.zeros(n, dtype=torch.long), steps=steps)[:, 0]
    assert codes.max() < K                                 # nothing is left masked
    joint = (K * codes[:, 0] + codes[:, 1]).bincount(minlength=K * K).view(K, K) / n
    for axis in (0, 1):                                    # the marginals at any number of steps
        assert (joint.sum(axis) - JOINT.sum(axis)).abs().max() < 0.015
    if steps == 1:                                         # both at once: independent
        assert (joint - JOINT.sum(1, keepdim=True) * JOINT.sum(0)).abs().max() < 0.015
    if steps == 300:                                       # one after the other: the joint
        assert (joint - JOINT).abs().max() < 0.015


def test_the_masked_fraction_at_time_t_is_one_minus_t():
    dfm = perfect_dfm()
    dfm.model.input_size = 100
    codes, t = torch.randint(K, (3, 100, 100)), torch.tensor([0.0, 0.3, 0.9])
    z = dfm.path(dfm.start(3), codes, t)
    masked = (z == K).float().mean((1, 2))
    assert (masked - (1 - t)).abs().max() < 0.02 and masked[0] == 1
    assert (z[z != K] == codes[z != K]).all()


def test_dfm_velocity_moves_masked_positions_only_and_keeps_the_sum():
    dfm = perfect_dfm()
    z = torch.tensor([[[0, K], [K, 1]]])
    with torch.no_grad():
        v = dfm.velocity(z, torch.tensor([0.5]), torch.zeros(1, dtype=torch.long))
    assert v.sum(-1).abs().max() < 1e-5 and (v[0, 0, 0] == 0).all() and (v[0, 1, 1] == 0).all()
    torch.testing.assert_close(v[0, 0, 1, :K], 2 * JOINT[0] / JOINT[0].sum())
    assert v[0, 0, 1, K].item() == pytest.approx(-2)


def test_the_three_networks_differ_at_their_ends_only():
    import train
    meta, counts, ends = {"classes": list("ab")}, {}, {}
    for objective in ("purrception", "cfm", "dfm"):
        args = dict(objective=objective, model="DiT-demo/2", z_loss=1e-5, label_dropout=0.1)
        model = train.build(args, meta, torch.randn(64, 4), 8).model
        ends[objective] = sum(p.numel() for n, p in model.named_parameters()
                              if n.startswith(("x_embedder", "code_embedder", "final_layer.linear")))
        counts[objective] = sum(p.numel() for p in model.parameters()) - ends[objective]
    assert len(set(counts.values())) == 1 and len(set(ends.values())) == 3


def test_purrception_and_cfm_share_their_path():
    E, codes = torch.randn(K, 2), torch.randint(K, (2, 1, 1))
    z0, t = torch.randn(2, 2, 1, 1), torch.rand(2)
    a, b = Purrception(Fake(None, 1, K), E), CFM(Fake(None, 1, 2), E)
    assert torch.equal(a.path(z0, codes, t), b.path(z0, codes, t))


def test_entropy_is_log2_K_for_a_uniform_posterior_and_0_for_a_one_hot():
    for scale, want in ((0.0, 5.0), (1e3, 0.0)):
        fake = Fake(lambda z, t, y: scale * torch.eye(32)[torch.zeros(len(z), 1, dtype=torch.long)], 1, 32)
        bits = Purrception(fake, torch.randn(32, 4)).entropy(torch.randn(2, 4, 1, 1), torch.zeros(2), torch.zeros(2).long())
        assert bits.shape == (2, 1, 1) and (bits - want).abs().max() < 1e-5
