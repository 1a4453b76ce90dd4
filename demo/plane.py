"""Picture Purrception without a network: `python -m demo.plane --out plane.png`.

Eight codes e_k in the plane have frequencies p_k. For z = t e_c + (1 - t) z0, c ~ p, z0 ~ N(0, I):

    posterior   pi = softmax((log p_k - |z - t e_k|^2 / (2 (1 - t)^2)) / tau)      (Eq. 12, 15)
    velocity    v  = (mu - z) / (1 - t),  mu = sum_k pi_k e_k                      (Eq. 13)

At tau = 1, pi is Bayes' rule, and paths end in code k as often as p_k says, but for sampling and
finite T. A perfect regression (CFM) learns E[z1 - z0 | z], the v of tau = 1, and has no tau. Bars
are shares of all n paths, ticks are p. All paths first head for mu at t = 0, the black dot.
"""
import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANELS = {"tau = 0.3": 0.3, "tau = 0.9": 0.9, "CFM = tau 1": 1, "tau = 1.5": 1.5}
COLOURS = "#1f5ca8 #e66e19 #288c46 #c82d37 #7d55af #14a5b9 #e0a800 #87532d".split()
p = np.array([24, 20, 16, 12, 10, 8, 6, 4]) / 100
E = np.array([[6, -19, 18, -18, 23, -7, -3, 4], [-22, 9, 13, -15, -9, 25, -9, 11]]).T / 10  # [K,2]


def posterior(z, t, tau):
    distance = np.square(z[:, None] - t * E).sum(2)                  # [n,K]
    logits = (np.log(p) - distance / (2 * (1 - t) ** 2)) / tau
    return np.exp(logits - np.logaddexp.reduce(logits, 1)[:, None])  # Eq. 12, 15


def follow(z, tau, T=100):
    yield z                                                          # [n,2]
    for t in np.arange(T) / T:
        mu = posterior(z, t, tau) @ E
        v = (mu - z) / (1 - t)                                       # Eq. 13
        z = z + v / T
        yield z


def draw(pen, middle, paths, c, shares, mu):
    for z, k in zip((middle, 600) + 165 * paths, c):
        pen.line(z.flatten().tolist(), COLOURS[k], 2)
        pen.regular_polygon((*z[0], 11), 30, 0, COLOURS[k], "white", 5)
    for k, z in enumerate((middle, 600) + 165 * E):
        pen.regular_polygon((*z, 8 + 100 * p[k] ** 0.5), 60, 0, COLOURS[k], "white", 5)
        x = middle - 516 + 132 * k
        pen.rectangle((x, 1450 - 600 * shares[k], x + 104, 1450), COLOURS[k])
        pen.line((x - 8, 1450 - 600 * p[k], x + 112, 1450 - 600 * p[k]), "black", 8)
    pen.regular_polygon((*(middle, 600) + 165 * mu, 24), 30, 0, "black", "white", 5)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Follow noise to eight codes in the plane.")
    parser.add_argument("--out", default="plane.png", help="picture to write")
    args = parser.parse_args(argv)
    z0 = np.random.default_rng(1).standard_normal((10_000, 2))
    page = Image.new("RGB", (4800, 1500), "white")                   # reduce() smooths the lines
    pen = ImageDraw.Draw(page)
    print("p".ljust(12), *[f"{x:.3f}" for x in p])
    for middle, (title, tau) in zip((600, 1800, 3000, 4200), PANELS.items()):
        paths = np.stack([*follow(z0, tau)], 1)                      # [n,T+1,2]
        c = np.square(paths[:, -1:] - E).sum(2).argmin(1)            # [n]
        shares = np.bincount(c, minlength=len(E)) / len(c)           # [K]
        print(title.ljust(12), *[f"{x:.3f}" for x in shares])
        mu = posterior(z0[:1], 0, tau)[0] @ E                        # is the same for all z0
        pen.text((middle, 16), title, "black", ImageFont.load_default(72), "ma")
        draw(pen, middle, paths[:300], c, shares, mu)
    page.reduce(4).quantize().save(args.out)                         # 256 colours are enough


if __name__ == "__main__":
    main()
