"""Average velocities: the identity that trains them, against the public code and where it is known in closed form."""

import pytest
import torch
from support.golden import golden
from support.small_dit import dit_inputs, random_dit

from vavae.diffusion.config import MeanFlowConfig, ObjectiveConfig, SolverConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective, LinearPath, PathSample
from vavae.diffusion.mean_flow import Intervals, MeanFlowObjective, draw_guidance, total_derivative
from vavae.diffusion.solvers import solve_mean_flow

SPEC, TENSORS = golden("beyond_meanflow")
START, END, LABELS = TENSORS["in.t"], TENSORS["in.r"], TENSORS["in.y"]
INTERVALS = Intervals(START, END, (END > START).nonzero().flatten())
POINT = LinearPath.sample(TENSORS["in.data"], TENSORS["in.noise"], START)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def toy_network(matrix, labeled):
    """The network of the fixture, which its metadata describes; it embeds the noise level."""

    def average_velocity(x, t, y, r, rows=None):
        level, length = (each.to(x).view(-1, 1, 1, 1) for each in (1 - t, r - t))
        mapped = torch.einsum("dc,bchw->bdhw", matrix, x)
        scale = 1 + 0.2 * y.to(x).view(-1, 1, 1, 1) if labeled else 1
        return -(torch.tanh(mapped + 0.5 * level * x) * scale + 0.3 * torch.sin(3 * length) * x)

    return average_velocity


@pytest.mark.parametrize("case", ["plain", "guided"])
def test_targets_losses_and_gradients_equal_the_public_implementation(case):
    guided = case == "guided"
    config = MeanFlowConfig(
        power=SPEC["norm_p"],
        epsilon=SPEC["norm_eps"],
        scale=SPEC["omega"],
        mix=SPEC["kappa"] if guided else 0,
    )
    matrix = TENSORS["in.A"].clone().requires_grad_()
    network, objective = toy_network(matrix, labeled=guided), MeanFlowObjective(config, SPEC["null_label"])
    labels = TENSORS["guided.out.labels"] if guided else LABELS
    torch.testing.assert_close(POINT.x_t, TENSORS["plain.out.x_t"], **EXACT)
    target, found = objective.target(network, POINT, labels, INTERVALS), network(POINT.x_t, START, labels, END)
    equal = START == END
    if guided:
        torch.testing.assert_close(target[equal], TENSORS["guided.out.velocity"][equal], **EXACT)
    else:
        torch.testing.assert_close(found, TENSORS["plain.out.average_velocity"], **EXACT)
        torch.testing.assert_close(target, TENSORS["plain.out.target"], **EXACT)
        field = lambda x, t: network(x, t, labels, END)  # noqa: E731
        derivative = total_derivative(field, POINT.x_t, START, POINT.velocity)
        torch.testing.assert_close(derivative, TENSORS["plain.out.total_derivative"], **EXACT)
    loss = objective(found, target).total.mean()
    torch.testing.assert_close(loss, TENSORS[f"{case}.out.loss"], **EXACT)
    loss.backward()
    torch.testing.assert_close(matrix.grad, TENSORS[f"{case}.out.grad_A"], **EXACT)


def improved_networks(first, second):
    """Outputs of the network of the fixture, average and instantaneous velocity, of times towards the data."""
    plain = toy_network(first, labeled=True)

    def average(x, t, y, r, rows=None, guidance=None):
        scale, low, high = (each.to(x).view(-1, 1, 1, 1) for each in guidance.unbind(1))
        return plain(x, t, y, r) - 0.1 * scale.log() - 0.05 * (high - low)

    def instantaneous(x, t, y, guidance):
        level, label, scale = (each.to(x).view(-1, 1, 1, 1) for each in (1 - t, y, guidance[:, 0]))
        mapped = torch.tanh(torch.einsum("dc,bchw->bdhw", second, x)) * (1 + 0.1 * label)
        return -(mapped + 0.2 * torch.cos(2 * level) + 0.05 * scale)

    return average, instantaneous


def test_improved_targets_losses_and_gradients_equal_the_public_implementation():
    config = MeanFlowConfig(power=SPEC["norm_p"], epsilon=SPEC["norm_eps"], max_scale=8)
    matrices = [TENSORS[f"in.{name}"].clone().requires_grad_() for name in "AB"]
    average, instantaneous = improved_networks(*matrices)
    end, low, high = (TENSORS[f"improved.in.{name}"] for name in ("r", "noise_level_high", "noise_level_low"))
    intervals = Intervals(START, end, (end > START).nonzero().flatten())
    guidance = torch.stack([TENSORS["improved.in.scale"], 1 - low, 1 - high], dim=1)
    objective = MeanFlowObjective(config, SPEC["null_label"])
    with_labels = objective.improved_target(average, instantaneous, POINT, LABELS, intervals, guidance)
    torch.testing.assert_close(with_labels.velocity, TENSORS["improved.out.guided_velocity"], **EXACT)
    labels = TENSORS["guided.out.labels"]  # of which one is dropped, where the interval has no length
    target = objective.improved_target(average, instantaneous, POINT, labels, intervals, guidance)
    found = average(POINT.x_t, START, labels, end, None, guidance), instantaneous(POINT.x_t, START, labels, guidance)
    losses = objective.improved(*found, target)
    torch.testing.assert_close(losses.velocity.mean(), TENSORS["improved.out.u_mse"], **EXACT)
    torch.testing.assert_close(losses.instantaneous.mean(), TENSORS["improved.out.v_mse"], **EXACT)
    torch.testing.assert_close(losses.total.mean(), TENSORS["improved.out.loss"], **EXACT)
    losses.total.mean().backward()
    for name, matrix in zip("AB", matrices, strict=True):
        torch.testing.assert_close(matrix.grad, TENSORS[f"improved.out.grad_{name}"], **EXACT)


def test_guidance_as_an_input_is_drawn_log_uniformly_with_ends_in_both_halves_and_is_whole_without_a_length():
    generator = torch.Generator().manual_seed(0)
    times, uniform = torch.rand(2, 4000, generator=generator), torch.rand(3, 4000, generator=generator)
    intervals = Intervals.between(*times, torch.rand(4000, generator=generator), equal_fraction=0.5)
    scale, low, high = draw_guidance(8, uniform, intervals).unbind(1)
    assert (scale.log() / torch.tensor(8.0).log()).mean().item() == pytest.approx(0.5, abs=0.02)
    assert scale.min() >= 1
    assert scale.max() <= 8
    spans = torch.zeros(4000, dtype=torch.bool).index_fill(0, intervals.rows, True)
    assert low[~spans].eq(0).all()
    assert high[~spans].eq(1).all()
    assert low[spans].mean().item() == pytest.approx(0.25, abs=0.02)
    assert high[spans].mean().item() == pytest.approx(0.75, abs=0.02)
    assert low[spans].max() <= 0.5 <= high[spans].min()


def test_an_input_guides_labeled_images_whose_interval_holds_the_start():
    y, t = torch.tensor([1, 2, 3, 5]), torch.tensor([0.2, 0.4, 0.6, 0.4])
    x, intervals = torch.zeros(4, 1, 1, 1), Intervals(t, t, torch.empty(0, dtype=torch.int64))
    guidance = torch.tensor([[4, 0.3, 0.5]]).expand(4, 3)
    labels_as_velocities = lambda x, t, y, guidance: (y * guidance[:, 0]).to(x).view(-1, 1, 1, 1)  # noqa: E731
    objective = MeanFlowObjective(MeanFlowConfig(max_scale=8), 5)
    target = objective.improved_target(
        lambda *_: pytest.fail("not asked for"), labels_as_velocities, PathSample(x, x + 10), y, intervals, guidance
    )
    assert target.velocity.flatten().tolist() == pytest.approx([10, 10 + 0.75 * (2 * 4 - 5), 10, 10])
    assert torch.equal(target.average, target.velocity)


def test_one_step_and_the_labels_that_are_dropped_equal_the_public_implementation():
    network, noise = toy_network(TENSORS["in.A"], labeled=False), TENSORS["sample.noise"]
    labels, solver = torch.zeros(len(noise), dtype=torch.int64), SolverConfig(name="mean_flow", num_steps=1)
    torch.testing.assert_close(solve_mean_flow(network, noise, labels, solver), TENSORS["sample.out"], **EXACT)
    dropped = TENSORS["guided.in.drop_uniform"] < SPEC["label_dropout"]
    assert torch.equal(LABELS.masked_fill(dropped, SPEC["null_label"]), TENSORS["guided.out.labels"])


def test_without_a_length_the_loss_is_that_of_the_velocity():
    config, model = MeanFlowConfig(power=0), random_dit(average_velocity=True)
    noise, t, y = dit_inputs()
    intervals = Intervals.between(t, t.flip(0), torch.rand(len(t)), equal_fraction=1)
    point = LinearPath.sample(noise.flip(0), noise, intervals.starts)
    objective = MeanFlowObjective(config, 5)
    found = model.predict(point.x_t, intervals.starts, y, end=intervals.ends).velocity
    losses = objective(found, objective.target(lambda *_: pytest.fail("not asked for"), point, y, intervals))
    plain = FlowMatchingObjective(ObjectiveConfig(direction_weight=0))(
        model(point.x_t, intervals.starts, y), point.velocity
    )
    assert torch.equal(losses.velocity, plain.total)
    torch.testing.assert_close(losses.total, noise[0].numel() * plain.total)


def test_the_exact_average_of_a_linear_field_is_its_own_target():
    """x' = a x leads from t to r by the factor exp(a (r - t)), in as many steps as one likes."""
    rate, generator = -1.3, torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    t, labels = torch.rand(4, generator=generator, dtype=torch.float64), torch.arange(4)

    def average_velocity(x, t, y, r, rows=None):
        length = (r - t).view(-1, 1, 1, 1)
        return x * torch.where(length == 0, rate, torch.expm1(rate * length) / length)

    intervals = Intervals.between(t, torch.rand(4, generator=generator, dtype=torch.float64), torch.ones(4), 0.75)
    objective = MeanFlowObjective(MeanFlowConfig(), 5)
    target = objective.target(average_velocity, PathSample(x, rate * x), labels, intervals)
    assert len(intervals.rows) == 4
    losses = objective(average_velocity(x, intervals.starts, labels, intervals.ends), target)
    torch.testing.assert_close(losses.total, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-20)
    for num_steps, shift in ((1, 1.0), (5, 0.3)):
        solver = SolverConfig(name="mean_flow", num_steps=num_steps, shift=shift)
        found = solve_mean_flow(lambda *times: average_velocity(*times).double(), x, labels, solver)
        torch.testing.assert_close(found, torch.tensor(rate).exp() * x, rtol=3e-6, atol=1e-6)


def test_intervals_run_from_the_earlier_to_the_later_time_or_have_no_length():
    times, others = torch.tensor([0.1, 0.8, 0.3, 0.9]), torch.tensor([0.5, 0.2, 0.6, 0.4])
    starts, ends, rows = Intervals.between(times, others, torch.tensor([0.9, 0.7, 0.1, 0.75]), equal_fraction=0.75)
    assert starts.tolist() == torch.tensor([0.1, 0.2, 0.3, 0.4]).tolist()
    assert ends.tolist() == torch.tensor([0.5, 0.2, 0.3, 0.9]).tolist()
    assert rows.tolist() == [0, 3]
    both = Intervals.joined([Intervals(starts, ends, rows)] * 2)
    assert both.rows.tolist() == [0, 3, 4, 7]
    assert both.ends.tolist() == ends.tolist() * 2


def test_guidance_is_that_of_labeled_images_within_its_interval():
    config = MeanFlowConfig(scale=0.5, mix=0.2, interval=(0.3, 0.6))
    x, y = torch.zeros(5, 1, 1, 1), torch.tensor([1, 2, 3, 4, 5])
    t = torch.tensor([0.2, 0.3, 0.6, 0.7, 0.5])
    intervals = Intervals(t, t, torch.empty(0, dtype=torch.int64))
    labels_as_velocities = lambda x, t, y, r: y.to(x).view(-1, 1, 1, 1)  # noqa: E731
    target = MeanFlowObjective(config, 5).target(labels_as_velocities, PathSample(x, x + 10), y, intervals)
    guided = [0.5 * 10 + 0.3 * 5 + 0.2 * label for label in (2, 3)]
    assert target.flatten().tolist() == pytest.approx([10, *guided, 10, 10])


@pytest.mark.parametrize(
    "switches",
    [{}, {"norm": "layernorm", "mlp": "gelu", "rope": False}, {"head": {"depth": 1, "width": 48, "heads": 3}}],
)
@pytest.mark.parametrize("half", [False, True])
def test_the_derivative_is_that_of_finite_differences_and_takes_no_gradient(switches, half):
    model, (x, t, y) = random_dit(average_velocity=True, checkpoint_activations=True, **switches), dit_inputs()
    velocity, t = x.flip(0), 0.1 + 0.5 * t
    end = t + 0.3

    def field(x, t):
        return model.predict(x, t, y, end=end).velocity

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        derivative = total_derivative(field, x, t, velocity)
    model.double()
    x, velocity, step = x.double(), velocity.double(), 2**-9
    ahead, behind = (field(x + sign * step * velocity, t + sign * step) for sign in (1, -1))
    torch.testing.assert_close(derivative.double(), (ahead - behind) / (2 * step), rtol=2e-3, atol=2e-4)
    assert not derivative.requires_grad
    assert derivative.abs().max() > 0.1


def test_the_derivative_is_taken_of_blocks_as_they_are_written():
    model, (x, t, y) = random_dit(average_velocity=True), dit_inputs()
    expected = total_derivative(lambda x, t: model.predict(x, t, y).velocity, x, t, x)
    for block in model.all_blocks:
        block.compile(backend=lambda *_: pytest.fail("a block was compiled"))
    assert torch.equal(total_derivative(lambda x, t: model.predict(x, t, y).velocity, x, t, x), expected)
