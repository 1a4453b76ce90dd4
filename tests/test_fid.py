"""Test fid.py: closed forms of the distance, the published network, all kinds of sets."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import vq

# ----- the distance

X, Y = np.random.default_rng(0).normal(size=(2, 128, 32)) * np.linspace(0.1, 3, 32)
A, B = X.T @ X / 128, Y.T @ Y / 128
VARIANCES = np.random.default_rng(0).uniform(0, 4, (2, 32))


@pytest.mark.parametrize("shift, S1, S2, expected", [
    (0, A, A, 0),               # to itself
    (0.5, A, A, 32 * 0.25),     # of equal covariances: the squared distance of the means
    (0, A, 0 * A, np.trace(A)), (0, 0 * A, A, np.trace(A)),     # to a point and from it
    (0, *map(np.diag, VARIANCES), np.square(np.subtract(*np.sqrt(VARIANCES))).sum()),
    (1, A, B, 32 + np.trace(A) + np.trace(B) - 2 * np.trace(scipy.linalg.sqrtm(A @ B)).real)])
def test_distance_in_closed_form(shift, S1, S2, expected):
    value = fid.frechet_distance(np.arange(32), S1, np.arange(32) + shift, S2)
    assert value >= 0 and value == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("n1, n2", [(20, 30), (20, 200), (1, 20)])
def test_distance_is_right_for_fewer_samples_than_features_and_symmetric(n1, n2):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n1, 64)) / np.sqrt(n1)
    Y = rng.normal(size=(n2, 64)) / np.sqrt(n2) * 2
    # With S1 = X^T X and S2 = Y^T Y, tr (S1 S2)^(1/2) is the sum of the singular values of X Y^T.
    expected = np.square(X).sum() + np.square(Y).sum() - 2 * scipy.linalg.svdvals(X @ Y.T).sum()
    mu = np.zeros(64)
    value = fid.frechet_distance(mu, X.T @ X, mu, Y.T @ Y)
    assert value == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(mu, Y.T @ Y, mu, X.T @ X) == pytest.approx(value, rel=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_distance_refuses_numbers_that_are_not_finite_and_other_sizes(bad):
    right = np.zeros(4), np.eye(4)
    row = np.array([0, bad, 0, 0])
    for wrong in ((row, np.eye(4)), (np.zeros(4), np.eye(4) + row), (np.zeros(3), np.eye(3))):
        for four in (*right, *wrong), (*wrong, *right):
            with pytest.raises(ValueError):
                fid.frechet_distance(*four)


def test_statistics_are_those_of_numpy_in_float64_and_leave_the_features_alone():
    x = 1000 + np.random.default_rng(0).normal(size=(50, 7))
    before = x.copy()
    mu, sigma = fid.statistics(x)
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    assert np.array_equal(x, before) and fid.statistics(np.float32(x))[1].dtype == np.float64


# ----- the network

# The published file: convolutions in the order in which they run, each with a batch norm, and fc.
CONVS = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
for blocks, steps in {
    "5b 5c 5d": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "6b 6c 6d 6e": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "7b 7c": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}.items():
    CONVS += [f"Mixed_{block}.branch{step}" for block in blocks.split() for step in steps.split()]
TENSORS = "conv.weight bn.weight bn.bias bn.running_mean bn.running_var".split()
PUBLISHED = [f"{conv}.{tensor}" for conv in CONVS for tensor in TENSORS] + ["fc.weight", "fc.bias"]


def as_published(net):
    """Return the network's state under the published names, without the help of our_name."""
    return dict(zip(PUBLISHED, net.state_dict().values(), strict=True))


def random_inception():
    """Make a network of random weights, with batch norms that matter."""
    torch.manual_seed(0)
    net = fid.InceptionV3().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.normal_(0, 0.1)
            module.num_batches_tracked = None  # the published file may lack it
    return net


@pytest.fixture(scope="module")
def network():
    return random_inception()


def images(n, height=10, width=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def test_resize_takes_output_pixel_i_at_i_times_the_ratio():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    expected = (torch.arange(299) * 64 / 299).clamp(max=63)  # beyond the last pixel: the last
    torch.testing.assert_close(fid.resize(ramp)[0, 0, 17], expected)
    torch.testing.assert_close(fid.resize(ramp.mT)[0, 0, :, 17], expected)
    half = fid.resize(torch.tensor([[0.0, 10.0], [20.0, 50.0]])[None, None], size=4)[0, 0]
    assert half.tolist() == [
        [0, 5, 10, 10], [10, 20, 30, 30], [20, 35, 50, 50], [20, 35, 50, 50]]


def test_published_keys_become_ours_one_to_one_and_the_sizes_agree(network):
    assert [fid.our_name(key) for key in PUBLISHED] == list(network.state_dict())
    state = as_published(network)
    assert sum(x.numel() for x in state.values()) == 23_885_392
    shapes = {"5b.branch5x5_2": (64, 48, 5, 5), "6c.branch7x7_3": (192, 160, 7, 1),
              "6c.branch7x7dbl_5": (192, 160, 1, 7), "7c.branch3x3_2a": (384, 384, 1, 3)}
    assert {key: state[f"Mixed_{key}.conv.weight"].shape for key in shapes} == shapes


def test_pixels_enter_as_x_minus_128_over_128_and_batch_norms_have_tensorflows_epsilon(network):
    entered = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    network(torch.tensor([0, 64, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    hook.remove()
    assert entered[0].shape == (1, 3, 299, 299)
    assert entered[0].amax((0, 2, 3)).tolist() == [-1, -0.5, 127 / 128]
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.001}


@pytest.mark.parametrize("name, c, kind", [
    ("Mixed_5b", 192, "mean"), ("Mixed_6b", 768, "mean"),
    ("Mixed_7b", 1280, "mean"), ("Mixed_7c", 2048, "max")])
def test_average_pools_leave_the_padding_out_and_the_last_block_takes_the_maximum(
        network, name, c, kind):
    x = torch.randn(1, c, 9, 9)
    windows = F.pad(x, [1] * 4, value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    inside = windows.isfinite()
    means = torch.where(inside, windows, 0).sum(-1) / inside.sum(-1)
    pooled = means if kind == "mean" else windows.amax(-1)
    block = network.get_submodule(name)
    expected = block["branch_pool"][1](pooled)
    torch.testing.assert_close(block(x)[:, -expected.shape[1]:], expected, atol=1e-4, rtol=0)


def test_loading_and_freezing_change_no_feature(network, tmp_path):
    counters = {f"{conv}.bn.num_batches_tracked": torch.tensor(0) for conv in CONVS}
    path = tmp_path / "w.pth"  # a legacy file, as the published one is
    torch.save(as_published(network) | counters, path, _use_new_zipfile_serialization=False)
    frozen = fid.load_inception(path)
    x = torch.from_numpy(images(2, 40, 56)).movedim(3, 1)
    features = frozen(x)
    assert features.shape == (2, 2048) and not features.requires_grad and not frozen.training
    torch.testing.assert_close(features, network(x), atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match="uint8"):
        frozen(x.float() / 255)


# ----- its weights

def test_weights_come_from_the_hub_cache_or_a_download_or_are_refused_in_a_sentence(
        network, tmp_path, monkeypatch):
    def offline(url, path, hash_prefix, **_):
        assert url == fid.URL and hash_prefix.startswith("6726825d")
        raise OSError("no route to host")

    def refused(word, path=None):
        with pytest.raises(fid.InputError, match=word) as error:
            fid.load_inception(path)
        assert fid.URL in str(error.value) and "\n" not in str(error.value)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refused("no route to host")
    path = tmp_path / "checkpoints" / fid.URL.split("/")[-1]
    torch.save(network, path)  # a pickle that calls its class
    refused("weights_only")
    state = as_published(network)
    torch.save(state, path)
    assert torch.equal(fid.load_inception().fc.weight, network.fc.weight)
    for key, x in ("AuxLogits.fc.weight", torch.zeros(9)), ("fc.weight", torch.zeros(1000, 2048)):
        torch.save(state | {key: x}, tmp_path / "torchvision.pth")
        refused(key, tmp_path / "torchvision.pth")


# ----- the command

class Colours(torch.nn.Module):
    """Stand in for Inception: five features of an image, at no cost."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float()
        return torch.cat([x.mean((2, 3)), x[:, :2].std((2, 3))], 1)


def folder(path, n, seed=0):
    Path(path).mkdir()
    for i, x in enumerate(images(n, seed=seed)):
        Image.fromarray(x).save(f"{path}/{i:06d}.png")


def record(name, **more):  # as sample.py does
    Path(f"{name}.json").write_text(json.dumps({"num_samples": 1} | more))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the command beside the folders a and b, of 7 and 5 images; return its last line."""
    monkeypatch.setattr(fid, "load_inception", lambda path: Colours())
    monkeypatch.chdir(tmp_path)
    folder("a", 7)
    folder("b", 5, seed=1)

    def run(*argv):
        fid.main([str(x) for x in argv])
        line = capsys.readouterr().out.splitlines()[-1]
        return float(line.split()[-1]), line
    yield run
    fid.inception.cache_clear()


def test_a_set_gives_the_same_number_as_folder_array_or_statistics(run, monkeypatch):
    np.savez("a.npz", arr_0=images(7))
    expected, line = run("a", "--ref", "b", "--save-stats", "a.dat")
    assert line.startswith("FID ") and expected > 1
    fid.main(["b", "--save-stats", "b.npz"])  # no reference: no number
    for batch in (1, 3, 100):
        monkeypatch.setattr(fid, "BATCH", batch)
        for one, other in itertools.product(("a", "a.npz", "a.dat"), ("b", "b.npz")):
            value, line = run(one, "--ref", other)
            assert value == pytest.approx(expected, rel=1e-4)
            assert f"7 images ({one})" in line and f"5 ({other})" in line and "few" not in line


def test_images_are_found_in_all_folders_below_and_cropped_if_asked_for(run):
    for path in (Path("sizes/1.PNG"), Path("more/d/2.jpeg")):
        path.parent.mkdir(parents=True)
        Image.linear_gradient("L").resize((36 if path.suffix == ".PNG" else 24, 24)).save(path)
    Path("sizes/link").symlink_to(Path("more").absolute())
    with pytest.raises(fid.InputError, match="--size"):
        run("sizes", "--ref", "b")
    with pytest.raises(SystemExit, match="2"):
        run("sizes", "--ref", "b", "--size", -5)
    value, line = run("sizes", "--ref", "b", "--size", 8)
    assert "2 images (sizes)" in line and "few images: biased" in line  # fewer than features
    assert run("sizes", "--ref", "b", "--size", 24)[0] != value


def test_pictures_are_read_as_vq_py_reads_them(run):
    """The same ramp in 8 and 16 bits, with a hidden colour and on white, upright and turned."""
    ramp = np.arange(120, dtype=np.uint8).reshape(10, 12)
    alpha = np.dstack([ramp, np.where(ramp < 60, 0, 255).astype(np.uint8)])
    exif = Image.Exif()
    exif[274] = 3
    kinds = {
        "plain": Image.fromarray(ramp), "deep": Image.fromarray(ramp.astype(np.uint16) * 257),
        "turned": Image.fromarray(ramp[::-1, ::-1].copy()),
        "white": Image.fromarray(np.where(ramp < 60, 255, ramp).astype(np.uint8)),
        "clear": Image.fromarray(alpha)}
    for name, image in kinds.items():
        Path(name).mkdir()
        for i in range(3):
            image.save(f"{name}/{i}.png", exif=exif if name == "turned" else None)
    for same, other in (("plain", "deep"), ("plain", "turned"), ("white", "clear")):
        assert run(same, "--ref", other)[0] < 1e-6
    assert run("plain", "--ref", "white")[0] > 1


def test_a_reference_that_holds_weights_is_measured_by_them(run, capsys):
    torch.manual_seed(0)
    net = fid.CatFeatures().eval()
    state = {name: x.numpy() for name, x in net.state_dict().items()}
    cats = images(9, 64, 64)
    Path("cats").mkdir()
    for i, x in enumerate(cats):
        Image.fromarray(x).save(f"cats/{i}.png")
    with torch.no_grad():
        features = net(vq.from_pixels(cats)).numpy()
    mu, sigma = fid.statistics(features + 1)
    np.savez("real.npz", mu=mu, sigma=sigma, count=9, **state)
    value, line = run("cats", "--ref", "real.npz", "--save-stats", "same.npz")
    assert value == pytest.approx(64, rel=1e-3) and "distance (not FID)" in line
    np.testing.assert_allclose(np.load("same.npz")["mu"], features.mean(0), atol=1e-7)
    assert run("cats", "--ref", "same.npz")[0] < 1e-3  # it holds the weights, too
    fid.main(["real.npz", "--save-stats", "again.npz"])
    assert "distance (not FID)" in run("real.npz", "--ref", "again.npz")[1]
    with pytest.raises(fid.InputError, match=r"cats/0.png: is \(32, 32, 3\), not \(64, 64, 3\)"):
        run("cats", "--ref", "real.npz", "--size", "32")
    fid.main(["a", "--save-stats", "a.npz"])
    with pytest.raises(fid.InputError, match="a.npz, real.npz: cannot be compared"):
        run("a.npz", "--ref", "real.npz")


def test_what_other_real_images_score_stands_beside_the_distance(run, capsys):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 5))
    mu, sigma = fid.statistics(real)
    np.savez("real.npz", mu=mu, sigma=sigma, count=400, others=rng.normal(size=(9, 5)))
    fid.main(["a", "--ref", "real.npz"])
    floor, last = capsys.readouterr().out.splitlines()
    assert "of 7 other real images" in floor and "7 images (a) to 400 (real.npz)" in last
    others = np.load("real.npz")["others"][:7]
    expected = fid.frechet_distance(*fid.statistics(others), mu, sigma)
    assert float(floor.split()[-1]) == pytest.approx(expected, abs=1e-4)


def test_statistics_beside_images_are_what_counts(run):
    """ADM's reference batch: 10,000 images, and the statistics of the whole training set."""
    foreign = {"mu": np.full(5, 3.0), "sigma": np.eye(5)}
    np.savez("adm.npz", arr_0=images(5, seed=1), **foreign)
    np.savez("plain.npz", **foreign)
    value, line = run("a", "--ref", "adm.npz")
    assert value == run("a", "--ref", "plain.npz")[0] and "unknown (adm.npz)" in line


def test_the_reference_is_what_sample_py_recorded(run):
    record("a", reference="b", num_samples=7)
    _, line = run("a/")
    assert "7 images (a)" in line and "5 (b)" in line
    np.savez("a.npz", arr_0=images(7))  # perhaps not of these images
    with pytest.raises(fid.InputError, match="a.npz: .*--ref"):
        run("a.npz")
    (Path("a") / "000003.png").unlink()
    with pytest.raises(fid.InputError, match="a: images are missing"):
        run("a")
    for text in ("", "[1]", '{"num_samples": "seven", "reference": "b"}',
                 '{"num_samples": 7, "reference": 5}', '{"num_samples": 7, "reference": null}'):
        Path("a.json").write_text(text)
        with pytest.raises(fid.InputError, match="--ref"):
            run("a")


def test_a_mistyped_folder_is_named_before_the_reference_is_measured(run, monkeypatch):
    monkeypatch.setattr(fid, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(fid.InputError, match="nosuch: unreadable folder"):
        fid.main(["nosuch", "--ref", "b"])


@pytest.mark.parametrize("bad", ["missing", "cut.npz", "float.npz", "one"])
def test_what_is_no_set_of_images_is_refused_by_name(bad, run):
    folder("one", 1)
    np.savez("cut.npz", arr_0=images(9))
    Path("cut.npz").write_bytes(Path("cut.npz").read_bytes()[:900])
    np.savez("float.npz", arr_0=images(4) / 255)
    for argv in ([bad, "--ref", "a"], ["a", "--ref", bad]):
        with pytest.raises(fid.InputError, match=rf"^{bad}: [^\n]*\Z"):
            run(*argv)
