"""`python -m tests.cluster.clients FILE HOST ...`: clients who ask the endpoint on each of the hosts one request after
the other, and never again for one that failed, until there is no FILE any more. A line each second, and the last, says
how often which replica answered through which host, what was lost, and of how many answers only the head came."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

EACH = 2
"""Clients of a host."""
QUESTION = {"inputs": [{"text": "sun salt mirror"}, {"text": "cloud noon shade"}]}


@dataclass
class Seen:
    answers: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    broken_off: int = 0

    def tell(self) -> None:
        print(json.dumps(vars(self)), flush=True)


async def ask(host: str, until: Path, seen: Seen) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        while until.exists():
            begun = False
            try:
                async with client.stream("POST", f"http://{host}:8000/predict", json=QUESTION) as answer:
                    answer.raise_for_status()
                    begun = True
                    await answer.aread()
                seen.answers[f"{host} {answer.headers['x-replica']}"] += 1
            except httpx.HTTPError as error:
                if begun:
                    seen.broken_off += 1
                else:
                    seen.lost.append(f"{host} {error!r}")


async def main(until: Path, hosts: list[str]) -> None:
    seen = Seen()
    asking = asyncio.gather(*(ask(host, until, seen) for host in hosts * EACH))
    while not asking.done():
        seen.tell()
        await asyncio.wait([asking], timeout=1)
    seen.tell()
    asking.result()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
