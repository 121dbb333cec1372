"""CLIP_benchmark's layout is read as it is, and its numbers come out digit for digit, of an independent computation."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clips import tiny_clip
from wds import classification, picture, retrieval

from mm.commands_evaluate import elsewhere
from mm.evaluation.retrieval import found_within, own_rows
from mm.evaluation.run import evaluate

NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog")]
TEMPLATES = ["a photo of a {c}.", "{c}", "a drawing of one {c}, and of the {c}"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model", seed=3)


def measured(name: str, data: Path, **options: Any) -> dict[str, Any]:
    return evaluate(name, data=str(data), precision="fp32", progress=False, load=elsewhere, **options)


def read_plainly(folder: Path, extension: str) -> tuple[list[bytes], list[str]]:
    """All pictures and texts of the test split, in order, by tarfile."""
    found: dict[str, list[bytes]] = {"png": [], extension: []}
    for number in range(int((folder / "test" / "nshards.txt").read_text())):
        with tarfile.open(folder / "test" / f"{number}.tar") as tar:
            for one in tar:
                file = tar.extractfile(one)
                assert file is not None
                found[one.name.rpartition(".")[2]].append(file.read())
    return found["png"], [text.decode() for text in found[extension]]


def encode_images(model: Any, pictures: list[bytes]) -> torch.Tensor:
    """As open_clip does: pixels to [0, 1], less its mean, over its deviation."""
    from PIL import Image

    arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255 for data in pictures]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    batch = torch.from_numpy((np.stack(arrays) - np.float32(mean)) / np.float32(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return torch.nn.functional.normalize(model.encode_image(batch.float()), dim=-1)


def encode_texts(model: Any, texts: list[str]) -> torch.Tensor:
    import open_clip

    tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
    with torch.no_grad():
        return torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)


def test_classification_equals_a_plain_computation_to_the_last_digit(clip: tuple[Any, str], tmp_path: Path) -> None:
    model, name = clip
    labels = np.random.default_rng(0).choice(6, 90, p=[0.4, 0.2, 0.2, 0.1, 0.1, 0.0]).tolist()  # one never occurs
    folder = classification(tmp_path / "wds_pets", labels, NAMES, TEMPLATES)
    result = measured(name, folder, out=tmp_path / "out.json")

    pictures, texts = read_plainly(folder, "cls")
    truth = [int(text) for text in texts]
    weights = []
    for label in NAMES:
        each = encode_texts(model, [template.format(c=label) for template in TEMPLATES])
        weights.append(each.mean(0) / each.mean(0).norm())
    scores = encode_images(model, pictures) @ torch.stack(weights).T
    order = [sorted(range(6), key=lambda c: -row[c]) for row in scores.tolist()]
    first = [places[0] for places in order]
    right = [guess == true for guess, true in zip(first, truth, strict=True)]
    recalls = []
    for c in range(6):
        own = [hit for hit, true in zip(right, truth, strict=True) if true == c]
        recalls += [sum(own) / len(own)] if own else []
    expected = {
        "acc1": sum(right) / 90,
        "acc5": sum(true in places[:5] for true, places in zip(truth, order, strict=True)) / 90,
        "mean_per_class_recall": float(np.mean(recalls)),
    }
    for k in (4, 6):  # so that one label more or less would show
        assert sum(true in places[:k] for true, places in zip(truth, order, strict=True)) != 90 * expected["acc5"]
    (row,) = result["tasks"]
    assert {metric: row["metrics"][metric] for metric in expected} == expected
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    assert expected["acc1"] != expected["mean_per_class_recall"] and len(recalls) == 5

    scale = model.logit_scale.detach().exp().item()
    confidence = (scale * scores).softmax(1).amax(1).tolist()
    ece = 0.0
    for part in range(15):
        inside = [i for i, p in enumerate(confidence) if part / 15 < p <= (part + 1) / 15]
        ece += abs(sum(right[i] - confidence[i] for i in inside)) / 90
    assert row["metrics"]["ece"] == pytest.approx(ece, abs=1e-5)
    counts = np.zeros((6, 6), int)
    np.add.at(counts, (truth, first), 1)
    assert row["detail"]["confusion"] == {"labels": NAMES, "counts": counts.tolist(), "left_out": 0}
    assert (row["dataset"], row["task"], row["language"]) == ("wds/pets", "zeroshot_classification", "en")
    assert row["errors"]["acc1"] == pytest.approx((expected["acc1"] * (1 - expected["acc1"]) / 90) ** 0.5, rel=0.1)
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(result))


def test_retrieval_equals_a_plain_computation_to_the_last_digit(clip: tuple[Any, str], tmp_path: Path) -> None:
    model, name = clip
    words = ["cat", "dog", "sun", "moon", "red house", "blue car", "tree"]
    rng = np.random.default_rng(1)
    captions = [[f"{rng.choice(words)} and {rng.choice(words)} {n}" for _ in range(1 + n % 5)] for n in range(50)]
    folder = retrieval(tmp_path / "wds_things", captions)
    result = measured(name, folder, settings={"limit": 48})

    pictures, texts = read_plainly(folder, "txt")
    pictures, lines = pictures[:48], [text.splitlines() for text in texts[:48]]
    owner = [row for row, some in enumerate(lines) for _ in some]
    scores = (encode_texts(model, [line for some in lines for line in some]) @ encode_images(model, pictures).T).numpy()
    expected = {}
    for k in (1, 5, 10):
        by_text = [own in np.argsort(-row)[:k] for own, row in zip(owner, scores, strict=True)]
        by_image = [any(owner[t] == i for t in np.argsort(-scores[:, i])[:k]) for i in range(48)]
        expected[f"image_retrieval_recall@{k}"] = torch.tensor(by_text).float().mean().item()
        expected[f"text_retrieval_recall@{k}"] = torch.tensor(by_image).float().mean().item()
    (row,) = result["tasks"]
    assert row["metrics"] == expected and 0 < expected["text_retrieval_recall@10"] < 1
    assert row["task"] == "zeroshot_retrieval" and row["n"]["image_retrieval_recall@1"] == len(owner) > 100
    assert result["retrieval"]["text_to_image@5"] == expected["image_retrieval_recall@5"]


def test_recall_in_blocks_and_with_ties_is_what_topk_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 4, (37,), generator=generator).tolist()
    images = torch.nn.functional.normalize(torch.randn(37, 8, generator=generator), dim=1)
    own_texts, own_image = own_rows(counts)
    near = images[own_image[:, 0]] + 0.1 * torch.randn(sum(counts), 8, generator=generator)
    texts = torch.nn.functional.normalize(near, dim=1)
    texts[1::4], images[1::3] = texts[::4][: len(texts[1::4])], images[::3][: len(images[1::3])]  # twice there
    for queries, bank, own in ((texts, images, own_image), (images, texts, own_texts)):
        found = found_within(queries, bank, own, (1, 5, 1000), most=200)
        for k in (1, 5):
            nearest = (queries @ bank.T).topk(k, dim=1).indices
            hits = [bool(set(row.tolist()) & set(mine.tolist())) for row, mine in zip(nearest, own, strict=True)]
            assert found[k].tolist() == hits and 0 < sum(hits) < len(hits)
        assert found[1000].all()


def test_a_layout_that_is_damaged_is_refused_in_one_line(clip: tuple[Any, str], tmp_path: Path) -> None:
    _, name = clip
    folder = classification(tmp_path / "wds_pets", [0, 1, 9], NAMES, TEMPLATES)

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match) as error:
            measured(name, folder, **options)
        assert "\n" not in str(error.value)

    refused(r"s0000002: cls = 9: is none of the 6 classes")
    refused(r"split = 'tset': not in .*; it has test", split="tset")
    refused(r"templates = 'opnai': no such file; did you mean openai\?", settings={"templates": "opnai"})
    refused(r"tempratur: classification has no such setting; did you mean temperature\?", settings={"tempratur": 2})
    (folder / "test" / "nshards.txt").write_text("2")
    refused(r"1.tar: no such shard")
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").unlink()
    refused(r"classes: no classnames.txt beside the shards of wds/pets")
    (folder / "dataset_type.txt").write_text("multilabel")
    refused("multilabel")
    assert not list(tmp_path.glob("*.json"))


def test_a_label_may_be_a_name_in_json_and_pictures_alone_are_enough(clip: tuple[Any, str], tmp_path: Path) -> None:
    from tars import END, member

    data = b""
    for number, label in enumerate(["blue dog", "red cat", "red cat"]):
        fields = json.dumps({"about": {"label": label}}).encode()
        data += member(f"k{number}.png", picture(number)) + member(f"k{number}.json", fields)
    (tmp_path / "some.tar").write_bytes(data + END)
    task = tmp_path / "named.toml"
    task.write_text(
        'kind = "classification"\nlabel = "json.about.label"\ntemplates = ["a {}"]\nclasses = ["red cat", "blue dog"]\n'
    )
    result = measured(clip[1], tmp_path / "some.tar", tasks=[str(task)])
    (row,) = result["tasks"]
    assert row["name"] == "named" and row["n"]["acc1"] == 3 and "acc5" not in row["metrics"]
    assert row["outcomes"]["truth"] == [1, 0, 0]
