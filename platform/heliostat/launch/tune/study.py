"""The study: Optuna's record of a search in a database, which outlives the driver, and what decides over trials.

Optuna's own storage asks the database several times for each value of each trial. Here a twin in memory is asked, and
the database is told: once of a trial that begins, of each report, and of its end.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from heliostat.energy import JOULES_PER_KWH
from heliostat.launch.tune import STUDY_FILE
from heliostat.launch.tune.population import explored, source
from heliostat.launch.tune.runner import DONE, FAILED, INFEASIBLE, PRUNED, Origin
from heliostat.launch.tune.space import draw, grid
from heliostat.recipe import Refused, Tune

SAID = "heliostat"
"""The attribute of a trial that holds how it ended: state, figures, reason."""
ORIGIN = "heliostat.origin"
"""The attribute of a trial that holds whose weights it began with, and at which report."""
RUNNING = "running"
"""How one is listed that has not ended."""
STATES = {
    DONE: TrialState.COMPLETE,
    PRUNED: TrialState.PRUNED,
    INFEASIBLE: TrialState.FAIL,
    FAILED: TrialState.FAIL,
}


class Study:
    def __init__(
        self, tune: Tune, objectives: dict[str, bool], seed: int, name: str, folder: Path, resume: bool = False
    ) -> None:
        """`objectives`: each with whether more is better. `resume`: go on with the study of this name. Refuses one of
        another space, or one that is not there."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.tune, self.objectives = tune, objectives
        self.space = tune.in_order()
        self.combinations = grid(self.space) if tune.algorithm == "grid" else None
        self.number = min(tune.num_trials, len(self.combinations)) if self.combinations else tune.num_trials
        direction = optuna.study.StudyDirection
        directions = [direction.MAXIMIZE if more else direction.MINIMIZE for more in objectives.values()]
        self.memory = optuna.create_study(
            storage=(storage := optuna.storages.InMemoryStorage()),
            sampler=_sampler(tune, seed),
            pruner=_pruner(tune),
            study_name=name,
            directions=directions,
        )
        self._memory = storage
        self._memory_id = storage.get_study_id_from_name(name)
        self.disk = _database(tune, folder)
        said = {"space": json.loads(tune.model_dump_json())["space"], "objectives": objectives}
        try:
            if resume:
                self._disk_id = self.disk.get_study_id_from_name(name)
                self._check(said)
            else:
                self._disk_id = self.disk.create_new_study(directions, name)
                for key, value in said.items():
                    self.disk.set_study_user_attr(self._disk_id, key, value)
        except KeyError:
            raise Refused("resume", f"the study's database holds none of the name {name}", "start it anew") from None
        except optuna.exceptions.DuplicatedStudyError:
            raise Refused(
                "tune.storage", f"it already holds a study {name}", "go on with it by --resume, or choose --run-name"
            ) from None
        self.begun_s = time.time()
        attributes = self.disk.get_study_user_attrs(self._disk_id)
        self._earlier_s, self.gpu_s = attributes.get("seconds", 0.0), attributes.get("gpu_seconds", 0.0)
        self.joules = attributes.get("joules", 0.0)
        """That trials have taken, as they reported them."""
        self._noted = self.begun_s
        self.founded = 0
        """Trials that began with weights of their own."""
        self._draw = random.Random(seed)
        self._sources: dict[int, Origin] = {}
        """From which trial one that was ended is to be gone on."""
        self._ids: dict[int, int] = {}
        self._open: dict[int, Trial] = {}
        for frozen in sorted(self.disk.get_all_trials(self._disk_id), key=lambda trial: trial.number):
            self._ids[frozen.number] = frozen._trial_id
            self.founded += ORIGIN not in frozen.user_attrs
            mine = self._memory.create_new_trial(self._memory_id, template_trial=frozen)
            if not frozen.state.is_finished():
                self._open[frozen.number] = Trial(self.memory, mine)

    def _check(self, said: dict[str, Any]) -> None:
        found = self.disk.get_study_user_attrs(self._disk_id)
        for key, value in said.items():
            if found.get(key) != value:
                raise Refused(
                    f"tune.{key}", f"the study was begun with {json.dumps(found.get(key))}", "leave it, or search anew"
                )

    @property
    def interrupted(self) -> dict[int, dict[str, Any]]:
        """Trials that have begun and not ended, by number, with their values."""
        return {number: dict(trial.params) for number, trial in self._open.items()}

    @property
    def begun(self) -> int:
        return len(self._ids)

    @property
    def ended(self) -> int:
        return len(self._ids) - len(self._open)

    @property
    def seconds(self) -> float:
        """That the search has taken, earlier sessions of it included."""
        return self._earlier_s + time.time() - self.begun_s

    def spent(self) -> str:
        """The budget that is used up, or nothing."""
        tune = self.tune
        if tune.hours is not None and self.seconds >= tune.hours * 3600:
            return f"tune.hours={tune.hours:g}"
        if tune.gpu_hours is not None and self.gpu_s >= tune.gpu_hours * 3600:
            return f"tune.gpu_hours={tune.gpu_hours:g}"
        if tune.kwh is not None and self.joules >= tune.kwh * JOULES_PER_KWH:
            return f"tune.kwh={tune.kwh:g}"
        return ""

    @property
    def whole(self) -> str:
        """What ends a search of which no other budget is spent."""
        every = self.combinations is not None and self.number == len(self.combinations)
        return f"tune.space, {self.number} combinations" if every else f"tune.num_trials={self.number}"

    def ask(self) -> tuple[int, dict[str, Any]]:
        """The next trial's number and values."""
        if self.combinations is not None:
            self.memory.enqueue_trial(self.combinations[self.begun])
        self.founded += 1
        return self._begin()

    def succeed(self, number: int) -> tuple[int, dict[str, Any], Origin] | None:
        """A trial that takes the place of `number` where pbt has ended it: its number, its values, and from where it
        goes on."""
        if (origin := self._sources.pop(number, None)) is None:
            return None
        near = explored(self._trial(origin.trial).params, self.space, self._draw)
        self.memory.enqueue_trial(near, user_attrs={ORIGIN: list(origin)})
        return *self._begin(), origin

    def origin(self, number: int) -> Origin | None:
        found = self._trial(number).user_attrs.get(ORIGIN)
        return None if found is None else Origin(*found)

    def _trial(self, number: int) -> optuna.trial.FrozenTrial:
        return self._memory.get_trial(self._memory.get_trial_id_from_study_id_trial_number(self._memory_id, number))

    def _begin(self) -> tuple[int, dict[str, Any]]:
        trial = self.memory.ask()
        values = draw(trial, self.space)
        frozen = self._memory.get_trial(trial._trial_id)
        self._ids[trial.number] = self.disk.create_new_trial(self._disk_id, template_trial=frozen)
        self._open[trial.number] = trial
        return trial.number, values

    def report(self, number: int, at: int, figures: dict[str, float]) -> bool:
        """Take a trial's figures; whether it is to go on. A report that it had made before it died decides nothing."""
        trial = self._open[number]
        value = figures[next(iter(self.objectives))]
        if at in self._trial(number).intermediate_values:
            return True
        self.disk.set_trial_intermediate_value(self._ids[number], at, value)
        if len(self.objectives) > 1:  # Optuna judges by one value only
            self._memory.set_trial_intermediate_value(trial._trial_id, at, value)
            return True
        trial.report(value, at)
        if self.tune.scheduler == "pbt":
            return not self._falls_behind(number, at)
        return not trial.should_prune()

    def _falls_behind(self, number: int, at: int) -> bool:
        if at == 1 or at == self.tune.reports:  # the others have no checkpoint for certain; it has ended anyway
            return False
        population = {
            trial.number: trial.intermediate_values[at]
            for trial in self.memory.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
            if at in trial.intermediate_values
        }
        found = source(population, number, next(iter(self.objectives.values())), self._draw)
        if found is not None:
            self._sources[number] = Origin(found, at)
        return found is not None

    def tell(self, number: int, state: str, figures: dict[str, float], reason: str = "") -> None:
        """A trial has ended. `figures`: its last, with every objective where it is done."""
        trial = self._open.pop(number)
        values = [float(figures[name]) for name in self.objectives] if state == DONE else None
        said = {"state": state, "figures": figures, "reason": reason or None}
        for storage, identity in ((self._memory, trial._trial_id), (self.disk, self._ids[number])):
            storage.set_trial_user_attr(identity, SAID, said)
        # Of one that was pruned, Optuna takes the last report for its value.
        told = self.memory.tell(trial, values, STATES[state])
        self.disk.set_trial_state_values(self._ids[number], STATES[state], told.values)
        if time.time() - self._noted > 1:
            self.note()

    def note(self) -> None:
        """Write down what was spent."""
        self._noted = time.time()
        self.disk.set_study_user_attr(self._disk_id, "seconds", self.seconds)
        self.disk.set_study_user_attr(self._disk_id, "gpu_seconds", self.gpu_s)
        self.disk.set_study_user_attr(self._disk_id, "joules", self.joules)

    def rows(self) -> list[dict[str, Any]]:
        """Trials that have ended, the best first, by the first objective; those without a value last. `pareto` says of
        those that are done whether no other is at least as good in all objectives and better in one."""
        trials = [trial for trial in self.memory.get_trials(deepcopy=False) if trial.state.is_finished()]
        any_done = any(trial.state == TrialState.COMPLETE for trial in trials)
        best = {trial.number for trial in self.memory.best_trials} if any_done else set[int]()
        rows = [self._row(trial) | {"pareto": trial.number in best} for trial in trials]
        return ranked(rows, self.objectives)

    def running(self) -> list[dict[str, Any]]:
        """Trials that have begun and not ended, as those are listed that have: with their last report for a value."""
        return [self.row(number) for number in self._open]

    def row(self, number: int) -> dict[str, Any]:
        """One as it is listed, but for `pareto`."""
        return self._row(self._trial(number))

    def _row(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        curve = dict(trial.intermediate_values)
        last = {next(iter(self.objectives)): curve[max(curve)]} if curve else {}
        said = trial.user_attrs.get(SAID, {"state": RUNNING, "figures": last, "reason": None})
        known = said["figures"] if said["state"] in (DONE, PRUNED, RUNNING) else {}
        return {
            "number": trial.number,
            "values": dict(trial.params),
            "state": said["state"],
            **{name: known.get(name) for name in self.objectives},
            "evaluations": len(curve),
            "curve": curve,
            "error": said["reason"],
        }


def ranked(rows: list[dict[str, Any]], objectives: dict[str, bool]) -> list[dict[str, Any]]:
    """Best first, by the first objective; failed ones last."""
    name, more = next(iter(objectives.items()))
    sign = -1 if more else 1
    return sorted(rows, key=lambda row: (row[name] is None, sign * (row[name] or 0.0)))


def _sampler(tune: Tune, seed: int) -> optuna.samplers.BaseSampler:
    samplers = optuna.samplers
    if tune.algorithm == "tpe":
        return samplers.TPESampler(seed=seed)
    if tune.algorithm == "cma_es":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if tune.algorithm == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    return samplers.RandomSampler(seed=seed)  # and a grid, which leaves nothing to draw


def _pruner(tune: Tune) -> optuna.pruners.BasePruner:
    pruners = optuna.pruners
    if tune.scheduler == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4)
    if tune.scheduler == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=tune.reports, reduction_factor=3)
    if tune.scheduler == "median":
        return pruners.MedianPruner()
    return pruners.NopPruner()


def _database(tune: Tune, folder: Path) -> optuna.storages.RDBStorage:
    import sqlalchemy

    given = tune.storage or f"sqlite:///{folder / STUDY_FILE}"
    try:
        url = sqlalchemy.engine.make_url(given)
    except sqlalchemy.exc.ArgumentError:
        raise Refused(
            "tune.storage", "it is no address of a database", "postgresql://user:password@host/name"
        ) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")  # the driver that is installed here
    try:
        storage = optuna.storages.RDBStorage(url.render_as_string())
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Refused("tune.storage", f"{url.render_as_string()} cannot be opened: {reason}", "start it") from error
    if url.drivername.startswith("sqlite"):

        @sqlalchemy.event.listens_for(storage.engine, "connect")
        def _(connection: Any, _record: Any) -> None:
            # What a killed driver wrote is there; what a machine that lost its power wrote last may not be.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        storage.engine.dispose()
    return storage
