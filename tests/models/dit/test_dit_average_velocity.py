"""The embedding of the length of an interval: average velocities, their samples, exports and first weights."""

import pytest
import torch
import yaml
from support import small_models
from support.older_reader import reader_without
from support.small_dit import dit_inputs, random_dit
from support.trained_run import trained_run
from support.training_steps import DrawnLatents

from vavae.config.load import load
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import DESCRIPTION, WEIGHTS, LightningDiTDescription, load_exported_lightningdit, save_export
from vavae.interop.released_lightningdit import load_released_lightningdit, save_released_lightningdit
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.model import LightningDiT
from vavae.planning.jobs import velocity_evaluations
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.sampling.labels import check_classes
from vavae.sampling.sampler import Sampler
from vavae.training.diffusion_step import DiffusionStep
from vavae.training.flops.flops import training_flops, velocity_flops
from vavae.training.initialize import begin_with
from vavae.training.warm_start import starting_lightningdit

BY_INPUT = [
    "lightningdit={average_velocity: true, guidance_inputs: true}",
    "objective={direction_weight: 0, mean_flow: {max_scale: 8}}",
]
TRAINED = ["lightningdit.average_velocity=true", "objective={direction_weight: 0, mean_flow: {}}"]


def test_weights_of_velocities_give_the_same_at_any_length_until_the_embedding_is_trained():
    plain = random_dit()
    model = LightningDiT(plain.config.model_copy(update={"average_velocity": True}), 3, 4)
    missing, _ = model.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"length_embedder"}
    x, t, y = dit_inputs()
    for end in (None, t, t + 0.2):
        assert torch.equal(model.predict(x, t, y, end=end).velocity, plain(x, t, y))
    model.length_embedder.mlp[2].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    found = model.predict(x, t, y, end=t + 0.2).velocity
    assert not torch.equal(found, model(x, t, y))
    assert torch.equal(model.predict(x, t, y, end=t).velocity, model(x, t, y))


def test_without_it_no_module_is_there_and_with_it_all_others_begin_alike():
    with_lengths, without = (
        LightningDiT(random_dit(average_velocity=there).config, 3, 4, torch.Generator().manual_seed(0))
        for there in (True, False)
    )
    assert without.length_embedder is None
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_lengths.state_dict()[name], tensor), name


IMPROVED = {"average_velocity": True, "guidance_inputs": True}


def test_guidance_as_an_input_counts_for_nothing_until_it_is_trained_and_a_second_output_begins_at_zero(storage):
    plain, (x, t, y) = random_dit(), dit_inputs()
    model = LightningDiT(plain.config.model_copy(update=IMPROVED), 3, 4)
    begin_with(model, plain.state_dict())
    guidance = torch.tensor([[4, 0.1, 0.9]]).expand(4, 3)
    found = model.predict(x, t, y, end=t + 0.2, guidance=guidance)
    assert torch.equal(found.velocity, plain(x, t, y))
    assert found.instantaneous.eq(0).all()
    model = random_dit(**IMPROVED)
    outputs = [
        model.predict(x, t, y, end=t + 0.2, guidance=torch.tensor([inputs])).velocity
        for inputs in ((1, 0, 1), (4, 0, 1), (1, 0.2, 1), (1, 0, 0.8))
    ]
    assert torch.equal(outputs[0], model.predict(x, t, y, end=t + 0.2).velocity)
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])
    assert not torch.equal(outputs[0], model.predict(x, t, y, end=t + 0.2).instantaneous)
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=3, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    loaded, _ = load_exported_lightningdit(storage)
    assert torch.equal(
        loaded.predict(x, t, y, guidance=guidance).velocity, model.predict(x, t, y, guidance=guidance)[0]
    )
    with pytest.raises(ValueError, match=r"lightningdit\.guidance_inputs\s+Extra inputs are not permitted"):
        reader_without("guidance_inputs").restore(yaml.safe_load(storage.read_bytes(DESCRIPTION)))


def test_samples_take_scale_and_interval_of_the_guidance_as_inputs():
    improved, seen = sampler(True, guidance_inputs=True), []
    embedder = improved.lightningdit.guidance_embedder
    embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    images = [
        improved.images([0, 1], [0, 1], 7, guidance, SolverConfig(name="mean_flow", num_steps=1))
        for guidance in (GuidanceConfig(), GuidanceConfig(scale=4), GuidanceConfig(scale=4, interval=(0.25, 0.5)))
    ]
    assert seen == [[[1, 0, 1]], [[4, 0, 1]], [[4, 0.25, 0.5]]]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def sampler(average_velocity, **switches):
    dim = small_models.TOKENIZER.latent_dim
    config = small_models.LIGHTNINGDIT.model_copy(update={"average_velocity": average_velocity, **switches})
    model = small_models.randomized(LightningDiT(config, dim, small_models.GRID), scale=0.3)
    return Sampler(small_models.tokenizer(), model, LatentNormalizer(torch.zeros(dim), torch.ones(dim)))


def test_samples_take_one_step_or_several_and_any_other_solver_takes_velocities():
    arguments = ([0, 1], [0, 1], 7, GuidanceConfig())
    one, two, euler = (
        sampler(True).images(*arguments, SolverConfig(name=name, num_steps=steps))
        for name, steps in (("mean_flow", 1), ("mean_flow", 2), ("euler", 2))
    )
    assert not torch.equal(one, two)
    assert not torch.equal(two, euler)
    with pytest.raises(
        UserError, match=r"solver\.name=mean_flow takes steps by average .*: set euler or heun"
    ) as caught:
        sampler(False).images(*arguments, SolverConfig(name="mean_flow"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("average_velocity", [False, True])
def test_an_export_says_it_and_older_readers_and_the_released_layout_refuse_it(storage, tmp_path, average_velocity):
    model = random_dit(average_velocity=average_velocity)
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=3, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    loaded, _ = load_exported_lightningdit(storage)
    assert torch.equal(loaded(*dit_inputs()), model(*dit_inputs()))
    stored, path = yaml.safe_load(storage.read_bytes(DESCRIPTION)), tmp_path / "model.safetensors"
    if not average_velocity:
        reader_without("average_velocity").restore(stored)
        save_released_lightningdit(path, model)
        with pytest.raises(UserError, match=r"no tensor length_embedder.* with average_velocity=True: correct that"):
            load_released_lightningdit(path, average_velocity=True)
        return
    with pytest.raises(ValueError, match=r"lightningdit\.average_velocity\s+Extra inputs are not permitted"):
        reader_without("average_velocity").restore(stored)
    with pytest.raises(UserError, match=r"no lightningdit\.average_velocity: take the run's own export"):
        save_released_lightningdit(path, model)


def starting_from(run, other, *overrides):
    """The run with its training set to begin with the weights of another one's."""
    url = other.folder("train_lightningdit").url()
    return Run(
        load(RunConfig, run.storage.local_file("config.yaml"), [f"train_lightningdit.start_from={url}", *overrides])
    )


def test_a_training_begins_with_the_weights_of_another_one(tmp_path):
    other, own = trained_run(tmp_path, "other"), trained_run(tmp_path)
    run = starting_from(own, other, *TRAINED, "train_lightningdit.engine.backend=torch")
    record = other.require("train_lightningdit")
    assert run.inputs("train_lightningdit") == {**own.inputs("train_lightningdit"), "start_from": record.digest}
    model = run.config.lightningdit
    weights = starting_lightningdit(run.starting_lightningdit(), model)
    step = DiffusionStep(
        run.config,
        model,
        DrawnLatents(),
        LatentNormalizer(torch.zeros(4), torch.ones(4)),
        World(),
        start=weights,
    )
    begun = step.engines["lightningdit"].weights()
    assert all(torch.equal(begun[f"model.{name}"], tensor) for name, tensor in weights.items())
    assert starting_lightningdit(own.starting_lightningdit(), model) is None
    deeper = run.config.lightningdit.model_copy(update={"depth": 2})
    with pytest.raises(UserError, match=r"made with lightningdit\.depth=1, which is 2 here"):
        starting_lightningdit(run.starting_lightningdit(), deeper)


def test_weights_of_other_latents_are_no_beginning(tmp_path):
    other, own = trained_run(tmp_path, "other"), trained_run(tmp_path)
    folder = other.folder("train_lightningdit")
    record = folder.read_json("artefact.json")
    folder.write_json("artefact.json", {**record, "inputs": {**record["inputs"], "precompute_latents": "d" * 64}})
    with pytest.raises(
        UserError, match=r"^train_lightningdit\.start_from=.* latents dddddddddddd, but this run on bbb"
    ):
        starting_from(own, other).inputs("train_lightningdit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (TRAINED[:1], r"lightningdit\.average_velocity=true is trained by objective\.mean_flow alone"),
        (["objective={direction_weight: 0, mean_flow: {}}"], r"set lightningdit\.average_velocity=true"),
        ([TRAINED[0], "objective.mean_flow={}"], r"direction_weight=1 is of velocities.*: set it to 0"),
        (["solver.name=mean_flow"], r"solver\.name=mean_flow takes steps by average velocities: give"),
        ([*TRAINED, "solver.name=mean_flow", "guidance.scale=2"], r"takes no guidance, and there is guidance 2 "),
        (
            [*TRAINED, "objective={direction_weight: 0, label_dropout: 0, mean_flow: {mix: 0.5}}"],
            r"which label_dropout=0 never trains: raise",
        ),
        (
            [*TRAINED, "objective.mean_flow.max_scale=8"],
            r"guidance_inputs=true and objective\.mean_flow\.max_scale.*both",
        ),
        (
            [*BY_INPUT, "objective.mean_flow.mix=0.5"],
            r"max_scale=8 draws the scale .*: leave scale, mix and interval out",
        ),
        ([*BY_INPUT, "objective.label_dropout=0"], r"max_scale guide away .* label_dropout=0 never trains: raise"),
        ([*BY_INPUT, "solver.name=mean_flow", "guidance.scale=9"], r"guidance\.scale=9 is not between 1 and .*=8"),
        ([*BY_INPUT, "solver.name=mean_flow", "guidance={scale: 2, channels: 3}"], r"takes no guidance"),
        ([*TRAINED, "objective.mean_flow.interval=[0.5, 0.2]"], r"interval=\[0\.5, 0\.2\] must satisfy"),
    ],
)
def test_what_does_not_fit_average_velocities_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load(RunConfig, "configs/tiny.yaml", ["guidance.scale=1", *overrides])
    assert "\n" not in str(caught.value)


def test_guided_targets_need_classes():
    config = load(RunConfig, "configs/tiny.yaml", ["guidance.scale=1", *TRAINED, "objective.mean_flow.mix=0.5"])
    with pytest.raises(UserError, match=r"no classes to guide to: leave out its scale and mix"):
        check_classes(config, [])


def test_the_plan_counts_tangents_guidance_and_the_steps_of_samples():
    """Value and tangent are two passes, and each part of the guidance is one; a step is three."""
    sizes = ["lightningdit={size: null, depth: 6, width: 384, heads: 6, classes: 3}", "guidance.scale=1"]

    def step(*overrides):
        return training_flops(load(RunConfig, "configs/tiny.yaml", [*sizes, *overrides]), "train_lightningdit")

    plain, forward = step(), velocity_flops(load(RunConfig, "configs/tiny.yaml", sizes))
    mean_flow = [*TRAINED[:1], "lightningdit.guidance_inputs=false", "objective.direction_weight=0"]
    for settings, passes in (
        ("{equal_fraction: 1}", 0),
        ("{equal_fraction: 0}", 2),
        ("{}", 0.5),
        ("{mix: 0.5}", 2.5),
        ("{scale: 0.5, mix: 0.5}", 1.5),
        ("{max_scale: 8}", 2.5),
    ):
        mean_flow[1] = f"lightningdit.guidance_inputs={'max_scale' in settings}"
        found = step(*mean_flow, f"objective.mean_flow={settings}")
        assert found - plain == pytest.approx(passes * forward, rel=0.02, abs=0.01 * forward), settings
    solver = "solver={name: mean_flow, num_steps: 2}"
    assert velocity_evaluations(load(RunConfig, "configs/tiny.yaml", [*sizes, *TRAINED, solver])) == (2, 0, 0)
