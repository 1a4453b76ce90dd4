"""The programs of demo/ that use the project as a library: film strip and edited picture."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from demo import edit, film
from flow import sample_beyond
from sample import draw_noise
from vq import crop, from_pixels, read_image


@pytest.fixture
def run(tmp_path, tiny_data, tiny_size, monkeypatch):
    """A run of a few steps in the folder that the test works in."""
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(tiny_data), "--model", tiny_size, "--global-batch-size", "8",
                "--steps", "24", "--lr", "1e-2", "--ema-decay", "0.5", "--no-bf16"])
    return train.load_run()


def cut(page, columns):
    """Cut a sheet into pictures [n,32,32,3]."""
    cells = np.asarray(page).reshape(-1, 34, columns, 34, 3).swapaxes(1, 2)
    return cells[:, :, 1:-1, 1:-1].reshape(-1, 32, 32, 3)


def test_the_film_strip_ends_where_z_and_mu_agree_with_the_sample(run):
    film.main(["--steps", "4", "--classes", "white", "0", "--tau", "0.8", "--out", "a.png"])
    page = Image.open("a.png").crop((0, 14, 5 * 34, 14 + 6 * 34))  # t = 0, 1/4, ..., 1
    tiles = cut(page, 5).reshape(2, 3, 5, 32, 32, 3)
    noise = draw_noise(run.flow, range(2), 0)
    codes = run.flow.sample(torch.tensor([1, 0]), 4, 0.8, noise=noise)
    pixels = run.vq.decode_pixels(codes).numpy()
    assert (tiles[:, 0, 4] == pixels).all() and (tiles[:, 1, 4] == pixels).all()
    assert (tiles[0, 0, 0] != tiles[0, 1, 0]).any()         # noise is not yet what mu is


def test_the_states_of_the_film_are_where_each_step_leads(run):
    args = SimpleNamespace(steps=4, tau=0.7, cfg_scale=1.5, order=2, seed=3)
    y, states = film.follow(run, [1, 0], args)
    assert [t for t, _, _ in states] == [0, 0.25, 0.5, 0.75, 1]
    noise = draw_noise(run.flow, range(2), 3)
    assert states[0][1].equal(noise) and states[0][2].equal(states[1][2])
    with torch.no_grad():
        codes = sample_beyond(run.flow, y, 4, 0.7, 1.5, noise)
        assert run.flow.nearest(states[-1][1]).equal(codes)
        for (t, z, _), (_, _, mu) in zip(states, states[1:]):
            torch.testing.assert_close(
                mu, run.flow.mean(z, torch.full((2,), t), y, 0.7, 1.5))


@pytest.fixture
def picture(run):
    """The codes [1,4,4] of cat.png, a picture of another size than the data's."""
    pixels = np.random.default_rng(7).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 50), Image.BICUBIC).save("cat.png")
    return run.vq.encode(from_pixels(crop(read_image("cat.png"), 32)[None]))


@pytest.fixture
def calls(monkeypatch):
    """What edit.py asks flow.py for: noise, start, known and the codes that it got."""
    made = []

    def spy(edited, y, steps, tau, cfg, noise, order):
        codes = sample_beyond(edited, y, steps, tau, cfg, noise, order)
        made.append((noise, edited.start, edited.known, codes))
        return codes

    monkeypatch.setattr(edit, "sample_beyond", spy)
    return made


def make(out, n, *flags):
    edit.main(["--from", "cat.png", "--steps", "3", "--out", out, "--num-samples", str(n),
               *map(str, flags)])
    return cut(Image.open(out), 9)[:n]  # three rounds of three classes across


def test_each_start_lies_on_the_path_from_new_noise_to_the_codes_before(run, picture, calls):
    make("a.png", 3, "--start", 0.25, "--resample", 1, "--seed", 2)
    assert [start for _, start, _, _ in calls] == [0.25, 0.625]
    generators = [train.seeded("cpu", 2, i) for i in range(3)]  # as in sample.py
    codes = picture
    for noise, start, known, after in calls:
        z0 = torch.cat([run.flow.prior(1, generator) for generator in generators])
        torch.testing.assert_close(noise, (1 - start) * z0 + start * run.flow.embed(codes))
        assert (known == -1).all()
        codes = after


@pytest.mark.parametrize("flags", [(), ("--order", 2, "--start", 0.3), ("--resample", 2)])
def test_a_kept_box_stays_and_images_depend_on_their_index_alone(run, picture, calls, flags):
    box = ("--keep", 0, 3, 32, 9)                           # outwards: rows 0 to 16
    a = make("a.png", 6, *box, *flags)
    assert (a[:, :16] == run.vq.decode_pixels(picture).numpy()[:, :16]).all()
    _, _, _, codes = calls[-1]
    assert codes[:, :2].equal(picture[:, :2].expand(6, -1, -1))
    assert not codes[:, 2:].equal(picture[:, 2:].expand(6, -1, -1))
    assert (make("b.png", 3, *box, *flags) == a[:3]).all()
