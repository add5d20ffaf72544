"""`/predict` by a form, as `curl -F image=@cat.png` sends it: each part is an input of its own."""

import base64
import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.gate import path_of, refusal

PATH = "/predict"
OPENAPI = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "description": "Each part is an input: a file as it is, or a text. Parts may have the same name.",
                    "additionalProperties": {"type": "string"},
                    "minProperties": 1,
                }
            }
        }
    }
}
"""What the description of a route says beside its body in JSON."""


class Forms:
    """Makes the inputs of a form those of a question in JSON, files in base64, so that all else knows only that."""

    def __init__(self, app: Any, max_inputs: int, max_body_bytes: int) -> None:
        self.app = app
        self.limits = {"max_files": max_inputs, "max_fields": max_inputs, "max_part_size": max_body_bytes}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(PATH) or not _is_form(scope["headers"]):
            await self.app(scope, receive, send)
            return
        try:
            async with Request(scope, receive).form(**self.limits) as form:
                inputs = [{name: await _text(value)} for name, value in form.multi_items()]
        except HTTPException as error:  # of a body that is no form, too long or too late
            await refusal(path_of(scope), error.status_code, error.detail, **error.headers or {})(scope, receive, send)
            return
        body = json.dumps({"inputs": inputs}).encode()
        question = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> dict[str, Any]:
            return question.pop() if question else await receive()

        kept = [each for each in scope["headers"] if each[0] not in (b"content-type", b"content-length")]
        own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.app({**scope, "headers": kept + own}, received, send)


def _is_form(headers: list[tuple[bytes, bytes]]) -> bool:
    return dict(headers).get(b"content-type", b"").lower().startswith(b"multipart/form-data")


async def _text(value: UploadFile | str) -> str:
    return value if isinstance(value, str) else base64.b64encode(await value.read()).decode()
