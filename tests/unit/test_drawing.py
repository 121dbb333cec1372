"""Every way of drawing gives a picture that is its own, whatever else is in the call, and does what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mm
from mm.adapters.latents import PixelSpace
from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.config import TrainConfig
from mm.diffusion.guidance import within
from mm.diffusion.sampler import SOLVERS, sample
from mm.diffusion.schedule import Schedule
from mm.evaluation.redraw import Redraw, fingerprint
from mm.models.export import save_export
from mm.models.fingerprint import model_hash
from mm.objectives.step import build_step
from mm.settings import load as load_config

WORDS = ["red heart", "blue heart", "cat face", "a dog that runs", "flag", "the sun behind a cloud", "", "x y z"]
SIDE, COUNT = 16, 16
PROMPTS = [WORDS[n % 8] or None for n in range(COUNT)]
SEEDS = [100 + n * n for n in range(COUNT)]


def loaded(root: Path, folder: Path, seed: int) -> LoadedModel:
    """The tiniest random model; what starts at zero is filled in, or nothing would depend on anything."""
    config: TrainConfig = load_config(root / "configs" / "debug.py")
    config.model.image = dataclasses.replace(config.model.image, size=SIDE, width=32, depth=1)
    assert config.model.denoiser is not None
    config.model.denoiser = dataclasses.replace(config.model.denoiser, width=32)
    torch.manual_seed(seed)
    step = build_step(config, train_tokenizer(WORDS * 4, config.model.text.vocab_size))
    with torch.no_grad():
        for parameter in step.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    save_export(folder / "export", step.state_dict(), config, step.model.tokenizer.to_json(), {})
    return mm.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded(root, tmp_path_factory.mktemp("strong"), 0)


@pytest.fixture(scope="module")
def weaker(root: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded(root, tmp_path_factory.mktemp("weak"), 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by more, and waits for them where others work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(count: int = COUNT, width: int = 20, height: int = 24) -> list[Image.Image]:
    pixels = np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def half(white_left: bool = True, size: tuple[int, int] = (20, 24)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]) if white_left else (size[0] // 2, 0, *size))
    return mask


def options(name: str, weaker: LoadedModel) -> dict[str, Any]:
    """Keyword arguments; lists of them have a row a prompt."""
    starts, masks = pictures(), [half(n % 2 == 0) for n in range(COUNT)]
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "unguided": {"guidance": 1.0},
        "interval": {"interval": (0.2, 0.7)},
        "negative": {"negative": [WORDS[(n + 3) % 8] if n % 3 else None for n in range(COUNT)]},
        "autoguide": {"autoguide": weaker},
        "start": {"start": starts, "strength": 0.8},
        "masks": {"start": starts, "masks": masks},
        "images": {"images": [picture if n % 3 else None for n, picture in enumerate(starts)]},
        "best of": {"prompts": [WORDS[n % 6] for n in range(COUNT)], "best_of": 3},
        "mixed": {
            "start": [picture if n % 3 else None for n, picture in enumerate(starts)],
            "masks": [mask if n % 3 == 1 else None for n, mask in enumerate(masks)],
            "images": [picture if n % 2 else None for n, picture in enumerate(starts)],
            "negative": ["flag" if n % 4 == 1 else None for n in range(COUNT)],
            "interval": (0.0, 0.8),
        },
    }
    return kinds[name]


KINDS = ("plain", "unguided", "interval", "negative", "autoguide", "start", "masks", "images", "best of", "mixed")


def draw(model: LoadedModel, rows: list[int], **given: Any) -> list[Image.Image]:
    """These rows of the call."""
    call = {"prompts": PROMPTS, "seeds": SEEDS, "steps": 3, **given}
    some: dict[str, Any] = {}
    for name, value in call.items():
        some[name] = [value[row] for row in rows] if isinstance(value, list) else value
    return model.generate(some.pop("prompts"), **some)


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_bitwise_the_same_alone_in_a_batch_and_in_any_order(
    model: LoadedModel, weaker: LoadedModel, kind: str, solver: str
) -> None:
    given = options(kind, weaker) | {"solver": solver}
    everything = list(range(COUNT))
    together = draw(model, everything, **given)
    assert len(set(pixels(together))) == COUNT
    assert pixels(draw(model, everything[::-1], **given)) == pixels(together)[::-1]
    for row in (0, 5, 10, 15):
        alone = draw(model, [row], **given)
        assert pixels(alone) == pixels(together[row : row + 1])
        assert alone[0].info["mm"] == together[row].info["mm"]


@pytest.mark.parametrize("threads", [2, 3])
def test_it_is_so_with_more_threads(model: LoadedModel, weaker: LoadedModel, threads: int) -> None:
    torch.set_num_threads(threads)
    given = options("mixed", weaker)
    together = draw(model, list(range(10)), **given)
    for row in (7, 9):
        assert pixels(draw(model, [row], **given)) == pixels(together[row : row + 1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_what_is_asked_for_changes_the_picture(model: LoadedModel, weaker: LoadedModel, kind: str) -> None:
    given = options(kind, weaker)
    plain = draw(model, [1, 4, 7], prompts=given.get("prompts", PROMPTS))
    assert not set(pixels(draw(model, [1, 4, 7], **given))) & set(pixels(plain)) or kind == "best of"


def test_a_row_without_a_negative_is_drawn_as_if_no_other_had_one(model: LoadedModel) -> None:
    mixed = draw(model, [0, 1, 2], negative=["flag"] + 2 * [None] + COUNT * [""])
    assert pixels(mixed[1:]) == pixels(draw(model, [1, 2]))
    assert pixels(mixed[:1]) != pixels(draw(model, [0])) and pixels(mixed[:1]) == pixels(
        draw(model, [0], negative="flag")
    )


def test_a_negative_is_what_guidance_0_draws(model: LoadedModel) -> None:
    negative = model.generate(["red heart"], guidance=0.0, negative="flag", steps=3)
    assert pixels(negative) == pixels(model.generate(["flag"], guidance=1.0, steps=3))


def test_without_guidance_nothing_is_led_away_from(model: LoadedModel, weaker: LoadedModel) -> None:
    plain = pixels(draw(model, [0, 1], guidance=1.0))
    assert pixels(draw(model, [0, 1], guidance=1.0, autoguide=weaker)) == plain
    with pytest.raises(ValueError, match="negative: guidance = 1 leads away from nothing"):
        draw(model, [0, 1], guidance=1.0, negative="flag")
    everything = pixels(draw(model, [0, 1]))
    assert pixels(draw(model, [0, 1], autoguide=model)) == plain, "away from itself is nowhere"
    assert pixels(draw(model, [0, 1], interval=(0.0, 1.0))) == everything != plain


@pytest.fixture
def rows(model: LoadedModel) -> Iterator[list[int]]:
    """How many rows each evaluation of the denoiser had."""
    seen: list[int] = []
    denoiser = model.inference.model.denoiser
    assert denoiser is not None
    hook = denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


def test_outside_the_interval_nothing_is_computed_but_the_prediction_itself(
    model: LoadedModel, rows: list[int]
) -> None:
    size = model.inference.size("draw")
    draw(model, [0], steps=5, interval=(0.4, 0.8))  # levels 1, 0.8, 0.6, 0.4, 0.2
    assert rows == [size, 2 * size, 2 * size, 2 * size, size]
    rows.clear()
    draw(model, [0], steps=5, guidance=1.0)
    assert rows == 5 * [size]


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("dpmpp_2m", 5), ("heun", 9)])
def test_a_solver_costs_what_it_says(model: LoadedModel, rows: list[int], solver: str, evaluations: int) -> None:
    draw(model, [0], steps=5, solver=solver)
    assert len(rows) == evaluations


def test_both_ends_of_the_interval_are_within_it() -> None:
    levels = Schedule().sampling_sigmas(10)[1:-1]
    for level, typed in zip(levels, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1), strict=True):
        for interval in ((typed, 1.0), (0.0, typed)):
            chosen = within(interval, lambda z, s: z + 1, lambda z, s: z)
            assert chosen(torch.zeros(1), level[None]).item() == 1


def test_at_strength_1_the_start_is_forgotten_and_near_0_it_is_kept(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [Image.new("RGB", (SIDE, SIDE), "teal")] * COUNT
    assert pixels(draw(model, [0, 1], start=start, strength=1.0)) == pixels(draw(model, [0, 1]))
    # the random one keeps nothing; this one takes all that it is given for the picture
    monkeypatch.setattr(model.inference.model.denoiser, "forward", lambda z, *condition: z)
    kept = draw(model, [0], start=start, strength=1e-3, guidance=1.0)[0]
    assert np.abs(np.asarray(kept).astype(int) - np.asarray(start[0])).max() <= 2


@pytest.mark.parametrize("exact", [True, False])
def test_of_a_masked_picture_all_that_is_black_stays_to_the_last_bit(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    space, seen = model.inference.model.latents, []
    if not exact:  # as an autoencoder's, what is decoded is not quite what was encoded
        decode = space.decode
        monkeypatch.setattr(space, "decode", lambda latents: decode(0.9 * latents))
    start, mask = pictures(1, SIDE, SIDE)[0], half(size=(SIDE, SIDE))
    given: dict[str, Any] = {"start": [start] * 2, "masks": [mask, mask.convert("1")], "strength": 0.9, "steps": 3}
    images = model.generate(["flag"] * 2, **given, callback=lambda step, steps, preview: seen.append(preview()))
    white, wanted = np.asarray(mask) > 0, np.asarray(start)
    for image in map(np.asarray, images):
        assert np.array_equal(image[~white], wanted[~white])
        assert (image[white] != wanted[white]).mean() > 0.5
    assert [one and one.tobytes() for one in seen[-1]] == pixels(images)


def test_a_mask_that_is_white_everywhere_is_none(model: LoadedModel) -> None:
    start = pictures()
    white = [Image.new("L", start[0].size, 255)] * COUNT
    assert pixels(draw(model, [0, 3], start=start, masks=white)) == pixels(draw(model, [0, 3], start=start))


def test_around_a_mask_the_path_is_the_starts_own_at_each_level() -> None:
    schedule, x, noise = Schedule(noise_scale=2.0), torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    redraw = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    redraw[..., :2] = True
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(z: Tensor, sigma: Tensor) -> Tensor:
        seen.append((z, sigma))
        return torch.zeros_like(z)

    for solver in SOLVERS:
        out = sample(predict, noise, schedule, 8, solver, start=x, strength=0.6, redraw=redraw)  # type: ignore[arg-type]
        assert torch.equal(out[..., 2:], x[..., 2:]) and not out[..., :2].any()
    for z, sigma in seen:
        if sigma[0] >= schedule.floor:  # below it the prediction is the answer, and the path no longer matters
            wanted = schedule.add_noise(x, noise, sigma)
            torch.testing.assert_close(z[..., 2:], wanted[..., 2:], atol=1e-4, rtol=1e-4)


def test_in_latents_a_cell_is_drawn_anew_where_any_pixel_of_it_is() -> None:
    class Halves(PixelSpace):
        """Latents of half the side."""

        def __init__(self) -> None:
            super().__init__(SIDE)
            self.shape = (3, SIDE // 2, SIDE // 2)

        def encode(self, pixels: Tensor) -> Tensor:
            return super().encode(pixels)[..., ::2, ::2]

    mask = Image.new("L", (SIDE, SIDE))
    mask.putpixel((5, 8), 255)
    redraw = Redraw(Halves(), SIDE, pictures(1, SIDE, SIDE), [mask])
    ((rows, more),) = redraw.groups()
    assert rows == [0] and more["start"].shape == (1, 3, 8, 8)
    assert more["redraw"].shape == (1, 1, 8, 8) and more["redraw"].nonzero().tolist() == [[0, 0, 4, 2]]


def cosine(model: LoadedModel, image: Image.Image, prompt: str) -> float:
    found = model.encode(image=[image], text=[prompt])
    return float(found["image"][0] @ found["text"][0])


def test_the_best_of_four_is_the_nearest_of_them_and_can_be_drawn_alone(model: LoadedModel) -> None:
    from mm.evaluation.generation import candidate_seeds

    prompts, seeds = ["red heart", "flag"], [5, -9]
    assert pixels(model.generate(prompts, seeds=seeds, steps=2, best_of=1)) == pixels(
        model.generate(prompts, seeds=seeds, steps=2)
    )
    for prompt, seed, image in zip(
        prompts, seeds, model.generate(prompts, seeds=seeds, steps=2, best_of=4), strict=True
    ):
        candidates = candidate_seeds(seed, 4)
        assert candidates[0] == seed and len(set(candidates)) == 4 and candidates[:2] == candidate_seeds(seed, 2)
        each = model.generate([prompt] * 4, seeds=candidates, steps=2)
        scores = [cosine(model, one, prompt) for one in each]
        record = image.info["mm"]
        assert record.score == pytest.approx(max(scores), abs=1e-6) and record.best_of == 4
        assert record.seed == candidates[scores.index(max(scores))]
        assert pixels([image]) == pixels(model.generate([prompt], seeds=[record.seed], steps=2))


@pytest.mark.parametrize("kind", ["plain", "masks", "mixed"])
def test_a_callback_counts_every_step_and_sees_the_pictures_form(
    model: LoadedModel, weaker: LoadedModel, kind: str
) -> None:
    told: list[tuple[int, int]] = []
    seen: list[list[Image.Image | None]] = []

    def callback(step: int, steps: int, preview: Any) -> None:
        told.append((step, steps))
        seen.append(preview())

    images = draw(model, list(range(COUNT)), **options(kind, weaker), callback=callback)
    assert pixels(images) == pixels(draw(model, list(range(COUNT)), **options(kind, weaker)))
    steps = told[-1][1]
    assert told == [(step, steps) for step in range(1, steps + 1)]
    assert all(len(found) == COUNT for found in seen)
    begun = [sum(one is not None for one in found) for found in seen]
    assert begun == sorted(begun) and begun[0] < COUNT == begun[-1]
    assert [one and one.tobytes() for one in seen[-1]] == pixels(images)
    assert all(one is None or (isinstance(one, Image.Image) and one.size == (SIDE, SIDE)) for one in seen[0])


def test_a_callback_that_stops_the_call_leaves_the_model_as_it_was(model: LoadedModel) -> None:
    def stop(step: int, steps: int, preview: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    before = pixels(draw(model, [0, 1, 2], negative="flag"))
    with pytest.raises(KeyboardInterrupt):
        draw(model, [0, 1, 2], callback=stop)
    assert not torch.is_inference_mode_enabled()
    assert pixels(draw(model, [0, 1, 2], negative="flag")) == before


def test_a_picture_knows_how_it_was_drawn(model: LoadedModel, weaker: LoadedModel) -> None:
    start, mask = pictures(2), half()
    image = model.generate(
        ["flag", None],
        seeds=[3, 4],
        steps=2,
        guidance=3,
        solver="heun",
        interval=(0.25, 1),
        images=[None, start[1]],
        start=[start[0], None],
        masks=[mask, None],
        strength=0.5,
        autoguide=weaker,
    )
    one, other = (picture.info["mm"] for picture in image)
    assert (one.prompt, one.seed, one.steps, one.guidance, one.solver) == ("flag", 3, 2, 3.0, "heun")
    assert (one.interval, one.strength, one.negative, one.best_of, one.score) == ((0.25, 1.0), 0.5, None, 1, None)
    assert (one.like, one.start, one.mask) == (None, fingerprint(start[0]), fingerprint(mask))
    assert (other.prompt, other.seed, other.like, other.start) == (None, 4, fingerprint(start[1]), None)
    assert one.autoguide == other.autoguide == model_hash(weaker) != model_hash(model)
    negatives = model.generate(["a", "b"], steps=1, negative=["flag", None])
    assert [picture.info["mm"].negative for picture in negatives] == ["flag", None]


def error(solver: str, steps: int, shift: float, strength: float = 1.0) -> float:
    """On data N(0, 1/4) the best prediction and the path are known: z stays the same number of deviations from 0."""

    def deviation(s: Tensor) -> Tensor:
        return ((1 - s) ** 2 * 0.25 + s**2).sqrt()

    def predict(z: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.double().view(-1, 1, 1, 1)
        return z * (1 - s) * 0.25 / deviation(s) ** 2

    generator = torch.Generator().manual_seed(0)
    noise, x = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64, generator=generator)
    schedule = Schedule(floor=1e-9, shift=shift)
    start = None if strength == 1 else x
    first = schedule.sampling_sigmas(steps, strength)[0].double()
    z = noise if start is None else (1 - first) * start + first * noise
    exact = z * 0.5 / deviation(first)
    out = sample(predict, noise, schedule, steps, solver, start=start, strength=strength)  # type: ignore[arg-type]
    return (out - exact).norm().item()


@pytest.mark.parametrize(("shift", "strength"), [(1.0, 1.0), (3.0, 1.0), (1.0, 0.7)])
def test_euler_is_first_order_and_the_others_second(shift: float, strength: float) -> None:
    few, many = ({solver: error(solver, steps, shift, strength) for solver in SOLVERS} for steps in (256, 512))
    orders = {solver: np.log2(few[solver] / many[solver]) for solver in SOLVERS}
    assert orders["euler"] == pytest.approx(1, abs=0.05) and orders["heun"] == pytest.approx(2, abs=0.05)
    # equal steps in sigma are never short in the log of signal to noise near 0: the error falls as log(n) / n^2
    assert orders["dpmpp_2m"] == pytest.approx(2 - np.log2(np.log(512) / np.log(256)), abs=0.16)
    assert few["dpmpp_2m"] < 0.15 * few["euler"]
