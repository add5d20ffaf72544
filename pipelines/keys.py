"""`python -m pipelines.keys add|list|revoke …`: who may ask an endpoint (`deploy.keys_file`), and how often."""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipelines.answer import answer
from serve import keys

LIMITS = ("requests_per_minute", "burst", "tokens_per_minute")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="another key of a tenant, who may be new; it is shown this once")
    add.add_argument("--requests-per-minute", type=float, help="the tenant's limit; without it, there is none")
    add.add_argument("--burst", type=int, help="requests at once, after a rest; without it, a tenth of a minute's")
    add.add_argument("--tokens-per-minute", type=float, help="of completions and chats, prompts and answers together")
    revoke = commands.add_parser("revoke", help="strike out a tenant's keys")
    revoke.add_argument("--digest", default="", help="only the key whose digest begins so, as `list` shows it")
    listed = commands.add_parser("list", help="tenants, their limits and the first digits of their keys' digests")
    for command in (add, revoke):
        command.add_argument("name", help="of the tenant")
    for command in (add, revoke, listed):
        command.add_argument("--file", required=True, type=Path, help="what `deploy.keys_file` names")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, Any]:
    match options.command:
        case "add":
            limits = {name: getattr(options, name) for name in LIMITS}
            key = keys.add(options.file, options.name, **limits)
            return {"tenant": options.name, "key": key, "digest": keys.digest(key.encode())[: keys.SHOWN]}
        case "revoke":
            return {"tenant": options.name, "revoked": keys.revoke(options.file, options.name, options.digest)}
    tenants = {
        name: each.model_dump(exclude={"sha256"}) | {"digests": [whole[: keys.SHOWN] for whole in each.sha256]}
        for name, each in keys.read(str(options.file)).items()
    }
    return {"tenants": tenants}


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    sys.exit(answer("keys", lambda: run(given)))
