"""The tasks that judge drawings and the denoiser say what is so: of perfect drawings, of copies, of known losses."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.adapters.text import train_tokenizer
from mm.config import ConfigError
from mm.data.order import sample_seed
from mm.diffusion.noise import normal
from mm.diffusion.schedule import Schedule
from mm.evaluation import denoising as module
from mm.evaluation.denoising import denoising, training_levels
from mm.evaluation.drawings import _ranks, checked, fidelity
from mm.evaluation.extractor import extractor, weights_hash
from mm.evaluation.inference import Inference
from mm.evaluation.job import Job
from mm.evaluation.measured import Measure, Pictures
from mm.evaluation.memorisation import memorisation
from mm.evaluation.outcome import Outcome
from mm.evaluation.samples import around
from mm.models.export import load_export, save_export
from mm.objectives.diffusion import Diffusion
from mm.objectives.step import TrainStep, build_step
from mm.settings import load as load_config
from mm.types import Batch

QUICK: dict[str, Any] = {"limit": 8, "steps": 1, "repeated": 2, "repeats": 3}
BY_CAPTION = {"clip_score", "caption_acc1", "caption_acc5"}
DISTANCES = {"fid", "kid_x1000", "precision", "recall", "density", "coverage"}


@pytest.fixture(scope="module")
def step(root: Path) -> TrainStep:
    """A random model in which everything says something."""
    config = load_config(root / "configs" / "debug.py")
    torch.manual_seed(0)
    built = build_step(config, train_tokenizer(["red heart", "blue heart", "cat face"] * 9, 400)).requires_grad_(False)
    for parameter in built.model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    return built.eval()


@pytest.fixture(scope="module")
def job(root: Path, step: TrainStep, openmoji_shards: Path) -> Job:
    config = load_config(root / "configs" / "debug.py")
    return Job(Inference(step.model, config, {}), *around(str(openmoji_shards / "val-*.tar"), None))


def without(job: Job, **objectives: None) -> Job:
    """The job of a model that was trained without some objectives; its pictures are those of `job`."""
    config = dataclasses.replace(job.inference.config)
    config.objectives = dataclasses.replace(config.objectives, **objectives)
    other = Job(Inference(job.inference.model, config, {}), job.files, job.reference)
    other.samples = job.samples
    return other


def draws(monkeypatch: pytest.MonkeyPatch, job: Job, places: Callable[[list[str]], list[int]]) -> None:
    """Instead of drawing, the model shows pictures of the shards."""
    monkeypatch.setattr(
        job.inference, "generate", lambda prompts, **settings: job.samples.images[places(list(prompts))], raising=True
    )


def test_a_drawing_has_a_record_that_adds_up_to_the_metrics_and_all_repeats_itself(job: Job) -> None:
    found = fidelity(job, QUICK | {"captions": ["held_out", "train"]})
    names = DISTANCES | BY_CAPTION | {"diversity", "diversity_of_caption", "vendi"}
    names |= {f"{view}{name}" for view in ("", "pixels_") for name in ("train_distance_ratio", "nearer_than_1pct")}
    assert names <= set(found.metrics) and {f"train/{name}" for name in names} <= set(found.metrics)
    for split, prefix in (("held_out", ""), ("train", "train/")):
        records = [record for record in found.records if record["split"] == split]
        assert len(records) == 8 and [record["seed"] for record in records] == list(range(8))
        for name in ("precision", "density", "nearer_than_5pct", "pixels_train_distance_ratio", *BY_CAPTION):
            mean = np.mean([record[prefix + name] for record in records])
            assert mean == pytest.approx(found.metrics[prefix + name].value)
        assert {record["train_key"] for record in records} <= {job.samples.keys[place] for place in job.train}
    assert found.detail["extractor"]["name"] == "self" and len(found.detail["extractor"]["sha256"]) == 64
    assert found.detail["held_out"]["ceiling"]["fid"] > 0 and found.detail["held_out"]["floor"]["n"] == 8
    again = fidelity(job, QUICK)
    assert json.dumps(again.records) == json.dumps(
        [record for record in found.records if record["split"] == "held_out"]
    )
    assert repr(again.metrics) == repr({name: metric for name, metric in found.metrics.items() if "/" not in name})
    assert found.metrics["fid"].error > 0 and found.detail["left_out"] == {}


def test_drawings_that_are_the_real_pictures_are_perfect(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {job.samples.captions[place]: place for place in job.held_out}
    draws(monkeypatch, job, lambda prompts: [own[prompt] for prompt in prompts])
    found = fidelity(job, QUICK | {"limit": 1000})
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert abs(values["fid"]) < 1e-6 and values["kid_x1000"] <= 0
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    assert (
        found.metrics["fid"].value
        < found.detail["held_out"]["floor"]["fid"]
        < found.detail["held_out"]["ceiling"]["fid"]
    )
    for name, value in found.detail["held_out"]["real_by_caption"].items():
        assert values[name] == pytest.approx(value)
    assert values["diversity"] == pytest.approx(found.detail["held_out"]["diversity"]["real"])
    assert values["diversity_of_caption"] == 0, "several drawings of a caption were the same"


def test_drawings_that_copy_the_training_pictures_are_found_out(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = job.train[3:11]
    draws(monkeypatch, job, lambda prompts: (copies * len(prompts))[: len(prompts)])
    found = fidelity(job, QUICK)
    for view in ("", "pixels_"):
        assert found.metrics[f"{view}train_distance_ratio"].value == 0
        assert found.metrics[f"{view}nearer_than_1pct"].value == found.metrics[f"{view}nearer_than_5pct"].value == 1
    for record, copy in zip(found.records, copies, strict=True):
        there = job.samples.keys.index(record["pixels_train_key"])
        assert torch.equal(job.samples.images[there], job.samples.images[copy])
    closest = found.detail["held_out"]["memorisation"]["features"]["closest"]
    assert len(closest) == 8 and {one["train_distance"] for one in closest} == {0.0}
    assert closest[0]["nearer_than_unseen"] == 1 and closest[0]["key"] == found.records[0]["key"]


def test_pictures_as_far_from_training_as_real_ones_are_not(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    draws(monkeypatch, job, lambda prompts: (job.held_out * len(prompts))[: len(prompts)])
    found = fidelity(job, QUICK | {"limit": len(job.held_out)})
    memory = found.detail["held_out"]["memorisation"]
    assert memory["unseen"] + memory["equal_to_train"] == len(job.held_out)
    share = memory["equal_to_train"] / len(job.held_out)  # these are copies, drawn or not
    for name, quantile in (("nearer_than_1pct", 0.01), ("nearer_than_5pct", 0.05)):
        honest = share + (1 - share) * quantile
        assert found.metrics[name].value == pytest.approx(honest, abs=1.01 / memory["unseen"])
    assert found.metrics["pixels_train_distance_ratio"].value == pytest.approx(1 - share)


def test_each_drawing_has_a_seed_of_its_own_that_its_record_tells(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def generate(prompts: list[str], *, seeds: list[int], **settings: Any) -> Tensor:
        asked.extend(zip(prompts, seeds, strict=True))
        assert (settings["steps"], settings["guidance"], settings["solver"]) == (1, 1.5, "heun")
        return job.samples.images[job.held_out[: len(prompts)]]

    monkeypatch.setattr(job.inference, "generate", generate)
    found = fidelity(job, QUICK | {"seed": 40, "guidance": 1.5, "solver": "heun"})
    first = [(record["caption"], record["seed"]) for record in found.records]
    assert asked[:8] == first and [seed for _, seed in asked] == list(range(40, 52))
    assert [caption for caption, _ in asked[8:]] == [first[0][0]] * 2 + [first[7][0]] * 2, "two captions, twice more"


def test_captions_are_scored_by_the_models_own_encoders(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(dict.fromkeys(job.captions(job.candidates)))
    codes = job.pictures([job.samples.captions.index(name) for name in names])
    codes = codes + 0.02 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    codes = torch.nn.functional.normalize(codes, dim=1)  # captions that fit their pictures about, and others nearly
    monkeypatch.setattr(job, "texts", lambda captions: codes[[names.index(caption) for caption in captions]])
    own = {job.samples.captions[place]: place for place in job.held_out}
    draws(monkeypatch, job, lambda prompts: [own[prompt] for prompt in prompts])
    found = fidelity(job, QUICK | {"limit": 1000})
    cosines = (job.pictures(job.held_out) @ codes.T).double()
    for record, row in zip(found.records, cosines, strict=True):
        truth = row[names.index(record["caption"])]
        assert record["clip_score"] == pytest.approx(100 * max(truth.item(), 0), abs=1e-4)
        rank = float((row > truth).sum() + ((row == truth).sum() - 1) / 2)
        assert record["caption_rank"] == rank
        assert (record["caption_acc1"], record["caption_acc5"]) == (float(rank < 1), float(rank < 5))
    ranks = {record["caption_rank"] for record in found.records}
    assert ranks >= {0, 1}, "the case tells nothing apart"
    assert found.detail["held_out"]["captions"] == len(names)


def test_a_caption_in_fifth_place_is_among_the_first_five_and_not_in_sixth() -> None:
    bank = torch.eye(8)
    queries = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0, 0]]).repeat(3, 1)
    assert _ranks(queries, bank, torch.tensor([0, 4, 5])).tolist() == [0, 4, 5]
    assert _ranks(queries, bank, torch.tensor([6, 7, 7])).tolist() == [6.5] * 3, "a tie counts half"


def test_a_drawing_as_near_as_the_nearest_real_pictures_counts() -> None:
    def at(*places: float) -> Pictures:
        rows = torch.tensor(places)[:, None]
        return Pictures(rows, rows, None)

    records: list[dict[str, Any]] = [{"key": str(n), "caption": "", "seed": n} for n in range(3)]
    train, unseen = at(0.0, 10.0), at(1.0, 9.0, 10.0, 1.0)  # the third is a training picture
    metrics, detail = memorisation(at(1.0, 12.0, 0.5), unseen, train, ["a", "b"], records, pixels_too=False)
    assert metrics["nearer_than_1pct"].value == metrics["nearer_than_5pct"].value == pytest.approx(2 / 3)
    assert metrics["train_distance_ratio"].value == pytest.approx(3.5 / 3)
    assert [record["train_key"] for record in records] == ["a", "b", "a"]
    assert (detail["unseen"], detail["equal_to_train"]) == (3, 1)
    assert [one["key"] for one in detail["features"]["closest"]] == ["2", "0", "1"]
    nothing, detail = memorisation(at(1.0), at(0.0, 10.0), train, ["a", "b"], records[:1], pixels_too=False)
    assert nothing == {} and detail["unseen"] == 0


def test_what_a_model_or_the_shards_cannot_give_is_left_out_and_named(job: Job) -> None:
    blind = without(job, contrastive=None)
    with pytest.raises(ConfigError, match=r"features = self: objectives\.contrastive = None"):
        fidelity(blind, QUICK)
    found = fidelity(blind, QUICK | {"features": "pixels16"})
    assert not BY_CAPTION & set(found.metrics) and found.detail["extractor"]["sha256"] is None
    assert "pixels_train_distance_ratio" not in found.metrics and "train_distance_ratio" in found.metrics
    assert found.detail["left_out"] == {
        "clip_score, caption_acc1, caption_acc5": "the model was trained without contrast"
    }
    alone = Job(job.inference, job.files, job.files)
    found = fidelity(alone, QUICK | {"repeated": 0})
    assert "train_distance_ratio" not in found.metrics and found.detail["held_out"]["floor"] == {}
    reasons = {"no shards named train-*.tar", "repeated = 0", "no other split with enough pictures"}
    assert set(found.detail["left_out"].values()) == reasons
    with pytest.raises(ConfigError, match="captions = train: the shards hold 0 such samples"):
        fidelity(alone, QUICK | {"captions": "train"})
    for task in (fidelity, denoising):
        with pytest.raises(ConfigError, match=r"objectives\.diffusion = None"):
            task(without(job, diffusion=None), {})


def test_another_model_may_be_what_pictures_are_compared_by(job: Job, step: TrainStep, tmp_path: Path) -> None:
    config, tokenizer = job.inference.config, step.model.tokenizer.to_json()
    save_export(tmp_path / "run" / "export", step.state_dict(), config, tokenizer, {"step": "7"})
    own = extractor(job, "self")
    images = job.samples.images[:5]
    same = extractor(job, str(tmp_path / "run"))
    assert same.sha256 == own.sha256 and same.width == own.width == 32
    torch.testing.assert_close(same(images), own(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(own(images).square().mean(1), torch.ones(5))
    assert torch.equal(Measure(job, own)(images).features, own(images))
    asked: list[str] = []

    def read(source: str) -> Any:
        asked.append(source)
        model, extras, changed, note = load_export(tmp_path / "run" / "export")
        next(model.encoders["image"].parameters()).mul_(1.5)
        return model, extras, changed, note

    elsewhere = Job(job.inference, job.files, job.reference, load=read)
    other = extractor(elsewhere, "open_clip:ViT-B-32/openai")
    assert asked == ["open_clip:ViT-B-32/openai"] and other.sha256 != own.sha256
    with pytest.raises(ConfigError, match="no such run folder"):
        extractor(job, str(tmp_path / "nowhere"))
    assert weights_hash(step.model, "text") != own.sha256


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("captions", "heldout", "captions = 'heldout'; did you mean held_out"),
        ("captions", [], "captions = ''; give held_out or train"),
        ("features", "", "features = ''"),
        ("limit", 3, "limit = 3: must be a whole number, at least 5"),
        ("limit", True, "limit = True"),
        ("repeats", 1, "repeats = 1"),
        ("guidance", math.nan, "guidance = nan"),
        ("solver", "ddim", "solver = 'ddim': must be one of euler"),
        ("seed", -1, "seed = -1"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(job: Job, name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fidelity(job, {name: value})


@pytest.mark.parametrize("name", ["fidelity", "denoising"])
def test_the_task_files_say_what_the_defaults_are(root: Path, name: str) -> None:
    from mm.evaluation import drawings

    kind = {"fidelity": drawings, "denoising": module}[name]
    said = tomllib.loads((root / "mm" / "evaluation" / "tasks" / f"{name}.toml").read_text())
    about = {key: said.pop(key) for key in ("name", "kind", "version", "needs")}
    assert about == {"name": name, "kind": name, "version": 1, "needs": ["diffusion"]}
    assert said == kind.DEFAULTS
    assert checked(dict(drawings.DEFAULTS))["captions"] == ["held_out"]


def outcome_by_key(found: Outcome) -> dict[str, dict[str, Any]]:
    return {record["key"]: record for record in found.records}


def test_a_pictures_loss_is_bitwise_the_same_whatever_else_is_measured(job: Job) -> None:
    whole = outcome_by_key(denoising(job, {"limit": 1000, "levels": 3, "quantiles": 2}))
    few = outcome_by_key(denoising(job, {"limit": 3, "levels": 3, "quantiles": 2}))
    assert len(few) == 3 < len(whole) == len(job.held_out)
    assert all(whole[key] == record for key, record in few.items())
    other = outcome_by_key(denoising(job, {"limit": 3, "levels": 3, "quantiles": 2, "seed": 1}))
    assert all(other[key]["loss"] != record["loss"] for key, record in few.items())


def test_the_loss_is_that_of_the_objective_at_each_level(
    job: Job, step: TrainStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective itself, given this task's noise and level instead of its own draws, one picture at a time."""
    found = outcome_by_key(denoising(job, {"limit": 2, "levels": 4, "quantiles": 1}))
    config = job.inference.config.objectives.diffusion
    assert config is not None
    for place in (place for place in job.held_out if job.samples.keys[place] in found):
        record = found[job.samples.keys[place]]
        columns = job.inference.prepare("text", job.captions([place]))
        seed = torch.tensor([sample_seed(0, 0, job.samples.keys[place])])
        batch = Batch({"image": job.samples.images[[place]], "text": columns[0]}, {"text": columns[1]}, seed)
        median = 1 / (1 + math.exp(-config.sigma_mean))  # the one level of a single quantile
        for side, drop in (("", 0.0), ("unconditional_", 1.0)):
            objective = Diffusion(dataclasses.replace(config, copies=1, share=1.0, drop_text=drop, drop_image=1.0))
            for name, sigma in (("loss@0.125", 0.125), ("loss@0.875", 0.875), ("loss", median)):
                monkeypatch.setattr("mm.objectives.diffusion.NOISE", module.NOISE)
                monkeypatch.setattr(
                    Schedule, "training_sigma", lambda self, draws, at=sigma: torch.full_like(draws, at)
                )
                with torch.inference_mode():
                    loss = objective(step.model, batch, step.model.encode(batch))
                monkeypatch.undo()
                assert record[side + name] == pytest.approx(loss.value.item(), rel=1e-4)
        assert record["loss@0.125"] != record["loss@0.875"]


def test_a_denoiser_that_changes_nothing_has_the_loss_that_follows_from_it(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is off by sigma (s eps - x), so its velocity by s eps - x, at every level above the floor of the divisor."""
    denoiser = job.inference.model.denoiser
    assert denoiser is not None
    monkeypatch.setattr(denoiser, "forward", lambda z, *conditions: z)
    found = denoising(job, {"limit": 4, "levels": 5, "quantiles": 3})
    for record in found.records:
        place = job.samples.keys.index(record["key"])
        x = job.inference.model.latents.encode(job.samples.images[[place]])
        noise = normal(torch.tensor([sample_seed(0, 0, record["key"])]), tuple(x.shape[1:]), module.NOISE)
        expected = (noise - x).double().square().mean().item()
        for name in ("loss", "unconditional_loss", "loss@0.100", "loss@0.900"):
            assert record[name] == pytest.approx(expected, rel=1e-5)
        assert record["caption_gain"] == 0
    assert found.metrics["loss"].n == 4 and found.detail["sigma"] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_a_perfect_denoiser_loses_nothing_in_any_space(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Halves(torch.nn.Module):
        """A space of another shape than the pictures."""

        shape = (3, 16, 16)

        def encode(self, pixels: Tensor) -> Tensor:
            return pixels[..., ::2, ::2].float() / 127.5 - 1

    model = job.inference.model
    monkeypatch.setattr(model, "latents", Halves())
    assert model.denoiser is not None
    known: list[Tensor] = []

    def forward(z: Tensor, sigma: Tensor, *conditions: Any) -> Tensor:
        assert z.shape[1:] == (3, 16, 16)
        level = sigma.view(-1, 1, 1, 1)
        return (z - level * torch.cat([known[0], known[0]])) / (1 - level)

    monkeypatch.setattr(model.denoiser, "forward", forward)
    monkeypatch.setattr(module, "normal", lambda seeds, shape, stream: torch.ones(1, *shape))
    known.append(torch.ones(module.BATCH["draw"], 3, 16, 16))
    found = denoising(job, {"limit": 4, "levels": 4, "quantiles": 2})
    assert all(metric.value < 1e-6 for metric in found.metrics.values()) and found.detail["space"] == [3, 16, 16]


def test_training_levels_are_quantiles_of_what_training_draws() -> None:
    schedule = Schedule(sigma_mean=0.3, sigma_std=1.2, shift=2.0)
    drawn = schedule.training_sigma(torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double())
    levels = training_levels(schedule, 8)
    torch.testing.assert_close(levels, drawn.quantile((torch.arange(8) + 0.5).double() / 8), atol=5e-3, rtol=0)
    mean = training_levels(schedule, 64).square().mean()
    assert mean.item() == pytest.approx(drawn.square().mean().item(), abs=2e-3)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("levels", 101), ("levels", 2.5), ("seed", -1)])
def test_levels_that_cannot_be_meant_are_refused(job: Job, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        denoising(job, {name: value})
