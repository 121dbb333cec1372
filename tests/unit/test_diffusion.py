"""Noise, its schedule, and sampling."""

from __future__ import annotations

import pytest
import torch

from mm.diffusion.guidance import guided
from mm.diffusion.noise import normal, uniform
from mm.diffusion.sampler import SOLVERS, sample
from mm.diffusion.schedule import Schedule


def test_noise_depends_on_the_seed_alone() -> None:
    seeds = torch.tensor([5, 9, 2**62, 11])
    whole = normal(seeds, (3, 4, 4), stream=1)
    for row, seed in enumerate(seeds):
        assert torch.equal(whole[row], normal(seed[None], (3, 4, 4), stream=1)[0])
    assert torch.equal(whole.flatten(1)[:, :5], normal(seeds, (5,), stream=1)), "a prefix is a prefix"


def test_streams_and_neighbouring_seeds_are_independent() -> None:
    a = normal(torch.arange(64), (512,), stream=1)
    b = normal(torch.arange(64), (512,), stream=2)
    c = normal(torch.arange(1, 65), (512,), stream=1)
    for other in (b, c[:, 1:]):
        x, y = a[:, : other.shape[1]].flatten(), other.flatten()
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(a)[~torch.eye(64, dtype=torch.bool)]).max() < 0.25


def test_moments() -> None:
    x = normal(torch.arange(100), (1000,), stream=3)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    u = uniform(torch.arange(100), 1000, stream=3)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01


def test_sigma_one_is_pure_noise_and_sigma_zero_the_image() -> None:
    x, noise = torch.full((2, 3, 4, 4), 0.5), torch.randn(2, 3, 4, 4)
    schedule = Schedule(noise_scale=2.0)
    assert torch.equal(schedule.add_noise(x, noise, torch.zeros(2)), x)
    assert torch.equal(schedule.add_noise(x, noise, torch.ones(2)), 2 * noise)


def test_velocity_is_the_derivative_of_the_path() -> None:
    schedule = Schedule(noise_scale=1.5)
    x, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    sigma = torch.tensor([0.4, 0.7], dtype=torch.float64)
    difference = (schedule.add_noise(x, noise, sigma + 1e-6) - schedule.add_noise(x, noise, sigma - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.velocity(schedule.add_noise(x, noise, sigma), x, sigma), difference)


def test_shift_is_applied_once_and_to_training_and_sampling_alike() -> None:
    schedule, plain = Schedule(shift=3.0), Schedule()
    levels = schedule.sampling_sigmas(4)
    assert levels.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    draws = torch.randn(100)
    sigma = plain.training_sigma(draws)
    torch.testing.assert_close(schedule.training_sigma(draws), 3 * sigma / (1 + 2 * sigma))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_a_perfect_denoiser_is_followed_to_its_image(solver: str, steps: int) -> None:
    x = torch.rand(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4)
    out = sample(lambda z, sigma: x, noise, Schedule(), steps, solver=solver)  # type: ignore[arg-type]
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)


def test_heun_is_second_order() -> None:
    """On data N(0, 1/4) the best prediction and the exact solution are known: z scales by sd(0) / sd(1)."""

    def predict(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return z * (1 - s) * 0.25 / ((1 - s) ** 2 * 0.25 + s**2)

    noise = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    exact = noise * 0.5

    def error(solver: str, steps: int) -> float:
        out = sample(predict, noise, Schedule(floor=1e-9), steps, solver=solver)  # type: ignore[arg-type]
        return (out - exact).norm().item()

    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, rel=0.25)
    assert error("heun", 20) / error("heun", 40) > 3.3
    assert error("heun", 20) < 0.2 * error("euler", 40)


def test_guidance_one_is_the_condition_and_zero_is_none() -> None:
    shown, hidden = torch.tensor([2.0]), torch.tensor([1.0])
    for guidance, wanted in ((0.0, 1.0), (1.0, 2.0), (3.0, 4.0)):
        assert guided(lambda z, s: (shown, hidden), guidance)(shown, shown).item() == wanted
