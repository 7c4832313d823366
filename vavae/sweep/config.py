"""Configuration of a sweep: the content of a sweep file."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from vavae.config import Config, runtime
from vavae.config.explain import show
from vavae.metrics.config import LATENT_PROBES

Better = Literal["higher", "lower"]

WHOLE_RUN = "run"
"""Key of a domain whose values are laid over the whole configuration, as `run` is: recipes of several sections."""

_OWN_KEYS = ("name", "seed", "storage")
"""Keys of a run that its sweep sets."""

TOKENIZER_METRICS: dict[str, Better] = {
    "psnr": "higher",
    "ssim": "higher",
    "lpips": "lower",
    "reconstruction_frechet_distance": "lower",
    "alignment_cosine": "higher",
    **LATENT_PROBES,
}
"""Metrics of a tokenizer alone, known before its latents are made, and which way is better."""

KNOWN_METRICS: dict[str, Better] = {
    **TOKENIZER_METRICS,
    "generation_frechet_distance": "lower",
    "generation_frechet_ratio": "lower",
    "generation_kernel_distance": "lower",
    "generation_mind": "lower",
    "generation_precision": "higher",
    "generation_recall": "higher",
    "generation_spatial_frechet_distance": "lower",
    "inception_score": "higher",
    "class_agreement": "higher",
    "within_class_variety": "higher",
    "density_cv": "lower",
    "density_gini": "lower",
    "density_entropy": "higher",
}
"""Metrics and which way is better; an objective that names another metric of a run must say so."""


class DomainConfig(Config):
    """Values of one key: exactly one of `grid`, `choice`, `uniform` and `loguniform`."""

    grid: list[Any] | dict[str, Any] | None = None
    """Every value, with everything else: a list, or values by names that tables and pictures shall show. A value may be
    a whole section, of which only what it names is set."""
    choice: list[Any] | dict[str, Any] | None = None
    """One of these values, written as in `grid`, drawn or chosen; in a grid search every one."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    loguniform: tuple[float, float] | None = None
    """A number between these two positive ones, its logarithm uniform."""
    when: dict[str, Any] = Field(default_factory=dict)
    """The key is set only where each of these keys, which must stand before it, has the value or one of the values
    given here (or their names); elsewhere it is left as it was."""

    @property
    def range(self) -> tuple[float, float] | None:
        """Both ends of a continuous domain; None for one that can be enumerated."""
        return self.uniform or self.loguniform

    @property
    def options(self) -> dict[str, Any]:
        """The values of an enumerable domain by their names; empty for a continuous one."""
        values = self.choice if self.grid is None else self.grid
        if isinstance(values, Mapping):
            return dict(values)
        return {name_of(value): value for value in values or ()}

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = ("grid", "choice", "uniform", "loguniform")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(kinds)}, not {' and '.join(given) or 'none'}")
        values = getattr(self, given[0])
        if not values:
            raise ValueError(f"{given[0]} is empty: give it a value, or leave this key out of the sweep")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"{given[0]}={list(self.range)} is empty: the first must be less than the second")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform={list(self.loguniform)} must be positive: a logarithm is taken")
        if self.range is None and len(self.options) < len(values):
            raise ValueError(f"{given[0]} has values of the same name: {', '.join(map(name_of, values))}; name them")
        return self


def name_of(value: Any) -> str:
    """Name of a value that was given none."""
    return value if isinstance(value, str) else show(value)


class ObjectiveConfig(Config):
    """A metric that a search improves."""

    measure: str
    """Name of the metric, as in `metrics.json`."""
    better: Better
    """Direction of better values."""

    @field_validator("measure")
    @classmethod
    def _is_of_every_trial(cls, measure: str) -> str:
        if measure.partition("/")[0] in ("images_to_frechet", "epochs_to_frechet"):
            raise ValueError(
                f"a trial that does not come so far has no {measure}; search for generation_frechet_distance, and the "
                "table will have it"
            )
        return measure

    @model_validator(mode="before")
    @classmethod
    def _known_by_name(cls, given: Any) -> Any:
        """Accept a bare name of one of `KNOWN_METRICS`."""
        if not isinstance(given, str):
            return given
        if given not in KNOWN_METRICS:
            near = get_close_matches(given, KNOWN_METRICS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KNOWN_METRICS)};"
            raise ValueError(f"no such metric; {hint} For another say {{measure: {given}, better: lower or higher}}")
        return {"measure": given, "better": KNOWN_METRICS[given]}


class SearchConfig(Config):
    """Choice of the points of the space that are tried."""

    method: Literal["grid", "random", "optuna"] = "grid"
    """All points; random ones; or those that Optuna suggests from the results so far (TPE; of several objectives the
    front)."""
    trials: int | None = Field(None, ge=1)
    """Number of points; with `random`, for every combination of the `grid` domains. Not for `grid`."""
    seed: int = Field(0, ge=0)
    """Seed of the draws."""

    @model_validator(mode="after")
    def _trials_are_counted(self) -> Self:
        if (self.trials is None) != (self.method == "grid"):
            verb = "counts its trials itself: leave trials out" if self.trials else "needs a number of trials"
            raise ValueError(f"method {self.method} {verb}")
        return self


class EarlyStoppingConfig(Config):
    """Early stopping of trials that are worse than others at the same number of images; for one objective."""

    rule: Literal["none", "asha", "median"] = "none"
    """`asha` keeps the best at every rung; `median` stops a trial below the median of the others so far."""
    reduction_factor: int = Field(2, ge=2)
    """Share of the trials that ASHA continues at a rung: one of this many."""


class ThresholdConfig(Config):
    """Limits of a tokenizer's metric beyond which its trial stops before latents and diffusion."""

    min: float | None = None
    max: float | None = None

    def broken_by(self, value: float) -> str | None:
        """The limit that a value breaks, in words; None where it breaks none."""
        if self.min is not None and not value >= self.min:
            return f"at least {self.min:g}"
        return f"at most {self.max:g}" if self.max is not None and not value <= self.max else None


class SweepConfig(Config):
    """A sweep over the configurations of runs."""

    name: str = runtime(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the sweep below the `storage.root` of its runs."""
    base: str = Field(min_length=1)
    """Configuration file of a run that the trials vary, relative to the file that names it."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Laid over `base`, for the trials and for `best.yaml`."""
    reduced: dict[str, Any] = Field(default_factory=dict)
    """Laid over that for the trials alone: what makes them smaller than the run that they are to inform."""
    sweep: dict[str, DomainConfig]
    """Domains by dotted keys of the run's configuration, or by `run` for all of it; a later one is set over an earlier
    one."""
    seeds: tuple[int, ...] = (0,)
    """Every point is run once with each; results are means over them."""
    search: SearchConfig = SearchConfig()
    objectives: tuple[ObjectiveConfig, ...] = (
        ObjectiveConfig(measure="reconstruction_frechet_distance", better="lower"),
        ObjectiveConfig(measure="generation_frechet_distance", better="lower"),
    )
    """Metrics by name, or {measure, better}; several are searched for their Pareto front."""
    rungs: tuple[int, ...] = ()
    """Images seen by the LightningDiT, besides its budget, at which a trial samples and is evaluated."""
    thresholds: dict[str, ThresholdConfig] = Field(default_factory=dict)
    """Limits that stop a trial before its latents are made, by name: metrics of the tokenizer alone, or scalars of the
    last row of its log, such as `loss/total`."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    rows: str | None = runtime(None, min_length=1)
    """File of the finished trials, relative to the file that names it, for a repository: trials that it holds as they
    are configured are not run again, and each that finishes is added. Sources are known by their names there."""
    max_concurrent: int | None = runtime(None, ge=1)
    """Trials that run at once; null takes as many as the cluster holds."""
    retries: int = runtime(1, ge=0)
    """Number of times that a failed trial is retried; then it is marked failed, and the sweep continues."""
    tracking: tuple[Literal["mlflow", "wandb"], ...] = runtime(())
    """Also report to MLflow or Weights & Biases, which find their server and project in the environment."""

    @field_validator("sweep")
    @classmethod
    def _has_domains(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        if not domains:
            raise ValueError("the sweep is empty: give it a key of the run's configuration")
        for path, domain in domains.items():
            for key in _keys(path, domain):
                if key in _OWN_KEYS:
                    raise ValueError(f"{path if key in path else f'{path}: {key}'} is the sweep's to set; leave it out")
            for other, wanted in domain.when.items():
                _check_condition(path, other, wanted, domains)
        return domains

    @field_validator("thresholds")
    @classmethod
    def _are_early(cls, thresholds: dict[str, ThresholdConfig]) -> dict[str, ThresholdConfig]:
        for metric in thresholds:
            if metric not in TOKENIZER_METRICS and "/" not in metric:
                raise ValueError(
                    f"{metric} is not known before the diffusion training; take one of {', '.join(TOKENIZER_METRICS)} "
                    "or a scalar of the tokenizer's log, such as loss/total"
                )
        return thresholds

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        method = self.search.method
        for path, domain in self.sweep.items():
            if method == "grid" and domain.range is not None:
                raise ValueError(f"sweep.{path} has no end of values for a grid; set search.method to random or optuna")
            if method == "optuna" and domain.grid is not None:
                raise ValueError(f"sweep.{path} is a grid, but optuna chooses for itself: write choice")
        if self.early_stopping.rule != "none" and len(self.objectives) != 1:
            raise ValueError(f"early_stopping.rule={self.early_stopping.rule} compares one objective; give it one")
        for field, values in (("seeds", self.seeds), ("objectives", self.objectives)):
            if not values:
                raise ValueError(f"{field} is empty: give at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} repeats one; a replication needs a seed of its own")
        if list(self.rungs) != sorted(set(self.rungs)) or any(rung < 1 for rung in self.rungs):
            raise ValueError(f"rungs={list(self.rungs)} must be positive and rise")
        return self


def _keys(path: str, domain: DomainConfig) -> set[str]:
    """Keys at the top of a run's configuration that a domain sets."""
    if path != WHOLE_RUN:
        return {path.partition(".")[0]}
    values = list(domain.options.values())
    if not values or not all(isinstance(value, Mapping) for value in values):
        raise ValueError(
            f"{path}: give its values names, and each the sections that it sets, as in {{grid: {{plain: {{}}}}}}"
        )
    return {key for value in values for key in value}


def _check_condition(path: str, other: str, wanted: Any, domains: Mapping[str, DomainConfig]) -> None:
    """Refuse a condition on a key that does not stand before, is a range, or never has such a value."""
    if other not in list(domains)[: list(domains).index(path)]:
        near = get_close_matches(other, domains, 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != other else ""
        raise ValueError(f"{path}: when.{other} must be a key of the sweep that stands before it{hint}")
    options = domains[other].options
    if not options:
        raise ValueError(f"{path}: when.{other} is a range, of which no single value can be asked for")
    for name in conditions(wanted):
        if name not in options:
            raise ValueError(f"{path}: when.{other}={name} never holds: its values are {', '.join(options)}")


def conditions(wanted: Any) -> list[str]:
    """Names of the values, one or a list, for which a condition holds."""
    return [name_of(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
