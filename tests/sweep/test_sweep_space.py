"""The space of a sweep: its points, and what is refused before anything starts."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.sweep.config import DomainConfig
from vavae.sweep.space import Space
from vavae.sweep.sweep import Sweep, describe, name_of_trial

_BASE = Path(__file__).parents[2] / "configs" / "tiny.yaml"
_DOMAINS = """
  tokenizer.latent_dim: {grid: [4, 8]}
  losses.vision_foundation.weight: {grid: {off: 0, on: 0.1}}
  losses.vision_foundation:
    grid: {whole: {}, without_margins: {cos_margin: 0, distmat_margin: 0}}
    when: {tokenizer.latent_dim: 8, losses.vision_foundation.weight: "on"}
"""


@pytest.fixture
def load_sweep(tmp_path: Path):
    def load_sweep(domains: str = _DOMAINS, rest: str = "", *overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"name: test\nbase: {_BASE}\nrun: {{storage: {{root: {tmp_path}}}}}\n{rest}\nsweep:{domains}")
        return Sweep.load(path, overrides)

    return load_sweep


def test_a_grid_crosses_everything_whose_condition_holds(load_sweep) -> None:
    sweep = load_sweep()
    assert [describe(point).split(", ")[-1].rpartition(".")[2] for point in sweep.points()] == [
        "weight=off", "weight=on", "weight=off", "vision_foundation=whole", "vision_foundation=without_margins",
    ]  # fmt: skip
    configs = [sweep.run_config(point, seed=3) for point in sweep.points()]
    assert [config.tokenizer.latent_dim for config in configs] == [4, 4, 8, 8, 8]
    losses = [config.losses.vision_foundation for config in configs]
    assert [loss.weight for loss in losses] == [0, 0.1, 0, 0.1, 0.1]
    assert [loss.distmat_margin for loss in losses] == [0.25, 0.25, 0.25, 0.25, 0]
    assert {config.seed for config in configs} == {3}
    assert len({config.name for config in configs}) == len(configs)


def test_the_ramp_of_an_average_is_a_domain_as_any_field(load_sweep) -> None:
    sweep = load_sweep("\n  train_lightningdit.ema_ramp: {grid: {unlimited: null, of_edm2: 0.09}}")
    configs = [sweep.run_config(point, seed=0) for point in sweep.points()]
    assert [config.train_lightningdit.ema_ramp for config in configs] == [None, 0.09]
    assert len({config.name for config in configs}) == 2


def test_averages_and_the_one_that_is_sampled_are_domains(load_sweep) -> None:
    sweep = load_sweep(
        """
  train_lightningdit.averages: {grid: {none: [], one: [{name: wide, std: 0.1}]}}
  sample.weights: {grid: {export: null, wide: wide}, when: {train_lightningdit.averages: one}}"""
    )
    configs = [sweep.run_config(point, seed=0) for point in sweep.points()]
    assert [len(config.train_lightningdit.averages) for config in configs] == [0, 1, 1]
    assert [config.sample.weights for config in configs] == [None, None, "wide"]
    assert len({config.name for config in configs}) == 3


def test_optimizers_and_schedules_are_domains(load_sweep) -> None:
    sweep = load_sweep(
        """
  train_lightningdit.optimizer.muon: {grid: {adamw: null, muon: {momentum: 0.9}}}
  train_lightningdit.optimizer.muon.learning_rate_factor:
    loguniform: [0.1, 10]
    when: {train_lightningdit.optimizer.muon: muon}
  train_lightningdit.schedule: {choice: {constant: {}, linear: {decay: linear, decay_images: 9, final_factor: 0.1}}}
""",
        "search: {method: random, trials: 3}",
        "run.train_lightningdit.engine.zero_stage=0",
    )
    configs = [sweep.run_config(point, seed=0) for point in sweep.space.examples()]
    sections = [config.train_lightningdit.optimizer.muon for config in configs]
    assert None in sections
    assert {section.learning_rate_factor for section in sections if section} >= {0.1, 10.0}
    assert {section.momentum for section in sections if section} == {0.9}
    assert {config.train_lightningdit.schedule.decay for config in configs} == {"cosine", "linear"}


def test_what_the_network_predicts_is_a_domain(load_sweep) -> None:
    sweep = load_sweep("\n  lightningdit.prediction: {grid: [velocity, data]}")
    configs = [sweep.run_config(point, seed=0) for point in sweep.points()]
    assert [config.lightningdit.prediction for config in configs] == ["velocity", "data"]


def test_a_head_is_an_option_of_a_domain(load_sweep) -> None:
    sweep = load_sweep("\n  lightningdit.head: {grid: {none: null, wide: {depth: 1, width: 64, heads: 2}}}")
    heads = [sweep.run_config(point, seed=0).lightningdit.head for point in sweep.points()]
    assert [head and head.width for head in heads] == [None, 64]


def test_conditioning_is_a_domain_and_the_number_of_its_tokens_one_within(load_sweep) -> None:
    sweep = load_sweep(
        "\n  lightningdit.conditioning: {grid: [adaln, in_context]}"
        "\n  lightningdit.label_tokens: {grid: [4, 16], when: {lightningdit.conditioning: in_context}}"
    )
    models = [sweep.run_config(point, seed=0).lightningdit for point in sweep.points()]
    assert [(model.in_context, model.label_tokens) for model in models] == [(False, 8), (True, 4), (True, 16)]


def test_the_shift_of_trained_timesteps_is_a_domain(load_sweep) -> None:
    sweep = load_sweep("\n  timesteps.shift: {grid: [0.3, by_dimension]}")
    configs = [sweep.run_config(point, seed=0) for point in sweep.points()]
    assert [config.timesteps.shift for config in configs] == [0.3, "by_dimension"]


def test_routing_is_a_domain_as_a_whole_and_by_its_fields(load_sweep) -> None:
    sweep = load_sweep(
        "\n  lightningdit.routing: {grid: {none: null, skip: {first_block: 0, last_block: 1}}}"
        "\n  lightningdit.routing.drop: {grid: [0.25, 0.75], when: {lightningdit.routing: skip}}"
    )
    sections = [sweep.run_config(point, seed=0).lightningdit.routing for point in sweep.points()]
    assert [section and section.drop for section in sections] == [None, 0.25, 0.75]


def test_recipes_set_several_sections_at_once(load_sweep) -> None:
    sweep = load_sweep(
        """
  run: {grid: {plain: {}, muon: {train_lightningdit: {engine: {backend: torch}, optimizer: {muon: {}}}}}}
  guidance: {grid: {none: {scale: 1}, usual: {scale: 2}}, when: {run: muon}}"""
    )
    assert [describe(point) for point in sweep.points()] == [
        "run=plain",
        "run=muon, guidance=none",
        "run=muon, guidance=usual",
    ]
    configs = [sweep.run_config(point, seed=0) for point in sweep.points()]
    assert [config.train_lightningdit.optimizer.muon is None for config in configs] == [True, False, False]
    assert [config.train_lightningdit.engine.backend for config in configs] == ["deepspeed", "torch", "torch"]
    assert configs[1].train_lightningdit == configs[2].train_lightningdit


def test_the_full_size_leaves_out_what_made_the_trials_small(load_sweep) -> None:
    sweep = load_sweep(rest="reduced: {train_vavae: {images: 64}}")
    point = sweep.points()[1]
    small, full = sweep.run_config(point, 0), sweep.full_config(point)
    assert (small.train_vavae.images, full.train_vavae.images) == (64, 128)
    assert small.losses == full.losses
    assert Path(small.storage.root) == Path(full.storage.root) / "test" / "trials"


_ERRORS = {
    "a path that there is not": ("{tokenizer.latent_dm: {grid: [4]}}", "did you mean tokenizer.latent_dim?"),
    "a key of another section": ("{tokenizer.cos_margin: {grid: [0.4]}}", "did you mean losses.vision_foundation.cos"),
    "a path through a value": ("{tokenizer.latent_dim.x: {grid: [1]}}", "tokenizer.latent_dim is 4"),
    "beyond a list": ("{train_vavae.stages.3.frozen: {grid: [[encoder]]}}", "train_vavae.stages.3.frozen"),
    "a wrong type": ("{tokenizer.latent_dim: {grid: [4, many]}}", '"many" should be a valid integer'),
    "a value out of bounds": ("{losses.vision_foundation.cos_margin: {grid: [3]}}", "less than or equal to 2"),
    "a whole number from a range": ("{tokenizer.latent_dim: {grid: [4]}, lightningdit.depth: {grid: [1.5]}}", "1.5"),
    "a point that no run can be": ("{lightningdit.patch_size: {grid: [1, 3]}}", "patch_size=3 does not divide"),
    "an empty grid": ("{tokenizer.latent_dim: {grid: []}}", "grid is empty"),
    "an empty range": ("{losses.kl_weight: {uniform: [1, 1]}}", "the first must be less than the second"),
    "a logarithm of nothing": ("{losses.kl_weight: {loguniform: [0, 1]}}", "must be positive"),
    "no domain": ("{losses.kl_weight: {}}", "give one of grid, choice, uniform, loguniform, not none"),
    "two domains": ("{losses.kl_weight: {grid: [1], choice: [1]}}", "not grid and choice"),
    "an unknown kind": ("{losses.kl_weight: {normal: [0, 1]}}", "no such key"),
    "two values of one name": ("{tokenizer.latent_dim: {grid: [4, 4]}}", "values of the same name"),
    "no keys": ("{}", "the sweep is empty"),
    "a range in a grid search": ("{losses.kl_weight: {uniform: [0, 1]}}", "has no end of values for a grid"),
    "what is the sweep's to set": ("{seed: {grid: [1, 2]}}", "seed is the sweep's to set"),
    "a recipe that is no section": ("{run: {grid: [1]}}", "give its values names, and each the sections that it sets"),
    "a recipe with a seed": ("{run: {grid: {a: {seed: 1}}}}", "run: seed is the sweep's to set"),
    "a recipe with a wrong key": (
        "{run: {grid: {a: {tokenizer: {latent_dm: 4}}}}}",
        "did you mean tokenizer.latent_dim?",
    ),
    "a condition on what comes later": (
        "{losses.kl_weight: {grid: [0], when: {tokenizer.latent_dim: 4}}, tokenizer.latent_dim: {grid: [4]}}",
        "must be a key of the sweep that stands before it",
    ),
    "a condition that never holds": (
        "{tokenizer.latent_dim: {grid: [4]}, losses.kl_weight: {grid: [0], when: {tokenizer.latent_dim: 5}}}",
        "when.tokenizer.latent_dim=5 never holds: its values are 4",
    ),
}


@pytest.mark.parametrize(("domains", "message"), _ERRORS.values(), ids=_ERRORS)
def test_a_mistake_is_one_line(load_sweep, domains: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_sweep(f" {domains}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_is_named_with_its_line_and_its_point(load_sweep, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_sweep("\n  tokenizer.latent_dim:\n    grid: [4]\n  losses.kl_weight: {grid: [-1]}\n")
    assert f"losses.kl_weight ({tmp_path / 'sweep.yaml'}:8)" in str(error.value)
    assert str(error.value).endswith("[tokenizer.latent_dim=4, losses.kl_weight=-1]")


_SETTINGS = {
    "a number that is counted": ("search: {trials: 3}", "leave trials out"),
    "a number that is missing": ("search: {method: random}", "needs a number of trials"),
    "a grid for Optuna": ("search: {method: optuna, trials: 3}", "write choice"),
    "a misspelt metric": ("objectives: [generation_frechet_distanse]", "did you mean generation_frechet_distance?"),
    "an objective that not every trial has": (
        "objectives: [{measure: images_to_frechet/50, better: lower}]",
        "a trial that does not come so far has no images_to_frechet/50; search for generation_frechet_distance",
    ),
    "one rule for two objectives": ("early_stopping: {rule: asha}", "compares one objective"),
    "a threshold that comes too late": ("thresholds: {generation_frechet_distance: {max: 1}}", "is not known before"),
    "a seed twice": ("seeds: [1, 1]", "repeats one"),
    "rungs that fall": ("rungs: [64, 32]", "must be positive and rise"),
}


@pytest.mark.parametrize(("rest", "message"), _SETTINGS.values(), ids=_SETTINGS)
def test_settings_that_do_not_fit_are_refused(load_sweep, rest: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load_sweep(rest=rest)


def test_a_fraction_is_no_whole_number(load_sweep) -> None:
    with pytest.raises(UserError, match="should be a valid integer"):
        load_sweep(" {tokenizer.latent_dim: {uniform: [4, 64]}}", "search: {method: random, trials: 1}")


@pytest.mark.parametrize("name", ["dilemma_cifar10", "dilemma_cifar10_gpu"])
def test_the_dilemma_compares_what_the_paper_compares(name: str) -> None:
    sweep = Sweep.load(_BASE.parent / "sweeps" / f"{name}.yaml")
    assert len(sweep.config.seeds) >= 2
    configs = [sweep.run_config(point, 0) for point in sweep.points()]
    arms = [(config.tokenizer.latent_dim, config.losses.vision_foundation) for config in configs]
    assert [(dim, loss.weight > 0) for dim, loss in arms[:6]] == [
        (dim, aligned) for dim in (4, 8, 16) for aligned in (False, True)
    ]  # fmt: skip
    whole, without_mcos, without_mdms, without_margins = [loss for _, loss in arms[5:]]
    assert (without_mcos.cos_weight, without_mdms.distmat_weight) == (0, 0)
    assert without_mcos.weight == without_mdms.weight == whole.weight / 2, "section 6.3"
    assert (without_margins.cos_margin, without_margins.distmat_margin, without_margins.weight) == (0, 0, whole.weight)
    assert {(config.grid, config.guidance.scale) for config in configs} == {((8, 8), 1)}
    assert len({config.train_lightningdit.images for config in configs}) == 1


_SPACES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=4)


def _space(shape: list[tuple[int, int, int]]) -> Space:
    """Keys with so many options each; a key may ask for an option of one of those before it."""
    domains: dict[str, DomainConfig] = {}
    for place, (count, parent, wanted) in enumerate(shape):
        when = {f"key{parent}": wanted} if parent < place and wanted < shape[parent][0] else {}
        domains[f"key{place}"] = DomainConfig(grid=list(range(count)), when=when)
    return Space(domains)


@given(_SPACES)
def test_a_grid_is_what_every_combination_comes_to(shape: list[tuple[int, int, int]]) -> None:
    space = _space(shape)
    combinations = itertools.product(*(domain.options for domain in space.domains.values()))
    expected = {
        tuple(space.walk(lambda path, _: dict(zip(space.domains, names, strict=True))[path]).items())  # noqa: B023
        for names in combinations
    }
    points = space.points()
    assert {tuple(point.items()) for point in points} == expected
    assert len(points) == len(expected)
    assert all(space.known_point(dict(reversed(point.items()))) == point for point in points)


@given(_SPACES, st.integers(0, 100))
def test_draws_are_points_and_depend_on_the_seed_alone(shape: list[tuple[int, int, int]], seed: int) -> None:
    grid = _space(shape)
    space = Space({path: DomainConfig(choice=domain.grid, when=domain.when) for path, domain in grid.domains.items()})
    drawn = space.draw(numpy_generator(seed, "test"), 5)
    assert drawn == space.draw(numpy_generator(seed, "test"), 5)
    assert all(point in grid.points() for point in drawn)
    assert len({name_of_trial(point) for point in drawn}) == len(drawn)


def test_draws_cover_every_cell_of_the_grid_and_stay_in_their_range() -> None:
    space = Space({"a": DomainConfig(grid=[1, 2]), "b": DomainConfig(loguniform=(1e-4, 1.0))})
    drawn = space.draw(numpy_generator(0, "test"), 200)
    assert [point["a"] for point in drawn] == ["1"] * 200 + ["2"] * 200
    values = [float(point["b"]) for point in drawn]
    assert all(1e-4 <= value <= 1 for value in values)
    assert 0.4 < sum(value < 1e-2 for value in values) / len(values) < 0.6, "the middle of the logarithm"
    assert space.known_point({**drawn[0], "b": 2.0}) is None
    assert space.known_point({**drawn[0], "c": 1.0}) is None
    assert space.known_point({"b": drawn[0]["b"]}) is None


def test_examples_contain_every_option() -> None:
    space = Space(
        {
            "a": DomainConfig(choice=[1, 2]),
            "b": DomainConfig(choice=["x", "y"], when={"a": 2}),
            "c": DomainConfig(uniform=(0.0, 1.0), when={"b": "y"}),
        }
    )
    examples = space.examples()
    assert {(path, value) for point in examples for path, value in point.items()} >= {
        ("a", "1"), ("a", "2"), ("b", "x"), ("b", "y"), ("c", 0.0), ("c", 1.0),
    }  # fmt: skip
    assert all(space.known_point(point) == point for point in examples)
    contradiction = Space({**space.domains, "d": DomainConfig(choice=[1], when={"a": 1, "b": "x"})})
    with pytest.raises(UserError, match=r"sweep\.d: its conditions never hold together"):
        contradiction.examples()
