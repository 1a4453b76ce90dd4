"""Purrception: variational flow matching for vector-quantized images (arXiv 2510.01478).

A tokenizer has turned each image into a grid of codes c (Eq. 9). Code k has the vector e_k.

    path        z_t = t z1 + (1 - t) z0,   z1 = e_c,   z0 ~ N(0, I),   t ~ U(0, 1)
    loss        -log pi_c  +  1e-5 (log sum_k exp logit_k)^2                     (Eq. 14, Sec. 3.3)
    posterior   pi = softmax(logits(z_t, t, y) / tau),  tau = 1 in training      (Eq. 12, 15)
    velocity    v  = (mu - z_t) / (1 - t),  mu = sum_k pi_k e_k                  (Eq. 13)
    sampling    for s = 0..T-1:  t = s/T,  z <- z + v/T;  then the nearest code  (Appendix B)

Shapes: B batch, h w grid of codes, d code dimension, K codes; N tokens of G = p*p positions each,
D width; n rows of logits at a time.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Purrception(nn.Module):
    """Learn a distribution over codes along a straight path from noise, and follow its mean.

    model: maps z [B,d,h,w], t [B], y [B] to K logits per position. codebook: the e_k, [K,d].
    label_dropout: share of labels made "no class" in training, for guidance.
    """

    def __init__(self, model, codebook, z_loss=1e-5, label_dropout=0.1):
        super().__init__()
        self.model = model
        self.z_loss = z_loss
        self.label_dropout = label_dropout
        codebook = codebook.detach().float()
        self.register_buffer("codebook", codebook, persistent=False)

    # ---------- training

    def forward(self, codes, y, noise=None):
        """Return the loss of codes [B,h,w] of classes y [B], and its parts by name."""
        t, z0, drop = noise or self.noise(len(codes))
        z = self.path(z0, codes, t)
        y = y.masked_fill(drop, self.model.num_classes)
        return self.loss(z, t, y, codes)

    def noise(self, B, generator=None):
        """Draw t ~ U(0, 1) [B], z0, and labels to drop [B]; the release: t > 0.001, and none."""
        device = (generator or self.codebook).device
        t, u = torch.rand(2, B, generator=generator, device=device)
        z0 = self.prior(B, generator)
        return t, z0, u < self.label_dropout

    def prior(self, B, generator=None):
        """Draw z0 ~ N(0, I): [B,d,h,w]."""
        d = self.codebook.shape[1]
        side = self.model.input_size
        device = (generator or self.codebook).device
        return torch.randn(B, d, side, side, generator=generator, device=device)

    def embed(self, codes):
        """Look up z1 = e_c of codes [B,h,w]: [B,d,h,w]."""
        z1 = F.embedding(codes, self.codebook)
        return z1.movedim(-1, 1)

    def path(self, z0, codes, t):
        """Compute z_t between z0 and codes: [B,d,h,w]."""
        z1 = self.embed(codes)
        t = t.view(-1, 1, 1, 1)
        return t * z1 + (1 - t) * z0

    def loss(self, z, t, y, codes):
        """Compute -log pi_c + z-loss (Eq. 14, Sec. 3.3) at the point z [B,d,h,w] of the path.

        It equals these lines, which would hold all logits at once:

            logits = self.model(z, t, y).flatten(0, 2)              # [Bhw,K]
            ce = F.cross_entropy(logits, codes.flatten())           # mean of -log pi_c
            z_part = self.z_loss * logits.logsumexp(1).square().mean()
            return ce + z_part, {"ce": ce, "z": z_part}
        """
        head = self.model.final_layer.linear
        h = self.model.hidden(z, t, y)                    # [B,N,D]
        target = to_tokens(codes, self.model.patch_size)  # [B,N,G]
        loss, ce, z_part = linear_cross_entropy(
            h, head.weight, head.bias, target, self.z_loss)
        return loss, {"ce": ce, "z": z_part}

    # ---------- sampling

    @torch.no_grad()
    def sample(self, y, steps=100, tau=0.9, cfg=1.0, noise=None):
        """Sample codes [B,h,w] of classes y [B] from noise [B,d,h,w] (Appendix B).

        The last of T steps lands on mu. The release takes T - 1 steps, with 1 - t + 1e-6 for 1 - t.
        """
        z = self.prior(len(y)) if noise is None else noise
        for s in range(steps):
            t = torch.full_like(y, s / steps, dtype=torch.float)
            z = z + self.velocity(z, t, y, tau, cfg) / steps
        return self.nearest(z)

    def velocity(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute v = (mu - z) / (1 - t), the mean under pi of (e_k - z) / (1 - t) (Eq. 11, 13)."""
        mu = self.mean(z, t, y, tau, cfg)
        t = t.view(-1, 1, 1, 1)
        return (mu - z) / (1 - t)

    def mean(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute mu = sum_k pi_k e_k: [B,d,h,w]."""
        E = self.codebook
        R = len(y) * self.model.input_size ** 2
        mu = E.new_empty(R, E.shape[1])
        for rows, logits in self.outputs(z, t, y, tau, cfg):    # [n,K]
            pi = torch.softmax(logits, 1)                       # Eq. 12, 15
            with torch.autocast(z.device.type, enabled=False):  # float32 island
                mu[rows] = pi @ E
        return self.on_grid(mu).movedim(-1, 1)

    def posterior(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute pi (Eq. 12, 15): [B,h,w,K]."""
        pi = [torch.softmax(logits, 1) for _, logits in self.outputs(z, t, y, tau, cfg)]
        return self.on_grid(torch.cat(pi))

    @torch.no_grad()
    def nearest(self, z):
        """Find the nearest codes, argmin_k |z - e_k|, of z [B,d,h,w]: [B,h,w]."""
        return nearest_code(z.movedim(1, -1), self.codebook)

    # ---------- the network's outputs

    def guided(self, z, t, y, cfg):
        """Compute the features [B,N,D] whose logits are null + cfg (cond - null).

        cond is with the class, null without. As the head is affine, it runs once, afterwards.
        """
        if cfg == 1:
            return self.model.hidden(z, t, y)
        no_class = torch.full_like(y, self.model.num_classes)
        z = torch.cat([z, z])
        t = torch.cat([t, t])
        y = torch.cat([y, no_class])
        cond, null = self.model.hidden(z, t, y).chunk(2)
        return torch.lerp(null, cond, cfg)

    def outputs(self, z, t, y, tau=1.0, cfg=1.0):
        """Yield slices of rows, and the guided logits / tau [n,K] there, in float32.

        Rows are sorted by position in the patch, then by image, then by patch. For CFM, K = d.
        """
        head = self.model.final_layer.linear
        h = self.guided(z, t, y, cfg) / tau  # cheaper than to divide the logits
        h = h.flatten(0, 1)
        G = self.model.patch_size ** 2
        weights = head.weight.chunk(G)  # [K,D] each
        biases = (head.bias / tau).chunk(G)
        K = len(head.bias) // G
        n = chunk_rows(K, h.device)
        done = 0
        for W, b in zip(weights, biases):
            for x in h.split(n):
                rows = slice(done, done + len(x))
                yield rows, F.linear(x, W, b).float()
                done = rows.stop

    def on_grid(self, x):
        """Put x [GBN,C], in outputs()' order, on the grid: [B,h,w,C]."""
        p = self.model.patch_size
        side = self.model.input_size // p
        x = x.unflatten(0, (p, p, -1, side, side))  # [p,p,B,h/p,w/p,C]
        x = x.permute(2, 3, 0, 4, 1, 5)             # [B,h/p,p,w/p,p,C]
        return x.flatten(3, 4).flatten(1, 2)


# ----- the baselines

class CFM(Purrception):
    """Regress the velocity: conditional flow matching (Lipman et al. 2023, arXiv 2210.02747).

    The head returns d numbers per position; tau must be None.
    """

    posterior = None

    def __init__(self, model, codebook, label_dropout=0.1):
        super().__init__(model, codebook, label_dropout=label_dropout)

    def loss(self, z, t, y, codes):
        v = self.velocity(z, t, y)
        z1 = self.embed(codes)
        t = t.view(-1, 1, 1, 1)
        straight = (z1 - z) / (1 - t)  # z1 - z0
        mse = F.mse_loss(v, straight)
        return mse, {"mse": mse.detach()}

    def sample(self, y, steps=100, tau=None, cfg=1.0, noise=None):
        return super().sample(y, steps, tau, cfg, noise)

    def velocity(self, z, t, y, tau=None, cfg=1.0):
        """Return what the network regresses, guided: [B,d,h,w]."""
        assert tau is None, "a regression has no temperature"
        out = [x for _, x in self.outputs(z, t, y, cfg=cfg)]
        return self.on_grid(torch.cat(out)).movedim(-1, 1)

    def mean(self, z, t, y, tau=None, cfg=1.0):
        v = self.velocity(z, t, y, tau, cfg)
        t = t.view(-1, 1, 1, 1)
        return z + (1 - t) * v


class Endpoint(CFM):
    """Regress z1, the paper's CFM-endpoint: the network returns mu, and v follows (Eq. 13)."""

    mean = CFM.velocity

    def loss(self, z, t, y, codes):
        mu = self.mean(z, t, y)
        z1 = self.embed(codes)
        mse = F.mse_loss(mu, z1)
        return mse, {"mse": mse.detach()}

    def velocity(self, z, t, y, tau=None, cfg=1.0):
        return Purrception.velocity(self, z, t, y, tau, cfg)


class DFM(Purrception):
    """Unmask codes at random: masked discrete flow matching (Gat et al. 2024, arXiv 2407.15595).

    A state z is a grid of codes, in which each is K, "masked", with probability 1 - t. The loss is
    Purrception's, and so is the network, behind a layer that embeds codes.
    """

    mean = velocity = None

    def __init__(self, model, codebook, *settings):
        super().__init__(model, codebook, *settings)
        embedder = CodeEmbedder(len(codebook) + 1, model.in_channels)
        nn.init.normal_(embedder.weight, std=0.02)
        model.x_embedder = nn.Sequential(embedder, model.x_embedder)

    def prior(self, B, generator=None):
        """Draw when each position is unmasked, and a number that picks its code: [B,2,h,w]."""
        side = self.model.input_size
        device = (generator or self.codebook).device
        return torch.rand(B, 2, side, side, generator=generator, device=device)

    def path(self, z0, codes, t):
        """Mask what is unmasked after t: [B,h,w] in 0..K."""
        t = t.view(-1, 1, 1)
        when = z0[:, 0]
        return torch.where(when < t, codes, len(self.codebook))

    @torch.no_grad()
    def sample(self, y, steps=100, tau=1.0, cfg=1.0, noise=None):
        """Sample codes [B,h,w] by Euler steps on the velocity (pi - onehot(z)) / (1 - t).

        In a step, a masked position becomes code k with probability pi_k / (T (1 - t)): its first
        uniform number picks the step, its second the code. The release draws the others anew, too.
        """
        noise = self.prior(len(y)) if noise is None else noise
        when, which = noise.unbind(1)                      # [B,h,w] each
        uniform = to_tokens(which, self.model.patch_size)  # [B,N,G]
        uniform = uniform.movedim(2, 0).flatten()          # in the order of outputs()
        masked = len(self.codebook)
        z = torch.full_like(when, masked, dtype=torch.long)
        for s in range(steps):
            t = torch.full_like(y, s / steps, dtype=torch.float)
            drawn = []
            for rows, logits in self.outputs(z, t, y, tau, cfg):
                pi = torch.softmax(logits, 1)
                drawn.append(pick(pi, uniform[rows]))
            drawn = self.on_grid(torch.cat(drawn)).squeeze(-1)
            due = when < (s + 1) / steps
            z = torch.where(due & (z == masked), drawn, z)
        return z


def pick(pi, uniform):
    """Draw codes [n,1] from pi [n,K]: the first whose running total exceeds uniform [n]."""
    total = pi.cumsum(1)
    goal = uniform.unsqueeze(1) * total[:, -1:]  # the last total is 1 up to rounding
    return torch.searchsorted(total, goal, right=True)


class CodeEmbedder(nn.Embedding):
    def forward(self, z):
        z = super().forward(z)  # [B,h,w,channels]
        return z.movedim(-1, 1)


OBJECTIVES = {
    "purrception": Purrception,
    "cfm": CFM,
    "endpoint": Endpoint,
    "dfm": DFM
}


# ----- beyond the paper

@torch.no_grad()
def sample_beyond(flow, y, steps=10, tau=0.9, cfg=1.0, noise=None,
                  order=2, interval=(0, 1), tau_end=None):
    """Sample codes [B,h,w] as flow.sample does, for a method that has a mean. Beyond it:

    order: 2 extends the line through the last two mu, so that ten steps are enough;
    interval: the times at which to guide (arXiv 2404.07724); other calls cost half;
    tau_end: the temperature at t = 1, linear in t from tau at t = 0.
    """
    z = flow.prior(len(y)) if noise is None else noise
    low, high = interval
    old_mu = None
    for s in range(steps):
        t = s / steps
        after = (s + 1) / steps
        guidance = cfg if low <= t <= high else 1.0
        tau_t = tau
        if tau_end is not None:
            tau_t = tau + (tau_end - tau) * t
        time = torch.full_like(y, t, dtype=torch.float)
        mu = flow.mean(z, time, y, tau_t, guidance)
        v = (mu - z) / (1 - t)
        if order == 2 and s > 0:
            slope = (mu - old_mu) * steps
            v = v + slope_weight(t, after) * slope
        old_mu = mu
        z = z + v / steps
    return flow.nearest(z)


def slope_weight(t, after):
    """Return the weight w of mu's slope in a step from t to `after` (as DEIS, arXiv 2204.13902).

    An Euler step along v + w slope solves dz/du = (mu - z) / (1 - u) for mu + slope (u - t). In
    the last step w = 1 overshoots, as mu comes to rest; 0.5 measured best.
    """
    if after == 1:
        return 0.5
    r = (1 - t) / (1 - after)
    return 1 - math.log(r) / (r - 1)


def logit_normal(t):
    """Turn uniform times into times with logit(t) ~ N(0, 1) (arXiv 2403.03206)."""
    return torch.sigmoid(torch.special.ndtri(t))


def geometric_head(flow, optimizer):
    """Train the head as W + phi A, so that codes with near vectors learn together.

    phi_k = (e_k, e_k^2), standardised over codes. W holds the sum; A, what a step adds to it, is
    zero between steps.
    """
    E = flow.codebook
    phi = torch.cat([E, E.square()], 1)  # [K,2d]
    phi = F.batch_norm(phi, None, None, training=True)
    W = flow.model.final_layer.linear.weight
    phi = torch.block_diag(*[phi] * (len(W) // len(E)))  # [G*K,2d*G]
    A = nn.Parameter(phi.new_zeros(phi.shape[1], W.shape[1]))

    def before_step(*_):
        A.grad = phi.T @ W.grad

    @torch.no_grad()
    def after_step(*_):
        W.addmm_(phi, A)
        A.zero_()

    optimizer.add_param_group({"params": A})
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


# ----- codes

def nearest_code(z, E):
    """Find argmin_k |z - e_k| for z [...,d] among the rows of E [K,d]: int64 [...]."""
    rows = z.flatten(0, -2)
    e2 = E.square().sum(1)
    n = chunk_rows(len(E), z.device, cpu=2 ** 18)  # 1 MiB of distances stay in the cache
    codes = rows.new_empty(len(rows), dtype=torch.long)
    with torch.autocast(z.device.type, enabled=False):  # float32 island
        for i in range(0, len(rows), n):
            x = rows[i:i + n]
            scores = torch.addmm(e2, x, E.T, alpha=-2)  # [n,K]: |x - e_k|^2 - |x|^2
            codes[i:i + n] = scores.argmin(1)
    return codes.view(z.shape[:-1])


def to_tokens(codes, p):
    """Reorder codes [B,h,w] to the network's patches: [B,N,G]."""
    codes = codes.unflatten(2, (-1, p))  # [B,h,w/p,p]
    codes = codes.unflatten(1, (-1, p))  # [B,h/p,p,w/p,p]
    codes = codes.transpose(2, 3)
    return codes.flatten(3).flatten(1, 2)


# ----- the head, in chunks

def chunk_rows(K, device, cpu=2 ** 22):
    """Return how many rows of K numbers to hold at a time: 256 MiB on a GPU, else 16 MiB.

    On a CPU, malloc would map new pages for every block from 32 MiB on.
    """
    numbers = 2 ** 26 if device.type == "cuda" else cpu
    return max(1, numbers // K)


def linear_cross_entropy(h, weight, bias, target, z_weight=1e-5):
    """Apply a linear head, softmax cross-entropy and z-loss (Eq. 14, Sec. 3.3) in chunks.

    h [...,D]; weight [G*K,D]; bias [G*K]; target int64 [...], or [...,G] for G positions per row.
    Returns loss = ce + z, ce = mean(-log pi_c), z = z_weight * mean(logsumexp^2). Only loss has
    gradients, for one backward pass. Memory holds one chunk of logits and the gradients.
    """
    h = h.flatten(0, -2)                 # [R,D]
    target = target.reshape(len(h), -1)  # [R,G]
    G = target.shape[1]
    weight = weight.unflatten(0, (G, -1))  # [G,K,D]
    bias = bias.unflatten(0, (G, -1))      # [G,K]
    grad = torch.is_grad_enabled()         # in forward() it never is
    return LinearCrossEntropy.apply(h, weight, bias, target, z_weight, grad)


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the loss and, if asked, its gradients in one pass; backward() only scales them."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, z_weight, grad):
        device = h.device.type
        dtype = h.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)  # float64 stays
        h = h.to(dtype)
        weight = weight.to(dtype)
        bias = bias.to(dtype)
        n = chunk_rows(weight.shape[1], h.device)
        space = h.new_empty(n, weight.shape[1])
        sums = h.new_zeros(2, dtype=exact)
        if grad:
            dh = torch.zeros_like(h, dtype=exact)
            dW = torch.zeros_like(weight, dtype=exact)
            db = torch.zeros_like(bias, dtype=exact)
            ctx.save_for_backward(dh, dW, db)

        with torch.autocast(device, enabled=False):
            for g, W in enumerate(weight):  # [K,D]
                for i in range(0, len(h), n):
                    x = h[i:i + n]                # [n,D]
                    c = target[i:i + n, g, None]  # [n,1]
                    logits = space[:len(x)]
                    torch.addmm(bias[g], x, W.T, out=logits)
                    dl = logits.to(exact)
                    sums += loss_and_gradient(dl, c, z_weight)
                    if grad:
                        db[g] += dl.sum(0)
                        dl = dl.to(dtype)
                        dh[i:i + n] += dl @ W
                        if dtype == exact:
                            dW[g].addmm_(dl.T, x)  # in place: no other [K,D]
                        else:
                            dW[g] += dl.T @ x

        ctx.positions = target.numel()
        ce, z = (sums / ctx.positions).unbind()
        ctx.mark_non_differentiable(ce, z)
        return ce + z, ce, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        scale = scale / ctx.positions
        gradients = [d.mul_(scale) for d in ctx.saved_tensors]  # in place
        return *gradients, None, None, None


def loss_and_gradient(logits, c, z_weight):
    """Compute -log pi_c and z_weight L^2 of logits [n,K] and codes c [n,1], summed over rows: [2].

    L is the logsumexp. The gradient of both sums overwrites the logits.
    """
    top = logits.amax(1, keepdim=True)
    logit_c = logits.gather(1, c)
    pi = torch.softmax(logits, 1, out=logits)  # in place
    L = top - pi.amax(1, keepdim=True).log()   # the largest pi is exp(top - L)
    pi.mul_(1 + 2 * z_weight * L)              # dl = pi (1 + 2 z_weight L) - onehot(c)
    pi.scatter_add_(1, c, torch.full_like(L, -1))
    ce = L - logit_c
    z = z_weight * L.square()
    sums = torch.cat([ce, z], 1)
    return sums.sum(0)
