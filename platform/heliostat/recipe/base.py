"""What all sections of a recipe are made of, and its refusals."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Refused(ValueError):
    """Input that cannot be used. Raised before any cluster time is spent; jobs exit with code 2 on it."""

    def __init__(self, field: str, reason: str, suggestion: str = "") -> None:
        super().__init__(f"{field}: {reason}" + (f" ({suggestion})" if suggestion else ""))
        self.field, self.reason, self.suggestion = field, reason, suggestion

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.reason, self.suggestion)


def no_password(field: str, address: str, instead: str) -> None:
    """A recipe is written beside every run, and into tracking."""
    try:
        password = urlsplit(address).password
    except ValueError as error:
        raise Refused(field, f"it is no address: {error}") from None
    if password:
        raise Refused(field, "it holds a password, which would be written down with the recipe", f"use {instead}")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
