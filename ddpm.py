# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///
"""Denoising diffusion probabilistic models (Ho et al. 2020) in one file, to be read top to bottom.

    python ddpm.py sample --digit 5 --gif    draw a five, and watch it come out of noise
    python ddpm.py train                     learn to draw digits: after ten minutes 99% are right
    python ddpm.py evaluate                  are the digits right, and do they look like MNIST's?
    python ddpm.py forward --gif             watch digits turn into noise: what a schedule does

The idea: mix an image x0 with Gaussian noise eps, a little at t = 1, almost only noise at t = T
(section 1). Train a network to separate the two (2, 3). Then go from pure noise at T down to 0,
each step towards the image that the network predicts (4). The rest makes it a tool. MIT licence.
"""
import argparse, atexit, contextlib, copy, itertools, math, os, random, signal, sys, time, zipfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed, nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

# ---- 1. The forward process: from image to noise -----------------------------
# One step of noise is x_t = √(1-β_t)·x_{t-1} + √β_t·z with z Gaussian; a schedule is T numbers β_t.
# All t steps at once are x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·eps with ᾱ_t, here alpha_bar[t], the product of
# all 1-β so far. The first noise comes at t = 1; t = 0 is the image, as alpha_bar[0] = 1.
def linear_betas(T):
    """β from 1e-4 to 0.02 (Ho et al. 2020), times 1000/T: any T ends in noise (e^-10 if T > 99)."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T

def cosine_betas(T, s=0.008):
    """ᾱ(u) ∝ cos²(π/2·(u+s)/(1+s)), u = t/T (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    curve = torch.cos(math.pi / 2 * (u + s) / (1 + s)) ** 2
    return 1 - curve[1:] / curve[:-1]

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}

def noise_schedule(schedule, T):
    """ᾱ_t = (1-β_1)·..·(1-β_t) (Ho et al. 2020, eq. 4), t = 0..T: float64 (T+1,), on the CPU, as
    Apple's MPS has no float64. No β exceeds 0.999 (Nichol & Dhariwal 2021), so that ᾱ_T > 0."""
    betas = SCHEDULES[schedule](T).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])

def rates(alpha_bar, t, x):
    """signal_rate √ᾱ_t and noise_rate √(1-ᾱ_t) for t (B,) on the CPU: (B,1,1,1) on x's device."""
    alpha_bar_t = alpha_bar[t].view(-1, 1, 1, 1)
    return alpha_bar_t.sqrt().float().to(x.device), (1 - alpha_bar_t).sqrt().float().to(x.device)

def q_sample(x0, t, eps, alpha_bar):
    """x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·eps (Ho et al. 2020, eq. 4): t steps of noise at once.
    x0, eps (B,C,H,W), x0 in [-1,1]; t (B,), or (1,) for all, int64 on the CPU, in 0..T."""
    signal_rate, noise_rate = rates(alpha_bar, t, x0)
    return signal_rate * x0 + noise_rate * eps

# ---- 2. Algorithm 1: the loss ------------------------------------------------
# Given x_t, any one of eps, x0 and v = √ᾱ·eps - √(1-ᾱ)·x0 tells the other two (Salimans & Ho 2022):
# x0 = √ᾱ·x_t - √(1-ᾱ)·v, eps = √(1-ᾱ)·x_t + √ᾱ·v. The network always outputs v, the part that x_t
# hides: near T, where x_t is noise, almost -x0; near 0, where x_t is the image, almost eps. (If it
# output eps, as Ho et al.'s does, an error would be √(1/ᾱ-1) times as large in x0: huge near T.)
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
NULL = -1  # the label that says "no label": the last row of the class embedding

def diffusion_loss(net, x0, y, t, eps, alpha_bar, predict="v", loss="huber"):
    """E loss(prediction, truth) of eps, v or x0: a scalar (Ho et al. 2020, alg. 1; eq. 14 is l2 on
    eps). x0, eps (B,C,H,W), y (B,) labels or NULL, t (B,) int64 on the CPU, in 1..T."""
    signal_rate, noise_rate = rates(alpha_bar, t, x0)
    v = signal_rate * eps - noise_rate * x0
    v_hat = net(q_sample(x0, t, eps, alpha_bar), t.to(x0.device), y).float()
    # At this x_t, eps_hat-eps = √ᾱ·(v_hat-v), x0_hat-x0 = -√(1-ᾱ)·(v_hat-v); no loss sees the sign.
    weight = {"eps": signal_rate, "v": 1, "x0": noise_rate}[predict]
    return LOSSES[loss](weight * v_hat, weight * v)

def rng(seed, stream=0):
    """A generator on the CPU: (seed, stream) gives the same noise on every device."""
    return torch.Generator().manual_seed((seed * 2654435761 + stream) % 2**32)  # keeps seeds apart

def training_batch(images, labels, step, batch_size, T, label_drop=0, seed=0, timesteps="uniform"):
    """All that is random in a step, by (seed, step) alone: resumed runs go on as if never stopped.
    images uint8 (N,C,H,W), labels (N,) -> x0 in [-1,1], y (B,), t (B,) in 1..T, eps like x0."""
    generator = rng(seed, step)
    rand = partial(torch.rand, batch_size, generator=generator, dtype=torch.float64)
    u = (torch.arange(batch_size) + rand()) / batch_size  # one in each of B equal parts of 0..1
    if timesteps == "logit-normal":  # ndtri(u) is normal (Esser et al. 2024); 5% keep u: any t
        u = torch.where(rand() < 0.05, u, torch.sigmoid(0.5 + torch.special.ndtri(u)))
    t = 1 + (u * T).long().clamp(max=T - 1)
    index = (rand() * len(images)).long().to(images.device)  # with replacement
    dropped = (rand() < label_drop).to(labels.device)  # v_NULL is learned too, for guidance
    x0, y = images[index] / 127.5 - 1, labels[index].masked_fill(dropped, NULL)
    return x0, y, t, torch.randn(x0.shape, generator=generator).to(x0.device)

# ---- 3. The U-Net ------------------------------------------------------------
# Down and up again, with skips (Ronneberger et al. 2015). It is quick because 2x2 pixels enter as
# one position of 4 channels. The last convolution sees x at full size: no 2x2 blocks show in v.
def time_embedding(t, dim):
    """[sin(t·f), cos(t·f)], f from 1 to 1e-4 (after Vaswani et al. 2017, sec. 3.5): (B,dim)."""
    f = 10_000 ** -torch.linspace(0, 1, dim // 2, device=t.device)
    return torch.cat([torch.sin(t[:, None] * f), torch.cos(t[:, None] * f)], dim=1)

class ResBlock(nn.Module):
    """(B,c_in,H,W) -> (B,c_out,H,W): x plus two convolutions; what enters the second is scaled and
    shifted by emb (B,c_emb), of time and label (Dhariwal & Nichol 2021, sec. 3)."""
    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, c_in), nn.GroupNorm(8, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.emb = nn.Linear(c_emb, 2 * c_out)
        nn.init.zeros_(self.conv2.weight)  # at first the block adds nothing

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(F.silu(h * (1 + scale) + shift))

class UNet(nn.Module):
    """net(x, t, y) is v, of x's shape (B,channels,size,size). t (B,) in 1..T. y (B,) labels in
    0..classes-1 or NULL, or a mix of labels, floats (B,classes+1), NULL's weight last."""
    def __init__(self, channels=1, size=28, classes=10, width=32):
        super().__init__()
        if size % 4 or width % 8:
            raise ValueError(f"--size {size} has to be divisible by 4, --width {width} by 8")
        w, emb = width, 4 * width
        self.time = nn.Sequential(nn.Linear(w, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(classes + 1, emb)
        self.stem, self.down1 = nn.Conv2d(4 * channels, w, 3, padding=1), ResBlock(w, w, emb)
        self.shrink, self.down2 = nn.Conv2d(w, 2 * w, 3, 2, padding=1), ResBlock(2 * w, 2 * w, emb)
        self.norm2, self.attention = nn.GroupNorm(8, 2 * w), nn.MultiheadAttention(2 * w, 4)
        self.middle = ResBlock(2 * w, 2 * w, emb)
        self.up2, self.up1 = ResBlock(4 * w, 2 * w, emb), ResBlock(3 * w, w, emb)
        self.norm1, self.expand = nn.GroupNorm(8, w), nn.Conv2d(w, 4 * 8, 3, padding=1)
        self.last = nn.Conv2d(8 + channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x, t, y):
        emb, rows = self.time(time_embedding(t, self.time[0].in_features)), self.label.weight
        label = y @ rows if y.is_floating_point() else F.embedding(y % len(rows), rows)
        emb = F.silu(emb + label)                                        # (B, 4w)
        h1 = self.down1(self.stem(F.pixel_unshuffle(x, 2)), emb)         # (B, w, size/2, size/2)
        h2 = self.down2(self.shrink(h1), emb)                            # (B, 2w, size/4, size/4)
        h = self.norm2(h2).flatten(2).permute(2, 0, 1)                   # (positions, B, 2w)
        h, _ = self.attention(h, h, h)                                   # so that strokes agree
        h = self.middle(h2 + h.permute(1, 2, 0).view_as(h2), emb)        # (B, 2w, size/4, size/4)
        h = self.up2(torch.cat([h, h2], dim=1), emb)
        h = F.interpolate(h, h1.shape[2:])                               # (B, 2w, size/2, size/2)
        h = self.up1(torch.cat([h, h1], dim=1), emb)                     # (B, w, size/2, size/2)
        h = F.pixel_shuffle(self.expand(F.silu(self.norm1(h))), 2)       # (B, 8, size, size)
        return self.last(torch.cat([h, x], dim=1))                       # (B, channels, size, size)

# ---- 4. Algorithm 2: sampling ------------------------------------------------
# Predict the image and clip it, or errors grow. What else x holds is the noise. Mix both anew.
def predict_x0(net, x, t, y, alpha_bar, guidance=1.0, threshold=None):
    """x0_hat from x_t (B,C,H,W) at one t in 1..T, clipped to [-1,1], where images lie.
    Classifier-free guidance g is v_NULL + g·(v_y - v_NULL): 0 ignores the label, 1 follows it, more
    makes clearer digits of less variety (Ho & Salimans 2022, eq. 6, w = g - 1). It acts where
    0.02 < ᾱ < 0.7; elsewhere any g > 0 is 1, for variety (see Kynkäänniemi et al. 2024). Threshold
    q clips to s = max(1, q-quantile of |x0_hat|), then divides by s (Saharia et al. 2022, 2.3)."""
    times, null = [torch.full((len(x),), value, device=x.device) for value in (t, NULL)]
    v = net(x, times, y if guidance else null)
    if guidance not in (0, 1) and 0.02 < alpha_bar[t] < 0.7:
        v_null = net(x, times, null)
        v = v_null + guidance * (v - v_null)
    signal_rate, noise_rate = rates(alpha_bar, torch.tensor([t]), x)
    x0_hat, s = signal_rate * x - noise_rate * v, 1
    if threshold:  # on the CPU: old MPS has it wrong
        s = x0_hat.abs().flatten(1).cpu().quantile(threshold, 1).clamp(1).view(-1, 1, 1, 1).to(x)
    return x0_hat.clamp(-s, s) / s

SAMPLERS = {"ddpm": (1.0, 1000), "ddim": (0.0, 50), "dpm": (0.0, 20)}  # η, default steps

@torch.no_grad()
def denoise(x0_at, x, ts, alpha_bar, sampler="dpm", generator=None):
    """Algorithm 2 (Ho et al. 2020): yield x (B,C,H,W) at each t of the falling list ts, x first.
    x0_at(x, t) is x0_hat. A step is DDIM's (Song et al. 2021, eq. 12, 16); η = 1 is DDPM, for then
    σ² is the variance of x_next given x_t and x0 (Ho et al. 2020, eq. 7). dpm is DPM-Solver++(2M)
    (Lu et al. 2022, alg. 2): DDIM keeps x0_hat for a whole step, h long in λ = log(√ᾱ/√(1-ᾱ)); dpm
    takes `aim`: x0_hat extrapolated, linearly in λ, from the past and this to mid-step, h/2 on. The
    first step has no past, the final one, to t = 0, an infinite h: both are DDIM's."""
    eta, lam, x0_past = SAMPLERS[sampler][0], (alpha_bar.logit() / 2).tolist(), None
    yield x
    for t, t_next in itertools.pairwise(ts):
        aim = x0_hat = x0_at(x, t)
        h = lam[t_next] - lam[t]
        if sampler == "dpm" and x0_past is not None and t_next > 0:
            aim = x0_hat + h / 2 * (x0_hat - x0_past) / h_past
        x0_past, h_past = x0_hat, h
        ab, ab_next = alpha_bar[[t, t_next]].tolist()
        eps_hat = (x - ab ** 0.5 * aim) / (1 - ab) ** 0.5  # solves x = √ᾱ·aim + √(1-ᾱ)·eps_hat
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)) ** 0.5
        z = torch.randn(x.shape, generator=generator).to(x)
        x = ab_next ** 0.5 * aim + max(0, 1 - ab_next - sigma ** 2) ** 0.5 * eps_hat + sigma * z
        yield x

def generate(net, config, y, noise=None, x0=None, start=1.0, all_frames=False, *, sampler="dpm",
             steps=None, guidance=1.5, threshold=None, seed=0):
    """An image for each label of y (n,), or mix of labels (n,classes+1): uint8 (frames,n,C,H,W),
    the last is the sample; all_frames adds states before. noise (n,C,H,W) is x_T. With x0 of that
    shape begin with it, noised to t = start·T (SDEdit, Meng et al. 2022). Flags follow the *."""
    alpha_bar = noise_schedule(config["schedule"], config["T"])
    device = next(net.parameters()).device
    first_t, steps = round(start * config["T"]), min(config["T"], steps or SAMPLERS[sampler][1])
    x = torch.randn(len(y), *config["shape"], generator=rng(seed)) if noise is None else noise
    x = x if x0 is None else q_sample(x0, torch.tensor([first_t]), x, alpha_bar)
    ts = sorted({first_t * i // steps for i in range(steps + 1)}, reverse=True)  # evenly down to 0
    every = max(1, len(ts) // 40) if all_frames else len(ts)
    def net_in_parts(x, t, y):  # 250 images at a time, for memory
        return torch.cat([net(*part) for part in zip(x.split(250), t.split(250), y.split(250))])
    x0_at = partial(predict_x0, net_in_parts, y=y.to(device), alpha_bar=alpha_bar,
                    guidance=guidance if config["classes"] else 0, threshold=threshold)
    generator, frames, began = rng(seed, 1), [], time.time()  # not the stream of x_T
    for i, x in enumerate(denoise(x0_at, x.to(device), ts, alpha_bar, sampler, generator)):
        if (len(ts) - 1 - i) % every == 0:  # each so many, counted from the end
            frames.append(to_uint8(x).cpu())
        progress((i + 1) / len(ts), began, f"drawing {len(y):,} images")
    return torch.stack(frames)

# ---- 5. Images and files -----------------------------------------------------
def to_uint8(x):
    """Numbers in [-1,1] of any shape -> uint8 in 0..255, rounded and clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()

def write(path, save, **options):
    """Write a file by save(file, **options), whole or not at all, and print its path."""
    progress(1, 0, "")  # clears its line
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.part", "wb") as file:
        save(file, **options)
    os.replace(f"{path}.part", path)
    print(path, flush=True)

def grid(images, columns):
    """Lay images uint8 (n,C,H,W) out in rows: a PIL image, enlarged by a whole factor."""
    sheet = to_pil_image(make_grid(images, nrow=columns)[:images.shape[1]])  # grey stays grey
    return ImageOps.scale(sheet, min(8, max(2, 640 // max(sheet.size))), Image.NEAREST)

def save_gif(path, frames, columns):
    """Write frames uint8 (frames,n,C,H,W) as a looping GIF: 80 ms a frame, 2 s for the last."""
    first, *others = [grid(frame, columns) for frame in frames]
    write(path, first.save, format="GIF", save_all=True, loop=0, append_images=others,
          duration=[80] * len(others) + [2000])

def progress(done, began, text):
    """Redraw a line with the time left, given the share done since a time; clear it at 1."""
    if sys.stdout and sys.stdout.isatty():
        left = round((time.time() - began) * (1 - done) / max(done, 1e-9))
        line = f"{text} · {left // 60}:{left % 60:02} left" if done < 1 else ""
        print(f"\r{line}\033[K", end="", flush=True)

# ---- 6. Data: any set(root, train, download) of (image, label), with classes ---
def folder(root, train, download):
    """Your own images, root/train/CLASS/* and root/test/CLASS/*, in a fixed random order."""
    found = datasets.ImageFolder(Path(root, "train" if train else "test"), ImageOps.exif_transpose)
    random.Random(0).shuffle(found.samples)
    return found

DATASETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "kmnist": datasets.KMNIST,
            "cifar10": datasets.CIFAR10, "folder": folder}

def load_data(dataset, data="data", size=None, train=True, limit=None):
    """A data set, or its first images, downloaded into the folder `data` if need be: uint8
    (N,C,size,size), by default min(width, 32), labels (N,), the names of the classes."""
    found = DATASETS[dataset](data, train=train, download=True)
    images, labels = zip(*((pil_to_tensor(ImageOps.fit(image, [size or min(32, image.width)] * 2)),
                            label) for image, label in itertools.islice(found, limit)))
    images = torch.stack(images)
    images = images[:, :1] if (images == images[:, :1]).all() else images  # if grey
    return images, torch.tensor(labels), [name.split(" - ")[0] for name in found.classes]

def read_image(path, channels, size):
    """An image to redraw: (1,C,size,size) in [-1,1]. If C = 1, ink on paper is made like MNIST."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
    if channels == 1 and pil_to_tensor(image).median() > 127:  # to white ink, 5/7 of the side
        image = ImageOps.autocontrast(image, cutoff=(0, 50)).point(lambda p: max(0, 255 - 2 * p))
        image = image.crop(image.getbbox())
        image = ImageOps.pad(ImageOps.expand(image, max(image.size) // 5), (size, size))
    return pil_to_tensor(ImageOps.fit(image, (size, size)))[None] / 127.5 - 1

# ---- 7. Training: Algorithm 1 until the budget is spent ----------------------
def train(*, dataset="mnist", data="data", size=None, out=None, device=None, T=1000,
          schedule="cosine", predict="v", loss="huber", cond="class", width=32, minutes=10.0,
          epochs=None, batch_size=64, timesteps="logit-normal", lr=3e-3, amp=False, seed=0,
          resume=False):
    """Train a net into the folder --out (runs/DATASET): ddpm.pt and samples-STEP.png, after each
    tenth of --minutes, or each of --epochs if given, and on Ctrl-C. --resume goes on with that run,
    by its flags and those given now: with --epochs bit for bit on a CPU; else lr follows the clock.
    --data has the data sets, for --dataset folder train/CLASS/* and test/CLASS/*, made --size
    pixels a side. --predict is what --loss compares, --timesteps which t come more often, --width
    the channels of the finest maps, --amp bfloat16. --lr falls to 0. Processes share --batch-size.
    Ho et al.: python ddpm.py train --schedule linear --predict eps --loss l2 --timesteps uniform"""
    config = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, out = pick_device(device), Path(out or f"runs/{dataset}")
    if not resume and (out / "ddpm.pt").exists():
        raise ValueError(f"{out}/ddpm.pt exists: --resume goes on with it, else name another --out")
    out.mkdir(parents=True, exist_ok=True)
    loaded = [load_data(dataset, data, size) if rank == 0 else None]  # rank 0 may download
    if world > 1:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
        distributed.broadcast_object_list(loaded)
    images, labels, classes = loaded[0]
    config |= {"shape": list(images.shape[1:]), "classes": classes if cond == "class" else []}
    torch.manual_seed(seed)
    net = UNet(*config["shape"][:2], len(config["classes"]), width).to(device)
    ema, optimizer = copy.deepcopy(net), torch.optim.AdamW(net.parameters(), lr, fused=True)
    states = {"net": net, "ema": ema, "optimizer": optimizer}
    step, epoch, log, began = 0, math.inf, [], time.time()  # inf: the first round writes none
    if resume:
        run = load(out / "ddpm.pt", "step", "seconds", "log", *states)
        step, began, log = run["step"], began - run["seconds"], run["log"].tolist()
        for name, state in states.items():
            state.load_state_dict(run[name])
    images, labels, alpha_bar = images.to(device), labels.to(device), noise_schedule(schedule, T)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    total = math.ceil((epochs or 0) * len(images) / batch_size)  # steps; 0: by the clock
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters learn {len(images):,} images "
          f"of {dataset} on {device}, {f'{total:,} steps' if total else f'{minutes:g} minutes'}")
    with contextlib.ExitStack() as afterwards:  # restores the signal handlers
        signals = []
        def note(number, frame):  # a second signal ends at once
            signals.append(number)
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM):
            afterwards.callback(signal.signal, number, signal.signal(number, note))
        while True:
            seconds, last_epoch = max(1e-3, time.time() - began), epoch
            now = [step / total if total else seconds / 60 / minutes, bool(signals)]
            if world > 1:  # rank 0's clock and signals count
                distributed.broadcast_object_list(now)
            done, ended = now[0], now[1] or now[0] >= 1
            epoch = int(done * (epochs or 10))  # or a tenth, by the clock
            if rank == 0 and step and (ended or epoch > last_epoch):
                run = config | {"step": step, "seconds": seconds, "log": torch.tensor(log)}
                run |= {name: state.state_dict() for name, state in states.items()}
                write(out / "ddpm.pt", partial(torch.save, run))
                sample(ckpt=out / "ddpm.pt", n=5, device=device, out=out / f"samples-{step:06}.png")
            if ended:
                break
            batch = training_batch(images, labels, step, batch_size=batch_size, T=T, seed=seed,
                                   label_drop=0.1 if config["classes"] else 1, timesteps=timesteps)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                share = [part[rank::world][:batch_size // world] for part in batch]
                objective = diffusion_loss(model, *share, alpha_bar, predict, loss)
            optimizer.zero_grad()
            objective.backward()
            if not nn.utils.clip_grad_norm_(net.parameters(), 1.0).isfinite():
                raise ValueError(f"the loss is {objective.item()} at step {step}: try a lower --lr")
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (1 - done)
            optimizer.step()
            step += 1
            for average, new in zip(ema.parameters(), net.parameters()):  # ema: a mean of about the
                average.data.lerp_(new.data, max(1e-3, 9 / (9 + step)))  # last step/9 nets, or 1000
            log.append([step, seconds, objective.item()])
            progress(done, began, f"step {step:,} · loss {log[-1][2]:.4f} · {step / seconds:.1f}/s")
    print(f"stopped: python ddpm.py train --resume --out {out} goes on" if done < 1 else
          f"done: sample --ckpt {out}/ddpm.pt draws; --resume --out {out} --minutes TOTAL goes on")
    return 128 + signals[0] if signals else 0

def load(path, *keys):
    """Read a file that we wrote, a dict with these keys: tensors, numbers and strings. torch.load
    takes nothing else (weights_only), so no file can run code. Raises ValueError."""
    with contextlib.suppress(Exception):  # torch.load refuses in a dozen ways
        damaged = zipfile.ZipFile(path).testzip()  # torch verifies no checksum
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not damaged and all(key in found for key in keys):
            return found
    raise ValueError(f"{path} is not there, or not whole, or not of this program")

def load_net(ckpt=None, device=None):
    """The averaged net of a checkpoint, by default of the newest run, else the one that comes with
    this file: (net, config), config being the whole checkpoint. Raises ValueError."""
    shipped = Path(__file__).with_name("assets") / "mnist.pt"
    path = ckpt or max(Path("runs").glob("*/ddpm.pt"), key=os.path.getmtime, default=shipped)
    config = load(path, "shape", "classes", "width", "ema", "T", "schedule", "dataset", "step")
    net = UNet(*config["shape"][:2], len(config["classes"]), config["width"])
    net.load_state_dict(config["ema"])
    print(f"net: {path} ({config['dataset']}, {config['step']:,} steps)")
    return net.to(pick_device(device)), config

def pick_device(name=None):
    """The torch device of that name, by default the accelerator (CUDA, MPS), else the CPU."""
    if torch.cuda.is_available() and str(name) != "cpu":  # torchrun's processes: a GPU each
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return torch.ones(1, device=name or best).device  # raises if there is none

# ---- 8. Evaluation: what a small classifier says of samples and of real images --
def train_classifier(images, labels, classes, path):
    """A classifier: (B,C,H,W) in [-1,1] -> 64 features -> logits (B,classes), kept at path."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(images.shape[1], 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, classes))
    if path.exists():
        net.load_state_dict(load(path))
        return net
    optimizer, steps, began = torch.optim.Adam(net.parameters()), 4 * len(images) // 64, time.time()
    for step in range(steps):
        x0, y, _, _ = training_batch(images, labels, step, batch_size=64, T=2)  # t, eps unused
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(net(x0), y).backward()
        optimizer.step()
        progress((step + 1) / steps, began, "a classifier learns to read them, once")
    with contextlib.suppress(OSError):  # a shared folder may be read-only
        write(path, partial(torch.save, net.state_dict()))
    return net

def frechet_distance(a, b):
    """|μ_a-μ_b|² + Tr(Σ_a + Σ_b - 2√(Σ_aΣ_b)) of features (n,d), (m,d) (Heusel et al. 2017)."""
    (mean_a, cov_a), (mean_b, cov_b) = [(x.mean(0), x.T.cov()) for x in (a.double(), b.double())]
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()

def inception_score(logits):
    """exp E KL(p(y|x) ‖ p(y)) of logits (n,classes), from 1 to classes (Salimans et al. 2016)."""
    p = logits.double().softmax(1)
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()

def evaluate(*, ckpt=None, data=None, n=1000, device=None, **sampling):
    """Rate --n samples: accuracy by a classifier, Fréchet distance of its features from the test
    set's (it falls as n grows), an Inception score by it. Beside them the floor: the same of n
    real images that the classifier has not seen; clear digits can beat it. Other flags: see sample.
    Example: python ddpm.py evaluate --sampler ddim --steps 20"""
    net, config = load_net(ckpt, device)
    dataset, data, size = config["dataset"], data or config["data"], config["shape"][1]
    images, labels, classes = load_data(dataset, data, size)
    test, _, _ = load_data(dataset, data, size, train=False)
    seen = len(images) * 5 // 6  # of MNIST all but the last 10,000
    path = Path(data, f"classifier-{dataset}-{size}-{images.sum() + labels.sum()}.pt")
    classifier = train_classifier(images[:seen], labels[:seen], len(classes), path)
    real, y = images[seen:][:max(2, n)], labels[seen:][:max(2, n)]  # one has no covariance
    samples = generate(net, config, y, **sampling)[-1]
    with torch.no_grad():
        *found, of_test = [torch.cat([classifier[:-1](x / 127.5 - 1) for x in group.split(500)])
                           for group in (samples, real, test)]
    print(f"n = {len(y):<8,} accuracy  distance  score (less distance is better; no Inception-FID)")
    for name, features in zip(("samples", "real images"), found):
        logits, distance = classifier[-1](features), frechet_distance(features, of_test)
        accuracy = f"{(logits.argmax(1) == y).double().mean():.1%}" if config["classes"] else "-"
        print(f"{name:12} {accuracy:>8} {distance:9.3f} {inception_score(logits):6.3f}")

# ---- 9. The command line: a command is a function, its keyword arguments its flags 
def sample(*, ckpt=None, digit=None, morph=None, same_style=False, init=None, strength=0.85, n=None,
           gif=False, out="samples.png", raw=None, device=None, seed=0, **sampling):
    """Draw images with the net --ckpt, by default of the newest runs/*/ddpm.pt, else the shipped
    one: a PNG, --out, and with --gif how they come out of noise. --digit names the classes of a
    row (all), --n how many rows (10, or 1 with --digit). --same-style draws a row from one noise:
    one handwriting (not by ddpm). --morph turns class into class, in a strip and a GIF. --init
    is an image to redraw as --digit, noised to --strength of T. --guidance 0 ignores the label, 1
    follows it, more exaggerates. --threshold is a quantile, say 0.995. --steps is 1000 for ddpm, 50
    for ddim, 20 for dpm. --raw is a .pt for images, uint8 (n,C,H,W), and labels.
    Example: python ddpm.py sample --digit 2 0 2 6 --same-style --n 6"""
    net, config = load_net(ckpt, device)
    names, shape = [name.lower() for name in config["classes"]], config["shape"]
    asked = [name.lower() for name in morph or digit or names]
    if set(asked) - set(names) or morph and len(morph) < 2:
        raise ValueError(f"{asked}: this net knows {names or 'no labels'}, --morph takes two")
    row = [names.index(name) for name in asked] or [NULL] * 10
    rows, columns = n or (1 if digit else 10), len(row)
    noise = torch.randn(rows, columns, *shape, generator=rng(seed))  # x_T
    y = torch.tensor(row).repeat(rows)
    if same_style:  # one noise a row: one handwriting
        noise = noise[:, :1].expand_as(noise)
    if morph:  # independent noises mix by weights of length 1: so the variance stays 1
        weights = F.interpolate(torch.eye(columns)[None], 24 * (columns - 1) + 1, mode="linear",
                                align_corners=True)[0].T                 # (frames, columns)
        y, columns = weights @ torch.eye(len(names) + 1)[row], 25
        noise = torch.tensordot(weights if same_style else F.normalize(weights), noise[0], 1)
    x0 = read_image(init, *shape[:2]).expand(len(y), *shape) if init else None
    frames = generate(net, config, y, noise.reshape(-1, *shape), x0, strength if init else 1.0,
                      gif, seed=seed, **sampling)
    if raw:
        write(raw, partial(torch.save, {"images": frames[-1].clone(), "labels": y}))
    write(out, grid(frames[-1], columns).save, format="PNG")
    film, columns = (frames[-1][:, None], 1) if morph else (frames, columns)
    if gif or morph:
        save_gif(Path(out).with_suffix(".gif"), film, columns)

def forward(*, dataset="mnist", data="data", schedule="cosine", T=1000, out="noise.png", gif=False):
    """Draw images on their way to noise: a row for each class, columns at t = 0, T/10 .. T.
    Example: python ddpm.py forward --schedule linear --gif"""
    images, labels, _ = load_data(dataset, data, limit=1000)
    x0 = images[[labels.tolist().index(k) for k in labels.unique().tolist()]] / 127.5 - 1
    eps, alpha_bar = torch.randn(x0.shape, generator=rng(0)), noise_schedule(schedule, T)
    frames = torch.stack([to_uint8(q_sample(x0, torch.tensor([T * i // 40]), eps, alpha_bar))
                          for i in range(41)])                           # (41, classes, C, H, W)
    write(out, grid(frames[::4].transpose(0, 1).flatten(0, 1), 11).save, format="PNG")
    if gif:
        save_gif(Path(out).with_suffix(".gif"), frames, 5)

def between(low, high):
    """argparse's options for a number from low to high, of the type of high."""
    def number(text):
        value = type(high)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    return {"type": number, "metavar": f"{low}..{high}"}

FLAGS = {  # argparse's options of flags with choices, a range or several words
    "dataset": {"choices": DATASETS}, "schedule": {"choices": SCHEDULES},
    "predict": {"choices": ["eps", "v", "x0"]}, "loss": {"choices": LOSSES},
    "timesteps": {"choices": ["logit-normal", "uniform"]}, "cond": {"choices": ["class", "none"]},
    "sampler": {"choices": SAMPLERS}, "digit": {"nargs": "+"}, "morph": {"nargs": "+"},
    "size": between(8, 128), "T": between(2, 100_000), "minutes": between(0.01, 1e6),
    "epochs": between(1e-6, 1e6), "width": between(8, 512), "batch_size": between(1, 10**6),
    "lr": between(1e-9, 10.0), "strength": between(0.0, 1.0), "guidance": between(0.0, 100.0),
    "threshold": between(0.5, 1.0), "steps": between(1, 100_000), "n": between(1, 10**6),
    "seed": between(0, 2**32 - 1)}

def main(argv=None):
    """Run a command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers()
    for function in (train, sample, evaluate, forward):
        about, _, example = function.__doc__.rpartition("\n")  # the last line
        command = commands.add_parser(function.__name__, description=about, epilog=example,
                                      usage="%(prog)s [flags]", argument_default=argparse.SUPPRESS)
        command.set_defaults(function=function)
        shared = generate.__kwdefaults__ if function in (sample, evaluate) else {}
        for name, default in (function.__kwdefaults__ | shared).items():
            kind = FLAGS.get(name, {"action": "store_true"} if default is False else {})
            command.add_argument("--" + name.replace("_", "-"), **kind,
                                 help=f"({default})" if default else None)
    given = vars(parser.parse_args(argv or sys.argv[1:] or ["--help"]))
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one speaks
        sys.stdout = open(os.devnull, "w")
    errors = () if sys.flags.dev_mode else (ValueError, OSError, RuntimeError, AssertionError)
    try:
        if "resume" in given:  # the run's own flags, then those given now
            given.setdefault("out", f"runs/{given.get('dataset', 'mnist')}")
            run = load(Path(given["out"], "ddpm.pt"), "epochs")
            given.setdefault("epochs", None if "minutes" in given else run["epochs"])
            given = {name: run[name] for name in train.__kwdefaults__ if name in run} | given
        return given.pop("function")(**given)
    except errors as error:  # python -X dev shows the traceback
        parser.error(" ".join(str(error).split())[:400])

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    sys.exit(main())
