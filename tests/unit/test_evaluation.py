"""Numbers of an evaluation are what they say, come out the same twice, and reach both callbacks of a training run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mm.adapters.text import train_tokenizer
from mm.config import ConfigError
from mm.distributed.world import World
from mm.evaluation import run as evaluation
from mm.evaluation.callbacks import callbacks
from mm.evaluation.images import grid, pixel_rank, within, write_whole
from mm.evaluation.retrieval import nearest, recall
from mm.evaluation.run import Share, evaluate, headlines, summary
from mm.evaluation.samples import around, evenly
from mm.models.export import save_export
from mm.objectives.step import TrainStep, build_step
from mm.settings import load as load_config


@pytest.fixture(scope="module")
def step(root: Path) -> TrainStep:
    torch.manual_seed(0)
    config = load_config(root / "configs" / "debug.py")
    return build_step(config, train_tokenizer(["red heart", "blue heart", "cat face"] * 9, 400)).requires_grad_(False)


@pytest.fixture(scope="module")
def run(root: Path, step: TrainStep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = load_config(root / "configs" / "debug.py")
    save_export(folder / "export", step.state_dict(), config, step.model.tokenizer.to_json(), {"step": "7"})
    return folder


def test_whoever_may_read_an_exports_tokenizer_may_read_its_weights(run: Path) -> None:
    modes = {name: (run / "export" / name).stat().st_mode for name in ("tokenizer.json", "model.safetensors")}
    assert modes["model.safetensors"] == modes["tokenizer.json"]


def test_pixel_rank_counts_the_nearer_references() -> None:
    levels = torch.tensor([0, 50, 100, 200], dtype=torch.uint8)
    references = levels.view(4, 1, 1, 1).expand(4, 3, 32, 32)
    generated = torch.full((3, 3, 64, 64), 60, dtype=torch.uint8)  # another size: both are averaged to 16 x 16
    assert pixel_rank(generated, references, torch.tensor([1, 2, 3])).tolist() == [0, 1, 3]
    assert within(torch.tensor([0, 9, 10, 3]), 10) == 0.75


def test_pixel_rank_sees_where_colour_is_and_not_only_its_mean() -> None:
    left, right = torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8)
    left[..., :16], right[..., 16:] = 255, 255
    assert pixel_rank(left, torch.cat([right, left]), torch.tensor([1])).tolist() == [0]


def test_equal_references_count_in_their_order() -> None:
    references = torch.full((20, 3, 16, 16), 9, dtype=torch.uint8)
    drawn = references[:1].expand(20, -1, -1, -1)
    ranks = pixel_rank(drawn, references, torch.arange(20))
    assert ranks.tolist() == list(range(20)) and within(ranks, 10) == 0.5


def test_pixel_rank_agrees_with_sorting_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(0, 256, (131, 3, 48, 48), generator=generator, dtype=torch.uint8)
    truth = torch.randint(0, 131, (70,), generator=generator)
    noise = torch.randint(0, 256, (70, 3, 48, 48), generator=generator).float()
    drawn = (0.1 * references[truth].float() + 0.9 * noise).byte()
    small = [x.float().unflatten(3, (16, 3)).unflatten(2, (16, 3)).mean((3, 5)).flatten(1) for x in (drawn, references)]
    distance = (small[0][:, None] - small[1][None]).square().sum(-1)
    expected = [int((row.argsort() == own).nonzero()) for row, own in zip(distance, truth, strict=True)]
    assert pixel_rank(drawn, references, truth).tolist() == expected and max(expected) > 0


def test_recall_of_shuffled_pairs_is_what_was_shuffled() -> None:
    texts = torch.eye(8)
    images = texts[[0, 1, 2, 3, 4, 5, 7, 6]]
    found = recall(images, texts, ks=(1, 8))
    assert found == {"image_to_text@1": 0.75, "image_to_text@8": 1, "text_to_image@1": 0.75, "text_to_image@8": 1}
    places, cosines = nearest(images[:2], texts, 3)
    assert places[:, 0].tolist() == [0, 1] and cosines[:, 0].tolist() == [1, 1]


def test_a_model_that_maps_all_to_one_point_finds_nothing() -> None:
    same = torch.ones(30, 4) / 2
    assert set(recall(same, same).values()) == {0.0}
    with pytest.raises(ValueError, match="must be pairs"):
        recall(same, same[:3])


def test_standard_error_is_binomial() -> None:
    share = Share.of([True] * 9 + [False] * 27)
    assert (share.value, share.n) == (0.25, 36) and share.error == pytest.approx((0.25 * 0.75 / 36) ** 0.5)


def test_candidates_are_all_splits_beside_one_of_them(openmoji_shards: Path) -> None:
    held_out, everything = around(str(openmoji_shards / "val-*.tar"), None)
    assert {Path(file).name.split("-")[0] for file in held_out} == {"val"}
    assert {Path(file).name.split("-")[0] for file in everything} == {"train", "dev", "val"}
    assert around(str(openmoji_shards / "val-*.tar"), str(openmoji_shards / "val-*.tar"))[1] == held_out
    assert around(str(openmoji_shards / "val-*.tar"), str(openmoji_shards / "*.tar"))[1] == everything
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9] and evenly([1, 2], 4) == [1, 2]


def quick(run: Path, shards: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"limit": 6, "steps": 1, "progress": False, **options}
    return evaluate(run, data=str(shards / "val-*.tar"), tasks=tuple(evaluation.TASKS), **settings)


def test_an_evaluation_counts_what_it_says_and_repeats_itself(run: Path, openmoji_shards: Path, tmp_path: Path) -> None:
    result = quick(run, openmoji_shards, out=tmp_path / "deep" / "results.json")
    assert json.loads((tmp_path / "deep" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert result["candidates"] > result["held_out"] > 5 and result["step"] == 7 and result["run"] == "tiny"
    zero_shot, generation = result["zero_shot"], result["generation"]
    assert zero_shot["held_out_names"]["labels"] <= result["held_out"] < zero_shot["all_names"]["labels"]
    assert zero_shot["held_out_names"]["top1"]["n"] == result["held_out"] == generation["held_out"]["n"]
    plain = sum("skin tone" not in record["caption"] for record in result["samples"])
    assert zero_shot["all_names_without_skin_tones"]["top1"]["n"] == plain < result["held_out"]
    assert generation["train"]["n"] == 6 and generation["references"] == result["candidates"]
    for record in result["samples"]:
        assert len(record["held_out_names"]) == 5 and 0 <= record["drawing_rank"] < result["candidates"]
    top1 = sum(record["all_names"][0] == record["caption"] for record in result["samples"]) / result["held_out"]
    assert zero_shot["all_names"]["top1"]["value"] == pytest.approx(top1)
    assert str(openmoji_shards) not in json.dumps(result), "a path of this machine"
    again = quick(run, openmoji_shards)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert len(headlines(result)) == 7 and "zero-shot top-1, all names" in summary(result)


def test_a_model_that_knows_the_answers_gets_full_marks(
    run: Path, openmoji_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    code = torch.nn.functional.normalize(torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)), dim=1)

    def number(text: str) -> int:
        if text not in captions:
            captions.append(text)
        return captions.index(text)

    monkeypatch.setattr(evaluation.Job, "texts", lambda job, texts: code[[number(text) for text in texts]])
    monkeypatch.setattr(
        evaluation.Job, "pictures", lambda job, places: code[[number(text) for text in job.captions(places)]]
    )
    pictures: dict[str, torch.Tensor] = {}
    read = evaluation.samples.read_samples

    def remember(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        pictures.update(zip(found.captions, found.images, strict=True))
        return found

    monkeypatch.setattr(evaluation.samples, "read_samples", remember)
    monkeypatch.setattr(
        evaluation.Inference, "generate", lambda self, prompts, **_: torch.stack([pictures[p] for p in prompts])
    )
    result = quick(run, openmoji_shards)
    values = {name: share.value for name, share in headlines(result).items()}
    assert set(values.values()) == {1.0}, values
    assert result["retrieval"]["image_to_text@1"] == 1


def test_what_cannot_be_evaluated_is_refused(run: Path, openmoji_shards: Path, tmp_path: Path) -> None:
    val = str(openmoji_shards / "val-*.tar")
    with pytest.raises(ConfigError, match="no task 'zeroshot'; did you mean zero_shot"):
        evaluate(run, data=val, tasks=("zeroshot",))
    with pytest.raises(ConfigError, match="no shard at"):
        evaluate(run, data=str(tmp_path / "val-*.tar"))
    with pytest.raises(ConfigError, match="not a run folder"):
        evaluate(tmp_path, data=val)
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate(run, data=val, limit=0)


def test_callbacks_measure_and_draw_the_model_of_the_run(
    root: Path, step: TrainStep, openmoji_shards: Path, tmp_path: Path
) -> None:
    config = load_config(root / "configs" / "debug.py")
    assert callbacks(config) == [], "nothing to look at without data.val"
    config.data.val, config.run.eval_every = str(openmoji_shards / "val-*.tar"), 5
    extras = {name: tensor for name, tensor in step.state_dict().items() if name.startswith("objectives.")}
    context = SimpleNamespace(
        model=step.model, config=config, extras=lambda: extras, run_dir=tmp_path, step=100, world=World()
    )
    state = torch.get_rng_state()
    measure, draw = callbacks(config)
    assert (measure.every, draw.every) == (5, 0)
    found = measure.whole(context, [measure.part(context)])
    assert set(found) == {"val/top1"} and 0 <= found["val/top1"] <= 1
    assert draw.whole(context, [draw.part(context)]) == {}
    path = tmp_path / "samples" / "step-00000100.png"
    first = path.read_bytes()
    assert Image.open(path).width > 8 * 96 and [entry.name for entry in path.parent.iterdir()] == [path.name]
    parts = []
    for rank in range(2):  # two processes draw the same
        context.world = World(rank, 2)
        parts.append((measure.part(context), draw.part(context)))
    path.unlink()
    context.world = World()
    draw.whole(context, [part for _, part in parts])
    assert path.read_bytes() == first
    assert measure.whole(context, [part for part, _ in parts]) == found
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers moved"
    config.data.val = str(tmp_path / "nothing-*.tar")
    with pytest.raises(ConfigError, match="no shard at"):
        callbacks(config)


def test_a_grid_keeps_pixels_and_places() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    sheet = grid([[red, None], [None, blue]], scale=3, gap=2)
    assert sheet.size == (2 * 14 + 2, 2 * 14 + 2)
    assert sheet.getpixel((3, 3)) == (255, 0, 0) and sheet.getpixel((25, 25)) == (0, 0, 255)
    assert sheet.getpixel((25, 3)) == (255, 255, 255)
    named = grid([[red]], scale=20, captions=[["a very long caption that cannot fit under it"]])
    assert named.height > named.width
    with pytest.raises(ValueError, match="no pictures"):
        grid([[None]])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a" / "x.json", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a" / "x.json", b"new")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]
    assert (tmp_path / "a" / "x.json").read_bytes() == b"old"


def test_without_tasks_what_the_model_can_do_is_measured(step: TrainStep, openmoji_shards: Path, root: Path) -> None:
    config = load_config(root / "configs" / "debug.py")
    config.objectives.diffusion = None
    extras = {name: tensor for name, tensor in step.state_dict().items() if name.startswith("objectives.contrastive")}
    data = str(openmoji_shards / "val-*.tar")
    known = (step.model, extras, config, {})
    found = evaluate("other:model", data=data, tasks=None, limit=6, progress=False, load=lambda _: known)
    assert "zero_shot" in found
    assert "generation" not in found
