"""The section of a recipe that says what is searched, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from heliostat.recipe.base import Count, Section, no_password


class Range(Section):
    when: dict[str, Annotated[list[bool | int | float | str], Field(min_length=1)]] = {}
    """Searched where each of these other paths of the space has one of these values; elsewhere the recipe's own value
    stays."""


class Uniform(Range):
    kind: Literal["uniform"] = "uniform"
    low: float
    high: float


class LogUniform(Range):
    kind: Literal["log_uniform"] = "log_uniform"
    low: PositiveFloat
    high: PositiveFloat


class Integers(Range):
    kind: Literal["int"] = "int"
    low: int
    high: int


class Choice(Range):
    kind: Literal["choice"] = "choice"
    values: Annotated[list[bool | int | float | str], Field(min_length=1)]


SearchRange = Annotated[Uniform | LogUniform | Integers | Choice, Field(discriminator="kind")]


class Tune(Section):
    algorithm: Literal["random", "grid", "tpe", "cma_es", "nsga2"] = "tpe"
    """What proposes values: Optuna's samplers, or every combination of a space of choices."""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "asha"
    """What ends trials early, by the metric that they report; `pbt` has them go on from better ones' weights, with
    changed values, as trials beyond `num_trials`."""
    objectives: list[str] = []
    """What is to be good at once: the task's metric or `loss` (of validation) first, then `seconds` (of training),
    `parameters`, `joules` (of training, estimated), `latency` (median seconds that the trained model takes for one
    row). Empty: the metric."""
    num_trials: PositiveInt = 4
    hours: PositiveFloat | None = None
    """After so many no trial starts, and those that run end at their next report; resumed searches count on."""
    gpu_hours: PositiveFloat | None = None
    """The same for the sum over GPUs."""
    kwh: PositiveFloat | None = None
    """The same for the energy that trials took, as estimated from `energy`."""
    max_concurrent: Count = 0
    """0: as many as fit."""
    workers_per_trial: PositiveInt = 1
    max_failures: Count = 2
    """How often a trial whose process dies goes on from its checkpoint."""
    storage: str = ""
    """The study's database, as SQLAlchemy writes it: postgresql://user@host/name. Empty: a SQLite file in the run's
    folder. Its password comes from PGPASSWORD or ~/.pgpass."""
    limit: PositiveInt | None = None
    """Training rows of a trial."""
    validation_limit: PositiveInt | None = None
    """Validation rows of its evaluations, of which a short trial may have more to do than of its steps."""
    epochs: PositiveFloat = 1.0
    reports: PositiveInt = 4
    """Evaluations of a full-length trial; ASHA may stop it at each."""
    space: dict[str, SearchRange] = {}
    """What is searched: recipe fields by dotted path. JSON."""

    @model_validator(mode="after")
    def _ranges(self) -> Tune:
        for path, spec in self.space.items():
            if not isinstance(spec, Choice) and not spec.low < spec.high:
                raise ValueError(f"the range of {path} is empty: low={spec.low} is not below high={spec.high}")
        self.in_order()
        no_password("tune.storage", self.storage, "PGPASSWORD or ~/.pgpass")
        return self

    def in_order(self) -> dict[str, SearchRange]:
        """The space, each range behind those that it depends on."""
        ordered: dict[str, SearchRange] = {}
        left = dict(self.space)
        while left:
            free = {path: spec for path, spec in left.items() if not set(spec.when) & set(left)}
            for path, spec in free.items():
                if strange := sorted(set(spec.when) - set(self.space)):
                    raise ValueError(f"{path} depends on {strange[0]}, which is not in the space")
            if not free:
                raise ValueError(f"{', '.join(sorted(left))} depend on each other in a circle")
            ordered |= free
            left = {path: spec for path, spec in left.items() if path not in free}
        return ordered
