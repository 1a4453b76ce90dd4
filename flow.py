"""The paper: Purrception, variational flow matching for vector-quantized latents (Matisan et al., arXiv 2510.01478).

    path        z_t = t z1 + (1 - t) z0,   z0 ~ N(0, I),   z1 = e_c,   t ~ U(0, 1)
    posterior   pi  = softmax(logits(z_t, t, y) / tau)                                    (12, 15)
    mean        mu  = sum_k pi_k e_k
    velocity    v   = (mu - z_t) / (1 - t)                                                (13)
    loss        -log pi_c  +  z_loss (log sum_k exp logit_k)^2,   z_loss = 1e-5           (14, Sec. 3.3)
    guidance    logits = u + w (c - u),  c with the class, u without
    sampling    for s = 0..T-1: t = s/T, z <- z + v/T; then the nearest code              (Appendix B)

The path is continuous; the belief about its end is a distribution over codes. Nothing here knows the transformer: a network
is handed in, of which only hidden(z, t, y), final_layer.linear, input_size and num_classes are used (and DFM adds an embedding).

Shapes: B batch, N tokens of p x p positions each (G = p*p), D width, K codes, d code dimension, h w grid, P positions.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 2 ** 23    # logits the loss holds at once: 32 MiB in float32. Larger buys no speed, smaller starves the matrix products.


def seeded(device, *key):
    """Return a torch.Generator on device that is a pure function of the integers in key."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


# ------------------------------------------------------------------------------- positions and tokens

def to_tokens(codes, p):
    """Order codes [B,h,w] as the network's output is ordered: [B,N,p*p]."""
    B, h, w = codes.shape
    return codes.view(B, h // p, p, w // p, p).transpose(2, 3).reshape(B, -1, p * p)


def to_grid(x, p, h, w):
    """Undo to_tokens for vectors: x [B,N,p*p,C] to [B,h,w,C]."""
    x = x.view(len(x), h // p, w // p, p, p, -1)
    return x.transpose(2, 3).reshape(len(x), h, w, -1)


# ------------------------------------------------------------------------------- head and loss, in chunks

def product_dtype(h):
    """Return the dtype of the head's matrix product: autocast's where that is on, else h's own."""
    device = h.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype


def recast(x, space):
    """Convert x to the dtype of space, in space; or return x as it is, where it has that dtype already."""
    return x if x.dtype == space.dtype else space.copy_(x)


def head_and_loss(h, weight, bias, target, z_weight, dtype, want_gradients):
    """Multiply by the head, a chunk of logits at a time: ce, z, accuracy, and if wanted the gradients of ce + z.

    The gradient of ce + z with respect to one position's logits is  pi (1 + 2 z_weight lse) - onehot(c),  so it is known
    as soon as the logits are: it is formed in their place, multiplied into the gradients of h and of the weights, and
    dropped. dtype: that of the matrix products.
    """
    P, exact = target.numel(), torch.promote_types(dtype, torch.float32)  # float32 island; float64 stays
    rows = h.detach().flatten(0, -2).to(dtype)                           # [R,D], a row for G positions
    target = target.reshape(len(rows), -1)                               # [R,G]
    G, step = target.shape[1], max(1, CHUNK * target.shape[1] // len(weight))
    W, b = weight.detach().to(dtype).view(G, -1, rows.shape[1]), bias.detach().to(dtype).view(G, -1)  # [G,K,D], [G,K]
    ce, z_sum, hits = (torch.zeros((), dtype=exact, device=h.device) for _ in range(3))
    dh, dW, db = (torch.zeros_like(x, dtype=exact) if want_gradients else None for x in (rows, W, b))

    # Written over again and again: fresh memory for every chunk costs as much as its softmax.
    product, update = rows.new_empty(min(step, len(rows)), W.shape[1]), torch.empty_like(W[0])
    wide = product if dtype == exact else torch.empty_like(product, dtype=exact)

    with torch.autocast(h.device.type, enabled=False):
        for g in range(G):
            for i in range(0, len(rows), step):
                hs, c = rows[i:i + step], target[i:i + step, g, None]
                n = len(hs)
                logits = recast(torch.addmm(b[g], hs, W[g].T, out=product[:n]), wide[:n])  # [n,K]
                of_target = logits.gather(1, c)
                rival = logits.scatter_(1, c, -math.inf).amax(1, keepdim=True)   # best of the others: arg max takes 6x
                logits.scatter_(1, c, of_target)
                torch.softmax(logits, 1, out=logits)                     # pi, whose largest is exp(top - lse)
                lse = torch.maximum(of_target, rival) - logits.amax(1, keepdim=True).log()
                ce += (lse - of_target).sum()
                z_sum += lse.square().sum()
                hits += (of_target > rival).sum()
                if want_gradients:                                       # in place: pi becomes dlogit
                    logits.mul_(1 + 2 * z_weight * lse).scatter_add_(1, c, torch.full_like(of_target, -1))
                    db[g] += logits.sum(0)
                    dlogits = recast(logits, product[:n])
                    dh[i:i + step] += dlogits @ W[g]
                    dW[g] += torch.mm(dlogits.T, hs, out=update)

    gradients = [d.div_(P).view_as(x).to(x.dtype) for d, x in zip((dh, dW, db), (h, weight, bias))] if want_gradients else None
    return ce / P, z_weight * z_sum / P, hits / P, gradients


class LinearCrossEntropy(torch.autograd.Function):
    """Form the loss and its gradients in one pass; backward() scales these and hands them over, as they are."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, z_weight, want_gradients):
        ctx.settings = z_weight, product_dtype(h)
        ce, z, accuracy, ctx.gradients = head_and_loss(h, weight, bias, target, *ctx.settings, want_gradients)
        ctx.save_for_backward(h, weight, bias, target)
        outputs = ce + z, ce, z, accuracy
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        # Handed over, not copied: the head's is 100 MB for DiT-S/2. Whoever comes again (retain_graph) pays another pass.
        gradients, ctx.gradients = ctx.gradients or head_and_loss(*ctx.saved_tensors, *ctx.settings, True)[3], None
        return *(d.mul_(scale.to(d.dtype)) for d in gradients), None, None, None


def head_loss(h, weight, bias, target, z_weight):
    """Compute loss, ce, z as linear_cross_entropy does, and the share of positions whose target leads all other codes."""
    want = torch.is_grad_enabled() and any(x.requires_grad for x in (h, weight, bias))
    apply = LinearCrossEntropy.apply
    if torch.compiler.is_compiling():                      # the loop over chunks is to stay a loop. Not a decorator: that
        apply = torch.compiler.disable(apply)              # would load the compiler, a second, whenever this file is imported
    return apply(h, weight, bias, target, z_weight, want)


def linear_cross_entropy(h, weight, bias, target, z_weight=1e-5):
    """Apply a linear head, softmax cross-entropy and z-loss (Eq. 14, Sec. 3.3) without ever holding all logits.

    h [...,D]; weight [G*K,D] and bias [G*K], the head; target [...] int64, or [...,G] where a row carries G positions.
    Returns scalars loss = ce + z, ce = mean(-log pi_c), z = z_weight * mean(logsumexp^2), means over all positions.
    Only loss has gradients. Extra memory: one chunk of logits and the gradients themselves.
    """
    return head_loss(h, weight, bias, target, z_weight)[:3]


# ------------------------------------------------------------------------------- the method

class Purrception(nn.Module):
    """Learn a posterior over codes along a straight path from noise, and follow its mean to an image.

    model     network with hidden(z, t, y) -> [B,N,D], final_layer.linear: D -> p*p*K, input_size and num_classes
    codebook  [K,d], frozen
    z_loss    weight of the z-loss; label_dropout: share of labels replaced by "no class", which guidance needs
    """

    def __init__(self, model, codebook, z_loss=1e-5, label_dropout=0.1):
        super().__init__()
        self.model, self.z_loss, self.label_dropout = model, z_loss, label_dropout
        self.register_buffer("codebook", codebook.detach().float(), persistent=False)
        outputs, each = model.final_layer.linear.out_features, self.outputs(codebook)
        self.patch = math.isqrt(outputs // each)
        if self.patch ** 2 * each != outputs:
            raise ValueError(f"the head has {outputs} outputs, which is not p*p times {each}")

    @staticmethod
    def outputs(codebook):
        """Tell how many numbers the network is to return for each position: K logits."""
        return len(codebook)

    def start(self, B, generator=None, grid=None):
        """Draw the noise paths begin with: z0 [B,d,h,w], normal, on the generator's device; grid (h, w) is the network's."""
        return self.draw(torch.randn, B, self.codebook.shape[1], generator, grid)

    def draw(self, random, B, channels, generator, grid):
        """Draw random numbers [B,channels,h,w] by torch.randn or torch.rand, as start() says."""
        grid, device = grid or 2 * (self.model.input_size,), self.codebook.device if generator is None else generator.device
        return random(B, channels, *grid, generator=generator, device=device)

    def noise(self, B, generator=None, grid=None):
        """Draw what one training step needs: times t [B] in [0,1), start(), labels to drop [B] bool.

        The authors' release draws t from (0.001, 1) and drops no labels, so its null class is never trained.
        """
        t, drop = torch.rand(2, B, generator=generator, device=self.codebook.device)
        return t, self.start(B, generator, grid), drop < self.label_dropout

    def path(self, z0, codes, t):
        """Go from noise z0 to the codes [B,h,w], as far as t [B] says: z_t = t z1 + (1 - t) z0, [B,d,h,w]."""
        t = t.view(-1, 1, 1, 1)
        return t * self.embed(codes) + (1 - t) * z0

    def embed(self, codes):
        """Look up z1 = e_c: codes [B,h,w] to [B,d,h,w]."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def forward(self, codes, y, generator=None, noise=None):
        """Compute the training loss of codes [B,h,w] and classes y [B]: a scalar, and its parts as loss() names them.

        noise: what noise() draws; drawn from the generator where it is not given.
        """
        t, z0, drop = self.noise(len(codes), generator, codes.shape[1:]) if noise is None else noise
        if self.label_dropout > 0:
            y = y.masked_fill(drop, self.model.num_classes)
        return self.loss(self.path(z0, codes, t), t, y, codes)

    def loss(self, z, t, y, codes):
        """Compute -log pi_c + z-loss (Eq. 14) at the point z [B,d,h,w] of the path: scalar, {"ce", "z", "accuracy"}."""
        head = self.model.final_layer.linear
        h = self.hidden(z, t, y)                                         # [B,N,D]
        loss, ce, z_loss, accuracy = head_loss(h, head.weight, head.bias, to_tokens(codes, self.patch), self.z_loss)
        return loss, {"ce": ce, "z": z_loss, "accuracy": accuracy}

    def hidden(self, z, t, y):
        """Run the network up to its head: [B,N,D]."""
        return self.model.hidden(z, t, y)

    def map_head(self, f, z, t, y, cfg):
        """Apply f to the head's guided outputs, a chunk [n,K] at a time: [B,h,w,C] for f's C outputs. One network call.

        f is also told the chunk's place: which position of the patch, and which tokens (a slice of all BN).
        """
        head, width = self.model.final_layer.linear, self.outputs(self.codebook)
        if cfg != 1:                                                     # with and without the class, in one batch
            z2, t2, y2 = torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, self.model.num_classes)])
            c, u = self.hidden(z2, t2, y2).flatten(0, 1).chunk(2)        # [BN,D] each
            h = torch.lerp(u, c, cfg)                                    # the head is affine: this guides its outputs, too,
        else:                                                            # at the price of one product instead of two
            h = self.hidden(z, t, y).flatten(0, 1)
        dtype, step, out = product_dtype(h), max(1, CHUNK // 2 // width), []            # half: f may need some of its own
        exact = torch.promote_types(dtype, torch.float32)                # float32 island: f; float64 stays
        h, W, b = (x.to(dtype) for x in (h, head.weight, head.bias))
        with torch.autocast(z.device.type, enabled=False):
            for g, (Wg, bg) in enumerate(zip(W.split(width), b.split(width))):  # a position of the patch at a time
                chunks = (slice(i, i + step) for i in range(0, len(h), step))
                out.append(torch.cat([f(F.linear(h[some], Wg, bg).to(exact), g, some) for some in chunks]))  # [BN,C]
        tokens = torch.stack(out, 1).view(len(z), -1, len(out), out[0].shape[1])  # [B,N,G,C]
        return to_grid(tokens, self.patch, *z.shape[-2:])                # [B,h,w,C]

    def posterior(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute pi [B,h,w,K] (Eq. 12, 15), the belief about z [B,d,h,w] at times t [B]; cfg guides the logits."""
        return self.map_head(lambda logits, *_: torch.softmax(logits / tau, 1), z, t, y, cfg)

    def mean(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute mu = sum_k pi_k e_k [B,d,h,w], in chunks: never all of pi."""
        return self.map_head(lambda logits, *_: torch.softmax(logits / tau, 1) @ self.codebook, z, t, y, cfg).movedim(-1, 1)

    def entropy(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute the posterior's entropy -sum_k pi_k log2 pi_k, [B,h,w] in bits: from 0, certain, to log2 K."""
        def bits(logits, *_):
            logits = logits / tau
            return -(torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum(1, keepdim=True) / math.log(2)
        return self.map_head(bits, z, t, y, cfg).squeeze(-1)

    def velocity(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute v = (mu - z) / (1 - t), [B,d,h,w] (Eq. 13)."""
        return (self.mean(z, t, y, tau, cfg) - z) / (1 - t.view(-1, 1, 1, 1))

    @torch.no_grad()
    def sample(self, y, steps=100, tau=0.9, cfg=1.0, noise=None):
        """Sample codes [B,h,w] for classes y [B] by `steps` Euler steps, one network call each, from noise [B,d,h,w].

        The authors' release takes steps - 1 steps and divides by 1 - t + 1e-6; here the last step lands on mu.
        """
        return self.nearest(self.follow(y, np.arange(steps + 1) / steps, noise, tau=tau, cfg=cfg))

    def follow(self, y, times, noise=None, **knobs):
        """Follow the velocity by Euler steps through times 0..1, from noise (start()'s where there is none): z at t = 1."""
        z = self.start(len(y)) if noise is None else noise
        for t, after in itertools.pairwise(times):
            z = z + (after - t) * self.velocity(z, torch.full((len(y),), t, device=z.device), y, **knobs)
        return z

    @torch.no_grad()
    def nearest(self, z):
        """Return argmin_k |z - e_k|^2 for z [B,d,h,w]: codes [B,h,w], in chunks (|z|^2 is the same for all k)."""
        E, rows = self.codebook, z.movedim(1, -1).flatten(0, 2)          # [K,d], [Bhw,d]
        e2, step = E.square().sum(1), max(1, CHUNK // len(E))
        codes, scores = rows.new_empty(len(rows), dtype=torch.long), E.new_empty(min(step, len(rows)), len(E))
        with torch.autocast(z.device.type, enabled=False):               # float32 island
            for i in range(0, len(rows), step):
                some = rows[i:i + step]
                codes[i:i + step] = torch.addmm(e2, some, E.T, alpha=-2, out=scores[:len(some)]).argmin(1)
        return codes.view(len(z), *z.shape[2:])


# ------------------------------------------------------------------------------- the baselines

class CFM(Purrception):
    """Regress the velocity itself: conditional flow matching (Lipman et al. 2023, arXiv 2210.02747), continuous to the end.

    The same path and the same network, with d outputs a position instead of K. There is no posterior, so no tau: what comes
    after it goes by name.
    """

    def __init__(self, model, codebook, label_dropout=0.1):
        super().__init__(model, codebook, z_loss=None, label_dropout=label_dropout)

    @staticmethod
    def outputs(codebook):
        """Tell how many numbers the network is to return for each position: a velocity, d."""
        return codebook.shape[1]

    def loss(self, z, t, y, codes):
        """Compute the mean of (v - (z1 - z0))^2 at the point z [B,d,h,w] of the path: scalar, {"mse"}."""
        straight = (self.embed(codes) - z) / (1 - t.view(-1, 1, 1, 1))                  # z1 - z0
        mse = F.mse_loss(self.velocity(z, t, y), straight)
        return mse, {"mse": mse.detach()}

    def posterior(self, *_, **__):
        """Refuse: a velocity says nothing of single codes."""
        raise ValueError("CFM has no posterior over codes; ask Purrception or DFM")

    mean = entropy = posterior

    def velocity(self, z, t, y, *, cfg=1.0):
        """Compute v [B,d,h,w], the network's answer; cfg guides it as it does Purrception's logits."""
        return self.map_head(lambda v, *_: v, z, t, y, cfg).movedim(-1, 1)

    @torch.no_grad()
    def sample(self, y, steps=100, *, cfg=1.0, noise=None):
        """Sample codes [B,h,w] by Euler steps from noise [B,d,h,w]; the end is on no code, so the nearest is taken."""
        return self.nearest(self.follow(y, np.arange(steps + 1) / steps, noise, cfg=cfg))


class DFM(Purrception):
    """Unmask codes one by one: masked discrete flow matching (Gat et al. 2024, arXiv 2407.15595), discrete to the end.

    The state is a grid of codes, or K where a position is still masked. Schedule kappa = t: at time t a position is
    masked with probability 1 - t. The network, the same but for its first layer, sees one learned vector per code.
    """

    def __init__(self, model, codebook, z_loss=1e-5, label_dropout=0.1):
        super().__init__(model, codebook, z_loss, label_dropout)
        if not hasattr(model, "code_embedder"):
            model.code_embedder = nn.Embedding(len(codebook) + 1, model.in_channels)
            nn.init.normal_(model.code_embedder.weight, std=0.02)

    def start(self, B, generator=None, grid=None):
        """Draw two uniform numbers per position [B,2,h,w]: when it is unmasked, and what it turns into."""
        return self.draw(torch.rand, B, 2, generator, grid)

    def path(self, z0, codes, t):
        """Show the codes [B,h,w] whose time has come and mask the others: [B,h,w] in 0..K."""
        return torch.where(z0[:, 0] < t.view(-1, 1, 1), codes, len(self.codebook))

    def hidden(self, z, t, y):
        """Run the network on codes z [B,h,w] in 0..K, up to its head: [B,N,D]."""
        return self.model.hidden(self.model.code_embedder(z).movedim(-1, 1), t, y)

    def velocity(self, z, t, y, tau=1.0, cfg=1.0):
        """Compute the probability velocity (pi - onehot(z)) / (1 - t) of masked positions: [B,h,w,K+1]; 0 elsewhere."""
        masked = z == len(self.codebook)
        pi = F.pad(self.posterior(z, t, y, tau, cfg), (0, 1)) - F.one_hot(z, len(self.codebook) + 1)
        return masked.unsqueeze(-1) * pi / (1 - t.view(-1, 1, 1, 1))

    @torch.no_grad()
    def sample(self, y, steps=100, tau=1.0, cfg=1.0, noise=None):
        """Sample codes [B,h,w] by `steps` Euler steps on the probability velocity, from start()'s noise [B,2,h,w].

        A step of 1/T moves a masked position to code k with probability pi_k / (T (1 - t)). That is to say: each position
        is unmasked in the step that holds a uniform number of its own, and turns into a draw from pi. At T none is masked.
        """
        noise = self.start(len(y)) if noise is None else noise
        when, which = noise.unbind(1)
        uniform = to_tokens(which, self.patch).flatten(0, 1)             # [BN,G]

        def unmask(logits, g, some):                                     # invert the distribution function
            total = torch.softmax(logits / tau, 1).cumsum(1)             # [n,K]
            return torch.searchsorted(total, uniform[some, g, None] * total[:, -1:]).clamp(max=total.shape[1] - 1)

        z = torch.full_like(when, len(self.codebook), dtype=torch.long)
        for s in range(steps):
            t = torch.full((len(y),), s / steps, device=z.device)
            drawn = self.map_head(unmask, z, t, y, cfg).squeeze(-1)
            z = torch.where((z == len(self.codebook)) & (when < (s + 1) / steps), drawn, z)
        return z


OBJECTIVES = {"purrception": Purrception, "cfm": CFM, "dfm": DFM}
