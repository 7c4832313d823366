"""A class token that is denoised beside the latent (REG)."""

from functools import partial

import pytest
import torch
import yaml
from pydantic import ValidationError
from support import small_models
from support.engine_parity import TORCH
from support.golden import golden as golden_numbers
from support.golden import golden_state
from support.older_reader import reader_without
from support.recipes import recipe_config
from support.small_dit import dit_inputs, random_dit
from support.training_steps import build_step

from vavae.config import load
from vavae.data.image_stream import MicroBatchKey
from vavae.diffusion.config import GuidanceConfig, ObjectiveConfig, RepresentationConfig, SolverConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective
from vavae.diffusion.guidance import guide
from vavae.diffusion.representation import RepresentationAlignment
from vavae.diffusion.solvers import solve
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import DESCRIPTION, WEIGHTS, LightningDiTDescription, load_exported_lightningdit, save_export
from vavae.interop.released_lightningdit import load_released_lightningdit, save_released_lightningdit
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.class_token import class_token_of, join_class_token
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.sampling.sampler import Sampler, load_weak_model
from vavae.training.diffusion_step import DiffusionStep, FlowMatchingModel

WIDTH = 20
TOKEN = {"class_token": {"width": WIDTH}}

tiny = partial(random_dit, **TOKEN)


def states(batch=4):
    """States, timesteps and labels for the default sizes: 20 numbers fill two channels of 4 x 4 but for twelve."""
    x, t, y = dit_inputs(batch)
    return join_class_token(x, torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(3))), t, y


def public_model(spec, golden):
    """The public network in a training: it embeds the level of the noise and predicts towards the noise."""
    public = spec["model"]
    config = LightningDiTConfig(
        size=None,
        depth=public["depth"],
        width=public["hidden_size"],
        heads=public["num_heads"],
        classes=public["num_classes"],
        patch_size=public["patch_size"],
        qk_norm=False,
        mlp="gelu",
        norm="layernorm",
        rope=False,
        class_token={"width": public["z_dims"][0]},
    )
    model = LightningDiT(config, public["in_channels"], public["input_size"])
    aligned = RepresentationConfig(after_block=public["encoder_depth"], projector_width=spec["projector_width"])
    alignment = RepresentationAlignment(aligned, public["hidden_size"], public["z_dims"][0], model.tokens)
    objective = FlowMatchingObjective(ObjectiveConfig(direction_weight=0))
    training = FlowMatchingModel(model, objective, alignment, class_token_weight=spec["cls_coeff"]).double()
    state = {our_name(name): tensor for name, tensor in golden_state(golden).items()}
    positions = state.pop("model.pos_embed")
    assert positions[:, 0].eq(0).all()
    torch.testing.assert_close(model.pos_embed, positions[:, 1:], rtol=0, atol=1e-6)
    training.load_state_dict({**state, "model.pos_embed": positions[:, 1:]})
    clock = model.t_embedder.forward
    model.t_embedder.forward = lambda t: clock(1 - t)
    with torch.no_grad():
        for parameter in (*model.final_layer.linear.parameters(), *model.final_layer.linear_cls.parameters()):
            parameter.neg_()
    return training


def our_name(public):
    part, *rest = public.split(".")
    names = {"projectors": "alignment.projector", "cls_projectors2": "model.class_embedder.proj"}
    names["wg_norm"] = "model.class_embedder.norm"
    return ".".join([names.get(part, f"model.{part}"), *(rest[1:] if part == "projectors" else rest)])


def test_tokens_losses_and_gradients_equal_the_public_implementation():
    spec, golden = golden_numbers("beyond_reg")
    training, inner = public_model(spec, golden), {}
    model = training.model
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: inner.update(tokens_first=inputs[0]))
    model.blocks[0].register_forward_hook(lambda *call: inner.update(tokens_aligned=call[2]))
    model.blocks[-1].register_forward_hook(lambda *call: inner.update(tokens_last=call[2]))
    data = join_class_token(golden["in.data"], golden["in.class_token"])
    noise = join_class_token(golden["in.noise"], golden["in.class_noise"])
    aligned = {"features": golden["in.teacher"], "representation_weight": spec["proj_coeff"]}
    total, terms, losses, _ = training(data, noise, golden["in.t"], golden["in.y"], **aligned)
    for name, tensor in inner.items():  # ours have the class token last
        torch.testing.assert_close(tensor.roll(1, dims=1), golden[f"out.{name}"], rtol=1e-6, atol=1e-6)
    assert len(inner) == 3
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(losses.double(), golden["out.velocity_loss"], **close)
    torch.testing.assert_close(terms["loss/class_token"].double(), golden["out.class_loss"].mean(), **close)
    torch.testing.assert_close(terms["loss/representation"].double(), golden["out.projection_loss"], **close)
    torch.testing.assert_close(total.double(), golden["out.total"], **close)
    weight = golden["in.t"].view(-1, 1, 1, 1)
    state = weight * data + (1 - weight) * noise
    velocity = model.predict(state, golden["in.t"], golden["in.y"]).velocity
    torch.testing.assert_close(velocity[:, : model.latent_dim], golden["out.velocity"], **close)
    width = model.config.class_token.width
    torch.testing.assert_close(class_token_of(state, model.latent_dim, width), golden["out.class_t"], **close)
    torch.testing.assert_close(class_token_of(velocity, model.latent_dim, width), golden["out.class_velocity"], **close)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in training.named_parameters()}
    norms = torch.stack([gradients[our_name(name)].norm() for name in spec["grad_names"]])
    torch.testing.assert_close(norms, golden["out.grad_norms"], rtol=1e-5, atol=1e-8)


def test_a_state_holds_both_and_zeros():
    x, token = torch.randn(2, 3, 4, 4), torch.randn(2, WIDTH)
    state = join_class_token(x, token)
    assert state.shape == (2, 5, 4, 4)
    assert state[:, 3:].flatten(1)[:, WIDTH:].eq(0).all()
    assert torch.equal(class_token_of(state, 3, WIDTH), token)
    whole = join_class_token(x, torch.randn(2, 32))
    assert whole.shape == (2, 5, 4, 4)
    velocity = tiny()(*states())
    assert velocity[:, 3:].flatten(1)[:, WIDTH:].eq(0).all(), "what is left over stays zero"


def test_it_begins_at_zero_and_draws_after_nothing_that_others_need():
    model = LightningDiT(tiny().config, 3, 4, torch.Generator().manual_seed(0))
    assert model(*states()).eq(0).all()
    assert not [name for name in random_dit().state_dict() if "cls" in name or "class" in name]


def test_without_weights_of_its_own_the_latent_is_that_of_the_plain_model():
    """A class token without keys and values changes nothing but the sum in the softmax, so attention is cut here."""
    plain, model = random_dit(seed=4), tiny(seed=4)
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("class_embedder" in name or "linear_cls" in name for name in found.missing_keys)
    with torch.no_grad():
        for parameter in model.class_embedder.parameters():
            parameter.zero_()
        for each in (plain, model):
            for block in each.blocks:
                block.attn.proj.weight.zero_()
    x, t, y = states()
    torch.testing.assert_close(model(x, t, y)[:, :3], plain(x[:, :3], t, y))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"intermediate_head": {"after_block": 1}, "prediction": "data"},
        {"conditioning": "in_context", "intermediate_head": {"after_block": 1}},
    ],
)
def test_every_weight_learns_and_recomputed_blocks_give_the_same_gradients(switches):
    gradients = []
    for again in (False, True):
        model = tiny(depth=3, checkpoint_activations=again, routing={"first_block": 1, "last_block": 1}, **switches)
        velocity, intermediate, tokens, *_ = model.predict(*states(), torch.arange(8).expand(4, -1), tokens_after=1)
        assert tokens.shape == (4, 17, 32)
        terms = [each.square().mean() for each in (velocity, intermediate) if each is not None]
        sum(terms).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_class_token_skips_no_block():
    model, seen = tiny(depth=3, routing={"first_block": 1, "last_block": 1}), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model.predict(*states(), torch.arange(8).expand(4, -1))
    assert seen == [17, 9, 17]


def test_guidance_is_of_both_and_the_intermediate_head_has_no_class_token():
    model, (x, t, y) = tiny(intermediate_head={"after_block": 1}), states()
    plain, null = model(x, t, y), model(x, t, torch.full_like(y, 5))
    guided = guide(model.predict, 5, GuidanceConfig(scale=2))(x, t, y)
    torch.testing.assert_close(guided, null + 2 * (plain - null), rtol=1e-4, atol=1e-5)
    inner = guide(model.predict, 5, GuidanceConfig(internal_scale=2))(x, t, y)
    changed = (inner != plain).flatten(2).any(2).any(0)
    assert changed.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_solvers_integrate_both_and_shift_by_the_latent_alone(solver):
    config = SolverConfig(name=solver, num_steps=4, **({} if solver == "dopri5" else {"shift": "by_dimension"}))
    rate, (x, _, y) = torch.tensor(-0.5), states()

    def velocity(state, t, labels):
        return rate * state

    both = solve(velocity, x, y, config, dimension=48)
    latent = solve(velocity, x[:, :3], y, config)
    torch.testing.assert_close(both[:, :3], latent, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both[:, 3:], x[:, 3:] * (latent / x[:, :3]).mean(), rtol=1e-3, atol=1e-3)


def test_a_sampler_starts_the_class_token_from_noise_of_its_own():
    dim = small_models.TOKENIZER.latent_dim
    model = small_models.randomized(random_dit(latent_dim=dim, **TOKEN), scale=0.3)
    normalizer, seen = LatentNormalizer(torch.zeros(dim), torch.ones(dim)), []
    sampler = Sampler(small_models.tokenizer(), model, normalizer)
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    arguments = ([3, 1], [0, 1], 7, GuidanceConfig(scale=2), SolverConfig(num_steps=3))
    images = sampler.images(*arguments)
    drawn = [torch.randn(WIDTH, generator=torch_generator(7, "sample class token", index)) for index in (3, 1)]
    token = model.class_embedder(torch.stack(drawn))
    torch.testing.assert_close(seen[0][:2, 16:], token)
    assert images.float().std() > 1
    single = sampler.images([1], [1], *arguments[2:])
    assert (single[0].int() - images[1].int()).abs().max() <= 1


def test_a_training_draws_noise_of_its_own_and_weighs_the_loss():
    step = build_step("train_lightningdit", recipe_config("class token", engine=TORCH), World())
    plain = build_step("train_lightningdit", recipe_config(engine=TORCH), World())
    assert isinstance(step, DiffusionStep)
    assert isinstance(plain, DiffusionStep)
    key = MicroBatchKey(1, 2)
    ours, theirs = step._draw(step.source()[key], 0), plain._draw(plain.source()[key], 0)
    assert torch.equal(ours.noise[:, :4], theirs.noise)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.labels, theirs.labels)
    item = step.source()[key]
    assert torch.equal(class_token_of(ours.latents, 4, 112), item.features[:, 0].float())
    noise = class_token_of(ours.noise, 4, 112)
    generator = torch_generator(step._config.seed, "class_token_noise", 1, 2)
    assert torch.equal(noise, torch.randn(noise.shape, generator=generator))
    result = step.run([step.source()[lane, 0] for lane in range(4)], 0, 1e-3)
    terms = {name: value.item() for name, value in result.terms.items()}
    expected = terms["loss/velocity"] + terms["loss/direction"] + 0.03 * terms["loss/class_token"]
    assert terms["loss/total"] == pytest.approx(expected, rel=1e-5)


def test_an_export_comes_back_and_older_readers_refuse_it(storage):
    model = tiny().eval()
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=3, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    loaded, found = load_exported_lightningdit(storage)
    assert found == description
    assert torch.equal(loaded(*states()), model(*states()))
    with pytest.raises(ValidationError, match=r"lightningdit\.class_token\s+Extra inputs are not permitted"):
        reader_without("class_token").restore(yaml.safe_load(storage.read_bytes(DESCRIPTION)))


def test_a_weak_model_has_a_class_token_too(storage):
    class Stored:
        folder = storage

    model = random_dit().eval()
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=3, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    with pytest.raises(UserError, match=r"the shape with class tokens is \(3, 4, 4\), but \(5, 4, 4\) in the model"):
        load_weak_model(Stored(), tiny())


def test_the_released_layout_has_no_class_token(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"no lightningdit\.class_token: take the run's own export"):
        save_released_lightningdit(path, tiny())
    save_released_lightningdit(path, random_dit())
    with pytest.raises(UserError, match=r"no tensor class_embedder\..* with class_token=") as caught:
        load_released_lightningdit(path, **TOKEN)
    assert "\n" not in str(caught.value)


STORED = "latents.features={teacher: {name: dinov2_base}, class_token: true}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lightningdit.class_token={}"], r"set latents\.features\.class_token=true"),
        ([STORED], r"class_token=true is for lightningdit\.class_token"),
        (["objective.class_token_weight=1"], r"class_token_weight=1 is of lightningdit\.class_token"),
        ([STORED, "lightningdit.class_token={}", "lightningdit.head={}"], r"class_token with head"),
        (
            [STORED, "lightningdit.class_token={}", "lightningdit.routing={first_block: 1, last_block: 1, fuse: {}}"],
            r"routing\.fuse joins tokens that may all skip, and class_token never does",
        ),
        (
            [STORED, "lightningdit.class_token={}", "objective.representation={projector: conv, after_block: 1}"],
            r"projector=conv or spatial_norm is of tokens on a grid",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load(RunConfig, "quickstart", overrides)
    assert "\n" not in str(caught.value)
