# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///
"""Denoising diffusion probabilistic models (Ho et al. 2020) that draw MNIST digits.

    python ddpm.py sample --digit 5 --gif    draw a five, and how it comes out of noise
    python ddpm.py train                     learn to draw digits
    python ddpm.py forward --gif             watch digits turn into noise

One file, to be read from top to bottom. Noise is mixed into images (section 1). A network
learns to split a noisy image into its image and its noise (2, 3). With it, pure noise is
turned into an image, step by step (4). The rest is a tool. As Ho et al. did, but for the net:

    python ddpm.py train --cond none --schedule linear --target eps --loss l2 --timesteps uniform
    python ddpm.py sample --sampler ddpm
"""
import argparse
import copy
import inspect
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, transforms
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

class UserError(ValueError):
    """A mistake that the user can mend. Its text says how."""

# ---- 1. The forward process: from an image to noise ----------------------------------
# A schedule is T small numbers β_1..β_T. Step t mixes a little Gaussian noise z into x:
#     x_t = √(1-β_t)·x_{t-1} + √β_t·z.
# A step keeps 1-β_t of x's variance and adds β_t: a variance of 1 stays 1. After t steps,
#     ᾱ_t = (1-β_1)·(1-β_2)·..·(1-β_t)
# of the image's variance is left. The noise has 1-ᾱ_t, and is Gaussian, like its parts:
#     x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·eps, eps normal.
# In the code, ᾱ_t is alpha_bar[t]. alpha_bar[0] is 1: x_0 is the image.

def linear_betas(T):
    """β from 1e-4 to 0.02 if T is 1000 (Ho et al. 2020). For another T, β is scaled by
    1000/T: their sum stays the same, and with it ᾱ_T, which is about exp(-sum)."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T

def cosine_betas(T, s=0.008):
    """ᾱ falls like cos² of t/T: images fade evenly (Nichol & Dhariwal 2021, eq. 17). By
    s, the first steps have noise enough to learn from."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}

def noise_schedule(name, T):
    """alpha_bar: ᾱ_t for t = 0..T, float32 (T+1,)."""
    # β = 1 would leave no image: cosine's last would be 1, linear's too if T <= 20.
    betas = SCHEDULES[name](T).clamp(max=0.999)
    return torch.cat([torch.ones(1), (1 - betas).cumprod(0)]).float()

def rates(alpha_bar, t):
    """√ᾱ_t, how much image, and √(1-ᾱ_t), how much noise: (B,1,1,1) for t (B,)."""
    alpha_bar_t = alpha_bar[t].view(-1, 1, 1, 1)
    return alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()

def q_sample(x0, t, eps, alpha_bar):
    """x_t (B,C,H,W): images x0 in [-1,1] and noise eps, mixed for t (B,) (Ho et al. eq. 4)."""
    signal_rate, noise_rate = rates(alpha_bar, t)
    return signal_rate * x0 + noise_rate * eps

# ---- 2. The loss: split a noisy image into image and noise ---------------------------
# Ho et al. train a network to predict eps. But x0 = (x_t - √(1-ᾱ)·eps)/√ᾱ divides by almost
# 0 near t = T: there, a small error in eps is a huge one in x0. Our network predicts
#     v = √ᾱ·eps - √(1-ᾱ)·x0    (Salimans & Ho 2022).
# See a pixel's (x0, eps) as a point in the plane. With √ᾱ = cos φ and √(1-ᾱ) = sin φ,
# (x_t, v) is that point rotated by -φ. Rotated back, it gives both:
#     x0 = √ᾱ·x_t - √(1-ᾱ)·v,    eps = √(1-ᾱ)·x_t + √ᾱ·v.

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}

def diffusion_loss(net, x0, y, t, eps, alpha_bar, target="v", loss="huber"):
    """The loss of Ho et al.'s Algorithm 1, a scalar. Target eps and loss l2 are theirs.
    Images x0 and noise eps (B,C,H,W), labels y (B,), t (B,) in 1..T.

    The net always predicts v. If v is off by d, then by the formulas above eps is off by
    √ᾱ·d and x0 by -√(1-ᾱ)·d. So each loss compares v, times a factor of any sign."""
    signal_rate, noise_rate = rates(alpha_bar, t)
    v = signal_rate * eps - noise_rate * x0
    v_hat = net(q_sample(x0, t, eps, alpha_bar), t, y).float()  # --amp makes it bfloat16
    weight = {"eps": signal_rate, "v": 1, "x0": noise_rate}[target]
    return LOSSES[loss](weight * v_hat, weight * v)

# ---- 3. The network: a U-Net ---------------------------------------------------------
# The image is halved twice: first each 2x2 pixels become one, of 4 times the channels
# (fast on a CPU), then by a convolution. It is doubled twice. On the way up, each size also
# gets what the way down had there, by a "skip" (Ronneberger et al. 2015).

NULL = -1  # the label that says "no label"

def time_embedding(t, dim):
    """sin(t·f) and cos(t·f) for dim/2 frequencies f, from 1 to 1e-4: t (B,) -> (B,dim)."""
    f = 10_000 ** torch.linspace(0, -1, dim // 2, device=t.device)
    return torch.cat([torch.sin(t[:, None] * f), torch.cos(t[:, None] * f)], dim=1)

class ResBlock(nn.Module):
    """x (B,c_in,H,W) -> (B,c_out,H,W): two convolutions add something to x. In between, emb
    (B,c_emb), of time and label, scales and shifts h (Dhariwal & Nichol 2021, sec. 3)."""
    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at first, a block adds nothing

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))

class Attention(nn.Module):
    """x (B,c,H,W) -> the same shape: each position looks at all others."""
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(8, c)
        self.attention = nn.MultiheadAttention(c, num_heads=4, batch_first=True)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, c)
        h, _ = self.attention(h, h, h, need_weights=False)
        return x + h.transpose(1, 2).reshape(x.shape)

class UNet(nn.Module):
    """x_t (B,C,H,W), t (B,) in 1..T and labels y (B,), 0..classes-1 or NULL -> v (B,C,H,W)."""
    def __init__(self, channels=1, classes=10, width=32):
        super().__init__()
        self.width = w = width
        c_emb = 4 * w
        self.time = nn.Sequential(nn.Linear(w, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(1 + classes, c_emb)  # row 0 is NULL's
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.down1 = ResBlock(w, w, c_emb)
        self.halve = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.down2 = ResBlock(2 * w, 2 * w, c_emb)
        self.attention = Attention(2 * w)
        self.middle = ResBlock(2 * w, 2 * w, c_emb)
        self.up2 = ResBlock(2 * w + 2 * w, 2 * w, c_emb)  # 2w are the skip's
        self.up1 = ResBlock(2 * w + w, w, c_emb)  # w are the skip's
        self.norm = nn.GroupNorm(8, w)
        self.unfold = nn.Conv2d(w, 4 * 8, 3, padding=1)  # 8 channels a pixel
        self.last = nn.Conv2d(8 + channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # at first, v is the bias

    def forward(self, x, t, y):
        emb = F.silu(self.time(time_embedding(t, self.width)) + self.label(y + 1))

        h1 = self.down1(self.stem(F.pixel_unshuffle(x, 2)), emb)  # (B, w, H/2, W/2)
        h2 = self.down2(self.halve(h1), emb)  # (B, 2w, H/4, W/4)
        h = self.middle(self.attention(h2), emb)
        h = self.up2(torch.cat([h, h2], dim=1), emb)
        h = F.interpolate(h, scale_factor=2)  # (B, 2w, H/2, W/2)
        h = self.up1(torch.cat([h, h1], dim=1), emb)  # (B, w, H/2, W/2)

        # Back to single pixels. The last convolution sees x, too: all above worked on 2x2.
        h = F.pixel_shuffle(self.unfold(F.silu(self.norm(h))), 2)  # (B, 8, H, W)
        return self.last(torch.cat([h, x], dim=1))

# ---- 4. Sampling: from noise to an image ---------------------------------------------
# Predict the image in x_t. All else in x_t is noise. Mix both anew, with less noise, and
# look again. Why not stop at the first prediction? Many images could be hidden in x_t, and
# the net predicts about their mean, a blur. The less noise, the fewer images are possible.

SAMPLERS = {"ddpm": math.inf, "ddim": 50, "dpm": 20}  # each one's steps; inf: all T

def predict_x0(net, x, t, y, alpha_bar, guidance):
    """The images (B,C,H,W), in [-1,1], that the net sees in x = x_t. One t for all.

    Classifier-free guidance (Ho & Salimans 2022, w = guidance - 1) goes from v without a
    label towards v with it: 0 ignores the label, 1 follows it, more exaggerates it."""
    t = torch.full((len(x),), t, device=x.device)
    v = net(x, t, y)
    if guidance != 1:
        v_null = net(x, t, torch.full_like(t, NULL))
        v = v_null + guidance * (v - v_null)

    signal_rate, noise_rate = rates(alpha_bar, t)
    x0_hat = signal_rate * x - noise_rate * v
    return x0_hat.clamp(-1, 1)  # no image has values beyond these

@torch.no_grad()
def generate(net, y, noise, alpha_bar, sampler="dpm", steps=0, guidance=1.0, seed=0):
    """Yield x_t (B,C,H,W), 1 + steps times, from noise to images of the labels y (B,).

    ddim splits x into image and noise, and mixes them anew (Song et al. 2021, eq. 12). dpm
    improves the image. ddpm renews part of the noise: with T steps, Ho et al.'s Algorithm 2."""
    T = len(alpha_bar) - 1
    steps = min(T, steps or SAMPLERS[sampler])  # 0: the sampler's own
    ts = [T - (T * i) // steps for i in range(steps + 1)]  # from T down to 0
    signal_rates = alpha_bar.sqrt().tolist()  # plain numbers, for all t
    noise_rates = (1 - alpha_bar).sqrt().tolist()
    lam = (alpha_bar.logit() / 2).tolist()  # λ = log √ᾱ/√(1-ᾱ): image over noise

    x = noise
    yield x
    for t, t_next in zip(ts, ts[1:]):
        x0_hat = predict_x0(net, x, t, y, alpha_bar, guidance)

        # ddim takes x0_hat as constant in a step. dpm (DPM-Solver++, Lu et al. 2022, alg. 2)
        # takes its value half-way in λ, on the line through the last two: there, x0_hat moves
        # about evenly. The first step has no x0_before. The last ends at λ = ∞.
        x0_step = x0_hat
        if sampler == "dpm" and t < T and t_next > 0:
            slope = (x0_hat - x0_before) / (lam[t] - lam[t_before])
            x0_step = x0_hat + slope * (lam[t_next] - lam[t]) / 2
        x0_before = x0_hat
        t_before = t

        # What x holds besides x0_step is noise. ddim keeps it. ddpm draws a part anew: sigma
        # is the spread of x at t_next if x at t and x0 are known (Ho et al. eq. 7). It keeps
        # so much that kept² + sigma² is the noise's variance at t_next.
        eps_hat = (x - signal_rates[t] * x0_step) / noise_rates[t]
        sigma = 0.0
        if sampler == "ddpm":
            # β of one step from t_next to t
            beta = 1 - (signal_rates[t] / signal_rates[t_next]) ** 2
            sigma = noise_rates[t_next] / noise_rates[t] * beta ** 0.5
        kept = max(0.0, noise_rates[t_next] ** 2 - sigma ** 2) ** 0.5  # 0 if rounded below

        x = signal_rates[t_next] * x0_step + kept * eps_hat
        if sigma:  # from the CPU, by seed and t: the same everywhere
            rng = torch.Generator().manual_seed(1000 * seed + t)
            x = x + sigma * torch.randn(x.shape, generator=rng).to(x)
        yield x

# ---- 5. Pictures and progress --------------------------------------------------------
def to_uint8(x):
    """Numbers in [-1,1] -> bytes 0..255, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()

def grid(images, columns):
    """Images, uint8 (n,C,H,W), in so many columns: one PIL image, enlarged if small."""
    sheet = make_grid(images, nrow=columns)
    sheet = to_pil_image(sheet[:images.shape[1]])  # make_grid turns grey into RGB
    scale = max(1, min(8, 800 // max(sheet.size)))
    return ImageOps.scale(sheet, scale, Image.NEAREST)

def save_gif(path, frames, columns):
    """Write frames, each uint8 (n,C,H,W), as an animation that rests at its end."""
    first, *others = [grid(frame, columns) for frame in frames]
    durations = [80] * len(others) + [2000]  # milliseconds
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    print(path, flush=True)

def progress(items, total, text):
    """Pass items on. On a terminal, show how much time is left."""
    began = time.time()
    shown = ""
    for done, item in enumerate(items, start=1):
        yield item
        left = round((time.time() - began) / done * (total - done))
        line = f"{text}, {left // 60}:{left % 60:02} left" if done < total else ""
        if sys.stdout.isatty() and line != shown:
            print(f"\r{line:50}\r", end="", flush=True)
            shown = line

# ---- 6. Data -------------------------------------------------------------------------
DATASETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST,
            "cifar10": datasets.CIFAR10}

def load_data(dataset, data, size=0, train=True):
    """Images, uint8 (N,C,size,size), labels (N,), and the names of the classes."""
    size = size or (32 if dataset == "cifar10" else 28)
    fit = transforms.Compose([transforms.Resize((size, size)), transforms.PILToTensor()])
    try:
        source = DATASETS[dataset](data, train=train, download=True, transform=fit)
        images, labels = zip(*progress(source, len(source), f"reading {dataset}"))
    except Exception as error:
        raise UserError(f"cannot read {dataset} in {data}: {error}. "
                        "If it cannot be downloaded: README, No download") from error
    classes = list("0123456789") if dataset == "mnist" else source.classes  # not "0 - zero"
    return torch.stack(images), torch.tensor(labels), classes

# ---- 7. Training ---------------------------------------------------------------------
def draw_timesteps(n, T, timesteps, device):
    """n steps t in 1..T, int64 (n,). "logit-normal" prefers the middle, which teaches most:
    t/T is the sigmoid of a normal number, mean 0.5, std 1 (Esser et al. 2024)."""
    if timesteps == "logit-normal":
        u = torch.sigmoid(0.5 + torch.randn(n, device=device))
    else:
        u = torch.rand(n, device=device)
    return 1 + (u * T).long().clamp(max=T - 1)  # u·T may round up to T

@torch.no_grad()
def update_average(ema, net, step):
    """ema follows net without its jitter: it averages about the last tenth of the steps."""
    decay = min(0.999, step / (9 + step))
    for average, new in zip(ema.parameters(), net.parameters()):
        average.lerp_(new, 1 - decay)

def train(dataset="mnist", data="data", size=0, out="auto", device="auto", T=1000,
          schedule="cosine", target="v", loss="huber", cond="class",
          timesteps="logit-normal", width=32, epochs=10, batch_size=32, lr=3e-3, amp=False,
          seed=0, resume=False):
    """Learn to draw a data set."""
    flags = dict(locals()) | {"data": str(data), "out": str(out)}  # all arguments
    path = Path(f"runs/{dataset}" if out == "auto" else out, "ddpm.pt")
    if path.exists() and not resume:
        raise UserError(f"{path} exists: go on by --resume, or name another --out")
    if size % 4 or width % 8:
        raise UserError("--size must be divisible by 4, --width by 8")
    device = pick_device(device)

    print(f"reading {dataset} in {data}", flush=True)
    images, labels, classes = load_data(dataset, data, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("log.csv").touch()  # fails now if read-only
    if cond == "none":
        labels = torch.full_like(labels, NULL)
        classes = []
    shape = list(images.shape[1:])

    # The net, its average, and the optimizer: new, or those of the run
    torch.manual_seed(seed)
    net = UNet(shape[0], len(classes), width).to(device)
    ema = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters())
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    run = {"shape": shape, "classes": classes, "epoch": 0}
    if resume:
        _, _, run = load_net(path, device)
        saved = (run["shape"], run["classes"], run["flags"]["width"])
        if "optimizer" not in run or saved != (shape, classes, width):
            raise UserError(f"{path} has no optimizer, or other data, --cond, --size, --width")
        for name, part in parts.items():
            part.load_state_dict(run[name])

    alpha_bar = noise_schedule(schedule, T).to(device)
    per_epoch = math.ceil(len(images) / batch_size)
    done = run["epoch"]
    step = done * per_epoch
    total = epochs * per_epoch
    print(f"{len(images):,} images, step {step:,} of {total:,} on {device}", flush=True)

    for epoch in range(done + 1, epochs + 1):
        began = time.time()
        losses = []
        torch.manual_seed(1000 * seed + epoch)  # the same if resumed
        batches = torch.randperm(len(images)).split(batch_size)
        for index in progress(batches, len(batches), f"epoch {epoch} of {epochs}"):
            # Algorithm 1: images, a t for each, noise. A tenth of the labels is dropped:
            # guidance needs v without a label, too.
            x0 = images[index].to(device) / 127.5 - 1
            dropped = torch.rand(len(x0), device=device) < 0.1
            y = labels[index].to(device).masked_fill(dropped, NULL)
            t = draw_timesteps(len(x0), T, timesteps, device)
            eps = torch.randn_like(x0)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                batch_loss = diffusion_loss(net, x0, y, t, eps, alpha_bar, target, loss)

            # A step of the optimizer. Its rate rises for 100 steps, and falls to 0.
            optimizer.zero_grad()
            batch_loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            warm_up = min(1, (step + 1) / 100)
            optimizer.param_groups[0]["lr"] = lr * warm_up * (1 - step / total)
            optimizer.step()
            step += 1
            update_average(ema, net, step)
            losses.append(batch_loss.detach())

        # After each epoch: a line of loss, a checkpoint, a picture
        mean = torch.stack(losses).mean().item()
        seconds = time.time() - began
        if not math.isfinite(mean):
            raise UserError(f"the loss is {mean} in epoch {epoch}: try a lower --lr")
        print(f"epoch {epoch}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
        run |= {"flags": flags, "epoch": epoch}
        run |= {name: part.state_dict() for name, part in parts.items()}
        torch.save(run, f"{path}.part")
        Path(f"{path}.part").replace(path)  # whole or not at all
        with open(path.with_name("log.csv"), "a") as log:
            header = "epoch,step,loss,seconds\n" if log.tell() == 0 else ""
            log.write(f"{header}{epoch},{step},{mean:.6f},{seconds:.1f}\n")
        sample(path, device, digit=classes[:10], n=5 if classes else 50,
               out=path.with_name(f"epoch-{epoch:03}.png"))

def pick_device(name):
    """The torch.device of that name. "auto" is a GPU, if there is one."""
    if name == "auto":
        gpu = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator() if gpu else "cpu"
    try:
        return torch.zeros(1, device=name).device  # fails if there is none
    except Exception as error:
        raise UserError(f"there is no device {name} here: {str(error)[:99]}") from error

def load_net(ckpt="auto", device="auto"):
    """A checkpoint's averaged net, its alpha_bar, and the checkpoint. "auto" is
    runs/mnist/ddpm.pt, or if there is none, the one that comes along."""
    if ckpt == "auto":
        own = Path("runs/mnist/ddpm.pt")
        ckpt = own if own.exists() else Path(__file__).parent / "assets/mnist.pt"
        print(f"the net is {ckpt}", flush=True)
    try:
        checkpoint = torch.load(ckpt, map_location="cpu", weights_only=True)  # no pickled code
        flags = checkpoint["flags"]
        alpha_bar = noise_schedule(flags["schedule"], flags["T"])
        net = UNet(checkpoint["shape"][0], len(checkpoint["classes"]), flags["width"])
        net.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise UserError(f"{ckpt} is missing or no checkpoint ({type(error).__name__})") from error
    device = pick_device(device)
    return net.to(device).eval(), alpha_bar.to(device), checkpoint

# ---- 8. Drawing ----------------------------------------------------------------------
def sample(ckpt="auto", device="auto", seed=0, digit=(), same_style=False, n=1,
           sampler="dpm", steps=0, guidance=1.25, out="samples.png", gif=False):
    """Draw images of each class, or of some."""
    net, alpha_bar, checkpoint = load_net(ckpt, device)
    classes = checkpoint["classes"]
    for name in digit:
        if str(name) not in classes:
            raise UserError(f"no class {name}: there are {', '.join(classes) or 'none'}")

    # n rows, an image of each class in each. A single class, or none: ten a row.
    row = [classes.index(str(name)) for name in (digit or classes)] or [NULL]
    y = torch.tensor(row * n, device=alpha_bar.device)
    columns = len(row) if len(row) > 1 else 10

    # The noise decides the handwriting: from the same noise, the same hand.
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(row), *checkpoint["shape"], generator=rng)
    if same_style:
        noise = noise[:, :1].expand_as(noise)
    noise = noise.flatten(0, 1).to(y.device)

    def net_in_parts(*inputs):  # 250 images at a time: less memory
        parts = zip(*[tensor.split(250) for tensor in inputs])
        return torch.cat([net(*part) for part in parts])

    steps = min(steps or SAMPLERS[sampler], len(alpha_bar) - 1)
    states = generate(net_in_parts, y, noise, alpha_bar, sampler, steps,
                      guidance if classes else 1.0, seed)
    frames = []  # for the GIF, about 40
    for i, x in enumerate(progress(states, 1 + steps, f"drawing {len(y):,} images")):
        if gif and i % math.ceil(steps / 40) == 0:
            frames.append(to_uint8(x))
    images = to_uint8(x)  # of the last state
    out = Path(out).with_suffix(".png")
    grid(images, columns).save(out)
    print(out, flush=True)
    if gif:
        save_gif(out.with_suffix(".gif"), [*frames, images], columns)

def forward(dataset="mnist", data="data", size=0, schedule="cosine", T=1000, seed=0,
            out="noise.png", gif=False):
    """Show the forward process: an image of each class on its way to noise."""
    images, labels, _ = load_data(dataset, data, size, train=False)
    x0 = torch.stack([images[labels == label][0] for label in labels.unique()]) / 127.5 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    alpha_bar = noise_schedule(schedule, T)
    ts = torch.linspace(0, T, 41).round().long()
    frames = [to_uint8(q_sample(x0, t[None], eps, alpha_bar)) for t in ts]
    rows = torch.stack(frames[::4], dim=1)  # (classes, 11, C, H, W): t = 0, T/10, .. T
    out = Path(out).with_suffix(".png")
    grid(rows.flatten(0, 1), 11).save(out)
    print(out, flush=True)
    if gif:
        save_gif(out.with_suffix(".gif"), frames, 5)

# ---- 9. The command line: each command is a function, with its arguments as flags ----
FLAGS = {  # the meaning of each; its choices, its least value, or None
    "dataset": ("what to learn or show", DATASETS),
    "data": ("folder of data sets", None),
    "size": ("pixels a side, divisible by 4; 0: 28, cifar10 32", 0),
    "out": ("what to write: a PNG; by train a folder (auto: runs/DATASET)", None),
    "ckpt": ("net to draw with; auto: runs/mnist/ddpm.pt or the included", None),
    "device": ("cpu, cuda, mps; auto: a GPU, if there is one", None),
    "T": ("steps from an image to noise", 2),
    "schedule": ("how the noise grows", SCHEDULES),
    "target": ("what the loss compares", ["eps", "v", "x0"]),
    "loss": ("how the loss compares", LOSSES),
    "cond": ("does the net see labels", ["class", "none"]),
    "timesteps": ("which t to learn from", ["logit-normal", "uniform"]),
    "width": ("channels at the finest level, divisible by 8", 8),
    "epochs": ("how often to see each image", 1),
    "batch_size": ("images in a step", 1),
    "lr": ("highest learning rate", 0),
    "amp": ("compute in bfloat16", None),
    "seed": ("start of all random numbers", 0),
    "resume": ("go on in --out, by its flags and those given now", None),
    "digit": ("classes of a row, if not all", None),
    "same_style": ("one handwriting a row (not by ddpm)", None),
    "n": ("images of each class", 1),
    "sampler": ("way from noise to an image", SAMPLERS),
    "steps": ("steps of the sampler; 0: ddpm T, ddim 50, dpm 20", 0),
    "guidance": ("0 ignores the label, 1 follows it, more exaggerates it", 0),
    "gif": ("write an animation, too", None),
}

def main(argv=None):
    """Run a command line. Only given flags are passed on."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (train, sample, forward):
        command = commands.add_parser(function.__name__, help=function.__doc__,
                                      argument_default=argparse.SUPPRESS)
        command.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            words, values = FLAGS[name]
            flag = "--" + name.replace("_", "-")
            default = parameter.default
            if default is False:
                command.add_argument(flag, action="store_true", help=words)
            elif default == ():
                command.add_argument(flag, nargs="+", help=words)
            else:
                choices = None if isinstance(values, int) else values
                command.add_argument(flag, type=type(default), choices=choices,
                                     help=f"{words} (default {default})")

    try:
        flags = vars(parser.parse_args(argv))
        function = flags.pop("function")
        if flags.get("resume"):  # by the run's own flags, but for those given now
            out = flags.get("out", f"runs/{flags.get('dataset', 'mnist')}")
            _, _, run = load_net(Path(out, "ddpm.pt"), "cpu")
            flags = run["flags"] | flags | {"out": out}
        for name, value in flags.items():
            least = FLAGS[name][1]
            if isinstance(least, int) and not least <= value < 1e12:
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
        Path(flags.get("out", "")).parent.mkdir(parents=True, exist_ok=True)
        function(**flags)
    except (UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("\nstopped")

if __name__ == "__main__":
    main()
