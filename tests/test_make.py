"""The making of the demo: its optimizer, its codebook, and a small data directory whole."""
import numpy as np
import pytest
import torch
from conftest import TINY_VQ

from demo.cats import make
from train import open_data
from vq import VQ, from_pixels

CPU = torch.device("cpu")


@pytest.fixture
def vq():
    torch.manual_seed(0)
    return VQ(**TINY_VQ)


def test_muon_moves_a_kernel_equally_along_all_its_singular_vectors(vq):
    before = {name: p.detach().clone() for name, p in vq.named_parameters()}
    vq.quantize.embedding.weight.requires_grad_(False)
    opt = make.MuonAndAdamW(vq, lr=0.5, steps=10**6)
    z = vq.quant_conv(vq.encoder(torch.randn(4, 3, 64, 64)))
    vq.decoder(vq.post_quant_conv(z)).square().mean().backward()
    opt.step()
    moved = {name: p.detach() - before[name] for name, p in vq.named_parameters()}
    step = moved["decoder.mid.block_1.conv1.weight"].flatten(1)
    sizes = torch.linalg.svdvals(step) / (0.5 / 100)        # the first of 100 warm-up steps
    assert sizes.min() > 0.5 and sizes.max() < 1.5          # Newton and Schulz give no more
    assert not moved.pop("quantize.embedding.weight").any()
    assert all(delta.any() for name, delta in moved.items() if "attn" not in name)


def test_standardising_the_codes_changes_no_code_and_no_picture(vq):
    torch.nn.init.normal_(vq.quantize.embedding.weight, mean=2, std=0.3)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        codes = vq.encode(x)
        picture = vq.decode(codes)
        make.standardise(vq)
        assert torch.equal(vq.encode(x), codes)
        torch.testing.assert_close(vq.decode(codes), picture, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vq.codebook.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(vq.codebook.square().mean(), torch.tensor(1.0))


def test_a_small_demo_is_made_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "CONFIG", TINY_VQ)
    make.main(["--out", str(tmp_path), "--num-images", "20", "--num-reference", "5",
               "--steps", "3", "--batch-size", "4"])
    data, vq = open_data(tmp_path, CPU)
    images, labels, _ = make.cats(20, make.TRAIN_SEED)
    codes = make.encode(vq, torch.from_numpy(images), CPU)
    assert (data.codes == codes.numpy()).all() and (data.labels == labels).all()
    assert vq.decode(vq.encode(from_pixels(images))).isfinite().all()
    reference = np.load(tmp_path / "reference.npz")["arr_0"]
    assert (reference == make.cats(5, make.HELD_OUT_SEED)[0]).all()
    for name in "recipe.txt", "meta.json":                  # as they are committed
        assert (tmp_path / name).read_text() == (make.HERE / name).read_text()
