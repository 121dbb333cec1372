"""What a run folder holds, and whether two runs came to the same end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.training import manifest

if TYPE_CHECKING:
    from torch import Tensor


def whole(run: Path) -> list[int]:
    """The steps of the checkpoints that agree with their manifests, every byte read, newest first."""
    return [manifest.step_of(folder) for folder in manifest.committed(run) if not damage(folder)]


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    content, problem = manifest.inspect(folder)
    if problem or content is None:
        return problem
    return next((text for name, entry in content.files.items() if (text := manifest.damage(folder, name, entry))), "")


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a kill may have cut the last one."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def reached(run: Path) -> int:
    """The last step that metrics.jsonl knows, or that a checkpoint was made of."""
    return max([0, *(record["step"] for record in records(run)), *map(manifest.step_of, manifest.committed(run))])


def state(run: Path) -> tuple[int, str, dict[str, Tensor]]:
    """Step, running hash of the samples' keys, and every tensor of the newest whole checkpoint."""
    import torch

    from mm.config import CheckpointConfig
    from mm.distributed.world import World
    from mm.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(run, CheckpointConfig(), World())
    found = checkpoints.newest()
    assert found is not None, f"{run} has no checkpoint"
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in found.names.items()}
    checkpoints.read(found, tensors)
    return found.step, found.scalars["order"], tensors


def difference(run: Path, other: Path) -> str:
    """Where two runs ended differently, "" where every bit of step, order, state and export is the same."""
    import torch

    (step, order, ours), (other_step, other_order, theirs) = state(run), state(other)
    if step != other_step:
        return f"ended at step {step}, not {other_step}"
    if order != other_order:
        return "saw other samples"
    if ours.keys() != theirs.keys():
        return f"holds other tensors: {sorted(ours.keys() ^ theirs.keys())[0]}"
    for name, tensor in ours.items():
        pair = (tensor, theirs[name])
        if pair[0].dtype != pair[1].dtype or not torch.equal(
            *(t.contiguous().view(-1).view(torch.uint8) for t in pair)
        ):
            return f"{name} differs, by {_distance(*pair):.1e} of its largest value"
    if _export(run) != _export(other):
        return "the exports differ"
    return ""


def distance(run: Path, other: Path) -> float:
    """The largest difference between two runs' trained weights and averages, as a share of each tensor's largest."""
    ours, theirs = state(run)[2], state(other)[2]
    return max(_distance(ours[name], theirs[name]) for name in ours if not name.startswith("optim/"))


def order(run: Path) -> str:
    """The running hash over the keys of all global batches up to the newest whole checkpoint."""
    return state(run)[1]


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not one.numel():
        return 0.0 if one.shape == other.shape else float("inf")
    gap = (one.double() - other.double()).abs().max().item()
    return gap / max(other.double().abs().max().item(), 1e-12)


def _export(run: Path) -> bytes:
    return (run / "export/model.safetensors").read_bytes()
