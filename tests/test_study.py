"""The study: its arms and its arithmetic, and one of a few steps from end to end."""
import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from fakes import K, method

import train
from study import arms, measure, study

TINY = dict(steps=4, checkpoints=2, batch=4, seeds=(0,), rates=(1e-3, 1e-2), images=20, grids=20)
GRIDS = torch.randint(K, (20, 4, 4), generator=torch.Generator().manual_seed(4))


def test_the_shuffled_codebook_is_a_permutation_and_the_same_each_time():
    plain, one, two = (method(name).codebook for name in ("purrception", "shuffled", "shuffled"))
    assert one.equal(two) and not one.equal(plain)
    assert sorted(one.tolist()) == sorted(plain.tolist())


@pytest.mark.parametrize("arm", arms.ARMS)
def test_the_arms_are_trained_alike_but_for_what_they_are_named_after(arm):
    args, _ = train.parse(arms.flags_of(arms.Run(arm, 2e-3, 1), steps=4, every=2, batch=4))
    settings = args.lr, args.seed, args.bf16, args.cooldown, args.ema_ramp
    assert settings == (2e-3, 1, False, 0, True)
    beyond = args.geometric_head, args.logit_normal
    assert beyond == ("geometric" in arm, "logit-normal" in arm)
    plain = arm.removeprefix("geometric").removesuffix("logit-normal").strip("-")
    assert args.objective == (plain or "purrception")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["purrception", "cfm", "endpoint"])
def test_denoising_is_measured_by_the_plain_formulas(name):
    assert study.over_time(np.sqrt([study.TIMES])) ** 2 == pytest.approx([0.545])  # rmse^2 = t
    f = method(name)
    found = measure.measure_denoising(f, GRIDS)
    for i, t in enumerate(measure.TIMES):
        time = torch.full((20,), t)
        y = torch.arange(20) % 5
        z = f.path(f.prior(20, train.seeded("cpu", 0, round(1000 * t))), GRIDS, time)
        mu = z + (1 - t) * f.velocity(z, time, y)
        rmse = (mu - f.embed(GRIDS)).square().mean().sqrt().item()
        assert found["rmse"][i] == pytest.approx(rmse, rel=1e-4)
        if name == "purrception":
            pi = f.posterior(z, time, y)
            ce = -pi.gather(3, GRIDS[..., None]).log().mean().item()
            assert found["ce"][i] == pytest.approx(ce, rel=1e-4)
            confidence, guess = pi.max(3)
            order = confidence.flatten().argsort()
            for got, x in zip(found["hits"][i], (confidence, guess == GRIDS)):
                means = x.flatten().float()[order].view(10, -1).mean(1)
                np.testing.assert_allclose(got, means, rtol=1e-4, atol=1e-6)
            apart = (f.codebook - mu.movedim(1, -1).unsqueeze(3)).square().sum(4)  # |e_k - mu|^2
            expected, error = found["errors"][i]
            assert np.mean(expected) == pytest.approx((pi * apart).sum(3).mean().item(), rel=1e-3)
            assert np.mean(error) == pytest.approx(mu.shape[1] * rmse ** 2, rel=1e-4)
            assert sorted(expected) == expected


@pytest.mark.parametrize("name, settings", [
    ("cfm", dict(steps=10, order=2, tau=None)), ("purrception", dict(steps=10, order=2, tau=2.0)),
    ("endpoint", dict(steps=10, order=2, tau=None)), ("dfm", dict(steps=50, tau=2.0)),
    ("released", dict(steps=50, tau=2.0))])
def test_the_temperature_reaches_the_sampler(monkeypatch, name, settings):
    f = method(name)
    f.mean = plain = lambda *_: None
    draw = MagicMock(return_value=(None, None))
    monkeypatch.setattr(measure, "references", lambda device: [MagicMock() for _ in range(4)])
    monkeypatch.setattr(measure, "draw_codes", draw)
    monkeypatch.setattr(measure, "judge", MagicMock())
    measure.measure_samples(f, "cpu", 20, 2.0, 0)
    draw.assert_called_once_with(f, 20, 0, **settings)
    assert (f.mean is plain) == (name in ("purrception", "dfm", "released"))
    if name == "purrception":
        measure.measure_samples(f, "cpu", 20, (2.0, 0.5), 0)
        draw.assert_called_with(f, 20, 0, steps=10, order=2, tau=2.0, tau_end=0.5)


@pytest.mark.parametrize("steps", [2, 5])
def test_the_releases_sampler_draws_positions_anew_and_leaves_none_masked(steps):
    f = method("released")
    y = torch.arange(200) % 5
    f.posterior = Mock(side_effect=lambda z, *_: torch.eye(K)[torch.where(z == K, 3, 4)])
    torch.manual_seed(0)
    z = f.sample(y, steps)
    times = [call.args[1][0].item() for call in f.posterior.call_args_list]
    assert times == pytest.approx([1e-4 + s / steps for s in range(steps - 1)])
    states = [call.args[0] for call in f.posterior.call_args_list] + [z]
    for t, old, new in zip(times[:-1], states, states[1:-1]):   # all but the last step
        chance = 1 / steps / (1 - t)
        for before, after in (K, 3), (3, 4):
            here = old == before
            share = (new[here] == after).float().mean() if here.any() else chance
            assert share == pytest.approx(chance, abs=0.05)
    assert set(z.unique().tolist()) <= {3, 4}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Start a study of four steps of a small network, in a folder of its own."""
    size = dict(depth=1, hidden_size=32, num_heads=2, patch_size=2)
    monkeypatch.setitem(train.SIZES, "DiT-demo/2", size)
    monkeypatch.chdir(tmp_path)                             # and back, after Study's own chdir
    return lambda **other: study.Study(tmp_path / "out", TINY | other, workers=1)


def test_an_arm_has_the_rate_that_is_best_over_all_seeds_of_the_two_best_at_the_first(
        small, monkeypatch):
    table = {1e-3: (9.0, 1.0), 3e-3: (5.0, 6.0), 1e-2: (4.0, 8.0)}  # distances by rate and seed

    def figures(name, runs, knobs):
        return np.array([table[run.lr][run.seed] for run in runs]).reshape(-1, 1, 1)

    it = small(rates=tuple(table), seeds=(0, 1))
    trained = []
    monkeypatch.setattr(it, "train", trained.extend)
    monkeypatch.setattr(it, "figures", figures)
    monkeypatch.setattr(it, "denoising", lambda name, runs: np.ones((3, len(study.TIMES))))
    runs, lines = study.tune(it)
    assert runs == {arm: [arms.Run(arm, 3e-3, seed) for seed in (0, 1)] for arm in arms.ARMS}
    assert all(run in trained for each in runs.values() for run in each)
    assert "| cfm | 9.00 | 5.00 (5.50) | 4.00 (6.00) |" in lines


@pytest.mark.slow
def test_a_study_answers_every_question_and_measures_nothing_twice(small, monkeypatch):
    axes = MagicMock(**{"plot.return_value": [MagicMock()]})
    pyplot = MagicMock()
    pyplot.subplots = lambda rows, columns, **_: (MagicMock(), [axes] * columns)

    def answers():
        it = small()
        runs, lines = study.tune(it)
        for ask in (study.converge, study.vary_temperature, study.denoise, study.calibrate):
            lines += ask(it, runs, pyplot)
        return lines

    lines = answers()
    tasks = [str(json.loads(line)[0]) for line in Path("results.jsonl").read_text().splitlines()]
    assert len(tasks) == len(set(tasks))
    for arm in (*arms.ARMS, "other real cats"):
        assert f"| {arm} |" in "\n".join(lines)
    assert Path("temperatures.png").exists()
    assert "opt" not in torch.load(next(Path("runs").glob("*/ckpt-0000004.pt")))

    monkeypatch.setattr(study, "measure", None)             # a second time, all is in the table
    monkeypatch.setattr(study.train, "main", None)
    assert answers() == lines


@pytest.mark.parametrize("killed", ["at its start", "between two checkpoints"])
def test_a_killed_run_is_finished(small, killed):
    run = arms.Run("cfm", 1e-3, 0)
    it = small()
    it.train([run])
    whole = torch.load(run.checkpoint(4))["ema"]
    shutil.rmtree(run.folder)
    if killed == "at its start":
        run.folder.mkdir()
    else:                                                   # ckpt.pt is then that of step 2
        train.main(arms.flags_of(run, steps=2, every=2, batch=4))
    it.train([run])
    again = torch.load(run.checkpoint(4))["ema"]
    assert all(torch.equal(again[key], whole[key]) for key in whole)
