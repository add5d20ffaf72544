"""Two versions of a model behind one endpoint, for as long as it takes to decide between them.

The endpoint's application stays what clients reach. The router joins it before it gets a request and leaves it after
the last; the candidate is an application of its own that only the router reaches.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.serve._private.build_app import build_app
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError

from heliostat.recipe import Recipe
from heliostat.rollout.outcomes import Seen
from heliostat.rollout.schedule import Traffic
from serve.application import application, deploy
from serve.router import Router

ROUTER = "router"
HEARD_S = 2.0
"""Until every proxy has heard where requests go now, which takes HAProxy most of a second."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A bundle, and what answers call its version."""

    bundle: Path
    version: str


class Split:
    """The endpoint of a recipe's model, split between what serves and a candidate."""

    def __init__(self, recipe: Recipe, stable: Served, candidate: Served) -> None:
        """Raises Refused for a bundle that is not whole."""
        self.recipe, self.name, self.beside = recipe, recipe.name, f"{recipe.name}-candidate"
        self.stable, self.candidate, self.winner = stable, candidate, stable
        self.applications = {
            each: application(each.bundle, each.version, recipe.deploy) for each in (stable, candidate)
        }
        self.salt, self.routed, self.endpoint = uuid.uuid4().hex[:12], False, ""

    def begin(self) -> None:
        """Both versions run, and every request goes through the router to the stable one."""
        self.endpoint = deploy(self.stable.bundle, self.stable.version, self.recipe.deploy, self.name)
        serve.run(self.applications[self.candidate], name=self.beside, route_prefix=None, blocking=False)
        self._route(self.stable, through_router=False)  # so that the router is there when it is needed
        self.routed = True
        self._route(self.stable, through_router=True)

    def exchange(self, traffic: Traffic) -> list[Seen]:
        """Tell the routers the shares; returns what they saw since the last time. A router that has just died is
        replaced, and sends everything to the stable version until it is told: what it saw is lost."""
        answers = serve.get_deployment_handle(ROUTER, self.name).broadcast("exchange", traffic)
        try:
            found = answers.results(timeout_s=30, return_exceptions=True)
        except DeploymentUnavailableError:  # no router lives just now
            return []
        return [seen for each in found if isinstance(each, list) for seen in each]

    def end(self) -> None:
        """The winner is served as ever: in the stable version's place, while the candidate answers if it won."""
        if self.routed:
            self.exchange(Traffic(1.0 if self.winner is self.candidate else 0.0))
            self._route(self.winner, through_router=True)
            self.exchange(Traffic(0.0))
            self._route(self.winner, through_router=False)
            time.sleep(HEARD_S)
        deploy(self.winner.bundle, self.winner.version, self.recipe.deploy, self.name)
        serve.delete(self.beside)

    def _route(self, served: Served, through_router: bool) -> None:
        """The application of one version and the router, entered by one or the other. Ray Serve takes the deployment at
        the end of a chain for the way in, and offers no other; it has replicas running before a request comes only
        where they are not the way in yet."""
        stable = self.applications[served]
        inner = stable._bound_deployment.name
        router = serve.deployment(Router).options(  # type: ignore[attr-defined]  # Ray means a Deployment
            name=ROUTER,
            version=self.salt,  # the same: what runs goes on
            _internal=True,
            num_replicas=self.recipe.rollout.num_routers,
            max_ongoing_requests=1000,
            ray_actor_options={"num_cpus": 0.1},
        )
        built = build_app(
            router.bind(stable, (inner, self.beside), self.salt, self.recipe.model_dump_json()),
            name=self.name,
            route_prefix="/",
            default_runtime_env=ray.get_runtime_context().runtime_env,
        )
        entered = ROUTER if through_router else inner
        client = _get_global_client()
        assert client is not None
        client.deploy_applications([dataclasses.replace(built, ingress_deployment_name=entered)])


@contextmanager
def split(recipe: Recipe, stable: Served, candidate: Served) -> Iterator[Split]:
    """Both versions for the time of the block. Behind it serves the one that was set as `winner`: the stable one, also
    where the block was left by an error."""
    found = Split(recipe, stable, candidate)
    try:
        found.begin()
        yield found
    except BaseException:
        found.winner = stable
        raise
    finally:
        found.end()
