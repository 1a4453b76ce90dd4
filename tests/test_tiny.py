"""The page in demo/tiny.py computes what flow.py does."""
import copy

import pytest
import torch
from torch import nn

from demo import tiny
from flow import Purrception


class Adapter(nn.Module):
    """Offer a network of tiny.py, which has tokens [B,N,d], to flow.py, which has grids."""

    input_size = 8
    patch_size = 1
    num_classes = 10
    in_channels = tiny.d

    def __init__(self, network):
        super().__init__()
        self.final_layer = nn.Module()
        self.final_layer.linear = network.head
        self.body = copy.deepcopy(network)
        self.body.head = nn.Identity()

    def hidden(self, z, t, y):
        return self.body(z.flatten(2).mT, t.view(-1, 1, 1), y.unsqueeze(1))


@pytest.fixture
def pair():
    """A network of random weights, and flow.py's method around the same."""
    torch.manual_seed(0)
    network = tiny.Network(D=32, depth=2)
    nn.init.normal_(network.head.weight)
    nn.init.normal_(network.head.bias)
    return network, Purrception(Adapter(network), tiny.E)


def test_the_loss_is_that_of_flow_py(pair):
    network, flow = pair
    c, y = tiny.codes[::1000], tiny.labels[::1000]
    t, z0, _ = flow.noise(len(c))
    theirs, _ = flow(c.view(-1, 8, 8), y[:, 0], (t, z0, torch.zeros(len(c), dtype=torch.bool)))
    ours = tiny.loss(network, c, y, t.view(-1, 1, 1), z0.flatten(2).mT)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_samples_are_those_of_flow_py(pair):
    network, flow = pair
    y = torch.arange(10)
    z0 = flow.prior(len(y))
    theirs = flow.sample(y, steps=7, tau=0.6, noise=z0)
    ours = tiny.sample(network, y[:, None], z0.flatten(2).mT, T=7, tau=0.6)
    assert ours.equal(theirs.flatten(1))
    assert len(ours.unique()) > 50  # the samples are not trivial
