"""The nodes that a cluster file may start."""

from __future__ import annotations

from dataclasses import dataclass

from heliostat.doctor.document import Document
from heliostat.doctor.instances import INSTANCES, PRICED_REGIONS, Instance
from heliostat.placement import Node


@dataclass(frozen=True)
class NodeType:
    name: str
    instance_type: str
    """The cloud's name; empty where the file has none."""
    min_count: int
    max_count: int
    """Of these at once, the head included where it is of this type."""
    resources: dict[str, float]
    is_head: bool

    @property
    def instance(self) -> Instance | None:
        return INSTANCES.get(self.instance_type)

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))

    @property
    def node(self) -> Node:
        return Node(self.resources.get("CPU", 0), self.gpus)


@dataclass(frozen=True)
class Cluster:
    file: str
    types: list[NodeType]
    max_workers: int
    region: str
    head_ports: dict[str, int]
    """What listens on the head, by the flag that says where."""

    def largest(self) -> list[tuple[NodeType, int]]:
        """Each type with the most nodes of it at once, were the cluster of nothing else."""
        return [(each, min(each.max_count, self.max_workers + each.is_head)) for each in self.types]

    def usd_per_hour(self) -> dict[str, float] | None:
        """On demand, with as few nodes as it ever has and with as many; None where a price is not known."""
        priced = [(each, each.instance.usd_per_hour if each.instance else None) for each in self.types]
        if self.region not in PRICED_REGIONS or not priced:
            return None
        known = {each.name: price for each, price in priced if price is not None}
        if len(known) < len(priced):
            return None
        idle = sum(known[each.name] * each.min_count for each in self.types)
        most, left = sum(known[each.name] for each in self.types if each.is_head), self.max_workers
        for each in sorted(self.types, key=lambda each: -known[each.name]):
            count = min(left, each.max_count - each.is_head)
            most, left = most + count * known[each.name], left - count
        return {"idle": round(idle, 4), "most": round(most, 4)}


def node_types(document: Document) -> list[NodeType]:
    """Of a file that its schema accepts."""
    head = document.get("head_node_type")
    limit = document.get("max_workers")
    found = []
    for name, body in (document.get("available_node_types") or {}).items():
        config = body["node_config"]
        instance_type = str(config.get("InstanceType") or config.get("machineType") or "")
        instance = INSTANCES.get(instance_type)
        # What the file leaves out, Ray takes from the instance's type.
        resources = {"CPU": instance.cpus, "GPU": instance.gpus} if instance else {}
        is_head = name == head
        most = body.get("max_workers", 0 if is_head else (2 if limit is None else limit))
        found.append(
            NodeType(
                name,
                instance_type,
                min_count=body.get("min_workers", 0) + is_head,
                max_count=most + is_head,
                resources=resources | body["resources"],
                is_head=is_head,
            )
        )
    return found
