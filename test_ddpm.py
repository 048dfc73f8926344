"""Tests of ddpm.py, in the order of the file: `make test`, or `python -m unittest`; offline, CPU.

What is mathematics is held against an oracle that does not share its code: numbers computed by
hand, ten naive lines, or a set of data whose best denoiser is known in closed form.
"""
import contextlib
import csv
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest
import zipfile
from http.client import BadStatusLine
from pathlib import Path
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

import ddpm

THREADS = torch.get_num_threads()
torch.set_num_threads(1)                             # nets this small gain nothing by more
PROGRAM = Path(__file__).with_name("ddpm.py")
SMALL = "train --dataset glyphs --width 8"
GREY = {"dataset": "glyphs", "classes": list("0123456789"), "T": 20, "schedule": "cosine",
        "predict": "v", "net": {"size": 28, "channels": 1, "classes": 10, "width": 8}}


def noise(n, *shape):
    """What draws noise for n pictures, each from a stream of its own, as a sampler gets it."""
    return functools.partial(ddpm.gaussian, shape, [[(ddpm.stream(7, i), 1.0)] for i in range(n)])


def last(states):
    """The last of the states that a sampler yields."""
    for state in states:
        pass
    return state


@functools.cache
def glyphs(root=None, train=True, download=False):
    """The printed digits, made once for all tests."""
    return ddpm.glyphs(train=train)


class Folder(unittest.TestCase):
    """A test in a temporary folder of its own, with the command line at hand."""

    def setUp(self):
        for patch in (mock.patch.dict(ddpm.DATASETS, glyphs=lambda root, **which: glyphs(**which)),
                      mock.patch("torch.accelerator.is_available", lambda: False),
                      mock.patch("torch.cuda.is_available", lambda: False)):
            patch.start()
            self.addCleanup(patch.stop)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def run_main(self, line, *more):
        """Run a command line here: (exit status, standard output, standard error)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = ddpm.main(line.split() + [str(word) for word in more]) or 0
            except SystemExit as end:
                status = end.code
        return status, out.getvalue(), err.getvalue()

    def train(self, *more, steps=2):
        """Train for a moment on glyphs with the smallest net."""
        line = f"{SMALL} --batch-size 4 --T 6 --steps {steps}"
        status, out, err = self.run_main(line, *more)
        self.assertEqual(status, 0, err)
        return out

    def refuses(self, words, line, *more, status=2):
        """Assert that a command line ends in one line that has the words, and writes nothing."""
        before = sorted(Path().rglob("*.p*"))
        ended, out, err = self.run_main(line, *more)
        self.assertEqual(ended, status, f"{line} {more}: {err}")
        self.assertEqual(err.count("\n"), 1, err)
        self.assertIn(words, err)
        self.assertEqual(sorted(Path().rglob("*.p*")), before)


class TheForwardProcess(unittest.TestCase):
    def test_every_schedule_falls_from_one_towards_zero_for_any_T(self):
        for name in ddpm.SCHEDULES:
            for T in (2, 3, 10, 300, 1000, 4000):
                alpha_bar = ddpm.noise_schedule(name, T)
                self.assertEqual(alpha_bar.shape, (T + 1,))
                self.assertEqual(alpha_bar.dtype, torch.float64)
                self.assertEqual(alpha_bar[0], 1)
                self.assertTrue((alpha_bar.diff() < 0).all(), (name, T))
                self.assertTrue(0 < alpha_bar[-1] < 1e-3, (name, T))

    def test_linear_betas_are_those_of_the_paper_at_T_1000(self):
        product = 1.0
        alpha_bar = ddpm.noise_schedule("linear", 1000).tolist()
        for t in range(1, 1001):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
            self.assertAlmostEqual(alpha_bar[t], product, places=12)
        self.assertAlmostEqual(alpha_bar[1000], 4.0358e-5, places=8)

    def test_the_first_noise_keeps_its_digits_though_it_is_small(self):
        alpha_bar, t = ddpm.noise_schedule("linear", 4000), torch.tensor([1])     # β_1 = 2.5e-5
        self.assertAlmostEqual(ddpm.rates(alpha_bar, t, t)[1].item(), 0.005, places=7)

    def test_the_cosine_schedule_is_nichol_and_dhariwals(self):
        T, alpha_bar = 1000, ddpm.noise_schedule("cosine", 1000)
        for t in (1, 10, 500, 900, 998):
            f = [math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0)]
            self.assertAlmostEqual(alpha_bar[t].item(), f[0] / f[1], places=9)

    def test_the_last_beta_of_cosine_and_sigmoid_is_clipped_at_0_999(self):
        for name in ("cosine", "sigmoid"):
            alpha_bar = ddpm.noise_schedule(name, 1000)
            self.assertAlmostEqual((1 - alpha_bar[-1] / alpha_bar[-2]).item(), 0.999, places=9)

    def test_the_sigmoid_schedule_is_jabris(self):
        def gamma(u, start=-3, end=3):
            low, high = (1 / (1 + math.exp(-v)) for v in (start, end))
            return (high - 1 / (1 + math.exp(-(u * (end - start) + start)))) / (high - low)
        alpha_bar = ddpm.noise_schedule("sigmoid", 100)
        for t in (1, 25, 50, 99):
            self.assertAlmostEqual(alpha_bar[t].item(), gamma(t / 100), places=10)
        self.assertAlmostEqual(alpha_bar[50].item(), 0.5, places=10)

    def test_q_sample_is_equation_4_each_picture_at_its_own_t_and_t_0_is_the_picture(self):
        alpha_bar, x0, eps = ddpm.noise_schedule("cosine", 9), torch.rand(10, 4), torch.randn(10, 4)
        x0, eps = x0.view(10, 1, 2, 2), eps.view(10, 1, 2, 2)
        x = ddpm.q_sample(x0, torch.arange(10), eps, alpha_bar)
        for t, a in enumerate(alpha_bar.tolist()):
            torch.testing.assert_close(x[t], a ** 0.5 * x0[t] + (1 - a) ** 0.5 * eps[t])
        self.assertTrue(torch.equal(x[0], x0[0]))

    def test_q_sample_equals_t_small_steps_of_noise_in_distribution(self):
        x, random = torch.full((100_000,), -0.5), ddpm.stream(0, 1)
        for t in range(1, 31):                       # Ho et al. 2020, eq. 2, linear, T = 100
            beta = 10 * (1e-4 + (0.02 - 1e-4) * (t - 1) / 99)
            x = (1 - beta) ** 0.5 * x + beta ** 0.5 * torch.randn(x.shape, generator=random)
        eps = torch.randn(100_000, 1, 1, 1, generator=random)
        once = ddpm.q_sample(torch.full_like(eps, -0.5), torch.full((100_000,), 30), eps,
                             ddpm.noise_schedule("linear", 100))
        self.assertAlmostEqual(x.mean().item(), once.mean().item(), delta=0.02)
        self.assertAlmostEqual(x.std().item(), once.std().item(), delta=0.02)

class TheLoss(unittest.TestCase):
    def test_v_is_minus_the_picture_at_T_and_the_noise_at_0(self):
        x0, eps = torch.tensor(0.3), torch.tensor(-1.2)
        self.assertEqual(ddpm.target("v", x0, eps, 0.0, 1.0), -x0)      # all noise: say the picture
        self.assertEqual(ddpm.target("v", x0, eps, 1.0, 0.0), eps)      # all picture: say the noise

    def test_the_losses_of_a_known_error(self):
        x0 = torch.zeros(1, 1, 2, 2)
        eps = torch.tensor([[[[3.0, -0.5], [0.0, 1.0]]]])
        alpha_bar, t, y = ddpm.noise_schedule("linear", 10), torch.tensor([5]), torch.tensor([0])
        def net(x, t, y):
            return torch.zeros_like(x)
        huber = (2.5 + 0.125 + 0 + 0.5) / 4
        for loss, known in (("l1", 4.5 / 4), ("l2", 10.25 / 4), ("huber", huber)):
            value = ddpm.diffusion_loss(net, x0, y, t, eps, alpha_bar, "eps", loss)
            self.assertAlmostEqual(value.item(), known, places=6)

    def test_the_loss_of_the_exact_net_is_zero(self):
        alpha_bar, star = ddpm.noise_schedule("cosine", 30), torch.rand(1, 1, 4, 4)
        for predict in ("eps", "v", "x0"):
            net = exact_net(star, alpha_bar, predict)
            eps, t = torch.randn(30, 1, 4, 4), torch.arange(1, 31)
            y = torch.zeros(30, dtype=torch.long)
            x0 = star.expand(30, -1, -1, -1)
            value = ddpm.diffusion_loss(net, x0, y, t, eps, alpha_bar, predict, "l2")
            self.assertLess(value.item(), 1e-9, predict)

    def batches(self, label_drop=0.1, n=400, **options):
        images = (torch.arange(256)[:, None] + torch.arange(16)).byte().view(-1, 1, 4, 4)
        labels = torch.arange(256) % 10
        parts = [ddpm.training_batch(images, labels, step, batch_size=32, T=50, seed=3,
                                     label_drop=label_drop, **options) for step in range(n)]
        return [torch.cat(part) for part in zip(*parts)]

    def test_uniform_timesteps_are_stratified_of_T_pictures_each_has_its_own_t(self):
        images, labels = torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.zeros(9).long()
        for step in range(20):
            t = ddpm.training_batch(images, labels, step, batch_size=50, T=50, label_drop=0, seed=3,
                                    timesteps="uniform")[2]
            self.assertEqual(t.tolist(), list(range(1, 51)))

    def test_logit_normal_timesteps_have_a_normal_logit_but_for_one_in_twenty(self):
        t, normal = self.batches()[2], statistics.NormalDist(0.5, 1)
        self.assertTrue(1 <= t.min() and t.max() <= 50)
        for k in range(1, 50):
            expected = 0.05 * k / 50 + 0.95 * normal.cdf(math.log(k / (50 - k)))
            self.assertAlmostEqual((t <= k).double().mean().item(), expected, delta=0.01)

    def test_t_is_never_above_T_even_at_the_edge_of_rounding(self):
        def rand(*shape, **options):
            return torch.full(shape, 1 - 2**-53, dtype=torch.float64)
        with mock.patch("torch.rand", rand):
            t = self.batches(n=1)[2]
        self.assertEqual(t.max(), 50)

    def test_labels_are_dropped_picture_by_picture(self):
        y = self.batches(label_drop=0.25)[1].view(-1, 32)
        dropped = (y == ddpm.NULL).float()
        self.assertAlmostEqual(dropped.mean().item(), 0.25, delta=0.02)
        self.assertFalse((dropped.mean(1) == 1).any())
        some = (dropped.mean(1) > 0) & (dropped.mean(1) < 1)
        self.assertGreater(some.float().mean().item(), 0.98)

    def test_pictures_and_labels_stay_together_unflipped_in_minus_1_to_1(self):
        x0, y, _, eps = self.batches(label_drop=0)
        value = ((x0[:, 0] + 1) * 127.5).round().long()
        self.assertTrue(torch.equal(value[:, 0, 0] % 10, y))
        self.assertTrue(torch.equal(value, (value[:, :1, :1] + torch.arange(16).view(4, 4)) % 256))
        self.assertEqual((x0.min().item(), x0.max().item()), (-1, 1))
        self.assertAlmostEqual(eps.std().item(), 1, delta=0.01)

    def test_a_step_is_drawn_from_its_seed_and_number_alone(self):
        images = torch.arange(256).byte().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        def batch(step, seed):
            return ddpm.training_batch(images, torch.arange(256), step, batch_size=8, T=50, seed=seed,
                                       label_drop=0)
        self.assertTrue(all(map(torch.equal, batch(5, 1), batch(5, 1))))
        for other in (batch(6, 1), batch(5, 2)):
            self.assertFalse(any(map(torch.equal, batch(5, 1), other)))

    def test_neighbouring_seeds_share_no_stream(self):
        def firsts(seed):
            return {torch.randn(3, generator=ddpm.stream(seed, i)).sum().item() for i in range(500)}
        self.assertFalse(firsts(0) & firsts(1))


class TheNet(unittest.TestCase):
    def net(self, **options):
        torch.manual_seed(0)
        return ddpm.UNet(**{"width": 8, **options})

    def test_the_answer_has_the_shape_of_the_question(self):
        for size, channels, classes in ((28, 1, 10), (32, 3, 10), (16, 1, 0), (64, 3, 2)):
            net = self.net(size=size, channels=channels, classes=classes)
            x = torch.randn(2, channels, size, size)
            y = torch.tensor([ddpm.NULL, classes - 1 if classes else ddpm.NULL])
            self.assertEqual(net(x, torch.tensor([1, 1000]), y).shape, x.shape)

    def test_a_side_that_does_not_divide_by_4_is_refused_in_one_line(self):
        with self.assertRaisesRegex(ddpm.Mistake, "divisible by 4, not 30"):
            ddpm.UNet(size=30)

    def test_the_untrained_net_answers_zero(self):
        x = torch.randn(2, 1, 28, 28)
        self.assertEqual(self.net()(x, torch.tensor([1, 9]), torch.tensor([0, 1])).abs().max(), 0)

    def test_NULL_is_the_last_row_of_the_class_embedding(self):
        net = self.net()
        nn.init.normal_(net.last.weight)
        for block in net.modules():
            if isinstance(block, ddpm.ResBlock):
                nn.init.normal_(block.conv2.weight)
        x, t = torch.randn(1, 1, 28, 28), torch.tensor([5])
        outs = [net(x, t, torch.tensor([y])) for y in (ddpm.NULL, 10, 9)]
        self.assertTrue(torch.equal(outs[0], outs[1]))
        self.assertFalse(torch.allclose(outs[0], outs[2]))
        later = net(x, torch.tensor([6]), torch.tensor([ddpm.NULL]))
        self.assertFalse(torch.allclose(outs[0], later))

    def test_a_label_may_be_a_mix_of_labels(self):
        net = self.net()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
        x, t, rows = torch.randn(1, 1, 28, 28), torch.tensor([5]), torch.eye(11)
        for label, row in ((3, 3), (ddpm.NULL, 10)):
            torch.testing.assert_close(net(x, t, rows[[row]]), net(x, t, torch.tensor([label])))
        with torch.no_grad():
            half = (net.label.weight[3] + net.label.weight[7]) / 2
            mixed = net(x, t, (rows[[3]] + rows[[7]]) / 2)
            net.label.weight[0] = half
        torch.testing.assert_close(mixed, net(x, t, torch.tensor([0])))

    def test_the_time_embedding_is_sines_and_cosines(self):
        embedding = ddpm.time_embedding(torch.tensor([0, 3, 900]), 8)
        for i, t in enumerate((0, 3, 900)):
            f = [10_000 ** (-k / 3) for k in range(4)]
            known = [math.sin(t * v) for v in f] + [math.cos(t * v) for v in f]
            torch.testing.assert_close(embedding[i], torch.tensor(known), atol=2e-4, rtol=0)

    def test_an_untrained_block_adds_nothing(self):
        block, x = ddpm.ResBlock(16, 16, 4), torch.randn(2, 16, 3, 3)
        self.assertTrue(torch.equal(block(x, torch.randn(2, 4)), x))

    def test_attention_is_a_softmax_over_all_places(self):
        torch.manual_seed(1)
        layer, x = ddpm.Attention(16), torch.randn(1, 16, 3, 3)
        self.assertTrue(torch.equal(layer(x), x))    # silent at first
        layer.out.weight.data = torch.eye(16)[:, :, None, None]
        q, k, v = layer.qkv(layer.norm(x)).view(3, 4, 4, 9)    # 4 heads of 4 channels, 9 places
        known = torch.zeros(4, 4, 9)
        for head in range(4):
            for place in range(9):
                score = torch.stack([(q[head, :, place] * k[head, :, other]).sum() / 2
                                     for other in range(9)])
                known[head, :, place] = (score.softmax(0) * v[head]).sum(1)
        torch.testing.assert_close(layer(x) - x, known.view(1, 16, 3, 3), atol=1e-5, rtol=0)

    def test_it_learns_a_single_picture_and_every_weight_has_a_gradient_by_the_third_step(self):
        net, alpha_bar = self.net(), ddpm.noise_schedule("cosine", 100)
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
        images, labels = ddpm.glyphs(train=False).data[:1, None], torch.tensor([0])
        losses, moved = [], {}
        for step in range(100):
            x0, y, t, eps = ddpm.training_batch(images, labels, step, batch_size=16, T=100,
                                                label_drop=0.1, seed=0)
            loss = ddpm.diffusion_loss(net, x0, y, t, eps, alpha_bar, "v", "l2")
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in net.named_parameters() if step < 3 else ():   # zero layers open
                moved[name] = moved.get(name, 0) + parameter.grad.abs().sum().item()
            optimizer.step()
            losses.append(loss.item())
        self.assertEqual([name for name, by in moved.items() if not by > 0], [])
        self.assertLess(sum(losses[-5:]), 0.3 * sum(losses[:5]))


def exact_net(star, alpha_bar, predict):
    """The best net for a data set of one picture: it knows eps = (x_t - √ᾱ·star)/√(1-ᾱ)."""
    def net(x, t, y):
        signal_rate = alpha_bar[t].sqrt().float().view(-1, 1, 1, 1)
        noise_rate = (1 - alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)
        eps = (x - signal_rate * star) / noise_rate
        v = signal_rate * eps - noise_rate * star
        return {"eps": eps, "x0": star.expand_as(x), "v": v}[predict]
    return net


def gaussian_x0_at(mean, std, alpha_bar):
    """The best guess of x0 if the data are N(mean, std²), pixel by pixel: E[x0 | x_t]."""
    def x0_at(x, t):
        a, s2 = alpha_bar[t].item() ** 0.5, 1 - alpha_bar[t].item()
        return mean + a * std ** 2 / (a * a * std ** 2 + s2) * (x - a * mean)
    return x0_at


class Sampling(unittest.TestCase):
    def test_a_data_set_of_one_picture_comes_back_from_every_sampler_at_any_number_of_steps(self):
        star = torch.rand(1, 1, 4, 4, generator=ddpm.stream(1, 0)) * 2 - 1
        for schedule in ddpm.SCHEDULES:
            alpha_bar = ddpm.noise_schedule(schedule, 40)
            for predict in ("eps", "v", "x0"):
                net = exact_net(star, alpha_bar, predict)
                def x0_at(x, t):
                    y = torch.zeros(len(x), dtype=torch.long)
                    return ddpm.predict_x0(net, x, t, y=y, alpha_bar=alpha_bar, predict=predict)
                for sampler in ddpm.SAMPLERS:
                    for steps in (1, 2, 7, 40):
                        ts = [40 * i // steps for i in range(steps, -1, -1)]
                        z = noise(2, 1, 4, 4)
                        *way, x = ddpm.denoise(x0_at, z(), ts, alpha_bar, z, sampler)
                        # at one step, eps tells x0 only through a division by √ᾱ_T
                        slack = 1e-5 if steps > 1 or predict != "eps" else 1e-2
                        torch.testing.assert_close(x, star.expand_as(x), atol=slack, rtol=0)
                        eps = [(x - a ** 0.5 * star) / (1 - a) ** 0.5
                               for x, a in zip(way, alpha_bar[ts].tolist())]
                        for one in eps if sampler != "ddpm" else ():     # no new noise: eps stays
                            torch.testing.assert_close(one, eps[0], atol=1e-2, rtol=0)

    def test_ddpm_on_all_steps_is_the_posterior_of_equation_7(self):
        alpha_bar = ddpm.noise_schedule("linear", 50)
        x0_hat, x = torch.rand(1, 1, 3, 3), torch.randn(1, 1, 3, 3)
        for t in range(50, 0, -1):
            beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
            mean = (alpha_bar[t - 1].sqrt() * beta / (1 - alpha_bar[t]) * x0_hat
                    + (1 - beta).sqrt() * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * x)
            variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
            z = torch.randn(1, 3, 3, generator=ddpm.stream(7, 0))
            known = (mean + variance.sqrt() * z).float()
            for sampler, eta in (("ddpm", None), ("ddim", 1.0)):
                got = last(ddpm.denoise(lambda x, t: x0_hat, x, [t, t - 1], alpha_bar,
                                        noise(1, 1, 3, 3), sampler, eta))
                torch.testing.assert_close(got, known, atol=1e-5, rtol=1e-5)

    def test_eta_scales_the_noise_between_ddim_and_ddpm_on_skipped_steps_too(self):
        alpha_bar, x0_hat = ddpm.noise_schedule("cosine", 50), torch.zeros(1, 1, 2, 2)
        z = torch.randn(1, 2, 2, generator=ddpm.stream(7, 0))
        a, b = alpha_bar[30].item(), alpha_bar[10].item()
        for eta in (0.0, 0.3, 1.0):
            got = last(ddpm.denoise(lambda x, t: x0_hat, x0_hat, [30, 10], alpha_bar,
                                    noise(1, 1, 2, 2), "ddim", eta))
            sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))     # Song et al. 2021, eq. 16
            torch.testing.assert_close(got[0], sigma * z, atol=1e-6, rtol=1e-5)

    def test_dpm_is_the_multistep_solver_of_its_paper(self):
        alpha_bar = ddpm.noise_schedule("cosine", 100)
        x0_at, ts = gaussian_x0_at(0.2, 0.4, alpha_bar), [100, 80, 55, 30, 12, 0]
        x = start = torch.randn(1, 1, 4, 4, generator=ddpm.stream(2, 0))
        a, s = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        past = None
        for t, t_next in zip(ts, ts[1:]):           # Lu et al. 2022, alg. 2, in their variables
            x0_hat = x0_at(x, t)
            if t_next == 0:
                x = x0_hat
                break
            h = math.log(a[t_next] / s[t_next]) - math.log(a[t] / s[t])
            d = x0_hat
            if past is not None:
                r = past[1] / h
                d = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * past[0]
            x = s[t_next] / s[t] * x - a[t_next] * (math.exp(-h) - 1) * d
            past = (x0_hat, h)
        got = last(ddpm.denoise(x0_at, start, ts, alpha_bar, None, "dpm"))
        torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)

    def error_of(self, sampler, steps, T=4096, end=512):
        """How far a sampler is from the exact flow of Gaussian data, from T down to t = end."""
        alpha_bar = ddpm.noise_schedule("linear", T)
        x = torch.randn(1, 1, 8, 8, generator=ddpm.stream(3, 0), dtype=torch.float64)
        ts = [T - (T - end) * i // steps for i in range(steps + 1)]
        got = last(ddpm.denoise(gaussian_x0_at(0.3, 0.5, alpha_bar), x, ts, alpha_bar, None,
                                sampler))
        def spread(t):
            return (alpha_bar[t] * 0.25 + 1 - alpha_bar[t]).sqrt()
        a, b = alpha_bar[T].sqrt(), alpha_bar[end].sqrt()
        exact = b * 0.3 + spread(end) * (x - a * 0.3) / spread(T)
        return (got - exact).abs().mean().item()

    def test_ddim_is_of_first_order_and_dpm_of_second(self):
        for sampler, order in (("ddim", 1), ("dpm", 2)):
            errors = [self.error_of(sampler, steps) for steps in (32, 64, 128)]
            for coarse, fine in zip(errors, errors[1:]):
                self.assertAlmostEqual(math.log2(coarse / fine), order, delta=0.35, msg=sampler)

    def test_every_sampler_ends_in_the_distribution_of_the_data(self):
        alpha_bar = ddpm.noise_schedule("cosine", 200)
        for sampler in ddpm.SAMPLERS:
            z = noise(4, 1, 64, 64)
            x = last(ddpm.denoise(gaussian_x0_at(0.3, 0.5, alpha_bar), z(), range(200, -1, -1),
                                  alpha_bar, z, sampler))
            self.assertAlmostEqual(x.mean().item(), 0.3, delta=0.03, msg=sampler)
            self.assertAlmostEqual(x.std().item(), 0.5, delta=0.03, msg=sampler)

    def test_a_wild_net_cannot_carry_the_picture_away(self):
        alpha_bar = ddpm.noise_schedule("cosine", 1000)
        def net(x, t, y):
            return 5 * torch.ones_like(x)            # as eps at t = T it stands for x0 = -100,000
        def x0_at(x, t):
            return ddpm.predict_x0(net, x, t, y=torch.zeros(len(x)).long(), alpha_bar=alpha_bar,
                                   predict="eps")
        for sampler in ddpm.SAMPLERS:
            ts = [1000 * i // 10 for i in range(10, -1, -1)]
            z = noise(2, 1, 4, 4)
            for x in ddpm.denoise(x0_at, z(), ts, alpha_bar, z, sampler):
                self.assertLess(x.abs().max().item(), 8, sampler)

    def test_guidance_goes_on_from_no_label_through_the_label_amid_the_noise(self):
        alpha_bar, asked = torch.tensor([1, 0.71, 0.69, 0.021, 0.019]).double(), []
        def net(x, t, y):
            asked.append(y.tolist())
            return torch.where(y == ddpm.NULL, 0.1, 0.2).view(-1, 1, 1, 1).expand_as(x)
        x, y = torch.zeros(2, 1, 2, 2), torch.tensor([3, 7])
        for t in (1, 2, 3, 4):
            for guidance, known in ((0, 0.1), (0.5, 0.15), (1, 0.2), (1.5, 0.25), (3, 0.4)):
                asked.clear()
                guided = t in (2, 3) and guidance not in (0, 1)
                x0_hat = ddpm.predict_x0(net, x, t, y=y, alpha_bar=alpha_bar, predict="x0",
                                         guidance=guidance)
                known = known if guided or guidance == 0 else 0.2
                torch.testing.assert_close(x0_hat, torch.full_like(x, known))
                self.assertEqual(len(asked), 1 + guided) # a second evaluation only where it counts

    def test_dynamic_thresholding_scales_by_a_quantile_where_it_is_above_1(self):
        x0_hat = torch.tensor([[-4.0, 0.0, 1.0, 2.0], [0.3, -0.2, 0.1, 0.0]]).view(2, 1, 2, 2)
        alpha_bar = ddpm.noise_schedule("linear", 10)
        def guess(threshold):
            return ddpm.predict_x0(lambda x, t, y: x0_hat, x0_hat, 5, y=torch.zeros(2).long(),
                                   alpha_bar=alpha_bar, predict="x0", threshold=threshold)
        # |x0_hat| of the first is 0, 1, 2, 4: its 0.75 quantile lies a quarter on from 2 to 4
        torch.testing.assert_close(guess(0.75)[0].flatten(), torch.tensor([-1, 0, 0.4, 0.8]))
        self.assertEqual(guess(None)[0].flatten().tolist(), [-1, 0, 1, 1])
        for threshold in (0.75, None):
            self.assertTrue(torch.equal(guess(threshold)[1], x0_hat[1]))

    def draw(self, n=3, config=GREY, **options):
        torch.manual_seed(0)
        net = ddpm.UNet(**config["net"])
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
        y = torch.arange(n) % 10
        return ddpm.draw(net, config, y, **options)

    def test_the_steps_start_at_T_and_fall_for_every_number_of_steps(self):
        for steps in range(1, 21):
            seen = []
            def predict_x0(net, x, t, **options):
                seen.append(t)
                return torch.zeros_like(x)
            with mock.patch("ddpm.predict_x0", predict_x0):
                self.draw(1, steps=steps)
            self.assertEqual(len(seen), steps)
            self.assertEqual(seen[0], 20)
            self.assertTrue(all(a > b for a, b in zip(seen, seen[1:] + [0])), seen)

    def test_a_picture_depends_on_its_seed_and_place_not_on_its_neighbours(self):
        few, many, other = self.draw(3), self.draw(260, steps=20), self.draw(3, seed=1)
        self.assertTrue(torch.equal(few[-1], many[-1, :3]))
        self.assertTrue(torch.equal(few, self.draw(3)))
        self.assertGreater((few[-1].int() - other[-1].int()).abs().float().mean(), 5)
        self.assertFalse(torch.equal(many[-1, 0], many[-1, 250]))        # batches do not repeat

    def test_no_float64_reaches_the_device_for_some_have_none(self):
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(watch, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for part in out if isinstance(out, (list, tuple)) else [out]:
                    if isinstance(part, torch.Tensor) and part.device.type == "meta":
                        self.assertNotEqual(part.dtype, torch.float64, function)
                        seen.append(function)
                return out
        seen, alpha_bar, y = [], ddpm.noise_schedule("cosine", 9), torch.zeros(2, dtype=torch.long)
        images = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
        net = ddpm.UNet(size=8, width=8).to("meta")  # a device that computes shapes only
        def cpu(tensor):
            return torch.rand(tensor.shape, dtype=tensor.dtype)
        with Watch(), mock.patch("torch.Tensor.cpu", cpu):
            x0, labels, t, eps = ddpm.training_batch(images.to("meta"), torch.zeros(
                9, dtype=torch.long, device="meta"), 0, batch_size=2, T=9, label_drop=0.5, seed=0)
            ddpm.diffusion_loss(net, x0, labels, t, eps, alpha_bar).backward()
            for sampler in ddpm.SAMPLERS:
                x0_at = functools.partial(ddpm.predict_x0, net, y=y.to("meta"), predict="v",
                                          alpha_bar=alpha_bar, guidance=2.0, threshold=0.9)
                x = last(ddpm.denoise(x0_at, eps, [9, 5, 0], alpha_bar, lambda: eps, sampler))
            ddpm.to_uint8(x)
        self.assertGreater(len(seen), 1000)

    def test_ddpm_draws_new_noise_at_each_step_and_ddim_none(self):
        for sampler, none in (("ddpm", False), ("ddim", True), ("dpm", True)):
            z = mock.Mock(side_effect=noise(1, 1, 2, 2))
            last(ddpm.denoise(lambda x, t: x * 0, torch.ones(1, 1, 2, 2), [9, 4, 0],
                              ddpm.noise_schedule("cosine", 9), z, sampler))
            self.assertEqual(z.call_count, 0 if none else 2, sampler)

    def test_pictures_of_one_hand_get_one_noise_and_a_new_one_at_each_step(self):
        drawn = []
        def denoise(x0_at, x, ts, alpha_bar, noise, sampler, eta):
            drawn.extend([x, noise(), noise()])
            yield x
        with mock.patch("ddpm.denoise", denoise):
            self.draw(4, hands=[{0: 1.0}, {0: 1.0}, {1: 1.0}, {1: 1.0}])
        for z in drawn:
            self.assertTrue(torch.equal(z[0], z[1]) and torch.equal(z[2], z[3]))
        different = torch.cat([z[[0, 2]] for z in drawn]).flatten(1)     # 6 of 784 numbers
        self.assertLess(different.corrcoef().fill_diagonal_(0).abs().max(), 0.2)

    def test_noise_between_two_hands_on_the_circle_is_still_normal(self):
        angle = 0.7
        hand = [(ddpm.stream(0, 0), math.cos(angle)), (ddpm.stream(0, 1), math.sin(angle))]
        z, = ddpm.gaussian((100_000,), [hand])
        self.assertAlmostEqual(z.mean().item(), 0, delta=0.02)
        self.assertAlmostEqual(z.std().item(), 1, delta=0.01)
        a = torch.randn(100_000, generator=ddpm.stream(0, 0))
        self.assertAlmostEqual((a * z).mean().item(), math.cos(angle), delta=0.02)

    def test_a_morph_leads_from_digit_to_digit_without_a_jump(self):
        y, hands = ddpm.morph_path([3, 8], 10, frames=24)
        self.assertEqual((y.shape, len(hands)), ((25, 11), 25))
        self.assertEqual((y[0].argmax(), y[24].argmax(), y[12, 3], y[12, 8]), (3, 8, 0.5, 0.5))
        for hand in hands:
            self.assertAlmostEqual(sum(w * w for w in hand.values()), 1)
        torch.manual_seed(0)
        net = ddpm.UNet(**GREY["net"])
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.15)
        path = ddpm.draw(net, GREY, y, hands=hands)[-1].float()
        ends = ddpm.draw(net, GREY, torch.tensor([3, 8]))[-1]
        self.assertLessEqual((path[[0, 24]] - ends.float()).abs().max(), 1)
        whole = (path[0] - path[24]).abs().mean()
        steps = (path[1:] - path[:-1]).abs().flatten(1).mean(1)
        self.assertGreater(whole, 20)
        self.assertLess(steps.max(), whole / 6)      # 24 steps; an even one would be whole / 24

    def test_a_morph_of_more_than_two_goes_round(self):
        y, hands = ddpm.morph_path([3, 8, 5], 10, frames=4)
        self.assertEqual(y.argmax(1)[::5].tolist(), [3, 8, 5])
        self.assertEqual(y.argmax(1)[4::5].tolist(), [8, 5, 3])
        self.assertAlmostEqual(hands[-1][0], 1)      # back at the noise it began with
        self.assertTrue(torch.equal(y[-1], y[0]))

    def test_a_start_from_a_picture_keeps_it_at_strength_0_and_forgets_it_at_1(self):
        x0 = torch.randint(256, (3, 1, 28, 28), generator=ddpm.stream(5, 0)) / 127.5 - 1
        for sampler in ddpm.SAMPLERS:
            kept = self.draw(3, x0=x0, start=0.0, sampler=sampler)[-1]
            self.assertTrue(torch.equal(kept, ddpm.to_uint8(x0)))
            gone = self.draw(3, x0=x0, start=1.0, sampler=sampler)[-1]
            self.assertTrue(torch.equal(gone, self.draw(3, sampler=sampler)[-1]))
        seen = []
        def predict_x0(net, x, t, **options):
            seen.append((t, x))
            return x0
        with mock.patch("ddpm.predict_x0", predict_x0):
            self.draw(3, x0=x0, start=0.6, steps=4)
        self.assertEqual([t for t, x in seen], [12, 9, 6, 3])           # T = 20
        a = ddpm.noise_schedule("cosine", 20)[12].item()
        z = torch.randn(1, 28, 28, generator=ddpm.stream(0, 1))
        torch.testing.assert_close(seen[0][1][1], a ** 0.5 * x0[1] + (1 - a) ** 0.5 * z)

    def test_guidance_0_draws_as_if_there_were_no_labels(self):
        one = [{0: 1.0}] * 3
        blind, seeing = (self.draw(3, hands=one, guidance=w)[-1] for w in (0, 1.5))
        self.assertTrue(torch.equal(blind[0], blind[1]))
        self.assertFalse(torch.equal(seeing[0], seeing[1]))

    def test_the_film_has_the_frames_asked_for_and_ends_in_the_sample(self):
        film = self.draw(2, frames=7)
        self.assertEqual((film.shape, film.dtype), ((7, 2, 1, 28, 28), torch.uint8))
        self.assertTrue(torch.equal(film[-1], self.draw(2)[-1]))
        whole = self.draw(1, frames=40, steps=5)        # fewer states than frames: all of them
        self.assertEqual(len(whole), 6)
        z = ddpm.to_uint8(torch.randn(1, 28, 28, generator=ddpm.stream(0, 0)))
        self.assertTrue(torch.equal(whole[0, 0], z) and torch.equal(film[0, 0], z))

class Pictures(Folder):
    def test_grey_levels_survive_the_way_there_and_back(self):
        levels = torch.arange(256, dtype=torch.uint8)
        self.assertTrue(torch.equal(ddpm.to_uint8(levels / 127.5 - 1), levels))
        self.assertEqual(ddpm.to_uint8(torch.tensor([-1.7, 1.7])).tolist(), [0, 255])

    def test_a_grid_keeps_order_levels_and_channels(self):
        images = (torch.arange(6, dtype=torch.uint8) * 40).view(6, 1, 1, 1).expand(6, 1, 28, 28)
        sheet = ddpm.grid(images, 3)
        self.assertEqual(sheet.mode, "L")
        k = sheet.width // 92                        # 3 pictures of 28 and 4 gaps of 2
        self.assertEqual(sheet.size, (92 * k, 62 * k))
        centres = [sheet.getpixel(((16 + 30 * (i % 3)) * k, (16 + 30 * (i // 3)) * k))
                   for i in range(6)]
        self.assertEqual(centres, [0, 40, 80, 120, 160, 200])
        self.assertEqual(ddpm.grid(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 2).mode, "RGB")

    def test_a_gif_has_all_its_frames_exact_levels_a_held_end_and_loops(self):
        film = torch.stack([(7 * i + torch.arange(256)) % 256 for i in range(9)]).byte()
        film = film.view(9, 1, 1, 16, 16)
        with contextlib.redirect_stdout(None):
            ddpm.write_pictures("a.png", film[-1], 1, film)
        with Image.open("a.gif") as gif:
            self.assertEqual((gif.n_frames, gif.info["loop"]), (9, 0))
            for i, frame in enumerate(film):
                gif.seek(i)
                self.assertEqual(gif.convert("L").tobytes(), ddpm.grid(frame, 1).tobytes())
                self.assertEqual(gif.info["duration"], 2000 if i == 8 else 80)

    def test_equal_frames_lose_no_time(self):
        film = torch.tensor([0, 0, 90, 90]).byte().view(4, 1, 1, 1, 1).expand(4, 1, 1, 8, 8)
        with contextlib.redirect_stdout(None):
            ddpm.write_pictures("a.png", film[-1], 1, film)
        with Image.open("a.gif") as gif:
            total = 0
            for i in range(gif.n_frames):
                gif.seek(i)
                total += gif.info["duration"]
        self.assertEqual(total, 3 * 80 + 2000)

    def test_a_file_is_written_whole_or_not_at_all(self):
        def fail(file):
            file.write(b"half")
            raise OSError("No space left on device")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            ddpm.write("deep/er/file", lambda file: file.write(b"whole"))
            with self.assertRaises(OSError):
                ddpm.write("deep/er/file", fail)
        self.assertEqual(out.getvalue().strip(), str(Path("deep/er/file")))
        self.assertEqual(Path("deep/er/file").read_bytes(), b"whole")
        self.assertEqual(os.listdir("deep/er"), ["file"])

    @unittest.skipUnless(os.name == "posix", "no links here")
    def test_a_link_is_followed_and_a_device_is_not_replaced(self):
        Path("there").mkdir()
        Path("a.txt").symlink_to("there/b.txt")
        Path("pipe").symlink_to("/dev/null")
        with contextlib.redirect_stdout(None):
            ddpm.write("a.txt", lambda file: file.write(b"new"))
            with self.assertRaisesRegex(ddpm.Mistake, "pipe is no ordinary file"):
                ddpm.write("pipe", lambda file: file.write(b"new"))
        self.assertTrue(Path("a.txt").is_symlink())
        self.assertEqual(Path("there/b.txt").read_bytes(), b"new")

    def test_a_sheet_of_very_many_pictures_shows_a_hundred_rows(self):
        with contextlib.redirect_stdout(None):
            ddpm.write_pictures("many.png", torch.zeros(1005, 1, 4, 4, dtype=torch.uint8), 2)
        with Image.open("many.png") as sheet:
            self.assertEqual(sheet.height, 2 * (100 * 6 + 2))

    def test_the_curve_of_a_falling_loss_falls(self):
        image = ddpm.draw_curve([1 / (1 + i / 50) for i in range(5000)])
        rows = [min(y for y in range(40, 360) if image.getpixel((x, y)) < 128)
                for x in (5, 200, 400, 630)]
        self.assertEqual(rows, sorted(rows))
        self.assertGreater(rows[-1] - rows[0], 250)
        ddpm.draw_curve([0.5])

    def test_a_pipe_gets_whole_lines_with_the_time_left(self):
        shown = mock.patch("ddpm.status.shown", 0, create=True)
        clock = mock.patch("time.perf_counter", lambda: 130.0)
        with contextlib.redirect_stderr(io.StringIO()) as err, shown, clock:
            ddpm.status(0.25, 100.0, "step 5")
            ddpm.status(0.26, 100.0, "too soon")
        self.assertEqual(err.getvalue(), "step 5 · 1:30 left\n")

    def test_in_a_terminal_a_drawing_leaves_the_line_blank(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True
        net, config = ddpm.UNet(**GREY["net"]), GREY
        clock, shown = itertools.count(0.0, 1.0), mock.patch("ddpm.status.shown", 0, create=True)
        with contextlib.redirect_stderr(Terminal()) as err, shown, mock.patch(
                "time.perf_counter", clock.__next__):
            ddpm.draw(net, config, torch.arange(2), steps=2)
        *_, last, nothing = err.getvalue().split("\r")
        self.assertEqual((last.strip(), nothing), ("", ""))
        self.assertIn("pictures drawn", err.getvalue())


class Data(Folder):
    def test_glyphs_are_readable_digits_made_offline_and_the_same_each_time(self):
        images, labels, classes = ddpm.load_data("glyphs")
        self.assertEqual((images.shape, images.dtype), ((10_000, 1, 28, 28), torch.uint8))
        self.assertEqual(classes, list("0123456789"))
        self.assertEqual(labels.bincount().tolist(), [1000] * 10)
        self.assertTrue(torch.equal(images[:, 0], ddpm.glyphs().data))
        self.assertLess(images[:, :, 0].float().mean(), 2)               # black at the edge
        self.assertGreater(images.amax((1, 2, 3)).min(), 150)            # and none of them empty
        test, answers, _ = ddpm.load_data("glyphs", train=False)
        self.assertFalse({p.numpy().tobytes() for p in test} & {p.numpy().tobytes() for p in images})
        means = torch.stack([images[labels == k].float().mean(0).flatten() for k in range(10)])
        nearest = torch.cdist(test.float().flatten(1), means).argmin(1)
        self.assertGreater((nearest == answers).float().mean(), 0.4)     # a chance reader has 0.1

    def tiny_mnist(self, n=20, name="MNIST"):
        raw = Path(f"here/{name}/raw")
        raw.mkdir(parents=True, exist_ok=True)
        for name in ("train", "t10k"):
            (raw / f"{name}-images-idx3-ubyte").write_bytes(
                struct.pack(">IIII", 2051, n, 28, 28) + bytes(i % 251 for i in range(n * 784)))
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(
                struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n)))

    def test_mnist_is_read_from_torchvisions_files_without_a_download(self):
        self.tiny_mnist()
        images, labels, classes = ddpm.load_data("mnist", "here")
        self.assertEqual((images.shape, images.dtype), ((20, 1, 28, 28), torch.uint8))
        self.assertEqual(images.flatten()[:300].tolist(), [i % 251 for i in range(300)])
        self.assertEqual(labels.tolist(), [i % 10 for i in range(20)])
        self.assertEqual(classes, list("0123456789"))

    def test_fashion_and_kmnist_are_entries_too_and_classes_have_names(self):
        for dataset, name in (("fashion", "FashionMNIST"), ("kmnist", "KMNIST")):
            self.tiny_mnist(name=name)
            images, labels, classes = ddpm.load_data(dataset, "here")
            self.assertEqual((images.shape, len(classes)), ((20, 1, 28, 28), 10))
        line = "train --dataset fashion --data here --width 8 --steps 1"
        self.assertEqual(self.run_main(line)[0], 0)
        status, out, err = self.run_main("sample --digit Sneaker bag --steps 2 --raw raw.pt")
        self.assertEqual(status, 0, err)
        self.assertEqual(torch.load("raw.pt", weights_only=True)["labels"].tolist(), [7, 8])
        self.refuses("trouser, pullover", "sample --digit glove")

    def test_cifar_is_colour_in_the_order_of_channel_row_column(self):
        batches = Path("here/cifar-10-batches-py")
        batches.mkdir(parents=True)
        pixels = [i % 256 for i in range(3072)]      # its files are red, then green, then blue
        rows = {"data": torch.tensor([pixels] * 4).byte().numpy(), "labels": [0, 1, 2, 3]}
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for name in names:
            (batches / name).write_bytes(pickle.dumps(rows))
        (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True):
            images, labels, classes = ddpm.load_data("cifar10", "here")
        self.assertEqual((images.shape, labels[:4].tolist()), ((20, 3, 32, 32), [0, 1, 2, 3]))
        self.assertEqual(images[0].flatten().tolist(), pixels)

    def own_pictures(self):
        for name, level in (("dark", 30), ("Light", 220)):
            Path("mine", name).mkdir(parents=True)
            for i in range(11):
                mode = ("RGB", "L", "P", "1", "RGBA", "CMYK", "LA", "I;16")[i % 8]
                picture = Image.new("L", (20 + 9 * i, 50), level)
                picture = picture if mode == "I;16" else picture.convert(mode)
                picture.save(f"mine/{name}/{i}.tiff" if mode != "LA" else f"mine/{name}/{i}.png")
        Path("mine/dark/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
        Path("mine/dark/cut.bmp").write_bytes(b"BM")
        Path("mine/dark/notes.txt").write_text("not meant as a picture")

    def test_a_folder_of_own_pictures_is_a_data_set_and_broken_ones_are_named_and_counted(self):
        self.own_pictures()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images, labels, classes = ddpm.load_data("folder", "mine", size=16)
            test = ddpm.load_data("folder", "mine", size=16, train=False)[0]
        self.assertEqual((images.shape, images.dtype), ((19, 3, 16, 16), torch.uint8))
        self.assertEqual((len(test), classes), (3, ["Light", "dark"]))
        self.assertIn("skipped: mine/dark/broken.png", err.getvalue())
        self.assertIn("22 pictures in mine, 3 skipped", err.getvalue())
        self.assertLess((images[labels == 0].float().mean() - 220).abs(), 30)
        status, out, err = self.run_main("train --dataset folder --data mine --size 16 --width 8 "
                                         "--steps 1 --T 5")
        self.assertEqual(status, 0, err)
        status, out, err = self.run_main("sample --digit Light dark --gif")
        self.assertEqual(status, 0, err)
        with Image.open("samples.png") as sheet:
            self.assertEqual(sheet.mode, "RGB")
        Path("mine/empty").mkdir()                   # a class without a picture is only a name
        self.assertEqual(self.run_main("forward --dataset folder --data mine")[0], 0)
        self.refuses("nowhere", "train --dataset folder --out x --data nowhere")
        self.refuses("mine/dark/CLASS", "train --dataset folder --out x --data mine/dark")

    def photo(self, text="203", size=90, mode="RGB", paper=210, ink=40):
        """A row of digits on unevenly lit, grainy paper."""
        picture = Image.new("L", (60 + 110 * len(text), 220), paper)
        for i, digit in enumerate(text):
            ImageDraw.Draw(picture).text((40 + 110 * i, 60 + 9 * i), digit, ink, stroke_width=3,
                                         font=ImageFont.load_default(size))
        light = torch.linspace(1, 0.8, picture.width)
        grain = torch.randn(220, picture.width, generator=ddpm.stream(0, 0)) / 50
        grey = torch.tensor(list(picture.tobytes())).view(220, -1) * (light + grain)
        levels = bytes(grey.clamp(0, 255).byte().flatten().tolist())
        return Image.frombytes("L", picture.size, levels).convert(mode)

    def test_links_that_go_round_end_and_a_bomb_of_a_picture_is_skipped_by_name(self):
        for name in ("a", "b"):
            Path("mine", name).mkdir(parents=True)
            Image.new("L", (9, 9)).save(f"mine/{name}/0.png")
            Image.new("L", (9, 9)).save(f"mine/{name}/1.png")
            for link, to in (("round", ".."), ("self", "."), ("back", "../a")):
                Path("mine", name, link).symlink_to(to)
        Image.new("1", (20_000, 20_000)).save("mine/a/bomb.png")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images = ddpm.load_data("folder", "mine", size=8)[0]
        self.assertEqual(len(images), 3)             # of four, the first is kept for testing
        self.assertIn("skipped: mine/a/bomb.png", err.getvalue())

    def test_damaged_files_of_a_data_set_are_told_by_name(self):
        for part, damage in (("images-idx3", lambda whole: whole[:5000]),
                             ("images-idx3", lambda whole: b"<html>" + whole),
                             ("images-idx3", lambda whole: b""),
                             ("labels-idx1", lambda whole: struct.pack(">II", 2049, 9) + bytes(9)),
                             ("labels-idx1", lambda whole: whole[:-1] + bytes([10])),
                             ("labels-idx1", lambda whole: whole[:-3])):
            self.tiny_mnist()
            path, = Path("here/MNIST/raw").glob(f"train-{part}*")
            path.write_bytes(damage(path.read_bytes()))
            with mock.patch("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"]):
                self.refuses("mnist ", "train --width 8 --steps 1 --data here", status=1)

    def test_a_photo_of_a_row_becomes_white_digits_on_black_each_in_the_middle(self):
        self.photo().save("dark.jpg")
        self.photo(paper=30, ink=230, mode="P").save("light.png")
        clear = Image.new("RGBA", (300, 200))        # ink on nothing
        ImageDraw.Draw(clear).rectangle((140, 20, 160, 180), "black")
        clear.save("clear.png")
        for path, n in (("dark.jpg", 3), ("light.png", 3), ("clear.png", 1)):
            x0 = ddpm.read_pictures(path, 1, 28)
            self.assertEqual(x0.shape, (n, 1, 28, 28), path)
            self.assertEqual(x0[:, :, :4].max(), -1)                     # a frame of black
            self.assertEqual(x0[..., :4].max(), -1)
            rows = (x0 > 0).any(-1).sum((1, 2))
            self.assertTrue((rows >= 18).all() and (rows <= 20).all(), rows)

    def test_a_picture_of_the_nets_own_size_is_taken_as_it_is(self):
        picture = ddpm.glyphs(train=False).data[3]
        Image.frombytes("L", (28, 28), bytes(picture.flatten().tolist())).save("a.png")
        x0 = ddpm.read_pictures("a.png", 1, 28)
        self.assertTrue(torch.equal(ddpm.to_uint8(x0)[0, 0], picture))
        self.assertEqual(ddpm.read_pictures("a.png", 3, 32).shape, (1, 3, 32, 32))

    def test_sixteen_bits_of_grey_are_scaled_to_eight_not_clipped(self):
        Image.new("I;16", (4, 4), 128 * 256).save("deep.png")
        self.assertEqual(ddpm.open_picture("deep.png", "L").getpixel((0, 0)), 128)

    def test_a_folder_without_a_picture_in_it_is_no_class(self):
        for name in ("b", "a", ".cache", "empty"):
            Path("mine", name).mkdir(parents=True)
        Path("mine/.cache/notes.txt").write_text("no picture")
        for name in "ab":
            for i in range(10):
                Image.new("L", (8, 8), i).save(f"mine/{name}/{i}.png")
        with contextlib.redirect_stderr(io.StringIO()):
            found = ddpm.folder("mine", size=8)
        self.assertEqual((found.classes, found.targets), (["a", "b"], [0] * 9 + [1] * 9))

    def test_a_photo_that_was_taken_on_its_side_is_turned_upright(self):
        exif = Image.Exif()
        exif[0x0112] = 6                             # the orientation of a phone held upright
        Image.new("L", (20, 10)).save("side.jpg", exif=exif)
        self.assertEqual(ddpm.open_picture("side.jpg").size, (10, 20))

    def test_a_set_with_more_columns_of_targets_is_read_by_its_first(self):
        found = types.SimpleNamespace(data=torch.zeros(3, 28, 28, dtype=torch.uint8), classes="0123",
                                      targets=torch.tensor([[3, 70], [1, 80], [2, 90]]))
        with mock.patch.dict(ddpm.DATASETS, qmnist=lambda *args, **options: found):
            self.assertEqual(ddpm.load_data("qmnist")[1].tolist(), [3, 1, 2])

    def test_what_is_no_picture_is_refused_by_name(self):
        Path("text.png").write_text("no picture")
        Image.new("L", (100, 50)).save("empty.png")
        for path, words in (("text.png", "no picture"), ("missing.png", "no picture"),
                            ("empty.png", "no digit")):
            with self.assertRaisesRegex(ddpm.Mistake, f"{path}.*{words}"):
                ddpm.read_pictures(path, 1, 28)

    def test_without_a_network_one_line_says_where_it_looked_and_what_to_do(self):
        with mock.patch("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"]):
            for command in ("train", "forward"):
                self.refuses("--dataset glyphs", command, "--data", "nowhere", status=1)
        with mock.patch.dict(ddpm.DATASETS, mnist=mock.Mock(side_effect=BadStatusLine("a portal"))):
            self.refuses("a portal", "forward", status=1)


class Checkpoints(Folder):
    def test_the_file_alone_rebuilds_the_net(self):
        self.train("--schedule", "linear", "--predict", "eps")
        with contextlib.redirect_stdout(None):
            net, config = ddpm.load_net("runs/glyphs/ddpm.pt", "cpu")
        saved = torch.load("runs/glyphs/ddpm.pt", weights_only=True)
        self.assertEqual((config["schedule"], config["predict"], config["T"]), ("linear", "eps", 6))
        for name, value in net.state_dict().items():
            self.assertTrue(torch.equal(value, saved["ema"][name]), name)

    def test_a_checkpoint_that_is_none_is_refused_and_no_code_in_it_runs(self):
        class Bomb:
            def __reduce__(self):
                return open, ("ran", "w")
        self.train()
        whole = Path("runs/glyphs/ddpm.pt").read_bytes()
        Path("empty.pt").write_bytes(b"")
        Path("text.pt").write_text("not a checkpoint")
        Path("bomb.pt").write_bytes(pickle.dumps(Bomb()))
        torch.save({"format": "ddpm.py 1", "bomb": Bomb()}, "zipped.pt")
        torch.save({"weights": torch.zeros(3)}, "other.pt")
        for k in range(1, 8):
            Path(f"cut{k}.pt").write_bytes(whole[:len(whole) * k // 8])
        for path in sorted(Path().glob("*.pt")):
            self.refuses("is not a file of", "sample --ckpt", path)
        self.refuses("no file missing.pt", "sample --ckpt missing.pt")
        self.refuses("no file runs", "sample --ckpt runs")
        self.assertFalse(Path("ran").exists())

    def test_no_flipped_bit_changes_the_weights_unnoticed(self):
        self.train()
        whole = Path("runs/glyphs/ddpm.pt").read_bytes()
        places = torch.randint(len(whole) * 8, (20,), generator=ddpm.stream(0, 0)).tolist()
        for place in places:
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            Path("flipped.pt").write_bytes(flipped)
            try:                                     # headers hold bytes that nothing depends on
                found = ddpm.load("flipped.pt")
            except ddpm.Mistake:
                continue
            for name, value in ddpm.load("runs/glyphs/ddpm.pt")["ema"].items():
                self.assertTrue(torch.equal(found["ema"][name], value), (place, name))

    def test_hostile_settings_are_refused_before_they_take_memory(self):
        self.train()
        whole = ddpm.load("runs/glyphs/ddpm.pt", ["config", "flags"])
        large = {name: torch.zeros(1).expand(10**6, *value.shape[1:])
                 for name, value in whole["ema"].items() if value.ndim}
        for changes in ({"T": 10**9}, {"T": -1}, {"T": "many"}, {"schedule": "__import__"},
                        {"T": 2.5}, {"predict": "all"}, {"dataset": "/etc"}, {"classes": []},
                        {"net": whole["config"]["net"] | {"size": 4 * 10**8}},
                        {"net": whole["config"]["net"] | {"size": -4}},
                        {"net": whole["config"]["net"] | {"channels": 10**9}},
                        {"net": whole["config"]["net"] | {"width": 10**6}},
                        {"net": whole["config"]["net"] | {"width": -8}},
                        {"net": {"size": 28}}, {"net": {"layers": 3}}, {"net": None}):
            torch.save(whole | {"config": whole["config"] | changes}, "hostile.pt")
            self.refuses("hostile.pt has settings", "sample --ckpt hostile.pt")
        torch.save(whole | {"ema": large}, "hostile.pt")
        self.refuses("hostile.pt has settings", "sample --ckpt hostile.pt")
        for changes in ({"T": 10**9}, {"batch_size": 0}, {"dataset": "../x"}, {"lr": math.nan}):
            torch.save(whole | {"flags": whole["flags"] | changes}, "runs/glyphs/ddpm.pt")
            self.refuses("argument --", "train --resume --dataset glyphs --steps 4")

    def test_a_checkpoint_of_a_later_format_or_with_a_tensor_of_absurd_size_is_refused(self):
        self.train()
        whole = ddpm.load("runs/glyphs/ddpm.pt", ["flags"])
        torch.save(whole | {"format": "ddpm.py 2"}, "later.pt")
        self.refuses("later.pt is not a file of", "sample --ckpt later.pt")
        torch.save(whole | {"ema": {"stem.weight": torch.zeros(1 << 20)}}, "absurd.pt")
        with zipfile.ZipFile("absurd.pt") as old, zipfile.ZipFile("huge.pt", "w") as new:
            for name in old.namelist():              # 2^40 numbers, of which the file has 2^20
                data = old.read(name)
                if name.endswith("data.pkl"):
                    self.assertIn(struct.pack("<I", 1 << 20), data)
                    data = data.replace(b"J" + struct.pack("<I", 1 << 20),
                                        b"\x8a\x06" + (1 << 40).to_bytes(6, "little"))
                new.writestr(name, data)
        self.refuses("of this program", "sample --ckpt huge.pt")

    def test_a_checkpoint_from_a_gpu_opens_without_one(self):
        self.train()
        whole = torch.load("runs/glyphs/ddpm.pt", weights_only=True)
        with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
            torch.save(whole, "gpu.pt")
        with zipfile.ZipFile("gpu.pt") as file:
            self.assertIn(b"cuda:0", file.read("gpu/data.pkl"))
        status, out, err = self.run_main("sample --ckpt gpu.pt --steps 2 --device cpu")
        self.assertEqual(status, 0, err)

    def test_zeros_among_the_flags_survive_a_resume(self):
        self.train("--label-drop", "0", "--grad-clip", "0", "--ema", "0")
        status, out, err = self.run_main("train --resume --out runs/glyphs --steps 3")
        self.assertEqual(status, 0, err)
        flags = ddpm.load("runs/glyphs/ddpm.pt", ["flags"])["flags"]
        self.assertEqual([flags[k] for k in ("label_drop", "grad_clip", "ema")], [0, 0, 0])

    def test_the_python_of_the_readme_runs(self):
        readme = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
        block = readme.split("```python\n")[1].split("```")[0]
        with contextlib.redirect_stdout(io.StringIO()):
            exec(block.replace("assets/mnist.pt", str(ddpm.WEIGHTS)), {})
        with Image.open("fives.png") as picture:
            self.assertEqual((picture.mode, picture.size), ("L", (5 * (4 * 30 + 2), 5 * (2 * 30 + 2))))

    def test_from_python_a_path_may_name_the_data_and_a_mistake_leaves_signals_and_folder_free(self):
        few = dict(dataset="glyphs", width=8, T=6, batch_size=4, steps=1)
        before = signal.getsignal(signal.SIGINT)
        with contextlib.redirect_stdout(None):
            ddpm.train(data=Path("here"), out="named", **few)
            try:
                with mock.patch("ddpm.diffusion_loss", lambda net, *args: net.last.bias.sum() / 0):
                    ddpm.train(out="broken", **few)
            except ddpm.Mistake as error:
                kept = error                         # and with it the frame, as a notebook does
        self.assertEqual(ddpm.load("named/ddpm.pt", ["flags"])["flags"]["data"], "here")
        self.assertIn("the loss is nan", str(kept))
        self.assertEqual(signal.getsignal(signal.SIGINT), before)
        ddpm.lock(Path("broken")).close()

    def test_the_net_that_came_along_draws_where_there_is_no_run(self):
        status, out, err = self.run_main("sample --digit 5 --steps 2")
        self.assertEqual(status, 0, err)
        self.assertIn("mnist.pt (mnist,", out)
        self.assertLess(ddpm.WEIGHTS.stat().st_size, 5e6)

    def test_sample_takes_the_newest_run_and_says_which(self):
        self.train("--out", "runs/old")
        self.train("--out", "runs/new")
        os.utime("runs/old/ddpm.pt", (1, 1))
        self.assertIn("runs/new/ddpm.pt", self.run_main("sample --steps 2")[1])


class Training(Folder):
    def test_the_average_forgets_the_untrained_net_and_then_decays_by_ema(self):
        for ema in (0.5, 0.999):
            net, averaged = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            for layer in (net, averaged):
                nn.init.constant_(layer.weight, 8.0)
            net.weight.data.zero_()
            known = 8.0
            for step in range(50):
                ddpm.update_average(averaged, net, step, ema)
                known *= min(ema, (1 + step) / (10 + step))
                self.assertAlmostEqual(averaged.weight.item(), known, places=5)

    def test_orthogonal_keeps_the_directions_of_a_matrix_and_evens_out_their_strengths(self):
        torch.manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(n, 6))[0] for n in (8, 40))
        for scale in (1e-3, 1e3):
            strengths = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.1, 0.05])
            found = u.T @ ddpm.orthogonal(scale * (u * strengths) @ v.T) @ v
            self.assertTrue(((found.diag() > 0.6) & (found.diag() < 1.3)).all(), found.diag())
            self.assertLess((found - found.diag().diag()).abs().max(), 1e-2)

    def test_muon_moves_a_matrix_by_ten_times_the_rate_in_each_direction(self):
        p, grad = nn.Parameter(torch.zeros(2, 2)), torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        muon = ddpm.Muon([p], {"lr": 0.01})
        for known in (1, 2):                         # the same gradient: the same direction again
            p.grad = grad.clone()
            muon.step()
            self.assertTrue(((p.diag().abs() / 0.1 / known - 1).abs() < 0.45).all(), p)
            self.assertTrue((p.diag().sign() == -grad.diag().sign()).all(), p)

    def test_muons_momentum_is_nesterovs_it_goes_on_for_three_steps_when_the_gradient_turns(self):
        p, down = nn.Parameter(torch.zeros(1, 1)), []
        muon = ddpm.Muon([p], {"lr": 0.01})
        for grad in [1.0] * 10 + [-1.0] * 8:
            before, p.grad = p.item(), torch.full((1, 1), grad)
            muon.step()
            down.append(p.item() < before)
        self.assertEqual(down, [True] * 13 + [False] * 5)        # plain momentum: 4, none: 0

    def test_the_first_steps_are_as_long_as_the_warm_up_says(self):
        torch.manual_seed(0)
        begun, runs = ddpm.UNet(width=8).state_dict()["expand.weight"], []
        for steps in (1, 2):
            self.train("--lr", 0.1, "--out", f"run{steps}", steps=steps)
            runs.append(ddpm.load(f"run{steps}/ddpm.pt", ["net", "ema"]))
        # AdamW's first step is as long as its rate, 0.1/100; the average takes 9 of 10 parts of it
        self.assertAlmostEqual(runs[0]["net"]["last.bias"].abs().item(), 0.001, places=6)
        self.assertAlmostEqual(runs[0]["ema"]["last.bias"].abs().item(), 0.0009, places=6)
        moved = [(run["net"]["expand.weight"] - begun).flatten(1) for run in runs]
        self.assertEqual(moved[0].abs().max(), 0)    # it lies behind a layer that is still zero
        longest = torch.linalg.matrix_norm(moved[1], 2).item()      # Muon: 10 · 0.1·2/100·(1 - 1/2)
        self.assertTrue(0.6 < longest / 0.01 < 1.3, longest)

    def test_no_gradient_is_longer_than_grad_clip_and_0_is_no_limit(self):
        for clip in (0.001, 0):
            lengths = []
            def watch(averaged, net, step, ema):
                squares = [parameter.grad.square().sum() for parameter in net.parameters()]
                lengths.append(sum(squares).sqrt().item())
            with mock.patch("ddpm.update_average", watch):
                self.train("--grad-clip", clip, "--out", f"clip{clip}")
            self.assertEqual(max(lengths) < 0.00101, clip > 0, lengths)

    def test_the_net_sees_its_labels_but_for_the_share_that_is_dropped(self):
        forward = ddpm.UNet.forward
        for flags, share in (("--label-drop 0", 0), ("--label-drop 0.5", 0.5), ("--cond none", 1)):
            asked = []
            def watched(net, x, t, y):
                if torch.is_grad_enabled():          # not the samples of save_run
                    asked.append(y.cpu())
                return forward(net, x, t, y)
            with mock.patch("ddpm.UNet.forward", watched):
                self.train(*flags.split(), "--batch-size", 64, "--out", flags, steps=5)
            y = torch.cat(asked)
            self.assertEqual(len(y), 320)
            self.assertAlmostEqual((y == ddpm.NULL).double().mean().item(), share, delta=0.12)
            self.assertEqual(set(y.tolist()) - {ddpm.NULL}, set(range(10)) if share < 1 else set())

    def test_the_flags_of_the_loss_and_of_the_data_change_what_is_learned(self):
        losses = []
        for i, flag in enumerate(("", "--timesteps uniform", "--loss l1", "--predict x0", "--seed 1",
                                  "--schedule linear")):
            self.train(*flag.split(), "--out", f"run{i}")
            losses.append(ddpm.load(f"run{i}/ddpm.pt", ["log"])["log"][0][2])
        self.assertEqual(len(set(losses)), 6, losses)

    def test_a_run_leaves_its_files_and_says_where(self):
        out = self.train("--out", "my run", steps=20)
        for name in ("ddpm.pt", "log.csv", "loss.png", "samples-000000.png", "samples-000020.png"):
            self.assertTrue(Path("my run", name).exists(), name)
            self.assertIn(name, out)
        self.assertEqual(len(list(Path("my run").glob("samples-*.png"))), 11)
        self.assertEqual(list(Path("my run").glob("*.part")), [])
        with Image.open("my run/samples-000020.png") as sheet:
            self.assertEqual(sheet.size, (604, 304)) # ten digits, five rows, twice as large

    def test_the_log_has_a_row_a_step_and_a_rate_that_warms_up_and_ends_near_zero(self):
        self.train("--lr", 0.01, steps=200)
        with open("runs/glyphs/log.csv") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([int(row["step"]) for row in rows], list(range(1, 201)))
        rates = [float(row["lr"]) for row in rows]
        self.assertAlmostEqual(rates[0], 0.01 / 100)
        self.assertAlmostEqual(rates[-1], 0.01 / 200)
        self.assertTrue(0.004 < max(rates) < 0.01)
        self.assertTrue(all(math.isfinite(float(row["loss"])) for row in rows))

    def test_an_epoch_is_as_many_updates_as_the_data_has_batches_and_leaves_samples(self):
        few = ddpm.glyphs(train=False)
        few.data, few.targets = few.data[:10], few.targets[:10]
        with mock.patch.dict(ddpm.DATASETS, glyphs=lambda *args, **options: few):
            status, out, err = self.run_main(f"{SMALL} --T 6 --epochs 3 --batch-size 4")
        self.assertEqual(status, 0, err)
        self.assertEqual([path.name for path in sorted(Path("runs/glyphs").glob("samples*"))],
                         [f"samples-{step:06}.png" for step in (0, 3, 6, 9)])

    def test_minutes_are_minutes_the_rate_falls_with_them_and_a_resume_gets_no_new_ones(self):
        clock = itertools.count(0.0, 0.01).__next__  # each look at the clock takes 10 ms
        with mock.patch("time.perf_counter", clock):
            self.assertEqual(self.run_main(f"{SMALL} --minutes 0.05 --lr 0.01")[0], 0)
            rows = ddpm.load("runs/glyphs/ddpm.pt", ["log"])["log"]
            self.assertEqual(self.run_main("train --resume --dataset glyphs")[0], 0)
        for step, seconds, _, lr, _ in rows:
            self.assertAlmostEqual(lr, 0.01 * min(1, step / 100) * (1 - seconds / 3), places=5)
        self.assertTrue(2.5 < rows[-1][1] < 3)
        self.assertEqual(ddpm.load("runs/glyphs/ddpm.pt")["step"], len(rows))

    def interrupt_at(self, step, number):
        """Have a signal arrive in the middle of a step."""
        average = ddpm.update_average
        def update_average(averaged, net, at, ema):
            average(averaged, net, at, ema)
            if at == step:
                os.kill(os.getpid(), number)
        return mock.patch("ddpm.update_average", update_average)

    def test_a_run_that_was_interrupted_and_resumed_is_bit_for_bit_the_run_that_was_not(self):
        self.train("--out", "straight", "--label-drop", 0.3, steps=9)
        before = signal.getsignal(signal.SIGINT)
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(code=code), self.interrupt_at(3, number):
                line = f"{SMALL} --batch-size 4 --T 6 --steps 9 --label-drop 0.3 --out r{code}"
                status, out, err = self.run_main(line)
                self.assertEqual(status, code)
                self.assertIn("--resume", out)
            self.assertEqual(torch.load(f"r{code}/ddpm.pt", weights_only=True)["step"], 4)
            status, out, err = self.run_main("train --resume --out", f"r{code}")
            self.assertEqual(status, 0, err)
            a, b = (ddpm.load(f"{run}/ddpm.pt") for run in ("straight", f"r{code}"))
            for part in ("net", "ema"):
                for name in a[part]:
                    self.assertTrue(torch.equal(a[part][name], b[part][name]), name)
            self.assertEqual([(row[0], row[2], row[3]) for row in a["log"]],
                             [(row[0], row[2], row[3]) for row in b["log"]])
        self.assertEqual(signal.getsignal(signal.SIGINT), before)

    def test_a_resumed_run_may_get_a_longer_budget_but_no_other_net(self):
        self.train("--cond", "none")
        for words, flag in (("T is 6", "--T 30"), ("net is", "--width 16"),
                            ("predict is v", "--predict eps"), ("classes is []", "--cond class"),
                            ("schedule is cosine", "--schedule linear"),
                            ("optimizer is muon", "--optimizer adamw")):
            self.refuses(words, f"train --resume --dataset glyphs {flag}")
        status, out, err = self.run_main("train --resume --out runs/glyphs --steps 4 --lr 0.01")
        self.assertEqual(status, 0, err)
        run = torch.load("runs/glyphs/ddpm.pt", weights_only=True)
        self.assertEqual((run["step"], run["flags"]["lr"]), (4, 0.01))

    def test_resume_alone_goes_on_with_the_newest_run(self):
        self.train("--out", "runs/new")
        self.train("--out", "runs/old")
        os.utime("runs/old/ddpm.pt", (1, 1))
        self.assertEqual(self.run_main("train --resume --steps 3")[0], 0)
        self.assertEqual([ddpm.load(f"runs/{run}/ddpm.pt")["step"] for run in ("old", "new")], [2, 3])
        self.refuses("no file runs/glyphs", "train --resume --dataset glyphs")

    def test_a_resumed_run_refuses_pictures_of_another_shape(self):
        self.train()
        large = ddpm.glyphs(train=False)
        large.data = nn.functional.pad(large.data, (2, 2, 2, 2))
        with mock.patch.dict(ddpm.DATASETS, glyphs=lambda *args, **options: large):
            self.refuses("'size': 28", "train --resume --dataset glyphs")

    def test_a_fresh_run_never_overwrites_another(self):
        self.train()
        before = Path("runs/glyphs/ddpm.pt").read_bytes()
        self.refuses("--resume", "train --dataset glyphs")
        self.assertEqual(Path("runs/glyphs/ddpm.pt").read_bytes(), before)

    def test_a_batch_that_has_no_equal_parts_and_a_size_that_does_not_fit_are_refused(self):
        with mock.patch.dict(os.environ, WORLD_SIZE="2"):
            self.refuses("no equal parts", f"{SMALL} --batch-size 9 --out runs/odd")
        self.refuses("--size", f"{SMALL} --size 16 --out runs/small")

    @unittest.skipUnless(os.name == "posix", "no locks here")
    def test_a_folder_takes_one_training_at_a_time(self):
        self.train()
        with ddpm.lock(Path("runs/glyphs")):
            self.refuses("another training", "train --resume --dataset glyphs --steps 4")
        ours, theirs = (Path("runs/glyphs", name) for name in ("ddpm.pt.7.part", "film.mkv.part"))
        for path in (ours, theirs):
            path.touch()
        self.assertEqual(self.run_main("train --resume --dataset glyphs --steps 4")[0], 0)
        self.assertEqual((ours.exists(), theirs.exists()), (False, True))

    @unittest.skipUnless(os.name == "posix", "no locks here")
    def test_a_file_system_without_locks_is_no_obstacle(self):
        with mock.patch("fcntl.flock", mock.Mock(side_effect=OSError(38, "not implemented"))):
            self.train()

    def test_the_samples_of_a_run_are_guided_but_where_no_label_was_dropped(self):
        for share, guidance in ((0.1, {None}), (0, {1.0})):
            with mock.patch("ddpm.draw", mock.Mock(side_effect=ddpm.draw)) as draw:
                self.train("--label-drop", share, "--out", f"run{share}")
            self.assertEqual({call.kwargs.get("guidance") for call in draw.mock_calls}, guidance)

    def test_a_device_without_memory_is_told_which_flag_to_lower(self):
        full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried to ..."))
        with mock.patch("ddpm.diffusion_loss", full):
            status, out, err = self.run_main(f"{SMALL} --steps 3")
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn("lower --batch-size", err)

    def test_a_loss_or_gradient_that_is_no_number_stops_the_run_and_the_last_checkpoint_stays(self):
        def loss(net, *args):
            return net.last.bias.sum() * math.nan
        def gradient(net, *args):
            return torch.sqrt(net.last.bias.sum() * 0)           # finite, its gradient is not
        for words, bad in (("the loss is nan", loss), ("its gradient", gradient)):
            with mock.patch("ddpm.diffusion_loss", bad):
                status, out, err = self.run_main(f"{SMALL} --steps 3 --out {bad.__name__}")
            self.assertEqual(status, 2)
            self.assertIn(words, err)
            self.assertIn("at step 1", err)
            self.assertEqual(ddpm.load(f"{bad.__name__}/ddpm.pt")["step"], 0)

    def test_without_labels_the_net_has_one_row_for_all(self):
        self.train("--cond", "none")
        saved = torch.load("runs/glyphs/ddpm.pt", weights_only=True)
        self.assertEqual((len(saved["net"]["label.weight"]), saved["config"]["classes"]), (1, []))
        status, out, err = self.run_main("sample --n 2 --steps 2 --raw raw.pt")
        self.assertEqual(status, 0, err)
        self.assertEqual(torch.load("raw.pt", weights_only=True)["labels"].tolist(), [-1] * 20)
        self.refuses("knows no labels", "sample --digit 3")

    def test_two_processes_learn_what_one_learns(self):
        line = f"{SMALL} --device cpu --batch-size 8 --T 6 --steps 8 --out"
        status, out, err = self.run_main(line, "one")
        self.assertEqual(status, 0, err)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        def process(rank):                           # as torchrun does it
            variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen([sys.executable, PROGRAM, *line.split(), "two"], text=True,
                                    env=os.environ | variables, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE)
        both = [process(0), process(1)]
        for one in both:
            self.addCleanup(one.kill)                # if the other has failed
        said = [one.communicate(timeout=120) for one in both]
        self.assertEqual([one.returncode for one in both], [0, 0], said)
        self.assertEqual(said[1][0], "")             # the first one speaks for both
        one, two = (ddpm.load(f"{run}/ddpm.pt") for run in ("one", "two"))
        for name in one["net"]:
            torch.testing.assert_close(two["net"][name], one["net"][name], atol=1e-4, rtol=0)
        for a, b in zip(one["log"], two["log"]):
            self.assertAlmostEqual(a[2], b[2], places=5)
        status, out, err = self.run_main("train --resume --out two --steps 9")
        self.assertEqual((status, ddpm.load("two/ddpm.pt")["step"]), (0, 9), err)

    def test_bfloat16_changes_the_loss_by_little_and_the_weights_stay_float32(self):
        self.train("--out", "plain", steps=5)
        self.train("--out", "amp", "--amp", steps=5)
        plain, amp = (ddpm.load(f"{run}/ddpm.pt") for run in ("plain", "amp"))
        losses = [(a[2], b[2]) for a, b in zip(plain["log"], amp["log"])]
        self.assertNotEqual(losses[-1][0], losses[-1][1])
        for a, b in losses:
            self.assertAlmostEqual(a, b, delta=0.02 * a)
        self.assertEqual({value.dtype for value in amp["net"].values()}, {torch.float32})


class Evaluation(Folder):
    def setUp(self):
        super().setUp()
        few = glyphs(train=True)
        few = types.SimpleNamespace(data=few.data[:2000], targets=few.targets[:2000],
                                    classes=few.classes)
        patch = mock.patch.dict(ddpm.DATASETS, glyphs=lambda root, train=True, **options:
                                few if train else glyphs(train=False))
        patch.start()
        self.addCleanup(patch.stop)

    def test_the_distance_of_two_gaussians_is_the_closed_form(self):
        def cloud(n, mean, root, seed):
            """n points whose mean and covariance are exactly mean and root·rootᵀ."""
            x = torch.randn(n, 3, generator=ddpm.stream(seed, 0), dtype=torch.float64)
            x = x - x.mean(0)
            x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
            return x @ root.T + mean
        def root_of(matrix):
            values, vectors = torch.linalg.eigh(matrix)
            return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
        mean = torch.tensor([1.0, 0, 2]).double()
        eye = torch.eye(3).double()
        a, b = cloud(50, 0 * mean, 2 * eye, 1), cloud(70, mean, 0.5 * eye, 2)
        self.assertAlmostEqual(ddpm.frechet(a, b), 5 + 3 * (2 - 0.5) ** 2, places=6)
        self.assertAlmostEqual(ddpm.frechet(a, a), 0, places=5)
        skew = torch.tensor([[1.0, 0, 0], [0.7, 0.5, 0], [-0.3, 0.2, 2]]).double()
        turn = torch.tensor([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1.5]]).double()
        A, B = skew @ skew.T, turn @ torch.diag(torch.tensor([3.0, 0.1, 1])).double() @ turn.T
        half = root_of(A)
        known = A.trace() + B.trace() - 2 * root_of(half @ B @ half).trace()
        got = ddpm.frechet(cloud(60, mean, skew, 3), cloud(80, mean, torch.linalg.cholesky(B), 4))
        self.assertAlmostEqual(got, known.item(), places=6)

    def test_the_score_is_the_number_of_classes_read_if_the_reader_is_sure(self):
        # surely four, one, two classes; or each with p = 3/4, 1/12, 1/12, 1/12: exp(ln(3)/2)
        for sharp, classes, score in ((50, [0, 1, 2, 3], 4), (50, [2, 2, 2], 1),
                                      (50, [2, 2, 3, 3], 2), (math.log(3), [0, 1, 2, 3], 3 ** 0.5)):
            reader = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
            reader[1].weight.data = sharp * torch.eye(4)
            images = (255 * torch.eye(4)[classes]).byte().view(-1, 1, 1, 4)
            got = ddpm.rate(reader, images, torch.full((len(classes),), classes[0]), images)
            self.assertAlmostEqual(got["score"], score, places=5)
            self.assertEqual(got["right"], classes.count(classes[0]) / len(classes))

    def test_real_pictures_are_near_and_right_and_noise_is_neither(self):
        images, labels, _ = ddpm.load_data("glyphs", train=False)
        saved = {"images": images[:200], "labels": labels[:200]}     # as other tools would write it
        torch.save(saved, "real.pt")
        noise = torch.randint(256, (200, 1, 28, 28), generator=ddpm.stream(1, 1)).byte()
        torch.save(saved | {"images": noise}, "noise.pt")
        figures = {}
        for name in ("real", "noise"):
            status, out, err = self.run_main(f"evaluate --dataset glyphs --data . --raw {name}.pt "
                                             f"--json {name}.json")
            self.assertEqual(status, 0, err)
            figures[name] = json.loads(Path(f"{name}.json").read_text())
            self.assertEqual(figures[name]["n"], 200)
        self.assertGreater(figures["real"]["samples"]["right"], 0.7)
        self.assertGreater(figures["real"]["floor"]["right"], 0.7)
        self.assertLess(figures["noise"]["samples"]["right"], 0.3)
        self.assertGreater(figures["real"]["samples"]["score"], 3)
        self.assertGreater(figures["noise"]["samples"]["distance"],
                           20 * figures["real"]["samples"]["distance"])
        torch.save(saved | {"images": noise[:, :, :16, :16]}, "small.pt")
        self.refuses("another size", "evaluate --dataset glyphs --data . --raw small.pt")
        for odd in ({"images": "no"}, {"images": noise / 255}, {"labels": labels[:7]},
                    {"dataset": "x"}, {"dataset": ["x"]}):
            torch.save(saved | odd, "odd.pt")
            self.refuses("no pictures with labels", "evaluate --raw odd.pt")
        torch.save({"images": noise}, "other.pt")
        self.refuses("not a file of", "evaluate --raw other.pt")
        torch.save(saved | {"images": images[:1], "labels": labels[:1]}, "one.pt")
        self.refuses("two or more", "evaluate --dataset glyphs --data . --raw one.pt")
        self.refuses("--raw", "evaluate --dataset glyphs")
        self.refuses("nothing is drawn", "evaluate --raw real.pt --guidance 3")
        self.refuses("--strength", "evaluate --strength 0.5")

    def test_evaluate_writes_its_flags_and_figures_and_keeps_the_reader(self):
        self.train()
        status, out, err = self.run_main("evaluate --n 30 --sampler ddim --steps 3 --guidance 2 "
                                         "--json a.json")
        self.assertEqual(status, 0, err)
        figures = json.loads(Path("a.json").read_text())
        self.assertEqual((figures["n"], figures["sampler"], figures["steps"]), (30, "ddim", 3))
        self.assertIn("data/glyphs-classifier.pt", out)
        with mock.patch("ddpm.rate", wraps=ddpm.rate) as rated:
            again = self.run_main("evaluate --n 30 --sampler ddim --steps 3 --guidance 2")[1]
        for (_, images, labels, real), _ in rated.call_args_list:        # against the test set
            self.assertTrue(torch.equal(real.cpu(), glyphs(train=False).data[:, None]))
        self.assertNotIn("classifier.pt", again)
        self.assertEqual(again.split("n = ")[1], out.split("n = ")[1].split("a.json")[0])
        other = self.run_main("evaluate --n 30 --sampler ddpm --steps 3 --guidance 2")[1]
        self.assertNotEqual(*(text.split("samples")[1].split("floor")[0] for text in (again, other)))
        self.train("--cond", "none", "--out", "runs/none")
        status, out, err = self.run_main("evaluate --n 20 --steps 2 --ckpt runs/none/ddpm.pt")
        self.assertEqual(out.split("samples")[1].split()[0], "-")
        self.assertIn("%", out.split("floor")[1])
        more = types.SimpleNamespace(**vars(glyphs(train=False)) | {"classes": list("0123456789A")})
        with mock.patch.dict(ddpm.DATASETS, glyphs=lambda *args, **options: more):
            self.refuses("other classes", "evaluate --ckpt runs/glyphs/ddpm.pt")

    def test_colour_goes_all_the_way(self):
        random = ddpm.stream(0, 5)
        few = types.SimpleNamespace(
            data=torch.randint(256, (300, 32, 32, 3), generator=random).byte().numpy(),
            targets=[i % 10 for i in range(300)], classes=datasets.FashionMNIST.classes)
        with mock.patch.dict(ddpm.DATASETS, cifar10=lambda *args, **options: few):
            for line in ("train --dataset cifar10 --width 8 --steps 1 --T 6",
                         "sample --digit Coat --gif", "evaluate --n 20 --data ."):
                status, out, err = self.run_main(line)
                self.assertEqual(status, 0, err)
        with Image.open("samples.png") as sheet:
            self.assertEqual(sheet.mode, "RGB")

    def test_the_reader_learns_anew_for_other_pictures_or_classes(self):
        images, labels = torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 2
        def learned(images, classes):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                ddpm.classifier("folder", images, labels, classes, ".")
            return "classifier.pt" in out.getvalue()
        self.assertEqual([learned(images, "ab"), learned(images, "ab"), learned(images, "ba"),
                          learned(images + 1, "ba"), learned(images + 1, "bac")],
                         [True, False, True, True, True])


class TheCommandLine(Folder):
    def test_without_a_standard_error_it_draws_all_the_same(self):
        self.train()
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            self.assertIsNone(ddpm.main("sample --steps 2".split()))
        self.assertTrue(Path("samples.png").exists())

    def command(self, line):
        return subprocess.run([sys.executable, PROGRAM, *line.split()], capture_output=True,
                              text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def test_train_then_sample_as_a_user_would(self):
        done = self.command(f"{SMALL} --T 30 --steps 3")
        self.assertEqual(done.returncode, 0, done.stderr)
        done = self.command("sample --digit 5 --gif --device cpu")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.split()[-2:], ["samples.png", "samples.gif"])
        with Image.open("samples.gif") as gif:
            self.assertEqual(gif.n_frames, 21)       # noise, and what 20 steps make of it
            self.assertEqual(gif.info["loop"], 0)

    def test_forward_shows_each_digit_on_its_way_to_noise(self):
        status, out, err = self.run_main("forward --dataset glyphs --schedule linear --T 300 --gif")
        self.assertEqual((status, out.split()), (0, ["noise.png", "noise.gif"]), err)
        with Image.open("noise.png") as sheet:
            self.assertEqual(sheet.size, ((11 * 30 + 2) * 2, (10 * 30 + 2) * 2))
            small = sheet.resize((332, 302), Image.NEAREST)
            for k in range(10):
                clean, noisy = (small.crop((x, 2 + 30 * k, x + 28, 30 + 30 * k)) for x in (2, 302))
                self.assertEqual(clean.tobytes(), bytes(glyphs().data[k].flatten().tolist()))
                self.assertGreater(len(set(noisy.tobytes())), 100)
        with Image.open("noise.gif") as gif:
            self.assertEqual(gif.n_frames, 41)

    def test_help_of_every_command_tells_each_flag(self):
        self.assertEqual(self.run_main("--help")[0], 0)
        for command in (ddpm.train, ddpm.sample, ddpm.evaluate, ddpm.forward):
            status, out, err = self.run_main(command.__name__, "--help")
            self.assertEqual(status, 0)
            names = set(inspect.signature(command).parameters)
            if "drawing" in names:
                names |= {"sampler", "steps", "eta", "guidance", "threshold", "seed"}
            for name in names - {"drawing"}:
                self.assertIn("--" + name.replace("_", "-"), out)
            self.assertLess(out.count("\n"), 60)
            self.assertNotIn("None", out)
            self.assertIn("python ddpm.py " + command.__name__, out.splitlines()[-1])
            for options in out.split("\n  --")[1:]:
                self.assertGreater(len(options.split()), 3, "a flag without a word of help")
        self.assertNotIn("(1.0)", self.run_main("sample --help")[1].split("--strength")[-1][:80])

    def test_digits_come_in_the_order_asked_for(self):
        self.train()
        self.run_main("sample --digit 3 1 4 --n 2 --steps 2 --raw raw.pt --out", "a b/ü.png")
        raw = torch.load("raw.pt", weights_only=True)
        self.assertEqual(raw["labels"].tolist(), [3, 1, 4, 3, 1, 4])
        self.assertEqual((raw["images"].shape, raw["images"].dtype), ((6, 1, 28, 28), torch.uint8))
        with Image.open("a b/ü.png") as sheet:
            self.assertGreater(sheet.width, sheet.height)
        self.run_main("sample --steps 2 --n 1 --raw raw.pt")
        raw = torch.load("raw.pt", weights_only=True)
        self.assertEqual(raw["labels"].tolist(), list(range(10)))

    def test_the_settings_of_other_programs_are_flags(self):
        systems = ("--schedule linear --loss l1 --predict eps --T 1000",
                   "--schedule cosine --loss l1 --predict eps --optimizer adamw --lr 1e-4",
                   "--cond none --T 300 --schedule linear --loss l2 --predict eps",
                   "--schedule linear --loss l2 --predict eps --batch-size 48")
        for i, flags in enumerate(systems):
            status, out, err = self.run_main(f"{SMALL} --steps 1 --out runs/{i} {flags}")
            self.assertEqual(status, 0, err)
            for sampler in ddpm.SAMPLERS:
                status, out, err = self.run_main(
                    f"sample --ckpt runs/{i}/ddpm.pt --sampler {sampler} --steps 3")
                self.assertEqual(status, 0, err)

    def test_an_older_python_or_torch_is_told_what_is_needed(self):
        with mock.patch.object(sys, "version_info", (3, 9)):
            self.refuses("Python 3.10 and torch 2.6 are needed", "sample")
        with mock.patch.object(torch, "accelerator"):
            del torch.accelerator
            self.refuses("Python 3.10 and torch 2.6 are needed", "sample")

    def test_flags_out_of_range_are_told_their_range(self):
        for flag in ("--T 1", "--T x", "--steps 0", "--lr -1", "--lr nan", "--lr 0",
                     "--batch-size 0", "--width 0", "--epochs 0", "--minutes inf", "--ema 1",
                     "--label-drop 1.1", "--grad-clip -1", "--seed -1", "--loss l3",
                     "--dataset imagenet", "--nothing 1"):
            self.refuses(flag.split()[0], f"train {flag}")
        for flag in ("--guidance -1", "--guidance nan", "--eta 2", "--n 0", "--steps -3",
                     "--sampler euler"):
            self.refuses(flag.split()[0], f"sample {flag}")
        self.refuses("--schedule", "train --schedule", "")
        self.refuses("in 2..100000", "train --T 1")
        self.refuses("divisible by 8", "train --dataset glyphs --width 12")
        self.refuses("one of", "train --steps 3 --epochs 2")

    def test_what_the_net_cannot_draw_is_refused(self):
        self.refuses("no file runs/x/ddpm.pt", "sample --ckpt runs/x/ddpm.pt")
        self.train()
        self.refuses("knows 0, 1, 2", "sample --digit 11")
        self.refuses("T = 6", "sample --steps 7")
        self.refuses("--eta", "sample --eta 0.5 --sampler dpm")
        self.refuses("no device", "sample --device abacus")
        self.refuses("no device cuda", "train --dataset glyphs --device cuda")
        Image.new("L", (40, 40), 255).save("white.png")
        for words, line in (("two classes", "--morph 3"), ("no --digit", "--morph 3 8 --n 2"),
                            ("knows 0, 1, 2", "--morph 3 x"),
                            ("in 0.0..1.0", "--init white.png --strength 1.1"),
                            ("--init", "--strength 0.5"), ("no picture", "--init missing.jpg"),
                            ("no digit", "--init white.png"), ("--threshold", "--threshold 0.1"),
                            ("--style", "--style mine")):
            self.refuses(words, f"sample {line}")
        self.train("--cond", "none", "--out", "runs/none")
        for line in ("--style same", "--morph 1 2"):
            self.refuses("labels", f"sample --ckpt runs/none/ddpm.pt {line}")

    def test_one_hand_a_morph_and_a_redrawing_are_a_command_each(self):
        self.train()
        Data.photo(self, "20").save("photo.jpg")
        for line in ("--digit 2 0 2 6 --style same --n 3", "--morph 3 8", "--morph 3 8 1 --seed 4",
                     "--init photo.jpg --digit 5 --gif", "--init photo.jpg", "--guidance 0",
                     "--init photo.jpg --strength 0 --digit 1 2", "--threshold 0.995"):
            raw = "" if "--morph" in line else "--raw raw.pt"
            status, out, err = self.run_main(f"sample --steps 2 {line} {raw}")
            self.assertEqual(status, 0, err)
        with Image.open("samples.gif") as gif:
            self.assertEqual(gif.info["loop"], 0)
        self.run_main("sample --steps 2 --style same --digit 4 4 4 --n 2 --raw raw.pt")
        images = torch.load("raw.pt", weights_only=True)["images"]
        self.assertTrue(torch.equal(images[0], images[2]))
        self.assertFalse(torch.equal(images[0], images[3]))
        self.run_main("sample --init photo.jpg --strength 0 --digit 1 2 --raw raw.pt")
        x0 = ddpm.read_pictures("photo.jpg", 1, 28)
        images = torch.load("raw.pt", weights_only=True)["images"]
        self.assertTrue(torch.equal(images, ddpm.to_uint8(x0)))

    def test_a_place_that_cannot_be_written_is_told_in_one_line(self):
        self.train()
        Path("file").write_text("kept")
        self.refuses("file", f"{SMALL} --out file/run")
        self.refuses("file", "sample --steps 2 --out file/a.png")
        self.refuses(".png", "sample --steps 2 --out a.jpg")
        self.assertEqual(Path("file").read_text(), "kept")

    def test_a_closed_pipe_or_a_folder_in_the_way_ends_in_an_error_and_leaves_no_part(self):
        self.train()
        class Full(io.StringIO):
            def flush(self):
                raise BrokenPipeError(32, "Broken pipe")
        for line in ("sample --steps 2", f"{SMALL} --out x"):
            with contextlib.redirect_stderr(io.StringIO()) as err, mock.patch("sys.stdout", Full()):
                self.assertEqual(ddpm.main(line.split()), 1)
                self.assertIsNone(sys.stdout)        # Python would flush it again
            self.assertEqual(err.getvalue().count("error"), 1, err.getvalue())
        folder = Path("folder.png")
        folder.mkdir()
        for line in ("sample --steps 2 --out folder.png", "sample --steps 2 --raw folder.png"):
            self.assertEqual(self.run_main(line)[0], 2)
        self.assertEqual([path for path in Path().rglob("*.part")], [])


HOSTILE = ["", "0", "-1", "nan", "inf", "1e30", "word", "no/where", "ü"]

@unittest.skipUnless(os.environ.get("SLOW"), "takes minutes: make test-slow")
class Slow(Folder):
    """Many tries, and faults that need a process of their own."""

    def fork(self, line):
        """Run a command line in a process of its own, without a wait for the imports: its pid."""
        pid = os.fork()
        if pid == 0:
            with open("said", "w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            status = 99
            try:
                status = ddpm.main(line.split()) or 0
            finally:
                os._exit(status)
        return pid

    def few(self):
        few = ddpm.glyphs(train=False)
        few.data, few.targets = few.data[:12], few.targets[:12]
        patch = mock.patch.dict(ddpm.DATASETS, glyphs=lambda *args, **options: few)
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_training_that_is_killed_thirty_times_always_leaves_a_whole_checkpoint(self):
        self.few()
        pid, moments = self.fork(f"{SMALL} --T 6 --batch-size 4 --epochs 100000"), []
        random = torch.rand(30, generator=ddpm.stream(0, 0)).tolist()
        for moment in random:
            while not Path("runs/glyphs/ddpm.pt").exists():
                time.sleep(0.01)
            time.sleep(1 + moment)                   # it saves every three steps, all the time
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            moments.append(ddpm.load("runs/glyphs/ddpm.pt", ["flags", "net", "adamw", "muon"])["step"])
            self.assertLess(len(list(Path().rglob("*.part"))), 2)
            pid = self.fork("train --resume --dataset glyphs")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.assertEqual(moments, sorted(moments))
        self.assertGreater(len(set(moments)), 25, Path("said").read_text())

    def test_a_signal_at_any_moment_of_any_command_leaves_no_traceback(self):
        self.train("--out", "net")
        whole = f"{SMALL} --T 6 --batch-size 4 --epochs 100000 --out run"
        for i, moment in enumerate(torch.rand(24, generator=ddpm.stream(0, 1)).tolist()):
            number = (signal.SIGINT, signal.SIGTERM)[i % 2]
            line = (whole + str(i), "sample --ckpt net/ddpm.pt --n 900")[i // 2 % 2]
            command = [sys.executable, PROGRAM, *line.split()]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            time.sleep(0.3 + 8 * moment)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            self.assertNotIn("Traceback", err)
            self.assertIn(process.returncode, (0, -number, 128 + number), err)

    def test_a_second_signal_ends_at_once(self):
        command = [sys.executable, PROGRAM, *f"{SMALL} --batch-size 2000 --steps 9".split()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not list(Path("runs/glyphs").glob("samples-*.png")):       # the last file of a saving
            time.sleep(0.1)
        began = time.monotonic()
        while process.poll() is None:                # those that come during one call of torch are
            process.send_signal(signal.SIGINT)       # one to Python
            time.sleep(0.2)
        self.assertLess(time.monotonic() - began, 10)
        self.assertEqual(process.returncode, -signal.SIGINT)
        self.assertNotIn(b"Traceback", process.communicate()[1])
        self.assertFalse(Path("runs/glyphs/samples-000001.png").exists())    # it did not go on
        self.assertIn(ddpm.load("runs/glyphs/ddpm.pt")["step"], (0, 1))

    def test_a_full_disk_leaves_the_older_files_as_they_were(self):
        import resource
        self.train("--out", "run")
        self.run_main("sample --steps 2 --gif --n 3 --raw raw.pt")
        before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
        def limit(size):
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        for size, line in ((2000, "sample --steps 2 --n 3"), (9000, "sample --steps 2 --n 3 --gif"),
                           (40_000, "sample --steps 2 --n 90 --raw raw.pt"),
                           (100_000, "train --resume --out run --steps 9"),
                           (100, "evaluate --n 9 --steps 2 --data . --json f.json")):
            done = subprocess.run([sys.executable, PROGRAM, *line.split()], capture_output=True,
                                  preexec_fn=limit(size), text=True, timeout=120)
            self.assertEqual(done.returncode, 1, line + done.stderr)
            self.assertEqual(done.stderr.count("ddpm.py: error"), 1, done.stderr)
            self.assertNotIn("Traceback", done.stderr)
            for path, data in before.items():
                if path.suffix in (".pt", ".gif"):
                    self.assertEqual(path.read_bytes(), data, (line, path))
            self.assertEqual(list(Path().rglob("*.part")), [])

    def test_a_closed_or_full_output_leaves_no_traceback(self):
        self.train()
        environment = os.environ | {"TERM": "dumb", "COLUMNS": "40", "OMP_NUM_THREADS": "1"}
        for tail in ("| head -1", "| true", "> /dev/full", ">&-", "2>&- | cat"):
            for line in ("--help", "sample --steps 2", "evaluate --n 20 --steps 2 --data .",
                         f"{SMALL} --T 6 --steps 30 --out 'o{tail[-1]}'"):
                done = subprocess.run(f"{sys.executable} {PROGRAM} {line} {tail}", shell=True,
                                      capture_output=True, text=True, env=environment, timeout=120)
                self.assertNotIn("Traceback", done.stderr, line + tail)
                self.assertNotIn("Exception ignored", done.stderr, line + tail)
                self.assertNotIn("\r", done.stderr)

    def ends_well(self, line):
        """Assert that a command line, given as words, ends without a traceback: its status."""
        status, out, err = 99, "", ""
        try:
            status, out, err = self.run_main("", *line)
        except Exception as error:
            self.fail(f"{line}: {error!r}")
        self.assertIn(status, (0, 1, 2), line)
        told = [one for one in err.splitlines() if "error" in one]
        self.assertEqual(len(told), status > 0, (line, err))
        return status

    def prepare(self):
        """A net to draw with, and the least of everything: few pictures, no network."""
        self.few()
        self.train("--out", "net")
        Data.own_pictures(self)
        for patch in (mock.patch("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"]),
                      mock.patch("ddpm.compile", None, create=True)):
            patch.start()
            self.addCleanup(patch.stop)
        return {"train": ["train", "--dataset", "glyphs", "--width", "8", "--T", "6"],
                "sample": ["sample", "--ckpt", "net/ddpm.pt", "--n", "1"],
                "evaluate": ["evaluate", "--ckpt", "net/ddpm.pt", "--n", "4"],
                "forward": ["forward", "--dataset", "glyphs"]}

    def flags(self):
        return {flag: options for group in ddpm.FLAGS.values()
                for flag, (_, options) in group.items()}

    def test_every_flag_of_every_command_bears_nine_hostile_values(self):
        tries = 0
        for command, words in self.prepare().items():
            for flag, options in self.flags().items():
                for value in HOSTILE if options.get("action") is None else [None]:
                    more = [flag] if value is None else [f"{flag}={value}"]
                    if flag != "--compile":
                        budget = ["--steps", "1"] if command == "train" and flag not in (
                            "--steps", "--epochs", "--minutes") else []
                        out = ["--out", f"runs/{tries}"] if command == "train" else []
                        self.ends_well(words + out + budget + more)
                        tries += 1
        print(f"{tries} command lines, ", end="", file=sys.stderr)

    def test_two_thousand_random_command_lines_end_well(self):
        commands, ended = self.prepare(), [0, 0, 0]
        sane = {"--T": "7 9", "--steps": "1 2 5", "--n": "1 3", "--digit": "3 zebra", "--size": "8 16",
                "--morph": "1 2", "--seed": "1 4294967295", "--width": "8 16", "--minutes": "0.01",
                "--init": "mine/dark/0.tiff mine/dark/broken.png", "--strength": "0 0.4 1",
                "--eta": "0 0.5", "--guidance": "0 1 8", "--threshold": "0.5 0.995 1",
                "--batch-size": "1 4", "--out": "a.png b c/d.png", "--raw": "raw.pt mine",
                "--epochs": "1", "--lr": "1e-9 0.01 10", "--dataset": "folder mnist glyphs",
                "--data": "mine .", "--ckpt": "net/ddpm.pt raw.pt mine", "--json": "f.json mine",
                "--device": "cpu", "--ema": "0 0.5", "--grad-clip": "0 3", "--label-drop": "0 1"}
        random = ddpm.stream(0, 2)
        def pick(choices):
            return list(choices)[torch.randint(len(choices), (), generator=random)]
        began = time.monotonic()
        for i in range(2000):
            command = pick(commands)
            words = list(commands[command])
            if command == "train":
                words += ["--out", f"runs/{i}"] + ["--steps", "1"] * pick([0, 1, 1, 1])
                words += [] if "--steps" in words else ["--minutes", "0.01"]
            for _ in range(pick([0, 1, 2, 3, 4])):
                flag = pick(sorted(set(self.flags()) - {"--compile"}))
                options = self.flags()[flag]
                words.append(flag)
                if "action" not in options:
                    known = list(options.get("choices", [])) or sane[flag].split()
                    known = [name for name in known if name not in ("fashion", "kmnist", "cifar10")]
                    words.append(pick(HOSTILE) if pick(range(5)) == 0 else pick(known))
                    words += [pick(known)] * pick([0, 1, 2]) if "nargs" in options else []
            ended[self.ends_well(words)] += 1
        print(f"{ended} in {time.monotonic() - began:.0f} s, ", end="", file=sys.stderr)
        self.assertGreater(ended[0], 100)
        self.assertGreater(ended[2], 500)

    def test_twenty_thousand_pictures_take_little_memory(self):
        import resource
        self.train()
        program = (f"import resource, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import ddpm\n"
                   "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                   "ddpm.main('sample --digit 5 --steps 1 --n 9'.split()); before = peak()\n"
                   "ddpm.main('sample --digit 5 --steps 1 --n 20000 --raw raw.pt'.split())\n"
                   "print('kB', peak() - before)")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        self.assertLess(int(done.stdout.split("kB")[1]), 300_000, done.stderr)


@unittest.skipUnless(os.environ.get("BENCH"), "no test, but figures: make bench")
class Bench(Folder):
    def run_python(self, *words):
        """Run Python on these words, as a user does: seconds."""
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return time.perf_counter() - began

    def product(self, dtype):
        """GFLOP/s of a product of two matrices of 2048 x 2048, by as many threads as training has."""
        a, seconds = torch.randn(2048, 2048, dtype=dtype), []
        for _ in range(9):
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
        return 2 * 2048**3 / statistics.median(seconds) / 1e9

    def test_rate_memory_and_start_beside_the_machines_own(self):
        import resource
        torch.set_num_threads(THREADS)
        self.addCleanup(torch.set_num_threads, 1)
        print()
        for width, more in itertools.product((32, 48, 64), ("", " --amp")):
            net, alpha_bar = ddpm.UNet(width=width), ddpm.noise_schedule("cosine", 1000)
            images, labels = torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 10
            batch = ddpm.training_batch(images, labels, 0, batch_size=64, T=1000, label_drop=0.1,
                                        seed=0)
            with FlopCounterMode(display=False) as counter:
                ddpm.diffusion_loss(net, *batch, alpha_bar).backward()
            own = [self.product(dtype) for dtype in (torch.float32, torch.bfloat16)]
            line = f"train --dataset glyphs --width {width} --steps 120{more}"
            self.run_python(PROGRAM, *line.split(), "--out", f"runs/{width}{more.strip()}")
            with open(f"runs/{width}{more.strip()}/log.csv") as file:
                speed = statistics.median(float(row["images/s"])
                                          for row in list(csv.DictReader(file))[60:])
            gflops = speed * counter.get_total_flops() / 64e9
            print(f"{line:56} {speed:6,.0f} images/s, {gflops:4.0f} GFLOP/s: " + ", ".join(
                f"{gflops / rate:.2f} of a {name} product ({rate:.0f})"
                for rate, name in zip(own, ("float32", "bfloat16"))), flush=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(f"peak memory of these trainings: {peak / 2**20:.2f} GB")
        start = [(self.run_python("-c", "import torch, torchvision"),
                  self.run_python(PROGRAM, *"sample --digit 5 --gif --ckpt".split(), ddpm.WEIGHTS))
                 for _ in range(5)]
        imports, five = map(statistics.median, zip(*start))
        print(f"sample --digit 5 --gif: {five:.1f} s, {five / imports:.2f} of the imports'")


@unittest.skipUnless(os.environ.get("FIGURES"), "no test, but figures: make figures")
class Figures(unittest.TestCase):
    """Measure what assets/figures.json lacks, a command line each, and draw assets/quality.png."""

    FILE = ddpm.WEIGHTS.with_name("figures.json")
    OTHERS = ("TeaPearce/Conditional_Diffusion_MNIST", "yuanchenyang/smalldiffusion")
    STEPS = {"dpm": (2, 3, 5, 10, 20, 50), "ddim": (5, 10, 20, 50), "ddpm": (20, 100)}
    GUIDANCE = {"": (1, 1.2, 1.3, 1.5, 2, 3, 5, 8), " --threshold 0.995": (1, 1.5, 3, 8)}

    def rated(self, line, ckpt=ddpm.WEIGHTS):
        """What `evaluate` says of a net, measured once: the share read right, times the floor."""
        figures = json.loads(self.FILE.read_text()) if self.FILE.exists() else {}
        if line not in figures:
            flags = "evaluate" + line.rpartition("evaluate")[2]
            with tempfile.TemporaryDirectory() as folder:
                report = Path(folder, "figures.json")
                more = ["--ckpt", str(ckpt), "--json", str(report), *self.data]
                self.assertEqual(ddpm.main(flags.split() + more) or 0, 0)
                figures[line] = json.loads(report.read_text())
            self.FILE.write_text(json.dumps(figures, indent=1) + "\n")
        found = figures[line]
        return found["samples"]["right"], found["samples"]["distance"] / found["floor"]["distance"]

    def trained(self, line):
        """What `evaluate` says of the net that a command line trains, if it has not yet been."""
        out = Path("runs", line.replace(" --", "-").replace(" ", "-"))
        figures = self.FILE.read_text() if self.FILE.exists() else ""
        if f"{line}, evaluate" not in figures and not (out / "ddpm.pt").exists():
            self.assertEqual(ddpm.main([*line.split(), "--out", str(out), *self.data]), 0)
        return self.rated(f"{line}, evaluate", out / "ddpm.pt")

    def test_quality_over_minutes_steps_and_guidance(self):
        torch.set_num_threads(THREADS)
        self.addCleanup(torch.set_num_threads, 1)
        self.data = ["--data", os.environ.get("DATA", "data")]
        seeds = [[(m, *self.trained(f"train --minutes {m} --amp --seed {seed}"))
                  for m in (1, 3, 10)] for seed in range(3)]
        minutes = {"width 32": [[statistics.mean(each) for each in zip(*runs)]
                                for runs in zip(*seeds)],
                   "width 64": [(69, *self.rated("evaluate"))]}
        self.rated("evaluate --n 10000")
        known = json.loads(self.FILE.read_text())
        for name in self.OTHERS:                     # measured once, with one core each
            minutes[name.split("/")[0]] = [(m, *self.rated(f"{name}, {m} minutes"))
                                           for m in (20, 40, 60) if f"{name}, {m} minutes" in known]
        columns = {
            "minutes of training": minutes,
            "steps of the sampler": {
                name: [(k, *self.rated(f"evaluate --sampler {name} --steps {k}")) for k in steps]
                for name, steps in self.STEPS.items()},
            "guidance": {
                more.strip(" -") or "static clipping": [
                    (w, *self.rated(f"evaluate --guidance {w}{more}")) for w in guidance]
                for more, guidance in self.GUIDANCE.items()}}
        charts(columns).save(self.FILE.with_name("quality.png"), optimize=True)


def charts(columns):
    """Draw {title: {name: [(x, right, times)]}}: a column each, on log scales; a PIL image."""
    inks = ["#0a5fb4", "#d9660a", "#23883a", "#a02c8c", "#7a6a00"]
    rows = [("read right", 1, (0, 0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 1),
             lambda y: -math.log(1.003 - y)),
            ("distance, times the floor", 2, (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200), math.log)]
    sheet = Image.new("RGB", (20 + 480 * len(columns), 820), "white")
    canvas, small, large = ImageDraw.Draw(sheet), *map(ImageFont.load_default, (17, 20))
    for left, (title, curves) in zip(itertools.count(90, 480), columns.items()):
        canvas.text((left + 185, 770), title, "black", font=large, anchor="mb")
        points = [point for curve in curves.values() for point in curve]
        xs = sorted({x for x, *_ in points})

        def across(x):
            return left + 370 * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        for top, (meaning, place, levels, scale) in zip((50, 420), rows):
            lowest = max(y for y in levels if y <= min(point[place] for point in points))
            levels = [y for y in levels if y >= lowest]
            highest = min(y for y in levels if y >= max(point[place] for point in points))
            levels = [y for y in levels if y <= highest]

            def up(y):
                return top + 280 * (scale(highest) - scale(y)) / (scale(highest) - scale(lowest))
            canvas.text((left, top - 30), meaning, "black", font=large)
            for y in levels:
                canvas.line([(left, up(y)), (left + 370, up(y))], fill="#d8d8d8", width=1)
                text = f"{100 * y:g}%" if place == 1 else f"{y:g}"
                canvas.text((left - 12, up(y)), text, "#555", font=small, anchor="rm")
            past = -99
            for x in xs:
                canvas.line([(across(x), top + 280), (across(x), top + 286)], "#888")
                if across(x) > past + 26:
                    past, at = across(x), (across(x), top + 290)
                    canvas.text(at, f"{x:g}", "#555", font=small, anchor="mt")
            for ink, curve in zip(inks, curves.values()):
                dots = [(across(point[0]), up(point[place])) for point in curve]
                canvas.line(dots, fill=ink, width=3, joint="curve")
                for x, y in dots:
                    canvas.ellipse([x - 5, y - 5, x + 5, y + 5], fill=ink)
        at = left
        for ink, name in zip(inks, curves):
            canvas.text((at, 790), name, ink, font=small, anchor="lm")
            at += canvas.textlength(name, small) + 16
    return sheet.quantize(32)


if __name__ == "__main__":
    unittest.main()
