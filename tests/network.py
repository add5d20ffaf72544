"""Whether network policies let one talk to another, as Kubernetes defines them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A pod, or an address outside the cluster."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def may_talk(objects: list[Object], source: Peer, target: Peer, port: int) -> bool:
    """A connection needs leave at both of its ends; a pod that no policy of a direction selects has it."""
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    return _leave(policies, source, target, port, "egress", "to") and _leave(
        policies, target, source, port, "ingress", "from"
    )


def _leave(policies: list[Object], one: Peer, other: Peer, port: int, direction: str, end: str) -> bool:
    of_it = [
        each
        for each in policies
        if not one.address
        and each["metadata"]["namespace"] == one.namespace
        and direction.capitalize() in each["spec"]["policyTypes"]
        and _selects(each["spec"]["podSelector"], one.labels)
    ]
    return not of_it or any(
        (end not in rule or any(_matches(peer, other, policy) for peer in rule[end]))
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for policy in of_it
        for rule in policy["spec"].get(direction, [])
    )


def _matches(peer: Object, other: Peer, policy: Object) -> bool:
    if "ipBlock" in peer:
        # That of a pod is not known here: whether a block takes pods in depends on the cluster.
        return bool(other.address) and _within(peer["ipBlock"], ipaddress.ip_address(other.address))
    if other.address:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        if not _selects(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != policy["metadata"]["namespace"]:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _within(block: Object, address: Any) -> bool:
    return address in ipaddress.ip_network(block["cidr"]) and not any(
        address in ipaddress.ip_network(part) for part in block.get("except", [])
    )


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return wanted.items() <= labels.items() and all(labels.get(each["key"]) in each["values"] for each in expressions)
