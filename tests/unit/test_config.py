"""Reading, overriding, refusing, saving and comparing configs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mm.config
from mm.config import AlignConfig, ConfigError, TrainConfig, validate
from mm.fields import leaves, tree
from mm.rules import RULES
from mm.settings import difference, from_dict, load, override, read, save, to_dict


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def base(root: Path) -> TrainConfig:
    return load(root / "configs" / "debug.py")


def write(folder: Path, body: str) -> Path:
    path = folder / "config.py"
    path.write_text("from mm.config import *\nfrom mm.config import RunConfig, AlignConfig\n" + body, encoding="utf-8")
    return path


# -- load


def test_every_config_of_the_repository_is_possible(root: Path) -> None:
    for path in sorted((root / "configs").glob("*.py")):
        validate(load(path))


def test_debug_config_is_what_outside_scripts_expect(base: TrainConfig) -> None:
    assert base.parallel.precision == "fp32" and not base.parallel.compile and base.parallel.device == "cpu"
    assert base.run.log_every == 1 and base.checkpoint.every == 5 and base.run.steps == 20


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x = 1", "no config()"),
        ("def config(): return {}", "returned a dict"),
        ("def config(): return TrainConfig(run=RunConfig(step=3))", "RunConfig has no field step; did you mean steps?"),
        (
            "def config():\n    c = TrainConfig()\n    c.run.log_evry = 1\n    return c",
            "RunConfig has no field log_evry; did you mean log_every?",
        ),
        ("def config(:", "line 3"),
    ],
)
def test_load_refuses(tmp_path: Path, body: str, expected: str) -> None:
    path = write(tmp_path, body)
    text = message(lambda: load(path))
    assert expected in text and str(path) in text


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    assert "nowhere.py" in message(lambda: load(tmp_path / "nowhere.py"))


def test_an_error_that_is_not_about_fields_keeps_its_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        load(write(tmp_path, "def config(): return 1 + 'a'"))


# -- override


@pytest.mark.parametrize(
    "argv",
    [["--data.batch-size", "8"], ["--data.batch_size", "8"], ["--data.batch_size=8"], ["--data.batch-size=8"]],
)
def test_both_spellings(base: TrainConfig, argv: list[str]) -> None:
    before = to_dict(base)
    assert override(base, argv).data.batch_size == 8
    assert to_dict(base) == before, "the caller's config changed"


def test_values_of_every_kind(base: TrainConfig) -> None:
    argv = "--optim.betas 0.8 0.95 --optim.lr 3e-4 --run.dir a/b --parallel.compile --run.tensorboard True".split()
    config = override(base, [*argv, "--data.train", "", "--model.text.causal", "--model.image.mean", "-1", "0", "1"])
    assert config.optim.betas == (0.8, 0.95) and config.optim.lr == 3e-4 and config.run.dir == "a/b"
    assert config.parallel.compile and config.run.tensorboard and config.model.text.causal
    assert config.model.image.mean == (-1.0, 0.0, 1.0) and config.data.train == ""
    config = override(config, ["--parallel.no-compile", "--run.tensorboard", "False", "--model.text.no_causal"])
    assert not (config.parallel.compile or config.run.tensorboard or config.model.text.causal)


def test_the_last_value_wins(base: TrainConfig) -> None:
    assert override(base, ["--run.seed", "1", "--run.seed", "2"]).run.seed == 2
    assert override(base, ["--parallel.compile", "--parallel.no-compile"]).parallel.compile is False


def test_sections_are_switched_on_and_off(base: TrainConfig) -> None:
    assert override(base, ["--objectives.diffusion", "None"]).objectives.diffusion is None
    config = override(base, ["--objectives.align.weight", "0.25", "--objectives.align", "default"])
    assert config.objectives.align is not None and config.objectives.align.weight == 0.25
    assert override(config, ["--objectives.align.weight=2"]).objectives.align == dataclasses.replace(
        AlignConfig(), weight=2.0
    )
    text = message(lambda: override(base, ["--objectives.align.weight", "0.5"]))
    assert "objectives.align = None" in text and "--objectives.align default" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data.batch-sise", "8"], "did you mean --data.batch-size?"),
        (["--data.batchsize=8"], "did you mean --data.batch_size?"),
        (["--lr", "1"], "did you mean --optim.lr?"),
        (["--model.imgae.width", "64"], "did you mean --model.image.width?"),
        (["--parallel.no-compil"], "did you mean"),
        (["--data.batch_size", "many"], "--data.batch_size: must be an int, not many"),
        (["--data.batch_size"], "must be an int, not nothing"),
        (
            ["--data.train", "a-0.tar", "a-1.tar"],
            "must be a string, not 2 words (a-0.tar ...); put quotes",
        ),
        (["--data.batch_size", "8", "9"], "must be an int, not 8 9"),
        (["--run.seed", "1", "--optim.betas", "1"], "--optim.betas: must be 2 floats, not 1"),
        (["--parallel.device", "gpu"], "one of auto, cpu, cuda, not gpu"),
        (["--parallel.compile", "maybe"], "True or False, not maybe"),
        (["--objectives.diffusion", "off"], "None (off) or default (on)"),
        (["--model", "None"], "a section"),
        (["configs/x.py"], "not a flag"),
    ],
)
def test_override_refuses(base: TrainConfig, argv: list[str], expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert expected in message(lambda: override(base, argv))
    assert capfd.readouterr() == ("", ""), "tyro's own message leaked"


def test_help_lists_every_field(base: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        override(base, ["--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    missing = [name for name, _, _ in leaves(base) if f"--{name.replace('_', '-')}" not in shown]
    off = (".align", ".tower", ".latents", ".modalities")  # no flags of their own
    assert [name for name in missing if not name.endswith(off)] == []


# -- validate


def test_every_rule_names_a_field_once() -> None:
    names = [name for _, _, names in RULES for name in names.split()]
    assert [name for name in names if name not in tree(TrainConfig)] == []
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--data.batch_size 10 --optim.accumulate 4", "data.batch_size = 10: must be a multiple of optim.accumulate"),
        ("--data.batch_size 10 --optim.accumulate 4", "= 4; try 8 or 12"),
        ("--model.image.width 66", "model.image.width = 66"),
        (
            "--model.image.heads 32",
            "must be a multiple of 4 x model.image.heads = 128; try 128",
        ),
        ("--model.image.size 33", "model.image.size = 33: must be a multiple of model.image.patch = 8; try 32 or 40"),
        ("--model.denoiser.patch 5", "multiple of model.denoiser.patch = 5; try 30 or 35"),
        ("--model.denoiser.heads 3", "model.denoiser.width = 64"),
        ("--model.text.heads 3", "model.text.width = 64: must be a multiple of model.text.heads = 3; try 63 or 66"),
        ("--model.denoiser.context_depth 3", "model.denoiser.context_depth = 3"),
        ("--model.text.tokenizer clip", "49408"),
        ("--run.steps 0", "run.steps = 0: must be at least 1"),
        ("--run.seed -1", "run.seed = -1: must be 0 or more"),
        ("--optim.lr 0", "optim.lr = 0.0: must be above 0"),
        ("--optim.lr nan", "optim.lr = nan"),
        ("--optim.lr inf", "optim.lr = inf"),
        ("--optim.betas 0.9 1", "optim.betas = (0.9, 1.0)"),
        ("--objectives.diffusion.drop_text 1.5", "objectives.diffusion.drop_text = 1.5: must be between 0 and 1"),
        ("--objectives.diffusion None --objectives.contrastive None", "nothing to train"),
        ("--model.denoiser None", "model.denoiser = None: objectives.diffusion needs it"),
        ("--objectives.align default --objectives.diffusion None", "needs objectives.diffusion"),
        ("--objectives.align default --objectives.align.block 3", "objectives.align.block = 3"),
        ("--objectives.align default --objectives.align.block 0", "objectives.align.block = 0"),
        ("--objectives.contrastive.init_scale 101", "objectives.contrastive.init_scale = 101.0: must be at most"),
    ],
)
def test_validate_refuses(base: TrainConfig, argv: str, expected: str) -> None:
    assert expected in message(lambda: validate(override(base, argv.split())))


@pytest.mark.parametrize(
    "argv",
    [
        "--objectives.diffusion None",
        "--objectives.diffusion None --model.denoiser None",
        "--objectives.contrastive None",
        "--objectives.align default --objectives.align.block 1",
        "--model.text.tokenizer clip --model.text.vocab_size 49408",
    ],
)
def test_validate_accepts(base: TrainConfig, argv: str) -> None:
    validate(override(base, argv.split()))


@pytest.mark.parametrize(
    ("owner", "name", "value", "expected"),
    [
        ("data", "batch_size", "64", "data.batch_size = '64': must be an int"),
        ("data", "batch_size", True, "data.batch_size = True: must be an int"),
        ("data", "buckets", "length", "data.buckets = 'length': must be one of none, text, aspect"),
        ("optim", "betas", (0.9,), "optim.betas = (0.9,): must be 2 floats"),
        ("optim", "lr", None, "optim.lr = None"),
        ("objectives", "align", True, "objectives.align = True: must be AlignConfig(...) or None"),
    ],
)
def test_validate_refuses_wrong_types_of_a_config_file(
    base: TrainConfig, owner: str, name: str, value: Any, expected: str
) -> None:
    setattr(getattr(base, owner), name, value)
    assert expected in message(lambda: validate(base))


def test_an_int_passes_for_a_float(base: TrainConfig) -> None:
    base.optim.clip = 1
    validate(base)


# -- save and read


def test_saved_config_reads_back(base: TrainConfig, tmp_path: Path) -> None:
    config = override(base, "--objectives.align default --model.denoiser None --optim.betas 0.5 0.6".split())
    save(config, tmp_path / "run" / "config.json")
    assert read(tmp_path / "run" / "config.json") == config
    assert json.loads((tmp_path / "run" / "config.json").read_text())["version"] == mm.config.VERSION
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_reader_never_sees_half_a_file(base: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save(base, path)
    whole = path.read_text()
    with path.open() as reader:  # opened before the second save: still the whole first one
        save(override(base, ["--run.steps", "7"]), path)
        assert reader.read() == whole
    assert read(path).run.steps == 7


def test_a_failed_save_leaves_the_old_file(base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(base, tmp_path / "config.json")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        save(override(base, ["--run.steps", "7"]), tmp_path / "config.json")
    assert read(tmp_path / "config.json") == base
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 999}, "version = 999"),
        ({"version": None}, "version = None"),
        ({"dta": {}}, "dta: no such field; did you mean data?"),
        ({"data": {"batch_sise": 1}}, "data.batch_sise: no such field; did you mean batch_size?"),
        ({"data": {"batch_size": "8"}}, "data.batch_size = '8': must be an int"),
        ({"data": None}, "data = None"),
        ({"optim": {"betas": [0.9]}}, "optim.betas"),
    ],
)
def test_read_refuses(base: TrainConfig, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"version": mm.config.VERSION, **to_dict(base), **change}))
    text = message(lambda: read(path))
    assert expected in text and str(path) in text


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_read_refuses_damage(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert str(path) in message(lambda: read(path))
    assert "missing.json" in message(lambda: read(tmp_path / "missing.json"))


def test_dicts_round_trip(base: TrainConfig) -> None:
    assert from_dict(to_dict(base)) == base
    assert from_dict({}) == TrainConfig()


# -- difference


def test_what_may_change_is_no_difference(base: TrainConfig) -> None:
    argv = "--run.steps 7 --run.log_every 3 --run.eval_every 3 --run.sample_every 3 --run.tensorboard --data.workers 3"
    argv += (
        " --parallel.threads 1 --parallel.precision bf16 --parallel.compile --checkpoint.every 1 --checkpoint.keep 1"
    )
    assert difference(base, override(base, argv.split())) == []


def test_what_must_not_change_is_named(base: TrainConfig) -> None:
    new = override(base, "--run.seed 9 --data.batch_size 8 --objectives.align default --model.denoiser None".split())
    assert sorted(difference(base, new)) == [
        "data.batch_size: 16 -> 8",
        "model.denoiser: set -> None",
        "objectives.align: None -> set",
        "run.seed: 0 -> 9",
    ]


def test_functions_are_reachable_from_config() -> None:
    for name in ("load", "override", "validate", "save", "read", "to_dict", "from_dict", "difference"):
        assert callable(getattr(mm.config, name))
    with pytest.raises(AttributeError):
        _ = mm.config.laod
