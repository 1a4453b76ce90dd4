"""Small things to train on: a tokenizer of a few thousand weights, and forty code grids."""
import json
import os

import numpy as np
import pytest
import torch

import model
from vq import VQ

TINY_VQ = dict(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, n_embed=32, embed_dim=4,
               num_groups=4)


def pytest_addoption(parser):
    parser.addoption("--gpu-tests-on", default="cuda", choices=("cuda", "cpu"),
                     help="where tests/test_gpu.py runs")


def pytest_configure(config):
    """Hide the GPUs from every run but that of `pytest -m gpu`, before anything looks for them."""
    config.addinivalue_line("markers", "gpu: needs a GPU; chosen by -m gpu")
    config.addinivalue_line("markers", "slow: takes many seconds; left out by -m 'not slow'")
    config.addinivalue_line("filterwarnings", "error")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def tiny_vq(tmp_path):
    """The path of a random tokenizer, 32 codes of 4 numbers, 8x8 pixels each."""
    torch.manual_seed(0)
    path = tmp_path / "tiny_vq.pt"
    torch.save({"config": TINY_VQ, "state_dict": VQ(**TINY_VQ).state_dict()}, path)
    return path


@pytest.fixture
def tiny_data(tmp_path, tiny_vq):
    """A data directory: forty 4x4 grids of three classes, and a reference of eight images."""
    path, rng = tmp_path / "tiny", np.random.default_rng(0)
    path.mkdir()
    labels = rng.integers(0, 3, 40)
    np.save(path / "labels.npy", labels)
    codes = 7 * labels[:, None, None] + rng.integers(0, 3, (40, 4, 4))
    np.save(path / "codes.npy", codes.astype(np.uint16))
    np.savez(path / "reference.npz", arr_0=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    meta = dict(tokenizer=str(tiny_vq), image_size=32, classes=["black", "white", "ginger tabby"],
                reference="reference.npz")
    (path / "meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture
def tiny_size(monkeypatch):
    """The name of a network small enough for a test: patches of two, width 32, two blocks."""
    tiny = dict(depth=2, hidden_size=32, num_heads=2, patch_size=2)
    monkeypatch.setitem(model.SIZES, "tiny", tiny)
    return "tiny"
