"""Check fid.py: closed forms of the distance, the published network's shape, every kind of input and refusal."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid

torch.set_num_threads(min(2, torch.get_num_threads()))


# ---------------------------------------------------------------------------------------------- the distance

def covariance(d, seed, n=None):
    x = np.random.default_rng(seed).normal(size=(n or 4 * d, d)) * np.linspace(0.1, 3, d)
    return x.T @ x / len(x)


def test_distance_of_equal_covariances_is_the_squared_distance_of_the_means():
    mu, S = np.arange(16.0), covariance(16, 0)
    assert fid.frechet_distance(mu, S, mu + 0.5, S) == pytest.approx(16 * 0.25, rel=1e-10)


def test_distance_of_a_gaussian_to_itself_is_zero():
    assert 0 <= fid.frechet_distance(np.ones(16), covariance(16, 0), np.ones(16), covariance(16, 0)) < 1e-10


def test_distance_of_diagonal_covariances_is_that_of_the_standard_deviations():
    a, b = np.random.default_rng(0).uniform(0, 4, (2, 32))
    assert fid.frechet_distance(np.zeros(32), np.diag(a), np.zeros(32), np.diag(b)) == pytest.approx(
        np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-10)


def test_distance_is_symmetric():
    a, b = (np.zeros(32), covariance(32, 1)), (np.ones(32), covariance(32, 2, n=9))
    assert fid.frechet_distance(*a, *b) == pytest.approx(fid.frechet_distance(*b, *a), rel=1e-7)


def test_distance_equals_the_formula_with_sqrtm():
    A, B = covariance(64, 1), covariance(64, 2)
    expected = 64 + np.trace(A) + np.trace(B) - 2 * np.trace(scipy.linalg.sqrtm(A @ B)).real
    assert fid.frechet_distance(np.zeros(64), A, np.ones(64), B) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n1, n2", [(20, 30), (20, 200), (200, 20), (1, 20)])
def test_distance_is_right_for_fewer_samples_than_features(n1, n2):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(n1, 64)) / np.sqrt(n1), 2 * rng.normal(size=(n2, 64)) / np.sqrt(n2)
    # With S1 = X^T X and S2 = Y^T Y, tr (S1 S2)^(1/2) is the sum of the singular values of X Y^T.
    expected = np.square(X).sum() + np.square(Y).sum() - 2 * scipy.linalg.svdvals(X @ Y.T).sum()
    assert fid.frechet_distance(np.zeros(64), X.T @ X, np.zeros(64), Y.T @ Y) == pytest.approx(expected, rel=1e-6)


def test_distance_to_a_point_is_the_trace():
    S = covariance(8, 0)
    for a, b in ((S, 0 * S), (0 * S, S)):
        assert fid.frechet_distance(np.zeros(8), a, np.zeros(8), b) == pytest.approx(np.trace(S), rel=1e-10)


@pytest.mark.parametrize("mu, sigma", [((3,), (3, 3)), ((4,), (4,)), ((4, 4), (4, 4)), ((4,), (4, 3))])
def test_distance_refuses_shapes_that_do_not_fit(mu, sigma):
    with pytest.raises(ValueError, match="want mu"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(mu), np.zeros(sigma))


def test_statistics_are_those_of_numpy_in_float64_and_leave_the_features_alone():
    x = 1000 + torch.randn(50, 7, dtype=torch.float64)
    before = x.clone()
    mu, sigma = fid.statistics(x.numpy())
    np.testing.assert_allclose(mu, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)
    assert torch.equal(x, before) and fid.statistics(x.float().numpy())[1].dtype == np.float64


# ---------------------------------------------------------------------------------------------- the network

@pytest.fixture(scope="module")
def published():
    """Make weights of the published shape, random, with batch norms that matter."""
    torch.manual_seed(0)
    net = fid.InceptionV3().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)
    return net


def pixels(n, h, w, seed=0):
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_resize_takes_output_pixel_i_at_i_times_the_ratio():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    x = fid.resize(ramp)
    expected = (torch.arange(299) * 64 / 299).clamp(max=63)    # beyond the last pixel there is only the last pixel
    torch.testing.assert_close(x[0, 0, 17], expected)
    torch.testing.assert_close(fid.resize(ramp.mT)[0, 0, :, 17], expected)
    assert x[0, 0, 0, 298] == 63 and x[0, 0, 0, 1] == pytest.approx(64 / 299)
    half = fid.resize(torch.tensor([[0.0, 10.0], [20.0, 50.0]])[None, None], size=4)[0, 0]
    assert half.tolist() == [[0, 5, 10, 10], [10, 20, 30, 30], [20, 35, 50, 50], [20, 35, 50, 50]]


def test_resize_of_299_pixels_is_the_identity():
    x = pixels(1, 299, 299).float()
    assert torch.equal(fid.resize(x), x)


def test_the_network_has_the_published_keys_and_sizes(published):
    state = {k: v for k, v in published.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 94 * 5 + 2                                       # 94 convolutions with batch norms, and fc
    assert sum(v.numel() for v in state.values()) == 23_885_392           # x 4 bytes + headers = 95,628,359 bytes
    shapes = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,),
              "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5), "Mixed_5d.branch_pool.bn.bias": (64,),
              "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
              "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
              "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
              "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
              "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
              "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
              "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1), "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes


def test_pixels_enter_the_network_as_x_minus_128_over_128_and_batch_norms_have_tensorflows_epsilon(published):
    entered = []
    hook = published.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, x: entered.append(x[0]))
    published(torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    hook.remove()
    assert entered[0].shape == (1, 3, 299, 299) and entered[0].amax((0, 2, 3)).tolist() == [-1, -0.5, 127 / 128]
    assert {m.eps for m in published.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.001}


def test_average_pools_leave_the_padding_out_and_the_last_block_takes_the_maximum(published):
    seen = {}
    with torch.inference_mode():
        for name, c, size in (("Mixed_5b", 192, 9), ("Mixed_6b", 768, 9), ("Mixed_7b", 1280, 8), ("Mixed_7c", 2048, 8)):
            block = published.get_submodule(name)
            x = torch.randn(1, c, size, size)
            padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)   # [1,c,h,w,9]
            inside = padded.isfinite()
            mean = torch.where(inside, padded, 0).sum(-1) / inside.sum(-1)
            out = block(x)[:, -block.branch_pool.conv.out_channels:]
            seen[name] = [kind for kind, pool in (("mean", mean), ("max", padded.amax(-1)))
                          if torch.allclose(out, block.branch_pool(pool), atol=1e-4)]
    assert seen == {"Mixed_5b": ["mean"], "Mixed_6b": ["mean"], "Mixed_7b": ["mean"], "Mixed_7c": ["max"]}


def test_freezing_changes_no_feature(published, tmp_path):
    torch.save(published.state_dict(), tmp_path / "w.pth")
    frozen, x = fid.load_inception(tmp_path / "w.pth"), pixels(2, 40, 56)
    assert not any("bn" in key for key in frozen.state_dict())
    features = frozen(x)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    torch.testing.assert_close(features, published(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(features[1:], frozen(x[1:]), atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match="uint8"):
        frozen(x.float() / 255)


def test_untrained_features_depend_on_the_seed_alone():
    nets = []
    for seed, state in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(state)
        nets.append(fid.untrained_inception(seed).Mixed_7c.branch1x1.conv)
    assert torch.equal(nets[0].weight, nets[1].weight) and not torch.equal(nets[0].weight, nets[2].weight)
    assert nets[0].weight.std() == pytest.approx((2 / 2048) ** 0.5, rel=0.01) and nets[0].bias.abs().max() == 0


# ---------------------------------------------------------------------------------------------- its weights

@pytest.fixture(scope="module")
def weights(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "hub" / "checkpoints" / fid.NAMES[1]
    path.parent.mkdir(parents=True)
    torch.save({k: v for k, v in published.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


def test_loader_finds_either_name_in_the_hub_cache(weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parent.parent))
    assert fid.published_file() == weights
    first = weights.with_name(fid.NAMES[0])
    first.touch()
    assert fid.published_file() == first
    first.unlink()


def test_loader_takes_files_without_num_batches_tracked(weights):
    net = fid.load_inception(weights)                                     # with them: test_freezing_changes_no_feature
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_loader_without_file_or_network_names_the_address_and_the_folder(tmp_path, monkeypatch):
    def offline(url, path, hash_prefix):
        assert (url, hash_prefix) == (fid.URL, fid.SHA256)
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(fid.InputError) as error:
        fid.load_inception()
    assert fid.URL in str(error.value) and str(tmp_path / "checkpoints") in str(error.value)


def torchvision_like(state):
    return {**state, "fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.weight": torch.zeros(1000, 768)}


@pytest.mark.parametrize("change, words", [
    (torchvision_like, ["AuxLogits.fc.weight", "(1000, 768)", "torchvision"]),
    (lambda s: {**s, "AuxLogits.fc.weight": torch.zeros(1000, 768)}, ["AuxLogits.fc.weight", "(1000, 768)", "missing"]),
    (lambda s: {k: v for k, v in s.items() if k != "Mixed_6b.branch1x1.bn.bias"},
     ["Mixed_6b.branch1x1.bn.bias is missing"]),
    (lambda s: {"state_dict": s}, ["cannot be read"]),
    (lambda s: torch.zeros(3), ["cannot be read"]),
], ids=["torchvision", "extra", "missing", "nested", "tensor"])
def test_loader_refuses_another_networks_file(weights, tmp_path, change, words):
    path = tmp_path / "other.pth"
    torch.save(change(torch.load(weights)), path)
    with pytest.raises(fid.InputError) as error:
        fid.load_inception(path)
    assert all(word in str(error.value) for word in [str(path), *words]) and "\n" not in str(error.value)


def test_loader_refuses_damaged_and_malicious_files(weights, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))
    torch.save({"fc.bias": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("evil", "cut", "empty", "text"):
        with pytest.raises(fid.InputError, match=f"{name}.pth cannot be read as weights .* again from"):
            fid.load_inception(tmp_path / f"{name}.pth")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(fid.InputError, match="is no file"):
        fid.load_inception(tmp_path / "nothing.pth")


# ---------------------------------------------------------------------------------------------- the command

class Colours(torch.nn.Module):
    """Stand in for Inception: 5 features of an image, at no cost."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float() / 255
        return torch.cat([x.mean((2, 3)), x[:, :2].std((2, 3))], 1)


@pytest.fixture
def cheap(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "untrained_inception", Colours)
    monkeypatch.setattr(fid, "load_inception", lambda path: Colours())
    monkeypatch.chdir(tmp_path)


def folder(path, n, seed=0, size=(12, 10)):
    path.mkdir(parents=True)
    for i, x in enumerate(pixels(n, size[1], size[0], seed)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path / f"{i:06d}.png")
    return path


def array(path, n, seed=0, **more):
    np.savez(path, arr_0=pixels(n, 10, 12, seed).permute(0, 2, 3, 1).numpy(), **more)
    return path


def run(capsys, *argv):
    """Run the command: -> its number, the last thing printed, and its last line."""
    fid.main([str(arg) for arg in argv] + ["--num-workers", "0", "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    return float(line.split()[-1]), line


def refused(capsys, *argv):
    """Run the command: -> the one sentence with which it ends."""
    with pytest.raises(SystemExit) as stop:
        fid.main([str(arg) for arg in argv] + ["--num-workers", "0", "--device", "cpu"])
    if stop.value.code == 2:                                              # argparse: usage, then the sentence
        return capsys.readouterr().err.splitlines()[-1]
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_a_folder_against_itself_gives_zero_on_the_real_network(tmp_path, capsys):
    images = folder(tmp_path / "images", 3)
    fid.main([str(images), "--ref", str(images), "--features", "untrained", "--num-workers", "1", "--device", "cpu"])
    printed = capsys.readouterr()
    assert abs(float(printed.out.split()[-1])) < 1e-3 and "(not FID) of 3 images" in printed.out
    assert printed.err.count("singular") == 2


def test_folders_and_arrays_of_the_same_images_agree_whatever_the_batch(cheap, tmp_path, capsys):
    a, b = folder(tmp_path / "a", 7), folder(tmp_path / "b", 5, seed=1)
    npz = array(tmp_path / "a.npz", 7)
    value, line = run(capsys, a, "--ref", b, "--json", "out.json")
    assert "FID on Inception features of 7 images" in line and "against 5 " in line and value > 0
    for side in (a, npz):
        for batch in (1, 3, 7, 100):
            run(capsys, side, "--ref", b, "--batch-size", batch, "--json", f"{batch}.json")
            results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("out", batch)]
            assert results[0]["value"] == pytest.approx(results[1]["value"], rel=1e-4)
            assert results[1]["num_samples"] == 7 and results[1]["num_reference"] == 5


def test_worker_processes_read_the_same_images(cheap, tmp_path, capsys):
    a, b = folder(tmp_path / "a", 7), folder(tmp_path / "b", 5, seed=1)
    value, _ = run(capsys, a, "--ref", b)
    fid.main([str(a), "--ref", str(b), "--num-workers", "2", "--batch-size", "2", "--device", "cpu"])
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(value, abs=1e-4)


def test_linked_folders_are_searched_too(cheap, tmp_path, capsys):
    a, b = folder(tmp_path / "a", 7), folder(tmp_path / "b", 5, seed=1)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "class").symlink_to(a)
    assert run(capsys, tmp_path / "links", "--ref", b)[0] == run(capsys, a, "--ref", b)[0]


def test_every_kind_of_image_is_found_and_read(cheap, tmp_path, capsys):
    path = tmp_path / "images"
    for name, mode in (("a/1.PNG", "RGBA"), ("a/2.png", "P"), ("b/3.jpg", "CMYK"), ("b/c/4.JPEG", "L"),
                       ("5.webp", "RGB"), ("6.Bmp", "RGB")):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (200, 30, 30)).convert(mode).save(path / name)
    (path / "notes.txt").write_text("no image")
    _, line = run(capsys, path, "--ref", path)
    assert "of 6 images" in line


def test_saved_statistics_give_the_same_number_as_the_images(cheap, tmp_path, capsys):
    a, b = folder(tmp_path / "a", 7), folder(tmp_path / "b", 5, seed=1)
    value, _ = run(capsys, a, "--ref", b, "--save-stats", "a.npz")
    run(capsys, b, "--ref", a, "--save-stats", "b.npz")
    assert run(capsys, a, "--ref", "b.npz")[0] == value == run(capsys, "a.npz", "--ref", "b.npz")[0]
    assert "of 7 images (a.npz) against 5 " in run(capsys, "a.npz", "--ref", "b.npz")[1]
    assert "but of inception ones" in refused(capsys, a, "--ref", "b.npz", "--features", "untrained")


def test_statistics_beside_images_are_what_counts(cheap, tmp_path, capsys):
    """ADM's reference batch: 10,000 images, and the statistics of the whole training set."""
    a, S = folder(tmp_path / "a", 7), np.eye(5)
    adm = array(tmp_path / "adm.npz", 4, mu=np.full(5, 3.0), sigma=S, mu_s=np.zeros(9))
    np.savez(tmp_path / "plain.npz", mu=np.full(5, 3.0), sigma=S)
    value, line = run(capsys, a, "--ref", adm)
    assert value == run(capsys, a, "--ref", "plain.npz")[0] and "an unknown number of" in line
    assert value != run(capsys, a, "--ref", adm, "--features", "untrained")[0]      # foreign statistics are Inception's


def demo(tmp_path, **meta):
    samples = folder(tmp_path / "samples", 6)
    (tmp_path / "data").mkdir()
    array(tmp_path / "data" / "reference.npz", 5, seed=1)
    (tmp_path / "data" / "meta.json").write_text(json.dumps({"reference": "reference.npz", **meta}))
    (tmp_path / "samples.json").write_text(json.dumps({"data": "data", "num_samples": 6}))
    return samples


def test_reference_and_features_are_found_through_the_sidecar(cheap, tmp_path, capsys):
    demo(tmp_path, features="untrained")
    value, line = run(capsys, "samples/")
    assert line.startswith("Fréchet distance on untrained features (not FID) of 6 images (samples) against 5 ")
    assert value == run(capsys, "samples", "--ref", "data/reference.npz", "--features", "untrained")[0]
    assert run(capsys, "samples", "--features", "inception")[1].startswith("FID on Inception features")
    (tmp_path / "data" / "meta.json").write_text('{"reference": "reference.npz", "features": "clip"}')
    assert "'clip'" in refused(capsys, "samples")
    (tmp_path / "data" / "meta.json").write_text('{"reference": "reference.npz", "features": "untrained"}')
    array(tmp_path / "samples.npz", 6)                                    # the same sidecar serves samples.npz
    assert run(capsys, "samples.npz")[0] == value


def test_the_references_statistics_are_kept_and_used_until_the_images_change(cheap, tmp_path, capsys, monkeypatch):
    demo(tmp_path, features="untrained")
    value, _ = run(capsys, "samples")
    measured, statistics = [], fid.statistics
    monkeypatch.setattr(fid, "statistics", lambda features: measured.append(len(features)) or statistics(features))
    assert run(capsys, "samples")[0] == value and measured == [6]
    array(tmp_path / "data" / "reference.npz", 4, seed=2)
    assert run(capsys, "samples")[0] != value and measured == [6, 6, 4]
    assert [p.name for p in (tmp_path / "data").glob("*stats*")] == ["reference.untrained-stats.npz"]

    def full(*args, **about):
        raise OSError("disk full")
    array(tmp_path / "data" / "reference.npz", 3, seed=3)
    monkeypatch.setattr(fid, "save_statistics", full)
    fid.main(["samples", "--num-workers", "0", "--device", "cpu"])
    assert "cannot be kept for the next run: disk full" in capsys.readouterr().err


def test_samples_without_a_reference_are_told_to_name_one(cheap, tmp_path, capsys):
    samples = folder(tmp_path / "samples", 3)
    sidecar = tmp_path / "samples.json"
    assert "--ref" in refused(capsys, samples)
    for content in ({}, {"data": None}, {"data": "gone", "num_samples": 3}, [1], {"data": [1]}, {"data": "x", "num_samples": "many"}):
        sidecar.write_text(json.dumps(content))
        assert "--ref" in refused(capsys, samples) and str(sidecar) in refused(capsys, samples)
    (tmp_path / "meta.json").write_text('{"reference": null}')
    sidecar.write_text(json.dumps({"data": str(tmp_path), "num_samples": 3}))
    assert "--ref" in refused(capsys, samples)
    (tmp_path / "meta.json").write_text("{")
    assert "meta.json is no JSON dictionary" in refused(capsys, samples)
    sidecar.write_text("{")
    assert "--ref" in refused(capsys, samples) and str(sidecar) in refused(capsys, samples)


def test_another_programs_json_beside_the_samples_does_not_stand_in_the_way(cheap, tmp_path, capsys):
    samples = folder(tmp_path / "samples", 3)
    for text in ("[1, 2]", "{", '{"data": [1]}', '{"num_samples": "many"}'):
        (tmp_path / "samples.json").write_text(text)
        assert run(capsys, samples, "--ref", samples)[0] == pytest.approx(0, abs=1e-6)


def test_the_result_does_not_replace_the_sidecar(cheap, tmp_path, capsys):
    demo(tmp_path)
    before = (tmp_path / "samples.json").read_text()
    assert "--json samples.json" in refused(capsys, "samples", "--json", "samples.json")
    assert (tmp_path / "samples.json").read_text() == before


def test_unfinished_samples_are_refused(cheap, tmp_path, capsys):
    samples = demo(tmp_path)
    array(tmp_path / "samples.npz", 5)                     # written whole or not at all, so what it holds is what was wanted
    assert run(capsys, "samples.npz")[0] > 0
    (samples / "000003.png").unlink()
    assert "holds 5 of the 6 images" in refused(capsys, "samples")


def test_every_bad_input_is_refused_in_one_sentence(cheap, tmp_path, capsys):
    good = folder(tmp_path / "good", 3)
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "one", 1)
    folder(tmp_path / "mixed", 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "000001.png")
    for name, content in (("text", b"no image"), ("cut", (good / "000001.png").read_bytes()[:200])):
        (folder(tmp_path / name, 3) / "000001.png").write_bytes(content)
    np.savez("keys.npz", images=np.zeros(3))
    np.savez("float.npz", arr_0=np.zeros((4, 8, 8, 3), np.float32))
    np.savez("planes.npz", arr_0=np.zeros((4, 3, 8, 8), np.uint8))
    np.savez("pickled.npz", arr_0=np.array([{}, {}]))
    np.savez("nan.npz", mu=np.full(5, np.nan), sigma=np.eye(5))
    np.savez("flat.npz", mu=np.zeros(5), sigma=np.zeros(5))
    np.savez("words.npz", mu=np.full(5, "a"), sigma=np.full((5, 5), "b"))
    np.savez("half.npz", mu=np.zeros(5))
    np.savez("wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "cut.npz").write_bytes(array(tmp_path / "whole.npz", 9).read_bytes()[:900])
    (tmp_path / "image.png").write_bytes((good / "000000.png").read_bytes())
    for bad, words in {
            "missing": ["missing is neither"], "missing.npz": ["missing.npz is neither"], "image.png": ["is neither"],
            "empty": ["empty holds 0 images"], "one": ["one holds 1 images"],
            "mixed": ["mixed/000001.png is (8, 8)", "mixed/000000.png (12, 10)"],
            "text": ["text/000001.png cannot be read"], "cut": ["cut/000001.png cannot be read"],
            "keys.npz": ["keys.npz holds neither"], "float.npz": ["float.npz: arr_0 is float32 (4, 8, 8, 3)"],
            "planes.npz": ["planes.npz: arr_0 is uint8 (4, 3, 8, 8)"], "pickled.npz": ["pickled.npz cannot be read"],
            "nan.npz": ["nan.npz: mu", "finite"], "flat.npz": ["flat.npz: mu (5,) and sigma (5,)"],
            "words.npz": ["words.npz: mu", "finite"], "half.npz": ["half.npz holds neither", "name another"],
            "wide.npz": ["wide.npz", "9", "5"], "text.npz": ["text.npz cannot be read"],
            "cut.npz": ["cut.npz cannot be read"],
    }.items():
        for argv in ((bad, "--ref", good), (good, "--ref", bad)):
            sentence = refused(capsys, *argv)
            assert all(word in sentence for word in words), sentence


def test_a_bad_image_in_a_worker_process_is_refused_in_one_sentence(cheap, tmp_path, capsys):
    bad = folder(tmp_path / "bad", 5)
    (bad / "000003.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        fid.main([str(bad), "--ref", str(bad), "--num-workers", "2", "--batch-size", "2", "--device", "cpu"])
    assert "000003.png cannot be read" in stop.value.code and "\n" not in stop.value.code


def test_bad_flags_are_refused(cheap, tmp_path, capsys, monkeypatch):
    good = folder(tmp_path / "good", 3)
    Path("stats.npz").mkdir()
    for argv, word in ((["--batch-size", 0], "--batch-size"), (["--json", "no/where.json"], "no/where.json is a folder, or lies in no folder"),
                       (["--json", "good"], "good is a folder"), (["--save-stats", "stats.npz"], "stats.npz is a folder"),
                       (["--save-stats", "stats.dat"], "end in .npz"), (["--features", "clip"], "--features"),
                       (["--features", "untrained", "--weights", "w.pth"], "--weights")):
        assert word in refused(capsys, good, "--ref", good, *argv)
    with pytest.raises(SystemExit):
        fid.main([str(good), "--ref", str(good), "--device", "abacus"])
    assert "--device abacus" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, good, "--ref", good)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), fid.replacing(tmp_path / "out.json") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "out.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_nothing_of_the_project_is_imported():
    command = "import fid, sys; sys.exit(bool({'vq', 'model', 'flow', 'train', 'sample'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command], cwd=Path(fid.__file__).parent).returncode == 0
