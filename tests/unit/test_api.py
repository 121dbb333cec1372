"""A loaded model gives each item the same result whatever else is in the call, and refuses what cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mm
from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.config import ConfigError, TrainConfig
from mm.evaluation import packed
from mm.models.export import SHIPPED, save_export
from mm.objectives.step import build_step
from mm.settings import load as load_config
from mm.types import Batch

WORDS = ["red heart", "blue heart", "cat face", "a dog that runs", "flag", "the sun behind a small cloud", "", "x y z"]


def tiny(root: Path) -> TrainConfig:
    return load_config(root / "configs" / "debug.py")


def export(root: Path, folder: Path, config: TrainConfig) -> Path:
    """A random model as a run folder; what starts at zero is filled in, or nothing would depend on anything."""
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(WORDS * 4, config.model.text.vocab_size))
    with torch.no_grad():
        for parameter in step.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    tokenizer = step.model.tokenizer.to_json()
    save_export(folder / "export", step.state_dict(), config, tokenizer, {"step": "7"})
    return folder


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(root, tmp_path_factory.mktemp("runs") / "tiny", tiny(root))


@pytest.fixture(scope="module")
def model(run: Path) -> LoadedModel:
    return mm.load(str(run), device="cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pictures(count: int, size: int = 40) -> list[Image.Image]:
    pixels = np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


@pytest.mark.parametrize("bf16", [False, True])
def test_an_embedding_is_bitwise_the_same_alone_in_a_batch_and_in_any_place(
    model: LoadedModel, threads: int, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.inference, "bf16", bf16)
    images, texts = pictures(37), [f"{WORDS[n % 6]} {n}" + " and more" * (n % 4) for n in range(70)]
    together = model.encode(image=images, text=texts)
    assert together["image"].shape == (37, 32) and together["text"].shape == (70, 32)
    torch.testing.assert_close(together["image"].norm(dim=1), torch.ones(37))
    assert len(together["text"].unique(dim=0)) > 60, "the model ignores its input"
    for place in (0, 5, 31, 36):
        assert torch.equal(model.encode(image=[images[place]])["image"][0], together["image"][place])
        assert torch.equal(model.encode(text=[texts[place]])["text"][0], together["text"][place])
    backwards = model.encode(image=images[::-1], text=texts[::-1])
    assert torch.equal(backwards["image"].flip(0), together["image"])
    assert torch.equal(backwards["text"].flip(0), together["text"])


def test_matrices_packed_for_bf16_change_no_bit_and_follow_the_weights(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mm.load(str(run), device="cpu")
    model.inference.bf16 = True
    images = pictures(5)

    def both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = model.encode(image=images, text=WORDS)
        with monkeypatch.context() as patch:
            patch.setattr(packed, "_can", lambda encoder: False)
            return found, model.encode(image=images, text=WORDS)

    before = both()
    with torch.no_grad():
        for encoder in model.inference.model.encoders.values():
            encoder.blocks[0].fc1.weight.mul_(1.5)
    after = both()
    for name in ("image", "text"):
        assert torch.equal(before[0][name], before[1][name]) and torch.equal(after[0][name], after[1][name])
        assert not torch.equal(before[0][name], after[0][name])


def test_loading_draws_no_random_number(run: Path) -> None:
    state = torch.random.get_rng_state()
    mm.load(str(run), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_short_texts_are_encoded_without_most_of_their_padding_and_come_out_as_with_it(model: LoadedModel) -> None:
    texts = ["x y z", "red heart x y z", "a b c d e f g h i j k l m n o p", "flag", ""]
    widths = []
    encoder = model.inference.model.encoders["text"]
    hook = encoder.register_forward_pre_hook(lambda module, args: widths.append(args[0].x.shape[1]))
    short = model.encode(text=texts)["text"]
    hook.remove()
    assert widths == [4, 8, 16]
    ids, lengths = model.inference.prepare("text", texts)
    batch = Batch({"text": ids}, {"text": lengths})
    with torch.inference_mode():
        padded = model.inference.model.encode(batch)["text"].pooled
    torch.testing.assert_close(short, padded, atol=1e-6, rtol=0)


def test_a_picture_is_bitwise_the_same_alone_in_a_batch_and_in_any_place(model: LoadedModel, threads: int) -> None:
    prompts, seeds = [WORDS[n % 8] for n in range(11)], [100 + n for n in range(11)]
    together = [np.asarray(image) for image in model.generate(prompts, seeds=seeds, steps=3)]
    assert len({array.tobytes() for array in together}) == 11
    for place in (0, 6, 7, 8, 10):
        alone = model.generate([prompts[place]], seeds=[seeds[place]], steps=3)[0]
        assert np.array_equal(np.asarray(alone), together[place])
    backwards = model.generate(prompts[::-1], seeds=seeds[::-1], steps=3)
    assert all(np.array_equal(a, b) for a, b in zip(together, map(np.asarray, backwards[::-1]), strict=True))


def test_latents_agree_before_they_are_rounded_to_pixels(
    model: LoadedModel, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.inference.model.latents, "decode", lambda latents: latents)
    prompts, seeds = [WORDS[n % 8] for n in range(9)], list(range(9))
    together = model.inference.generate(prompts, seeds=seeds, steps=2)
    for place in (1, 7, 8):
        alone = model.inference.generate([prompts[place]], seeds=[seeds[place]], steps=2)[0]
        assert torch.equal(alone, together[place])


def test_probabilities_are_bitwise_the_same_alone_and_in_a_batch(model: LoadedModel, threads: int) -> None:
    classify = model.classifier([f"label {n}" for n in range(37)], templates=["an emoji of {}", "{}"])
    images = pictures(35)
    together = classify(images)
    assert together.shape == (35, 37)
    for place in (0, 17, 34):
        assert torch.equal(classify([images[place]])[0], together[place])


def test_prompt_seed_image_and_guidance_each_change_the_picture(model: LoadedModel) -> None:
    def draw(prompt: str | None = "red heart", seed: int = 0, **options: object) -> bytes:
        return model.generate([prompt], seeds=[seed], steps=2, **options)[0].tobytes()  # type: ignore[arg-type]

    base = draw()
    assert draw() == base
    image = pictures(1)
    different = [draw("cat face"), draw(seed=1), draw(images=image), draw(guidance=1.0), draw(None)]
    different.append(draw(solver="heun"))
    assert base not in different
    assert draw(images=[None]) == base
    assert draw(None, images=image) != draw(None)
    assert draw("") == draw(None)
    assert draw(None) == draw(None, guidance=1.0), "with nothing shown, guidance has nothing to do"


def test_seeds_are_counted_from_0_by_default(model: LoadedModel) -> None:
    first, second = model.generate(["flag", "flag"], steps=2), model.generate(["flag", "flag"], seeds=[0, 1], steps=2)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert model.generate([]) == [] and first[0].size == (32, 32)


def test_token_ids_and_their_text_give_the_same_embedding(model: LoadedModel) -> None:
    columns = model.inference.prepare("text", WORDS[:3])
    longest = int(columns[1].max())
    ids = columns[0][:, :longest].to(torch.int32)  # less padding, another dtype
    assert torch.equal(model.encode(text=ids)["text"], model.encode(text=WORDS[:3])["text"])


def test_embeddings_can_be_used_under_autograd(model: LoadedModel) -> None:
    weight = torch.ones(32, requires_grad=True)
    (model.encode(text=["a"])["text"] * weight).sum().backward()
    assert weight.grad is not None and weight.grad.any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate(["a", "b"], seeds=[0]), "seeds: 1 given for 2 prompts"),
        (lambda model: model.generate(["a"], images=[]), "images: 0 given for 1 prompts"),
        (lambda model: model.generate("red heart"), r"write \['red heart'\]"),
        (lambda model: model.generate(["a"], steps=0), "steps = 0: must be at least 1"),
        (lambda model: model.generate(["a"], guidance=float("nan")), "guidance = nan"),
        (lambda model: model.generate(["a"], solver="rk4"), "solver = 'rk4'"),
        (lambda model: model.generate([3]), r"prompts\[0\]: must be a text or None"),
        (lambda model: model.generate(["a"], seeds=[2**63]), "63 bits"),
        (lambda model: model.encode(imge=[]), "imge: not a modality .* did you mean image"),
        (lambda model: model.encode(text="a cat"), "text: must be a list"),
        (lambda model: model.encode(image=[*pictures(1), "cat.png"]), r"image\[1\]: an image must be a PIL.Image"),
        (lambda model: model.encode(text=torch.zeros(2, 99, dtype=torch.int64)), "L at most 16"),
        (lambda model: model.encode(text=torch.zeros(2, 4)), "must be integers"),
        (lambda model: model.encode(text=torch.full((1, 4), 10**6)), "must be from 0 to"),
        (lambda model: model.encode(text=torch.zeros(1, 4, dtype=torch.int64)), "only padding"),
        (lambda model: model.classifier([]), "nothing to choose from"),
        (lambda model: model.classifier(["cat", "  "]), r"labels\[1\] = '  ': is blank"),
        (lambda model: model.classifier("cat"), r"write \['cat'\]"),
        (lambda model: model.classifier(["cat"], templates=["an emoji"]), r"has no {} where the label goes"),
        (lambda model: model.classifier(["cat"])(["x.png"]), r"image\[0\]: an image must be"),
        (lambda model: model.classifier(["cat"]).top(pictures(1)[0], k=0), "k = 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(model: LoadedModel, call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_a_run_folder_and_its_export_load_alike(run: Path, model: LoadedModel) -> None:
    released = mm.load(str(run / "export"), device="cpu")
    assert torch.equal(released.encode(text=["flag"])["text"], model.encode(text=["flag"])["text"])
    assert released.note["step"] == "7"


def test_what_cannot_be_loaded_is_refused_with_what_is_near(run: Path, tmp_path: Path, root: Path) -> None:
    for source, words in [
        (run.parent / "tinny", f"did you mean {run}"),
        (run.parent, "holds the runs tiny"),
        (tmp_path / "no" / "such", "does not exist either"),
        (root / "README.md" if (root / "README.md").exists() else root / "Makefile", "is a file"),
        ("openclip:ViT-B-32/openai", "did you mean open_clip"),
    ]:
        with pytest.raises(ConfigError, match=words):
            mm.load(str(source))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no export/ yet"):
        mm.load(str(tmp_path))
    with pytest.raises(ConfigError, match="device = 'tpu'"):
        mm.load(str(run), device="tpu")


def test_the_shipped_name_is_a_folder_of_its_own(
    run: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHIPPED, "openmoji", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    Path("openmoji").mkdir()
    with pytest.raises(ConfigError, match="openmoji: does not come with this copy"):
        mm.load("openmoji")
    with pytest.raises(ConfigError, match="openmoji: not a run folder"):  # of the user's, by its path
        mm.load("./openmoji")
    monkeypatch.setitem(SHIPPED, "openmoji", run / "export")
    shipped = mm.load("openmoji", device="cpu")
    assert torch.equal(shipped.encode(text=["flag"])["text"], model.encode(text=["flag"])["text"])


def test_a_model_without_an_objective_says_so(root: Path, tmp_path: Path) -> None:
    config = tiny(root)
    config.objectives.diffusion = None
    with pytest.raises(ConfigError, match="cannot draw"):
        mm.load(str(export(root, tmp_path / "a", config)), device="cpu").generate(["a"])
    config = tiny(root)
    config.objectives.contrastive = None
    with pytest.raises(ConfigError, match="cannot classify"):
        mm.load(str(export(root, tmp_path / "b", config)), device="cpu").classifier(["a"])


def test_probabilities_are_of_the_kind_that_was_trained(root: Path, tmp_path: Path, model: LoadedModel) -> None:
    image = pictures(1)
    assert float(model.classifier(["a", "b"])(image).sum()) == pytest.approx(1)
    config = tiny(root)
    assert config.objectives.contrastive is not None
    config.objectives.contrastive.kind = "sigmoid"
    sigmoid = mm.load(str(export(root, tmp_path / "run", config)), device="cpu")
    one, two = sigmoid.classifier(["a"])(image), sigmoid.classifier(["a", "b"])(image)
    assert torch.equal(one[:, 0], two[:, 0]), "each label by itself"
    cosine = float(sigmoid.encode(image=image)["image"][0] @ sigmoid.encode(text=["a"])["text"][0])
    assert float(one) == pytest.approx(torch.tensor(10 * cosine - 10).sigmoid().item(), rel=1e-4)


def test_templates_are_averaged_on_the_sphere(model: LoadedModel) -> None:
    both = model.classifier(["cat {0}"], templates=["{}", "an emoji of {}"]).weights
    parts = model.encode(text=["cat {0}", "an emoji of cat {0}"])["text"]
    torch.testing.assert_close(both[0], torch.nn.functional.normalize(parts.mean(0), dim=-1))
    top = model.classifier(["a", "b", "c"]).top(pictures(1)[0], k=5)
    assert len(top) == 3 and [p for _, p in top] == sorted((p for _, p in top), reverse=True)
