"""`python -m tests.cluster.clients FILE HOST ...`: clients who ask the endpoint on each of the hosts one request after
the other, and never again for one that failed, until there is no FILE any more. A line each second, and the last, says
how often which replica answered through which host, and what was lost."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

import httpx

EACH = 2
"""Clients of a host."""
QUESTION = {"inputs": [{"text": "sun salt mirror"}, {"text": "cloud noon shade"}]}


async def ask(host: str, until: Path, answers: Counter[str], lost: list[str]) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        while until.exists():
            try:
                answer = await client.post(f"http://{host}:8000/predict", json=QUESTION)
                answer.raise_for_status()
                answers[f"{host} {answer.headers['x-replica']}"] += 1
            except httpx.HTTPError as error:
                lost.append(f"{host} {error!r}")


async def tell(answers: Counter[str], lost: list[str]) -> None:
    while True:
        print(json.dumps({"answers": answers, "lost": lost}), flush=True)
        await asyncio.sleep(1)


async def main(until: Path, hosts: list[str]) -> None:
    answers, lost = Counter[str](), list[str]()
    telling = asyncio.create_task(tell(answers, lost))
    await asyncio.gather(*(ask(host, until, answers, lost) for host in hosts * EACH))
    telling.cancel()
    print(json.dumps({"answers": answers, "lost": lost}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
