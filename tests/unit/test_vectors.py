"""An embedding index finds what looking at every row finds, survives being stopped anywhere, and believes no damage."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mm
from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.cli import main
from mm.data.shards import expand
from mm.evaluation import nearest, vector_build, vector_part, vectors
from mm.evaluation.nearest import Lists, exact
from mm.evaluation.stream import Stream
from mm.evaluation.vector_build import Built, build_index
from mm.evaluation.vectors import VectorIndex
from mm.models.export import save_export
from mm.models.fingerprint import model_hash
from mm.objectives.step import build_step
from mm.settings import load as load_config

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose embeddings differ from picture to picture and from text to text."""
    folder, config = tmp_path_factory.mktemp("runs") / "tiny", load_config(root / "configs" / "debug.py")
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(["red heart", "cat face", "a flag"] * 9, config.model.text.vocab_size))
    with torch.no_grad():
        for parameter in step.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    save_export(folder / "export", step.state_dict(), config, step.model.tokenizer.to_json(), {"step": "7"})
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> LoadedModel:
    return mm.load(run, device="cpu")


@pytest.fixture(scope="module")
def shards(openmoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 32, 24 and 8 emoji."""
    folder = tmp_path_factory.mktemp("shards")
    sources = [*sorted(openmoji_shards.glob("train-*.tar"))[:2], next(openmoji_shards.glob("val-*.tar"))]
    for source, count in zip(sources, (32, 24, 8), strict=True):
        with tarfile.open(source) as tar, tarfile.open(folder / source.name, "w") as out:
            members = tar.getmembers()
            keys = list(dict.fromkeys(member.name.split(".")[0] for member in members))[:count]
            for member in members:
                if member.name.split(".")[0] in keys:
                    out.addfile(member, tar.extractfile(member))
    return folder


def build(model: LoadedModel, shards: Path, out: Path, **options: Any) -> Built:
    files = expand(str(shards), mixed=True)
    return build_index(model.inference, files, out, source="tiny", model_hash=model_hash(model), **options)


@pytest.fixture(scope="module")
def made(model: LoadedModel, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "emoji.index"
    build(model, shards, out)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made, tmp_path / "emoji.index"))


def brute(queries: torch.Tensor, matrix: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every score in float64, as float32; a stable sort keeps equal ones in the order of their rows."""
    scores = (queries.double() @ torch.from_numpy(matrix.astype(np.float64)).T).float()
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.indices[:, :k], best.values[:, :k]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("rows", "dim", "k", "kind"), [(1, 7, 3, "f4"), (700, 33, 5, "f4"), (901, 64, 901, "f2")])
def test_exact_search_is_every_row_sorted(rows: int, dim: int, k: int, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(nearest, "BLOCK", 128)  # several blocks, the last one smaller
    monkeypatch.setattr(nearest, "QUERIES", 16)
    rng = np.random.default_rng(rows)
    matrix = rng.standard_normal((rows, dim)).astype(kind)
    matrix[rows // 2 :: 3] = matrix[0]  # ties, more of them than there are spare candidates
    queries = torch.from_numpy(rng.standard_normal((23, dim)).astype(np.float32))
    queries[0] = torch.from_numpy(matrix[0].astype(np.float32))
    found, scores = exact(queries.numpy(), matrix, k)
    there, theirs = brute(queries, matrix, k)
    assert found.tolist() == there.tolist()
    assert np.array_equal(scores, theirs.numpy())
    alone = exact(queries[5:6].numpy(), matrix, k)
    assert np.array_equal(alone[0][0], found[5]) and np.array_equal(alone[1][0], scores[5])


def test_ties_that_the_library_leaves_out_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.ones((300, 4), np.float32) / 2
    matrix[:5] = [1, 0, 0, 0]
    asked: list[int] = []

    def last_first(queries: np.ndarray, rows: np.ndarray, k: int) -> Any:  # as right as any other order of equal ones
        asked.append(k)
        scores = queries @ rows.T
        best = np.argsort(-scores[:, ::-1], axis=1, kind="stable")[:, :k]
        return len(rows) - 1 - best, np.take_along_axis(scores[:, ::-1], best, 1)

    monkeypatch.setattr(nearest, "_candidates", last_first)
    assert exact(matrix[5:6], matrix, 3)[0].tolist() == [[5, 6, 7]] and asked == [19, 76, 300]


def test_lists_looked_at_in_full_find_the_same_and_some_of_them_most_of_it() -> None:
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((40, 24))
    matrix = (centres[rng.integers(0, 40, 4000)] + 0.3 * rng.standard_normal((4000, 24))).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    lists = Lists.of(matrix)
    assert sorted(lists.rows.tolist()) == list(range(4000)) and len(lists.centres) > 50
    queries = matrix[:50]
    right, _ = exact(queries, matrix, 10)
    assert np.array_equal(lists.search(queries, matrix, 10, len(lists.centres))[0], right)
    some, scores = lists.search(queries, matrix, 10, 12)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(some.tolist(), right.tolist(), strict=True)])
    assert share > 0.9 and (scores[:, 0] > 0.9999).all()
    everything, _ = lists.search(queries[:1], matrix, 4000, 1)
    assert sorted(everything[0].tolist()) == list(range(4000)), "more lists where these hold fewer than k"


def test_words_and_pictures_find_what_looking_at_every_embedding_finds(model: LoadedModel, made: Path) -> None:
    index = VectorIndex.open(made)
    samples = list(mm_stream(model, index))
    embeddings = model.encode(image=[image for _, _, image in samples])["image"]
    assert torch.equal(torch.from_numpy(index.embeddings.copy()), embeddings), "the same as mm.load's, to the bit"
    assert [index.key(row) for row in range(len(index))] == [key for key, _, _ in samples]
    assert [index.captions(row) for row in range(len(index))] == [texts for _, texts, _ in samples]
    queries = torch.cat([model.encode(text=["red heart", "a flag"])["text"], embeddings[[0, 37, len(index) - 1]]])
    rows, scores = index.search(queries, k=9)
    there, theirs = brute(queries, index.embeddings, 9)
    assert torch.equal(rows, there) and torch.equal(scores, theirs)
    assert rows[2:, 0].tolist() == [0, 37, len(index) - 1], "a picture in the index finds itself"
    torch.testing.assert_close(scores[2:, 0], torch.ones(3), atol=1e-6, rtol=0)
    plain = (queries @ embeddings.T).topk(9).values  # torch in float32: another rounding
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=0)


def mm_stream(model: LoadedModel, index: VectorIndex) -> Iterator[tuple[str, list[str], Image.Image]]:
    processor = model.inference.processor("image")
    for chunk in Stream([shard.path for shard in index.about.shards], processor, captions="txt"):
        yield from zip(chunk.keys, chunk.captions, processor.render(chunk.images), strict=True)


def test_an_index_in_half_precision_is_half_as_large_and_nearly_the_same(
    model: LoadedModel, shards: Path, made: Path, tmp_path: Path
) -> None:
    build(model, shards, tmp_path / "half", precision="fp16", limit=40)
    half, whole = VectorIndex.open(tmp_path / "half"), VectorIndex.open(made)
    assert half.embeddings.dtype == np.float16 and len(half) == 40
    np.testing.assert_allclose(half.embeddings, whole.embeddings[:40], atol=2e-3)
    assert not half.embeddings.flags.owndata, "mapped, not read"


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", ["second shard", "end", "swap"])
def test_a_stopped_index_goes_on_and_ends_with_the_same_bytes(
    model: LoadedModel, shards: Path, made: Path, tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, embed, encoded = tmp_path / "emoji.index", model.inference.embed, []

    def counting(name: str, columns: Any, **options: Any) -> Any:
        encoded.append(len(columns[0]))
        return embed(name, columns, **options)

    def stopping(name: str, columns: Any, **options: Any) -> Any:
        if sum(encoded) >= 48:  # in the middle of a shard
            raise Stopped
        return counting(name, columns, **options)

    def fail(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(vector_build, "Stream", partial(Stream, chunk=16))
    monkeypatch.setattr(model.inference, "embed", counting)
    with monkeypatch.context() as patch:
        if stop == "second shard":
            patch.setattr(model.inference, "embed", stopping)
        else:
            patch.setattr(vector_build, "write_about" if stop == "end" else "publish", fail)
        with pytest.raises(Stopped):
            build(model, shards, out)
    assert not out.exists() and (tmp_path / "emoji.index.part").is_dir()
    with pytest.raises(ValueError, match="making was interrupted: the same mm index command goes on"):
        VectorIndex.open(out)
    before = sum(encoded)
    built = build(model, shards, out)
    assert contents(out) == contents(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji.index"]
    assert sum(encoded) - before == built.encoded, "what was whole is not encoded again"
    assert built.kept == (32 if stop == "second shard" else built.about.count)


def test_nothing_is_done_twice_and_only_changed_shards_are_encoded_again(
    model: LoadedModel, shards: Path, tmp_path: Path, openmoji_shards: Path
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    out = tmp_path / "emoji.index"
    first = build(model, data, out)
    files = contents(out)
    assert build(model, data, out).encoded == 0 and contents(out) == files
    third = sorted(openmoji_shards.glob("train-*.tar"))[2]
    shutil.copy2(third, data / third.name)
    grown = build(model, data, out)
    assert grown.encoded == grown.about.count - first.about.count and grown.kept == first.about.count
    anew = build(model, data, tmp_path / "anew")
    assert anew.kept == 0 and contents(out) == contents(tmp_path / "anew")
    os.utime(data / third.name, ns=(1, 1))  # touched
    assert build(model, data, out).kept == first.about.count
    (data / third.name).unlink()
    assert build(model, data, out).encoded == 0 and VectorIndex.open(out).about.count == first.about.count
    assert build(model, data, out, captions="").encoded == first.about.count, "another option, another index"
    assert VectorIndex.open(out).captions(3) == []


def test_what_cannot_be_used_is_entered_and_kept_in_the_ledger(
    model: LoadedModel, shards: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    for sidecar in data.glob("*.mmindex"):
        sidecar.unlink()
    broken = sorted(data.glob("*.tar"))[0]
    bytes_ = broken.read_bytes()
    at = bytes_.index(b"\x89PNG") + 8
    broken.write_bytes(bytes_[:at] + b"\0" * 40 + bytes_[at + 40 :])
    built = build(model, data, tmp_path / "x")
    assert built.about.unusable == 1
    (line,) = map(json.loads, (tmp_path / "x" / "ledger.jsonl").read_text().splitlines())
    assert line["shard"] == str(broken) and line["key"] and line["reason"]
    os.utime(sorted(data.glob("*.tar"))[1], ns=(1, 1))
    assert build(model, data, tmp_path / "x").about.unusable == 1
    assert len((tmp_path / "x" / "ledger.jsonl").read_text().splitlines()) == 1
    for path in data.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"\x89PMG"))
    with pytest.raises(ValueError, match="none of"):
        build(model, data, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_lists_are_made_once_and_a_damaged_file_is_answered_by_looking_at_every_row(
    model: LoadedModel, shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = model.encode(text=["red heart", "a flag"])["text"]
    right = VectorIndex.open(folder).search(queries, 5)
    index = VectorIndex.open(folder)
    assert torch.equal(index.search(queries, 5, approximate=True)[0], right[0]) and "has no lists" in index.note
    assert build(model, shards, folder, approximate=True).encoded == 0
    index = VectorIndex.open(folder)
    found = index.search(queries, 5, approximate=True, probes=10**6)
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1]) and not index.note
    monkeypatch.setattr(vectors, "MANY", 10)
    assert index.search(queries, 5)[0].shape == (2, 5) and index._lists is not None, "many rows: lists without asking"
    data = bytearray((folder / "lists.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "lists.safetensors").write_bytes(data)
    index = VectorIndex.open(folder)
    assert torch.equal(index.search(queries, 5)[0], right[0])
    assert "is not the one that this index was made with; every row was looked at" in index.note


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def edit(folder: Path, **fields: Any) -> None:
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | fields))


def long_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def not_finite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-128 * 62 :] = b"\xff" * 128 * 62
    path.write_bytes(data)


def beyond(path: Path) -> None:
    """Ends of keys that point behind all keys, but for the last."""
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header["key_ends"]["data_offsets"][0]
    data[start : start + 8] = (2**40).to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: cut(f / "embeddings.safetensors"), "embeddings.safetensors: damaged .*cut short"),
        (lambda f: cut(f / "samples.safetensors"), "samples.safetensors: damaged"),
        (lambda f: (f / "embeddings.safetensors").write_bytes(b""), "embeddings.safetensors: damaged .0 bytes"),
        (lambda f: (f / "samples.safetensors").unlink(), "samples.safetensors: is missing"),
        (lambda f: shutil.copy(f / "samples.safetensors", f / "embeddings.safetensors"), "holds caption_counts"),
        (lambda f: long_header(f / "embeddings.safetensors"), "a header of 1152921504606846976 bytes"),
        (lambda f: beyond(f / "samples.safetensors"), "samples.safetensors: damaged .keys"),
        (lambda f: not_finite(f / "embeddings.safetensors"), "embeddings.safetensors: .*not finite"),
        (lambda f: edit(f, dim=16), r"embeddings is \[\d+, 32\], not \[\d+, 16\]"),
        (lambda f: edit(f, precision="fp16"), "embeddings is F32, not F16"),
        (lambda f: edit(f, count=3), "index.json: not an index of this version .rows of the shards"),
        (lambda f: edit(f, count="3"), "a number of another type"),
        (lambda f: edit(f, shards=[1]), "index.json: not an index"),
        (lambda f: edit(f, more=1), "unexpected keyword"),
        (lambda f: edit(f, format="x"), "another format"),
        (lambda f: (f / "index.json").write_text("[" * 100000), "index.json: not an index"),
        (lambda f: (f / "index.json").write_text("{"), "index.json: not an index"),
        (lambda f: (f / "index.json").unlink(), "is no index: it has no index.json"),
        (lambda f: shutil.rmtree(f), "no such index; mm index makes one"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(model: LoadedModel, folder: Path, damage: Any, words: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=words) as caught:
        index = VectorIndex.open(folder)
        index.search(torch.ones(1, 32), 5)
        [index.key(row) for row in range(len(index))]
    assert "\n" not in str(caught.value)


def test_what_cannot_be_searched_for_is_refused(made: Path) -> None:
    index = VectorIndex.open(made)
    for queries, k, words in [
        (torch.ones(1, 31), 5, r"are \[1, 31\]; must be \[Q, 32\]"),
        (torch.ones(32), 5, "must be"),
        (torch.full((1, 32), torch.nan), 5, "not finite"),
        (torch.ones(1, 32), 0, "k = 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            index.search(queries, k)
    rows, scores = index.search(torch.ones(2, 32), 10**6)
    assert rows.shape == scores.shape == (2, len(index))
    assert index.search(torch.ones(0, 32), 5)[0].shape == (0, 5)


def test_another_folder_is_never_written_over(model: LoadedModel, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.txt, which is no part of an index; name another folder"):
        build(model, shards, tmp_path / "mine")
    (tmp_path / "x.part").mkdir()
    (tmp_path / "x.part" / "a.txt").write_text("also mine")
    with pytest.raises(ValueError, match="x.part: holds a.txt"):
        build(model, shards, tmp_path / "x")
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "x.part" / "a.txt").exists()
    plan = {"precision": "fp32"}
    with vector_part.Part(tmp_path / "busy", plan, 4), pytest.raises(ValueError, match="another mm index writes"):
        vector_part.Part(tmp_path / "busy", plan, 4)


def test_the_commands_make_an_index_and_search_it(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    out, sheet = str(tmp_path / "emoji.index"), str(tmp_path / "found.png")
    assert main(["index", str(run), str(data), "--out", out]) == 0
    assert "encoded" in capsys.readouterr().out
    assert main(["index", str(run), str(data), "--out", out]) == 0
    assert "nothing changed" in capsys.readouterr().out
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    words = ["search", out, "red heart", str(tmp_path / "red.png"), "--k", "3", "--json"]
    assert main([*words, "--out", sheet]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [len(part["hits"]) for part in both] == [3, 3] and Image.open(sheet).width > 3 * 128
    assert set(both[0]["hits"][0]) == {"score", "row", "key", "shard", "captions"}
    assert main([*words, "--together"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["query"].startswith("red heart + ") and one["hits"] not in [part["hits"] for part in both]
    assert main(["search", out, "red heart", "--not", "a flag", "--json", "--k", "3"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["hits"] != both[0]["hits"]
    assert main(["search", out, "red heart", "--min-score", "2"]) == 0
    assert "nothing scores 2 or more" in capsys.readouterr().out
    data.rename(tmp_path / "elsewhere")
    assert main(["search", out, "red heart"]) == 0, "words need no shards"
    capsys.readouterr()
    assert main(["search", out, "red heart", "--out", sheet]) == 2
    assert "the shard is not there any more; --shards says where shards are now" in capsys.readouterr().err
    assert main(["search", out, "red heart", "--out", sheet, "--shards", str(tmp_path / "elsewhere")]) == 0
    assert "changed" not in capsys.readouterr().err


def test_an_index_is_searched_with_its_own_model_only(
    run: Path, root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(folder), "red heart", "--model", str(run)]) == 0
    other = Path(shutil.copytree(run, tmp_path / "other"))
    weights = bytearray((other / "export" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "export" / "model.safetensors").write_bytes(weights)
    assert main(["search", str(folder), "red heart", "--model", str(other)]) == 2
    error = capsys.readouterr().err
    assert "is not the model that" in error and error.count("\n") == 1
    edit(folder, source=str(tmp_path / "gone"))
    assert main(["search", str(folder), "red heart"]) == 2
    assert "is not there any more; give --model RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "nothing to look for"),
        (["  "], "a query is blank"),
        (["cat.png"], "cat.png: no such image file"),
        (["heart", "--out", "x.jpg"], "end its name in .png"),
        (["heart", "--shards", "x"], "give --out FILE.png too"),
        (["heart", "--k", "0"], "--k: 0: must be an int at least 1"),
        (["heart", "--exact", "--approximate"], "not allowed with"),
        (["heart", "--min-scor", "1"], "did you mean --min-score"),
        (["heart", "--min-score", "nan"], "must be a number"),
        (["heart", "--not", "heart"], "says what the query says; nothing is left of it"),
        (["x\0y" * 400], ""),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused_in_one_line(
    run: Path, folder: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, source=str(run))
    assert main(["search", str(folder), *words]) == (2 if error else 0)
    printed = capsys.readouterr().err
    assert error in printed and printed.count("\n") == bool(error)
