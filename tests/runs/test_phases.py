"""What changes in the course of the tokenizer's training."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.tiny import BATCH, tiny_config

from vavae.losses.config import TokenizerLossConfig
from vavae.runs.phases import TokenizerPhaseConfig, resolve_phases

_PUBLISHED = [
    {"losses": {"vision_foundation": {"weight": 0.5, "cos_margin": 0.0, "distmat_margin": 0.0}}},
    {"from_images": 100, "losses": {"vision_foundation": {"weight": 0.1}}},
    {"from_images": 115, "losses": {"vision_foundation": {"cos_margin": 0.5, "distmat_margin": 0.25}}},
]


def _resolve(stages: list[dict[str, Any]], images: int) -> list[Any]:
    configs = tuple(TokenizerPhaseConfig.model_validate(stage) for stage in stages)
    return resolve_phases(configs, TokenizerLossConfig(kl_weight=3.0), (), images)


def test_each_stage_goes_on_with_what_the_last_one_had():
    stages = _resolve(_PUBLISHED, 130)
    assert [(stage.from_images, stage.until_images) for stage in stages] == [(0, 100), (100, 115), (115, 130)]
    seen = [stage.losses.vision_foundation for stage in stages]
    assert [(vf.weight, vf.cos_margin, vf.distmat_margin) for vf in seen] == [
        (0.5, 0.0, 0.0),
        (0.1, 0.0, 0.0),
        (0.1, 0.5, 0.25),
    ]
    assert {stage.losses.kl_weight for stage in stages} == {3.0}


def test_frozen_parts_stay_so_until_a_stage_says_otherwise():
    stages = _resolve(
        [{"from_images": 1, "frozen": ["projection"]}, {"from_images": 2}, {"from_images": 3, "frozen": []}], 4
    )
    assert [stage.frozen for stage in stages] == [(), ("projection",), ("projection",), ()]


@given(
    starts=st.lists(st.integers(0, 50), unique=True, max_size=5).map(sorted),
    images=st.integers(1, 60),
)
def test_stages_tile_the_budget(starts: list[int], images: int):
    stages = _resolve([{"from_images": start} for start in starts], images)
    assert [image for stage in stages for image in range(stage.from_images, stage.until_images)] == list(range(images))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"stages": [{"from_images": BATCH + 1}]}, "multiple of batch_size"),
        ({"stages": [{"from_images": 2 * BATCH}, {"from_images": BATCH}]}, f"above {2 * BATCH}"),
        ({"frozen": ["encoder"]}, "losses.vision_foundation.weight=0"),
        ({"stages": [{"from_images": BATCH, "frozen": ["decoder"]}]}, f"from image {BATCH} on the decoder is frozen"),
        ({"stages": [{"losses": {"vision_foundation": {"projection": "teacher_to_latent"}}}]}, "projection"),
    ],
)
def test_stages_that_cannot_be_are_refused(training: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        tiny_config(train_vavae=training)


def test_a_frozen_encoder_needs_no_alignment():
    stage = {"from_images": BATCH, "frozen": ["encoder"], "losses": {"vision_foundation": {"weight": 0}}}
    config = tiny_config(train_vavae={"stages": [stage]})
    assert config.tokenizer_phases()[-1].frozen == ("encoder",)
