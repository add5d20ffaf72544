"""Which share of the cluster each tenant has, and which it deserves."""

from __future__ import annotations

import math
from collections.abc import Mapping

from heliostat.scheduling.room import EPSILON
from heliostat.scheduling.state import Shape, State, Tenant


class Shares:
    """Dominant shares (Ghodsi et al. 2011, "Dominant Resource Fairness"): of whichever resource of the cluster a worker
    takes the largest part."""

    def __init__(self, state: State) -> None:
        self.cpus = max(sum(node.cpus for node in state.nodes), 1e-9)
        self.gpus = max(sum(node.gpus for node in state.nodes), 1e-9)
        self.tenants = state.tenants
        self.used: dict[str, float] = {}
        self.used_cpus: dict[str, float] = {}
        self.used_gpus: dict[str, float] = {}
        wanted: dict[str, float] = {}
        for job in state.jobs:
            self.add(job.tenant, job.shape, sum(job.after.values()))
            wanted[job.tenant] = wanted.get(job.tenant, 0.0) + job.workers * self.of(job.shape)
        limits = {name: min(want, self._limit(name)) for name, want in wanted.items()}
        self.deserved = deserved(limits, {name: self.tenant(name).weight for name in wanted})

    def tenant(self, name: str) -> Tenant:
        return self.tenants.get(name) or Tenant()

    def of(self, shape: Shape) -> float:
        """One worker's."""
        return max(shape.cpus / self.cpus, shape.gpus / self.gpus)

    def add(self, tenant: str, shape: Shape, workers: int) -> None:
        self.used[tenant] = self.used.get(tenant, 0.0) + workers * self.of(shape)
        self.used_cpus[tenant] = self.used_cpus.get(tenant, 0.0) + workers * shape.cpus
        self.used_gpus[tenant] = self.used_gpus.get(tenant, 0.0) + workers * shape.gpus

    def by_weight(self, tenant: str) -> float:
        """What the tenant has, for its weight: who has least is next."""
        return self.used.get(tenant, 0.0) / self.tenant(tenant).weight

    def quota(self, name: str) -> tuple[float, float]:
        """CPUs and GPUs that the tenant may still have."""
        tenant = self.tenant(name)
        cpus = math.inf if tenant.max_cpus is None else tenant.max_cpus - self.used_cpus.get(name, 0.0)
        gpus = math.inf if tenant.max_gpus is None else tenant.max_gpus - self.used_gpus.get(name, 0.0)
        return cpus + EPSILON, gpus + EPSILON

    def quota_left(self, name: str, shape: Shape) -> float:
        """How many more workers the tenant may have."""
        cpus, gpus = self.quota(name)
        return min(cpus / shape.cpus, gpus / shape.gpus if shape.gpus else math.inf)

    def _limit(self, name: str) -> float:
        tenant = self.tenant(name)
        limits = ((tenant.max_cpus, self.cpus), (tenant.max_gpus, self.gpus))
        return min([1.0, *(limit / of for limit, of in limits if limit is not None and of > 1e-6)])


def deserved(wanted: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Weighted max-min fair shares of 1: nobody gets more than it wants; what it leaves is the others', by weight."""
    shares, left = dict.fromkeys(wanted, 0.0), 1.0
    hungry = sorted(wanted, key=lambda name: wanted[name] / weights[name])
    weight = sum(weights[name] for name in hungry)
    for name in hungry:
        shares[name] = min(wanted[name], left * weights[name] / weight) if weight > 0 else 0.0
        left = max(0.0, left - shares[name])
        weight -= weights[name]
    return shares
