"""Label weights are made once and kept, by what they follow from; temperatures are fitted; shards stream through."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import load_random, pictures, save_random, tiny
from tiny_clips import tiny_clip

import mm
from mm.api import LoadedModel
from mm.config import ConfigError
from mm.evaluation import label_cache, label_weights
from mm.evaluation.calibration import expected_calibration_error
from mm.evaluation.label_cache import LabelCache
from mm.evaluation.label_weights import LabelWeights
from mm.evaluation.vocabulary import read_labels, read_templates
from mm.evaluation.zero_shot import classifier
from mm.interop.release import release
from tars import END, member, sample

LABELS = [f"label {n}" + " and more" * (n % 3) for n in range(11)]
TEMPLATES = ["an emoji of {}", "{}", "{} or {}"]


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("runs") / "tiny", tiny(root))


@pytest.fixture
def model(run: Path) -> LoadedModel:
    return mm.load(str(run), device="cpu")


@contextmanager
def counted(model: LoadedModel) -> Iterator[list[int]]:
    """Texts that went through the text encoder, a number a call."""
    calls: list[int] = []
    encoder = model.inference.model.encoders["text"]
    hook = encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0].x)))
    yield calls
    hook.remove()


# -- the words


def test_published_sets_are_open_clips() -> None:
    from open_clip import zero_shot_metadata as published

    assert read_labels("imagenet") == list(published.IMAGENET_CLASSNAMES)
    for name, made in (
        ("openai", published.OPENAI_IMAGENET_TEMPLATES),
        ("simple", published.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [text.replace("{}", "cat") for text in read_templates(name)] == [template("cat") for template in made]
    assert len(read_templates("openai")) == 80 and len(read_templates("simple")) == 7
    assert not any("{}" in text.replace("{}", "") for text in read_templates("openai"))


def test_a_label_twice_is_refused_unless_its_place_has_a_meaning() -> None:
    with pytest.raises(ValueError, match=r"labels\[2\] = 'cat ': is labels\[0\] again"):
        read_labels(["cat", "dog", "cat "])
    assert read_labels(["cat", "cat"], repeats=True) == ["cat", "cat"]


# -- weights


@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1]])
def test_weights_are_the_mean_of_unit_embeddings_whatever_is_encoded_at_once(
    model: LoadedModel, templates: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model.classifier(LABELS, templates).weights
    expected = []
    for label in LABELS:
        found = model.encode(text=[template.replace("{}", label) for template in templates])["text"].double()
        mean = (found / found.norm(dim=1, keepdim=True)).mean(0)
        expected.append(mean / mean.norm())
    torch.testing.assert_close(weights.double(), torch.stack(expected), atol=1e-6, rtol=0)
    monkeypatch.setattr(label_weights, "TEXTS", 10)  # several slices
    assert torch.equal(label_weights.encode_labels(model.inference, LABELS, templates), weights)
    alone = model.classifier(LABELS[7:8], templates).weights
    assert torch.equal(alone[0], weights[7]), "a label's bits depend on its company"


def test_weights_of_a_clip_are_those_that_open_clip_makes(tmp_path: Path) -> None:
    import open_clip
    from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES

    theirs, name = tiny_clip(tmp_path / "clip")
    labels, tokenizer = read_labels("imagenet")[::101], open_clip.SimpleTokenizer(context_length=16)
    expected = open_clip.build_zero_shot_classifier(theirs, tokenizer, labels, SIMPLE_IMAGENET_TEMPLATES).T
    weights = mm.load(name, device="cpu").classifier(labels, "simple").weights
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=0)  # float32, another order of sums


def test_memory_holds_a_slice_of_texts_at_a_time(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = model.inference.encode
    monkeypatch.setattr(label_weights, "TEXTS", 64)
    monkeypatch.setattr(
        model.inference, "encode", lambda name, raw, **more: sizes.append(len(raw)) or encode(name, raw, **more)
    )
    model.classifier([f"label {n}" for n in range(50)], [f"{n} {{}}" for n in range(8)])
    assert max(sizes) == 64 and sum(sizes) == 400


def test_labels_asked_for_again_do_not_touch_the_text_encoder(model: LoadedModel, tmp_path: Path) -> None:
    with counted(model) as calls:
        first = model.classifier(LABELS, TEMPLATES)
        assert calls
        calls.clear()
        again = model.classifier(LABELS, TEMPLATES, temperature=2.0, cache=tmp_path)
        assert calls == [] and torch.equal(again.weights, first.weights)
        model.classifier(LABELS[::-1], TEMPLATES)
        assert calls


def test_what_is_kept_in_memory_is_bounded(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_weights, "KEPT_BYTES", 4 * 32 * 5)  # five labels
    kept = LabelWeights(model.inference)
    for words in (["a", "b"], ["c", "d"], ["a", "b"], ["e", "f"]):
        kept.get(words, ["{}"])
    with counted(model) as calls:
        kept.get(["a", "b"], ["{}"])  # used last before e and f
        assert calls == []
        kept.get(["c", "d"], ["{}"])
        assert calls != []


def test_the_disk_answers_a_run_and_its_release_without_the_text_encoder(
    run: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    images = pictures(3)
    with counted(model) as calls:
        fresh = model.classifier(LABELS, TEMPLATES, cache=True)
        assert calls
    (path,) = (tmp_path / "cache" / "labels").iterdir()
    release(str(run), str(tmp_path / "released"), format="mm")
    for source in (run, tmp_path / "released"):
        other = mm.load(str(source), device="cpu")
        with counted(other) as calls:
            kept = other.classifier(LABELS, TEMPLATES, cache=True)
            assert torch.equal(kept.weights, fresh.weights) and torch.equal(kept(images), fresh(images))
            assert calls == []
    assert list(path.parent.iterdir()) == [path]


def test_another_model_template_or_precision_is_another_entry(root: Path, model: LoadedModel, tmp_path: Path) -> None:
    def entries() -> int:
        return len(list(tmp_path.glob("*.safetensors")))

    model.classifier(LABELS, TEMPLATES, cache=tmp_path)
    model.classifier(LABELS, TEMPLATES[:2], cache=tmp_path)
    model.classifier([*LABELS[:-1], "label 10 and"], TEMPLATES, cache=tmp_path)
    assert entries() == 3
    model.inference.bf16 = True
    model.classifier(LABELS, TEMPLATES, cache=tmp_path)
    assert entries() == 4
    changed = load_random(tmp_path / "other", tiny(root))
    with torch.no_grad():
        next(changed.inference.model.encoders["text"].parameters()).view(-1)[5] += 1
    changed.classifier(LABELS, TEMPLATES, cache=tmp_path)
    assert entries() == 5


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "other shape", "too large", "not unit"])
def test_a_damaged_entry_is_made_anew(model: LoadedModel, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    fresh = model.classifier(LABELS, cache=tmp_path).weights.clone()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other shape":
        save_file({"weights": fresh[:5]}, path)
    elif damage == "not unit":  # a file of the right shape that nobody vouches for
        save_file({"weights": 3 * fresh}, path, {"mm": "{}"})
    else:
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        much = whole + bytes(1 << 17)
        path.write_bytes(
            {"cut": whole[:-40], "bit": flipped, "empty": b"", "text": b"x" * 99, "too large": much}[damage]
        )
    kept = LabelWeights(model.inference)
    with counted(model) as calls:
        assert torch.equal(kept.get(LABELS, ["{}"], cache=tmp_path), fresh) and calls
    assert path.read_bytes() == whole, "the entry was not mended"


def test_the_folder_stays_below_its_limit_and_the_oldest_go(tmp_path: Path) -> None:
    one = torch.nn.functional.normalize(torch.randn(2000, 32), dim=1)  # 256 kB
    cache = LabelCache(tmp_path, limit_bytes=1 << 20)
    (tmp_path / "notes.txt").write_text("not ours")
    keys = [f"{number:040x}" for number in range(8)]
    for number, key in enumerate(keys):
        cache.write(key, one)
        os.utime(cache.path(key), (number, number))
        if number == 3:
            assert cache.read(keys[0], (2000, 32)) is not None  # used again: now the newest
    there = [key for key in keys if cache.has(key)]
    assert there == [keys[0], *keys[5:]]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 1 << 20
    assert (tmp_path / "notes.txt").is_file()
    cache.write("f" * 40, torch.zeros(20000, 32))  # alone over the limit: not kept, and nothing goes for it
    assert not cache.has("f" * 40) and [key for key in keys if cache.has(key)] == there


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / f".{'0' * 40}.safetensors.abc"
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))
    LabelCache(tmp_path).write("1" * 40, torch.ones(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["1" * 40 + ".safetensors"]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with counted(model) as calls, pytest.raises(ConfigError, match="cache = .*cannot be written"):
        model.classifier(LABELS, cache=tmp_path / "file" / "labels")
    assert calls == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label_cache, "write_whole", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        model.classifier(LABELS, cache=tmp_path / "new")


# -- probabilities


def test_temperature_divides_the_logits_and_one_changes_no_bit(model: LoadedModel) -> None:
    images = pictures(5)
    embeddings = model.encode(image=images)["image"]
    plain, warm = model.classifier(LABELS), model.classifier(LABELS, temperature=4.0)
    assert torch.equal(model.classifier(LABELS, temperature=1.0)(images), plain(images))
    torch.testing.assert_close(warm.logits(embeddings) * 4, plain.logits(embeddings))
    torch.testing.assert_close(warm(images), (plain.logits(embeddings) / 4).softmax(1))
    assert warm.top(images[0], 1)[0][0] == plain.top(images[0], 1)[0][0]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_calibration_fits_a_temperature_and_reports_both_errors(root: Path, tmp_path: Path, kind: str) -> None:
    config = tiny(root)
    assert config.objectives.contrastive is not None
    config.objectives.contrastive.kind = kind  # type: ignore[assignment]
    model = load_random(tmp_path / "run", config)
    classify = model.classifier(LABELS[:6])
    images = pictures(90)
    embeddings = model.encode(image=images)["image"]
    truth = torch.multinomial((classify.logits(embeddings) / 3).softmax(1), 1, generator=torch.Generator())[:, 0]
    before = expected_calibration_error(classify(images), truth)
    found = classify.calibrate(images, truth)
    assert classify.temperature == found.temperature != 1.0 and found.n == 90
    assert found.ece_before == before and found.nll_after < found.nll_before
    assert found.ece_after == expected_calibration_error(classify(images), truth)
    assert str(found).count("->") == 2
    named = model.classifier(LABELS[:6])
    assert named.calibrate(embeddings, [LABELS[place] for place in truth.tolist()]) == found
    with pytest.raises(ValueError, match="'cow' is none of the 6 labels"):
        named.calibrate(embeddings[:1], ["cow"])
    with pytest.raises(ValueError, match=r"must be \[N, 32\]"):
        named.calibrate(embeddings[:, :5], truth)
    assert named.temperature == found.temperature


# -- shards


def test_a_stream_says_of_each_sample_what_a_call_says(model: LoadedModel, openmoji_shards: Path) -> None:
    classify = model.classifier(LABELS, TEMPLATES)
    stream = classify.stream(str(openmoji_shards), k=3, captions="txt", members=["json"])
    found = list(stream)
    assert len(found) == len(stream) and [one.key for one in found] == [one.key for one in stream]
    assert {Path(one.shard).name.split("-")[0] for one in found} == {"train", "dev", "val"}
    for one in found[:: len(found) // 7]:
        with tarfile.open(one.shard) as tar:
            data = {name: tar.extractfile(f"{one.key}.{name}") for name in ("png", "txt")}
            assert data["png"] is not None and data["txt"] is not None
            with Image.open(data["png"]) as picture:
                assert classify.top(picture, 3) == one.top
            assert one.captions == [data["txt"].read().decode().strip()] and one.members["json"].startswith(b"{")
    with_workers = classify.stream(str(openmoji_shards / "val-*.tar"), k=3, captions="txt", members=["json"], workers=1)
    assert list(with_workers) == [one for one in found if "/val-" in one.shard]


def test_a_stream_leaves_out_what_it_cannot_use_and_says_why(model: LoadedModel, tmp_path: Path) -> None:
    bad = member("bad.png", b"no picture") + member("bad.txt", b"text")
    (tmp_path / "a.tar").write_bytes(sample("one") + bad + sample("two", 2) + END)
    stream = model.classifier(["a", "b"]).stream([str(tmp_path / "a.tar")], k=9)
    assert [(one.key, len(one.top), one.captions, one.members) for one in stream] == [
        ("one", 2, [], {}),
        ("two", 2, [], {}),
    ]
    assert [entry.key for entry in stream.lost] == ["bad"]
    (tmp_path / "b.tar").write_bytes(bad + END)
    with pytest.raises(ConfigError, match="none of 1 samples can be used; bad: "):
        list(model.classifier(["a", "b"]).stream(str(tmp_path / "b.tar")))


def test_a_stream_draws_no_random_number_of_the_callers(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(sample("one") + END)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(model.classifier(["a"]).stream(str(tmp_path / "a.tar")))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit = 0"),
        ({"limit": -3}, "limit = -3"),
        ({"workers": -1}, "workers = -1"),
        ({"workers": 1.5}, "workers = 1.5"),
        ({"k": 0}, "k = 0"),
        ({"k": True}, "k = True"),
        ({"members": "cls"}, r"write \['cls'\]"),
        ({"members": ["../x"]}, "no extension"),
        ({"captions": "text"}, "no place for a caption"),
        ({"shards": ""}, "nothing is named"),
        ({"shards": "/nowhere/*.tar"}, "no shard at"),
    ],
)
def test_a_stream_that_cannot_be_meant_is_refused(
    model: LoadedModel, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    (tmp_path / "a.tar").write_bytes(sample("one") + END)
    given = {"shards": str(tmp_path / "a.tar"), **options}
    with pytest.raises(ValueError, match=words) as caught:
        list(model.classifier(["a"]).stream(**given))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# -- modes


def test_another_mode_is_given_the_labels_and_the_contrastive_classifier(
    root: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    calls: list[tuple[object, dict[str, object]]] = []
    module = types.ModuleType("mm.evaluation.by_drawing")
    vars(module)["classifier"] = lambda base, inference, **options: calls.append((base, options))
    monkeypatch.setitem(sys.modules, "mm.evaluation.by_drawing", module)
    model.classifier(["a", "b"], mode="hybrid", temperature=2.0, draws=3)
    base, options = calls.pop()
    assert getattr(base, "temperature", None) == 2.0 and getattr(base, "labels", None) == ["a", "b"]
    assert options == {"mode": "hybrid", "progress": False, "draws": 3}
    config = tiny(root)
    config.objectives.contrastive = None
    bare = load_random(tmp_path / "bare", config)
    bare.classifier(["a"], ["an {}"], mode="diffusion")
    assert calls.pop() == (None, {"mode": "diffusion", "progress": False, "labels": ["a"], "templates": ["an {}"]})
    with pytest.raises(ConfigError, match="cannot classify"):
        bare.classifier(["a"], mode="hybrid")


def test_a_list_with_repeats_keeps_its_places(model: LoadedModel) -> None:
    twice = classifier(model.inference, ["a", "b", "a"], repeats=True)
    assert torch.equal(twice.weights[0], twice.weights[2]) and len(twice.labels) == 3
    assert np.allclose(twice(pictures(1)).sum(), 1)
