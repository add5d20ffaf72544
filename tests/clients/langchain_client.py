"""LangChain's ChatOpenAI: `python langchain_client.py URL MODEL` prints one JSON object of what it got."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

SCHEMA: dict[str, Any] = {
    "title": "week",
    "type": "object",
    "properties": {"days": {"enum": [5, 7]}},
    "required": ["days"],
    "additionalProperties": False,
}
QUESTION = "How many days has a week?"


async def several(chat: ChatOpenAI) -> list[str]:
    return [str(found.content) for found in await chat.abatch([QUESTION, QUESTION])]


def main(url: str, model: str) -> None:
    options: Any = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(max_tokens=16, **options)
    whole = chat.invoke(QUESTION)
    print(
        json.dumps(
            {
                "chat": whole.content,
                "usage": whole.usage_metadata,
                "streamed": "".join(str(chunk.content) for chunk in chat.stream(QUESTION)),
                "several": asyncio.run(several(chat)),
                "json": chat.with_structured_output(SCHEMA, method="json_schema").invoke(QUESTION),
                "completion": OpenAI(max_tokens=16, **options).invoke("The sea is"),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
