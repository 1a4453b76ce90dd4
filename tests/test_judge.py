"""The judge: its figures have closed forms, and its committed weights read real cats."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fid
from demo.cats import cats
from study import judge
from vq import from_pixels, load_vq, save_image, to_pixels

CPU = torch.device("cpu")


def test_figures_of_a_set_against_itself_and_against_a_distant_one():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 64))
    numbers = rng.normal(size=(40, len(cats.NUMBERS)))
    coats = np.arange(40) % 10
    real = features, coats, numbers
    logits = np.eye(10)[coats]
    same = judge.figures((features, logits, numbers), coats, real)
    assert same["coat"] == same["precision"] == same["recall"] == 1
    assert same["distance"] < 1e-6 and same["spread"] == pytest.approx(1)
    far = judge.figures((features + 100, np.roll(logits, 1, 1), 3 * numbers), coats, real)
    assert far["coat"] == far["precision"] == far["recall"] == 0
    squares = np.square(100 / features.std(0)).sum()        # all that is left of the distance
    assert far["distance"] == pytest.approx(squares)        # where covariances are equal
    assert far["spread"] == pytest.approx(9) and far["spreads"]["yaw"] == pytest.approx(9)


@pytest.mark.slow
def test_the_committed_judge_reads_real_cats_and_tells_them_from_wrong_ones():
    net = judge.load_judge(CPU)
    vq = load_vq(judge.HERE / "tokenizer.pt")
    drawn, coats, numbers = cats.cats(100, seed=2)          # a seed that nothing was trained on
    pixels = judge.reconstruct(vq, drawn, CPU)
    features, logits, guess = judge.look(net, pixels)
    assert (logits.argmax(1) == coats).mean() > 0.97
    right = 1 - np.square(guess - numbers).mean(0) / judge.variance(numbers, coats)
    for name in "x", "y", "scale", "yaw", "tilt", "light x":
        assert right[cats.NUMBERS.index(name)] > 0.8
    small = from_pixels(pixels)[:, :, ::8, ::8]             # one pixel of every code's cell
    coarse = judge.look(net, to_pixels(F.interpolate(small, scale_factor=8)))
    real = features, coats, guess
    assert judge.figures((features, logits, guess), coats, real)["distance"] < 1e-3
    assert judge.figures(coarse, coats, real)["distance"] > 10


def test_a_folder_and_a_sheet_are_read_alike(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        save_image(tmp_path / f"samples/{i:06d}.png", image)
    note = tmp_path / "samples.json"
    note.write_text(json.dumps(dict(classes=[7, 2], num_samples=5)))
    pixels, coats = judge.read_folder(tmp_path / "samples")
    assert (pixels == images[:5]).all() and coats.tolist() == [7, 2, 7, 2, 7]
    save_image(tmp_path / "a.png", images, columns=10)
    pixels, coats = judge.read_sheet(tmp_path / "a.png")
    assert (pixels == images).all() and coats.tolist() == [*range(10)] * 2


def test_fid_py_measures_as_the_judge_does(tmp_path, capsys, monkeypatch):
    """The committed weights and statistics belong together; the distance is the judge's."""
    monkeypatch.chdir(tmp_path)
    coats = np.arange(40) % 10
    drawn = [cats.draw(np.random.default_rng(i), coat)[0] for i, coat in enumerate(coats)]
    for i, image in enumerate(drawn):
        save_image(f"a/{i:06d}.png", image)
    note = dict(num_samples=40, features=str(judge.WEIGHTS),
                reference=str(cats.HERE / "reference.npz"))
    (tmp_path / "a.json").write_text(json.dumps(note))
    fid.main(["a"])
    floor, last = capsys.readouterr().out.splitlines()
    vq = load_vq(cats.HERE / "tokenizer.pt")
    net = judge.load_judge(CPU)
    real = judge.reference(net, vq, CPU)
    for line, seen in ((last, judge.look(net, np.stack(drawn))),
                       (floor, judge.yardstick(net, vq, coats, CPU))):
        expected = judge.figures(seen, coats, real)["distance"]
        assert float(line.split()[-1]) == pytest.approx(expected, rel=1e-3)
    assert "not FID" in last
