"""Teachers from timm's list of models, `timm:NAME`.

Another size than the model's own resamples its position embeddings by timm's rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from proteus_cache.errors import UsageError, WeightsError
from proteus_cache.teachers.backbone import (
    TokenModel,
    check_size,
    check_tokens,
    describe,
    fit_backbone,
    load_into,
)
from proteus_cache.teachers.identity import Statistics
from proteus_cache.teachers.random_weights import NO_LICENCE, random_state
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.teachers.weights import RandomWeights, load_weights, parse_weights, state_digest

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_ANSWERS_S = 10.0
_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")


def load_timm(model_name: str, *, weights: str | None, home: Path, size_px: int | None) -> Teacher:
    """Build the teacher `timm:model_name`; arguments and errors as `registry.load_teacher`.

    Without `weights` timm's own download (kept by the Hugging Face hub, HF_HOME) is used.
    """
    name = f"timm:{model_name}"
    _check_name(model_name)
    chosen = parse_weights(weights) if weights is not None else None
    model = _create(model_name, size_px, is_pretrained=chosen is None)
    config = cast(Mapping[str, Any], model.pretrained_cfg)  # Any: timm's own record of mixed values
    side_px = int(config["input_size"][-1]) if size_px is None else size_px
    check_size(side_px, model.patch_embed.patch_size[0], name)
    licence = "unknown"
    if chosen is None:
        state: Mapping[str, Tensor] = model.state_dict()
        sha256 = state_digest(state)
        source = f"hf-hub:{config['hf_hub_id']}" if config.get("hf_hub_id") else str(config.get("url"))
        licence = config.get("license") or licence
    elif isinstance(chosen, RandomWeights):
        state = random_state(model, chosen.seed)
        sha256, source, licence = state_digest(state), str(chosen), NO_LICENCE
    else:
        loaded = load_weights(chosen, home, lambda raw: fit_backbone(model, raw, name))
        state, sha256, source = loaded.state, loaded.sha256, chosen.name
    load_into(model, state)
    identity = describe(
        model,
        name=name,
        architecture={"model_name": model_name, "img_size": side_px},
        size_px=side_px,
        weights_source=source,
        weights_sha256=sha256,
        licence=licence,
        mean=_statistics(config["mean"]),
        std=_statistics(config["std"]),
    )
    return Teacher(model, identity)


def outline_timm(model_name: str, size_px: int | None) -> tuple[TokenModel, int, Statistics, Statistics]:
    """The model `timm:model_name` on the meta device, the side of its views, and the pixels' mean and deviation.

    Raises:
        UsageError: as `load_timm`.
    """
    _check_name(model_name)
    with torch.device("meta"):
        model = _create(model_name, size_px, is_pretrained=False)
    config = cast(Mapping[str, Any], model.pretrained_cfg)  # Any: timm's own record of mixed values
    side_px = int(config["input_size"][-1]) if size_px is None else size_px
    check_size(side_px, model.patch_embed.patch_size[0], f"timm:{model_name}")
    return model, side_px, _statistics(config["mean"]), _statistics(config["std"])


def _check_name(model_name: str) -> None:
    """Refuse unknown models, and those of a family that has no tokens, before anything is built."""
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them"
        raise UsageError(f"timm {timm.__version__} has no model {model_name!r}; {hint}")
    if timm.models.model_entrypoint(model_name).__module__ not in _MODULES:
        raise UsageError(f"timm:{model_name} is no plain ViT; a teacher needs a CLS token and patch tokens")


def _create(model_name: str, size_px: int | None, *, is_pretrained: bool) -> TokenModel:
    size: dict[str, Any] = {} if size_px is None else {"img_size": size_px}  # Any: for timm's keyword arguments
    if is_pretrained and not timm.is_model_pretrained(model_name):
        raise WeightsError(f"timm has no published weights for {model_name}; pass --weights FILE or random:SEED")
    try:
        if is_pretrained:
            _ask_hub(model_name)
        model = timm.create_model(model_name, pretrained=is_pretrained, num_classes=0, **size)
    except Exception as error:  # hub clients raise errors of several unrelated libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if not is_pretrained:
            raise UsageError(f"timm cannot build {model_name} at {size_px} px: {reason}") from error
        raise WeightsError(
            f"cannot get the published weights of timm:{model_name} from {_source_of(model_name)} ({reason}); without "
            "network here, run the same command once where there is one with the same HF_HOME, or pass --weights FILE"
        ) from error
    if not isinstance(model, VisionTransformer | Eva):
        raise UsageError(f"timm:{model_name} is a {type(model).__name__}, not a plain ViT")
    check_tokens(model, f"timm:{model_name}")
    if model.attn_pool is not None:
        model.attn_pool = None  # type: ignore[assignment]  # as timm itself removes it: no part of the backbone
    return model


def _ask_hub(model_name: str) -> None:
    """Find out at once whether the hub answers: its own client asks again and again for a minute before it says.

    Raises:
        Exception: of the hub client, when nothing answers and the weights were never fetched.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    repository = _hub_repository(model_name)
    if repository is None or any(isinstance(try_to_load_from_cache(repository, file), str) for file in _HUB_FILES):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, _HUB_FILES[0]), timeout=_HUB_ANSWERS_S)
    except HfHubHTTPError:
        return  # it answers: timm looks for other files, and says what it lacks


def _hub_repository(model_name: str) -> str | None:
    """Where on the hub timm looks for published weights; None where it looks elsewhere."""
    config = timm.get_pretrained_cfg(model_name)
    name = None if config is None or config.file else config.hf_hub_id
    return str(name).partition("@")[0] if name else None


def _source_of(model_name: str) -> str:
    repository = _hub_repository(model_name)
    config = timm.get_pretrained_cfg(model_name)
    return f"https://huggingface.co/{repository}" if repository else str(config.url if config else "its publisher")


def _statistics(values: tuple[float, ...]) -> Statistics:
    red, green, blue = (float(value) for value in values)
    return (red, green, blue)
