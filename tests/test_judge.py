"""The judge: its figures have closed forms, and its committed weights read real cats."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import cats
import judge
from vq import from_pixels, load_vq, save_image, to_pixels

CPU = torch.device("cpu")


def test_a_cat_and_its_numbers_do_not_depend_on_how_many_are_drawn_and_numbers_not_on_the_size():
    images, labels, numbers = cats.cats(12, seed=3, size=32)
    assert numbers.shape == (12, len(cats.NUMBERS)) and numbers.dtype == np.float32
    for some, all_of_them in zip(cats.cats(3, seed=3, size=32), (images, labels, numbers)):
        assert (some == all_of_them[:3]).all()
    assert (cats.cats(12, seed=3, size=64)[2] == numbers).all()


def test_numbers_tell_what_was_drawn():
    _, _, numbers = cats.cats(60, seed=3, size=8)
    column = dict(zip(cats.NUMBERS, numbers.T))
    ranges = dict(x=(0.46, 0.54), y=(0.53, 0.61), scale=(0.335, 0.39), yaw=(-0.16, 0.16), pitch=(-0.06, 0.07),
                  tilt=(-0.3, 0.3), lid=(0.17, 0.27), pupil=(0.07, 0.17))
    for name, (low, high) in ranges.items():
        assert low - 1e-6 <= column[name].min() < column[name].max() <= high + 1e-6
    np.testing.assert_allclose(np.hypot(column["light x"], column["light y"]), 1, rtol=1e-6)
    assert (column["light y"] <= 0).all()                  # from above: y runs down


def test_the_numbers_backdrop_and_centre_are_those_of_the_picture(monkeypatch):
    monkeypatch.setattr(cats.Canvas, "paint", lambda *_: None)                   # nothing but the backdrop
    image, numbers = cats.draw(np.random.default_rng(0), coat=0)
    np.testing.assert_allclose(image.mean((0, 1)), numbers[-3:], atol=2.5)       # in steps of 4
    monkeypatch.undo()
    positions = []
    monkeypatch.setattr(cats.Canvas, "turned", lambda self, points: positions.append(self.centre) or points)
    _, numbers = cats.draw(np.random.default_rng(0), coat=0)
    assert tuple(numbers[:2]) == tuple(positions[0])


def test_two_mirrors_change_nothing():
    _, _, numbers = cats.cats(5, seed=0, size=8)
    np.testing.assert_allclose(judge.mirror(judge.mirror(numbers)), numbers, atol=1e-6)
    np.testing.assert_allclose(judge.mirror(numbers)[:, 0], 1 - numbers[:, 0], atol=1e-6)
    assert (judge.mirror(numbers)[:, 1] == numbers[:, 1]).all()


def test_figures_of_a_set_against_itself_and_against_a_distant_one():
    rng, coats = np.random.default_rng(0), np.arange(40) % 10
    features, numbers = rng.normal(size=(40, 64)), rng.normal(size=(40, len(cats.NUMBERS)))
    logits, real = np.eye(10)[coats], (features, coats, numbers)
    same = judge.figures((features, logits, numbers), coats, real)
    assert same["coat"] == same["precision"] == same["recall"] == 1
    assert same["distance"] < 1e-6 and same["spread"] == pytest.approx(1)
    far = judge.figures((features + 100, np.roll(logits, 1, 1), 3 * numbers), coats, real)
    assert far["coat"] == far["precision"] == far["recall"] == 0
    squares = np.square(100 / features.std(0)).sum()       # all that is left where covariances are equal
    assert far["distance"] == pytest.approx(squares)
    assert far["spread"] == pytest.approx(9) and far["spreads"]["yaw"] == pytest.approx(9)


def test_one_repeated_cat_is_precise_but_recalls_and_spreads_little():
    rng, coats = np.random.default_rng(0), np.zeros(40, int)
    features, numbers = rng.normal(size=(40, 64)), rng.normal(size=(40, len(cats.NUMBERS)))
    seen = features[:1].repeat(40, 0), np.eye(10)[coats], numbers[:1].repeat(40, 0)
    found = judge.figures(seen, coats, (features, coats, numbers))
    assert found["precision"] == 1 and found["recall"] == 1 / 40 and found["spread"] < 1e-9


def test_the_reference_is_that_of_the_coats_asked_for():
    rng, coats = np.random.default_rng(0), np.arange(40) % 10
    features, numbers = rng.normal(size=(40, 64)), rng.normal(size=(40, len(cats.NUMBERS)))
    two = coats < 2
    seen = features[two], np.eye(10)[coats[two]], numbers[two]
    found = judge.figures(seen, coats[two], (features, coats, numbers))
    assert found["distance"] < 1e-6 and found["recall"] == 1 and found["spread"] == pytest.approx(1)


def test_coverage_reaches_to_the_third_neighbour():
    line = np.array([[0.0], [1], [2], [3], [4]])           # radii 3, 2, 2, 2, 3
    points = np.array([[-2.9], [-3.1], [6.9], [7.1]])
    assert judge.covered(points, line) == 0.5
    assert judge.covered(points[[0, 2]], line) == 1 and judge.covered(points[[1, 3]], line) == 0


def test_variance_is_that_within_a_coat():
    coats = np.array([0, 0, 0, 5, 5])
    numbers = np.array([[1.0], [2], [3], [104], [106]])
    assert judge.variance(numbers, coats) == pytest.approx([(2 + 2) / 3])


@pytest.mark.slow
def test_the_committed_judge_reads_real_cats_and_tells_them_from_wrong_ones():
    net, vq = judge.load_judge(CPU), load_vq(judge.HERE / "tokenizer.pt")
    drawn, coats, numbers = cats.cats(100, seed=2)         # a seed that nothing was trained on
    pixels = judge.reconstruct(vq, drawn, CPU)
    features, logits, guess = judge.look(net, pixels)
    assert features.shape == (100, 64) and (logits.argmax(1) == coats).mean() > 0.97
    right = 1 - np.square(guess - numbers).mean(0) / judge.variance(numbers, coats)
    assert all(right[cats.NUMBERS.index(name)] > 0.8
               for name in ("x", "y", "scale", "yaw", "tilt", "light x"))
    real = features, coats, guess
    small = from_pixels(pixels)[:, :, ::8, ::8]            # one pixel of every code's cell
    coarse = judge.figures(judge.look(net, to_pixels(F.interpolate(small, scale_factor=8))), coats, real)
    assert judge.figures((features, logits, guess), coats, real)["distance"] < 1e-3 and coarse["distance"] > 10


def test_a_folder_of_samples_is_read_and_a_wrong_one_refused(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    with pytest.raises(SystemExit, match="no samples.json beside it"):
        judge.read_samples(folder)
    note = folder.with_name("samples.json")
    note.write_text(json.dumps(dict(classes=[7, 2], num_samples=5)))
    with pytest.raises(SystemExit, match="000000.png: cannot be read"):
        judge.read_samples(folder)
    for i in range(5):
        save_image(folder / f"{i:06d}.png", np.full((64, 64, 3), i, np.uint8))
    pixels, coats = judge.read_samples(folder)
    assert (pixels[:, 0, 0, 0] == range(5)).all() and coats.tolist() == [7, 2, 7, 2, 7]
    save_image(folder / "000003.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(SystemExit, match="000003.png: is"):
        judge.read_samples(folder)
    for unknown in 207, -1:
        note.write_text(json.dumps(dict(classes=[0, unknown], num_samples=5)))
        with pytest.raises(SystemExit, match=f"has class {unknown}"):
            judge.read_samples(folder)
    for strange in dict(classes=[], num_samples=5), dict(classes=None, num_samples=5), dict(classes=[1], num_samples="5"):
        note.write_text(json.dumps(strange))
        with pytest.raises(SystemExit, match="has no classes and num_samples"):
            judge.read_samples(folder)
    note.write_text(json.dumps(dict(classes=[0, 1, 2], num_samples=5)))
    with pytest.raises(SystemExit, match="make two of each"):
        judge.read_samples(folder)
