"""Tests of ddpm.py: `make test`, offline, on the CPU. Mathematics is held against an oracle
of its own: numbers by hand, ten naive lines, data whose best net is known. At the end:
`make evaluate` and `make bench`."""
import contextlib
import copy
import io
import math
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

import ddpm

PROGRAM = Path(ddpm.__file__)
README = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
SMALL = "--width 8 --batch-size 4 --T 6 --device cpu"

def rng(seed):
    return torch.Generator().manual_seed(seed)

def write_mnist(n=40, classes=10, sizes=3, name="MNIST"):
    """Write printed digits, in some sizes, as MNIST's four files into the folder data."""
    images = []
    for i in range(n):
        image = Image.new("L", (28, 28))
        font = ImageFont.load_default(22 + 2 * (i // classes % sizes))
        ImageDraw.Draw(image).text((14, 14), str(i % classes), 255, font, "mm")
        images.append(pil_to_tensor(image))
    images = torch.stack(images)
    pixels = struct.pack(">IIII", 2051, n, 28, 28) + images.numpy().tobytes()
    labels = struct.pack(">II", 2049, n) + bytes(i % classes for i in range(n))
    raw = Path("data", name, "raw")
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return images

class Folder(unittest.TestCase):
    """A test in a temporary folder, with printed digits as its MNIST."""
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        self.images = write_mnist()
        torch.set_num_threads(1)  # nets this small gain nothing by more

    def run_main(self, line):
        """Run a command line here: (exit status, standard output, standard error)."""
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                ddpm.main(line.split())
            except SystemExit as end:
                status = end.code
        return status or 0, out.getvalue(), err.getvalue()

    def does(self, line):
        """Run a command line that has to succeed: its standard output."""
        status, out, err = self.run_main(line)
        self.assertEqual(status, 0, err)
        return out

    def train(self, flags="", out="runs/mnist"):
        """Train a small net: its checkpoint."""
        self.does(f"train {SMALL} --out {out} {flags}")
        return torch.load(f"{out}/ddpm.pt", weights_only=True)

    def refuses(self, words, line):
        """Assert that a command line ends in exit status 2 and one line with these words."""
        files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        status, out, err = self.run_main(line)
        self.assertEqual(status, 2, f"{line}: {err}")
        self.assertIn(words, err.splitlines()[-1])
        for path, content in files.items():
            self.assertEqual(path.read_bytes(), content)

class TheForwardProcess(unittest.TestCase):
    def test_every_schedule_falls_from_1_towards_0_for_any_T(self):
        for name in ddpm.SCHEDULES:
            for T in (2, 10, 300, 1000, 4000):
                alpha_bar = ddpm.noise_schedule(name, T)
                self.assertEqual((len(alpha_bar), alpha_bar[0]), (T + 1, 1))
                self.assertTrue((alpha_bar.diff() < 0).all(), (name, T))
                self.assertTrue(0 < alpha_bar[-1] < 1e-3, (name, T))

    def test_linear_is_the_papers_and_scaled_for_another_T(self):
        for T in (1000, 250):
            alpha_bar = ddpm.noise_schedule("linear", T).tolist()
            product = 1.0
            for t in range(1, T + 1):
                beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
                product *= 1 - beta * 1000 / T
                self.assertAlmostEqual(alpha_bar[t], product, delta=1e-6 * product)

    def test_cosine_is_the_papers_with_its_last_beta_at_0_999(self):
        def f(t):
            return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        alpha_bar = ddpm.noise_schedule("cosine", 1000).double()
        for t in (1, 10, 500, 900, 998):
            self.assertAlmostEqual(alpha_bar[t].item(), f(t) / f(0), delta=1e-7)
        self.assertAlmostEqual(1 - (alpha_bar[-1] / alpha_bar[-2]).item(), 0.999, 6)

    def test_q_sample_is_what_a_chain_of_single_steps_gives(self):
        alpha_bar = ddpm.noise_schedule("cosine", 9)
        x0, eps = torch.randn(2, 10, 1, 2, 2, generator=rng(0))
        x = ddpm.q_sample(x0, torch.arange(10), eps, alpha_bar)
        self.assertTrue(torch.equal(x[0], x0[0]))
        mean, variance = 1.0, 0.0
        for t in range(1, 10):
            keep = (alpha_bar[t] / alpha_bar[t - 1]).item()
            mean = mean * keep ** 0.5
            variance = variance * keep + 1 - keep
            assert_close(x[t], mean * x0[t] + variance ** 0.5 * eps[t])

class TheLoss(unittest.TestCase):
    def test_the_loss_compares_what_follows_from_the_nets_v(self):
        x0, eps, v_hat = torch.randn(3, 2, 1, 4, 4, generator=rng(0))
        net = mock.Mock(return_value=v_hat)
        alpha_bar = ddpm.noise_schedule("linear", 10)
        t = torch.tensor([3, 9])
        a, s = [ab.sqrt().view(2, 1, 1, 1) for ab in (alpha_bar[t], 1 - alpha_bar[t])]
        x = a * x0 + s * eps
        errors = {"eps": s * x + a * v_hat - eps, "v": v_hat - (a * eps - s * x0),
                  "x0": a * x - s * v_hat - x0}
        for target, error in errors.items():
            size = error.abs()
            huber = torch.where(size < 1, size ** 2 / 2, size - 0.5)
            for loss, known in (("l1", size), ("l2", size ** 2), ("huber", huber)):
                got = ddpm.diffusion_loss(net, x0, t, t, eps, alpha_bar, target, loss)
                assert_close(got, known.mean(), atol=1e-5, rtol=1e-4)

    def test_timesteps_are_uniform_or_have_a_normal_logit(self):
        torch.manual_seed(0)
        normal = statistics.NormalDist(0.5, 1)
        shares = {"uniform": lambda k: k / 50,
                  "logit-normal": lambda k: normal.cdf(math.log((k + 1e-9) / (50 - k + 1e-9)))}
        for timesteps, share in shares.items():
            t = ddpm.draw_timesteps(100_000, 50, timesteps, "cpu")
            for k in range(51):
                self.assertAlmostEqual((t <= k).double().mean().item(), share(k), delta=0.01)

class TheNet(unittest.TestCase):
    def test_the_output_has_the_shape_of_the_input(self):
        for size, channels, classes in ((28, 1, 10), (32, 3, 10), (16, 1, 0)):
            x, y = torch.randn(2, channels, size, size), torch.tensor([ddpm.NULL, classes - 1])
            net = ddpm.UNet(channels, classes, width=8)
            self.assertEqual(net(x, torch.tensor([1, 1000]), y).shape, x.shape)

    def test_t_matters_and_each_label_has_its_row(self):
        torch.manual_seed(0)
        net = ddpm.UNet(width=8)
        for parameter in net.parameters():  # some are 0 at the beginning
            nn.init.normal_(parameter, std=0.2)
        x = torch.randn(1, 1, 28, 28, generator=rng(0)).expand(11, 1, 28, 28)
        y, t = torch.arange(-1, 10), torch.full((11,), 5)
        before = net(x, t, y)
        self.assertGreater((net(x, t + 1, y) - before).abs().amax((1, 2, 3)).min(), 1e-4)
        for label in (ddpm.NULL, 0, 9):
            other = copy.deepcopy(net)
            other.label.weight.data[label + 1] += 1
            changed = (other(x, t, y) - before).abs().amax((1, 2, 3)) > 1e-4
            self.assertEqual(y[changed].tolist(), [label])

def gaussian(mean, std, alpha_bar):
    """E[x0 | x_t] if each pixel of the data is N(mean, std²)."""
    def x0_at(x, t):
        a = alpha_bar[t].sqrt()
        gain = a * std ** 2 / (a * a * std ** 2 + 1 - a * a)
        return mean + gain * (x - a * mean)
    return x0_at

def states_of(x0_at, noise, alpha_bar, sampler, steps, seed=0):
    """All states of generate, by a net whose v says that the image in x_t is x0_at(x, t)."""
    def net(x, t, y):
        t = t[0].item()
        return (alpha_bar[t].sqrt() * x - x0_at(x, t)) / (1 - alpha_bar[t]).sqrt()
    y = torch.zeros(len(noise)).long()
    return [*ddpm.generate(net, y, noise, alpha_bar, sampler, steps, seed=seed)]

class Sampling(unittest.TestCase):
    def test_a_data_set_of_one_image_comes_back_from_every_sampler(self):
        star = torch.rand(1, 1, 4, 4, generator=rng(0)) * 2 - 1
        noise = torch.randn(2, 1, 4, 4, generator=rng(1))
        alpha_bar = ddpm.noise_schedule("cosine", 40)
        for sampler in ddpm.SAMPLERS:
            for steps in (1, 2, 7, 40):
                *way, x = states_of(lambda x, t: star, noise, alpha_bar, sampler, steps)
                assert_close(x, star.expand_as(x), atol=1e-4, rtol=0)
                for i, x in enumerate(way if sampler != "ddpm" else ()):
                    ab = alpha_bar[40 - 40 * i // steps]  # no new noise: eps stays
                    eps = (x - ab.sqrt() * star) / (1 - ab).sqrt()
                    assert_close(eps, noise, atol=0.02, rtol=0)

    def test_a_step_of_ddpm_is_the_posterior_on_skipped_steps_too(self):
        alpha_bar = ddpm.noise_schedule("linear", 17).double()
        x0_hat, x = torch.randn(2, 1, 1, 300, 300, generator=rng(0)).double()
        x0_hat = x0_hat.clamp(-1, 1)
        for steps in (17, 5, 2):
            states = states_of(lambda x, t: x0_hat, x, alpha_bar, "ddpm", steps, seed=7)
            ts = [17 - 17 * i // steps for i in range(steps + 1)]
            z = [x]  # what each step adds has to be normal, and new
            for t, s, x_t, x_s in zip(ts, ts[1:-1], states, states[1:]):
                a, b = alpha_bar[t], alpha_bar[s]
                beta = 1 - a / b  # of the steps from s to t together (Ho et al. eq. 7)
                mean = b.sqrt() * beta * x0_hat + (1 - beta).sqrt() * (1 - b) * x_t
                sigma = ((1 - b) / (1 - a) * beta).sqrt()
                z.append((x_s - mean / (1 - a)) / sigma)
            z = torch.stack(z).flatten(1)
            assert_close(z.cov(), torch.eye(steps).double(), atol=0.02, rtol=0)

    def test_dpm_is_the_multistep_solver_of_its_paper(self):
        alpha_bar = ddpm.noise_schedule("cosine", 100).double()
        x0_at = gaussian(0.1, 0.2, alpha_bar)
        x = torch.randn(1, 1, 4, 4, generator=rng(2)).double()
        states = states_of(x0_at, x, alpha_bar, "dpm", 5)
        a, s, past = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), None
        for t, t_next in ((100, 80), (80, 60), (60, 40), (40, 20)):  # Lu et al. 2022, alg. 2
            d = x0_hat = x0_at(x, t)
            h = math.log(a[t_next] / s[t_next]) - math.log(a[t] / s[t])
            if past is not None:
                r = past[1] / h
                d = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * past[0]
            x = s[t_next] / s[t] * x - a[t_next] * (math.exp(-h) - 1) * d
            past = (x0_hat, h)
        assert_close(states[-2], x)
        assert_close(states[-1], x0_at(x, 20))

    def error_of(self, sampler, steps):
        """How far a sampler is from the exact flow of Gaussian data, at t = T/8."""
        alpha_bar = ddpm.noise_schedule("linear", 4096).double()
        x = torch.randn(1, 1, 8, 8, generator=rng(3)).double()
        states = states_of(gaussian(0.1, 0.2, alpha_bar), x, alpha_bar, sampler, steps)
        mean = alpha_bar.sqrt() * 0.1
        spread = (alpha_bar * 0.2 ** 2 + 1 - alpha_bar).sqrt()
        exact = mean[512] + (x - mean[-1]) * spread[512] / spread[-1]
        return (states[steps * 7 // 8] - exact).abs().mean().item()

    def test_ddim_is_of_first_order_and_dpm_of_second(self):
        for sampler, order in (("ddim", 1), ("dpm", 2)):
            errors = [self.error_of(sampler, steps) for steps in (32, 64, 128)]
            for coarse, fine in zip(errors, errors[1:]):
                self.assertAlmostEqual(math.log2(coarse / fine), order, delta=0.35, msg=sampler)

    def test_guidance_goes_from_no_label_through_the_label_and_on(self):
        alpha_bar = ddpm.noise_schedule("cosine", 10)
        def net(x, t, y):
            return torch.where(y == ddpm.NULL, -0.1, -0.2).view(-1, 1, 1, 1) + x
        x, y = torch.zeros(1, 1, 2, 2), torch.tensor([3])
        for guidance, known in ((0, 0.1), (0.5, 0.15), (1, 0.2), (1.5, 0.25), (3, 0.4), (50, 1)):
            *_, x0 = ddpm.generate(net, y, x, alpha_bar, steps=1, guidance=guidance)
            assert_close(x0, torch.full_like(x, known))  # and it is clipped to 1

    def test_the_steps_fall_from_T_for_every_number_of_steps(self):
        alpha_bar = ddpm.noise_schedule("cosine", 20)
        noise = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
        for steps in (*range(1, 21), 50):
            seen = []
            states = states_of(lambda x, t: seen.append(t) or x, noise, alpha_bar, "ddim", steps)
            self.assertEqual((len(states), seen[0]), (1 + min(steps, 20), 20))
            self.assertEqual(seen, sorted(set(seen), reverse=True))
            self.assertGreater(seen[-1], 0)
        self.assertEqual(len(states_of(lambda x, t: x, noise, alpha_bar, "ddpm", 0)), 21)
        self.assertEqual(states[-1].dtype, torch.float64)

class PicturesAndData(Folder):
    def test_a_gif_is_exact_loops_rests_and_loses_no_time(self):
        levels = torch.arange(256, dtype=torch.uint8)
        self.assertTrue(torch.equal(ddpm.to_uint8(levels / 127.5 - 1), levels))
        frames = torch.stack([levels, levels, levels.flip(0), levels]).view(4, 1, 1, 16, 16)
        with contextlib.redirect_stdout(io.StringIO()):
            ddpm.save_gif("a.gif", frames, 1)
        with Image.open("a.gif") as gif:
            self.assertEqual((gif.n_frames, gif.info["loop"]), (3, 0))  # two are one
            for i, duration in enumerate((160, 80, 2000)):
                gif.seek(i)
                self.assertEqual(gif.info["duration"], duration)
                self.assertEqual(gif.convert("L").tobytes(), ddpm.grid(frames[i + 1], 1).tobytes())

    def test_mnist_is_read_from_its_files_at_any_size(self):
        images, labels, classes = ddpm.load_data("mnist", "data", 28)
        self.assertTrue(torch.equal(images, self.images))
        self.assertEqual((labels.tolist(), classes), (4 * [*range(10)], [*"0123456789"]))
        self.assertEqual(ddpm.load_data("mnist", "data", 32, False)[0].shape, (40, 1, 32, 32))

    def test_damaged_files_and_no_network_are_said_in_a_line(self):
        path = Path("data/MNIST/raw/train-images-idx3-ubyte")
        for length in (5000, 10, 0):
            path.write_bytes(path.read_bytes()[:length])
            self.refuses("No download", f"train {SMALL} --out x")
        with mock.patch("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"]):
            self.refuses("Error downloading", "train --out x --data nowhere")

class Training(Folder):
    def test_a_run_leaves_its_files_and_a_line_of_loss(self):
        out = self.does(f"train {SMALL} --epochs 2 --out run")
        self.assertEqual(sorted(os.listdir("run")),
                         ["ddpm.pt", "epoch-001.png", "epoch-002.png", "log.csv"])
        header, *rows = Path("run/log.csv").read_text().splitlines()
        for row, known in zip(rows, (("1", "10"), ("2", "20")), strict=True):
            epoch, step, loss, *_ = row.split(",")
            self.assertEqual((epoch, step), known)
            self.assertIn(f"epoch {epoch}: loss {float(loss):.4f}, ", out)
            self.assertIn(f"run/epoch-00{epoch}.png\n", out)

    def test_a_resumed_run_is_bit_for_bit_the_run_never_stopped(self):
        straight = self.train("--epochs 3 --T 9 --seed 5", out="straight")
        losses = iter([ddpm.diffusion_loss] * 14)  # then Ctrl-C, in the second epoch
        def interrupted(*inputs):
            for loss in losses:
                return loss(*inputs)
            raise KeyboardInterrupt
        with mock.patch("ddpm.diffusion_loss", interrupted):
            status, out, err = self.run_main(f"train {SMALL} --epochs 3 --T 9 --seed 5 --out run")
        self.assertEqual(str(status).strip(), "stopped")
        os.rename("run", "moved")
        self.does("train --resume --out moved")
        resumed = torch.load("moved/ddpm.pt", weights_only=True)
        for part in ("net", "ema"):
            assert_close(resumed[part], straight[part], rtol=0, atol=0)
        self.assertEqual(Path("moved/log.csv").read_text().count("\n"), 4)

    def test_resume_takes_the_runs_flags_and_those_named_now(self):
        self.train("--epochs 1 --cond none --loss l1")
        run = self.train("--resume --epochs 2 --lr 0.01")
        flags = {name: run["flags"][name] for name in ("cond", "loss", "lr")}
        self.assertEqual((flags, run["epoch"]), ({"cond": "none", "loss": "l1", "lr": 0.01}, 2))
        self.assertIn("step 20 of 20", self.does("train --resume"))
        self.refuses("--width", "train --resume --epochs 3 --width 16")
        self.refuses("--cond", "train --resume --epochs 3 --cond class")
        self.refuses("--resume", "train")  # a new run never overwrites another
        self.refuses("runs/fashion", "train --resume --dataset fashion")

    def test_the_first_steps_their_rate_and_their_average(self):
        torch.manual_seed(0)
        begun = ddpm.UNet(width=8).state_dict()
        one = self.train("--batch-size 40 --epochs 1 --lr 0.1")
        two = self.train("--batch-size 40 --epochs 2 --lr 0.1 --resume")
        moved = (one["net"]["last.weight"] - begun["last.weight"]).abs().max()
        self.assertAlmostEqual(moved.item(), 0.1 / 100, places=5)  # AdamW's first step is lr
        rate = two["optimizer"]["param_groups"][0]["lr"]
        self.assertAlmostEqual(rate, 0.1 * 2 / 100 * 1 / 2)  # warming up, half-way down to 0
        for name, first in begun.items():
            average = first + 9 / 10 * (one["net"][name] - first)
            assert_close(one["ema"][name], average)
            assert_close(two["ema"][name], average + 9 / 11 * (two["net"][name] - average))

    def test_each_label_is_learned_and_none_or_no_label_at_all(self):
        torch.manual_seed(0)
        begun = ddpm.UNet(width=8).label.weight.data
        moved = (self.train("--epochs 5")["net"]["label.weight"] - begun).abs().mean(1)
        self.assertGreater(moved.min(), 1e-3)
        none = self.train("--epochs 1 --cond none", out="none")
        self.assertEqual((none["classes"], len(none["net"]["label.weight"])), ([], 1))

    def test_a_loss_that_is_no_number_ends_the_run_and_keeps_it(self):
        self.train("--epochs 1")
        with mock.patch.dict(ddpm.LOSSES, huber=lambda a, b: (a - b).sum() * math.nan):
            self.refuses("the loss is nan in epoch 2: try", "train --resume --epochs 2")

    def test_two_glyphs_are_learned_in_seconds_and_drawn(self):
        glyphs = write_mnist(600, classes=2, sizes=1)
        self.does("train --width 16 --batch-size 20 --epochs 8 --lr 5e-3 --T 100 --device cpu")
        net, alpha_bar, _ = ddpm.load_net("runs/mnist/ddpm.pt", "cpu")
        noise = torch.randn(2, 1, 28, 28, generator=rng(0))
        for sampler in ddpm.SAMPLERS:
            *_, x = ddpm.generate(net, torch.tensor([0, 1]), noise, alpha_bar, sampler)
            pictures = torch.cat([ddpm.to_uint8(x), glyphs[:2]]).flatten(1)
            alike = pictures.double().corrcoef()[:2, 2:]
            self.assertGreater(alike.diag().min(), 0.7, sampler)
            self.assertLess((ddpm.to_uint8(x) - 1.0 * glyphs[:2]).abs().mean(), 40, sampler)

class Checkpoints(Folder):
    def test_python_trains_and_loads_the_averaged_net(self):
        with contextlib.redirect_stdout(io.StringIO()):
            ddpm.train(out=Path("run"), schedule="linear", T=6, width=8, epochs=1)
            net, alpha_bar, run = ddpm.load_net("run/ddpm.pt", "cpu")
            ddpm.sample("run/ddpm.pt", "cpu", digit=[5])
        assert_close(alpha_bar, ddpm.noise_schedule("linear", 6))
        self.assertEqual((run["shape"], run["epoch"]), ([1, 28, 28], 1))
        assert_close(net.state_dict(), run["ema"])

    def test_what_is_none_is_refused_and_no_code_in_it_runs(self):
        class Bomb:
            def __reduce__(self):
                return open, ("ran", "w")
        run = self.train("--epochs 1")
        whole = Path("runs/mnist/ddpm.pt").read_bytes()
        Path("text.pt").write_text("not a checkpoint")
        torch.save(run | {"bomb": Bomb()}, "zipped.pt")
        torch.save({"weights": torch.zeros(3)}, "other.pt")
        torch.save({name: run[name] for name in ("flags", "shape", "classes")}, "no-net.pt")
        for k in range(4):
            Path(f"cut{k}.pt").write_bytes(whole[:len(whole) * k // 4])
        for path in (*sorted(Path().glob("*.pt")), "missing.pt"):
            self.refuses(f"{path} is missing or no checkpoint", f"sample --ckpt {path}")
        self.assertFalse(Path("ran").exists())

    def test_the_net_that_comes_along_draws_where_there_is_no_run(self):
        self.assertIn("mnist.pt", self.does("sample --digit 1 0 --n 3 --steps 5"))
        ones, noughts = pil_to_tensor(Image.open("samples.png")).float().chunk(2, dim=2)
        self.assertLess(ones.mean(), noughts.mean())  # it draws what is asked
        self.train("--epochs 1")
        self.assertIn("runs/mnist/ddpm.pt", self.does("sample --steps 2"))

class Drawing(Folder):
    def small_images(self, line):
        """What sample draws, at its own size: (rows, columns, 28, 28)."""
        self.does(f"sample --ckpt runs/mnist/ddpm.pt --steps 3 {line}")
        sheet = pil_to_tensor(Image.open("samples.png"))[0]
        scale = max(k for k in range(1, 9) if all(side % (30 * k) == 2 * k for side in sheet.shape))
        return sheet[::scale, ::scale][2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30).int()

    def test_rows_seeds_and_styles(self):
        self.train("--epochs 1")
        self.assertEqual(self.small_images("").shape[:2], (1, 10))
        self.assertEqual(self.small_images("--digit 5 --n 16").shape[:2], (2, 10))
        for sampler in ddpm.SAMPLERS:
            one = self.small_images(f"--digit 3 1 --n 1 --sampler {sampler}")
            two = self.small_images(f"--digit 3 1 --n 2 --sampler {sampler}")
            self.assertEqual(two.shape[:2], (2, 2))
            self.assertLess((one[0] - two[0]).abs().max(), 3, sampler)
            self.assertGreater((two[0] - two[1]).abs().max(), 30, sampler)
        images = self.small_images("--same-style --digit 4 4 4 --n 2")
        self.assertTrue(torch.equal(images[0, 0], images[0, 2]))
        self.assertFalse(torch.equal(images[0, 0], images[1, 0]))

    def test_forward_shows_each_digit_on_its_way_to_noise(self):
        self.does("forward --schedule linear --T 300 --gif --out noise.gif")
        sheet = pil_to_tensor(Image.open("noise.png"))[0]
        small = sheet[::sheet.shape[1] // 332, ::sheet.shape[1] // 332]
        for k in range(10):
            row = small[30 * k + 2:30 * k + 30]  # 11 images, the first at column 2
            self.assertTrue(torch.equal(row[:, 2:30], self.images[k, 0]))
            self.assertGreater(len(row[:, 302:330].unique()), 100)

class TheCommandLine(Folder):
    def test_every_flag_makes_a_difference(self):
        flags = {"sample --steps 4": "--seed 1,--guidance 3,--sampler ddim,--steps 5",
                 "forward": "--seed 1,--schedule linear,--T 9,--size 32",
                 f"train {SMALL} --epochs 1": "--seed 1,--T 9,--schedule linear,--target eps,--amp,"
                 "--timesteps uniform,--loss l1,--lr 1,--batch-size 5,--size 32,--cond none"}
        for line in flags:
            seen = set()
            for i, flag in enumerate(["", *flags[line].split(",")], 1):
                path = Path("new", line[:5].strip(), f"{i}.png")
                self.does(f"{line} {flag} --out {path}")
                text = path.read_bytes() if path.is_file() else (path / "log.csv").read_bytes()
                seen.add(text.rpartition(b",")[0] or text)  # without time
                self.assertEqual(len(seen), i, f"{line} {flag}")

    def test_bad_input_ends_in_one_line_and_changes_no_file(self):
        self.train("--epochs 1")
        Path("file").write_text("kept")
        for flag in ("--T 1", "--T x", "--lr -1", "--lr nan", "--batch-size 0", "--width 0",
                     "--width 12", "--size 30", "--epochs 0", "--loss l3", "--nothing 1",
                     "--device abacus", "--dataset imagenet"):
            self.refuses(flag.split()[0].strip("-"), f"train {SMALL} --out x {flag}")
        for flag in ("--guidance nan", "--n 0", "--steps -1", "--sampler euler"):
            self.refuses(flag.split()[0].strip("-"), f"sample {flag}")
        for line in (f"train {SMALL} --out file/run", "sample --out file/a"):
            self.refuses(line.split()[-1][:4], line)

    def test_a_run_in_a_process_speaks_at_once_and_stops_at_a_signal(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        line = [sys.executable, PROGRAM, "train", *SMALL.split(), "--epochs", "9999"]
        run = subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(run.kill)
        self.assertIn("reading mnist", run.stdout.readline())
        while "epoch 1: loss" not in run.stdout.readline():
            self.assertIsNone(run.poll())
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
        self.assertEqual((run.returncode, err.strip()), (1, "stopped"))

class TheReadme(Folder):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    def test_every_command_of_the_readme_runs(self):
        write_mnist(name="FashionMNIST")
        lines = re.findall(r"python ddpm\.py ((?:train|sample|forward)[^`#\n]*)", README)
        for line in lines:
            if line.startswith("train"):
                line += f" {SMALL} --epochs 1"
                if not re.search("--resume|--out", line):
                    Path("runs/mnist/ddpm.pt").unlink(missing_ok=True)
            self.does(line.replace("sample ", "sample --steps 2 "))

    def test_the_python_that_draws_runs(self):
        code, = [block for block in self.blocks if "load_net" in block]
        exec(code.replace("assets/", f"{PROGRAM.parent}/assets/"), {})
        self.assertTrue(Path("fives.png").exists())

    def test_the_loop_trains_alike_in_two_processes(self):
        code, = [block for block in self.blocks if "DistributedDataParallel" in block]
        code = code.replace("ddpm.UNet()", "ddpm.UNet(width=8)")
        code += "torch.save([loss.item(), *net.parameters()], f'{rank}.pt')\n"
        Path("loop.py").write_text(code)
        line = "-m torch.distributed.run --standalone --nproc-per-node=2 loop.py 40"
        env = os.environ | {"PYTHONPATH": str(PROGRAM.parent), "OMP_NUM_THREADS": "1"}
        subprocess.check_output([sys.executable, *line.split()], env=env)
        one, two = [torch.load(f"{rank}.pt", weights_only=False) for rank in (0, 1)]
        self.assertLess(max(one[0], two[0]), 0.2)
        self.assertNotEqual(one[0], two[0])  # each learns from batches of its own
        assert_close(one[1:], two[1:], rtol=0, atol=0)

# ---- make evaluate: what a small classifier says of samples, and of real images -------

def frechet_distance(a, b):
    """|μ_a-μ_b|² + Tr(Σ_a + Σ_b - 2√(Σ_aΣ_b)) of features (n,d) (Heusel et al. 2017)."""
    cov_a, cov_b = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()

def inception_score(logits):
    """exp E KL(p(y|x) ‖ p(y)) of logits (n,classes): 1 to classes (Salimans et al. 2016)."""
    p = logits.double().softmax(1)
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()

def train_classifier(images, labels, classes, path):
    """A classifier: (B,C,H,W) in [-1,1] -> 64 features -> logits; kept at path."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(images.shape[1], 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, classes))
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    optimizer = torch.optim.Adam(net.parameters())
    batches = torch.cat([torch.randperm(len(images)) for _ in range(4)]).split(64)
    for step, index in enumerate(ddpm.progress(batches, len(batches), "training a classifier")):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(net(images[index] / 127.5 - 1), labels[index]).backward()
        optimizer.step()
    with contextlib.suppress(OSError, RuntimeError):  # the folder may be read-only
        torch.save(net.state_dict(), path)
    return net

def evaluate(ckpt="auto", n=1000, sampler="dpm", steps=0, guidance=1.25, data="data"):
    """Print a table: accuracy, distance and score of n samples, and of real images."""
    net, alpha_bar, checkpoint = ddpm.load_net(ckpt)
    dataset = checkpoint["flags"]["dataset"]
    shape = checkpoint["shape"]
    images, labels, classes = ddpm.load_data(dataset, data, shape[1])
    path = Path(data, f"classifier-{dataset}-{shape[1]}.pt")
    classifier = train_classifier(images, labels, len(classes), path)

    # Half of the test images are the reference. The other half is as new to the classifier as
    # the samples, and gives them their labels.
    images, labels, _ = ddpm.load_data(dataset, data, shape[1], train=False)
    reference, real = torch.randperm(len(images), generator=rng(0)).chunk(2)
    y = labels[real].repeat(1 + n // len(real))[:n]
    real = real[:n]
    if n > len(real):
        print(f"only {len(real):,} real images: the distance of more samples is smaller")

    generator, samples = rng(0), []
    parts = (y if checkpoint["classes"] else torch.full_like(y, ddpm.NULL)).split(250)
    for part in ddpm.progress(parts, len(parts), f"drawing {n:,} images"):
        noise = torch.randn(len(part), *shape, generator=generator)
        *_, x = ddpm.generate(net, part.to(alpha_bar.device), noise.to(alpha_bar.device), alpha_bar,
                              sampler, steps, guidance, seed=len(samples))
        samples.append(ddpm.to_uint8(x))
    rows = {"samples": (torch.cat(samples), y), "real images": (images[real], labels[real])}
    with torch.no_grad():
        known = classifier[:-1](images[reference] / 127.5 - 1)
        print(f"n = {n:<12,} accuracy  distance  score")
        for name, (pictures, labels) in rows.items():
            features = classifier[:-1](pictures / 127.5 - 1)
            logits = classifier[-1](features)
            right = (logits.argmax(1) == labels).double().mean()
            print(f"{name:16} {right:>8.1%} {frechet_distance(features, known):9.2f} "
                  f"{inception_score(logits):6.2f}", flush=True)

class Evaluation(Folder):
    def test_the_distance_of_two_gaussians_is_the_closed_form(self):
        def cloud(mean, spread, seed):
            """Points whose mean is exactly mean, and whose covariance is turned spread²."""
            x = torch.randn(60, 3, generator=rng(seed)).double()
            x = x - x.mean(0)
            x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # now it is 1
            return x * torch.tensor(spread) @ turn + torch.tensor(mean)

        turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=rng(0)).double())
        a = cloud([0.0, 0.0, 0.0], [1.0, 2.0, 0.5], 1)
        b = cloud([1.0, 2.0, -3.0], [3.0, 1.0, 1.0], 2)
        known = 1 + 4 + 9 + (3 - 1) ** 2 + (2 - 1) ** 2 + (1 - 0.5) ** 2
        self.assertAlmostEqual(frechet_distance(a, b), known, places=4)

    def test_the_score_counts_the_classes_that_are_surely_read(self):
        # each with p = 3/4, 1/12, 1/12, 1/12 has the score exp(ln(3)/2)
        for sharp, classes, score in ((50, [0, 1, 2, 3], 4), (50, [2, 2, 2], 1),
                                      (math.log(9), [0, 1, 2, 3], 3 ** 0.5)):
            self.assertAlmostEqual(inception_score(sharp * torch.eye(4)[classes]), score, 5)

    def test_real_images_are_right_and_near_and_noise_is_neither(self):
        os.rename("data", "small")
        write_mnist(1200)
        self.train("--epochs 1 --batch-size 400")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            evaluate("runs/mnist/ddpm.pt", 100, steps=2)
        *_, samples, real = [line.rsplit(maxsplit=3) for line in out.getvalue().splitlines()]
        self.assertGreater(float(real[1].strip("%")), 90)
        self.assertLess(float(samples[1].strip("%")), 50)
        self.assertGreater(float(samples[2]), 5 * float(real[2]))

def bench():
    """Print how fast the net learns, at the defaults."""
    net = ddpm.UNet()
    alpha_bar = ddpm.noise_schedule("cosine", 1000)
    x0 = torch.rand(32, 1, 28, 28)
    t = torch.randint(1, 1001, (32,))
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        ddpm.diffusion_loss(net, x0, t % 10, t, torch.randn_like(x0), alpha_bar).backward()
        seconds.append(time.perf_counter() - began)
    print(f"{32 / statistics.median(seconds):,.0f} images/s, forward and backward")
