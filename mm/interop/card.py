"""The model card: a README.md whose every number comes from the model, its config or a results file (or its user)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.interop.origin import Origin
from mm.interop.provenance import short, short_source
from mm.interop.results import Found

USES = {
    "mm": "import mm\nmodel = mm.load({here})",
    "open_clip": 'import open_clip\nmodel, _, preprocess = open_clip.create_model_and_transforms("{scheme}:{here}")\n'
    "model.eval()\n"
    'tokenizer = open_clip.get_tokenizer("{scheme}:{here}")',
    "transformers": "from transformers import AutoModel, AutoProcessor\n"
    'model = AutoModel.from_pretrained("{here}")\nprocessor = AutoProcessor.from_pretrained("{here}")',
    "diffusers": "from diffusers import DiffusionPipeline\n"
    'pipeline = DiffusionPipeline.from_pretrained("{here}", trust_remote_code=True)\n'
    'picture = pipeline("red heart").images[0]',
}


def card(
    origin: Origin,
    kind: str,
    name: str,
    licence: str,
    results: Sequence[Found],
    shards: Sequence[dict[str, Any]],
    about: str = "",
) -> str:
    """The text. `shards`: the manifests of the training shards that could be read; `results`: evaluations.

    `about`: Markdown of whoever releases it, which stands after how it is used.
    """
    if kind in ("open_clip", "transformers"):  # which have no place for a denoiser: it is left out
        tensors = {name: tensor for name, tensor in origin.tensors.items() if not name.startswith("denoiser.")}
        origin = replace(origin, model=replace(origin.model, denoiser=None), tensors=tensors)
    parts = [_front(origin, kind, name, licence, results, shards), f"# {name}", _what(origin), _use(origin, kind, name)]
    parts += [about.strip()]
    parts += [_shapes(origin), _data(origin, shards), _training(origin), _evaluation(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(
    origin: Origin, kind: str, name: str, licence: str, results: Sequence[Found], shards: Sequence[dict[str, Any]]
) -> str:
    task = "image-feature-extraction" if "text" not in origin.parts else "zero-shot-image-classification"
    lines = [f"license: {_yaml(licence)}", f"library_name: {kind}"]
    lines.append(f"pipeline_tag: {'text-to-image' if kind == 'diffusers' else task}")
    tags = ["mm", "clip"] if origin.contrastive is not None and "text" in origin.parts else ["mm"]
    lines += ["tags:", *(f"- {tag}" for tag in [*tags, *(["diffusion"] if origin.model.denoiser else [])])]
    sources = sorted({str(one["source"]) for one in shards if one.get("source")})
    if sources:
        lines += ["datasets:", *(f"- {_yaml(source)}" for source in sources)]
    if base := _base(origin):
        lines.append(f"base_model: {_yaml(base)}")
    if results:
        lines += ["model-index:", f"- name: {_yaml(name)}", "  results:"]
        for one in results:
            data = ", ".join(map(str, one.result.get("data") or ["its shards"]))
            lines += ["  - task:", f"      type: {task}", "    dataset:", f"      name: {_yaml(data)}"]
            lines += ["      type: webdataset", f"    source:\n      name: {_yaml(one.file)}", "    metrics:"]
            for what, share in one.shares().items():
                lines += ["    - type: accuracy", f"      name: {_yaml(what)}", f"      value: {share.value:.6g}"]
    return "\n".join(["---", *lines, "---"])


def _base(origin: Origin) -> str:
    """The hub's repository of the weights that this model is a copy of, where it is known."""
    note = origin.note.get("open_clip") or {}
    start = origin.train.start.model or origin.train.start.image if origin.train is not None else ""
    if not note and start.startswith("open_clip:"):  # what a run began from
        name, _, tag = start.removeprefix("open_clip:").partition("@")[0].partition("/")
        note = {"name": name, "tag": tag}
        if name.startswith("hf-hub:"):
            note = {"name": f"{name}/{tag}"}
    if note.get("name", "").startswith("hf-hub:"):
        return str(note["name"]).removeprefix("hf-hub:")
    if not note.get("tag"):
        return ""
    from open_clip.pretrained import get_pretrained_cfg

    return str((get_pretrained_cfg(note["name"], note["tag"]) or {}).get("hf_hub", "")).rstrip("/")


def _what(origin: Origin) -> str:
    able = ["encodes pictures" if "text" not in origin.parts else "encodes pictures and texts into one space"]
    if "text" in origin.parts and origin.contrastive is not None:
        able.append("labels pictures with words of your own")
    if origin.model.denoiser is not None:
        able.append("draws pictures from text")
    said = " and ".join([", ".join(able[:-1]), able[-1]] if len(able) > 1 else able)
    return f"This model {said}. Released by `mm` from {_source(origin)}."


def _source(origin: Origin) -> str:
    for library in ("open_clip", "timm"):
        note = origin.note.get(library)
        if note:
            tag = f"/{note['tag']}" if note.get("tag") else ""
            return f"the {library} model `{Path(str(note.get('name', ''))).name}{tag}`"
    return f"the run `{Path(origin.source).resolve().name}`"


def _use(origin: Origin, kind: str, name: str) -> str:
    hub = "/" in name
    here = name
    if kind == "mm":
        here = f'"hub:{name}"' if hub else f'"{name}"'
    code = USES[kind].replace("{here}", here).replace("{scheme}", "hf-hub" if hub else "local-dir")
    if kind == "mm" and "text" in origin.parts:
        if origin.contrastive is not None:
            code += '\nmodel.classifier(["cat", "dog"]).top(picture)  # picture: a PIL.Image'
        if origin.model.denoiser is not None:
            code += '\nmodel.generate(["red heart"], seeds=[0])[0]'
    return f"## Use\n\n```python\n{code}\n```"


def _shapes(origin: Origin) -> str:
    image, text = origin.model.image, origin.model.text
    rows = [("embedding", str(origin.model.embed_dim))]
    see = f"{image.size} x {image.size} pixels, mean {_numbers(image.mean)}, std {_numbers(image.std)}"
    rows.append(("pictures", f"{see}, {image.resize}, {image.interpolation}"))
    if "text" in origin.parts:
        rows.append(("texts", f"{text.context_length} tokens of {origin.tokenizer.vocab_size}"))
    rows.append(("vision encoder", f"{_tower(image)}, {_count(origin, 'image')}"))
    if "text" in origin.parts:
        rows.append(("text encoder", f"{_tower(text)}, {_count(origin, 'text')}"))
    if origin.model.denoiser is not None:
        part = origin.model.denoiser
        count = _million(sum(t.numel() for n, t in origin.tensors.items() if n.startswith("denoiser.")))
        rows.append(("denoiser", f"width {part.width}, {part.depth} blocks, {part.heads} heads, {count}"))
    scale = origin.tensors.get("objectives.contrastive.logit_scale")
    if scale is not None:
        bias = origin.tensors.get("objectives.contrastive.logit_bias")
        rows.append(
            ("logit scale", f"{float(scale.exp()):.6g}" + (f", bias {float(bias):.6g}" if bias is not None else ""))
        )
    rows.append(("all of it", _million(sum(tensor.numel() for tensor in origin.tensors.values()))))
    return "## Shape\n\n" + _table(("part", "what"), rows)


def _tower(part: Any) -> str:
    if part.tower is not None:
        return f"{part.tower.library}'s {part.tower.name}"
    patch = f", patches of {part.patch}" if hasattr(part, "patch") else ""
    return f"width {part.width}, {part.depth} blocks, {part.heads} heads{patch}"


def _count(origin: Origin, side: str) -> str:
    names = (f"encoders.{side}.", f"adapters.{side}.")
    return _million(sum(tensor.numel() for name, tensor in origin.tensors.items() if name.startswith(names)))


def _data(origin: Origin, shards: Sequence[dict[str, Any]]) -> str:
    if origin.train is None or not origin.train.data.train:
        if origin.train is None:
            return f"## Data\n\nNot trained by `mm`: see {_source(origin)} for what it was trained on."
        return ""
    lines = [f"Trained on the shards `{short(origin.train.data.train)}`."]
    for one in shards:
        what = one.get("source_version") or one.get("source") or "image-caption pairs"
        count = sum(v for k, v in _splits(one).items() if k.startswith("train")) or one.get("samples")
        lines.append(f"- {what}" + (f": {count} training samples" if count else ""))
        if one.get("license"):
            lines[-1] += f"; licence {one['license']}"
        if one.get("attribution"):
            lines[-1] += f"; {one['attribution']}"
    if not shards:
        lines.append("Their manifest was not there when this was written: number of samples and licence are not known.")
    return "## Data\n\n" + "\n".join(lines)


def _splits(manifest: dict[str, Any]) -> dict[str, int]:
    found = manifest.get("samples") if isinstance(manifest.get("samples"), dict) else manifest.get("splits")
    return {str(k): v for k, v in found.items() if isinstance(v, int)} if isinstance(found, dict) else {}


def _training(origin: Origin) -> str:
    config = origin.train
    if config is None or not config.data.train:
        return ""
    weights = {
        name: getattr(config.objectives, name).weight
        for name in ("contrastive", "diffusion", "align")
        if getattr(config.objectives, name) is not None
    }
    step = str(origin.note.get("step", ""))
    rows = [("steps", step or str(config.run.steps)), ("batch", str(config.data.batch_size))]
    rows.append(("objectives", ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())))
    rows.append(("optimizer", f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule}"))
    rows += [("seed", str(config.run.seed)), ("precision", config.parallel.precision)]
    began = {part: short_source(getattr(config.start, part)) for part in ("model", "image", "text", "denoiser")}
    if any(began.values()):
        rows.append(("began from", ", ".join(f"{part}: {source}" for part, source in began.items() if source)))
    kept = {part: getattr(config.adapt, part) for part in ("image", "text", "denoiser")}
    if set(kept.values()) != {"all"}:
        rows.append(("what trained", ", ".join(f"{part}: {what}" for part, what in kept.items())))
    if origin.note.get("commit"):
        rows.append(("commit", str(origin.note["commit"])))
    return "## Training\n\n" + _table(("what", "value"), rows)


def _evaluation(results: Sequence[Found]) -> str:
    if not results:
        return ""
    blocks = []
    for one in results:
        told = [f"From `{one.file}`, written {one.date}"]
        told += [f"of {short_source(str(one.result['run']))}"] if one.result.get("run") else []
        told += [f"step {one.result['step']}"] if one.result.get("step") is not None else []
        told += [f"code {one.result['commit']}"] if one.result.get("commit") else []
        told += [f"on {', '.join(map(str, one.result['data']))}"] if one.result.get("data") else []
        rows = [
            (what, f"{100 * share.value:.1f} %" + (f" ± {100 * share.error:.1f}" if share.error else ""), str(share.n))
            for what, share in one.shares().items()
        ]
        blocks.append(f"{', '.join(told)}:\n\n{_table(('what', 'value', 'n'), rows)}")
    return "## Evaluation\n\n" + "\n\n".join(blocks)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _million(count: int) -> str:
    return f"{count / 1e6:,.2f} M parameters"


def _yaml(text: str) -> str:
    """A string of YAML, which JSON's are."""
    plain = text.replace("-", "").replace("/", "").replace(".", "").replace("_", "")
    return text if plain.isalnum() and not plain.isdigit() else json.dumps(text)
