"""The making of the demo: its codebook, and a small data directory whole."""
import json

import numpy as np
import pytest
import torch
from conftest import TINY_VQ

from demo.cats import make
from train import open_data
from vq import VQ, InputError, crop, from_pixels, load_vq, read_image, save_image

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


def test_a_data_directory_is_made_of_any_folder_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "CONFIG", TINY_VQ)
    pictures = np.random.default_rng(0).integers(0, 256, (30, 40, 50, 3), np.uint8)
    for i, picture in enumerate(pictures):
        save_image(tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.png", picture)
    (tmp_path / "photos/a/00.png").write_bytes(b"")
    command = ["--images", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--size", "32",
               "--steps", "3", "--batch-size", "4"]
    make.main(command)
    with pytest.raises(InputError, match="--out .*/out: taken"):
        make.main(command)
    data, vq = open_data(tmp_path / "out", CPU)
    assert data.codes.shape == (27, 4, 4) and data.meta["image_size"] == 32
    assert data.meta["classes"] == ["a", "b"] and data.labels.tolist() == [0] * 13 + [1] * 14
    paths = [f"{name}/{i:02d}.png" for name in "ab" for i in range("ab".index(name), 30, 2) if i]
    first = crop(read_image(tmp_path / "photos" / paths[0]), 32)
    assert (vq.encode(from_pixels(first[None])).numpy() == data.codes[0]).all()
    reference = np.load(tmp_path / "out/reference.npz")["arr_0"]
    held = [crop(read_image(tmp_path / "photos" / path), 32) for path in paths[9::10]]
    assert (reference == held).all()
    val, _ = open_data(tmp_path / "out/val", CPU)
    assert (val.codes == vq.encode(from_pixels(np.stack(held))).numpy()).all()
    assert val.labels.tolist() == [0 if "a/" in path else 1 for path in paths[9::10]]


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
    held_out, labels, _ = make.cats(5, make.HELD_OUT_SEED)
    assert (reference == held_out).all()
    val, _ = open_data(tmp_path / "val", CPU)
    assert (val.labels == labels).all() and val.meta["classes"] == data.meta["classes"]
    assert (val.codes == make.encode(vq, torch.from_numpy(held_out), CPU).numpy()).all()
    ours, committed = (json.loads((folder / "meta.json").read_text())
                       for folder in (tmp_path, make.HERE))
    for meta, folder in ((ours, tmp_path), (committed, make.HERE)):
        assert meta.pop("tokenizer_sha256") == load_vq(folder / "tokenizer.pt").sha256
    assert ours == committed
    assert (tmp_path / "recipe.txt").read_text() == (make.HERE / "recipe.txt").read_text()
