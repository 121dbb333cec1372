"""Hugging Face text encoders as the text encoder, through open_clip's adapter for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mm.adapters.hub import pretrained
from mm.config import ConfigError, ContrastiveConfig, ImageConfig, ModelConfig, TextConfig, TowerConfig
from mm.interop.architecture import hugging_face
from mm.interop.origin import Origin
from mm.interop.tokenizer_in import hub_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "hf:"
SIDE = "encoders.text.text."
CONTEXT = 77  # tokens of a caption


def read(source: str, weights: bool = True) -> Origin:
    """`hf:NAME` of a text encoder on the hub, in its cache, or in a folder: the mean of its last hidden states.

    There is no vision encoder; where the shared space has another width, a projection is trained. Raises ConfigError
    for a model that cannot be had, is of a kind that open_clip has no adapter for, or stores its weights as a pickle.
    """
    from open_clip.hf_configs import arch_dict

    name = source.removeprefix(PREFIX)
    config, vocabulary = hugging_face(name)
    kind = str(config.get("model_type"))
    if kind not in arch_dict:
        raise ConfigError(f"{source}: a {kind}, which open_clip has no text adapter for; it has {', '.join(arch_dict)}")
    width = int(config.get("hidden_size") or config["d_model"])
    options = {
        "text_cfg": {"hf_model_name": name, "hf_pooler_type": "mean_pooler", "hf_proj_type": None},
        "hf_config": config,
    }
    text = TextConfig(
        tokenizer="source",
        vocab_size=vocabulary,
        context_length=min(CONTEXT, int(config.get("max_position_embeddings") or CONTEXT)),
        masked=False,
        pool="last",
        tower=TowerConfig(library="open_clip", name=name, options=json.dumps(options, sort_keys=True)),
    )
    model = ModelConfig(embed_dim=width, image=ImageConfig(width=64, depth=1, heads=1), text=text, denoiser=None)
    tokenizer = hub_tokenizer(name, {}, text)
    origin = Origin(source, model, tokenizer, contrastive=ContrastiveConfig(), parts=("text",), fresh=(f"{SIDE}proj.",))
    if weights:
        origin.tensors = _weights(source, name, bool(config.get("is_encoder_decoder")))
    return origin


def _weights(source: str, name: str, both: bool) -> dict[str, Tensor]:
    """The encoder's tensors by mm's names; of an encoder and decoder the first."""
    from transformers import AutoModel

    options: dict[str, Any] = {"trust_remote_code": False} | ({} if both else {"add_pooling_layer": False})
    try:
        model = pretrained(AutoModel, name, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:160]
        raise ConfigError(f"{source}: no safetensors weights of it here or on the hub ({first})") from error
    model = model.encoder if both else model
    return {f"{SIDE}transformer.{key}": tensor.float().contiguous() for key, tensor in model.state_dict().items()}
