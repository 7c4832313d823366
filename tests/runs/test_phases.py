"""Phases of the tokenizer's training: resolved in order, and refused where they cannot work."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.training_steps import BATCH, tiny_config

from vavae.losses.config import TokenizerLossConfig
from vavae.runs.phases import TokenizerPhaseConfig, resolve_phases

_PUBLISHED = [
    {"losses": {"vision_foundation": {"weight": 0.5, "cos_margin": 0.0, "distmat_margin": 0.0}}},
    {"from_images": 100, "losses": {"vision_foundation": {"weight": 0.1}}},
    {"from_images": 115, "losses": {"vision_foundation": {"cos_margin": 0.5, "distmat_margin": 0.25}}},
]


def _resolve(changes: list[dict[str, Any]], images: int) -> list[Any]:
    configs = tuple(TokenizerPhaseConfig.model_validate(change) for change in changes)
    return resolve_phases(configs, TokenizerLossConfig(kl_weight=3.0), (), images)


def test_each_phase_keeps_what_it_does_not_change():
    phases = _resolve(_PUBLISHED, 130)
    assert [(phase.from_images, phase.until_images) for phase in phases] == [(0, 100), (100, 115), (115, 130)]
    seen = [phase.losses.vision_foundation for phase in phases]
    assert [(vf.weight, vf.cos_margin, vf.distmat_margin) for vf in seen] == [
        (0.5, 0.0, 0.0),
        (0.1, 0.0, 0.0),
        (0.1, 0.5, 0.25),
    ]
    assert {phase.losses.kl_weight for phase in phases} == {3.0}


def test_noise_on_latents_is_switched_off_and_on_by_its_scale():
    losses = TokenizerLossConfig.model_validate({"latent_noise": {"kind": "add"}})
    changes = [{"from_images": 1, "losses": {"latent_noise": {"scale": 0}}}, {"from_images": 2}]
    phases = resolve_phases(tuple(map(TokenizerPhaseConfig.model_validate, changes)), losses, (), 3)
    assert [(noise.kind, noise.scale) for noise in (phase.losses.latent_noise for phase in phases) if noise] == [
        ("add", 3.0), ("add", 0.0), ("add", 0.0),
    ]  # fmt: skip


def test_frozen_parts_stay_so_until_a_phase_changes_them():
    phases = _resolve(
        [{"from_images": 1, "frozen": ["projection"]}, {"from_images": 2}, {"from_images": 3, "frozen": []}], 4
    )
    assert [phase.frozen for phase in phases] == [(), ("projection",), ("projection",), ()]


@given(
    starts=st.lists(st.integers(0, 50), unique=True, max_size=5).map(sorted),
    images=st.integers(1, 60),
)
def test_phases_tile_the_budget(starts: list[int], images: int):
    phases = _resolve([{"from_images": start} for start in starts], images)
    assert [image for phase in phases for image in range(phase.from_images, phase.until_images)] == list(range(images))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"stages": [{"from_images": BATCH + 1}]}, "multiple of batch_size"),
        ({"stages": [{"from_images": 2 * BATCH}, {"from_images": BATCH}]}, f"above {2 * BATCH}"),
        ({"frozen": ["encoder"]}, "losses.vision_foundation.weight=0"),
        ({"stages": [{"from_images": BATCH, "frozen": ["decoder"]}]}, f"from image {BATCH} on the decoder is frozen"),
        ({"stages": [{"losses": {"vision_foundation": {"projection": "teacher_to_latent"}}}]}, "projection"),
        (
            {"stages": [{"from_images": BATCH, "losses": {"latent_noise": {"scale": 0}}}]},
            "train_vavae.stages changes losses.latent_noise, which is null",
        ),
    ],
)
def test_impossible_phases_are_refused(training: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        tiny_config(train_vavae=training)


def test_a_frozen_encoder_needs_no_alignment():
    phase = {"from_images": BATCH, "frozen": ["encoder"], "losses": {"vision_foundation": {"weight": 0}}}
    config = tiny_config(train_vavae={"stages": [phase]})
    assert config.tokenizer_phases()[-1].frozen == ("encoder",)
