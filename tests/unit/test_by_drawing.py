"""The generator as a classifier: the same noise for every label, the same answer in any company, fused as promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_api import WORDS, export, pictures, threads, tiny
from torch import Tensor, nn

import mm
from mm.api import LoadedModel
from mm.config import ConfigError
from mm.data.shards import expand
from mm.diffusion.noise import normal
from mm.diffusion.schedule import Schedule
from mm.evaluation.by_drawing import ByDrawing, classifier
from mm.evaluation.explained import LEVELS, Explainer, rounds_of
from mm.evaluation.fusion import fit, fused
from mm.evaluation.samples import read_samples
from mm.types import Encoded, Tokens

LABELS = [word for word in WORDS if word]

assert threads  # a fixture, used by name


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return mm.load(str(export(root, tmp_path_factory.mktemp("runs") / "tiny", tiny(root))), device="cpu")


def made(model: LoadedModel, mode: Any, **options: Any) -> ByDrawing:
    base = model.classifier(options.pop("labels", LABELS))
    return classifier(base, model.inference, mode=mode, **options)


def prepared(model: LoadedModel, count: int) -> Tensor:
    return model.inference.prepare("image", pictures(count))[0]


@pytest.mark.parametrize("mode", ["diffusion", "hybrid"])
def test_an_image_gets_the_same_probabilities_alone_in_a_batch_and_in_any_place(
    model: LoadedModel, threads: int, mode: str
) -> None:
    classify = made(model, mode, levels=3, rounds=2, keep=0.5, **({"k": 4} if mode == "hybrid" else {}))
    images = pictures(4)
    together = classify(images)
    assert together.shape == (4, len(LABELS)) and together.dtype == torch.float32
    torch.testing.assert_close(together.sum(1), torch.ones(4))
    assert len(together.unique(dim=0)) == 4
    assert torch.equal(classify([images[3]])[0], together[3])
    assert torch.equal(classify(images[::-1]).flip(0), together)
    assert classify.top(images[2], 2)[0] == (LABELS[together[2].argmax()], together[2].max())
    assert classify([]).shape == (0, len(LABELS))


def test_a_score_is_the_log_of_the_error_by_the_definition(model: LoadedModel) -> None:
    inference = model.inference
    explainer, images = Explainer(inference, LABELS, levels=3, seed=5), prepared(model, 2)
    found = explainer.scores(explainer.latents(images), torch.tensor([[4, 1], [0, 4]]), range(3))
    tokens, mask, pooled = inference.text_condition([LABELS[4]])
    schedule = Schedule.from_config(inference.config.objectives.diffusion)  # type: ignore[arg-type]
    assert inference.model.denoiser is not None
    for row, column in ((0, 0), (1, 1)):
        x, expected = images[row : row + 1] / 127.5 - 1, 0.0
        for level in range(3):
            sigma = torch.tensor([(level + 0.5) / 3])
            z = schedule.add_noise(x, normal(torch.tensor([5]), tuple(x.shape[1:]), LEVELS + level), sigma)
            with torch.inference_mode():
                told = {"text": Encoded(Tokens(tokens, mask, max_len=tokens.shape[1]), pooled)}
                keep = {"text": torch.ones(1), "image": torch.zeros(1)}
                drawn = inference.model.denoiser(z, sigma, *inference.model.condition(told, keep))
            expected -= float((drawn - x).square().mean().log())
        assert found[row, column] == pytest.approx(expected, rel=1e-5)


class Blind(nn.Module):
    """Draws something that depends on the noisy image and the level and not on what it is told."""

    def forward(self, x: Tensor, t: Tensor, condition: Tokens, pooled: Tensor) -> Tensor:
        return x * t.view(-1, 1, 1, 1)


def test_every_label_meets_the_same_noise_at_the_same_levels(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model.inference.model._modules, "denoiser", Blind())
    explainer = Explainer(model.inference, LABELS, levels=4, seed=0)
    everything = torch.arange(len(LABELS)).expand(3, -1)
    scores = explainer.scores(explainer.latents(prepared(model, 3)), everything, range(4))
    assert torch.equal(scores, scores[:, :1].expand_as(scores)) and len(scores[:, 0].unique()) == 3
    probabilities = made(model, "diffusion", levels=4)(pictures(3))
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / len(LABELS)))
    other = Explainer(model.inference, LABELS, levels=4, seed=1)
    assert not torch.equal(other.scores(other.latents(prepared(model, 3)), everything, range(4)), scores)


def test_rounds_that_keep_every_label_find_what_one_round_finds(model: LoadedModel) -> None:
    assert sorted(level for part in rounds_of(7, 3) for level in part) == list(range(7))
    for mode in ("diffusion", "hybrid"):
        whole, parts = (made(model, mode, levels=7, rounds=n, keep=1.0)(pictures(3)) for n in (1, 3))
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_dropped_labels_cost_nothing_and_end_below_those_that_stayed(model: LoadedModel) -> None:
    classify, asked = made(model, "diffusion", levels=4, rounds=2, keep=0.3), []
    score = classify.explainer.scores

    def counted(latents: Tensor, candidates: Tensor, levels: Any, label: str = "") -> Tensor:
        asked.append(candidates)
        return score(latents, candidates, levels, label)

    classify.explainer.scores = counted  # type: ignore[method-assign]
    probabilities = classify(pictures(4))
    assert [tuple(part.shape) for part in asked] == [(4, 7), (4, 3)]
    kept = torch.zeros_like(probabilities).scatter(1, asked[1], 1.0).bool()
    for row, stay in zip(probabilities, kept, strict=True):
        assert row[stay].min() >= row[~stay].max()
        assert len(row[~stay].unique()) == 4, "they keep their order"


class Oracle(nn.Module):
    """Draws image i exactly from its own noise where it is told caption i, and nothing otherwise."""

    def __init__(self, inference: Any, images: Tensor, captions: list[str], schedule: Schedule) -> None:
        super().__init__()
        self.pooled, self.schedule = inference.text_condition(captions)[2], schedule
        self.x = images / 127.5 - 1

    def forward(self, x: Tensor, t: Tensor, condition: Tokens, pooled: Tensor) -> Tensor:
        copies = len(x) // len(pooled)
        text = pooled[:, : self.pooled.shape[1]].repeat_interleave(copies, 0)
        which = torch.cdist(text, self.pooled).argmin(1)  # whose caption each was told
        noise = torch.stack([normal(torch.tensor([0]), tuple(x.shape[1:]), LEVELS + i) for i in range(4)])
        drawn = torch.zeros_like(x)
        for row in range(len(x)):
            if which[row] >= len(self.x):
                continue
            clean = self.x[which[row]]
            level = int(t[row] * 4)
            whole = self.schedule.add_noise(clean[None], noise[level : level + 1], t[row : row + 1])[0]
            if torch.allclose(whole, x[row], atol=1e-5):
                drawn[row] = clean
        return drawn


def test_a_denoiser_that_knows_the_captions_classifies_perfectly(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, schedule = prepared(model, 5), Schedule.from_config(model.config.objectives.diffusion)  # type: ignore[arg-type]
    oracle = Oracle(model.inference, images, LABELS, schedule)
    monkeypatch.setitem(model.inference.model._modules, "denoiser", oracle)
    contrastive = model.classifier(LABELS)(pictures(5)).argmax(1)
    assert contrastive.tolist() != [0, 1, 2, 3, 4]
    for options in ({"mode": "diffusion", "levels": 4}, {"mode": "hybrid", "levels": 4, "k": 7}):
        assert made(model, **options)(pictures(5)).argmax(1).tolist() == [0, 1, 2, 3, 4]
    fusion = (hybrid := made(model, "hybrid", levels=4, k=7, beta=0.0)).calibrate(images, LABELS[:5])
    assert fusion.right_before < 1 == fusion.right_after and hybrid.options.beta == fusion.beta > 0
    assert hybrid.scores_of_images(images).argmax(1).tolist() == [0, 1, 2, 3, 4]
    assert fusion.nll_after < fusion.nll_before and fusion.n == 5 and "top-1" in str(fusion)


def test_hybrid_without_weight_on_the_drawing_is_the_contrastive_classifier(model: LoadedModel) -> None:
    images = pictures(6)
    found = made(model, "hybrid", levels=2, beta=0.0, k=3)(images)
    torch.testing.assert_close(found, model.classifier(LABELS)(images), rtol=1e-6, atol=0)


def test_hybrid_adds_both_opinions_with_their_weights(model: LoadedModel) -> None:
    classify, images = made(model, "hybrid", levels=3, k=4, alpha=0.5, beta=20.0), prepared(model, 3)
    places, prior, scores = classify.opinions(images)
    plain = model.classifier(LABELS)(pictures(3)).double()
    torch.testing.assert_close(prior, plain.log().gather(1, places))
    shares = (0.5 * prior + 20 * scores).softmax(1) * plain.gather(1, places).sum(1, keepdim=True)
    torch.testing.assert_close(classify.scores_of_images(images).double().gather(1, places), shares)


def test_hybrid_leaves_labels_that_are_no_candidates_as_they_were(model: LoadedModel) -> None:
    images = pictures(6)
    plain, found = model.classifier(LABELS)(images), made(model, "hybrid", levels=2, beta=500.0, k=3)(images)
    candidates = torch.zeros_like(plain).scatter(1, plain.topk(3).indices, 1.0).bool()
    assert torch.equal(found[~candidates], plain[~candidates])
    assert (found[candidates] != plain[candidates]).all()
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    assert all(candidates[row, best] for row, best in enumerate(found.argmax(1).tolist()))


def test_sigmoid_probabilities_move_against_each_other_only() -> None:
    torch.manual_seed(0)
    contrastive = torch.rand(4, 9) * 0.8 + 0.1
    places = contrastive.topk(4).indices
    prior = contrastive.double().gather(1, places).logit()
    found = fused(contrastive, places, prior, prior + torch.randn(4, 4, dtype=torch.float64), "sigmoid")
    moved = found.double().gather(1, places).logit()
    torch.testing.assert_close(moved.mean(1), prior.mean(1), rtol=1e-5, atol=1e-5)
    assert ((moved - prior).abs() > 1e-3).any(1).all()
    untouched = torch.ones_like(found).scatter(1, places, 0.0).bool()
    assert torch.equal(found[untouched], contrastive[untouched])
    torch.testing.assert_close(fused(contrastive, places, prior, prior, "sigmoid"), contrastive)


def test_the_fitted_weights_are_the_likeliest() -> None:
    torch.manual_seed(0)
    prior, scores = torch.randn(400, 5, dtype=torch.float64), 0.1 * torch.randn(400, 5, dtype=torch.float64)
    truth = torch.distributions.Categorical(logits=0.5 * prior + 20 * scores).sample()
    found = fit(prior, scores, truth)
    assert found.alpha == pytest.approx(0.5, abs=0.15) and found.beta == pytest.approx(20, abs=3)

    def loss(alpha: float, beta: float) -> float:
        return float(torch.nn.functional.cross_entropy(alpha * prior + beta * scores, truth))

    assert found.nll_after == pytest.approx(loss(found.alpha, found.beta))
    for alpha, beta in ((1.03, 1), (0.97, 1), (1, 1.03), (1, 0.97)):
        assert loss(found.alpha * alpha, found.beta * beta) > found.nll_after
    useless, alone = fit(prior, -scores, truth), fit(prior, torch.zeros_like(scores), truth)
    assert useless.beta == 0, "what is no help gets no weight"
    assert useless.alpha == pytest.approx(alone.alpha) and useless.nll_after == pytest.approx(alone.nll_after)
    alone = fit(torch.zeros_like(prior), scores, truth, free=False)
    assert alone.alpha == 1 and alone.beta > 10
    certain = fit(prior, torch.nn.functional.one_hot(truth, 5).double(), truth)
    assert certain.right_after == 1 and certain.beta < 1e6


def test_shards_are_classified_as_they_stream(model: LoadedModel, openmoji_shards: Path) -> None:
    shards = str(openmoji_shards / "val-*.tar")
    classify = made(model, "hybrid", levels=2, k=2)
    found = list(classify.stream(shards, k=1, limit=6))
    read = read_samples(expand(shards), model.inference.processor("image"))
    probabilities = classify.scores_of_images(read.images[:6])
    assert [prediction.key for prediction in found] == read.keys[:6]
    assert [prediction.top[0][0] for prediction in found] == [LABELS[at] for at in probabilities.argmax(1).tolist()]


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("draw", {}, "mode = 'draw': must be diffusion or hybrid"),
        ("hybrid", {"k": 0}, "k = 0: must be at least 1"),
        ("hybrid", {"levels": 0}, "levels = 0: must be at least 1"),
        ("hybrid", {"levels": 2.5}, "levels = 2.5: must be at least 1, a whole"),
        ("diffusion", {"levels": 4, "rounds": 5}, "rounds = 5: must be at most levels, 4"),
        ("diffusion", {"k": 5}, "k = 5: no option of mode diffusion"),
        ("hybrid", {"level": 5}, "level = 5: no option of mode hybrid.*levels"),
        ("hybrid", {"keep": 0}, "keep = 0: must be a number above 0"),
        ("hybrid", {"beta": float("nan")}, "beta = nan: must be a number"),
        ("hybrid", {"seed": 2**63}, "seed = "),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    model: LoadedModel, mode: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        made(model, mode, **options)
    assert "\n" not in str(caught.value)


def test_a_truth_that_does_not_fit_is_refused_and_changes_nothing(model: LoadedModel) -> None:
    classify = made(model, "hybrid", levels=1, k=1)
    before = classify.options.beta
    worst = model.classifier(LABELS)(pictures(2)).argmin(1)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: classify.calibrate(pictures(2), [0]), "1 labels for 2 images"),
        (lambda: classify.calibrate(pictures(1), ["no such label"]), "none of the 7 labels"),
        (lambda: classify.calibrate(pictures(1), [7]), "none of the 7 labels"),
        (lambda: classify.calibrate(pictures(2), worst), "none has its label among the candidates"),
        (lambda: classify.calibrate([], []), "of 0 images"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()
    assert classify.options.beta == before


def test_models_without_an_objective_say_so(root: Path, tmp_path: Path) -> None:
    config = tiny(root)
    config.model.denoiser, config.objectives.diffusion, config.objectives.align = None, None, None
    bare = mm.load(str(export(root, tmp_path / "bare", config)), device="cpu")
    for mode in ("diffusion", "hybrid"):
        with pytest.raises(ConfigError, match="objectives.diffusion = None"):
            made(bare, mode)
    with pytest.raises(ConfigError, match="needs a model trained with objectives.contrastive"):
        classifier(None, bare.inference, mode="hybrid", labels=["a"])
    with pytest.raises(ValueError, match="labels = None"):
        classifier(None, bare.inference, mode="diffusion")
