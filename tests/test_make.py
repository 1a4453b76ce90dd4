"""The making of the demo: its codebook, and a small data directory whole."""
import json

import numpy as np
import torch
from conftest import TINY_VQ

from demo.cats import make
from train import open_data
from vq import VQ, from_pixels, load_vq

CPU = torch.device("cpu")


def test_standardising_the_codes_changes_no_code_and_no_picture():
    torch.manual_seed(0)
    vq = VQ(**TINY_VQ)
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
    ours, committed = (json.loads((folder / "meta.json").read_text())
                       for folder in (tmp_path, make.HERE))
    for meta, folder in ((ours, tmp_path), (committed, make.HERE)):
        assert meta.pop("tokenizer_sha256") == load_vq(folder / "tokenizer.pt").sha256
    assert ours == committed
    assert (tmp_path / "recipe.txt").read_text() == (make.HERE / "recipe.txt").read_text()
