"""Where workers fit. A gang is placed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable

from heliostat.scheduling.state import Node, Placement, Shape

EPSILON = 1e-6
"""Fractions of a CPU add up to less than they should."""


class Room:
    """What is free on each node."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        nodes = list(nodes)
        self.names = [node.name for node in nodes]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.cpus = [node.cpus for node in nodes]
        self.gpus = [node.gpus for node in nodes]
        self.free_cpus, self.free_gpus = sum(self.cpus), sum(self.gpus)
        self.fits: dict[Shape, list[int]] = {}
        """How many groups fit on each node, for shapes that were asked for."""

    def copy(self) -> Room:
        twin = object.__new__(Room)
        twin.names, twin.index = self.names, self.index
        twin.cpus, twin.gpus = list(self.cpus), list(self.gpus)
        twin.free_cpus, twin.free_gpus = self.free_cpus, self.free_gpus
        twin.fits = {shape: list(fit) for shape, fit in self.fits.items()}
        return twin

    def both(self, other: Room) -> Room:
        """What is free here and there."""
        twin = self.copy()
        twin.cpus = list(map(min, self.cpus, other.cpus))
        twin.gpus = list(map(min, self.gpus, other.gpus))
        twin.free_cpus, twin.free_gpus = sum(twin.cpus), sum(twin.gpus)
        twin.fits = {}
        return twin

    def take(self, placement: Placement, shape: Shape, times: int = 1) -> None:
        """Nodes that are gone are passed over. `times=-1` gives back."""
        for name, workers in placement.items():
            i = self.index.get(name)
            if i is not None:
                cpus, gpus = times * workers * shape.cpus, times * workers * shape.gpus
                self.cpus[i] -= cpus
                self.gpus[i] -= gpus
                self.free_cpus -= cpus
                self.free_gpus -= gpus
                for of, fit in self.fits.items():
                    fit[i] = self._fit(of, i)

    def give(self, placement: Placement, shape: Shape) -> None:
        self.take(placement, shape, -1)

    def groups(self, shape: Shape) -> list[int]:
        """How many groups fit on each node; not to be changed."""
        if shape not in self.fits:
            self.fits[shape] = [self._fit(shape, i) for i in range(len(self.names))]
        return self.fits[shape]

    def _fit(self, shape: Shape, i: int) -> int:
        fit = (self.cpus[i] + EPSILON) / (shape.group * shape.cpus)
        if shape.gpus:
            fit = min(fit, (self.gpus[i] + EPSILON) / (shape.group * shape.gpus))
        return max(0, int(fit))

    def cannot_hold(self, shape: Shape, workers: int) -> bool:
        """Whether all of what is free is too little; False does not say that it fits."""
        return workers * shape.cpus > self.free_cpus + EPSILON * len(
            self.names
        ) or workers * shape.gpus > self.free_gpus + EPSILON * len(self.names)

    def place(self, shape: Shape, workers: int, near: Placement | None = None) -> dict[str, int] | None:
        """`workers` (a multiple of the group) on few nodes, the smallest that do first; None where they do not fit.
        `near`: nodes to be used before others. Takes nothing."""
        if self.cannot_hold(shape, workers):
            return None
        fit, left = list(self.groups(shape)), workers // shape.group
        if sum(fit) < left:
            return None
        found: dict[str, int] = {}
        for name in sorted(near or {}):
            if (i := self.index.get(name)) is not None and left and fit[i]:
                used = min(left, fit[i])
                found[name] = used * shape.group
                left -= used
                fit[i] = 0
        if left and max(fit) < left:  # the roomiest nodes whole, so that the gang is on as few as can be
            for i in sorted(range(len(fit)), key=lambda i: -fit[i]):
                if fit[i] >= left:
                    break
                found[self.names[i]] = fit[i] * shape.group
                left -= fit[i]
                fit[i] = 0
        if left:
            smallest = min(groups for groups in fit if groups >= left)
            best = fit.index(smallest)
            found[self.names[best]] = left * shape.group
        return found

    def most(self, shape: Shape, workers: int) -> int:
        """How many of `workers` would fit, in whole groups."""
        return min(workers // shape.group, sum(self.groups(shape))) * shape.group
