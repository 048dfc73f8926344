# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///
"""Denoising diffusion probabilistic models in one file, to be read from top to bottom.

    python ddpm.py sample --digit 5 --gif   draw a five, and the film of how it comes out of noise
    python ddpm.py train                    learn to draw MNIST digits: ten minutes on a laptop
    python ddpm.py evaluate                 are its digits right, and do they look like MNIST's?
    python ddpm.py forward --gif            see digits turn into noise: what a schedule does

The idea: mix a picture x0 with Gaussian noise eps, a little at t = 1, almost only noise at t = T
(section 2). Train a net to tell the two apart again (3, 4). Then go from pure noise at T down to 0,
each step towards what the net takes the picture to be (5). That is the method; the rest makes a
tool of it. Papers are named where they are used. Left out, because each would cost a reader more
than it gives: learned variances and distillation (20 steps are few enough already), latent spaces
(digits are small), text (the names of ten classes need no language model). Licence: MIT.
"""
import argparse, contextlib, copy, inspect, itertools, math, os, shutil, signal, sys
import time, types, warnings, zipfile
from functools import partial
from json import dumps
from pathlib import Path

if __name__ == "__main__":                           # Ctrl-C is quiet, even during the imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

# ---- 1. What all sections use --------------------------------------------------------------------
NULL = -1  # the label that says "no label": the last row of the class embedding

class Mistake(Exception):
    """The user's error, which `main` prints as one line."""

def require(condition, message):
    """Raise Mistake unless the condition holds."""
    if not condition:
        raise Mistake(message)

def stream(seed, i):
    """The i-th random stream of a seed: a generator on the CPU, so that a seed gives the same
    numbers on each device, and the same picture but for rounding. torch uses 32 bits of a seed
    there; a large odd factor keeps the streams of nearby seeds apart."""
    return torch.Generator().manual_seed((seed * 2654435761 + i) % 2**32)

def to_uint8(x):
    """Numbers in [-1,1] of any shape -> uint8 in 0..255, rounded and clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()

# ---- 2. The forward process: from picture to noise -----------------------------------------------
# A step of noise is x_t = √(1-β_t)·x_{t-1} + √β_t·z, z Gaussian; a schedule is the T numbers β_t.
# All t steps at once are x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·eps, where ᾱ_t, here alpha_bar[t], is the product
# of all 1-β so far and falls from 1 to almost 0. The first noise comes at t = 1, as in the papers;
# t = 0 is the picture. Since alpha_bar[0] = 1, q_sample gives x0 back there, and a sampler's step
# to t = 0 gives its guess of the picture (section 5), without a special case.
def linear_betas(T):
    """β from 1e-4 to 0.02 (Ho et al. 2020, sec. 4), times 1000/T so that any T ends in noise."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T

def cosine_betas(T, s=0.008):
    """ᾱ(u) ∝ cos²(π/2·(u+s)/(1+s)), u = t/T (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    curve = torch.cos(math.pi / 2 * (u + s) / (1 + s)) ** 2
    return 1 - curve[1:] / curve[:-1]

def sigmoid_betas(T, start=-3, end=3):
    """ᾱ(u) ∝ sigmoid(end) - sigmoid(start + u·(end-start)), u = t/T (Jabri et al. 2022, fig. 8)."""
    logit = torch.linspace(start, end, T + 1, dtype=torch.float64)
    curve = logit[-1].sigmoid() - logit.sigmoid()
    return 1 - curve[1:] / curve[:-1]

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas}

def noise_schedule(schedule, T):
    """ᾱ_t = (1-β_1)·..·(1-β_t) (Ho et al. 2020, eq. 4), t = 0..T: (T+1,), ᾱ_0 = 1. No β is above
    0.999, lest ᾱ_T be 0: x0_from may divide by its root. In float64, for 1-ᾱ_1 is tiny, and
    therefore on the CPU: Apple's MPS has no float64."""
    betas = SCHEDULES[schedule](T).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])

def rates(alpha_bar, t, x):
    """signal_rate √ᾱ_t and noise_rate √(1-ᾱ_t), t (B,) on the CPU: two (B,1,1,1) on x's device."""
    alpha_bar_t = alpha_bar[t].view(-1, 1, 1, 1)
    return alpha_bar_t.sqrt().float().to(x.device), (1 - alpha_bar_t).sqrt().float().to(x.device)

def q_sample(x0, t, eps, alpha_bar):
    """x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·eps (Ho et al. 2020, eq. 4): t steps of noise at once.
    x0 (B,C,H,W) in [-1,1], eps like it, t (B,), or (1,) for all, int64 on the CPU, in 0..T."""
    signal_rate, noise_rate = rates(alpha_bar, t, x0)
    return signal_rate * x0 + noise_rate * eps

# ---- 3. Algorithm 1: the loss --------------------------------------------------------------------
# Given x_t, any one of eps, x0 and their mixture v tells the other two. v is the default: in almost
# pure noise x_t is nearly eps, so eps tells little of x0, but v is nearly -x0; and in almost no
# noise x0 tells little of eps, but v is nearly eps.
PREDICTIONS = ("eps", "v", "x0")
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}

def target(predict, x0, eps, signal_rate, noise_rate):
    """The right answer, (B,C,H,W): eps, x0, or v = √ᾱ·eps - √(1-ᾱ)·x0 (Salimans & Ho 2022, sec. 4).
    The rates are (B,1,1,1), from `rates`."""
    return {"eps": eps, "v": signal_rate * eps - noise_rate * x0, "x0": x0}[predict]

def x0_from(predict, out, x, signal_rate, noise_rate):
    """`target` solved for x0: the picture (B,C,H,W) that follows from the net's answer to x_t."""
    return {"eps": (x - noise_rate * out) / signal_rate,
            "v": signal_rate * x - noise_rate * out, "x0": out}[predict]

def diffusion_loss(net, x0, y, t, eps, alpha_bar, predict="v", loss="huber"):
    """E loss(net(x_t, t, y), target): a scalar (Ho et al. 2020, alg. 1 and, for l2 on eps, eq. 14).
    x0, eps (B,C,H,W), y (B,) labels or NULL, t (B,) int64 on the CPU, in 1..T."""
    out = net(q_sample(x0, t, eps, alpha_bar), t.to(x0.device), y)
    return LOSSES[loss](out.float(), target(predict, x0, eps, *rates(alpha_bar, t, x0)))

def logit_normal(u, mean=0.5, std=1.0):
    """t/T = sigmoid(a normal number): more of the middle, most on its noisy side, where shapes form
    (Esser et al. 2024; the numbers were found here). ndtri makes the uniform u normal. One t in
    twenty is left uniform, or t below 0.02·T and above 0.99·T would hardly ever be met."""
    normal = torch.special.ndtri((u - 0.05).clamp(min=0) / 0.95)
    return torch.where(u < 0.05, u / 0.05, torch.sigmoid(mean + std * normal))

# From u, uniform in 0..1, to t/T; "uniform" is every t equally often (Ho et al. 2020, alg. 1).
TIMESTEPS = {"logit-normal": logit_normal, "uniform": nn.Identity()}

def training_batch(images, labels, step, *, batch_size, T, label_drop, seed,
                   timesteps="logit-normal"):
    """Draw all that is random in a step from (seed, step) alone: a resumed run goes on alike.
    images uint8 (N,C,H,W), labels (N,) -> x0 in [-1,1], y (B,), t (B,) in 1..T, eps like x0."""
    B, random = batch_size, stream(seed, step)
    index = torch.randint(len(images), (B,), generator=random).to(images.device)
    u = (torch.arange(B) + torch.rand(B, generator=random, dtype=torch.float64)) / B
    t = 1 + (TIMESTEPS[timesteps](u) * T).long().clamp(max=T - 1)    # u stratified: a steadier loss
    drop = torch.rand(B, generator=random) < label_drop              # guidance needs out_NULL too
    x0, y = images[index] / 127.5 - 1, labels[index].masked_fill(drop.to(labels.device), NULL)
    return x0, y, t, torch.randn(x0.shape, generator=random).to(x0.device)

# ---- 4. The U-Net --------------------------------------------------------------------------------
# Down and up again, with skips (Ronneberger et al. 2015). It is quick because 2x2 pixels enter as
# one place of 4 channels: only the last convolution sees 28x28 pixels, for smooth edges.
def time_embedding(t, dim):
    """[sin(t·f), cos(t·f)], f from 1 to 1e-4 (after Vaswani et al. 2017, sec. 3.5): (B,dim)."""
    f = 10_000 ** -torch.linspace(0, 1, dim // 2, device=t.device)
    return torch.cat([torch.sin(t[:, None] * f), torch.cos(t[:, None] * f)], dim=1)

def zero(layer):
    """Set a layer to zero, so that its branch adds nothing at first, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

class Norm(nn.Module):
    """(B,c,H,W) -> like it: silu of the normed x, scaled and shifted as emb (B,c_emb) says, which
    is made of time and label (Dhariwal & Nichol 2021, sec. 3)."""
    def __init__(self, c, c_emb):
        super().__init__()
        self.norm, self.emb = nn.GroupNorm(8, c), nn.Linear(c_emb, 2 * c)

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        return F.silu(self.norm(x) * (1 + scale) + shift)

class ResBlock(nn.Module):
    """(B,c_in,H,W) -> (B,c_out,H,W): x + two convolutions, the second told emb (B,c_emb)."""
    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, c_in), Norm(c_out, c_emb)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.norm2(h, emb))

class Attention(nn.Module):
    """(B,c,H,W) -> like it: x + softmax(q·k/√d)·v over all places: distant strokes agree."""
    def __init__(self, c, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, c)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        h = F.scaled_dot_product_attention(*qkv.transpose(-1, -2).unbind(1))
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))     # h (B, heads, HW, C/heads)

class UNet(nn.Module):
    """net(x, t, y) is eps, v or x0, shaped like x (B,channels,size,size). t (B,) in 1..T. y (B,) in
    0..classes-1 or NULL (always so without classes), or a mix of labels, floats (B,classes+1): a
    weight for each, NULL's last. Raises Mistake."""
    def __init__(self, size=28, channels=1, classes=10, width=32):
        super().__init__()
        require(size % 4 == 0, f"the net takes squares with a side divisible by 4, not {size}")
        require(width % 8 == 0, f"--width {width}: it has to be divisible by 8")
        w, emb = width, 4 * width
        self.time = nn.Sequential(nn.Linear(w, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(classes + 1, emb)
        self.stem, self.down1 = nn.Conv2d(4 * channels, w, 3, padding=1), ResBlock(w, w, emb)
        self.shrink, self.down2 = nn.Conv2d(w, 2 * w, 3, 2, padding=1), ResBlock(2 * w, 2 * w, emb)
        self.attention, self.middle = Attention(2 * w), ResBlock(2 * w, 2 * w, emb)
        self.up2, self.up1 = ResBlock(4 * w, 2 * w, emb), ResBlock(3 * w, w, emb)
        self.norm, self.expand = Norm(w, emb), nn.Conv2d(w, 4 * 8, 3, padding=1)
        self.last = zero(nn.Conv2d(8 + channels, channels, 3, padding=1))

    def forward(self, x, t, y):
        time = self.time(time_embedding(t, self.time[0].in_features))
        label = y @ self.label.weight if y.is_floating_point() else self.label.weight[y]  # -1: last
        emb = F.silu(time + label)                                       # (B, 4w)
        h1 = self.down1(self.stem(F.pixel_unshuffle(x, 2)), emb)         # (B, w, size/2, size/2)
        h2 = self.down2(self.shrink(h1), emb)                            # (B, 2w, size/4, size/4)
        h = self.middle(self.attention(h2), emb)
        h = self.up2(torch.cat([h, h2], dim=1), emb)
        h = F.interpolate(h, scale_factor=2)                             # (B, 2w, size/2, size/2)
        h = self.up1(torch.cat([h, h1], dim=1), emb)                     # (B, w, size/2, size/2)
        h = F.pixel_shuffle(self.expand(self.norm(h, emb)), 2)           # (B, 8, size, size)
        return self.last(torch.cat([h, x], dim=1))                       # (B, channels, size, size)

# ---- 5. Algorithm 2: sampling --------------------------------------------------------------------
# One loop for all samplers: guess the picture, step towards the guess, look again from there.
def predict_x0(net, x, t, *, y, alpha_bar, predict, guidance=1.0, threshold=None):
    """x0_hat from x_t (B,C,H,W) at one t in 1..T, clipped to [-1,1], where pictures lie.
    With guidance g the answer is out_NULL + g·(out_y - out_NULL), out_NULL being that without a
    label: 0 ignores the label, 1 follows it, 3 goes three times as far, to clearer digits of less
    variety (Ho & Salimans 2022, eq. 6, with w = g - 1). A g other than 0 counts where
    0.02 < ᾱ < 0.7 and is 1 elsewhere: near T guidance costs variety, near t = 0 it does nothing
    (measured here; the idea is Kynkäänniemi et al. 2024). With a threshold, s is that quantile of
    |x0_hat|, at least 1: x0_hat is clipped to [-s,s], then divided by s (Saharia et al. 2022, sec.
    2.3)."""
    times, null = torch.full((len(x),), t), torch.full((len(x),), NULL, device=x.device)
    out = net(x, times.to(x.device), y if guidance else null)
    if guidance not in (0, 1) and 0.02 < alpha_bar[t] < 0.7:
        out_null = net(x, times.to(x.device), null)
        out = out_null + guidance * (out - out_null)
    s, x0_hat = 1, x0_from(predict, out, x, *rates(alpha_bar, times, x))
    if threshold:                                    # quantile computes in float64: not on MPS
        s = x0_hat.abs().flatten(1).cpu().quantile(threshold, 1).clamp(1).view(-1, 1, 1, 1).to(x)
    return x0_hat.clamp(-s, s) / s

def gaussian(shape, hands, device="cpu"):
    """Noise (B,*shape). A hand, as in handwriting, makes a picture's noise: Σ w·z over its pairs
    (generator, w), Σ w² = 1. Pictures of one hand get the same noise."""
    noise = [sum(w * torch.randn(shape, generator=one) for one, w in hand) for hand in hands]
    return torch.stack(noise).to(device)

def ddim_step(x, x0_hat, alpha_bar_t, alpha_bar_next, eta, noise):
    """From x_t to x_next (B,C,H,W), given what x0 is taken to be (Song et al. 2021, eq. 12, 16):
    x_next = √ᾱ_next·x0_hat + √(1-ᾱ_next-σ²)·eps_hat + σ·z,
    σ² = η²·(1-ᾱ_next)/(1-ᾱ_t)·(1-ᾱ_t/ᾱ_next). z = noise(). η = 0 adds no noise: DDIM. η = 1 is
    DDPM, for then σ² is the variance of x_next given x_t and x0 (Ho et al. 2020, eq. 7)."""
    # Not the net's own eps: x0_hat was clipped (and moved, by dpm); both together have to make x_t.
    eps_hat = (x - alpha_bar_t ** 0.5 * x0_hat) / (1 - alpha_bar_t) ** 0.5
    posterior = (1 - alpha_bar_next) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_next)
    sigma = eta * posterior ** 0.5
    x_next = alpha_bar_next ** 0.5 * x0_hat + (1 - alpha_bar_next - sigma ** 2) ** 0.5 * eps_hat
    return x_next + sigma * noise() if eta else x_next

SAMPLERS = {"ddpm": (1.0, 1000), "ddim": (0.0, 50), "dpm": (0.0, 20)}     # eta, number of steps

@torch.no_grad()
def denoise(x0_at, x, ts, alpha_bar, noise, sampler="dpm", eta=None):
    """Algorithm 2 (Ho et al. 2020): yield x (B,C,H,W) at each t of the falling list ts, x first.
    x0_at(x, t) is x0_hat. dpm is DPM-Solver++(2M) (Lu et al. 2022, alg. 2): a step of DDIM, but
    towards `aim`: x0_hat, carried on along the line through its last two values for half a step h
    of λ = log(signal_rate/noise_rate). The first step has no value before it, and the last one, to
    t = 0, an infinite λ: these two are plain DDIM."""
    eta = SAMPLERS[sampler][0] if eta is None else eta
    lam, x0_past = (alpha_bar.logit() / 2).tolist(), None
    yield x
    for t, t_next in itertools.pairwise(ts):
        x0_hat, h = x0_at(x, t), lam[t_next] - lam[t]
        aim = x0_hat
        if sampler == "dpm" and x0_past is not None and t_next > 0:
            aim = x0_hat + h / 2 * (x0_hat - x0_past) / h_past
        x0_past, h_past = x0_hat, h
        x = ddim_step(x, aim, *alpha_bar[[t, t_next]].tolist(), eta, noise)
        yield x

def draw(net, config, y, *, hands=None, x0=None, start=1.0, frames=1, sampler="dpm", steps=None,
         eta=None, guidance=1.5, threshold=None, seed=0):
    """Draw a picture for each label of y (n,), or mix of labels (n,classes+1), 250 at a time: uint8
    (frames,n,C,H,W), the last frame the sample; fewer frames if there are fewer steps. Picture i
    has its own noise, stream i, whatever else is drawn, or that of hands[i], {stream: w}. With
    start < 1 it starts from x0 (n,C,H,W), noised to t = start·T (SDEdit, Meng et al. 2022). steps
    is at most T; steps and eta are by default those of SAMPLERS. Raises Mistake."""
    T, steps = config["T"], steps or min(config["T"], SAMPLERS[sampler][1])
    began, shape = time.perf_counter(), [config["net"][k] for k in ("channels", "size", "size")]
    require(steps <= T, f"--steps {steps}: this net knows T = {T} steps")
    require(eta is None or sampler == "ddim", f"--eta is for --sampler ddim, {sampler} has its own")
    t_start, alpha_bar = round(start * T), noise_schedule(config["schedule"], T)
    ts = sorted({t_start * i // steps for i in range(steps + 1)}, reverse=True)     # evenly to 0
    # The film keeps `frames` of the states at ts, evenly spaced, the last among them.
    kept = sorted({len(ts) - 1 - (len(ts) - 1) * i // max(1, frames - 1) for i in range(frames)})
    film, device = torch.empty(len(kept), len(y), *shape, dtype=torch.uint8), net.stem.weight.device
    for part in (slice(first, first + 250) for first in range(0, len(y), 250)):
        mixes = [hands[i] if hands else {i: 1.0} for i in range(len(y))[part]]
        streams = [[(stream(seed, i), w) for i, w in mix.items()] for mix in mixes]
        noise = partial(gaussian, shape, streams, device)
        x0_at = partial(predict_x0, net, y=y[part].to(device), alpha_bar=alpha_bar,
                        predict=config["predict"], threshold=threshold,
                        guidance=guidance if config["classes"] else 0)
        x = noise()
        if t_start < T:
            x = q_sample(x0[part].to(device), torch.tensor([t_start]), x, alpha_bar)
        for i, x in enumerate(denoise(x0_at, x, ts, alpha_bar, noise, sampler, eta)):
            if i in kept:
                film[kept.index(i), part] = to_uint8(x).cpu()
            drawn = part.start + len(x) * (i + 1) / len(ts)
            status(drawn / len(y), began, f"{drawn:,.0f} of {len(y):,} pictures drawn")
    return film

def morph_path(labels, classes, frames):
    """The way from each label to the next, and from the last of three or more to the first, each in
    `frames` steps: y (n,classes+1) on a line, hands on a circle, cos·z_a + sin·z_b (variance 1)."""
    legs = len(labels) if len(labels) > 2 else 1
    one_hot, y, hands = torch.eye(classes + 1), [], []
    for leg, k in itertools.product(range(legs), range(frames + 1)):
        after, angle = (leg + 1) % len(labels), math.pi / 2 * k / frames
        y.append(torch.lerp(one_hot[labels[leg]], one_hot[labels[after]], k / frames))
        hands.append({leg: math.cos(angle), after: math.sin(angle)})
    return torch.stack(y), hands

# ---- 6. Pictures ---------------------------------------------------------------------------------
# What there is to look at: grids, films, the loss curve, and the line that shows the time left.
def write(path, save, **options):
    """Write a file, whole or not at all, by save(file, **options), and print its path."""
    shown, path = path, Path(path).resolve()         # what a link leads to, not the link
    part = Path(f"{path}.{os.getpid()}.part")
    require(path.is_file() or not path.exists(), f"{shown} is no ordinary file")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            save(file, **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)                 # if it failed
    with contextlib.suppress(OSError):               # Windows can't, nor can some file systems
        folder = os.open(path.parent, os.O_RDONLY)
        try:                                         # lest a power cut undo the renaming
            os.fsync(folder)
        finally:
            os.close(folder)
    print(shown, flush=True)

def grid(images, columns):
    """Lay pictures uint8 (n,C,H,W) out in rows: a PIL image, enlarged by a whole factor."""
    sheet = to_pil_image(make_grid(images, nrow=columns)[:images.shape[1]])  # it turns grey to RGB
    return ImageOps.scale(sheet, min(8, max(2, 640 // max(sheet.size))), Image.NEAREST)

def write_pictures(out, images, columns, film=()):
    """Write pictures uint8 (n,C,H,W) as a grid of 100 rows at most, a PNG, and a film, (frames,n,C,
    H,W), as a GIF beside it, which loops: 80 ms a frame, 2 s for the last."""
    write(out, grid(images[:100 * columns], columns).save, format="PNG")
    if len(film):
        first, *others = [grid(frame, columns) for frame in film]
        write(Path(out).with_suffix(".gif"), first.save, format="GIF", save_all=True, loop=0,
              append_images=others, duration=[80] * len(others) + [2000])

def draw_curve(losses):
    """Draw the loss over the steps, log scale, each pixel the mean of its steps: a PIL image."""
    mean = F.adaptive_avg_pool1d(torch.tensor([losses]).double(), min(640, len(losses)))[0]
    image, (low, high) = Image.new("L", (640, 360), 255), mean.aminmax()
    heights = 340 - 300 * (mean / low).log() / (high / low + 1e-9).log()
    canvas = ImageDraw.Draw(image)
    canvas.line([(640 * i / len(mean), y) for i, y in enumerate(heights.tolist())], fill=0, width=2)
    canvas.text((180, 10), f"loss {high:.3g} .. {low:.3g}, log, {len(losses)} steps", font_size=14)
    return image

def status(done, began, text=""):
    """Show a text and the time left on stderr, given the share done, 0..1, since the time began:
    in a terminal a line that is redrawn, blanked at the end, else a new line every ten seconds."""
    terminal, now = sys.stderr.isatty(), time.perf_counter()
    width = shutil.get_terminal_size().columns - 1
    if done == 1 and terminal:
        print(" " * width, end="\r", file=sys.stderr)
    silent = now - max(began, getattr(status, "shown", began))
    if 0 < done < 1 and silent > (0.3 if terminal else 10):
        status.shown, left = now, round((now - began) * (1 - done) / done)
        line = f"{text} · {left // 60}:{left % 60:02} left"
        print(f"{line[:width]:{width}}\r" if terminal else f"{line}\n", end="", file=sys.stderr)

# ---- 7. Data -------------------------------------------------------------------------------------
# A data set is one uint8 tensor in memory: no loader, no workers, no waiting.
def glyphs(root=None, train=True, download=False):
    """Digits in Pillow's own font, of many sizes, weights, places, slants and angles; no download.
    Like a torchvision set: data uint8 (n,28,28), targets, classes, n = 10,000, or 1,000 to test."""
    fonts, data = [ImageFont.load_default(size) for size in range(23, 32)], []
    chances = torch.rand(10_000 if train else 1_000, 6, generator=stream(int(train), 0)).tolist()
    for i, (size, weight, right, down, slant, turn) in enumerate(chances):
        image, k = Image.new("L", (28, 28)), 0.6 * slant - 0.3
        ImageDraw.Draw(image).text((12 + 4 * right, 12 + 4 * down), str(i % 10), 255, anchor="mm",
                                   font=fonts[int(size * 9)], stroke_width=int(weight * 2))
        image = image.transform((28, 28), Image.AFFINE, (1, k, -14 * k, 0, 1, 0), Image.BILINEAR)
        data.append(pil_to_tensor(image.rotate(24 * turn - 12, Image.BILINEAR)))
    return types.SimpleNamespace(data=torch.cat(data), targets=torch.arange(len(data)) % 10,
                                 classes=list("0123456789"))

def open_picture(path, mode="RGB"):
    """Read a picture file, upright, on white where it is transparent. Raises Mistake."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] == "I":               # 16 bits, which Pillow would clip, not scale
                picture = picture.convert("I").point(lambda level: level * (1 / 256))
            picture = picture.convert("L" if picture.mode[0] in "IF" else "RGBA").convert("RGBA")
            paper = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(paper, picture).convert(mode)
    except Exception as error:                       # Pillow has a dozen ways to refuse a file
        raise Mistake(f"{path} is no picture that Pillow can read ({error})") from None

def folder(root, train=True, download=False, size=32):
    """Your own pictures, root/CLASS/*, cropped to squares, every tenth kept for testing. Like a
    torchvision set: data uint8 (n,size,size,3), targets, classes."""
    files, kept = [path for path in sorted(Path(root).glob("*/**/*")) if path.is_file()], []
    for path in files:                               # not ImageFolder: it follows links in circles
        try:
            picture = ImageOps.fit(open_picture(path), (size, size))
            kept.append((pil_to_tensor(picture), path.relative_to(root).parts[0]))
        except Mistake as error:
            print(f"skipped: {error}", file=sys.stderr)
    require(len(kept) > 1, f"too few pictures in {root}/CLASS/*: --data names the folder")
    print(f"{len(kept)} pictures in {root}, {len(files) - len(kept)} skipped", file=sys.stderr)
    classes = sorted({name for _, name in kept})
    data, names = zip(*[one for i, one in enumerate(kept) if (i % 10 > 0) == train])
    return types.SimpleNamespace(data=torch.stack(data).permute(0, 2, 3, 1), classes=classes,
                                 targets=[classes.index(name) for name in names])

# name: function (root, train, download) to data uint8 (N,H,W) or (N,H,W,3), targets (N,), classes
DATASETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "kmnist": datasets.KMNIST,
            "cifar10": datasets.CIFAR10, "glyphs": glyphs, "folder": folder}

def load_data(dataset, data="data", size=None, train=True):
    """Load a data set; what is not in the folder `data` is downloaded into it. Raises OSError.
    Returns images uint8 (N,C,H,W), labels int64 (N,), the names of the classes."""
    try:
        with contextlib.redirect_stdout(None):       # torchvision names each mirror it tries
            options = {"size": size} if dataset == "folder" and size else {}
            found = DATASETS[dataset](data, train=train, download=True, **options)
        images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
        labels = labels.view(len(labels), -1)[:, 0]                      # QMNIST: class first
        if len(images) != len(labels) or not 0 <= labels.min() <= labels.max() < len(found.classes):
            raise ValueError("labels and pictures do not fit, is a file damaged?")
    except Mistake:
        raise
    except Exception as error:                       # servers and archives fail in a dozen ways
        raise OSError(f"{dataset} can't be read from {Path(data).resolve()} or downloaded to it: "
                      f"point --data to it, or try --dataset glyphs ({error})") from None
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    names = [name.split(" - ")[0].lower() for name in found.classes]     # MNIST has "0 - zero"
    return images, labels, found.classes if dataset == "folder" else names

def read_pictures(path, channels, size):
    """Read pictures to redraw: (k,C,size,size) in [-1,1]. For a grey net a file of any other size
    is a row of k digits: paper turns black, each is cut out and centred. Raises Mistake."""
    picture, edge = open_picture(path, "L" if channels == 1 else "RGB"), size // 7   # 4 of 28
    if channels == 1 and pil_to_tensor(picture)[0, [0, -1]].float().mean() > 127:
        picture = ImageOps.invert(picture)
    parts = [ImageOps.fit(picture, (size, size))]
    if channels == 1 and picture.size != (size, size):
        picture.thumbnail((100 * size, 4 * size))
        picture = ImageOps.autocontrast(picture, cutoff=(50, 1))         # most of it is paper
        picture = picture.point([max(0, level - 96) * 255 // 159 for level in range(256)])
        columns = F.pad(pil_to_tensor(picture)[0].amax(0) > 0, (1, 1)).int()
        parts = [picture.crop((left, 0, right, picture.height))
                 for left, right in columns.diff().nonzero().view(-1, 2).tolist()]
        parts = [part.crop(part.getbbox()) for part in parts]
        parts = [ImageOps.expand(ImageOps.pad(part, (size - 2 * edge,) * 2), edge)
                 for part in parts if part.height > size / 2]            # smaller ones are dirt
    require(parts, f"{path}: no digit stands out in it")
    return torch.stack([pil_to_tensor(part) for part in parts]) / 127.5 - 1

# ---- 8. Checkpoints ------------------------------------------------------------------------------
# A checkpoint has the settings, the step, the time spent, the log, the net, its average ("ema") and
# the optimizers: tensors, numbers and strings. torch.load takes nothing else (weights_only), so no
# file can run code. Random generators are not in it: (seed, step) is all the random state.
WEIGHTS = Path(__file__).with_name("assets") / "mnist.pt"

def load(path, keys=("config", "step", "ema")):
    """Read a file of ours, a dict with these keys, by default those of a net. Raises Mistake."""
    require(Path(path).is_file(), f"there is no file {path}: `ddpm.py train` makes checkpoints")
    try:
        require(zipfile.ZipFile(path).testzip() is None, "bad checksum")     # torch checks none
        found = torch.load(path, map_location="cpu", weights_only=True)
        ours = all(key in found for key in keys)     # pictures of other tools name no format
        require(ours and found.get("format", "ddpm.py 1") == "ddpm.py 1", "not ours")
    except Exception:                                # torch.load has a dozen ways to refuse a file
        raise Mistake(f"{path} is not a file of this program, or not a whole one") from None
    return found

def newest_run(name="*", default=None):
    """The checkpoint runs/NAME/ddpm.pt that was written last, or the default."""
    return max(Path("runs").glob(f"{name}/ddpm.pt"), key=os.path.getmtime, default=default)

def load_net(ckpt=None, device=None):
    """The averaged net of a checkpoint, by default the newest run's, else the one that comes with
    this file: (net, config). Raises Mistake."""
    path = ckpt or newest_run(default=WEIGHTS)
    checkpoint, device = load(path), pick_device(device)
    config = checkpoint["config"]
    try:
        known = {"dataset": DATASETS, "schedule": SCHEDULES, "predict": PREDICTIONS,
                 "T": range(2, 100_001)}
        require(all(config[key] in known[key] for key in known) and
                config["net"]["size"] in range(513) and
                config["net"]["classes"] == len(config["classes"]), "not ours")
        with torch.device("meta"):                   # takes no memory before all is known to fit
            net = UNet(**config["net"])
        net.load_state_dict(checkpoint["ema"], assign=True)
    except Exception:
        raise Mistake(f"{path} has settings or weights that are not of this program") from None
    print(f"net: {path} ({config['dataset']}, {checkpoint['step']:,} steps)")
    return net.float().to(device), config

def pick_device(name=None):
    """The torch device of that name, by default CUDA, else MPS, else the CPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if torch.cuda.is_available() and str(name or best).startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))      # of torchrun
    try:
        return torch.ones(1, device=name or best).cpu().to(name or best).device
    except Exception:                                # each kind of device fails in its own way
        raise Mistake(f"there is no device {name or best} here, try --device cpu") from None

# ---- 9. Training ---------------------------------------------------------------------------------
# Algorithm 1 until the budget is spent. An average of the weights over many steps draws best.
@torch.no_grad()
def update_average(averaged, net, step, ema):
    """averaged += (1-ema)·(net - averaged). ema starts at 0.1, to forget the untrained net soon."""
    ema = min(ema, (1 + step) / (10 + step))
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema)
    average(list(averaged.parameters()), list(net.parameters()), step)

def orthogonal(matrix):
    """U·Vᵀ of a matrix U·S·Vᵀ (m,n), roughly: rounds of Newton-Schulz bring S to 0.7 .. 1.2."""
    x, one = matrix / (matrix.norm() + 1e-7), torch.eye(len(matrix), device=matrix.device)
    for _ in range(5):
        square = x @ x.T
        x = (3.4445 * one - 4.775 * square + 2.0315 * square @ square) @ x
    return x

class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal: a matrix learns its rare directions as fast as its common
    ones, which gives better digits per minute than AdamW (Jordan et al. 2024). As a step's singular
    values are about 1 whatever the gradient, it takes a rate of its own: 10·lr."""
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.1)
            update = orthogonal(p.grad.lerp(momentum, 0.9).flatten(1)).view_as(p)
            p.add_(update, alpha=-10 * self.param_groups[0]["lr"])

def lock(folder):
    """Make a folder this process's own, until the file that is returned is closed, and remove what
    a killed one left half-written. Raises Mistake."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f"another training writes to {folder}: --out names another folder") from None
    except (ImportError, OSError):                   # Windows and some file systems have no locks
        pass
    for name in ("ddpm.pt", "log.csv", "loss.png", "samples-*.png"):
        for part in folder.glob(f"{name}.*.part"):
            part.unlink()
    return file

def agree(*values):
    """The mean of each number over torchrun's processes, which wait for each other here."""
    if distributed.is_available() and distributed.is_initialized():
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        means = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(means)
        values = (means / distributed.get_world_size()).tolist()
    return values

def save_run(out, checkpoint, net):
    """Write ddpm.pt, log.csv, loss.png, samples-STEP.png (five rows, always the same noise)."""
    log, step, config = (checkpoint[key] for key in ("log", "step", "config"))
    rows = ["step,seconds,loss,lr,images/s"] + [",".join(map(str, row)) for row in log]
    y = torch.arange(len(config["classes"]) or 10).repeat(5)
    plain = {} if checkpoint["flags"]["label_drop"] else {"guidance": 1.0}   # NULL is not learned
    with contextlib.redirect_stdout(None):
        write(out / "ddpm.pt", partial(torch.save, checkpoint))
        write(out / "log.csv", lambda file: file.write("\n".join(rows + [""]).encode()))
        write(out / "loss.png", draw_curve([row[2] for row in log] or [1.0]).save, format="PNG")
        images = draw(net, config, y, **plain)[-1]
        write_pictures(out / f"samples-{step:06}.png", images, len(y) // 5)
    print(f"step {step:,}: {out}/ddpm.pt, log.csv, loss.png, samples-{step:06}.png", flush=True)

def train(*, dataset="mnist", data="data", size=None, out=None, device=None, T=1000,
          schedule="cosine", predict="v", loss="huber", cond="class", width=32, epochs=None,
          steps=None, minutes=None, batch_size=64, timesteps="logit-normal", optimizer="muon",
          lr=2e-3, ema=0.999, label_drop=0.1, grad_clip=1.0, amp=False, compile=False, seed=0,
          resume=None):
    """Train a net and keep it in a folder: ddpm.pt, log.csv, loss.png and samples-STEP.png.
    By default ten minutes, on MNIST. The folder is written at the start, after each epoch (without
    --epochs: each tenth of the budget), at the end and on Ctrl-C. The learning rate warms up, then
    falls to 0 over the budget. Under torchrun each process takes its share of every batch.
    Example: python ddpm.py train --minutes 60 --width 64"""
    # resume: a checkpoint, from `load`. Returns the exit status. Raises Mistake and OSError.
    data = os.fspath(data)                           # a checkpoint holds strings, no Path
    flags = {k: v for k, v in locals().items() if k not in ("out", "device", "resume")}
    device, out = pick_device(device), Path(out or f"runs/{dataset}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    require((epochs, steps, minutes).count(None) > 1, "give one of --epochs, --steps and --minutes")
    require(batch_size % world == 0, f"--batch-size {batch_size} has no equal parts for {world}")
    require(dataset == "folder" or size is None, "--size is for --dataset folder")
    require(not amp or device.type in ("cpu", "cuda"), f"--amp is not for {device.type}")
    require(resume or not (out / "ddpm.pt").exists(),
            f"{out}/ddpm.pt exists: --resume --out {out} goes on with it, else name another --out")
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for turn in range(world):                        # one after the other: the first may download
        if turn == rank:
            images, labels, classes = load_data(dataset, data, size)
        agree(turn)                                  # only to wait
    classes = classes if cond == "class" else []
    config = {"dataset": dataset, "classes": classes, "T": T, "schedule": schedule,
              "predict": predict, "net": {"size": images.shape[2], "channels": images.shape[1],
                                          "classes": len(classes), "width": width}}
    for key in ("optimizer", *config) if resume else ():
        begun, now = resume["flags"] | resume["config"], flags | config
        require(begun[key] == now[key], f"{key} is {begun[key]} in {out}/ddpm.pt, not {now[key]}")
    torch.manual_seed(seed)
    net = UNet(**config["net"]).to(device)
    averaged, step, log = copy.deepcopy(net), 0, []
    began = time.perf_counter()
    # Muon is for matrices between hidden layers, AdamW for input, output, time, label and vectors.
    inner = [p for name, p in net.named_parameters() if p.ndim > 1 and optimizer == "muon"
             and not name.startswith(("stem", "time", "label", "last"))]
    outer = [p for p in net.parameters() if all(p is not q for q in inner)]
    adamw = torch.optim.AdamW(outer, lr, fused=device.type != "mps")
    muon = Muon([{"params": inner}], {"lr": lr})
    parts = {"net": net, "ema": averaged, "adamw": adamw, "muon": muon}
    if resume:
        step, log = resume["step"], resume["log"]
        began -= resume["seconds"]
        resume["adamw"]["param_groups"][0]["fused"] = device.type != "mps"
        for name, part in parts.items():
            part.load_state_dict(resume[name])
    images, labels, alpha_bar = images.to(device), labels.to(device), noise_schedule(schedule, T)
    total = steps or (epochs or 0) * math.ceil(len(images) / batch_size)     # updates; 0: by time
    weights = sum(parameter.numel() for parameter in net.parameters())
    print(f"{weights:,} weights learn {len(images):,} pictures of {dataset} on {device}")
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    model = torch.compile(model) if compile else model
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    saved, ended = None, []
    def end(number, frame):
        ended.append(number)
        signal.signal(number, signal.SIG_DFL)        # a second one ends at once
    with contextlib.ExitStack() as undo:             # whatever ends this
        undo.enter_context(lock(out) if rank == 0 else contextlib.nullcontext())
        for number in (signal.SIGINT, signal.SIGTERM):
            undo.callback(signal.signal, number, signal.signal(number, end))
        while True:
            seconds = time.perf_counter() - began
            done = min(1, step / total if total else seconds / 60 / (minutes or 10))
            done, stop = agree(done, len(ended))     # a signal to one process ends all
            mark, stop = int(done * (epochs or 10) + 1e-6), stop or done == 1    # 1e-6: rounding
            if rank == 0 and (stop or mark != saved):    # at the start too, lest it fail later
                saved = mark
                states = {name: part.state_dict() for name, part in parts.items()}
                save_run(out, {"format": "ddpm.py 1", "config": config, "flags": flags, "log": log,
                               "step": step, "seconds": seconds, **states}, averaged)
            if stop:
                break
            tick = time.perf_counter()
            batch = training_batch(images, labels, step, batch_size=batch_size, T=T, seed=seed,
                                   label_drop=label_drop if classes else 1, timesteps=timesteps)
            with mixed:
                share = (part[rank::world] for part in batch)
                objective = diffusion_loss(model, *share, alpha_bar, predict, loss)
            net.zero_grad()
            objective.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), grad_clip or 1e30).item()
            [value] = agree(objective.item())
            require(math.isfinite(value + norm), f"the loss is {value}, its gradient {norm:.3g} at "
                    f"step {step + 1}: resume with a lower --lr")
            lr_now = lr * min(1, (step + 1) / 100) * (1 - done)              # 100 steps of warm-up
            with mixed:                              # for the matrix products of Muon
                for optim in (adamw, muon):
                    optim.param_groups[0]["lr"] = lr_now
                    optim.step()
            update_average(averaged, net, step, ema)
            step, speed = step + 1, round(batch_size / (time.perf_counter() - tick))
            log.append((step, round(seconds, 3), value, lr_now, speed))
            epoch = step * batch_size / len(images)
            at = f"epoch {epoch:.2f}" if total else f"{seconds / 60:.1f} min"
            status(done, began, f"{at} · step {step:,} · loss {value:.4f} · {speed:,} images/s")
    if world > 1:
        distributed.destroy_process_group()
    print("done" if done == 1 else f"stopped; to go on: python ddpm.py train --resume --out {out}")
    return 0 if done == 1 else 128 + (ended or [signal.SIGTERM])[0]

# ---- 10. Evaluation ------------------------------------------------------------------------------
# A small classifier says whether samples are what was asked for, and how like real ones they look.
def classifier(dataset, images, labels, classes, data):
    """A net that reads pictures, 64 features before its last layer: nn.Sequential. It learns once,
    for four epochs of images uint8 (N,C,H,W), and is kept in the folder data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(images.shape[1], 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, len(classes)))
    net, path = net.to(images.device), Path(data, f"{dataset}-classifier.pt")
    of = {"classes": list(classes), "images": [*images.shape], "sum": images.sum().item()}
    if path.exists() and (found := load(path, ["net"])).get("of") == of:
        net.load_state_dict(found["net"])
        return net
    steps, began = max(1, 4 * len(images) // 64), time.perf_counter()
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(steps):
        x0, y, _, _ = training_batch(images, labels, step, batch_size=64, T=2, label_drop=0, seed=0)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(net(x0), y).backward()
        optimizer.step()
        status((step + 1) / steps, began, f"learning to read {dataset}, once")
    with contextlib.suppress(OSError):               # data that many share may not be written to
        write(path, partial(torch.save, {"format": "ddpm.py 1", "of": of, "net": net.state_dict()}))
    return net

def frechet(a, b):
    """|μ_a-μ_b|² + Tr(Σ_a + Σ_b - 2√(Σ_aΣ_b)) of features (n,d), (m,d) (Heusel et al. 2017)."""
    a, b = a.double().cpu(), b.double().cpu()
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    spread = a.T.cov().trace() + b.T.cov().trace() - 2 * root
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).item()

@torch.no_grad()
def rate(reader, images, labels, real):
    """Rate pictures uint8 (n,C,H,W) by a classifier: the share that it reads as their labels (None
    without labels), the Fréchet distance of their features from those of real ones, and the score
    exp E KL(p(y|x) ‖ p(y)), from 1 to the number of classes (Salimans et al. 2016, sec. 4)."""
    ours, theirs = (torch.cat([reader[:-1](part.to(real.device) / 127.5 - 1)
                               for part in pictures.split(500)]) for pictures in (images, real))
    p, labels = reader[-1](ours).softmax(1).double().cpu(), labels.cpu()
    score = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()
    right = None if (labels == NULL).any() else (p.argmax(1) == labels).double().mean().item()
    return {"right": right, "distance": frechet(ours, theirs), "score": score}

def evaluate(*, ckpt=None, dataset=None, data="data", n=None, raw=None, json=None, device=None,
             **drawing):
    """Rate samples: are they what was asked for, and do they look like the test set's pictures?
    The floor is what n real training pictures get. The distance is between features of our own
    small classifier, which has learned from those: not to be compared with an Inception-FID.
    Example: python ddpm.py evaluate --sampler ddim --steps 20 --json figures.json"""
    require(raw or dataset is None, "--dataset goes with --raw: a net knows its own")
    require(not raw or not (ckpt or n or drawing), "--raw is rated as it is: nothing is drawn")
    device = pick_device(device)
    if raw:
        saved = load(raw, ["images", "labels"])
        images, labels = saved["images"], saved["labels"]
        dataset = dataset or saved.get("dataset", "mnist")
        require(getattr(images, "dtype", None) == torch.uint8 and images.ndim == 4 and
                torch.is_tensor(labels) and labels.shape == images.shape[:1] and
                dataset in list(DATASETS), f"{raw} has no pictures with labels of a known data set")
        n, size = len(labels), images.shape[-1]
    else:
        net, config = load_net(ckpt, device)
        n, dataset, size = n or 1000, config["dataset"], config["net"]["size"]
    real, truth, classes = load_data(dataset, data, size)
    test = load_data(dataset, data, size, train=False)[0]
    require(min(n, len(test)) > 1, "one picture has no spread: rate two or more")
    require(raw or config["classes"] in ([], classes), f"{data} has other classes than this net")
    pick = torch.randint(len(real), (n,), generator=stream(0, 0))
    if not raw:
        labels = truth[pick] if config["classes"] else torch.full_like(pick, NULL)
        images = draw(net, config, labels, **drawing)[-1]
    require(images.shape[1:] == real.shape[1:], f"{raw} has another size than {dataset}")
    device = "cpu" if device.type == "mps" else device   # MPS can't pool 7x7 to 4x4
    reader = classifier(dataset, real.to(device), truth.to(device), classes, data)
    table = {"samples": rate(reader, images, labels, test.to(device)),
             "floor": rate(reader, real[pick], truth[pick], test.to(device))}
    print(f"n = {n:<8,} read right  distance  score   (our own features: no Inception-FID)")
    for name, row in table.items():
        right = "-" if row["right"] is None else f"{row['right']:.1%}"
        print(f"{name:12} {right:>10} {row['distance']:9.3f} {row['score']:6.3f}")
    if json:
        write(json, lambda file: file.write(dumps({"n": n, **drawing, **table}, indent=1).encode()))

# ---- 11. The command line ------------------------------------------------------------------------
# Each command is a function, and its arguments are its flags, as far as FLAGS knows them. Those of
# `draw` are flags of sample and evaluate too.
def sample(*, ckpt=None, digit=None, morph=None, style="free", init=None, strength=None, n=None,
           gif=False, out="samples.png", raw=None, device=None, **drawing):
    """Draw pictures with a trained net: a PNG, and on demand a GIF of how they come out of noise.
    Example: python ddpm.py sample --digit 2 0 2 6 --style same --n 6"""
    net, config = load_net(ckpt, device)
    names, asked = config["classes"], morph or digit or ()
    asked = [name if name in names else name.lower() for name in asked]
    for name in asked:
        require(name in names, f"{name}: this net knows {', '.join(names) or 'no labels'}")
    require(names or style == "free", "--style same is for a net that knows labels")
    require(init or strength is None, "--strength goes with --init")
    require(not gif or (n or 1) <= 100, f"--gif shows 100 rows at most, not --n {n}")
    row = [names.index(name) for name in asked or names] or [NULL] * 10
    if morph:
        require(len(row) > 1 and not (digit or init or n or raw or style == "same"),
                "--morph takes two classes or more, but no --digit, --init, --n, --raw or --style")
        y, drawing["hands"] = morph_path(row, len(names), frames=24)
        images = draw(net, config, y, **drawing)[-1]
        strip = images.unflatten(0, (-1, 24 + 1))[:, ::4].flatten(0, 1)  # a row for each leg
        return write_pictures(out, strip, 7, images[:, None])
    rows = n or (1 if digit else 10)
    if init:                                         # column k redraws picture k, from the first
        pictures = read_pictures(init, config["net"]["channels"], config["net"]["size"])
        row = row * len(pictures) if len(row) == 1 else row
        require(len(pictures) <= len(row), f"{init} has {len(pictures)} digits, not {len(row)}")
        drawing["x0"] = pictures[torch.arange(len(row)) % len(pictures)].repeat(rows, 1, 1, 1)
        drawing["start"] = 0.85 if strength is None else strength
    if style == "same":
        drawing["hands"] = [{hand: 1.0} for hand in range(rows) for _ in row]
    y = torch.tensor(row).repeat(rows)
    film = draw(net, config, y, frames=40 if gif else 1, **drawing)
    write_pictures(out, film[-1], len(row), film if gif else ())
    if raw:
        write(raw, partial(torch.save, {"format": "ddpm.py 1", "images": film[-1], "labels": y,
                                          "dataset": config["dataset"]}))

def forward(*, dataset="mnist", data="data", schedule="cosine", T=1000, out="noise.png", gif=False):
    """Draw pictures on their way to noise: a row for each class, columns at t = 0, T/10 .. T.
    Example: python ddpm.py forward --schedule linear --gif"""
    images, labels, classes = load_data(dataset, data)
    firsts = [labels.tolist().index(k) for k in labels.unique().tolist()]
    x0 = images[firsts] / 127.5 - 1
    eps, alpha_bar = torch.randn(x0.shape, generator=stream(0, 0)), noise_schedule(schedule, T)
    film = [to_uint8(q_sample(x0, torch.tensor([T * i // 40]), eps, alpha_bar)) for i in range(41)]
    write_pictures(out, torch.stack(film[::4], dim=1).flatten(0, 1), 11, film if gif else ())

def between(least, most):
    """argparse's options for a number from least to most, of the type of most."""
    def number(text):
        value = type(most)(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in {least}..{most}")
        return value
    return {"type": number, "metavar": f"{least}..{most}"}

SWITCH, TOGGLE = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
FLAGS = {  # group: {flag: (what it means, argparse's options)}; defaults stand in the signatures
    "files and device": {
        "--dataset": ("what to draw; glyphs, printed digits, are built in", {"choices": DATASETS}),
        "--data": ("folder of the data sets, or of your CLASS/PICTURE", {}),
        "--size": ("pixels a side for --dataset folder, 32 by default", between(8, 512)),
        "--ckpt": ("checkpoint, by default the newest runs/*/ddpm.pt, else assets/mnist.pt", {}),
        "--out": ("the PNG; for train the folder, runs/DATASET", {}),
        "--gif": ("write a GIF of the whole way too", SWITCH),
        "--raw": ("a .pt of images, uint8 (n,C,H,W), and labels (n,), to write or rate", {}),
        "--json": ("file to write the figures to", {}),
        "--device": ("cpu, cuda, cuda:1, mps; by default the best there is", {})},
    "diffusion": {
        "--T": ("number of noise steps", between(2, 100_000)),
        "--schedule": ("how the noise grows over them", {"choices": SCHEDULES}),
        "--predict": ("what the net answers", {"choices": PREDICTIONS}),
        "--loss": ("how its error is measured", {"choices": LOSSES}),
        "--timesteps": ("how often it meets which t", {"choices": TIMESTEPS}),
        "--cond": ("whether it learns the labels", {"choices": ["class", "none"]}),
        "--label-drop": ("share of labels hidden, for guidance other than 1", between(0.0, 1.0))},
    "training": {
        "--resume": ("go on with the run in --out, or the newest; flags replace its own", SWITCH),
        "--minutes": ("budget of time, 10 if there is no other budget", between(0.01, 1e6)),
        "--epochs": ("budget, each as many random pictures as the data has", between(1, 10**6)),
        "--width": ("channels of the finest maps, divisible by 8", between(8, 512)),
        "--batch-size": ("pictures an update, all processes together", between(1, 10**6)),
        "--optimizer": ("muon for inner matrices, or only adamw", {"choices": ["muon", "adamw"]}),
        "--lr": ("learning rate at its highest", between(1e-9, 10.0)),
        "--ema": ("decay of the averaged weights", between(0.0, 0.999999)),
        "--grad-clip": ("longest gradient allowed, 0 for no limit", between(0.0, 1e9)),
        "--amp": ("bfloat16 where it is quick (cpu, cuda)", TOGGLE),
        "--compile": ("torch.compile, needs a C++ compiler", TOGGLE)},
    "drawing": {
        "--digit": ("classes of a row, by default all", {"nargs": "+"}),
        "--morph": ("classes to turn one into the next, in a GIF and a strip", {"nargs": "+"}),
        "--style": ("same: each row from one noise, in one hand", {"choices": ["free", "same"]}),
        "--init": ("picture to redraw: a digit, or a row of them", {}),
        "--strength": ("share of T to noise --init by, 0.85 by default", between(0.0, 1.0)),
        "--sampler": ("how it goes from noise to picture", {"choices": SAMPLERS}),
        "--eta": ("noise of ddim: 0 none, 1 as ddpm", between(0.0, 1.0)),
        "--guidance": ("0 ignores the label, 1 follows it, more exaggerates", between(0.0, 100.0)),
        "--threshold": ("quantile for dynamic thresholding, say 0.995", between(0.5, 1.0))},
    "how many": {
        "--n": ("rows: 10, or 1 with --digit; for evaluate samples: 1000", between(1, 10**6)),
        "--steps": ("train: budget of updates; else of the sampler, at most T: " + ", ".join(
            f"{steps} for {name}" for name, (_, steps) in SAMPLERS.items()), between(1, 10**9)),
        "--seed": ("of all that is random", between(0, 2**32 - 1))}}

ADVICE = {"memory": "(lower --batch-size, --width or --n)",
          "Read-only": "(--out names another place)", "denied": "(--out names another place)"}

def main(argv=None):
    """Run a command line. Returns the exit status: 2 for the user's mistake, 1 for other errors."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stderr = sys.stderr or open(os.devnull, "w")                     # None if it was closed
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("ddpm.py", description=__doc__, **options)
    commands = parser.add_subparsers(required=True, metavar="command")
    warnings.simplefilter("ignore")                  # of libraries: a user gets one line or none
    for function in (train, sample, evaluate, forward):
        arguments = dict(inspect.signature(function).parameters)
        if "drawing" in arguments:
            arguments = {**inspect.signature(draw).parameters, **arguments}
        about, _, example = inspect.getdoc(function).rpartition("\n")
        command = commands.add_parser(
            function.__name__, help=about.split("\n")[0], description=about, epilog=example,
            usage="%(prog)s [flags]", argument_default=argparse.SUPPRESS, **options)
        command.set_defaults(function=function)
        command.error = parser.error = partial(require, False)           # raise Mistake, not exit
        for title, flags in FLAGS.items():
            group = command.add_argument_group(title)
            for flag, (text, kind) in flags.items():
                if argument := arguments.get(flag[2:].replace("-", "_")):
                    known = argument.default is not None and argument.default is not False
                    text += f" ({argument.default})" if known else ""
                    group.add_argument(flag, help=text, **kind)
    try:
        require(sys.version_info >= (3, 10) and hasattr(torch, "accelerator"),
                f"Python 3.10 and torch 2.6 are needed, these are {sys.version.split()[0]} and "
                f"{torch.__version__}")
        given = vars(parser.parse_args(argv))
        out = given.get("out", ".png")
        if int(os.environ.get("RANK", 0)):           # under torchrun the first process speaks
            sys.stdout, status.shown = None, math.inf
        require(given["function"] is train or out.endswith(".png"), f"--out {out}: not a .png")
        if "resume" in given:                        # as begun: the run's flags, then those given
            name = given.get("dataset", "*")
            out = given.get("out", str(newest_run(name, Path("runs", name, "ddpm.pt")).parent))
            checkpoint = load(Path(out, "ddpm.pt"), ["flags", "net", "adamw", "muon"])
            begun = checkpoint["flags"]
            if given.keys() & {"epochs", "steps", "minutes"}:
                begun.update(epochs=None, steps=None, minutes=None)
            words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
                     for name, value in begun.items() if value is not None and value is not False]
            given = vars(parser.parse_args(["train", *words, *argv[1:]]))
            given.update(out=out, resume=checkpoint)
        ended = given.pop("function")(**given)
        print(end="", flush=True)                    # fails here if the reader of a pipe has gone
        return ended
    except (Mistake, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        advice = [after for word, after in ADVICE.items() if word in text and "--" not in text]
        print(f"ddpm.py: error: {' '.join([text, *advice])}", file=sys.stderr)
        sys.stdout = None                            # or Python complains of the closed pipe too
        return 2 if isinstance(error, Mistake) or getattr(error, "filename", None) else 1

if __name__ == "__main__":
    sys.exit(main())
