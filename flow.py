"""Purrception: variational flow matching for vector-quantized images (arXiv 2510.01478).

    path        z_t = t z1 + (1 - t) z0,  z1 = e_c,  z0 ~ N(0, I),  t ~ U(0, 1)   (Eq. 9)
    posterior   pi  = softmax(logits(z_t, t, y) / tau)                          (Eq. 12, 15)
    mean        mu  = sum_k pi_k e_k
    velocity    v   = (mu - z_t) / (1 - t)                                      (Eq. 13)
    loss        -log pi_c + 1e-5 (log sum_k exp logit_k)^2,  with tau = 1       (Eq. 14, Sec. 3.3)
    sampling    for s = 0..T-1: t = s/T, z <- z + v/T; then the nearest code    (Appendix B)
    guidance    logits = u + cfg (c - u),  c with the class, u without

The method comes first, then three baselines, then the head in chunks. The network must have
hidden(z, t, y), final_layer.linear, input_size, patch_size and num_classes; DFM also needs
in_channels and x_embedder.

Shapes: B batch, h w grid of codes, d code dimension, K codes, N tokens of G = p*p positions,
D width.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Purrception(nn.Module):
    """Learn a distribution over codes along a straight path from noise, and follow its mean.

    model: maps z [B,d,h,w], t [B], y [B] to K logits per position. codebook: [K,d], frozen.
    z_loss: weight of the z-loss. label_dropout: share of labels that training replaces by
    "no class", for guidance.
    """

    def __init__(self, model: nn.Module, codebook: Tensor, z_loss=1e-5, label_dropout=0.1):
        super().__init__()
        self.model = model
        self.z_loss = z_loss
        self.label_dropout = label_dropout
        self.register_buffer("codebook", codebook.detach().float(), persistent=False)

    @torch.no_grad()
    def shape_head(self):
        """Let codes with near vectors start with near logits. DiT's head starts at zero.

        logit_k = h A phi_k,  phi_k = (e_k, e_k^2) standardised over codes,  A ~ N(0, 1/D)
        """
        E = self.codebook
        phi = torch.cat([E, E.square()], 1)
        phi = (phi - phi.mean(0)) / phi.std(0).clamp(min=1e-6)  # [K,2d]
        for W in self.model.final_layer.linear.weight.split(len(E)):  # [K,D]
            A = torch.randn(phi.shape[1], W.shape[1], device=E.device)
            W.copy_(phi @ A / W.shape[1] ** 0.5)

    def prior(self, B, generator=None):
        """Draw z0 ~ N(0, I): [B,d,h,w], on the generator's or codebook's device."""
        side = self.model.input_size
        shape = B, self.codebook.shape[1], side, side
        device = generator.device if generator else self.codebook.device
        return torch.randn(shape, generator=generator, device=device)

    def embed(self, codes):
        """Look up z1 = e_c: codes [B,h,w] to [B,d,h,w]."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def path(self, z0, codes, t):
        """Interpolate between noise z0 and codes: z_t, [B,d,h,w]."""
        z1 = self.embed(codes)
        t = t.view(-1, 1, 1, 1)
        return t * z1 + (1 - t) * z0

    # ---------- training

    def noise(self, B, generator=None, logit_normal=False):
        """Draw what a training step needs: t ~ U(0, 1) [B], z0, and which labels to drop [B].

        Beyond the paper: with logit_normal, logit(t) ~ N(0, 1) (arXiv 2403.03206).
        The authors' release has t > 0.001 and drops no labels: its null class stays untrained.
        """
        t, drop = torch.rand(2, B, generator=generator, device=self.codebook.device)
        if logit_normal:
            t = torch.sigmoid(torch.special.ndtri(t))  # the same quantile
        return t, self.prior(B, generator), drop < self.label_dropout

    def forward(self, codes: Tensor, y: Tensor, generator=None, noise=None) -> tuple[Tensor, dict]:
        """Compute the training loss of codes [B,h,w] of classes y [B].

        noise: what noise() returns; by default, it is drawn with the generator.
        Returns the loss, a scalar with gradients, and a dictionary of its parts.
        """
        if noise is None:
            noise = self.noise(len(codes), generator)
        t, z0, drop = noise
        z = self.path(z0, codes, t)
        y = y.masked_fill(drop, self.model.num_classes)
        return self.loss(z, t, y, codes)

    def loss(self, z: Tensor, t: Tensor, y: Tensor, codes: Tensor) -> tuple[Tensor, dict]:
        """Compute -log pi_c + z-loss (Eq. 14) at the point z [B,d,h,w] of the path."""
        head = self.model.final_layer.linear
        h = self.model.hidden(z, t, y)  # [B,N,D]
        target = to_tokens(codes, self.model.patch_size)  # [B,N,G]
        loss, ce, z_part = linear_cross_entropy(h, head.weight, head.bias, target, self.z_loss)
        return loss, {"ce": ce, "z": z_part}

    # ---------- sampling

    def guided(self, z, t, y, cfg):
        """Run the network once: features [BN,D] for which the head returns u + cfg (c - u).

        The head is affine, so guiding its input guides its logits, at half the head's cost.
        """
        if cfg == 1:
            h = self.model.hidden(z, t, y)
        else:
            null = torch.full_like(y, self.model.num_classes)
            z = torch.cat([z, z])
            t = torch.cat([t, t])
            y = torch.cat([y, null])
            c, u = self.model.hidden(z, t, y).chunk(2)
            h = torch.lerp(u, c, cfg)
        return h.flatten(0, 1).to(product_dtype(h))

    def logits(self, h):
        """Yield pairs (place, logits [n,K]), chunk by chunk, for features h [BN,D].

        A place is a slice of the tokens and the position g within their patches.
        """
        head = self.model.final_layer.linear
        K = len(self.codebook)
        W = head.weight.to(h.dtype).split(K)
        b = head.bias.to(h.dtype).split(K)
        for tokens, g in chunks(len(h), len(W), K, h.device):
            logits = F.linear(h[tokens], W[g], b[g])
            yield (tokens, g), at_least_float32(logits)

    def posterior(self, z: Tensor, t: Tensor, y: Tensor, tau=1.0, cfg=1.0) -> Tensor:
        """Compute pi (Eq. 12, 15) at z [B,d,h,w]: [B,h,w,K]."""
        p = self.model.patch_size
        E = self.codebook
        h = self.guided(z, t, y, cfg)
        pi = E.new_empty(len(h), p * p, len(E))  # [BN,G,K]
        for place, logits in self.logits(h):
            pi[place] = torch.softmax(logits / tau, 1)
        return to_grid(pi, p, z.shape[-2:])

    def mean(self, z: Tensor, t: Tensor, y: Tensor, tau=1.0, cfg=1.0) -> Tensor:
        """Compute mu = sum_k pi_k e_k [B,d,h,w] at z [B,d,h,w], with one chunk of pi at a time."""
        p = self.model.patch_size
        E = self.codebook
        h = self.guided(z, t, y, cfg)
        mu = E.new_empty(len(h), p * p, E.shape[1])         # [BN,G,d]
        with torch.autocast(z.device.type, enabled=False):  # float32 island: pi @ E
            for place, logits in self.logits(h):
                pi = torch.softmax(logits / tau, 1)         # [n,K]
                mu[place] = pi @ E
        mu = to_grid(mu, p, z.shape[2:])
        return mu.movedim(-1, 1)

    def velocity(self, z: Tensor, t: Tensor, y: Tensor, tau=1.0, cfg=1.0) -> Tensor:
        """Compute v = (mu - z) / (1 - t) (Eq. 13): [B,d,h,w]."""
        mu = self.mean(z, t, y, tau, cfg)
        t = t.view(-1, 1, 1, 1)
        return (mu - z) / (1 - t)

    @torch.no_grad()
    def sample(self, y: Tensor, steps=100, tau=0.9, cfg=1.0, noise=None, order=1, interval=(0, 1),
               start=0.0, known=None) -> Tensor:
        """Sample codes [B,h,w] of classes y [B] from noise [B,d,h,w]: T Euler steps, T calls.

        The authors' release takes T - 1 steps and divides by 1 - t + 1e-6; here the last step lands
        on mu. Beyond the paper: order 2, see bend(), needs about ten steps; interval, the times to
        guide at (arXiv 2404.07724); start, the time at which `noise` lies on the path; known, codes
        to end in, -1 where free.
        """
        z = self.prior(len(y)) if noise is None else noise
        last = None  # time and mu of the last call
        for s in range(steps):
            t = start + (1 - start) * s / steps
            after = start + (1 - start) * (s + 1) / steps
            time = torch.full((len(y),), t, device=z.device)
            guidance = cfg if interval[0] <= t <= interval[1] else 1.0
            v = self.velocity(z, time, y, tau, guidance)
            if known is not None:
                z1 = self.embed(known.clamp(0))
                v = torch.where(known.unsqueeze(1) < 0, v, (z1 - z) / (1 - t))
            if order == 2:
                mu = z + (1 - t) * v
                if last:
                    slope = (mu - last[1]) / (t - last[0])
                    v = v + bend(t, after) * slope
                last = t, mu
            z = z + (after - t) * v
        codes = self.nearest(z)
        if known is not None:
            codes = torch.where(known < 0, codes, known)
        return codes

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Find the nearest codes, argmin_k |z - e_k|, of z [B,d,h,w]: [B,h,w]."""
        E = self.codebook
        e2 = E.square().sum(1)
        rows = z.movedim(1, -1).flatten(0, 2)  # [Bhw,d]
        codes = rows.new_empty(len(rows), dtype=torch.long)
        with torch.autocast(z.device.type, enabled=False):  # float32 island: distances
            for some, _ in chunks(len(rows), 1, len(E), z.device):
                # without |z|^2, the same for all k
                distances = torch.addmm(e2, rows[some], E.T, alpha=-2)
                codes[some] = distances.argmin(1)
        return codes.view(len(z), *z.shape[2:])


def bend(t, after):
    """Return the weight w of mu's slope in a step from t to `after` (as DEIS, arXiv 2204.13902).

    For mu + slope (u - t), dz/du = (mu - z) / (1 - u) is solved by an Euler step along v + w slope.
    In the last step, w = 1 would overshoot, as mu comes to rest; half of it is best (measured).
    """
    if after == 1:
        return 0.5
    r = (1 - t) / (1 - after)
    return 1 - math.log(r) / (r - 1)


# ---------- the baselines

class CFM(Purrception):
    """Regress the velocity: conditional flow matching (Lipman et al. 2023, arXiv 2210.02747).

    Path and network are Purrception's, but the head returns a velocity, d numbers per position.
    There is no posterior, hence no tau, and sample() takes cfg by keyword only.
    """

    posterior = mean = None

    def __init__(self, model: nn.Module, codebook: Tensor, label_dropout=0.1):
        super().__init__(model, codebook, label_dropout=label_dropout)

    def loss(self, z: Tensor, t: Tensor, y: Tensor, codes: Tensor) -> tuple[Tensor, dict]:
        """Compute the mean of (v - (z1 - z0))^2 at the point z [B,d,h,w] of the path."""
        z1 = self.embed(codes)
        straight = (z1 - z) / (1 - t.view(-1, 1, 1, 1))  # z1 - z0
        mse = F.mse_loss(self.velocity(z, t, y), straight)
        return mse, {"mse": mse.detach()}

    def velocity(self, z: Tensor, t: Tensor, y: Tensor, tau=None, cfg=1.0) -> Tensor:
        """Compute the network's velocity at z [B,d,h,w], guided: [B,d,h,w]. tau must be None."""
        assert tau is None, "CFM has no temperature"
        p = self.model.patch_size
        h = self.guided(z, t, y, cfg)
        v = at_least_float32(self.model.final_layer.linear(h))  # [BN,G*d]
        v = v.unflatten(1, (p * p, -1))
        v = to_grid(v, p, z.shape[2:])
        return v.movedim(-1, 1)

    def sample(self, y: Tensor, steps=100, *, cfg=1.0, **others) -> Tensor:
        """Sample codes [B,h,w] as Purrception does."""
        return super().sample(y, steps, None, cfg, **others)


class Endpoint(CFM):
    """Regress z1, as the authors' release can: the network returns mu, and v follows (Eq. 13)."""

    def loss(self, z, t, y, codes):
        """Compute the mean of (mu - z1)^2 at the point z [B,d,h,w] of the path."""
        mse = F.mse_loss(self.mean(z, t, y), self.embed(codes))
        return mse, {"mse": mse.detach()}

    def mean(self, z, t, y, tau=None, cfg=1.0):
        """Compute the network's mu, guided: [B,d,h,w]. tau must be None."""
        return super().velocity(z, t, y, tau, cfg)

    def velocity(self, z, t, y, tau=None, cfg=1.0):
        """Compute (mu - z) / (1 - t)."""
        return Purrception.velocity(self, z, t, y, tau, cfg)


class DFM(Purrception):
    """Unmask codes one by one: masked discrete flow matching (Gat et al. 2024, arXiv 2407.15595).

    A state is a grid of codes in which K means "masked"; at time t a position is masked with
    probability 1 - t. The network is Purrception's, with a first layer added that embeds codes.
    """

    mean = velocity = None

    def __init__(self, model: nn.Module, codebook: Tensor, z_loss=1e-5, label_dropout=0.1):
        super().__init__(model, codebook, z_loss, label_dropout)
        embedder = CodeEmbedder(len(codebook) + 1, model.in_channels)
        model.x_embedder = nn.Sequential(embedder, model.x_embedder)

    def prior(self, B, generator=None):
        """Draw two uniform numbers per position, [B,2,h,w]: when it is unmasked, and as what."""
        side = self.model.input_size
        device = generator.device if generator else self.codebook.device
        return torch.rand((B, 2, side, side), generator=generator, device=device)

    def path(self, z0, codes, t):
        """Mask the codes [B,h,w] that are unmasked after t: [B,h,w] in 0..K."""
        t = t.view(-1, 1, 1)
        return torch.where(z0[:, 0] < t, codes, len(self.codebook))

    @torch.no_grad()
    def sample(self, y: Tensor, steps=100, tau=1.0, cfg=1.0, noise=None) -> Tensor:
        """Sample codes [B,h,w] by Euler steps on the velocity (pi - onehot(z)) / (1 - t).

        A step of 1/T turns a masked position into code k with probability pi_k / (T (1 - t)).
        So a position is unmasked in the step that contains its first uniform number; its second
        draws the code from pi.
        """
        noise = self.prior(len(y)) if noise is None else noise
        when, which = noise.unbind(1)  # [B,h,w] each
        p = self.model.patch_size
        masked = len(self.codebook)
        uniform = to_tokens(which, p).flatten(0, 1)  # [BN,G]
        z = torch.full_like(when, masked, dtype=torch.long)  # [B,h,w]
        for s in range(steps):
            t = torch.full((len(y),), s / steps, device=z.device)
            h = self.guided(z, t, y, cfg)
            drawn = torch.empty_like(uniform, dtype=torch.long).unsqueeze(2)
            for place, logits in self.logits(h):
                pi = torch.softmax(logits / tau, 1)  # [n,K]
                drawn[place] = pick(pi, uniform[place])
            drawn = to_grid(drawn, p, z.shape[1:]).squeeze(-1)
            due = (z == masked) & (when < (s + 1) / steps)
            z = torch.where(due, drawn, z)
        return z


def pick(pi, uniform):
    """Draw codes [n,1] from pi [n,K]: the first whose running total exceeds uniform [n]."""
    total = pi.cumsum(1)
    goal = uniform[:, None] * total[:, -1:]  # the last total is 1 up to rounding
    return torch.searchsorted(total, goal, right=True)


class CodeEmbedder(nn.Embedding):
    """Embed codes [B,h,w] as a map [B,channels,h,w]."""

    def __init__(self, codes, channels):
        super().__init__(codes, channels)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, z):
        return super().forward(z).movedim(-1, 1)


OBJECTIVES = {
    "purrception": Purrception,
    "cfm": CFM,
    "endpoint": Endpoint,
    "dfm": DFM,
}


# ---------- tokens and positions

def to_tokens(codes, p):
    """Reorder codes [B,h,w] to the network's patches: [B,N,G]."""
    B, h, w = codes.shape
    codes = codes.view(B, h // p, p, w // p, p)
    return codes.transpose(2, 3).reshape(B, -1, p * p)


def to_grid(x, p, grid):
    """Undo to_tokens, for vectors x [BN,G,C] on a grid (h, w): [B,h,w,C]."""
    h, w = grid
    C = x.shape[-1]
    x = x.view(-1, h // p, w // p, p, p, C)
    return x.transpose(2, 3).reshape(-1, h, w, C)


# ---------- the head, in chunks

CHUNK = 2 ** 22  # logits at a time, 16 MiB in float32. From 32 MiB on, malloc maps new pages


def chunk_rows(K, device):
    """Return how many rows of K logits to hold at a time. A GPU wants large products: 256 MiB."""
    return max(1, CHUNK * (16 if device.type == "cuda" else 1) // K)


def chunks(N, G, K, device):
    """Yield places of one chunk of logits: a slice of N tokens and one of G positions."""
    step = chunk_rows(K, device)
    for g in range(G):
        for i in range(0, N, step):
            yield slice(i, i + step), g


def product_dtype(h):
    """Return the dtype of the head's product: autocast's if it is on, else that of h."""
    device = h.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return h.dtype


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
                         z_weight=1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a linear head, softmax cross-entropy and z-loss (Eq. 14, Sec. 3.3) in chunks.

    h [...,D]; weight [G*K,D]; bias [G*K]; target int64 [...], or [...,G] for G positions per row.
    Returns the scalars loss = ce + z, ce = mean(-log pi_c), z = z_weight * mean(logsumexp^2), with
    means over positions. Only loss has gradients. Memory holds one chunk of logits and the
    gradients.
    """
    inputs = h, weight, bias
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    apply = LinearCrossEntropy.apply
    if torch.compiler.is_compiling():           # keep the loop out of the graph. A decorator
        apply = torch.compiler.disable(apply)   # would import the compiler: one second
    return apply(*inputs, target, z_weight, wanted)


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the loss and its gradients in one pass; backward() only scales them."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, z_weight, wanted):
        ctx.settings = z_weight, product_dtype(h)
        ctx.save_for_backward(h, weight, bias, target)
        ce, z, ctx.gradients = head_and_loss(h, weight, bias, target, *ctx.settings, wanted)
        ctx.mark_non_differentiable(ce, z)
        return ce + z, ce, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        gradients = ctx.gradients
        ctx.gradients = None                    # scaled in place, not kept: 100 MB for DiT-S/2
        if gradients is None:                   # a second backward() recomputes them
            gradients = head_and_loss(*ctx.saved_tensors, *ctx.settings, True)[2]
        dh, dW, db = (d.mul_(scale) for d in gradients)
        return dh, dW, db, None, None, None


def softmax_part(logits, c, z_weight):
    """Return logsumexp, the logit of c, scale [n,1] each, and gradient / scale [n,K].

    The latter overwrites the logits. scale is left to the smaller factors of its products.
    """
    top = logits.amax(1, keepdim=True)
    logit_c = logits.gather(1, c)
    pi = torch.softmax(logits, 1, out=logits)   # in place
    lse = top - pi.amax(1, keepdim=True).log()  # the largest pi is exp(top - lse)
    scale = 1 + 2 * z_weight * lse
    return lse, logit_c, scale, pi.scatter_add_(1, c, -1 / scale)


def compile_loss():
    """Compile softmax_part: two passes over the logits instead of six."""
    global softmax_part
    softmax_part = torch.compile(softmax_part)


def head_and_loss(h, weight, bias, target, z_weight, dtype, wanted):
    """Compute ce and z as linear_cross_entropy does and, if wanted, the gradients of ce + z.

    The gradient with respect to a position's logits, pi (1 + 2 z_weight lse) - onehot(c), adds to
    those of h, weight and bias, and is dropped.
    """
    exact = torch.promote_types(dtype, torch.float32)  # float32 island; float64 stays
    P = target.numel()
    rows = h.flatten(0, -2).to(dtype)           # [R,D]
    target = target.reshape(len(rows), -1)      # [R,G]
    W = weight.to(dtype).unflatten(0, (target.shape[1], -1))  # [G,K,D]
    b = bias.to(dtype).unflatten(0, (target.shape[1], -1))  # [G,K]
    G, K, _ = W.shape
    space = rows.new_empty(min(len(rows), chunk_rows(K, h.device)), K)  # less memory
    ce, z_part = torch.zeros(2, dtype=exact, device=h.device)
    if wanted:
        dh = torch.zeros_like(rows, dtype=exact)
        dW = torch.zeros_like(W, dtype=exact)
        db = torch.zeros_like(b, dtype=exact)

    with torch.autocast(h.device.type, enabled=False):
        for some, g in chunks(len(rows), G, K, h.device):
            x = rows[some]                                  # [n,D]
            c = target[some, g, None]                       # [n,1]
            logits = torch.addmm(b[g], x, W[g].T, out=space[:len(x)])  # [n,K]
            lse, logit_c, scale, grad = softmax_part(logits.to(exact), c, z_weight)
            ce += (lse - logit_c).sum()  # -log pi_c
            z_part += z_weight * lse.square().sum()
            if wanted:
                db[g] += torch.mv(grad.T, scale.squeeze(1))
                grad = grad.to(dtype)
                dh[some] += scale * (grad @ W[g])
                dW[g] += grad.T @ (scale * x).to(dtype)

    gradients = None
    if wanted:
        pairs = (dh, h), (dW, weight), (db, bias)
        gradients = [d.div_(P).view_as(x).to(x.dtype) for d, x in pairs]
    return ce / P, z_part / P, gradients
