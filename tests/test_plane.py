"""demo/plane.py: the posterior is exact, and so are the shares of the paths at tau = 1."""
import numpy as np
from PIL import Image

from demo import plane


def test_the_posterior_is_how_often_points_near_z_belong_to_each_code():
    rng = np.random.default_rng(0)
    c = rng.choice(8, 2_000_000, p=plane.p)
    points = 0.4 * plane.E[c] + 0.6 * rng.standard_normal((len(c), 2))
    z = np.array([[0.1, -0.2]])
    near = c[abs(points - z).max(1) < 0.05]
    pi = plane.posterior(z, 0.4, tau=1)[0]
    error = np.sqrt(pi * (1 - pi) / len(near))
    assert (abs(np.bincount(near, minlength=8) / len(near) - pi) < 4 * error).all()
    cold = plane.posterior(z, 0.4, tau=0.5)[0]
    np.testing.assert_allclose(cold, pi ** 2 / (pi ** 2).sum())


def test_all_paths_end_in_the_only_code_that_occurs(monkeypatch):
    monkeypatch.setattr(plane, "p", np.eye(8)[6])
    with np.errstate(divide="ignore"):                      # log 0
        *_, z = plane.follow(np.random.default_rng(0).standard_normal((50, 2)), tau=0.9, T=7)
    np.testing.assert_allclose(z, [plane.E[6]] * 50)


def test_the_shares_of_paths_are_p_at_tau_1_and_are_printed_and_drawn(tmp_path, capsys):
    plane.main(["--out", str(tmp_path / "a.png")])
    table = [line.split()[-8:] for line in capsys.readouterr().out.splitlines()]
    p, *shares = np.array(table, float)
    chi2 = (10_000 * np.square(shares - p) / p).sum(1)      # of tau = 0.3, 0.9, 1, 1.5
    assert chi2.argmin() == 2 and chi2[2] < 24.3            # 99.9 % of samples from p
    with Image.open(tmp_path / "a.png") as page:
        assert page.size == (1200, 375) and page.convert("L").getpixel((174, 59)) < 128
