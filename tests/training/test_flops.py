"""FLOPs per image against closed forms, published numbers, and the steps of a training."""

import math
from itertools import pairwise

import pytest
from support.recipes import recipe_config
from support.training_steps import BATCH, build_step, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vavae.config import load
from vavae.data.image_stream import MicroBatchKey
from vavae.data.sample_order import assign_lanes
from vavae.diffusion.config import TIMESTEP_BINS
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.losses.latents import MicroBatchTransforms, Transform
from vavae.models.dit.config import SIZES
from vavae.planning.jobs import lightningdit_flops
from vavae.runs.config import RunConfig
from vavae.training.flops import flops
from vavae.training.flops.flops import decoding_flops, encoding_flops, training_flops, velocity_flops
from vavae.training.flops.gpus import GPUS, gpu_named, gpu_of_device

TINY = "configs/tiny.yaml"
JOBS = "configs/imagenet/f16d32_dinov2_stages.yaml"


def transformer_macs(depth, width, tokens=256, channels=32, frequencies=256):
    """Multiplications of one forward: all of them, and those of the layers whose input needs no gradient."""
    hidden = 8 * width // 3
    block = tokens * (4 * width**2 + 3 * width * hidden) + 2 * tokens**2 * width + 6 * width**2
    first = tokens * channels * width + frequencies * width
    return depth * block + first + width**2 + 2 * width**2 + tokens * width * channels, first


@pytest.mark.parametrize(
    ("size", "forward", "training"),
    [("S", 12.1, 36.3), ("XL", 237, 712)],
)
def test_lightningdit_is_its_closed_form(size, forward, training):
    config = load(RunConfig, JOBS, [f"lightningdit.size={size}"])
    macs, first = transformer_macs(SIZES[size].depth, SIZES[size].width)
    assert velocity_flops(config) == 2 * macs
    step = training_flops(config, "train_lightningdit")
    assert step == 2 * (3 * macs - first)
    assert velocity_flops(config) / 1e9 == pytest.approx(forward, rel=5e-3)
    assert step / 1e9 == pytest.approx(training, rel=5e-3)


def test_a_wide_head_adds_its_closed_form():
    shape, head = SIZES["S"], {"depth": 2, "width": 768, "heads": 12}
    plain, wide = (
        load(RunConfig, JOBS, ["lightningdit.size=S", *more]) for more in ([], [f"lightningdit.head={head}"])
    )
    tokens, channels, width, hidden = 256, 32, head["width"], 8 * head["width"] // 3
    block = tokens * (10 * width**2 + 3 * width * hidden) + 2 * tokens**2 * width  # modulations are of each token
    macs = head["depth"] * block + tokens * (2 * channels * width + shape.width * width + 2 * width**2)
    macs -= 2 * shape.width**2 + tokens * shape.width * channels  # the narrow output layer
    assert velocity_flops(wide) - velocity_flops(plain) == 2 * macs


def test_time_and_label_in_context_take_further_tokens_in_place_of_modulations():
    config = load(RunConfig, JOBS, ["lightningdit.size=S", "lightningdit.conditioning=in_context"])
    (depth, width, _), hidden, tokens, further = SIZES["S"], 8 * SIZES["S"].width // 3, 256, 12
    of_blocks = depth * ((tokens + further) * (4 * width**2 + 3 * width * hidden) + 2 * (tokens + further) ** 2 * width)
    assert velocity_flops(config) == 2 * (transformer_macs(0, width)[0] + of_blocks)


def test_an_alignment_with_features_of_a_transformer_adds_its_projector():
    alignment = ["objective.representation={projector_width: 100}", "latents.features={teacher: {name: dinov2_base}}"]
    plain, aligned = (load(RunConfig, JOBS, ["lightningdit.size=S", *more]) for more in ([], alignment))
    projector = 256 * (SIZES["S"].width * 100 + 100 * 100 + 100 * 768)
    assert training_flops(aligned, "train_lightningdit") - training_flops(plain, "train_lightningdit") == 6 * projector


@pytest.mark.parametrize("first", [0, 3])
def test_tokens_that_skip_blocks_cost_nothing_there(first):
    """Routed blocks are counted at half of the tokens, for a step and an evaluation; after the last image all are."""
    routing = f"{{first_block: {first}, last_block: 8, drop: 0.5, until_images: 1000}}"
    config = load(RunConfig, JOBS, ["lightningdit.size=S", f"lightningdit.routing={routing}"])
    depth, width, _ = SIZES["S"]
    whole, input_macs = transformer_macs(depth, width)
    skipped = (9 - first) * (transformer_macs(2, width)[0] - transformer_macs(1, width)[0])
    half = (9 - first) * (transformer_macs(2, width, 128)[0] - transformer_macs(1, width, 128)[0])
    assert velocity_flops(config) == 2 * whole
    assert velocity_flops(config, 0.5) == 2 * (whole - skipped + half)
    steps = [training_flops(config, "train_lightningdit", images_seen) for images_seen in (999, 1000)]
    assert steps == [2 * (3 * macs - input_macs) for macs in (whole - skipped + half, whole)]
    assert lightningdit_flops(config) == pytest.approx(
        (1000 * steps[0] + (config.train_lightningdit.images - 1000) * steps[1]) / config.train_lightningdit.images
    )


def test_a_fusion_is_a_product_more_and_a_dropped_path_the_blocks_fewer():
    routing = "{first_block: 2, last_block: 8, drop: 0.75, fuse: {}}"
    config = load(RunConfig, JOBS, ["lightningdit.size=S", f"lightningdit.routing={routing}"])
    depth, width, _ = SIZES["S"]
    fusion = 256 * 2 * width**2
    whole, input_macs = transformer_macs(depth, width)
    skipped, quarter = (transformer_macs(7, width, n)[0] - transformer_macs(0, width, n)[0] for n in (256, 64))
    assert velocity_flops(config) == 2 * (whole + fusion)
    assert velocity_flops(config, 1.0) == 2 * (whole - skipped + fusion)
    step = training_flops(config, "train_lightningdit")
    assert step == 2 * (3 * (whole - skipped + quarter + fusion) - input_macs)


def conv_macs(side, *widths, kernel=3):
    """Convolutions in a row at one resolution."""
    return sum(side**2 * kernel**2 * a * b for a, b in pairwise(widths))


def test_autoencoder_is_its_closed_form():
    config = tiny_config()  # 16 px, latents [4, 8, 8], widths 32 and 32, one block, attention at the last level
    attention = 4 * 64 * 32**2 + 2 * 64**2 * 32  # four 1x1 convolutions, two products
    middle = 2 * conv_macs(8, 32, 32, 32) + attention
    level = conv_macs(8, 32, 32, 32) + attention
    encoder = (
        conv_macs(16, 3, 32, 32, 32) + conv_macs(8, 32, 32) + level + middle + conv_macs(8, 32, 8)
        + conv_macs(8, 8, 8, kernel=1)
    )  # fmt: skip
    decoder = (
        conv_macs(8, 4, 4, kernel=1) + conv_macs(8, 4, 32) + middle + 2 * level + conv_macs(16, 32, 32)
        + 2 * conv_macs(16, 32, 32, 32) + conv_macs(16, 32, 3)
    )  # fmt: skip
    assert encoding_flops(config) == 2 * encoder
    assert decoding_flops(config) == 2 * decoder


def test_published_tokenizer():
    """FLOPs of f16d32 with DINOv2-L at 224 px, VGG16 at 256 px and the patch discriminator; in GMAC."""
    config = load(RunConfig, JOBS)
    encoder, decoder, teacher, vgg, discriminator = 69.0, 126.1, 81.0, 20.0, 3.1
    assert encoding_flops(config) / 2e9 == pytest.approx(encoder, rel=1e-3)
    assert decoding_flops(config) / 2e9 == pytest.approx(decoder, rel=1e-3)
    # All forward, VGG16 on two images; back through VGG16 to the image, and through both halves to weights and inputs.
    generator = encoder + decoder + teacher + 2 * vgg + vgg + 2 * (encoder + decoder)
    before, after = (training_flops(config, "train_vavae", seen) / 2e9 for seen in (0, 1_000_000))
    assert before == pytest.approx(generator, rel=2e-3)
    # With an adversary through the decoder once more, for the adaptive weight.
    assert after - before == pytest.approx(decoder + (2 + 2 * 3) * discriminator, rel=0.01)


class Counted(TorchDispatchMode):
    """Counts what is run, whatever is differentiated how."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


@pytest.mark.parametrize(
    ("job", "recipe"),
    [
        ("train_vavae", None),
        ("train_lightningdit", None),
        ("train_lightningdit", "routing"),
        ("train_lightningdit", "routing with fusion"),
        ("train_lightningdit", "in-context conditioning"),
        ("train_lightningdit", "class token"),
        # All micro-batches of one size.
        ("train_vavae", {"equivariance": {"probability": 1, "min_scale": 0.8}}),
        ("train_vavae", {"equivariance": {"probability": 0, "small_images": 1, "min_scale": 0.8}}),
        (
            "train_vavae",
            {
                "adversarial": {
                    "kind": "features",
                    "start_images": 0,
                    "features": {"name": "efficientnet_lite0", "image_size": 64, "layers": [4, 2], "kernel": 3},
                    "augment": {},
                }
            },
        ),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_steps_take_what_is_counted(job, recipe, recompute):
    engine = {"backend": "torch"}
    if job == "train_vavae":
        config = tiny_config(losses=recipe, engine=engine)
    else:
        config = recipe_config(*([] if recipe is None else [recipe]), engine=engine)
    update = {"checkpoint_activations": recompute}
    sections = {name: getattr(config, name).model_copy(update=update) for name in ("tokenizer", "lightningdit")}
    config = config.model_copy(update=sections)
    step = build_step(job, config, World())
    micro_batches = [step.source()[MicroBatchKey(turn.lane, 0)] for turn in assign_lanes(config.stream.lanes, 0, 1)]
    with Counted() as counted, sdpa_kernel(SDPBackend.MATH):
        step.run(micro_batches, 0, 1e-3)
    reported = {"train_vavae": 0, "train_lightningdit": 2 * TIMESTEP_BINS}[job]  # the losses by timestep, for the log
    counts = {again: training_flops(config, job, recompute=again) for again in (False, True)}
    assert counted.total == pytest.approx(BATCH * (counts[recompute] + reported), rel=1e-12)
    assert (counts[False] < counts[True]) == recompute


def test_a_measurement_that_serves_several_steps_is_shared_by_them(monkeypatch):
    """Eight for a step that measures and four for one that does not: (8 + 3 · 4) / 4."""
    monkeypatch.setattr(flops, "_count_tokenizer_step", lambda *_, measure_weights: 8 if measure_weights else 4)
    counts = [
        training_flops(load(RunConfig, TINY, [f"losses.adaptive.every={every}"]), "train_vavae") for every in (1, 4)
    ]
    assert counts == [8, 5]


@pytest.mark.parametrize("frozen", [(), ("encoder",), ("decoder",)])
def test_gradients_of_frozen_parts_are_not_computed(frozen):
    """Twice a forward for weights and inputs; once for inputs alone, but for both factors of attention's products."""
    losses = {
        "perceptual": {"kind": "none"},
        "adversarial": {"weight": 0},
        "vision_foundation": {"weight": 0},
        # Neither of which takes a product.
        "latent_noise": {},
        "equivariance": {"probability": 0, "small_images": 0, "min_scale": 0.5},
    }
    config = tiny_config({"frozen": frozen}, losses, engine={"backend": "torch"})
    encoder, decoder = encoding_flops(config), decoding_flops(config)
    first, latent = 2 * conv_macs(16, 3, 32), 2 * conv_macs(8, 4, 4, kernel=1)
    products = 3 * 2 * 2 * 64**2 * 32  # attention in the middle and twice at the last level
    expected = {
        (): 3 * (encoder + decoder) - first,
        ("encoder",): encoder + 3 * decoder - latent,
        ("decoder",): 3 * encoder - first + 2 * decoder + products,
    }[frozen]
    assert training_flops(config, "train_vavae") == expected
    step = build_step("train_vavae", config, World())
    micro_batches = [step.source()[MicroBatchKey(turn.lane, 0)] for turn in assign_lanes(config.stream.lanes, 0, 1)]
    with Counted() as counted, sdpa_kernel(SDPBackend.MATH):
        step.run(micro_batches, 0, 1e-3)
    assert counted.total == BATCH * expected


def test_sizes_have_their_shares(monkeypatch):
    """Whole images count 64, resized ones or their latents the product of their sides."""

    def count(config, phase, adversary, transforms, *, measure_weights):
        transform = transforms.images or transforms.latents
        return 64 if transform is None else math.prod(transform.grid)

    monkeypatch.setattr(flops, "_count_tokenizer_step", count)
    config = tiny_config(losses={"equivariance": {"min_scale": 0.5}})
    resized = (16 + 25 + 36 + 49) / 4
    assert training_flops(config, "train_vavae") == pytest.approx(0.625 * resized + 0.375 * 64)


def test_sizes_that_are_not_counted_lie_between():
    equivariance = {"probability": 0.5, "small_images": 1, "min_scale": 0.6}
    config = tiny_config(losses={"equivariance": equivariance}, engine={"backend": "torch"})
    phase = flops._without_magnitudes(config.tokenizer_phases()[0])
    each = [
        flops._count_tokenizer_step(
            config, phase, True, MicroBatchTransforms(**{kind: Transform(grid)}), measure_weights=True
        )
        for grid in config.losses.equivariance.grids(config.grid)
        for kind in ("latents", "images")
    ]
    assert training_flops(config, "train_vavae") == pytest.approx(sum(each) / len(each), rel=1e-3)


def test_phases_differ():
    stages = "train_vavae.stages=[{from_images: 64, frozen: [encoder], losses: {vision_foundation: {weight: 0}}}]"
    config = load(RunConfig, TINY, ["losses.perceptual.kind=none", stages])
    assert training_flops(config, "train_vavae", 64) < training_flops(config, "train_vavae", 63)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_gpus_are_known_as_cuda_names_them(device, name):
    assert gpu_of_device(device) == GPUS[name]


def test_unknown_gpus():
    assert gpu_of_device("Tesla K80") is None
    assert gpu_named("h100") == GPUS["H100"]
    with pytest.raises(UserError, match=r"^GPU 'H10' is not known; did you mean H100\? there are B200, H200, "):
        gpu_named("H10")
