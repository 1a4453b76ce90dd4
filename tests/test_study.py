"""The study: its arms and its arithmetic, and one of a few steps from end to end, with axes that draw nothing.

Shapes: B batch, h w grid, K codes, d code dimension.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import study
import train

from flow import CFM, OBJECTIVES
from model import DiT
from vq import InputError, load_vq

TINY = dict(steps=4, checkpoints=2, batch=4, seeds=(0,), rates=(1e-3, 1e-2), images=20, grids=20)
K, d = 7, 3
CPU = torch.device("cpu")


def build(name, std=0.3):
    """Build an arm around a DiT for 8x8 grids, of random weights or, with std 0, with a head of zeros."""
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=5,
              in_channels=16 if name == "dfm" else d, out_channels=d if issubclass(OBJECTIVES[name], CFM) else K)
    f = OBJECTIVES[name](net, torch.randn(K, d))
    for x in net.parameters():
        if x.requires_grad and std:
            torch.nn.init.normal_(x, std=std)
    return f


def point(f, t):
    """Draw codes, classes, and the point z of the path at t [B]."""
    B = len(t)
    codes = torch.randint(K, (B, 8, 8))
    return codes, torch.arange(B) % 5, f.path(f.prior(B), codes, t)


def gaussians(f, z, t):
    """Compute log N(z; t e_k, (1 - t)^2 I) of every code by torch's own distribution: [B,h,w,K], float64."""
    z, t = z.movedim(1, -1).unsqueeze(3).double(), t.view(-1, 1, 1, 1, 1).double()
    return torch.distributions.Normal(t * f.codebook.double(), 1 - t).log_prob(z).sum(4)


# ------------------------------ arms

def test_with_a_head_of_zeros_the_posterior_is_that_of_bayes_rule():
    f = build("likelihood", std=0)
    t = torch.tensor([0.1, 0.5, 0.9, 0.97])
    _, y, z = point(f, t)
    for tau in (0.2, 1.0):                                 # acts on the network's share alone
        torch.testing.assert_close(f.posterior(z, t, y, tau).double(), gaussians(f, z, t).softmax(3), atol=1e-5, rtol=1e-4)


def test_the_likelihood_is_added_to_the_networks_logits_in_loss_and_posterior():
    f = build("likelihood")
    t = torch.tensor([0.2, 0.6, 0.9])
    codes, y, z = point(f, t)
    logits = f.model(z, t, y).double()
    pi = (logits / 0.5 + gaussians(f, z, t)).softmax(3)
    torch.testing.assert_close(f.posterior(z, t, y, 0.5).double(), pi, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(f.mean(z, t, y, 0.5).double(), (pi @ f.codebook.double()).movedim(-1, 1), atol=1e-5, rtol=1e-4)
    loss, parts = f.loss(z, t, y, codes)
    ce = F.cross_entropy((logits + gaussians(f, z, t)).flatten(0, 2), codes.flatten())
    assert parts["ce"].item() == pytest.approx(ce.item(), rel=1e-5) and loss.requires_grad
    assert loss.item() == pytest.approx((parts["ce"] + parts["z"]).item())


def test_the_shuffled_codebook_is_a_permutation_and_the_same_each_time():
    plain, one, two = build("purrception").codebook, build("shuffled").codebook, build("shuffled").codebook
    assert one.equal(two) and not one.equal(plain)
    assert sorted(one.tolist()) == sorted(plain.tolist())


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_muon_is_torchs_but_in_float32(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    mine = study.Muon([ours], 0.02)
    torchs = torch.optim.Muon([theirs], 0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)                            # it multiplies in bf16
    assert (ours - 1).abs().mean() > 0.005


def test_an_orthogonalized_matrix_has_singular_values_about_one():
    values = torch.linalg.svdvals(study.orthogonal(torch.randn(16, 48) * 100))
    assert 0.6 < values.min() and values.max() < 1.25


def test_bf16_products_are_those_of_pytorch_but_multiplied_in_float32():
    torch.manual_seed(0)
    a, b, bias = torch.randn(64, 300), torch.randn(300, 40), torch.randn(40)
    low = [x.bfloat16() for x in (bias, a, b)]
    plain = torch.mm(*low[1:]), torch.addmm(*low), torch.addmm(*low, alpha=-2)
    out = torch.empty(64, 40, dtype=torch.bfloat16)
    with study.Bf16Products():
        ours = torch.mm(*low[1:]), torch.addmm(*low), torch.addmm(*low, alpha=-2, out=out)
        assert ours[2] is out and a.mm(b).dtype == torch.float32
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, atol=0.02, rtol=2 ** -7)                    # one rounding
    assert ours[0].equal((low[1].float() @ low[2].float()).bfloat16())


def test_a_training_step_in_bf16_is_the_same_with_its_products_in_float32():
    def step():
        torch.manual_seed(0)
        f = build("purrception")
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = f(torch.arange(256).view(4, 8, 8) % K, torch.arange(4), torch.Generator().manual_seed(0))
        loss.backward()
        return loss, f.model.final_layer.linear.weight.grad

    plain = step()
    with study.Bf16Products():
        ours = step()
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


def test_muon_takes_the_blocks_matrices_and_nothing_is_left_out():
    f = build("muon")
    opt = study.MuonAndAdamW(f, 1e-3)
    adamw, muon = ({id(p) for group in part.param_groups for p in group["params"]} for part in opt.parts)
    names = {name.rsplit(".", 1)[0].split(".", 2)[2] for name, p in f.model.named_parameters() if id(p) in muon}
    assert names == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert not adamw & muon and adamw | muon == {id(p) for p in f.parameters() if p.requires_grad}


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_a_rescaled_velocity_is_that_of_gaussian_data_of_a_kth_of_the_variance(k):
    def gaussian(variance):
        def velocity(z, t, *_):
            t = t.view(-1, 1, 1, 1)
            return (t * variance - (1 - t)) / (t * t * variance + (1 - t) ** 2) * z
        return velocity

    variance = torch.tensor(study.VARIANCE).view(1, -1, 1, 1)
    z, t = torch.randn(5, 4, 2, 2), torch.tensor([0.0, 0.2, 0.5, 0.8, 0.99])
    got = study.rescaled(gaussian(variance), k)(z, t, None)
    torch.testing.assert_close(got, gaussian(variance / k)(z, t), atol=1e-5, rtol=1e-5)


def test_the_variance_is_that_of_the_cats_code_vectors():
    codes = torch.from_numpy(np.load(study.HERE / "codes.npy").astype(np.int64))
    z1 = load_vq(study.HERE / "tokenizer.pt").embed(codes)
    assert z1.var((0, 2, 3)).tolist() == pytest.approx(study.VARIANCE, abs=0.006)


# ------------------------------ measures

@pytest.fixture
def grids(monkeypatch):
    codes = torch.randint(K, (20, 8, 8), generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(study, "references", lambda device: (None, None, None, codes))
    return codes


@torch.inference_mode()
def test_an_untrained_network_knows_nothing_and_says_so(grids):
    f = build("purrception", std=0)
    found = study.measure_denoising(f, CPU, 20)
    assert found["ce"] == pytest.approx([np.log(K)] * len(study.TIMES), rel=1e-5)
    rmse = (f.embed(grids) - f.codebook.mean(0).view(1, d, 1, 1)).square().mean().sqrt()
    assert found["rmse"] == pytest.approx([rmse.item()] * len(study.TIMES), rel=1e-5)
    confidence, hits = np.array(found["tenths"][0])
    assert confidence == pytest.approx(1 / K, rel=1e-4)
    assert hits.mean() == pytest.approx((grids == 0).float().mean().item(), rel=1e-4)      # of equal codes, max() takes the first


@torch.inference_mode()
def test_denoising_is_measured_by_the_plain_formulas(grids):
    f, cfm = build("likelihood"), build("endpoint")
    found, regressed = (study.measure_denoising(each, CPU, 20) for each in (f, cfm))
    for i, t in enumerate(study.TIMES):
        z0 = f.prior(20, train.seeded("cpu", 0, round(1000 * t)))
        time = torch.full((20,), t)
        z, y = f.path(z0, grids, time), torch.arange(20) % 5
        pi = f.posterior(z, time, y)
        assert found["ce"][i] == pytest.approx(-pi.gather(3, grids[..., None]).log().mean().item(), rel=1e-4)
        assert found["rmse"][i] == pytest.approx((f.mean(z, time, y) - f.embed(grids)).square().mean().sqrt().item(), rel=1e-4)
        confidence, guess = pi.max(3)
        order = confidence.flatten().argsort()
        pairs = np.array([x.flatten().float()[order].view(10, -1).mean(1) for x in (confidence, guess == grids)])
        np.testing.assert_allclose(found["tenths"][i], pairs, rtol=1e-4, atol=1e-6)
        z = cfm.path(z0, grids, time)
        mu = z + (1 - t) * cfm.velocity(z, time, y)
        assert regressed["rmse"][i] == pytest.approx((mu - cfm.embed(grids)).square().mean().sqrt().item(), rel=1e-4)


def test_tenths_go_from_the_least_to_the_most_confident():
    confidence = torch.linspace(1, 0, 20)
    low, high = study.tenths(torch.stack([confidence, confidence > 0.5]))
    assert low == sorted(low) and high == [0] * 5 + [1] * 5


@torch.inference_mode()
def test_dfm_knows_what_is_unmasked(grids):
    found = study.measure_denoising(build("dfm", std=0), CPU, 20)
    assert found["ce"] == pytest.approx([(1 - t) * np.log(K) for t in study.TIMES], abs=0.06)


def test_a_crossing_lies_between_checkpoints_in_proportion():
    steps = [10, 20, 50]
    assert study.crossing(steps, [5.0, 3.0, 1.0], 2.0) == 35 / 50
    assert study.shares(steps, [[5.0, 3.0, 1.0], [5.0, 4.0, 2.0]], 2.0) == "0.85 (0.70 to 1.00)"
    assert study.shares(steps, [[1.0, 5.0, 4.0], [5.0, 1.0, 1.0]], 3.0) == "at most 0.30"
    assert study.shares(steps, [[1.0, 5.0, 4.0], [5.0, 4.0, 4.0]], 3.0) == "1 of 2 seeds"
    assert study.shares(steps, [[5.0, 3.0, 1.0], [5.0, 4.0, 3.0]], 2.0) == "1 of 2 seeds"
    assert study.shares(steps, [[5.0, 4.0, 3.0]], 2.0) == "never"


def test_rmse_is_averaged_over_t_not_over_the_times_that_were_chosen():
    flat = np.full((2, len(study.TIMES)), 0.3)
    assert study.over_time(flat) == pytest.approx([0.3, 0.3])
    assert study.over_time(np.sqrt([study.TIMES])) ** 2 == pytest.approx([np.mean([study.TIMES[0], study.TIMES[-1]])])


def test_evidence_is_exact_under_autocast():
    f, t = build("likelihood"), torch.tensor([0.9, 0.97])
    _, _, z = point(f, t)
    with torch.autocast("cpu", torch.bfloat16):
        inside = f.evidence(z, t)
    assert inside.equal(f.evidence(z, t))


# ------------------------------ runs

@pytest.fixture
def small(tmp_path, monkeypatch):
    """Start a study of four steps of a small network, in a folder of its own."""
    monkeypatch.setitem(train.SIZES, "DiT-demo/2", dict(depth=1, hidden_size=32, num_heads=2, patch_size=2))
    monkeypatch.chdir(tmp_path)
    return lambda **other: study.Study(TINY | other, workers=1)


@pytest.mark.parametrize("arm", [*study.ARMS, "shuffled"])
def test_the_arms_are_trained_alike_but_for_what_they_are_named_after(arm):
    args, _, _ = train.parse(study.flags_of(study.Run(arm, 2e-3, 1), steps=4, every=2, batch=4))
    assert (args.objective, args.lr, args.seed, args.bf16, args.cooldown) == (arm, 2e-3, 1, False, 0)
    assert args.ema_ramp and args.geometric_head == ("geometric" in arm) and args.logit_normal == ("logit-normal" in arm)


@pytest.mark.parametrize("arm", ["muon", "purrception"])
def test_muon_trains_its_arm_and_no_other(small, monkeypatch, arm):
    def main(words):
        made.append(train.make_optimizer)
        raise InputError("the gradient norm is infinite")

    made, run = [], study.Run(arm, 1e-3, 0)
    monkeypatch.setattr(train, "main", main)
    run.folder.mkdir(parents=True)
    small().train([run])
    assert made == [study.MuonAndAdamW if arm == "muon" else study.ADAMW]


@pytest.mark.parametrize("arm", ["purrception", "cfm", "dfm"])
def test_the_temperature_reaches_the_sampler(monkeypatch, arm):
    f, z, t = build(arm), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    f.velocity = plain = lambda z, t, y, tau=None, cfg=1.0: z
    seen = {}
    monkeypatch.setattr(study, "references", lambda device: [None] * 4)
    monkeypatch.setattr(study, "draw_codes", lambda *args, **settings: seen.update(settings) or (None, None))
    monkeypatch.setattr(study, "decode_pixels", lambda *_: None)
    for name in "look", "figures":
        monkeypatch.setattr(study.judge, name, lambda *_: None)
    study.measure_samples(f, CPU, 20, 2.0, 0)
    settings = dict(cfm=dict(steps=10, order=2), purrception=dict(steps=10, order=2, tau=2.0), dfm=dict(steps=50, tau=2.0))
    assert seen == settings[arm]
    changed = (f.velocity(z, t, None) - plain(z, t, None)).abs().max() > 0.01
    assert changed == (arm == "cfm")


def test_an_arm_is_given_the_rate_that_is_best_over_all_seeds_of_the_two_best_at_the_first(small, monkeypatch):
    def figures(name, runs, knobs):
        return np.array([table[run.lr][run.seed] for run in runs]).reshape(-1, 1, 1)

    table = {1e-3: (9.0, 1.0), 3e-3: (5.0, 6.0), 1e-2: (4.0, 8.0), 1e-1: (np.inf, 0.0)}         # by seed
    it = small(rates=tuple(table), seeds=(0, 1))
    monkeypatch.setattr(it, "train", lambda runs: trained.extend(runs))
    monkeypatch.setattr(it, "figures", figures)
    monkeypatch.setattr(it, "denoising", lambda name, runs: np.ones((4, len(study.TIMES))))
    trained = []
    runs, lines = study.tune(it)
    assert {arm: [(run.objective, run.lr, run.seed) for run in each] for arm, each in runs.items()} == {
        arm: [(arm, 3e-3, 0), (arm, 3e-3, 1)] for arm in (*study.ARMS, "shuffled")}
    assert all(run in trained for each in runs.values() for run in each)
    assert "| cfm | 9.00 | 5.00 (5.50) | 4.00 (6.00) | inf |" in lines
    table = dict.fromkeys(table, (np.inf, np.inf))
    with pytest.raises(InputError, match="failed at the two best rates"):
        study.tune(it)


# ------------------------------ the whole

@pytest.mark.slow
def test_a_study_answers_every_question_and_measures_nothing_twice(small, monkeypatch):
    pyplot = MagicMock()
    pyplot.subplots = lambda rows, columns, **_: (MagicMock(), [MagicMock(**{"plot.return_value": [MagicMock()]})] * columns)

    def answers():
        it = small()
        runs, lines = study.tune(it)
        for ask in (study.converge, study.heat, study.denoise, study.calibrate, study.weigh_z_loss):
            lines += ask(it, runs, pyplot)
        return lines

    lines = answers()
    keys = [json.dumps(json.loads(line)[0]) for line in Path("results.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys))
    text = "\n".join(lines)
    assert all(f"| {arm} |" in text for arm in study.ARMS) and "| other real cats |" in text
    assert "| 6.9 (6.9 to 6.9) |" in text                  # ln 1024 = 6.93
    assert Path("temperatures.png").exists()
    assert "opt" not in torch.load(next(Path("runs").glob("*/ckpt-0000004.pt")))

    monkeypatch.setattr(study, "measure", None)            # a second time, all is in the table
    monkeypatch.setattr(study.train, "main", None)
    assert answers() == lines


@pytest.mark.parametrize("killed", ["before its first checkpoint", "between two"])
@pytest.mark.slow
def test_a_killed_run_is_finished(small, killed):
    run = study.Run("cfm", 1e-3, 0)
    small().train([run])
    whole = torch.load(run.checkpoint(4))
    if killed == "between two":                            # ckpt.pt is then that of step 2
        shutil.rmtree(run.folder)
        train.main(study.flags_of(run, steps=2, every=2, batch=4))
    else:
        run.checkpoint(4).unlink()
    small().train([run])
    again = torch.load(run.checkpoint(4))
    assert all(torch.equal(again["ema"][key], whole["ema"][key]) for key in whole["ema"])


@pytest.mark.slow
def test_a_run_that_diverges_is_noted_and_counts_as_the_worst(small):
    it, run = small(), study.Run("cfm", 1e30, 0)
    it.train([run])
    assert "gradient norm" in run.failed.read_text()
    assert it.figures("distance", [run], [1.0]).item() == np.inf
    it.train([run])                                        # it is not tried again
    assert not run.checkpoint(4).exists()


def test_a_folder_of_another_study_is_refused(small, monkeypatch):
    small()
    with pytest.raises(InputError, match="other settings"):
        small(steps=8)
    monkeypatch.setattr(study.hashlib, "sha256", lambda data: MagicMock(hexdigest=lambda: "0"))  # another judge
    with pytest.raises(InputError, match="other settings"):
        small()


@pytest.mark.parametrize("left", ["", "[[1], 2]\n", "[[1], 2]\n[[3], 4]\n", "[[1], 2]\n[[3", "[[3"])
def test_half_a_line_of_a_killed_study_is_dropped(small, left):
    Path("results.jsonl").write_text(left)
    assert small().results == {key: value for key, value in (("[1]", 2), ("[3]", 4)) if f"[{key}, {value}]\n" in left}
    assert Path("results.jsonl").read_text() == left[:left.rfind("\n") + 1]


def test_workers_end_when_the_study_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(study.HERE)!r})
import study

def work(_):
    print("working", flush=True)
    time.sleep(100)

if __name__ == "__main__":
    list(study.Study(study.QUICK, workers=2).spread(work, [1, 2, 3]))
""")
    process = subprocess.Popen([sys.executable, "killed.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    process.kill()
    rest, _ = process.communicate(timeout=50)              # returns once the workers, too, have closed the pipe
    assert rest == ""
