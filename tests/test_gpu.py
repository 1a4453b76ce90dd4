"""Check on a GPU what differs there: bf16 training, TF32, compiled blocks, batches of pictures, two ranks.

    python -m pytest -m gpu tests                               on a GPU; in any other run GPUs are hidden, and these are skipped
    python -m pytest tests/test_gpu.py --gpu-tests-on cpu       the same bodies on a CPU: they run, but prove little

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import copy
import signal

import pytest
import test_train
import torch
from torch import nn

import vq
from flow import Purrception
from model import DiT

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]    # the compiler warns of exact float32
K, d, SIDE, CLASSES = 512, 4, 16, 10


@pytest.fixture
def device(request):
    device = torch.device(request.config.getoption("--gpu-tests-on"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: pytest -m gpu tests")
    return device


@pytest.fixture
def tf32():
    """Allow TF32 everywhere, as users and NVIDIA's containers do; afterwards restore torch's own settings."""
    handler = signal.getsignal(signal.SIGINT)              # which start_process() replaces
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")
    signal.signal(signal.SIGINT, handler)


def method(device):
    """Build the method around a network of three blocks, its weights drawn, so that no zero hides a mistake."""
    torch.manual_seed(0)
    net = DiT(input_size=SIDE, patch_size=2, in_channels=d, out_channels=K, hidden_size=128, depth=3, num_heads=2,
              num_classes=CLASSES)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    return Purrception(net, torch.randn(K, d)).to(device)


def batch(device, B=8):
    """Draw codes, classes, and the noise of a training step: the same on every device."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(K, (B, SIDE, SIDE), generator=g)
    y = torch.randint(CLASSES, (B,), generator=g)
    t = torch.rand(B, generator=g)
    z0 = torch.randn(B, d, SIDE, SIDE, generator=g)
    drop = torch.rand(B, generator=g) < 0.1
    return [x.to(device) for x in (codes, y, t, z0, drop)]


def step(flow, dtype=None):
    """Compute the loss and the gradients of a training step, under autocast to dtype if given."""
    device = flow.codebook.device
    codes, y, *noise = batch(device)
    if flow.codebook.dtype == torch.float64:
        noise = [x.double() if x.is_floating_point() else x for x in noise]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss, _ = flow(codes, y, noise=noise)
    loss.backward()
    gradients = {name: x.grad.double().cpu() for name, x in flow.named_parameters() if x.requires_grad}
    return loss.item(), gradients


def assert_gradients_close(ours, theirs, off):
    """Compare the norm of each tensor's difference to its own norm."""
    for name, x in theirs.items():
        assert (ours[name] - x).norm() <= off * x.norm(), name


@pytest.mark.parametrize("dtype, off_loss, off", [(None, 1e-4, 5e-3), (torch.bfloat16, 2e-3, 0.05)])
def test_a_training_step_is_close_to_float64(device, dtype, off_loss, off):
    loss, gradients = step(method(device), dtype)          # float32 here includes cuDNN's TF32 in the patch embedding
    exact_loss, exact = step(method("cpu").double())
    assert abs(loss / exact_loss - 1) < off_loss
    assert_gradients_close(gradients, exact, off)


def compiled(flow):
    """Compile the blocks of a copy, one by one, as --compile does."""
    torch._dynamo.reset()
    flow = copy.deepcopy(flow)
    for block in flow.model.blocks:
        block.compile()
    return flow


def test_a_compiled_training_step_is_close_to_an_eager_one(device):
    flow = method(device)
    fast = compiled(flow)
    for dtype, off in ((None, 1e-3), (torch.bfloat16, 0.05)):
        flow.zero_grad()
        fast.zero_grad()
        loss, gradients = step(fast, dtype)
        eager_loss, eager = step(flow, dtype)
        assert abs(loss / eager_loss - 1) < off / 10
        assert_gradients_close(gradients, eager, off)
    assert fast.state_dict().keys() == flow.state_dict().keys()


def test_compiled_sampling_gives_nearly_the_same_codes(device):
    flow = method(device)
    flow.model.final_layer.linear.weight.data.mul_(4)      # sharp posteriors: otherwise all ends in the middle
    _, y, _, z0, _ = batch(device)
    for dtype, same in ((torch.float32, 0.99), (torch.bfloat16, 0.9)):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            codes = flow.sample(y, steps=10, cfg=1.3, noise=z0)
            again = compiled(flow).sample(y, steps=10, cfg=1.3, noise=z0)
        assert (again == codes).float().mean() > same
        assert len(codes.unique()) > 20                    # else they agree for another reason


@pytest.mark.parametrize("started", [False, True])
def test_nearest_codes_are_those_of_float64(device, started, request):
    if started:
        request.getfixturevalue("tf32")
        vq.start_process()                                 # takes it back
    g = torch.Generator().manual_seed(0)
    E = torch.randn(16384, d, generator=g)
    z = torch.randn(4, d, 32, 32, generator=g)
    flow = Purrception(nn.Module(), E).to(device)
    rows = z.movedim(1, -1).flatten(0, 2)
    exact = torch.cat([torch.cdist(x, E.double()).argmin(1) for x in rows.double().split(512)])
    for codes in (vq.nearest_code(rows.to(device), E.to(device)), flow.nearest(z.to(device)).flatten()):
        assert (codes.cpu() != exact).float().mean() < 1e-3              # TF32 changes 1.5 %


@torch.inference_mode()
def tokenizer(device):
    """Build a tokenizer of random weights whose codes are outputs of its encoder, so that images use many."""
    torch.manual_seed(0)
    net = vq.VQ(ch=32, ch_mult=(1, 2, 2), n_embed=1024, num_groups=8).eval()
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    h = net.quant_conv(net.encoder(images)).movedim(1, -1).flatten(0, 2)
    net.quantize.embedding.weight.data.copy_(h[torch.randperm(len(h))[:1024]])
    return net.to(device), images.to(device)


@torch.inference_mode()
def test_tf32_does_not_change_encoded_codes(device, tf32):
    net, images = tokenizer(device)
    vq.start_process()
    torch.backends.cudnn.allow_tf32 = True                 # torch's default
    codes = net.encode(images)
    torch.backends.cudnn.allow_tf32 = False
    assert codes.equal(net.encode(images)) and len(codes.unique()) > 100
    torch.backends.cudnn.allow_tf32 = True
    exact = net.cpu().encode(images.cpu())
    assert (codes.cpu() != exact).float().mean() < 5e-3    # near ties alone


@torch.inference_mode()
def test_pictures_decoded_in_batches_differ_by_a_grey_level_at_most(device):
    net, _ = tokenizer(device)
    codes = torch.randint(1024, (19, 16, 16), generator=torch.Generator().manual_seed(0)).to(device)
    together = vq.decode_pixels(net, codes).int()
    alone = torch.cat([vq.decode_pixels(net, c[None]) for c in codes]).int()
    exact = vq.decode_pixels(net.cpu(), codes.cpu()).int()
    assert together.shape == (19, 64, 64, 3) and together.float().std() > 5
    assert (together - alone).abs().max() <= 1
    assert (together - exact).abs().max() <= 2             # TF32 is allowed here


def test_two_ranks_train_as_one(device, tmp_path, tiny_data):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    test_train.test_two_processes_train_as_one(tmp_path, tiny_data)
