"""The study: its arithmetic, and one of a few steps from end to end, with axes that draw nothing."""
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import study

from model import DiT
from vq import InputError

TINY = dict(steps=4, checkpoints=2, seeds=(0,), rates=(1e-3, 1e-2), images=4, euler=2, taus=(0.5, 1.0), few=(2, 3),
            powers=(1.0, 1.5))


@pytest.fixture
def small(tiny_data, tiny_size, tmp_path, monkeypatch):
    """Start a study of four steps, in a folder of its own."""
    (tiny_data / "recipe.txt").write_text(f"--model {tiny_size}\n--global-batch-size 4\n")
    monkeypatch.chdir(tmp_path)
    return lambda **other: study.Study(TINY | other, tiny_data)


def test_a_crossing_lies_between_checkpoints_in_proportion():
    assert study.crossing([10, 20, 50], [5.0, 3.0, 1.0], 2.0) == "after 35 of 50 steps, 1.4x sooner"
    assert study.crossing([10, 20, 30], [1.0, 5.0, 4.0], 2.0) == "before 10 of 30 steps, at least 3.0x sooner"
    assert study.crossing([10, 20], [5.0, 3.0], 2.0) == "not within 20 steps"


def test_another_embedding_of_time_changes_answers_only_meanwhile():
    net = DiT(input_size=4, patch_size=2, in_channels=3, out_channels=7, hidden_size=32, depth=1, num_heads=2)
    t = torch.tensor([0.3])
    plain = net.t_embedder(t)
    with study.embedding_of(1000):
        assert torch.equal(net.t_embedder(t / 1000), plain) and not torch.equal(net.t_embedder(t), plain)
    assert torch.equal(net.t_embedder(t), plain)


def test_the_path_may_be_followed_through_any_times(small):
    f, *_ = study.load_run(small().trained(study.Run("purrception", 1e-3, 0)).checkpoint(4), torch.device("cpu"))
    y, z0 = torch.tensor([0, 1, 2]), torch.randn(3, 4, 4, 4)
    assert study.follow(f, z0, y, torch.arange(6) / 5, 0.9).equal(f.sample(y, 5, tau=0.9, noise=z0))
    z = z0
    for t, dt in ((0.0, 0.1), (0.1, 0.4), (0.5, 0.5)):
        z = z + dt * (f.mean(z, torch.full((3,), t), y, 0.9) - z) / (1 - t)
    assert study.follow(f, z0, y, [0.0, 0.1, 0.5, 1.0], 0.9).equal(f.nearest(z))


@pytest.mark.slow
def test_a_study_answers_every_question_and_measures_nothing_twice(small, monkeypatch):
    def answers():
        it = small()
        return [line for ask in study.QUESTIONS.values() for line in ask(it, MagicMock(**{"plot.return_value": [MagicMock()]}))]

    lines = answers()
    rows = Path("scores.csv").read_text().splitlines()
    assert len(rows) == len({row.rsplit(",", 1)[0] for row in rows})     # no key twice
    assert sum(row.startswith("cfm") for row in rows) == 2 + 1           # two rates at the end, the better one half-way
    assert "without z-loss: logsumexp 3." in "".join(lines)              # ln 32 = 3.47
    assert Path("temperatures.png").exists()
    assert "opt" not in torch.load(next(Path("runs").glob("*/ckpt-0000004.pt")))

    monkeypatch.setattr(study.fid, "measure", None)                      # a second time, all is in the table
    monkeypatch.setattr(study.train, "main", None)
    assert answers() == lines


@pytest.mark.parametrize("killed", ["before its first checkpoint", "between two"])
@pytest.mark.slow
def test_a_killed_run_is_finished(small, killed):
    run = study.Run("cfm", 1e-3, 0)
    whole = torch.load(small().trained(run).checkpoint(4))
    run.checkpoint(4).unlink()
    if killed == "between two":                            # ckpt.pt is then that of step 2
        shutil.rmtree(run.folder)
        stopped = small()
        stopped.marks = range(2, 3, 2)
        stopped.trained(run)
    else:
        (run.folder / "ckpt.pt").unlink()
    again = torch.load(small().trained(run).checkpoint(4))
    assert all(torch.equal(again["ema"][key], whole["ema"][key]) for key in whole["ema"])


def test_a_folder_of_another_study_is_refused(small):
    small()
    with pytest.raises(InputError, match="other settings"):
        small(steps=8)
