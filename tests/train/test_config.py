from __future__ import annotations

from pathlib import Path

import pytest

from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.train.config import TrainConfig, config_from_mapping

NEEDED: dict[str, object] = {"student": "vit_s14", "data": "pack", "out": "run"}


def _config(**settings: object) -> TrainConfig:
    return config_from_mapping(NEEDED | settings)


def test_defaults_are_the_released_recipe() -> None:
    config = _config()

    assert (config.epochs, config.global_batch, config.peak_lr) == (300, 1024, 1e-3)
    assert (config.warmup_epochs, config.warmup_lr, config.min_lr, config.schedule_lag_epochs) == (
        5,
        1e-6,
        1e-5,
        1,
    )
    assert (config.weight_decay, config.beta1, config.beta2, config.adam_eps) == (0.05, 0.9, 0.999, 1e-8)
    assert (config.weight_token, config.weight_feature, config.weight_patch, config.mask_ratio) == (
        1,
        1,
        1,
        0.5,
    )
    assert config.ema_decay == 0.99996
    assert (config.drop_path, config.decay_tokens, config.feature_cls_head, config.head_norm_eps) == (
        0,
        True,
        "token",
        1e-5,
    )
    assert (config.cooldown_epochs, config.weight_block, config.init) == (0, 0, None)


def test_vit_l_has_a_batch_and_rate_of_its_own() -> None:
    config = _config(student="vit_l14")

    assert (config.global_batch, config.peak_lr) == (256, 2.5e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epoch": 3}, "unknown setting 'warmup_epoch'; did you mean warmup_epochs"),
        ({"zzz": 3}, "unknown setting 'zzz'; choose student, data"),
        ({"epochs": "many"}, "epochs must be a whole number, got 'many'"),
        ({"seed": 2**62}, "seed must be below 2**62"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": float("nan")}, "lr must be a finite number and not negative, got nan"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"ema_decay": 1}, "ema_decay must be at least 0 and below 1, got 1.0"),
        ({"mask_ratio": 0}, "mask_ratio must be above 0 and at most 1, got 0.0"),
        ({"precision": "fp8"}, "precision must be fp32, fp16 or bf16, got 'fp8'"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"weight_token": 0, "weight_feature": 0, "weight_patch": 0}, "every loss has weight 0"),
        ({"decay_token": False}, "unknown setting 'decay_token'; did you mean decay_tokens"),
        ({"decay_tokens": "no"}, "decay_tokens must be true or false, got 'no'"),
        ({"decay_tokens": 0}, "decay_tokens must be true or false, got 0"),
        ({"drop_path": 1}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least 0 and below 1, got -0.1"),
        ({"drop_path": float("nan")}, "drop_path must be at least 0 and below 1, got nan"),
        (
            {"feature_cls_head": "tokens"},
            "feature_cls_head must be token or feature, got 'tokens'; did you mean token?",
        ),
        ({"head_norm_eps": -1e-5}, "head_norm_eps must be a finite number and not negative, got -1e-05"),
        ({"cooldown_epochs": -1}, "cooldown_epochs must not be negative, got -1"),
        ({"weight_block": -1}, "weight_block must be a finite number and not negative, got -1.0"),
        ({"weight_block": 1, "blocks": "block.x"}, "blocks must be block targets such as block.9 or block.9.raw"),
        ({"weight_block": 1, "blocks": ["block.1"]}, "blocks must be a name, got ['block.1']"),
        ({"blocks": "block.1"}, "blocks is set to block.1, and weight_block is 0; set weight_block too"),
        ({"init": 3}, "init must be a path, got 3"),
        ({"init_sha256": "0" * 64}, "init_sha256 is set, and init, the file that it is of, is not"),
        ({"init": "file", "init_sha256": "12"}, "init_sha256 must be 64 hexadecimal digits in lower case, got '12'"),
        ({"batch_size": 1}, "the patch loss masks every second view: batch_size must be at least 2"),
    ],
)
def test_a_wrong_setting_is_answered_with_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(**settings)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml: data is not set"):
        config_from_mapping({"student": "vit_s14", "out": "run"}, "study.yaml")


def test_an_unknown_student_is_found_before_torch_is_needed() -> None:
    with pytest.raises(UsageError, match="unknown student 'vit_h14'"):
        _config(student="vit_h14")


def test_values_as_yaml_gives_them_become_fields() -> None:
    config = _config(lr="1e-3", warmup_lr=0, epochs=10, max_steps=None, data=Path("other"))

    assert (config.lr, config.warmup_lr, config.epochs, config.max_steps) == (1e-3, 0.0, 10, None)
    assert config.data == Path("other")


def test_a_config_survives_its_mapping() -> None:
    config = _config(
        lr=3e-4,
        precision="bf16",
        max_steps=7,
        mask_ratio=0.3,
        decay_tokens=False,
        feature_cls_head="feature",
        weight_block=0.5,
        blocks="block.1,block.3.raw",
        init=Path("weights.pth"),
        init_sha256="ab" * 32,
    )

    assert config_from_mapping(config.to_mapping()) == config


def test_identity_holds_what_changes_results_and_nothing_else() -> None:
    config = _config()

    assert config.identity() == _config(batch_size=1024, lr=1e-3, workers=3, max_steps=5, out="elsewhere").identity()
    for changed in ({"lr": 2e-3}, {"seed": 1}, {"epochs": 301}, {"mask_ratio": 0.4}, {"weight_patch": 0.5}):
        assert config.identity() != _config(**changed).identity()
    options: dict[str, object] = {
        "drop_path": 0.1,
        "decay_tokens": False,
        "feature_cls_head": "feature",
        "weight_block": 1,
        "head_norm_eps": 1e-6,
        "cooldown_epochs": 10,
    }
    for name, value in options.items():
        assert config.identity() != _config(**{name: value}).identity()


def test_start_weights_are_known_by_their_content() -> None:
    first = _config(init="here.pth", init_sha256="ab" * 32)

    assert first.identity()["init"] == "ab" * 32
    assert first.identity() == _config(init="there.pth", init_sha256="ab" * 32).identity()
    assert first.identity() != _config(init="here.pth", init_sha256="cd" * 32).identity()


def test_blocks_are_known_by_their_names() -> None:
    first = _config(weight_block=1, blocks="block.1, block.2")

    assert first.block_targets == ("block.1", "block.2")
    assert first.identity() == _config(weight_block=1, blocks="block.1,block.2").identity()
    assert _config(weight_block=1).block_targets is None
    assert _config().block_targets == ()


@pytest.mark.parametrize(
    ("weights", "heads", "targets"),
    [
        ((1, 1, 1), ("token", "feature", "patch"), ("cls", "patch")),
        ((1, 0, 0), ("token",), ("cls",)),
        ((0, 1, 0), ("token", "feature"), ("cls", "patch")),
        ((0, 0, 1), ("patch",), ("patch",)),
    ],
)
def test_only_heads_and_targets_that_a_loss_needs_are_asked_for(
    weights: tuple[float, float, float], heads: tuple[str, ...], targets: tuple[str, ...]
) -> None:
    names = ("weight_token", "weight_feature", "weight_patch")
    config = _config(**dict(zip(names, weights, strict=True)))

    assert config.heads == heads
    assert config.targets == targets


def test_a_feature_loss_with_its_own_cls_head_needs_no_token_head() -> None:
    config = _config(weight_token=0, feature_cls_head="feature")

    assert config.heads == ("feature", "patch")
    assert config.targets == ("cls", "patch")


def test_a_block_loss_alone_needs_neither_heads_nor_targets_of_the_others() -> None:
    config = _config(weight_token=0, weight_feature=0, weight_patch=0, weight_block=1, batch_size=1)

    assert config.heads == config.targets == ()
