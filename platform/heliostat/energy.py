"""How much energy work takes: an estimate from the time that processors and GPUs were busy and the watts declared for
them, after Lannelongue, Grealey & Inouye 2021, Green Algorithms (doi:10.1002/advs.202100707), without memory and what
cools the machine. No counter is read."""

from __future__ import annotations

from heliostat.recipe import Energy

ESTIMATED = "estimated"
"""How these joules are known: what a result that holds some says of them."""
JOULES_PER_KWH = 3.6e6


def joules(energy: Energy, cpu_s: float, gpu_s: float) -> float:
    """`cpu_s`: seconds of processor time, over all threads and processes; `gpu_s`: seconds that GPUs were held, over
    all of them."""
    return energy.cpu_watts * cpu_s + energy.gpu_watts * gpu_s
