"""Muon against numbers of public code, the optimizer of torch, and what orthogonalization means."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import golden
from support.training_steps import CLASSES, tiny_config
from torch import Tensor, nn

from vavae.distributed.config import EngineConfig, MuonConfig, OptimizerConfig
from vavae.distributed.engine import TorchEngine, build_optimizer, prepare_update
from vavae.distributed.muon import MatrixShape, assign_by_cost, matrix_shapes, muon_update, orthogonalize, update_scale
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.models.dit.model import LightningDiT
from vavae.runs.training_config import LightningDiTMuonConfig

SPEC, TENSORS = golden("beyond_muon")


def _parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    names = [*map(str, range(len(SPEC["shapes"]))), "vector"]
    return {name: nn.Parameter(TENSORS[f"in.weight.{name}"].to(dtype, copy=True)) for name in names}


def _take_steps(parameters: dict[str, nn.Parameter], weight_decay: float = 0.0, **muon: Any) -> dict[str, Tensor]:
    """The steps of the fixture; the weights after each, [steps, ...]."""
    section = MuonConfig(momentum=SPEC["momentum"], weight_decay=SPEC["weight_decay"], **muon)
    config = OptimizerConfig(learning_rate=SPEC["lr"], betas=(0.9, 0.95), muon=section)
    optimizer = build_optimizer(parameters, config, EngineConfig(), World())
    states: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for step in range(SPEC["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = TENSORS[f"in.grad.{name}"][step].to(parameter.dtype)
        prepare_update(optimizer, SPEC["lr"], torch.tensor(1.0))
        optimizer.step()
        for name, parameter in parameters.items():
            states[name].append(parameter.detach().clone())
    return {name: torch.stack(states[name]) for name in states}


@pytest.mark.parametrize(
    ("source", "scale"),
    [
        ("torch.original", "original"),
        ("torch.match_rms_adamw", "match_rms_adamw"),
        ("internal_guidance", "internal_guidance"),
    ],
)
def test_steps_are_those_of_public_code(source: str, scale: str) -> None:
    found = _take_steps(_parameters(torch.float64), scale=scale, precision="fp32")
    # Internal guidance adds its epsilon to the norm, where others take the larger one.
    tolerance = 1e-7 if source == "internal_guidance" else 1e-10
    for name in set(found) - {"vector"}:
        expected = TENSORS[f"{source}.float64.{name}"]
        assert (found[name] - expected).abs().max() < tolerance * expected.abs().max()
    if source == "internal_guidance":
        torch.testing.assert_close(found["vector"], TENSORS[f"{source}.float64.vector"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_half_precision_is_that_of_public_code(scale: str) -> None:
    found = _take_steps(_parameters(torch.float32), scale=scale)
    for name in set(found) - {"vector"}:
        torch.testing.assert_close(found[name], TENSORS[f"torch.{scale}.bf16.{name}"], rtol=0, atol=1e-3)


def test_orthogonalization_is_that_of_public_code() -> None:
    for name in map(str, range(len(SPEC["shapes"]))):
        found = orthogonalize(TENSORS[f"in.grad.{name}"][:1].double(), SPEC["ns_steps"])[0]
        # The fixture adds its epsilon to the norm, where torch takes the larger one.
        torch.testing.assert_close(found, TENSORS[f"newton_schulz.out.{name}"], rtol=0, atol=1e-7)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_steps_are_those_of_the_optimizer_of_torch(scale: str, nesterov: bool) -> None:
    parameters = _parameters(torch.float32)
    twins = [nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items() if name != "vector"]
    oracle = torch.optim.Muon(
        twins, SPEC["lr"], SPEC["weight_decay"], SPEC["momentum"], nesterov, ns_steps=4, adjust_lr_fn=scale
    )
    found = _take_steps(parameters, scale=scale, nesterov=nesterov, iterations=4)
    for step in range(SPEC["steps"]):
        for name, twin in enumerate(twins):
            twin.grad = TENSORS[f"in.grad.{name}"][step].clone()
        oracle.step()
        for name, twin in enumerate(twins):
            torch.testing.assert_close(found[str(name)][step], twin.detach(), rtol=0, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_singular_values_are_those_of_a_polynomial_and_come_near_one(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(1, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u, values, v = torch.linalg.svd(matrix[0] / matrix.norm(), full_matrices=False)
    after = values
    for _ in range(SPEC["ns_steps"]):
        after = 3.4445 * after - 4.7750 * after**3 + 2.0315 * after**5
    found = orthogonalize(matrix, SPEC["ns_steps"])[0]
    torch.testing.assert_close(found, u @ after.diag() @ v, rtol=0, atol=1e-8)
    assert ((after > 0.68) & (after < 1.14))[values >= 0.01].all()


def test_matrices_of_rank_one_and_of_nothing_are_no_trouble() -> None:
    one = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 4))[None]
    values = torch.linalg.svdvals(orthogonalize(one, 5)[0])
    assert 0.68 < values[0] < 1.14
    assert values[1] < 1e-3
    assert orthogonalize(one.bfloat16(), 5).isfinite().all()
    assert orthogonalize(torch.zeros(1, 3, 4), 5).abs().max() == 0


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192)])
def test_steps_are_as_long_as_those_of_adam(shape: tuple[int, int]) -> None:
    """A root mean square of about 0.2."""
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalize(matrix, 5) * update_scale(MatrixShape(1, *shape), MuonConfig())
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_fused_matrices_are_orthogonalized_one_by_one() -> None:
    gradient, momentum = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    together = muon_update(gradient, momentum, MuonConfig(), MatrixShape(3, 4, 4))
    pairs = zip(gradient.split(4), momentum.split(4), strict=True)
    singly = [muon_update(*pair, MuonConfig(), MatrixShape(1, 4, 4)) for pair in pairs]
    torch.testing.assert_close(together, torch.cat(singly), rtol=0, atol=0)
    whole = muon_update(gradient, momentum, MuonConfig(), MatrixShape(1, 12, 4))
    assert (together - whole).abs().max() > 0.1


def _dit() -> dict[str, torch.Size]:
    model = LightningDiT(tiny_config().lightningdit.with_classes(CLASSES), 4, 8)
    return {name: parameter.shape for name, parameter in nn.ModuleDict({"model": model}).named_parameters()}


def test_matrices_of_the_blocks_are_muon_s_and_embeddings_and_outputs_are_not() -> None:
    weights = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    found = matrix_shapes(_dit(), LightningDiTMuonConfig())
    assert {*found} == {f"model.blocks.{block}.{weight}.weight" for block in range(2) for weight in weights}
    assert found["model.blocks.1.attn.qkv.weight"] == (3, 32, 32)
    assert found["model.blocks.1.mlp.w12.weight"] == (2, 85, 32)
    assert found["model.blocks.1.adaLN_modulation.1.weight"] == (1, 192, 32)
    whole = matrix_shapes(_dit(), LightningDiTMuonConfig(split_fused=False))
    assert whole["model.blocks.1.attn.qkv.weight"] == (1, 96, 32)


def test_all_that_has_rows_and_columns_may_be_muon_s() -> None:
    """As released with internal guidance: embeddings, output layers and convolutions as well."""
    shapes = _dit()
    found = matrix_shapes(shapes, MuonConfig())
    assert {*found} == {name for name, shape in shapes.items() if len(shape) > 1}
    assert found["model.x_embedder.proj.weight"] == (1, 32, 4)


def test_embeddings_of_positions_are_left_to_adamw_where_outputs_and_labels_are_not() -> None:
    """As in RAEv2."""
    patterns = {"matrices": ("*.blocks.*", "*.final_layer*", "*.[ty]_embedder.*"), "others": ("*.x_embedder.*",)}
    shapes = _dit()
    matrices = {name for name, shape in shapes.items() if len(shape) > 1}
    assert {*matrix_shapes(shapes, LightningDiTMuonConfig(**patterns))} == matrices - {"model.x_embedder.proj.weight"}


def test_frozen_tables_stay_as_they_are() -> None:
    module = nn.ParameterDict({"matrix": torch.ones(3, 4), "frozen": torch.ones(3, 4)})
    module["frozen"].requires_grad_(False)
    module.register_buffer("table", torch.ones(3, 4))
    engine = TorchEngine(module, OptimizerConfig(muon=MuonConfig(weight_decay=0.5)), EngineConfig(), World(), 1)
    engine.backward((module["matrix"] * module["frozen"] * module.table).sum())
    engine.update(0.1)
    assert not torch.equal(module["matrix"].detach(), torch.ones(3, 4))
    assert torch.equal(module["frozen"], torch.ones(3, 4))
    assert torch.equal(module.table, torch.ones(3, 4))
    assert {*engine.moments()} == {"momentum_buffer/matrix"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"others": ("*_embedder.*",)},
            r"model.final_layer.\S+ \[\d+, 32\] matches neither matrices=\['\*.blocks.\*', '\*.fusion.\*'\]",
        ),
        (
            {"matrices": ("*",)},
            r"model.x_embedder.proj.weight \[32, 4, 1, 1\] matches both matrices=\['\*'\] and others",
        ),
    ],
)
def test_a_matrix_of_no_or_two_groups_is_refused(patterns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^optimizer.muon: {message}"):
        matrix_shapes(_dit(), LightningDiTMuonConfig(**patterns))


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    module = nn.ParameterDict({"matrix": torch.ones(3, 4), "vector": torch.ones(2)})
    engine = TorchEngine(module, OptimizerConfig(muon=MuonConfig(weight_decay=0.1)), EngineConfig(), World(), 1)
    states = []
    for factor in (1.0, math.nan, math.inf, 1.0):
        engine.backward(factor * (module["matrix"].sum() + module["vector"].sum()))
        engine.update(0.1)
        moments = {name: shard.values.clone() for name, shard in engine.moments().items()}
        states.append((engine.updates, {name: p.detach().clone() for name, p in module.items()} | moments))
    assert [updates for updates, _ in states] == [1, 1, 1, 2]
    assert {*states[0][1]} == {
        "matrix", "vector", "momentum_buffer/matrix", "exp_avg/vector", "exp_avg_sq/vector",
    }  # fmt: skip
    for name, tensor in states[0][1].items():
        assert torch.equal(states[1][1][name], tensor), name
        assert torch.equal(states[2][1][name], tensor), name
        assert not torch.equal(states[3][1][name], tensor), name


def test_groups_have_rates_and_decays_of_their_own() -> None:
    module = nn.ParameterDict({"matrix": torch.ones(3, 4), "vector": torch.ones(2)})
    muon = MuonConfig(weight_decay=0.5, learning_rate_factor=10)
    engine = TorchEngine(module, OptimizerConfig(weight_decay=0.1, muon=muon), EngineConfig(), World(), 1)
    engine.backward(0.0 * (module["matrix"].sum() + module["vector"].sum()))
    engine.update(0.01)
    assert module["matrix"].detach().unique().tolist() == pytest.approx([1 - 10 * 0.01 * 0.5])
    assert module["vector"].detach().unique().tolist() == pytest.approx([1 - 0.01 * 0.1])


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_no_rank_has_much_more_to_do_than_another(costs: list[int], ranks: int) -> None:
    assigned = assign_by_cost(costs, ranks)
    assert sorted(index for part in assigned for index in part) == [*range(len(costs))]
    loads = [sum(costs[index] for index in part) for part in assigned]
    assert max(loads) - min(loads) <= max(costs)
