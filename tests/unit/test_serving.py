"""The endpoints, driven by the clients that people have: what they get is what the model gives, bit for bit."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image
from served import NAME, Served, b64, png, served, tiny_model, tiny_run
from test_api import pictures

from mm.cli import main

WORDS = ["red heart", "a dog that runs", "flag", "x y z"]
SHADES = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_gets_the_models_embeddings_as_floats_and_in_base64(client: openai.OpenAI) -> None:
    truth = tiny_model().encode(text=WORDS)["text"]
    for options in ({"encoding_format": "float"}, {"encoding_format": "base64"}, {}):
        found = client.embeddings.create(model=NAME, input=WORDS, **options)  # type: ignore[call-overload]
        assert [item.index for item in found.data] == [0, 1, 2, 3] and found.model == NAME
        vectors = [item.embedding for item in found.data]
        if options.get("encoding_format") == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        assert torch.equal(torch.tensor(np.array(vectors), dtype=torch.float32), truth)
    lengths = tiny_model().inference.prepare("text", WORDS)[1]
    assert found.usage.prompt_tokens == found.usage.total_tokens == int(lengths.sum())


def test_token_ids_give_what_their_texts_give(client: openai.OpenAI) -> None:
    columns, lengths = tiny_model().inference.prepare("text", WORDS)
    ids = [row[:length].tolist() for row, length in zip(columns, lengths, strict=True)]
    truth = tiny_model().encode(text=WORDS)["text"]
    found = client.embeddings.create(model=NAME, input=ids, encoding_format="float")
    assert torch.equal(torch.tensor([item.embedding for item in found.data]), truth)
    alone = client.embeddings.create(model=NAME, input=ids[1], encoding_format="float")
    assert torch.equal(torch.tensor(alone.data[0].embedding), truth[1])
    assert alone.usage.prompt_tokens == len(ids[1])


def test_pictures_and_texts_may_be_mixed_and_keep_their_order(server: Served) -> None:
    images = pictures(2)
    urls = [f"data:image/png;base64,{b64(png(image))}" for image in images]
    items = [
        {"type": "image_url", "image_url": {"url": urls[0]}},
        "flag",
        {"type": "image", "image_url": {"url": b64(png(images[1]))}},
    ]
    answer = server.post("/v1/embeddings", {"input": items}).json()
    found = torch.tensor([item["embedding"] for item in answer["data"]])
    truth = tiny_model().encode(image=images, text=["flag"])
    assert torch.equal(found, torch.stack([truth["image"][0], truth["text"][0], truth["image"][1]]))
    assert answer["usage"]["prompt_tokens"] == server.service.engine.tokens("flag")


def test_openai_gets_the_pictures_that_the_model_draws(client: openai.OpenAI, server: Served) -> None:
    truth = tiny_model().generate(["red heart"] * 3, seeds=[5, 6, 7], steps=3, guidance=1.5, solver="heun")
    extra = {"seed": 5, "steps": 3, "guidance": 1.5, "solver": "heun"}
    found = client.images.generate(model=NAME, prompt="red heart", n=3, size="32x32", extra_body=extra)  # type: ignore[call-overload]
    files = [base64.b64decode(item.b64_json) for item in found.data]
    drawn = [Image.open(io.BytesIO(file)) for file in files]
    assert [image.format for image in drawn] == ["PNG"] * 3
    assert [np.asarray(image).tobytes() for image in drawn] == [image.tobytes() for image in truth]
    again = server.post("/v1/images/generations", {"prompt": "red heart", **extra, "seed": 6}).json()
    assert base64.b64decode(again["data"][0]["b64_json"]) == files[1] and again["data"][0]["seed"] == 6


def test_hugging_faces_client_gets_the_classifiers_probabilities(server: Served) -> None:
    labels, template = ["cat", "dog", "flag", "red heart"], "an emoji of {}"
    image = pictures(1)[0]
    truth = tiny_model().classifier(labels, templates=[template]).top(image, k=4)
    client = InferenceClient(model=f"{server.url}/v1/classify")
    found = client.zero_shot_image_classification(png(image), labels, hypothesis_template=template)
    assert [(item.label, item.score) for item in found] == truth
    plain = client.zero_shot_image_classification(png(image), labels)
    assert [(item.label, item.score) for item in plain] == tiny_model().classifier(labels).top(image, k=4)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_bytes_of_a_picture_may_be_sent_as_they_are(server: Served, kind: str) -> None:
    data = png(SHADES[0], kind)
    query = {"candidate_labels": ["cat,dog", "flag"], "hypothesis_template": "my {}"}
    sent = server.client.post("/v1/classify", params=query, content=data, headers={"content-type": f"image/{kind}"})
    truth = tiny_model().classifier(["cat", "dog", "flag"], templates=["my {}"]).top(Image.open(io.BytesIO(data)), k=3)
    assert [(item["label"], item["score"]) for item in sent.json()] == truth


def test_of_several_pictures_a_wrong_one_spoils_only_its_own_answer(server: Served) -> None:
    inputs = [b64(png(SHADES[0])), "junk", f"data:image/png;base64,{b64(png(SHADES[1]))}", "http://example.com/x.png"]
    body = {"inputs": inputs, "parameters": {"candidate_labels": ["cat", "dog"]}}
    answer = server.post("/v1/classify", body)
    assert answer.status_code == 200
    first, second, third, fourth = answer.json()
    classify = tiny_model().classifier(["cat", "dog"])
    assert [(item["label"], item["score"]) for item in first] == classify.top(SHADES[0])
    assert [(item["label"], item["score"]) for item in third] == classify.top(SHADES[1])
    assert second["error"]["param"] == "inputs[1]" and "inputs[3]" in fourth["error"]["message"]
    alone = server.post("/v1/classify", {**body, "inputs": "junk"})
    assert alone.status_code == 400 and alone.json()["error"]["param"] == "inputs"


def test_labels_are_encoded_once(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = tiny_model().classifier
    monkeypatch.setattr(tiny_model(), "classifier", lambda *args, **kinds: made.append(args) or build(*args, **kinds))
    for labels in (["new", "labels"], ["new", "labels"], ["labels", "new"]):
        body = {"inputs": b64(png(SHADES[2])), "parameters": {"candidate_labels": labels}}
        assert server.post("/v1/classify", body).status_code == 200
    assert len(made) == 2


def test_labels_used_longest_ago_are_forgotten() -> None:
    with served(label_cache=2) as server:
        for label in ("a", "b", "a", "c"):
            body = {"inputs": b64(png(SHADES[2])), "parameters": {"candidate_labels": [label]}}
            assert server.post("/v1/classify", body).status_code == 200
        assert [kind.settings[0] for kind in server.service.engine._classifiers] == [("a",), ("c",)]  # type: ignore[index]


def test_texts_that_are_too_long_are_cut_only_where_that_is_asked_for(server: Served) -> None:
    long = "red heart " * 20
    refused = server.post("/v1/embeddings", {"input": ["flag", long]})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert "input[1]" in refused.json()["error"]["message"] and "truncate" in refused.json()["error"]["message"]
    cut = server.post("/v1/embeddings", {"input": long, "truncate": True}).json()
    assert torch.equal(torch.tensor(cut["data"][0]["embedding"]), tiny_model().encode(text=[long])["text"][0])
    assert cut["usage"]["prompt_tokens"] == 16
    assert server.post("/v1/images/generations", {"prompt": long, "steps": 1}).status_code == 400


def test_options_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, draw = [], tiny_model().generate

    def generate(prompts: list[str], **options: Any) -> list[Image.Image]:
        asked.append((prompts, options))
        return draw(prompts, seeds=options["seeds"], steps=1)

    with served() as server:
        monkeypatch.setattr(tiny_model(), "generate", generate)
        body = {"prompt": "cat", "n": 2, "negative_prompt": "blue", "steps": 4, "guidance": 3, "solver": "heun"}
        assert server.post("/v1/images/generations", body).status_code == 200
    options = {"seeds": [0, 1], "steps": 4, "guidance": 3.0, "solver": "heun", "negative": "blue"}
    assert asked == [(["cat", "cat"], options)]


def test_models_are_listed_with_what_they_can(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    found = client.models.retrieve(NAME).to_dict()
    assert found["mm"]["size"] == "32x32" and found["mm"]["embed_dim"] == 32 and found["mm"]["draws"]  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="'gpt-4': this server has 'tiny' only"):
        client.models.retrieve("gpt-4")


def test_errors_are_what_openais_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", response_format="url")
    assert caught.value.param == "response_format" and "b64_json" in caught.value.body["message"]  # type: ignore[index]
    with pytest.raises(openai.NotFoundError) as lost:
        client.embeddings.create(model="text-embedding-3-small", input="x")
    assert lost.value.code == "model_not_found" and lost.value.type == "invalid_request_error"


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with served(api_key="s3cret") as server:
        for key, words in (({}, "an API key is needed"), ({"authorization": "Bearer wrong"}, "the API key is wrong")):
            for answer in (
                server.post("/v1/embeddings", {"input": "x"}, headers=key),
                server.client.get("/v1/models", headers=key),
                server.post("/v1/classify", {"not": "read"}, headers=key),
            ):
                assert answer.status_code == 401 and words in answer.json()["error"]["message"]
                assert answer.headers["www-authenticate"] == "Bearer" and "s3cret" not in answer.text
        assert server.client.get("/v1/models", headers={"authorization": "bearer s3cret"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret").models.list().data[0].id == NAME
        assert server.healthy(), "probes have no key"


def test_only_named_origins_and_hosts_may_call() -> None:
    with served(cors=["https://example.com"], hosts=["127.0.0.1"]) as server:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        for origin, allowed in (("https://example.com", True), ("https://evil.example", False)):
            answer = server.client.options("/v1/embeddings", headers={"origin": origin, **ask})
            assert ("access-control-allow-origin" in answer.headers) == allowed
        answer = server.client.get("/healthz", headers={"host": "evil.example"})
        assert answer.status_code == 421 and "--allow-host" in answer.json()["error"]["message"]
        assert server.healthy()


def test_no_other_origin_may_call_by_default(server: Served) -> None:
    answer = server.client.get("/healthz", headers={"origin": "https://example.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_unexpected_failure_is_a_500_that_says_nothing_and_spoils_nothing_else(
    server: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_options: object) -> object:
        raise RuntimeError("out of luck at 0xdeadbeef")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model(), "generate", fail)
        answer = server.post("/v1/images/generations", {"prompt": "x"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "0xdeadbeef" not in answer.text
    assert server.post("/v1/images/generations", {"prompt": "x", "steps": 1}).status_code == 200


def test_what_a_model_was_not_trained_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as server:
        monkeypatch.setattr(server.service.engine, "draws", False)
        monkeypatch.setattr(server.service.engine, "classifies", False)
        drawn = server.post("/v1/images/generations", {"prompt": "x"})
        told = server.post("/v1/classify", {"inputs": "x", "parameters": {"candidate_labels": ["a"]}})
    for answer, words in ((drawn, "cannot draw"), (told, "cannot classify")):
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_the_document_names_every_path_and_status(server: Served) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    paths = {"/v1/embeddings", "/v1/images/generations", "/v1/classify", "/v1/models", "/v1/models/{model}", "/healthz"}
    assert set(document["paths"]) == paths
    for path in ("/v1/embeddings", "/v1/images/generations", "/v1/classify"):
        statuses = set(document["paths"][path]["post"]["responses"])
        assert statuses == {"200", "400", "404", "408", "413", "415", "429", "500", "503"}
    assert "image/png" in document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert httpx.get(f"{server.url}/docs").status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_documents_curl_examples_work_as_they_are(server: Served, root: Path, tmp_path: Path) -> None:
    (tmp_path / "heart.png").write_bytes(png(SHADES[0]))
    blocks = re.findall(r"```sh\n(curl .*?)```", (root / "docs" / "serving.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = [command for block in blocks for command in re.split(r"\n(?=curl )", block.strip())]
    assert len(commands) == 5
    for command in commands:
        here = command.replace("http://127.0.0.1:8000", server.url)
        found = subprocess.run(
            ["bash", "-c", here], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
        )
        answer = json.loads(found.stdout)
        assert answer and "error" not in answer, (command, answer)


def test_a_picture_that_was_served_can_be_drawn_again_bit_for_bit(server: Served, tmp_path: Path) -> None:
    body = {"prompt": "red heart", "seed": 3, "steps": 2, "negative_prompt": "blue"}
    answer = server.post("/v1/images/generations", body).json()
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    assert main(["generate", str(tiny_run()), "--again", str(first), "--out", str(second)]) == 0
    assert np.asarray(Image.open(first)).tobytes() == np.asarray(Image.open(second)).tobytes()
