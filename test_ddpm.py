"""Tests of ddpm.py, in the order of the file: `make test`, or `python -m unittest`; offline, CPU.

Mathematics is held against an oracle that does not share its code: numbers computed by hand, ten
naive lines, or data whose best denoiser is known in closed form."""
import contextlib, functools, io, itertools, math, os, pickle, re, signal, socket, statistics
import struct, subprocess, sys, tempfile, time, unittest
from pathlib import Path
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import pil_to_tensor

import ddpm

THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # nets this small gain nothing by more
torch.accelerator.is_available = lambda: False  # on every machine the CPU is tested
os.environ.update(COLUMNS="100", NO_COLOR="1")  # for argparse
PROGRAM = Path(__file__).with_name("ddpm.py")
README = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
GREY = {"classes": list("0123456789"), "T": 20, "schedule": "cosine", "shape": [1, 28, 28]}
MOMENT = "train --width 8 --batch-size 4 --T 6 --device cpu"

@functools.cache
def digits(n, seed=0):
    """Printed digits of many sizes and places: uint8 (n,1,28,28), the i-th is i % 10."""
    random, images = torch.rand(n, 3, generator=ddpm.rng(seed)).tolist(), []
    for i, (size, right, down) in enumerate(random):
        image = Image.new("L", (28, 28))
        font = ImageFont.load_default(20 + round(8 * size))
        ImageDraw.Draw(image).text((12 + 4 * right, 12 + 4 * down), str(i % 10), 255, font, "mm")
        images.append(pil_to_tensor(image))
    return torch.stack(images)

def write_mnist(name="MNIST", n=120):
    """Write printed digits as MNIST's four files, for torchvision to read, into the folder data."""
    raw = Path("data", name, "raw")
    raw.mkdir(parents=True)
    for part, images in (("train", digits(n)), ("t10k", digits(n // 2, seed=1))):
        n, labels = len(images), bytes(i % 10 for i in range(len(images)))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels)

def net_of(std=0.2, seed=0, **options):
    """A small U-Net, by default with random weights everywhere."""
    torch.manual_seed(seed)
    net = ddpm.UNet(**{"width": 8, **options})
    for parameter in net.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return net

class Folder(unittest.TestCase):
    """A test in a temporary folder of its own, with printed digits as its MNIST."""
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        write_mnist()

    def run_main(self, line, *more):
        """Run a command line here: (exit status, standard output, standard error)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = ddpm.main(line.split() + [str(word) for word in more]) or 0
            except SystemExit as end:
                status = end.code or 0
        return status, out.getvalue(), err.getvalue()

    def does(self, line, *more):
        """Run a command line that has to succeed: standard output."""
        status, out, err = self.run_main(line, *more)
        self.assertEqual(status, 0, err)
        return out

    def train(self, *more, steps=2, out="runs/mnist"):
        """Train for some steps: the checkpoint."""
        self.does(MOMENT, "--epochs", (steps - 0.5) * 4 / 120, "--out", out, *more)
        return torch.load(Path(out, "ddpm.pt"), weights_only=True)

    def raw(self, line, *more):
        self.does("sample --steps 2 --raw raw.pt", *line.split(), *more)
        return torch.load("raw.pt", weights_only=True)

    def refuses(self, words, line, *more):
        """Assert that a command line ends with exit status 2 and one line that has the words."""
        def files():
            return {path: path.read_bytes() for path in Path().rglob("*")
                    if path.is_file() and path.suffix != ".part"}
        before, (status, out, err) = files(), self.run_main(line, *more)
        self.assertEqual(status, 2, f"{line} {more}: {err}")
        self.assertIn(words, err.splitlines()[-1])
        self.assertEqual(before, files())

class TheForwardProcess(unittest.TestCase):
    def test_every_schedule_falls_from_one_towards_zero_for_any_T(self):
        for name in ddpm.SCHEDULES:
            for T in (2, 3, 10, 300, 1000, 4000):
                alpha_bar = ddpm.noise_schedule(name, T)
                self.assertEqual((alpha_bar.shape, alpha_bar.dtype), ((T + 1,), torch.float64))
                self.assertEqual(alpha_bar[0], 1)
                self.assertTrue((alpha_bar.diff() < 0).all(), (name, T))
                self.assertTrue(0 < alpha_bar[-1] < 1e-3, (name, T))

    def test_linear_betas_are_those_of_the_paper_at_T_1000(self):
        product, alpha_bar = 1.0, ddpm.noise_schedule("linear", 1000).tolist()
        for t in range(1, 1001):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
            self.assertAlmostEqual(alpha_bar[t], product, places=12)
        self.assertAlmostEqual(alpha_bar[1000], 4.0358e-5, places=8)

    def test_the_cosine_schedule_is_nichol_and_dhariwals_its_last_beta_clipped_at_0_999(self):
        T, alpha_bar = 1000, ddpm.noise_schedule("cosine", 1000)
        for t in (1, 10, 500, 900, 998):
            f = [math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0)]
            self.assertAlmostEqual(alpha_bar[t].item(), f[0] / f[1], places=9)
        self.assertAlmostEqual((1 - alpha_bar[-1] / alpha_bar[-2]).item(), 0.999, places=9)

    def test_q_sample_is_equation_4_each_image_at_its_own_t_and_t_0_is_the_image(self):
        alpha_bar, (x0, eps) = ddpm.noise_schedule("cosine", 9), torch.randn(2, 10, 1, 2, 2)
        x = ddpm.q_sample(x0, torch.arange(10), eps, alpha_bar)
        self.assertTrue(torch.equal(x[0], x0[0]))
        mean, variance = 1.0, 0.0  # what a chain of single steps makes of them
        for t, keep in enumerate((alpha_bar[1:] / alpha_bar[:-1]).tolist(), start=1):
            mean, variance = mean * keep ** 0.5, variance * keep + 1 - keep
            assert_close(x[t], mean * x0[t] + variance ** 0.5 * eps[t])

def exact_net(star, alpha_bar):
    """The best net for a data set of one image: it knows eps = (x_t - √ᾱ·star)/√(1-ᾱ), so v too."""
    def net(x, t, y):
        signal_rate = alpha_bar[t].sqrt().float().view(-1, 1, 1, 1)
        noise_rate = (1 - alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)
        eps = (x - signal_rate * star) / noise_rate
        return signal_rate * eps - noise_rate * star
    return net

class TheLoss(unittest.TestCase):
    def test_the_loss_compares_eps_v_or_x0_that_follow_from_the_nets_v(self):
        x0, eps, v_hat = torch.randn(3, 2, 1, 4, 4, generator=ddpm.rng(0))
        alpha_bar, t = ddpm.noise_schedule("linear", 10), torch.tensor([3, 9])
        a, s = (ab.sqrt().float().view(2, 1, 1, 1) for ab in (alpha_bar[t], 1 - alpha_bar[t]))
        x, net = a * x0 + s * eps, lambda *inputs: v_hat
        errors = {"eps": s * x + a * v_hat - eps, "v": v_hat - (a * eps - s * x0),
                  "x0": a * x - s * v_hat - x0}
        for predict, error in errors.items():
            size = error.abs()
            huber = torch.where(size < 1, size ** 2 / 2, size - 0.5)
            for loss, known in (("l1", size), ("l2", size ** 2), ("huber", huber)):
                found = ddpm.diffusion_loss(net, x0, t, t, eps, alpha_bar, predict, loss)
                assert_close(found, known.mean(), atol=1e-5, rtol=1e-4)

    def batches(self, n=400, **options):
        images = (torch.arange(256)[:, None] + torch.arange(16)).byte().view(-1, 1, 4, 4)
        parts = [ddpm.training_batch(images, torch.arange(256) % 10, step, batch_size=50, T=50,
                                     seed=3, **options) for step in range(n)]
        return [torch.cat(part) for part in zip(*parts)]

    def test_uniform_timesteps_are_stratified_each_of_T_images_has_its_own_t(self):
        self.assertEqual(self.batches(n=20)[2].tolist(), 20 * list(range(1, 51)))

    def test_logit_normal_timesteps_have_a_normal_logit_but_for_one_in_twenty(self):
        t, normal = self.batches(timesteps="logit-normal")[2], statistics.NormalDist(0.5, 1)
        self.assertTrue(1 <= t.min() and t.max() <= 50)
        for k in range(1, 50):
            expected = 0.05 * k / 50 + 0.95 * normal.cdf(math.log(k / (50 - k)))
            self.assertAlmostEqual((t <= k).double().mean().item(), expected, delta=0.01)

    def test_labels_are_dropped_image_by_image(self):
        dropped = (self.batches(label_drop=0.25)[1].view(-1, 50) == ddpm.NULL).float().mean(1)
        self.assertAlmostEqual(dropped.mean().item(), 0.25, delta=0.02)
        self.assertGreater(((dropped > 0) & (dropped < 1)).float().mean().item(), 0.98)

    def test_images_and_labels_stay_together_unflipped_in_minus_1_to_1(self):
        x0, y, _, eps = self.batches()
        value = ((x0[:, 0] + 1) * 127.5).round().long()
        self.assertTrue(torch.equal(value[:, 0, 0] % 10, y))
        self.assertTrue(torch.equal(value, (value[:, :1, :1] + torch.arange(16).view(4, 4)) % 256))
        self.assertEqual((x0.min().item(), x0.max().item()), (-1, 1))
        self.assertAlmostEqual(eps.std().item(), 1, delta=0.01)

class TheNet(unittest.TestCase):
    def test_the_output_has_the_shape_of_the_input(self):
        for size, channels, classes in ((28, 1, 10), (32, 3, 10), (16, 1, 0), (64, 3, 2)):
            x, y = torch.randn(2, channels, size, size), torch.tensor([ddpm.NULL, classes - 1])
            net = ddpm.UNet(channels, size, classes, width=8)
            self.assertEqual(net(x, torch.tensor([1, 1000]), y).shape, x.shape)

    def test_the_label_and_t_matter_NULL_is_the_last_row_and_a_mix_is_a_label_too(self):
        net, x, t, rows = net_of(), torch.randn(1, 1, 28, 28), torch.tensor([5]), torch.eye(11)
        null, ten, three = (net(x, t, torch.tensor([y])) for y in (ddpm.NULL, 10, 3))
        self.assertTrue(torch.equal(null, ten))
        self.assertFalse(torch.allclose(null, three))
        self.assertFalse(torch.allclose(null, net(x, t + 1, torch.tensor([ddpm.NULL]))))
        assert_close(net(x, t, rows[[3]]), three)
        with torch.no_grad():
            mixed = net(x, t, (rows[[3]] + rows[[7]]) / 2)
            net.label.weight[0] = (net.label.weight[3] + net.label.weight[7]) / 2
        assert_close(mixed, net(x, t, torch.tensor([0])))

    def test_attention_is_a_softmax_over_all_positions_of_the_same_image(self):
        net, seen = net_of(size=12), {}
        net.norm2.register_forward_hook(lambda module, inputs, out: seen.update(h=out))
        net.middle.register_forward_hook(lambda module, inputs, out: seen.update(out=inputs[0]))
        net.down2.register_forward_hook(lambda module, inputs, out: seen.update(skip=out))
        net(torch.randn(2, 1, 12, 12), torch.tensor([1, 2]), torch.tensor([0, 1]))
        last, h = net.attention.out_proj, seen["h"].flatten(2)  # (2, 16, 9): 4 heads of 4
        weight, bias = net.attention.in_proj_weight, net.attention.in_proj_bias
        q, k, v = (weight @ h + bias[:, None]).view(2, 3, 4, 4, 9).unbind(1)
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) / 4 ** 0.5
        known = torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), v).reshape(2, 16, 9)
        known = last.weight @ known + last.bias[:, None]
        assert_close((seen["out"] - seen["skip"]).flatten(2), known, atol=1e-4, rtol=1e-3)

    def test_it_learns_a_single_image_and_every_weight_has_a_gradient_by_the_third_step(self):
        net, alpha_bar, losses = net_of(0), ddpm.noise_schedule("cosine", 100), []
        optimizer, still = torch.optim.AdamW(net.parameters(), 5e-3), dict(net.named_parameters())
        for step in range(100):
            batch = ddpm.training_batch(digits(1), torch.tensor([0]), step, batch_size=16, T=100,
                                        label_drop=0.1)
            loss = ddpm.diffusion_loss(net, *batch, alpha_bar, "v", "l2")
            optimizer.zero_grad()
            loss.backward()
            if step < 3:  # layers that are zero open one after the other
                still = {name: p for name, p in still.items() if not p.grad.abs().sum() > 0}
            optimizer.step()
            losses.append(loss.item())
        self.assertEqual(still, {})
        self.assertLess(sum(losses[-5:]), 0.3 * sum(losses[:5]))

def gaussian_x0_at(mean, std, alpha_bar):
    """The best x0_hat if the data are N(mean, std²), pixel by pixel: E[x0 | x_t]."""
    def x0_at(x, t):
        a, s2 = alpha_bar[t].item() ** 0.5, 1 - alpha_bar[t].item()
        return mean + a * std ** 2 / (a * a * std ** 2 + s2) * (x - a * mean)
    return x0_at

class Sampling(unittest.TestCase):
    def test_a_data_set_of_one_image_comes_back_from_every_sampler_at_any_number_of_steps(self):
        star, y = torch.rand(1, 1, 4, 4) * 2 - 1, torch.zeros(2).long()
        for schedule, sampler in itertools.product(ddpm.SCHEDULES, ddpm.SAMPLERS):
            alpha_bar = ddpm.noise_schedule(schedule, 40)
            net = exact_net(star, alpha_bar)
            x0_at = functools.partial(ddpm.predict_x0, net, y=y, alpha_bar=alpha_bar)
            for steps in (1, 2, 7, 40):
                ts = [40 * i // steps for i in range(steps, -1, -1)]
                *way, x = ddpm.denoise(x0_at, torch.randn(2, 1, 4, 4), ts, alpha_bar, sampler)
                assert_close(x, star.expand_as(x), atol=1e-5, rtol=0)
                eps = [(x - a ** 0.5 * star) / (1 - a) ** 0.5
                       for x, a in zip(way, alpha_bar[ts].tolist())]
                for one in eps if sampler != "ddpm" else ():  # no new noise: eps stays
                    assert_close(one, eps[0], atol=1e-2, rtol=0)

    def test_a_step_of_ddpm_is_the_posterior_of_equation_7_on_skipped_steps_too(self):
        alpha_bar, (x0_hat, x) = ddpm.noise_schedule("linear", 17), torch.randn(2, 1, 1, 3, 3)
        for t, s in [(t, t - 1) for t in range(17, 0, -1)] + [(17, 1), (12, 3), (9, 0)]:
            a, b = alpha_bar[t], alpha_bar[s]
            beta = 1 - a / b  # of the steps from s to t together
            mean = b.sqrt() * beta / (1 - a) * x0_hat + (1 - beta).sqrt() * (1 - b) / (1 - a) * x
            sigma = ((1 - b) / (1 - a) * beta).sqrt()
            z = torch.randn(1, 1, 3, 3, generator=ddpm.rng(7))
            *_, got = ddpm.denoise(lambda x, t: x0_hat, x, [t, s], alpha_bar, "ddpm", ddpm.rng(7))
            assert_close(got, (mean + sigma * z).float(), atol=1e-5, rtol=1e-5)

    def test_dpm_is_the_multistep_solver_of_its_paper(self):
        alpha_bar = ddpm.noise_schedule("cosine", 100)
        x0_at, ts = gaussian_x0_at(0.2, 0.4, alpha_bar), [100, 80, 55, 30, 12, 0]
        x = start = torch.randn(1, 1, 4, 4, generator=ddpm.rng(2))
        a, s, past = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), None
        for t, t_next in zip(ts[:-1], ts[1:-1]):  # Lu et al. 2022, alg. 2, in their variables
            d = x0_hat = x0_at(x, t)
            h = math.log(a[t_next] / s[t_next]) - math.log(a[t] / s[t])
            if past is not None:
                r = past[1] / h
                d = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * past[0]
            x = s[t_next] / s[t] * x - a[t_next] * (math.exp(-h) - 1) * d
            past = (x0_hat, h)
        *_, got = ddpm.denoise(x0_at, start, ts, alpha_bar, "dpm")
        assert_close(got, x0_at(x, 12), atol=1e-5, rtol=1e-5)

    def error_of(self, sampler, steps, T=4096, end=512):
        """How far a sampler is from the exact flow of Gaussian data, from T down to t = end."""
        alpha_bar = ddpm.noise_schedule("linear", T)
        x = torch.randn(1, 1, 8, 8, generator=ddpm.rng(3), dtype=torch.float64)
        ts = [T - (T - end) * i // steps for i in range(steps + 1)]
        *_, got = ddpm.denoise(gaussian_x0_at(0.3, 0.5, alpha_bar), x, ts, alpha_bar, sampler)
        spread, mean = (alpha_bar * 0.25 + 1 - alpha_bar).sqrt(), alpha_bar.sqrt() * 0.3
        exact = mean[end] + (x - mean[T]) * spread[end] / spread[T]
        return (got - exact).abs().mean().item()

    def test_ddim_is_of_first_order_and_dpm_of_second(self):
        for sampler, order in (("ddim", 1), ("dpm", 2)):
            errors = [self.error_of(sampler, steps) for steps in (32, 64, 128)]
            for coarse, fine in zip(errors, errors[1:]):
                self.assertAlmostEqual(math.log2(coarse / fine), order, delta=0.35, msg=sampler)

    def test_every_sampler_ends_in_the_distribution_of_the_data(self):
        alpha_bar = ddpm.noise_schedule("cosine", 200)
        for sampler in ddpm.SAMPLERS:
            z, x0_at = torch.randn(4, 1, 64, 64), gaussian_x0_at(0.3, 0.5, alpha_bar)
            *_, x = ddpm.denoise(x0_at, z, range(200, -1, -1), alpha_bar, sampler)
            self.assertAlmostEqual(x.mean().item(), 0.3, delta=0.03, msg=sampler)
            self.assertAlmostEqual(x.std().item(), 0.5, delta=0.03, msg=sampler)

    def test_guidance_goes_on_from_no_label_through_the_label_amid_the_noise(self):
        alpha_bar, x = torch.tensor([1, 0.71, 0.69, 0.021, 0.019]), torch.zeros(2, 1, 2, 2)
        def v_of(x, t, y):
            return torch.where(y == ddpm.NULL, -0.1, -0.2).view(2, 1, 1, 1) + x
        known = {0: 0.1, 0.5: 0.15, 1: 0.2, 1.5: 0.25, 3: 0.4}  # -v of each guidance
        for t, guidance in itertools.product(range(1, 5), known):
            guided, net = t in (2, 3) and guidance not in (0, 1), mock.Mock(side_effect=v_of)
            x0_hat = ddpm.predict_x0(net, x, t, torch.tensor([3, 7]), alpha_bar, guidance)
            minus_v = known[guidance if guided or guidance == 0 else 1]
            assert_close(x0_hat, torch.full_like(x, minus_v * (1 - alpha_bar[t].item()) ** 0.5))
            self.assertEqual(net.call_count, 1 + guided)  # a second time only where it counts

    def test_dynamic_thresholding_scales_by_a_quantile_where_it_is_above_1(self):
        wanted = torch.tensor([[-4.0, 0.0, 1.0, 2.0], [0.3, -0.2, 0.1, 0.0]]).view(2, 1, 2, 2)
        alpha_bar, x = ddpm.noise_schedule("linear", 10), torch.zeros(2, 1, 2, 2)
        v = -wanted / (1 - alpha_bar[5]).sqrt().float()
        # |x0_hat| of the first is 0, 1, 2, 4: its 0.75 quantile lies a quarter on from 2 to 4
        for threshold, known in ((0.75, [-1, 0, 0.4, 0.8]), (None, [-1.0, 0, 1, 1])):
            found = ddpm.predict_x0(lambda x, t, y: v, x, 5, None, alpha_bar, threshold=threshold)
            assert_close(found[0].flatten(), torch.tensor(known))
            assert_close(found[1], wanted[1])

    def asked(self, **options):
        with mock.patch("ddpm.predict_x0", lambda net, x, t, **more: found.append((x, t)) or x):
            found = []
            self.generate(**options)
        return found

    def noise(self, n):
        return torch.randn(n, 1, 28, 28, generator=ddpm.rng(0))

    def generate(self, n=3, **options):
        return ddpm.generate(net_of(), GREY, torch.arange(n) % 10, **options)

    def test_the_steps_start_at_T_and_fall_for_every_number_of_steps(self):
        for steps in range(1, 21):
            ts = [t for x, t in self.asked(steps=steps)] + [0]
            self.assertEqual((len(ts), ts[0]), (steps + 1, 20))
            self.assertEqual(ts, sorted(set(ts), reverse=True))

    def test_an_image_depends_on_its_seed_and_place_and_the_steps_noise_is_not_the_starts(self):
        few, many, other = self.generate(3), self.generate(260), self.generate(3, seed=1)
        self.assertLess((few[-1].int() - many[-1, :3].int()).abs().float().mean(), 0.1)
        self.assertGreater((few[-1].int() - other[-1].int()).abs().float().mean(), 5)
        with mock.patch("ddpm.denoise", mock.Mock(return_value=21 * [torch.zeros(1)])) as denoise:
            self.generate(3)
        _, x, *_, generator = denoise.call_args.args
        z = torch.randn(x.shape, generator=generator)
        self.assertLess(torch.stack([x.flatten(), z.flatten()]).corrcoef()[0, 1].abs(), 0.1)

    def test_no_float64_reaches_the_device_for_some_have_none(self):
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(watch, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for part in out if isinstance(out, (list, tuple)) else [out]:
                    if isinstance(part, torch.Tensor) and part.device.type == "meta":
                        self.assertNotEqual(part.dtype, torch.float64, function)
                        seen.append(function)
                return out
        images, labels = torch.zeros(9, 1, 8, 8).byte().to("meta"), torch.zeros(9).long().to("meta")
        seen, alpha_bar, net = [], ddpm.noise_schedule("cosine", 9), ddpm.UNet(1, 8).to("meta")
        with Watch(), mock.patch("torch.Tensor.cpu", lambda x: torch.rand(x.shape, dtype=x.dtype)):
            x0, y, t, eps = ddpm.training_batch(images, labels, 0, batch_size=2, T=9)
            ddpm.diffusion_loss(net, x0, y, t, eps, alpha_bar).backward()
            x0_at = functools.partial(ddpm.predict_x0, net, y=y, alpha_bar=alpha_bar, guidance=2.0,
                                      threshold=0.9)
            for sampler in ddpm.SAMPLERS:
                *_, x = ddpm.denoise(x0_at, eps, [9, 5, 0], alpha_bar, sampler, ddpm.rng(0))
            ddpm.to_uint8(x)
        self.assertIn(torch.ops.aten.convolution_backward.default, seen)  # meta: shapes only

    def test_a_start_from_an_image_keeps_it_at_strength_0_and_forgets_it_at_1(self):
        x0 = torch.randint(256, (3, 1, 28, 28), generator=ddpm.rng(5)) / 127.5 - 1
        for sampler in ddpm.SAMPLERS:
            kept = self.generate(x0=x0, start=0.0, sampler=sampler)[-1]
            self.assertTrue(torch.equal(kept, ddpm.to_uint8(x0)))
            gone, free = self.generate(x0=x0, sampler=sampler), self.generate(sampler=sampler)
            self.assertLess((gone.int() - free.int()).abs().float().mean(), 2)  # ᾱ_T = 6e-6
        xs, ts = zip(*self.asked(x0=x0, start=0.6, steps=4))
        self.assertEqual(ts, (12, 9, 6, 3))  # T = 20
        a = ddpm.noise_schedule("cosine", 20)[12].item()
        assert_close(xs[0], a ** 0.5 * x0 + (1 - a) ** 0.5 * self.noise(3))

    def test_the_frames_begin_with_noise_and_end_with_the_sample(self):
        frames = self.generate(2, all_frames=True)
        self.assertEqual((frames.shape, frames.dtype), ((21, 2, 1, 28, 28), torch.uint8))
        self.assertTrue(torch.equal(frames[0], ddpm.to_uint8(self.noise(2))))
        self.assertTrue(torch.equal(frames[-1:], self.generate(2)))

class Images(Folder):
    def test_a_grid_keeps_order_levels_and_channels(self):
        levels = torch.arange(256, dtype=torch.uint8)
        self.assertTrue(torch.equal(ddpm.to_uint8(levels / 127.5 - 1), levels))
        sheet = ddpm.grid((levels[:6] * 40).view(6, 1, 1, 1).expand(6, 1, 28, 28), 3)
        k = sheet.width // 92  # 3 images of 28 and 4 gaps of 2
        self.assertEqual((sheet.mode, sheet.size), ("L", (92 * k, 62 * k)))
        centres = [(16 * k + 30 * k * (i % 3), 16 * k + 30 * k * (i // 3)) for i in range(6)]
        self.assertEqual([*map(sheet.getpixel, centres)], [0, 40, 80, 120, 160, 200])
        colour = torch.tensor([9, 99, 199]).byte().view(1, 3, 1, 1).expand(1, 3, 28, 28)
        self.assertEqual(ddpm.grid(colour, 1).getpixel((99, 99)), (9, 99, 199))

    def test_a_gif_has_exact_levels_a_held_end_loops_and_equal_frames_lose_no_time(self):
        frames = torch.stack([(7 * max(i, 2) + torch.arange(256)) % 256 for i in range(9)]).byte()
        with contextlib.redirect_stdout(None):
            ddpm.save_gif("a.gif", frames.view(9, 1, 1, 16, 16), 1)
        with Image.open("a.gif") as gif:
            self.assertEqual((gif.n_frames, gif.info["loop"]), (7, 0))  # the first three are one
            for i in range(7):
                gif.seek(i)
                sheet = ddpm.grid(frames[i + 2].view(1, 1, 16, 16), 1)
                self.assertEqual(gif.convert("L").tobytes(), sheet.tobytes())
                self.assertEqual(gif.info["duration"], {0: 240, 6: 2000}.get(i, 80))

    def test_a_file_is_written_whole_or_not_at_all(self):
        def fail(file):
            file.write(b"half")
            raise OSError("No space left on device")
        with contextlib.redirect_stdout(None):
            ddpm.write("deep/er/file", lambda file: file.write(b"whole"))
            with self.assertRaises(OSError):
                ddpm.write("deep/er/file", fail)
        self.assertEqual(Path("deep/er/file").read_bytes(), b"whole")

class Data(Folder):
    def test_mnist_is_read_from_torchvisions_files_without_a_download_at_any_size(self):
        images, labels, classes = ddpm.load_data("mnist")
        self.assertTrue(torch.equal(images, digits(120)))
        self.assertEqual((labels.tolist(), classes), (12 * [*range(10)], [*"0123456789"]))
        self.assertEqual(ddpm.load_data("mnist", size=32, train=False)[0].shape, (60, 1, 32, 32))

    def test_fashion_and_kmnist_are_entries_too_and_classes_have_names(self):
        for dataset, name in (("kmnist", "KMNIST"), ("fashion", "FashionMNIST")):
            write_mnist(name)
            self.train("--dataset", dataset, out=f"runs/{dataset}")
        self.assertEqual(self.raw("--digit Sneaker bag")["labels"].tolist(), [7, 8])
        self.refuses("'trouser', 'pullover'", "sample --digit glove")

    def test_cifar_is_colour_in_the_order_of_channel_row_column(self):
        batches, pixels = Path("data/cifar-10-batches-py"), [i % 251 for i in range(3072)]
        batches.mkdir(parents=True)  # its files are red, then green, then blue
        rows = {"data": torch.tensor([pixels] * 4).byte().numpy(), "labels": [0, 1, 2, 3]}
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            (batches / name).write_bytes(pickle.dumps(rows))
        (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        with mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True):
            images, labels, classes = ddpm.load_data("cifar10")
        self.assertEqual((images.shape, labels[3]), ((20, 3, 32, 32), 3))
        self.assertEqual(images[0].flatten().tolist(), pixels)

    def test_a_folder_of_own_images_trains_draws_and_is_rated(self):
        for part, name, mode in (("train", "dark", "L"), ("train", "Light", "RGB"),
                                 ("test", "dark", "P"), ("test", "Light", "RGBA")):
            Path("mine", part, name).mkdir(parents=True)
            for i in range(12):
                color = (9 * i, 0, 0) if name == "dark" else (255, 255, 20 * i)
                image = Image.new("RGB", (20 + 9 * i, 40), color).convert(mode)
                image.save(f"mine/{part}/{name}/{i}.png")
        images, labels, classes = ddpm.load_data("folder", "mine", size=16)
        self.assertEqual((images.shape, classes), ((24, 3, 16, 16), ["Light", "dark"]))
        self.assertLess(images[labels == 1].max(), 100)
        self.assertGreater(labels.diff().abs().sum(), 2)  # they are shuffled
        self.does(MOMENT, *"--dataset folder --data mine --size 16 --epochs 1".split())
        self.does("sample --digit Light DARK --steps 2")
        self.assertIn("real images", self.does("evaluate --n 4 --steps 2"))
        for path in Path("mine").rglob("*.png"):
            Image.open(path).convert("L").save(path)
        self.assertEqual(ddpm.load_data("folder", "mine", 16)[0].shape[1], 1)  # grey, if all are
        Path("mine/train/dark/0.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
        self.refuses("dark/0.png", "train --dataset folder --data mine --size 16 --out x")

    def test_a_photo_of_ink_on_paper_becomes_white_on_black_upright_as_large_as_mnists(self):
        two, exif = ddpm.to_pil_image(digits(3)[2]), Image.Exif()
        exif[0x0112] = 6  # a phone held upright
        paper = torch.linspace(150, 250, 400).repeat(300, 1)  # in uneven light
        paper[20:160, 200:340] *= 1 - pil_to_tensor(two.resize((140, 140)))[0] / 400
        ddpm.to_pil_image(paper.byte()).rotate(90, expand=True).save("photo.jpg", exif=exif)
        known = ImageOps.expand(ImageOps.pad(two.crop(two.getbbox()), (20, 20)), 4)
        pair = torch.cat([ddpm.read_image("photo.jpg", 1, 28), pil_to_tensor(known)[None] / 255])
        self.assertGreater(pair.flatten(1).corrcoef()[0, 1], 0.9)
        os.renames("photo.jpg", "own/train/two/photo.jpg")  # upright here too
        ink = ddpm.load_data("folder", "own")[0][0, 0] < 100  # above, on the right
        self.assertEqual((ink.nonzero().float().mean(0) > 16).tolist(), [False, True])

class Training(Folder):
    def test_the_average_forgets_the_untrained_net_soon(self):
        begun = net_of(0).state_dict()
        one = self.train("--lr", 0.1, steps=1)
        two = self.train("--lr", 0.1, "--resume", steps=2)
        for name, value in begun.items():
            known = value + 9 / 10 * (one["net"][name] - value)
            assert_close(one["ema"][name], known)
            assert_close(two["ema"][name], known + 9 / 11 * (two["net"][name] - known))
        moved = (one["net"]["last.weight"] - begun["last.weight"]).abs().max()
        self.assertAlmostEqual(moved.item(), 0.1 / 100, places=5)  # AdamW, in its warm-up

    def test_the_net_sees_its_labels_but_for_a_tenth_or_none_without_cond(self):
        for cond, share in (("class", 0.1), ("none", 1)):
            with mock.patch("ddpm.diffusion_loss", wraps=ddpm.diffusion_loss) as asked:
                self.does(f"{MOMENT} --batch-size 400 --epochs 10 --out {cond} --cond", cond)
            y = torch.cat([call.args[2] for call in asked.call_args_list])
            self.assertAlmostEqual((y == ddpm.NULL).double().mean().item(), share, delta=0.04)
            self.assertEqual(set(y.tolist()) - {ddpm.NULL}, set(range(10)) if share < 1 else set())

    def test_a_run_leaves_its_files_after_each_epoch_and_says_where(self):
        out = self.does(MOMENT, "--epochs", 3, "--out", "my run")
        names = [f"samples-{step:06}.png" for step in (30, 60, 90)]
        self.assertEqual(sorted(os.listdir("my run")), ["ddpm.pt", *names])
        for text in ("120 images of mnist on cpu, 90 steps", *(f"my run/{name}" for name in names)):
            self.assertIn(text, out)

    def test_a_run_that_was_interrupted_and_resumed_is_bit_for_bit_the_run_that_was_not(self):
        straight, before = self.train(steps=9, out="straight"), signal.getsignal(signal.SIGINT)
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            loss, steps, out = ddpm.diffusion_loss, iter(range(9)), f"begun{code}"
            def interrupted(*inputs):
                if next(steps) == 3:
                    signal.raise_signal(number)  # a second one would end it at once
                    self.assertEqual(signal.getsignal(number), signal.SIG_DFL)
                return loss(*inputs)
            with mock.patch("ddpm.diffusion_loss", interrupted):
                status, said, err = self.run_main(MOMENT, "--epochs", 8.5 / 30, "--out", out)
            self.assertEqual((status, ddpm.load(f"{out}/ddpm.pt")["step"]), (code, 4), err)
            self.assertIn(f"--resume --out {out}", said)
            os.rename(out, f"moved{code}")
            self.does("train --resume --out", f"moved{code}")
            resumed = ddpm.load(f"moved{code}/ddpm.pt")
            for part in ("net", "ema"):
                for name in straight[part]:
                    self.assertTrue(torch.equal(straight[part][name], resumed[part][name]), name)
            self.assertEqual(signal.getsignal(signal.SIGINT), before)

    def test_a_resumed_run_takes_flags_and_a_new_budget_of_either_kind_but_no_other_net(self):
        self.train("--cond", "none")
        run = self.train("--resume", "--lr", 0.01, steps=4)
        self.assertEqual((run["step"], run["lr"], run["cond"]), (4, 0.01, "none"))
        self.does("train --resume --minutes 0.02")
        self.assertGreater(ddpm.load("runs/mnist/ddpm.pt")["seconds"], 1.19)
        self.refuses("size mismatch", "train --resume --minutes 1 --width 16")
        self.refuses("runs/fashion", "train --resume --dataset fashion")
        self.refuses("--resume", MOMENT)  # a fresh run never overwrites another

    def test_a_loss_that_is_no_number_stops_the_run_and_what_was_saved_stays(self):
        self.train(steps=30)
        with mock.patch("ddpm.diffusion_loss", lambda net, *batch: net.last.bias.sum() * math.nan):
            self.refuses("the loss is nan at step 30: try a lower", "train --resume --minutes 9")

    def test_two_processes_learn_what_one_learns(self):
        line = f"{MOMENT} --batch-size 8 --epochs 2 --out"
        self.does(line, "one")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        def process(rank):  # as torchrun does it
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                         "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            return subprocess.Popen([sys.executable, PROGRAM, *line.split(), "two"], text=True,
                                    env=os.environ | variables, stdout=subprocess.PIPE)
        both = [process("0"), process("1")]
        for each in both:
            self.addCleanup(each.kill)
        said = [each.communicate(timeout=120)[0] for each in both]
        self.assertEqual([each.returncode for each in both], [0, 0])
        self.assertEqual(said[1], "")  # the first one speaks for both
        one, two = (ddpm.load(f"{run}/ddpm.pt") for run in ("one", "two"))
        self.assertEqual((one["step"], two["step"]), (30, 30))
        for name in one["net"]:
            assert_close(two["net"][name], one["net"][name], atol=1e-3, rtol=0)

class Checkpoints(Folder):
    def test_the_file_alone_rebuilds_the_averaged_net_from_python_too(self):
        with contextlib.redirect_stdout(None):
            ddpm.train(data=Path("data"), out=Path("run"), schedule="linear", T=6, width=8,
                       batch_size=4, epochs=0.1)  # a Path becomes a string
            net, config = ddpm.load_net("run/ddpm.pt", "cpu")
        self.assertEqual((config["schedule"], config["T"], config["data"]), ("linear", 6, "data"))
        for name, value in net.state_dict().items():
            self.assertTrue(torch.equal(value, config["ema"][name]), name)

    def test_a_checkpoint_that_is_none_is_refused_and_no_code_in_it_runs(self):
        class Bomb:
            def __reduce__(self):
                return open, ("ran", "w")
        run, whole = self.train(), Path("runs/mnist/ddpm.pt").read_bytes()
        Path("text.pt").write_text("not a checkpoint")
        Path("bomb.pt").write_bytes(pickle.dumps(Bomb()))
        torch.save(run | {"bomb": Bomb()}, "zipped.pt")
        torch.save({"weights": torch.zeros(3)}, "other.pt")
        for k in range(8):
            Path(f"cut{k}.pt").write_bytes(whole[:len(whole) * k // 8])
        at = whole.index(run["ema"]["stem.weight"].numpy().tobytes())  # a bit of the weights
        Path("flipped.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        for path in sorted(Path().glob("*.pt")):
            self.refuses("not whole, or not of this program", "sample --ckpt", path)
        self.refuses("missing.pt is not there", "sample --ckpt missing.pt")
        self.assertFalse(Path("ran").exists())

    def test_the_net_that_came_along_draws_where_there_is_no_run_else_the_newest_run_does(self):
        self.assertIn("mnist.pt (mnist,", self.does("sample --digit 5 --steps 2"))
        ink = self.raw("--digit 1 0 --n 4")["images"].double().mean((1, 2, 3)).view(4, 2)
        self.assertTrue((ink[:, 0] < ink[:, 1]).all())  # it draws what is asked
        self.train(out="runs/old")
        self.train(out="runs/new")
        os.utime("runs/old/ddpm.pt", (1, 1))
        self.assertIn("runs/new/ddpm.pt", self.does("sample --steps 2"))

    def test_the_python_of_the_readme_runs(self):
        block = README.split("```python\n")[1].split("```")[0]
        exec(block.replace("assets/", f"{PROGRAM.parent}/assets/"), {})
        self.assertTrue(Path("fives.png").exists())

class Evaluation(Folder):
    def test_the_distance_of_two_gaussians_is_the_closed_form(self):
        def cloud(n, mean, root, seed):
            """n points whose mean and covariance are exactly mean and root·rootᵀ."""
            x = torch.randn(n, 3, generator=ddpm.rng(seed), dtype=torch.float64)
            x = x - x.mean(0)
            return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T @ root.T + mean
        def root_of(matrix):
            values, vectors = torch.linalg.eigh(matrix)
            return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
        skew = torch.tensor([[1.0, 0, 0], [0.7, 0.5, 0], [-0.3, 0.2, 2]]).double()
        turn = torch.tensor([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1.5]]).double()
        A, B = skew @ skew.T, turn @ torch.tensor([3.0, 0.1, 1]).double().diag() @ turn.T
        half = root_of(A)
        known = A.trace() + B.trace() - 2 * root_of(half @ B @ half).trace() + 1 + 4 + 9
        got = ddpm.frechet_distance(cloud(60, torch.zeros(3), skew, 3), cloud(
            80, torch.tensor([1.0, 2, -3]), torch.linalg.cholesky(B), 4))
        self.assertAlmostEqual(got, known.item(), places=6)

    def test_the_score_is_the_number_of_classes_read_if_the_classifier_is_sure(self):
        # surely four, one, two classes; or each with p = 3/4, 1/12, 1/12, 1/12: exp(ln(3)/2)
        for sharp, classes, score in ((50, [0, 1, 2, 3], 4), (50, [2, 2, 2], 1),
                                      (50, [2, 2, 3, 3], 2), (math.log(9), [0, 1, 2, 3], 3 ** 0.5)):
            self.assertAlmostEqual(ddpm.inception_score(sharp * torch.eye(4)[classes]), score, 5)

    def figures(self, line):
        """What evaluate says: {row: (accuracy, distance, score)}."""
        rows = [row.rsplit(maxsplit=3) for row in self.does(line).splitlines()[-2:]]
        return {name: (accuracy, *map(float, numbers)) for name, accuracy, *numbers in rows}

    def test_real_images_are_right_and_near_and_those_of_a_net_of_two_steps_neither(self):
        os.rename("data", "small")
        write_mnist(n=2400)
        self.train()
        self.train("--cond", "none", out="none")  # it gets no accuracy
        none = self.figures("evaluate --n 1 --steps 2 --ckpt none/ddpm.pt")
        self.assertEqual(none["samples"][0], "-")
        figures = self.figures("evaluate --n 300 --steps 2 --ckpt runs/mnist/ddpm.pt")
        self.assertGreater(float(figures["real images"][0].strip("%")), 70)
        self.assertLess(float(figures["samples"][0].strip("%")), 40)
        self.assertGreater(figures["samples"][1], 5 * figures["real images"][1])
        with mock.patch("torch.optim.Adam", None), mock.patch(  # it is learned once
                "ddpm.train_classifier", mock.Mock(side_effect=ddpm.train_classifier)) as learned:
            again = self.figures("evaluate --n 300 --steps 2 --ckpt runs/mnist/ddpm.pt")
        self.assertEqual(again, figures)
        images = learned.call_args.args[0]  # and not from the images of the floor
        self.assertTrue(torch.equal(images, digits(2400)[:2000]))

class TheCommandLine(Folder):
    def test_each_command_runs_in_a_process_of_its_own_and_names_its_files(self):
        for line, files in ((f"{MOMENT} --T 30 --epochs 0.1", ["runs/mnist/samples-000003.png"]),
                            ("sample --digit 5 --gif", ["samples.png", "samples.gif"]),
                            ("evaluate --n 20 --steps 2", []), ("forward", ["noise.png"])):
            run = subprocess.run([sys.executable, PROGRAM, *line.split()], capture_output=True,
                                 text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            self.assertEqual(run.returncode, 0, run.stderr)
            for name in files:
                self.assertTrue(name in run.stdout and Path(name).exists())
        with Image.open("samples.gif") as gif:
            self.assertEqual((gif.n_frames, gif.info["loop"]), (21, 0))  # noise, and 20 steps

    def test_forward_shows_each_digit_on_its_way_to_noise(self):
        self.does("forward --schedule linear --T 300 --gif")
        with Image.open("noise.png") as sheet:
            small = pil_to_tensor(sheet.resize((332, 302), Image.NEAREST))
        for k in range(10):
            row = small[:, 30 * k + 2:30 * k + 30]  # 11 images, the first at column 2
            self.assertTrue(torch.equal(row[..., 2:30], digits(120)[k]))
            self.assertGreater(len(row[..., 302:330].unique()), 100)

    def test_help_names_each_flag_and_its_default_and_ends_with_an_example(self):
        self.assertIn("python ddpm.py forward --gif", self.does("--help"))
        self.assertIn("--n 1..1000000        (1000)", self.does("evaluate --help"))
        for function in (ddpm.train, ddpm.sample, ddpm.evaluate, ddpm.forward):
            out = self.does(function.__name__, "--help")
            more = function in (ddpm.sample, ddpm.evaluate) and ddpm.generate.__kwdefaults__
            for name, default in (function.__kwdefaults__ | (more or {})).items():
                self.assertIn("--" + name.replace("_", "-"), out)
                if default:
                    self.assertIn(f"({default})", out)
            self.assertIn("python ddpm.py " + function.__name__, out.splitlines()[-1])

    def test_digits_come_in_the_order_asked_for_and_same_style_is_one_noise_a_row(self):
        self.train()
        self.assertEqual(self.raw("--n 1")["labels"].tolist(), list(range(10)))
        self.assertEqual(self.raw("--digit 3 1 --n 2")["labels"].tolist(), [3, 1, 3, 1])
        images = self.raw("--same-style --digit 4 4 4 --n 2 --out", "a b/ü.png")["images"]
        self.assertTrue(torch.equal(images[0], images[2]))
        self.assertFalse(torch.equal(images[0], images[3]))
        with Image.open("a b/ü.png") as sheet:
            self.assertEqual(sheet.size, (6 * 92, 6 * 62))

    def test_a_morph_leads_from_digit_to_digit_without_a_jump_through_normal_noise(self):
        generate = mock.Mock(side_effect=ddpm.generate, __kwdefaults__=ddpm.generate.__kwdefaults__)
        with mock.patch("ddpm.generate", generate):
            self.does("sample --morph 3 8 5 --steps 2 --seed 4")
        _, _, y, noise, *_ = generate.call_args.args
        z = torch.randn(1, 3, 1, 28, 28, generator=ddpm.rng(4))[0]
        for frame, digit, other in ((0, 3, 8), (24, 8, 5), (48, 5, 3)):
            self.assertEqual((y[frame, digit], y[frame, other]), (1, 0))
            assert_close(noise[frame], z[frame // 24])
        self.assertEqual((len(y), y[12, 3], y[12, 8]), (49, 0.5, 0.5))
        assert_close(noise[12], (z[0] + z[1]) / 2 ** 0.5)
        steps = (noise[1:] - noise[:-1]).flatten(1).norm(dim=1)
        self.assertLess(steps.max(), (z[0] - z[1]).norm() / 12)

    def test_a_redrawing_begins_with_the_image_as_it_is_if_light_on_dark(self):
        self.train()
        ddpm.to_pil_image(digits(8)[7]).save("seven.png")
        images = self.raw("--init seven.png --strength 0 --digit 1 2")["images"]
        self.assertTrue(torch.equal(images, digits(8)[[7, 7]]))
        self.does("sample --init seven.png --steps 3 --gif --threshold 0.9 --sampler ddpm")

    def test_every_command_of_the_readme_is_understood(self):
        lines = re.findall(r"`python3? ddpm\.py ([a-z][^`]*)`", README)
        self.assertGreater(len(lines), 10)
        reached = mock.Mock(side_effect=ValueError("reached"))
        with mock.patch("ddpm.load_net", reached), \
                mock.patch("ddpm.load_data", reached), mock.patch("ddpm.pick_device"):
            for line in lines:
                if "--resume" not in line:
                    self.refuses("reached", line)

    def test_the_five_systems_of_the_readme_train_and_draw(self):
        lines = re.findall(r"`python ddpm\.py (train [^`]*--predict[^`]*)`", README)
        self.assertEqual(len(lines), 5)
        for i, line in enumerate(lines):
            self.does(f"{line} --width 8 --batch-size 4 --epochs 0.1 --out runs/{i}")
            for sampler in ddpm.SAMPLERS:
                self.does(f"sample --ckpt runs/{i}/ddpm.pt --sampler {sampler} --steps 3 --n 1")

    def test_bad_input_ends_in_one_line_with_exit_status_2_and_changes_no_file(self):
        self.train()
        Path("file").write_text("kept")
        for flag in ("--T 1", "--T x", "--lr -1", "--lr nan", "--batch-size 0", "--width 0",
                     "--minutes inf", "--epochs 0", "--seed -1", "--loss l3", "--dataset imagenet",
                     "--nothing 1", "--steps 3"):
            self.refuses(flag.split()[0], f"train --out x {flag}")
        for flag in ("--guidance -1", "--guidance nan", "--n 0", "--steps 0", "--sampler euler",
                     "--strength 1.1", "--threshold 0.1"):
            self.refuses(flag.split()[0], f"sample {flag}")
        self.train("--cond", "none", out="cond")
        for words, line in (
                ("--width 12 by 8", f"{MOMENT} --out x --width 12"), ("2..100000", "train --T 1"),
                ("--size 30 has", f"{MOMENT} --out x --size 30"), ("--gif", "evaluate --gif"),
                ("['11']: this net", "sample --digit 11"), ("takes two", "sample --morph 3"),
                ("['3', 'x']", "sample --morph 3 x"), ("abacus", "sample --device abacus"),
                ("'file", f"{MOMENT} --out file/run"), ("'file", "sample --steps 2 --out file/a"),
                ("runs", "sample --steps 2 --out runs"), ("seven", "sample --init seven.png"),
                ("knows no labels", "sample --ckpt cond/ddpm.pt --digit 3")):
            self.refuses(words, line)
        with mock.patch("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"]):
            self.refuses("Error downloading", "train --out x --data nowhere")

@unittest.skipUnless(os.environ.get("BENCH"), "no test, but figures: make bench")
class Bench(Folder):
    def test_rate_memory_and_start_beside_the_machines_own(self):
        import resource
        torch.set_num_threads(THREADS)
        def seconds_of(task, *words):
            began = time.perf_counter()
            task(*words)
            return time.perf_counter() - began
        def python(*words):
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
        a = torch.randn(2048, 2048)
        product = statistics.median(seconds_of(torch.mm, a, a) for _ in range(20))
        print(f"\n2048x2048 float32 product: {2 * 2.048**3 / product:.0f} GFLOP/s")
        for out, flags in enumerate(("--width 32", "--width 32 --amp", "--width 64 --amp")):
            python(PROGRAM, *f"train --minutes 0.4 --out {out} {flags}".split())
            log = ddpm.load(f"{out}/ddpm.pt")["log"][20:]
            print(f"train {flags}: {64 / log[:, 1].diff().median():,.0f} images/s")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # on Linux
        imports, five = (statistics.median(seconds_of(python, *words) for _ in range(5))
                         for words in (("-c", "import torch, torchvision"),
                                       (PROGRAM, "sample", "--digit", "5", "--gif")))
        print(f"peak memory of these: {peak:.2f} GB\n"
              f"sample --digit 5 --gif: {five:.1f} s, {five / imports:.2f} times the imports'")

if __name__ == "__main__":
    unittest.main()
