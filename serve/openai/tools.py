"""Calls of tools, in the form that chat templates of the Hermes and Qwen kind ask for:
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json
import uuid
from typing import Any

from heliostat.generate.drawing import ONE_LINE

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def template_takes_tools(template: str) -> bool:
    return "tools" in template and OPEN in template


def grammar(tools: list[dict[str, Any]], vocabulary: dict[str, int]) -> str:
    """One call of one of the tools, in llguidance's Lark. Where the tags are tokens of the vocabulary, these are
    written, by their numbers."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    first, last = (f"<[{vocabulary[tag]}]>" if tag in vocabulary else json.dumps(tag) for tag in (OPEN, CLOSE))
    schema = json.dumps({"anyOf": calls, "x-guidance": ONE_LINE}, ensure_ascii=False)
    return f'start: {first} "\\n" call "\\n" {last}\ncall: %json {schema}\n'


class ToolCalls:
    """Parts an answer's text, as it comes, into what is said and what is called. What is no call after all is said."""

    def __init__(self) -> None:
        self._held = ""
        self.made: list[dict[str, Any]] = []

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(text to show, calls that have become whole)."""
        self._held += text
        said, made = "", []
        while True:
            before, found, after = self._held.partition(OPEN)
            if not found:
                keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
                said += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            body, closed, rest = after.partition(CLOSE)
            if not closed:
                said, self._held = said + before, found + after
                break
            call = _call(body, len(self.made))
            if call is None:
                said += before + found + body + closed
            else:
                said += before
                made.append(call)
                self.made.append(call)
            self._held = rest
        if self.made and not said.strip():
            said = ""  # the line breaks between calls
        return said, made

    def rest(self) -> str:
        said, self._held = self._held, ""
        return "" if self.made and not said.strip() else said


def _call(body: str, index: int) -> dict[str, Any] | None:
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
