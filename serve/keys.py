"""Tenants, and the keys by which they are known.

A key is 256 random bits, so that its SHA-256 tells nothing about it and no slow hash is needed, as for a password that
somebody could guess. Only digests are stored. Needs neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from heliostat.recipe import Refused, Section

PREFIX = "hs-"
"""Of every key, so that scanners for secrets find one that has gone astray."""
ENVIRONMENT = "env:"
"""What a source begins with that names an environment variable."""
SHOWN = 8
"""Digits of a digest by which people tell keys apart."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Tenant(Section):
    sha256: Annotated[list[Digest], Field(min_length=1)]
    """Of the tenant's keys. Two of them while one takes the other's place."""
    requests_per_minute: PositiveFloat | None = None
    """None: as many as the endpoint can answer."""
    burst: PositiveInt | None = None
    """Requests at once, after a rest. None: a tenth of a minute's."""
    tokens_per_minute: PositiveFloat | None = None
    """Of completions and chats, prompts and answers together. A minute's may be used at once, after a rest."""


Tenants = dict[Name, Tenant]
_TENANTS: TypeAdapter[Tenants] = TypeAdapter(Tenants)


def read(source: str) -> Tenants:
    """The tenants of a file, or of the environment variable NAME where `source` is `env:NAME`. Raises Refused for what
    cannot be read."""
    if source.startswith(ENVIRONMENT):
        name = source.removeprefix(ENVIRONMENT)
        if name not in os.environ:
            raise Refused("deploy.keys_file", f"there is no environment variable {name}", "set it on every node")
        return _parse(os.environ[name], source)
    try:
        return _parse(Path(source).expanduser().read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise Refused(
            "deploy.keys_file", f"cannot read {source}: {why}", "python -m pipelines.keys add NAME --file FILE"
        ) from error


def check(source: str) -> None:
    """Raise Refused for what replicas could not read. Empty: there are no keys."""
    if source:
        if not source.startswith(ENVIRONMENT) and not Path(source).expanduser().is_absolute():
            raise Refused("deploy.keys_file", f"{source} means another file on every node", "name it from / or ~")
        read(source)


def _parse(text: str, source: str) -> Tenants:
    try:
        return _TENANTS.validate_json(text)
    except ValidationError as error:
        # Not the input: who took a key for its digest must not find it in a log.
        first = error.errors(include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refused("deploy.keys_file", f"{source}: {where + ': ' if where else ''}{first['msg']}") from None


def add(path: Path, name: str, **limits: float | None) -> str:
    """A new key of a tenant, who may be new too; beside it the tenant's others go on working. `limits` that are not
    None take the place of the tenant's. Raises Refused for a name, a limit or a file that cannot be used."""
    key = PREFIX + secrets.token_urlsafe(32)
    with _changing(path) as tenants:
        known = tenants[name].model_dump() if name in tenants else {"sha256": []}
        known |= {limit: value for limit, value in limits.items() if value is not None}
        known["sha256"] = [*known["sha256"], digest(key.encode())]
        tenants |= _parse(json.dumps({name: known}), str(path))
    return key


def revoke(path: Path, name: str, shown: str = "") -> int:
    """Strike out a tenant's keys, or the one whose digest begins with `shown`; returns how many. Raises Refused where
    there is none."""
    with _changing(path) as tenants:
        if name not in tenants:
            raise Refused("name", f"there is no tenant {name!r}", f"there are: {', '.join(tenants) or 'none'}")
        tenant = tenants.pop(name)
        kept = [each for each in tenant.sha256 if not each.startswith(shown)]
        if kept == tenant.sha256:
            digests = ", ".join(each[:SHOWN] for each in tenant.sha256)
            raise Refused("digest", f"no key of {name} begins with {shown}", f"there are: {digests}")
        if kept:
            tenants[name] = tenant.model_copy(update={"sha256": kept})
    return len(tenant.sha256) - len(kept)


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def whose(tenants: Tenants, key: bytes) -> str | None:
    """The tenant whose key it is, in a time that does not depend on which."""
    given, found = digest(key), None
    for name, tenant in tenants.items():
        for each in tenant.sha256:
            if hmac.compare_digest(each, given):
                found = name
    return found


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Tenants]:
    """The tenants of a file (none where there is no file), written again at the end of the block. One at a time: a key
    that somebody was given must not be lost to another's."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tenants = read(str(path)) if path.exists() else {}
        yield tenants
        text = json.dumps({name: each.model_dump(exclude_none=True) for name, each in tenants.items()}, indent=2)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        # Replicas read it on every node, as the same user.
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(text + "\n")
        os.replace(beside, path)
