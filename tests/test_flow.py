"""Check flow.py: the loss against the plain formulas, the limits of the posterior, the steps of the sampler.

Shapes: B batch, h w grid, N tokens of G positions, D width, K codes, d code dimension.
"""
import contextlib
import inspect
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flow
from flow import Purrception, linear_cross_entropy
from model import DiT
from train import seeded

ROOT = Path(__file__).resolve().parent.parent
K = 11         # codes
d = 3          # their dimension
p = 2          # side of a patch
SIDE = 4       # of the grid
CLASSES = 5


class Fake(nn.Module):
    """All that flow.py asks of a network; it remembers what it was called with."""

    def __init__(self, D=8, K=K):
        super().__init__()
        self.input_size = SIDE
        self.patch_size = p
        self.num_classes = CLASSES
        self.calls = []
        self.x = nn.Conv2d(d, D, p, p)
        self.y = nn.Embedding(CLASSES + 1, D)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(D, p * p * K)

    def hidden(self, z, t, y):
        self.calls.append((z.detach().clone(), t, y))
        x = self.x(z).flatten(2).transpose(1, 2)                         # [B,N,D]
        return torch.tanh(x + self.y(y)[:, None] + t[:, None, None])


def method(seed=0, scale=3.0, **knobs):
    """Build the method around a fake network of random weights and a random codebook."""
    torch.manual_seed(seed)
    net = Fake()
    with torch.no_grad():
        net.final_layer.linear.weight.mul_(scale)
    return Purrception(net, torch.randn(K, d), **knobs)


def point(B=3):
    """Draw z, t, y and the codes at the end of the path."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(B, d, SIDE, SIDE, generator=g)
    t = torch.rand(B, generator=g)
    y = torch.randint(CLASSES, (B,), generator=g)
    codes = torch.randint(K, (B, SIDE, SIDE), generator=g)
    return z, t, y, codes


def plain_logits(f, z, t, y):
    """Compute all logits [B,h,w,K], position by position: first the patch, then the place within it."""
    head = f.model.final_layer.linear
    out = F.linear(f.model.hidden(z, t, y), head.weight, head.bias).view(len(z), -1, p * p, K)
    rows = []
    for i in range(SIDE):
        row = [out[:, i // p * (SIDE // p) + j // p, i % p * p + j % p] for j in range(SIDE)]
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def plain_posterior(f, z, t, y, tau=1.0, cfg=1.0):
    c = plain_logits(f, z, t, y)
    u = plain_logits(f, z, t, torch.full_like(y, CLASSES))
    return ((u + cfg * (c - u)) / tau).softmax(3)


def plain_mean(f, *args):
    return torch.einsum("bhwk,kd->bdhw", plain_posterior(f, *args), f.codebook)


def plain_loss(logits, target, z_weight):
    """Compute cross-entropy plus z-loss of logits [...,K], all at once, and its two parts."""
    logits = logits.reshape(-1, logits.shape[-1])
    ce = F.cross_entropy(logits, target.reshape(-1))
    z = z_weight * logits.logsumexp(1).square().mean()
    return ce + z, ce, z


# ------------------------------------------------------------------------ the head from the codebook

def test_a_shaped_head_starts_with_logits_linear_in_the_code_vectors_and_their_squares():
    f = method()
    before = f.model.final_layer.linear.weight.clone()
    f.shape_head()
    weight = f.model.final_layer.linear.weight
    assert weight.requires_grad and not weight.equal(before)
    E = f.codebook
    basis = torch.cat([E, E.square()], 1)
    basis = (basis - basis.mean(0)) / basis.std(0)
    places = [W.T for W in weight.split(K)]
    for W in places:                                       # no more than phi_k, and a mean of zero over the codes
        A = torch.linalg.lstsq(basis.double(), W.T.double()).solution
        torch.testing.assert_close(basis.double() @ A, W.T.double(), atol=1e-5, rtol=0)
        assert W.mean(1).abs().max() < 1e-5
    assert not places[0].equal(places[1])


def test_equal_codes_start_with_equal_finite_logits():
    f = method()
    f.codebook.fill_(0.3)
    f.shape_head()
    for W in f.model.final_layer.linear.weight.split(K):
        assert W.isfinite().all() and W.equal(W[:1].expand_as(W))


def test_features_of_unit_size_start_with_logits_whose_variance_is_that_of_2d_unit_numbers():
    torch.manual_seed(0)
    net = DiT(input_size=2, patch_size=2, hidden_size=512, depth=1, num_heads=2, num_classes=2, in_channels=4, out_channels=3000)
    f = Purrception(net, torch.randn(3000, 4))
    f.shape_head()
    logits = torch.randn(64, 512) @ net.final_layer.linear.weight.T
    assert logits.var().item() == pytest.approx(8, rel=0.15)


# ------------------------------------------------------------------------ linear_cross_entropy

def head_inputs(rows, groups=1, D=6, K=9, dtype=torch.float64, scale=1.0):
    """Draw h, weight and bias, which want gradients, and targets."""
    g = torch.Generator().manual_seed(2)
    shapes = (rows, D), (groups * K, D), (groups * K,)
    inputs = [torch.randn(shape, generator=g, dtype=dtype) * scale for shape in shapes]
    target = torch.randint(K, (rows, groups) if groups > 1 else (rows,), generator=g)
    return [x.requires_grad_() for x in inputs], target


def plain_head(h, W, b, target, z_weight=1e-5):
    groups = target[0].numel()
    return plain_loss(F.linear(h, W, b).view(len(h), groups, -1), target, z_weight)


def gradients(loss, inputs, scale=1.0):
    return torch.autograd.grad(loss * scale, inputs)


def assert_same(ours, theirs, rtol=1e-6):
    """Compare tensor by tensor, relative to the largest entry."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 11])         # a chunk holds four
@pytest.mark.parametrize("z_weight", [0.0, 1e-5, 0.5])
def test_value_and_gradients_equal_the_plain_formula(monkeypatch, rows, groups, z_weight):
    monkeypatch.setattr(flow, "CHUNK", 4 * 9)
    inputs, target = head_inputs(rows, groups)
    ours = linear_cross_entropy(*inputs, target, z_weight)
    theirs = plain_head(*inputs, target, z_weight)
    assert_same(ours, theirs)
    assert_same(gradients(ours[0], inputs, 3.0), gradients(theirs[0], inputs, 3.0))


def test_any_shape_of_positions_will_do():
    (h, W, b), target = head_inputs(12, 3)
    flat = linear_cross_entropy(h, W, b, target)[0]
    boxed = linear_cross_entropy(h.view(2, 6, -1), W, b, target.view(2, 6, 3))[0]
    assert flat.equal(boxed)
    assert gradients(boxed, [h])[0].equal(gradients(flat, [h])[0])
    noncontiguous = h.detach().view(2, 6, -1).transpose(0, 1)
    their_target = target.view(2, 6, 3).transpose(0, 1)
    assert_same([linear_cross_entropy(noncontiguous, W, b, their_target)[0]], [flat])


def test_the_loss_may_be_scaled_and_sent_back_again():
    inputs, target = head_inputs(7)
    loss = linear_cross_entropy(*inputs, target)[0]
    expected = gradients(plain_head(*inputs, target)[0], inputs)
    for scale in (-2.5, 1.0, 3.0):
        weight = torch.tensor(scale, dtype=torch.float64)
        scaled = torch.autograd.grad(loss, inputs, weight, retain_graph=True)
        assert_same(scaled, [scale * x for x in expected])


def test_gradients_are_the_slopes_of_the_value():
    inputs, target = head_inputs(3, 2)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, target, 0.1)[0], inputs)


def test_gradients_add_up_in_grad_as_autograd_s_do():
    inputs, target = head_inputs(7)
    for _ in range(2):
        linear_cross_entropy(*inputs, target)[0].backward()
    once = gradients(plain_head(*inputs, target)[0], inputs)
    assert_same([x.grad for x in inputs], [2 * x for x in once])


def test_only_the_sum_carries_gradients():
    inputs, target = head_inputs(7)
    loss, ce, z = linear_cross_entropy(*inputs, target)
    assert loss.requires_grad and not ce.requires_grad and not z.requires_grad


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_inputs_may_be_frozen(wanted):
    inputs, target = head_inputs(7)
    mixed = [x if i in wanted else x.detach() for i, x in enumerate(inputs)]
    chosen = [inputs[i] for i in wanted]
    ours = gradients(linear_cross_entropy(*mixed, target)[0], chosen)
    assert_same(ours, gradients(plain_head(*inputs, target)[0], chosen))


def test_gradients_reach_what_computed_h():
    (h, W, b), target = head_inputs(7)
    ours = linear_cross_entropy(torch.sin(h) * 2, W, b, target)[0]
    theirs = plain_head(torch.sin(h) * 2, W, b, target)[0]
    assert_same(gradients(ours, [h]), gradients(theirs, [h]))


def test_no_gradients_are_formed_when_none_are_wanted():
    inputs, target = head_inputs(64, groups=2)
    of_gradients = {"mm"}
    with Memory() as with_gradients:
        loss = linear_cross_entropy(*inputs, target)[0]
    assert of_gradients <= with_gradients.names
    without = Memory()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, without:
            quiet = linear_cross_entropy(*inputs, target)[0]
        assert quiet.equal(loss.detach()) and not quiet.requires_grad
    with without:
        frozen = linear_cross_entropy(*[x.detach() for x in inputs], target)[0]
    assert frozen.equal(loss.detach()) and not frozen.requires_grad
    assert not of_gradients & without.names


def test_huge_logits_stay_finite():
    inputs, target = head_inputs(9, dtype=torch.float32, scale=100.0)
    ours = linear_cross_entropy(*inputs, target)
    theirs = plain_head(*inputs, target)
    assert_same(ours, theirs, 1e-5)
    assert_same(gradients(ours[0], inputs), gradients(theirs[0], inputs), 1e-4)


def test_float32_is_close_to_float64():
    inputs, target = head_inputs(200)
    single = [x.detach().float().requires_grad_() for x in inputs]
    a = linear_cross_entropy(*single, target)
    b = linear_cross_entropy(*inputs, target)
    assert_same([x.double() for x in a], b, 1e-6)
    assert_same([x.double() for x in gradients(a[0], single)], gradients(b[0], inputs), 1e-5)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_under_autocast_only_the_product_is_bf16(monkeypatch, features):
    monkeypatch.setattr(flow, "CHUNK", 4 * 9)              # fifty chunks, summed in float32
    inputs, target = head_inputs(200, groups=2, dtype=torch.float32)
    h = inputs[0].detach().to(features).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(h, *inputs[1:], target)
        logits = F.linear(h, *inputs[1:])
    assert logits.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in ours)
    theirs = plain_loss(logits.float().view(200, 2, -1), target, 1e-5)
    assert_same([x.detach() for x in ours], [x.detach() for x in theirs], 1e-5)
    a = gradients(ours[0], [h, *inputs[1:]])
    b = gradients(plain_head(*inputs, target)[0], inputs)
    assert [x.dtype for x in a] == [features, torch.float32, torch.float32]
    assert_same([x.float() for x in a], b, 0.01)


@pytest.mark.filterwarnings("ignore")       # the compiler's own
@pytest.mark.slow
def test_torch_compile_agrees():
    inputs, target = head_inputs(20, groups=2)

    def step(h, W, b):
        return linear_cross_entropy(torch.sin(h), W, b, target)[0] * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    assert_same([compiled(*inputs)], [step(*inputs)], 0)
    assert_same(gradients(compiled(*inputs), inputs), gradients(step(*inputs), inputs), 0)


@pytest.mark.slow
def test_scripts_start_without_loading_the_compiler():
    command = "import sys, sample, fid; sys.exit('torch._dynamo' in sys.modules)"    # it takes a second
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


class Memory(TorchDispatchMode):
    """Watch operations: their names, the largest tensor made, and the most numbers alive at once."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.largest = self.peak = 0
        self.live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        theirs = {x.untyped_storage().data_ptr() for x in given}
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in theirs:
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                if id(storage) not in self.live:
                    weakref.finalize(storage, self.live.pop, id(storage), None)
                    self.live[id(storage)] = storage.nbytes() // x.element_size()
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_memory_is_bounded_by_the_chunk_not_by_the_positions(monkeypatch):
    codes = 256
    chunk = 8 * codes
    monkeypatch.setattr(flow, "CHUNK", chunk)
    peaks = []
    for rows in (256, 1024):
        inputs, target = head_inputs(rows, groups=2, D=8, K=codes, dtype=torch.float32)
        with Memory() as memory:
            gradients(linear_cross_entropy(*inputs, target)[0], inputs, 2.0)
        assert memory.largest <= max(chunk, *(x.numel() for x in inputs))
        assert "_log_softmax" not in memory.names
        kept = 2 * sum(x.numel() for x in inputs)          # the gradients, and those scaled
        peaks.append(memory.peak - kept)
    assert max(peaks) < 6 * chunk < 256 * 2 * codes // 10


# ------------------------------------------------------------------------ tokens, positions, chunks

@pytest.mark.parametrize("patch", [1, 2, 4])
def test_to_tokens_orders_codes_as_the_network_and_to_grid_undoes_it(patch):
    codes = torch.arange(2 * 8 * 12).view(2, 8, 12)
    tokens = flow.to_tokens(codes, patch)
    assert tokens.shape == (2, 96 // patch ** 2, patch ** 2)
    for n in range(tokens.shape[1]):
        i = n // (12 // patch) * patch
        j = n % (12 // patch) * patch
        assert tokens[1, n].tolist() == codes[1, i:i + patch, j:j + patch].flatten().tolist()
    pairs = torch.stack([tokens, -tokens], 3).flatten(0, 1)              # [BN,G,2]
    assert flow.to_grid(pairs, patch, (8, 12)).equal(torch.stack([codes, -codes], 3))


@pytest.mark.parametrize("chunk", [1, 9, 35, 36, 40, 1000])
@pytest.mark.parametrize("N, G", [(1, 1), (7, 1), (8, 4), (13, 3)])
def test_chunks_cover_every_place_once_and_hold_no_more_than_a_chunk(monkeypatch, N, G, chunk):
    monkeypatch.setattr(flow, "CHUNK", chunk)
    visits = torch.zeros(N, G)
    for tokens, g in flow.chunks(N, G, 9, torch.device("cpu")):
        visits[tokens, g] += 1
        held = len(range(N)[tokens])
        assert 1 <= held <= max(1, chunk // 9)             # one row at least, whatever it holds
    assert visits.equal(torch.ones(N, G))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_loss_and_posterior_agree_with_the_whole_networks_logits(patch):
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=patch, in_channels=d, out_channels=K, hidden_size=16, depth=1,
              num_heads=2, num_classes=CLASSES)
    for x in net.parameters():
        if x.requires_grad:
            nn.init.normal_(x, std=0.3)
    f = Purrception(net, torch.randn(K, d))
    z, t, y = torch.randn(2, d, 8, 8), torch.rand(2), torch.tensor([0, 4])
    codes = torch.randint(K, (2, 8, 8))
    assert_same([f.loss(z, t, y, codes)[0]], plain_loss(net(z, t, y), codes, 1e-5)[:1], 1e-5)
    c = net(z, t, y)
    u = net(z, t, torch.full_like(y, CLASSES))
    expected = ((u + 1.7 * (c - u)) / 0.8).softmax(3)
    torch.testing.assert_close(f.posterior(z, t, y, tau=0.8, cfg=1.7), expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------ training

def test_zero_initialised_network_starts_at_ln_k():
    codes = torch.randint(512, (2, 8, 8))
    net = DiT(input_size=8, patch_size=2, in_channels=d, out_channels=512, hidden_size=16, depth=1,
              num_heads=2, num_classes=CLASSES)
    loss, parts = Purrception(net, torch.randn(512, d))(codes, torch.tensor([0, 1]))
    assert parts["ce"].item() == pytest.approx(math.log(512), abs=1e-6)
    assert parts["z"].item() == pytest.approx(1e-5 * math.log(512) ** 2, abs=1e-8)
    assert loss.item() == pytest.approx(parts["ce"].item() + parts["z"].item(), abs=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-5, 0.1])
def test_loss_at_a_point_equals_the_plain_formula_with_its_gradients(z_loss):
    f = method(z_loss=z_loss).double()
    z, t, y, codes = point()
    z, t = z.double(), t.double()
    loss, parts = f.loss(z, t, y, codes)
    total, ce, z_part = plain_loss(plain_logits(f, z, t, y), codes, z_loss)
    assert list(parts) == ["ce", "z"]
    assert_same([loss, parts["ce"], parts["z"]], [total, ce, z_part])
    weights = list(f.parameters())
    assert_same(torch.autograd.grad(loss, weights), torch.autograd.grad(total, weights))


def test_forward_trains_on_the_straight_path_from_noise_to_the_codes():
    f = method(label_dropout=0.0)
    f.codebook *= 300                                      # a time a little off shows as noise far off
    B = 2000
    codes = torch.randint(K, (B, SIDE, SIDE))
    y = torch.randint(CLASSES, (B,))
    loss, _ = f(codes, y, torch.Generator().manual_seed(0))
    z, t, seen = f.model.calls[0]
    assert z.dtype == t.dtype == torch.float32 and t.shape == (B,) and seen.equal(y)
    assert 0 <= t.min() and t.max() < 1
    u = t.sort().values                                    # Kolmogorov's distance of t to U(0,1)
    assert (u - (torch.arange(B) + 0.5) / B).abs().max() < 1.95 / B ** 0.5
    s = t.view(-1, 1, 1, 1)
    z0 = (z - s * f.codebook[codes].movedim(3, 1)) / (1 - s)
    z0 = z0[t < 0.9].flatten(1)
    assert abs(z0.mean()) < 0.02 and abs(z0.std() - 1) < 0.02
    assert (torch.corrcoef(z0.T) - torch.eye(z0.shape[1])).abs().max() < 0.15  # every position its own noise
    assert loss.equal(f.loss(z, t, y, codes)[0])


def test_forward_draws_its_noise_by_noise_or_takes_what_it_is_given():
    f = method(label_dropout=0.5)
    _, _, y, codes = point()
    t, z0, drop = f.noise(3, torch.Generator().manual_seed(0))
    assert t.shape == drop.shape == (3,) and drop.dtype == torch.bool and z0.shape == (3, d, SIDE, SIDE)
    drawn, _ = f(codes, y, torch.Generator().manual_seed(0))
    given, _ = f(codes, y, noise=[t, z0, drop])
    expected, _ = f.loss(f.path(z0, codes, t), t, y.masked_fill(drop, CLASSES), codes)
    assert drawn.equal(expected) and given.equal(expected)


def test_logit_normal_times_have_that_mean_and_spread_and_leave_the_rest_alone():
    f, B = method(), 4000
    plain = f.noise(B, torch.Generator().manual_seed(0))
    t, z0, drop = f.noise(B, torch.Generator().manual_seed(0), logit_normal=True)
    assert z0.equal(plain[1]) and drop.equal(plain[2])
    expected = torch.distributions.Normal(0, 1).cdf(t.logit())
    torch.testing.assert_close(expected, plain[0], atol=1e-5, rtol=0)                      # the same quantiles
    assert abs(t.logit().mean()) < 0.05 and abs(t.logit().std() - 1) < 0.05


def test_noise_that_is_given_may_be_of_any_grid():
    f = method()
    del f.model.input_size                                 # hidden() and the head are enough to train on
    codes = torch.randint(K, (2, 2, 6))
    t, z0, y = torch.rand(2), torch.randn(2, d, 2, 6), torch.tensor([0, 1])
    given, _ = f(codes, y, noise=(t, z0, torch.zeros(2, dtype=torch.bool)))
    assert given.equal(f.loss(f.path(z0, codes, t), t, y, codes)[0])


def test_the_prior_is_drawn_where_its_generator_is():
    f = method()
    expected = torch.randn(2, d, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    for device in ("cpu", "meta"):                         # the codebook's; sample.py draws on the CPU
        assert f.to(device).prior(2, torch.Generator().manual_seed(3)).equal(expected)
    assert f.prior(2).device.type == "meta"


def test_forward_is_a_function_of_the_generator_s_seed_alone():
    f, codes, y = method(), point()[3], torch.tensor([0, 1, 2])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (f(codes, y, torch.Generator().manual_seed(seed))[0].item() for seed in (5, 5, 6))
    assert a == b != c and before.equal(torch.get_rng_state())
    assert f(codes, y)[0].item() != f(codes, y)[0].item()  # without one, torch's own goes on


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labels_are_dropped_at_the_given_rate(rate):
    f, B = method(label_dropout=rate), 4000
    y = torch.randint(CLASSES, (B,))
    before = y.clone()
    f(torch.zeros(B, SIDE, SIDE, dtype=torch.int64), y)
    assert y.equal(before)
    seen = f.model.calls[0][2]
    dropped = seen == CLASSES
    assert seen[~dropped].equal(y[~dropped])
    assert abs(dropped.float().mean().item() - rate) <= 5 * math.sqrt(rate * (1 - rate) / B)


def test_loss_at_a_point_drops_no_labels():
    f, (z, t, y, codes) = method(label_dropout=1.0), point()
    f.loss(z, t, y, codes)
    assert f.model.calls[0][2].equal(y)


def test_defaults_are_the_papers():
    def default(call, name):
        return inspect.signature(call).parameters[name].default

    assert default(Purrception, "z_loss") == default(linear_cross_entropy, "z_weight") == 1e-5
    assert default(Purrception, "label_dropout") == 0.1
    assert default(Purrception.sample, "steps") == 100
    assert default(Purrception.sample, "tau") == 0.9
    assert default(Purrception.posterior, "tau") == 1.0


def test_the_codebook_is_frozen_and_kept_out_of_checkpoints():
    f = method()
    assert not any("codebook" in name for name, _ in [*f.named_parameters(), *f.state_dict().items()])
    assert not f.codebook.requires_grad and f.codebook.dtype == torch.float32


def test_ddp_computes_the_same_gradients(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        f, codes, y = method(), point()[3], torch.tensor([0, 1, 2])
        loss, _ = f(codes, y, torch.Generator().manual_seed(0))
        expected = torch.autograd.grad(2 * loss, list(f.parameters()))
        ddp = nn.parallel.DistributedDataParallel(f)
        for context in (ddp.no_sync(), contextlib.nullcontext()):        # a step of two accumulated halves
            with context:
                ddp(codes, y, torch.Generator().manual_seed(0))[0].backward()
        assert_same([x.grad for x in f.parameters()], expected, 1e-6)
        del ddp                                            # else it may hang, if it is the group's last owner
    finally:
        dist.destroy_process_group()


def test_seeded_generators_are_a_function_of_their_key():
    keys = (1, 2), (1, 2), (2, 1), (1, 2, 3)
    a, b, c, e = (torch.rand(4, generator=seeded("cpu", *key)) for key in keys)
    assert a.equal(b) and not a.equal(c) and not a.equal(e)


# ------------------------------------------------------------------------ posterior, mean and velocity

@pytest.mark.parametrize("tau, cfg", [(1, 1), (0.7, 1), (1, 0), (0.9, 1.3), (0.5, 4), (1, -1)])
def test_posterior_is_the_softmax_of_guided_logits_over_tau(tau, cfg):
    f, (z, t, y, _) = method(), point()
    pi = f.posterior(z, t, y, tau, cfg)
    assert pi.shape == (3, SIDE, SIDE, K)
    torch.testing.assert_close(pi.sum(3), torch.ones(3, SIDE, SIDE))
    torch.testing.assert_close(pi, plain_posterior(f, z, t, y, tau, cfg))


def test_guidance_of_zero_forgets_the_class():
    f, (z, t, y, _) = method(), point()
    null = torch.full_like(y, CLASSES)
    torch.testing.assert_close(f.posterior(z, t, y, cfg=0.0), f.posterior(z, t, null))


def test_low_temperature_is_the_arg_max_and_high_is_uniform():
    f, (z, t, y, _) = method(), point()
    best = plain_logits(f, z, t, y).argmax(3)
    assert f.posterior(z, t, y, tau=1e-7).equal(F.one_hot(best, K).float())
    torch.testing.assert_close(f.posterior(z, t, y, tau=1e7), torch.full((3, SIDE, SIDE, K), 1 / K))
    v = f.velocity(z, torch.zeros(3), y, tau=1e7)
    torch.testing.assert_close(v, f.codebook.mean(0).view(1, d, 1, 1) - z)


@pytest.mark.parametrize("tau, cfg", [(1.0, 1.0), (0.9, 1.3)])
def test_velocity_points_from_z_to_the_mean_and_arrives_at_one(tau, cfg):
    f, (z, t, y, _) = method(), point()
    s = t.view(-1, 1, 1, 1)
    mu = plain_mean(f, z, t, y, tau, cfg)
    torch.testing.assert_close(f.mean(z, t, y, tau, cfg), mu, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f.velocity(z, t, y, tau, cfg), (mu - z) / (1 - s), atol=1e-5, rtol=1e-5)


def test_velocity_of_the_true_posterior_is_the_paths_own():
    codes = torch.randint(K, (1, SIDE, SIDE))
    f = oracle(codes)
    z0, t = torch.randn(1, d, SIDE, SIDE), torch.tensor([0.3])
    z1 = f.codebook[codes].movedim(3, 1)
    z = 0.3 * z1 + 0.7 * z0
    torch.testing.assert_close(f.velocity(z, t, torch.tensor([0])), z1 - z0)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_float64_goes_all_the_way_through(cfg):
    f, (z, t, y, _) = method().double(), point()
    z, t = z.double(), t.double()
    v = f.velocity(z, t, y, 0.7, cfg)
    assert v.dtype == f.posterior(z, t, y, 0.7, cfg).dtype == torch.float64
    exact = (plain_mean(f, z, t, y, 0.7, cfg) - z) / (1 - t.view(-1, 1, 1, 1))
    torch.testing.assert_close(v, exact, atol=1e-12, rtol=1e-12)
    single = method().velocity(z.float(), t.float(), y, 0.7, cfg)
    torch.testing.assert_close(v.float(), single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_posterior_and_mean_are_float32_under_autocast(cfg):
    f, (z, _, y, _) = method(scale=30.0), point()
    t = torch.zeros(3)
    with torch.autocast("cpu", torch.bfloat16):
        pi = f.posterior(z, t, y, 0.9, cfg)
        mu = f.mean(z, t, y, 0.9, cfg)
        v = f.velocity(z, t, y, 0.9, cfg)
    assert pi.dtype == mu.dtype == v.dtype == torch.float32
    torch.testing.assert_close(pi.sum(3), torch.ones(3, SIDE, SIDE))
    exact = torch.einsum("bhwk,kd->bdhw", pi.double(), f.codebook.double()).float()
    torch.testing.assert_close(mu, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v + z, exact, atol=1e-5, rtol=1e-5)
    full = plain_posterior(f, z, t, y, 0.9, cfg)
    assert (pi - full).abs().max() < 0.1 * cfg             # the features may be bf16


# ------------------------------------------------------------------------ sampling

def oracle(codes):
    """Build a method that knows the answer: its posterior is one-hot at codes [1,h,w] for any z, t and y."""
    f, N = method(), (SIDE // p) ** 2
    head = f.model.final_layer.linear = nn.Linear(N, p * p * K)
    with torch.no_grad():                                  # token n's features are the n-th unit vector
        head.bias.zero_()
        head.weight.copy_(1000 * F.one_hot(flow.to_tokens(codes, p)[0], K).flatten(1).T)
    f.model.hidden = lambda z, t, y: torch.eye(N).expand(len(z), N, N)
    return f


@pytest.mark.parametrize("steps, tau, cfg", [(1, 1.0, 1.0), (7, 0.9, 1.0), (10, 0.9, 3.0)])
def test_a_one_hot_posterior_returns_its_codes_whatever_the_noise(steps, tau, cfg):
    codes = torch.randint(K, (1, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    noise = 50 * torch.randn(3, d, SIDE, SIDE)
    sampled = oracle(codes).sample(torch.tensor([0, 1, 2]), steps, tau, cfg, noise)
    assert sampled.equal(codes.expand(3, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_steps_are_calls_at_s_over_t_and_the_last_lands_on_the_mean(steps, cfg):
    f, (z, _, y, _) = method(), point()
    landed = []
    f.nearest = lambda z: landed.append(z) or Purrception.nearest(f, z)
    f.sample(y, steps, 0.9, cfg, noise=z)
    calls, f.model.calls = f.model.calls, []
    assert len(calls) == steps and len(landed) == 1
    for s, (zs, ts, ys) in enumerate(calls):
        assert len(zs) == len(ts) == len(ys) == (3 if cfg == 1 else 6)
        torch.testing.assert_close(ts, torch.full_like(ts, s / steps))
        if cfg == 1:
            assert ys.equal(y)
        else:
            assert zs[:3].equal(zs[3:])
            assert sorted(ys.tolist()) == sorted([*y.tolist(), *[CLASSES] * 3])
        torch.testing.assert_close(zs[:3], z, atol=1e-5, rtol=1e-5)
        mu = plain_mean(f, z, torch.full((3,), s / steps), y, 0.9, cfg)
        z = z + (mu - z) / (1 - s / steps) / steps         # Euler, by hand
    torch.testing.assert_close(landed[0], mu, atol=1e-5, rtol=1e-5)


def test_sample_is_a_function_of_the_noise_image_by_image():
    f, (z, _, y, _) = method(), point()
    codes = f.sample(y, 5, noise=z)
    assert codes.shape == (3, SIDE, SIDE) and codes.dtype == torch.int64 and not codes.is_inference()
    assert codes.equal(f.sample(y, 5, noise=z))
    assert codes.equal(torch.cat([f.sample(y[i:i + 1], 5, noise=z[i:i + 1]) for i in range(3)]))
    assert not codes.equal(f.sample(y, 5, noise=z.flip(0)))
    torch.manual_seed(0)
    a, b = f.sample(y, 5), f.sample(y, 5)
    torch.manual_seed(0)
    assert a.equal(f.sample(y, 5)) and not a.equal(b)


def test_sample_leaves_the_given_noise_alone_and_keeps_no_graph():
    f, (z, _, y, _) = method(), point()
    before, keeps_graph = z.clone(), []
    f.nearest = lambda z: keeps_graph.append(z.requires_grad) or Purrception.nearest(f, z)
    f.sample(y, 3, noise=z)
    assert z.equal(before) and keeps_graph == [False]


@pytest.mark.parametrize("chunk", [1, K, 5 * K, 12 * K, 13 * K])
def test_chunks_change_no_result(monkeypatch, chunk):
    f, (z, t, y, codes) = method(), point()

    def results():
        return (f.posterior(z, t, y, 0.9, 1.5), f.mean(z, t, y, 0.9, 1.5), f.velocity(z, t, y, 0.9, 1.5),
                f.loss(z, t, y, codes)[0])

    whole, sampled, near = results(), f.sample(y, 5, cfg=1.5, noise=z), f.nearest(z)
    monkeypatch.setattr(flow, "CHUNK", chunk)
    for a, b in zip(results(), whole):
        torch.testing.assert_close(a, b)
    assert f.sample(y, 5, cfg=1.5, noise=z).equal(sampled) and f.nearest(z).equal(near)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")       # the compiler's own
def test_the_compiled_loss_agrees(monkeypatch):
    (h, W, b), target = head_inputs(300, groups=4, K=50)
    want = [*torch.autograd.grad(linear_cross_entropy(h, W, b, target, 1e-3)[0], (h, W, b)), linear_cross_entropy(h, W, b, target, 1e-3)[0]]
    monkeypatch.setattr(flow, "softmax_part", flow.softmax_part)         # restored afterwards
    monkeypatch.setattr(flow, "CHUNK", 128 * 50)                         # three chunks, the last a smaller one
    flow.compile_loss()
    got = [*torch.autograd.grad(linear_cross_entropy(h, W, b, target, 1e-3)[0], (h, W, b)), linear_cross_entropy(h, W, b, target, 1e-3)[0]]
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


def test_sampling_memory_is_bounded_by_the_chunk(monkeypatch):
    codes, chunk, B = 400, 20 * 400, 256
    f = Purrception(Fake(K=codes), torch.randn(codes, d))
    z, y = torch.randn(B, d, SIDE, SIDE), torch.zeros(B, dtype=torch.int64)
    monkeypatch.setattr(flow, "CHUNK", chunk)
    with Memory() as memory:
        f.sample(y, 2, cfg=1.5, noise=z)
    assert memory.largest == 2 * z.numel()                 # z, with and without the class: more than a chunk
    with torch.no_grad(), Memory() as memory:
        f.nearest(z)
    assert memory.largest <= max(chunk, z.numel())


@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_equals_brute_force(autocast):
    f = method()
    f.codebook = 3 + torch.randn(500, d) * 0.2             # far from the origin, where squares round
    z = 3 + torch.randn(4, d, 6, 8) * 0.3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = f.nearest(z)
    distance = (z.double().movedim(1, 3)[..., None, :] - f.codebook.double()).square().sum(4)
    chosen = distance.gather(3, codes[..., None])[..., 0]
    assert codes.shape == (4, 6, 8) and codes.dtype == torch.int64
    assert (chosen - distance.amin(3)).max() < 1e-4
    assert (codes == distance.argmin(3)).float().mean() > 0.99
    assert f.nearest(f.codebook[codes].movedim(3, 1)).equal(codes)
