"""Requests that cannot be meant, with the status and the words that each must get."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from PIL import Image
from served import b64, png

EMBED, DRAW, CLASSIFY = "/v1/embeddings", "/v1/images/generations", "/v1/classify"
JSON = {"content-type": "application/json"}
GOOD = png(Image.new("RGB", (40, 30), "red"))
LABELS = {"candidate_labels": ["cat", "dog"]}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def url(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


def picture(address: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def classify(inputs: Any, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {**LABELS, **parameters}}


# name: (path, the body as JSON or as bytes, status, what the message says)
BODIES: dict[str, tuple[str, Any, int, str]] = {
    # of any endpoint: no JSON, or not an object
    "empty body": (EMBED, b"", 400, "body: is empty"),
    "spaces": (EMBED, b"   ", 400, "not valid JSON"),
    "not JSON": (EMBED, b"input=cat", 400, "not valid JSON"),
    "half an object": (DRAW, b'{"prompt": "cat"', 400, "not valid JSON"),
    "two objects": (DRAW, b'{"prompt": "cat"}{}', 400, "not valid JSON"),
    "trailing comma": (CLASSIFY, b'{"inputs": "x",}', 400, "not valid JSON"),
    "single quotes": (EMBED, b"{'input': 'cat'}", 400, "not valid JSON"),
    "NaN": (DRAW, b'{"prompt": "cat", "guidance": NaN}', 400, "NaN is no JSON number"),
    "Infinity": (DRAW, b'{"prompt": "cat", "guidance": Infinity}', 400, "Infinity is no JSON number"),
    "minus Infinity": (DRAW, b'{"prompt": "cat", "guidance": -Infinity}', 400, "-Infinity is no JSON number"),
    "a number beyond floats": (DRAW, b'{"prompt": "cat", "guidance": 1e999}', 400, "guidance = inf"),
    "a number of 5000 digits": (DRAW, b'{"prompt": "cat", "seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    "nested lists": (EMBED, b'{"input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "nested too deeply"),
    "nested objects": (DRAW, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "nested too deeply"),
    "nested a little": (EMBED, b'{"input": ' + b"[" * 300 + b"]" * 300 + b"}", 400, "input"),
    "unclosed lists": (EMBED, b"[" * 100_000, 400, "body"),
    "half a million values": (
        EMBED,
        b'{"input": [' + b"1," * 500_001 + b"1]}",
        400,
        "values, over the limit of 500000",
    ),
    "Latin-1": (EMBED, '{"input": "café"}'.encode("latin-1"), 400, "not UTF-8"),
    "UTF-16": (EMBED, '{"input": "cat"}'.encode("utf-16"), 400, "not UTF-8"),
    "a byte order mark": (EMBED, b'\xef\xbb\xbf{"input": "cat"}', 400, "not valid JSON"),
    "broken UTF-8": (EMBED, b'{"input": "\xf0\x28\x8c\x28"}', 400, "not UTF-8"),
    "NUL bytes": (EMBED, bytes(100), 400, "not valid JSON"),
    "control characters": (EMBED, b'{"input": "a\x01b"}', 400, "not valid JSON"),
    "null": (EMBED, b"null", 400, "body"),
    "a list": (EMBED, [], 400, "body"),
    "a text": (DRAW, "cat", 400, "body"),
    "a number": (CLASSIFY, 3, 400, "body"),
    "an empty object": (EMBED, {}, 400, "input: is required"),
    "oversized": (EMBED, b'{"input": "' + b"x" * 300_000 + b'"}', 413, "over this server's limit of 200000"),
    # embeddings
    "no input": (EMBED, {"model": "tiny"}, 400, "input: is required"),
    "null input": (EMBED, {"input": None}, 400, "input = None"),
    "a number as input": (EMBED, {"input": 3}, 400, "input = 3"),
    "an object as input": (EMBED, {"input": {"text": "cat"}}, 400, "input = an object"),
    "an empty text": (EMBED, {"input": ""}, 400, "input = '': is empty"),
    "an empty list": (EMBED, {"input": []}, 400, "input = []: is empty"),
    "an empty text in a list": (EMBED, {"input": ["cat", ""]}, 400, "input[1] = '': is empty"),
    "null in a list": (EMBED, {"input": ["cat", None]}, 400, "input[1] = None"),
    "a bool in a list": (EMBED, {"input": ["cat", True]}, 400, "input[1] = True"),
    "an empty list of ids": (EMBED, {"input": [[5], []]}, 400, "input[1] = []: is empty"),
    "negative ids": (EMBED, {"input": [5, -1]}, 400, "-1"),
    "ids beyond the vocabulary": (EMBED, {"input": [10**6]}, 400, "token id 1000000; must be from 0 to"),
    "ids beyond 64 bits": (EMBED, {"input": [10**30]}, 400, "must be from 0 to"),
    "fractional ids": (EMBED, {"input": [1.5, 2]}, 400, "input[0] = 1.5"),
    "ids and texts": (EMBED, {"input": [5, "cat"]}, 400, "token ids must be integers"),
    "null among ids": (EMBED, {"input": [[5, None]]}, 400, "token ids must be integers"),
    "bools among ids": (EMBED, {"input": [[5, True]]}, 400, "token ids must be integers"),
    "only padding": (EMBED, {"input": [[0, 0]]}, 400, "only padding"),
    "too many ids": (EMBED, {"input": [[5] * 17]}, 400, "17 token ids"),
    "too many tokens": (EMBED, {"input": "cat " * 60}, 400, "this model reads 16"),
    "too many characters": (EMBED, {"input": "x" * 5000, "truncate": True}, 400, "5000 characters, over"),
    "too many texts": (EMBED, {"input": ["x"] * 51}, 400, "51 items, over"),
    "too many pictures": (EMBED, {"input": [picture(url(GOOD))] * 5}, 400, "5 pictures, over"),
    "half a surrogate pair": (EMBED, b'{"input": "\\ud800"}', 400, "surrogate"),
    "encoding_format": (EMBED, {"input": "x", "encoding_format": "int8"}, 400, "encoding_format = 'int8'"),
    "encoding_format as a list": (EMBED, {"input": "x", "encoding_format": ["float"]}, 400, "encoding_format"),
    "other dimensions": (EMBED, {"input": "x", "dimensions": 8}, 400, "this model has 32"),
    "no dimensions": (EMBED, {"input": "x", "dimensions": 0}, 400, "dimensions = 0"),
    "dimensions as text": (EMBED, {"input": "x", "dimensions": "32"}, 400, "dimensions = '32'"),
    "an unknown model": (EMBED, {"input": "x", "model": "gpt-4"}, 404, "this server has 'tiny' only"),
    "a number as model": (EMBED, {"input": "x", "model": 4}, 400, "model = 4"),
    "a list as user": (EMBED, {"input": "x", "user": []}, 400, "user"),
    "truncate as text": (EMBED, {"input": "x", "truncate": "yes"}, 400, "truncate = 'yes'"),
    "an unknown field": (EMBED, {"input": "x", "imput": "y"}, 400, "did you mean input"),
    "a picture by link": (EMBED, {"input": [picture("https://example.com/a.png")]}, 400, "URLs are not fetched"),
    "a picture by file": (EMBED, {"input": [picture("file:///etc/passwd")]}, 400, "URLs are not fetched"),
    "a picture as SVG": (
        EMBED,
        {"input": [picture("data:image/svg+xml;base64,AAAA")]},
        400,
        "must begin data:image/png",
    ),
    "a picture not in base64": (EMBED, {"input": [picture("data:image/png,AAAA")]}, 400, "must begin data:image/png"),
    "a picture without data": (EMBED, {"input": [picture("data:image/png;base64,")]}, 400, "is empty"),
    "a picture without URL": (EMBED, {"input": [{"type": "image_url"}]}, 400, "not a picture; write"),
    "a picture of another type": (EMBED, {"input": [{**picture("x"), "type": "audio"}]}, 400, "not a picture; write"),
    "a picture with more": (EMBED, {"input": [{**picture("x"), "detail": "low"}]}, 400, "not a picture; write"),
    "a picture whose URL is a number": (EMBED, {"input": [picture(3)]}, 400, "not a picture; write"),
    "one picture, not a list": (EMBED, {"input": picture(url(GOOD))}, 400, "must be a text, token ids, or a list"),
    # drawings
    "no prompt": (DRAW, {"n": 1}, 400, "prompt: is required"),
    "an empty prompt": (DRAW, {"prompt": ""}, 400, "prompt"),
    "a list of prompts": (DRAW, {"prompt": ["cat"]}, 400, "prompt"),
    "a number as prompt": (DRAW, {"prompt": 3}, 400, "prompt = 3"),
    "a long prompt": (DRAW, {"prompt": "cat " * 60}, 400, "this model reads 16"),
    "a surrogate prompt": (DRAW, b'{"prompt": "\\udfff"}', 400, "surrogate"),
    "no pictures": (DRAW, {"prompt": "cat", "n": 0}, 400, "n = 0"),
    "fewer than no pictures": (DRAW, {"prompt": "cat", "n": -1}, 400, "n = -1"),
    "a million pictures": (DRAW, {"prompt": "cat", "n": 10**6}, 400, "1000000 pictures, over"),
    "half a picture": (DRAW, {"prompt": "cat", "n": 0.5}, 400, "n = 0.5"),
    "n as text": (DRAW, {"prompt": "cat", "n": "2"}, 400, "n = '2'"),
    "n as a bool": (DRAW, {"prompt": "cat", "n": True}, 400, "n = True"),
    "another size": (DRAW, {"prompt": "cat", "size": "1024x1024"}, 400, "this model draws 32x32"),
    "a size that is none": (DRAW, {"prompt": "cat", "size": "large"}, 400, "this model draws 32x32"),
    "a number as size": (DRAW, {"prompt": "cat", "size": 32}, 400, "size = 32"),
    "links": (DRAW, {"prompt": "cat", "response_format": "url"}, 400, "use b64_json"),
    "a response_format": (DRAW, {"prompt": "cat", "response_format": "png"}, 400, "response_format = 'png'"),
    "JPEG": (DRAW, {"prompt": "cat", "output_format": "jpeg"}, 400, "output_format = 'jpeg'"),
    "no steps": (DRAW, {"prompt": "cat", "steps": 0}, 400, "steps = 0"),
    "negative steps": (DRAW, {"prompt": "cat", "steps": -5}, 400, "steps = -5"),
    "many steps": (DRAW, {"prompt": "cat", "steps": 10**9}, 400, "steps, over"),
    "steps as text": (DRAW, {"prompt": "cat", "steps": "ten"}, 400, "steps = 'ten'"),
    "too much work": (DRAW, {"prompt": "cat", "n": 10, "steps": 100}, 400, "10 x 32 x 32 x 100"),
    "a negative seed": (DRAW, {"prompt": "cat", "seed": -1}, 400, "seed = -1"),
    "a seed of 64 bits": (DRAW, {"prompt": "cat", "seed": 2**63}, 400, "seed"),
    "a last seed of 64 bits": (DRAW, {"prompt": "cat", "seed": 2**63 - 2, "n": 4}, 400, "over 63 bits"),
    "a fractional seed": (DRAW, {"prompt": "cat", "seed": 1.5}, 400, "seed = 1.5"),
    "a null seed": (DRAW, {"prompt": "cat", "seed": None}, 400, "seed = None"),
    "negative guidance": (DRAW, {"prompt": "cat", "guidance": -1}, 400, "guidance = -1"),
    "huge guidance": (DRAW, {"prompt": "cat", "guidance": 1e30}, 400, "guidance = 1e+30"),
    "guidance as text": (DRAW, {"prompt": "cat", "guidance": "2"}, 400, "guidance = '2'"),
    "an unknown solver": (DRAW, {"prompt": "cat", "solver": "rk4"}, 400, "solver = 'rk4'"),
    "an empty negative prompt": (DRAW, {"prompt": "cat", "negative_prompt": ""}, 400, "negative_prompt"),
    "a list of negative prompts": (DRAW, {"prompt": "cat", "negative_prompt": ["x"]}, 400, "negative_prompt"),
    "a long negative prompt": (DRAW, {"prompt": "cat", "negative_prompt": "cat " * 60}, 400, "negative_prompt: "),
    "a misspelled field": (DRAW, {"prompt": "cat", "stepz": 3}, 400, "did you mean steps"),
    "a field from elsewhere": (DRAW, {"prompt": "cat", "style": "vivid"}, 400, "'style': not a field"),
    "another model": (DRAW, {"prompt": "cat", "model": "dall-e-3"}, 404, "this server has 'tiny' only"),
    # classification
    "no inputs": (CLASSIFY, {"parameters": LABELS}, 400, "inputs: is required"),
    "null inputs": (CLASSIFY, classify(None), 400, "inputs"),
    "a number as inputs": (CLASSIFY, classify(3), 400, "inputs"),
    "empty inputs": (CLASSIFY, classify(""), 400, "inputs"),
    "an empty list of inputs": (CLASSIFY, classify([]), 400, "inputs"),
    "numbers in inputs": (CLASSIFY, classify([1, 2]), 400, "inputs"),
    "too many inputs": (CLASSIFY, classify(["x"] * 5), 400, "5 pictures, over"),
    "no parameters": (CLASSIFY, {"inputs": b64(GOOD)}, 400, "candidate_labels: is required"),
    "parameters as a list": (CLASSIFY, {"inputs": b64(GOOD), "parameters": ["cat"]}, 400, "parameters"),
    "no labels": (CLASSIFY, {"inputs": b64(GOOD), "parameters": {}}, 400, "candidate_labels: is required"),
    "an empty list of labels": (CLASSIFY, classify(b64(GOOD), candidate_labels=[]), 400, "candidate_labels"),
    "labels as text": (CLASSIFY, classify(b64(GOOD), candidate_labels="cat,dog"), 400, "candidate_labels"),
    "blank labels": (CLASSIFY, classify(b64(GOOD), candidate_labels=["cat", " "]), 400, "labels[1] = ' ': is blank"),
    "numbers as labels": (CLASSIFY, classify(b64(GOOD), candidate_labels=["cat", 7]), 400, "candidate_labels.1 = 7"),
    "too many labels": (CLASSIFY, classify(b64(GOOD), candidate_labels=["x"] * 101), 400, "101 labels x 1 templates"),
    "a long label": (CLASSIFY, classify(b64(GOOD), candidate_labels=["x" * 2001]), 400, "2001 characters, over"),
    "a label of many tokens": (
        CLASSIFY,
        classify(b64(GOOD), candidate_labels=["a b " * 20]),
        400,
        "this model reads 16",
    ),
    "a template without {}": (CLASSIFY, classify(b64(GOOD), hypothesis_template="a"), 400, "has no {}"),
    "a template of many holes": (
        CLASSIFY,
        classify(b64(GOOD), candidate_labels=["x" * 900], hypothesis_template="{}" * 900),
        400,
        "810000 characters, over",
    ),
    "no templates": (CLASSIFY, classify(b64(GOOD), hypothesis_template=[]), 400, "templates"),
    "a number as template": (CLASSIFY, classify(b64(GOOD), hypothesis_template=3), 400, "hypothesis_template"),
    "an unknown parameter": (CLASSIFY, classify(b64(GOOD), labels=["a"]), 400, "'labels': not a field"),
    "not base64": (CLASSIFY, classify("~~~~"), 400, "not base64"),
    "half of base64": (CLASSIFY, classify(b64(GOOD)[:41]), 400, "not base64"),
    "base64 beyond ASCII": (CLASSIFY, classify("ünïcödé"), 400, "not base64"),
    "text in base64": (CLASSIFY, classify(b64(b"hello, world")), 400, "not a JPEG, PNG or WebP"),
    "a PDF": (CLASSIFY, classify(b64(b"%PDF-1.7\n" + bytes(100))), 400, "not a JPEG, PNG or WebP"),
    "a GIF": (CLASSIFY, classify(b64(png(Image.new("P", (4, 4)), "GIF"))), 400, "not a JPEG, PNG or WebP"),
    "a truncated PNG": (CLASSIFY, classify(b64(GOOD[:60])), 400, "cannot be decoded"),
    "a PNG's head alone": (CLASSIFY, classify(b64(GOOD[:20])), 400, "inputs"),
    "a truncated JPEG": (CLASSIFY, classify(b64(png(Image.new("RGB", (64, 64)), "JPEG")[:200])), 400, "inputs"),
    "a truncated WebP": (CLASSIFY, classify(b64(png(Image.new("RGB", (64, 64)), "WEBP")[:30])), 400, "inputs"),
    "a bomb": (CLASSIFY, classify(b64(bomb(50_000, 50_000))), 400, "50000x50000 pixels, over"),
    "a bomb as a data URL": (CLASSIFY, classify(url(bomb(2000, 2000))), 400, "2000x2000 pixels, over"),
    "a bomb among embeddings": (EMBED, {"input": [picture(url(bomb(2000, 2000)))]}, 400, "pixels, over"),
    "a bomb of no pixels": (CLASSIFY, classify(b64(bomb(0, 0))), 400, "inputs"),
    "a picture by HTTP": (CLASSIFY, classify("http://169.254.169.254/latest"), 400, "URLs are not fetched"),
    "a picture by path": (CLASSIFY, classify("/etc/passwd"), 400, "inputs"),
    "an unknown field of classify": (CLASSIFY, {**classify(b64(GOOD)), "top_k": 3}, 400, "'top_k': not a field"),
}
IMAGE = {"content-type": "image/png"}
# name: (path, what else httpx is told, status, what the message says)
OTHERS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "no content-type": (EMBED, {"content": b'{"input": "x"}'}, 415, "no content-type: must be application/json"),
    "a form": (EMBED, {"data": {"input": "x"}}, 415, "content-type 'application/x-www-form-urlencoded'"),
    "a file of a form": (CLASSIFY, {"files": {"inputs": GOOD}}, 415, "content-type 'multipart/form-data'"),
    "text/plain": (
        DRAW,
        {"content": b"{}", "headers": {"content-type": "text/plain"}},
        415,
        "must be application/json",
    ),
    "a picture to embed": (EMBED, {"content": GOOD, "headers": IMAGE}, 415, "content-type 'image/png'"),
    "a GIF's media type": (CLASSIFY, {"content": GOOD, "headers": {"content-type": "image/gif"}}, 415, "'image/gif'"),
    "gzip": (EMBED, {"content": b"{}", "headers": {**JSON, "content-encoding": "gzip"}}, 415, "compressed bodies"),
    "bytes without labels": (CLASSIFY, {"content": GOOD, "headers": IMAGE}, 400, "labels = []"),
    "bytes with blank labels": (
        f"{CLASSIFY}?candidate_labels=cat,,dog",
        {"content": GOOD, "headers": IMAGE},
        400,
        "labels[1] = '': is blank",
    ),
    "bytes with a bad template": (
        f"{CLASSIFY}?candidate_labels=cat&hypothesis_template=x",
        {"content": GOOD, "headers": IMAGE},
        400,
        "has no {}",
    ),
    "no bytes": (f"{CLASSIFY}?candidate_labels=cat", {"content": b"", "headers": IMAGE}, 400, "body: is empty"),
    "bytes that are no picture": (
        f"{CLASSIFY}?candidate_labels=cat",
        {"content": b"GIF89a", "headers": IMAGE},
        400,
        "not a JPEG, PNG or WebP",
    ),
    "JSON with labels in the query": (
        f"{CLASSIFY}?candidate_labels=cat",
        {"json": classify(b64(GOOD))},
        400,
        "put them into parameters",
    ),
    "another path": ("/v1/chat/completions", {"json": {}}, 404, "no such path"),
    "a slash too many": (f"{EMBED}/", {"json": {"input": "x"}}, 404, "no such path"),
    "a path that climbs": ("/v1/../../etc/passwd", {"json": {}}, 404, "no such path"),
    "a method that is none": ("/v1/models", {"json": {}}, 405, "method not allowed"),
    "a method of health": ("/healthz", {"json": {}}, 405, "method not allowed"),
}
