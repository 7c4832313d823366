"""Average velocities: the identity that trains them, against the public code and where it is known in closed form."""

import pytest
import torch
from support.golden import golden
from support.small_dit import dit_inputs, random_dit

from vavae.diffusion.config import MeanFlowConfig, ObjectiveConfig, SolverConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective, LinearPath, PathSample
from vavae.diffusion.mean_flow import Intervals, MeanFlowObjective, total_derivative
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
