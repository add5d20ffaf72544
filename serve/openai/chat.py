"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import inspect
import json
from typing import Any

from heliostat.generate import Sampling
from heliostat.generate.drawing import json_grammar
from heliostat.recipe import Refused
from serve.openai import tools as tool_calls
from serve.openai.answer import Answer, Piece
from serve.openai.protocol import ChatRequest, NamedTool, Problem


class ChatAnswer(Answer):
    request: ChatRequest
    id_prefix, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def drawing(self) -> tuple[list[list[int]], Sampling]:
        request = self.request
        if request.top_logprobs is not None and not request.logprobs:
            raise Problem(400, "top_logprobs: needs logprobs", "top_logprobs")
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
        offered = tools if request.tool_choice != "none" else []
        prompt = self._prompt(offered)
        room = self.room(prompt, request.max_completion_tokens or request.max_tokens, "messages")
        self._calls = [tool_calls.ToolCalls() if offered else None for _ in range(request.n or 1)]
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return [prompt], self.sampling(room, logprobs, self._grammar(tools))

    def _prompt(self, tools: list[dict[str, Any]]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not tokenizer.chat_template:
            raise Problem(400, "messages: this model has no chat template; ask /v1/completions", "messages")
        if tools and not tool_calls.template_takes_tools(tokenizer.chat_template):
            raise Problem(400, "tools: this model's chat template has no place for them", "tools")
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        if taken := [name for name in self.request.chat_template_kwargs if name in own]:
            raise Problem(400, f"chat_template_kwargs: {taken[0]} is not the template's", "chat_template_kwargs")
        messages = [_message(i, each.model_dump(exclude_none=True)) for i, each in enumerate(self.request.messages)]
        try:
            found = tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=True,
                return_dict=True,
                **self.request.chat_template_kwargs,
            )
        except Exception as error:
            raise Problem(400, f"messages: the chat template refuses them: {error}", "messages") from error
        return list(found["input_ids"])

    def _grammar(self, tools: list[dict[str, Any]]) -> str:
        """What `tool_choice` or `response_format` make the answer follow."""
        choice, form = self.request.tool_choice, self.request.response_format
        if choice not in (None, "none", "auto"):
            if isinstance(choice, NamedTool):
                tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
            if not tools:
                raise Problem(400, "tool_choice: names no tool of this request", "tool_choice")
            return self._checked(tool_calls.grammar(tools, self.engine.tokenizer.get_vocab()), "tools")
        if form is None or form.type == "text":
            return ""
        if form.type == "json_schema" and form.json_schema is None:
            raise Problem(400, "response_format: json_schema is missing", "response_format")
        schema = form.json_schema.schema_ if form.json_schema is not None else {"type": "object"}
        return self._checked(json_grammar(schema), "response_format")

    def _checked(self, grammar: str, field: str) -> str:
        """Refused here, not when the answer has begun."""
        try:
            self.engine.check_grammar(grammar)
        except Refused as error:
            raise Problem(400, f"{field}: {error.reason}", field) from error
        return grammar

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(len(self.questions))
        ]

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        text, finish, calls = piece.text, piece.finish, self._calls[index]
        delta: dict[str, Any] = {}
        if calls is not None:
            text, made = calls.push(text)
            if finish is not None:
                text += calls.rest()
                finish = "tool_calls" if calls.made and finish == "stop" else finish
            if made:
                delta["tool_calls"] = made
        if text:
            delta["content"] = text
        logprobs = None
        if self.request.logprobs:
            content = [
                {
                    **self._token(token.id, token.logprob),
                    "top_logprobs": [self._token(other, value) for other, value in token.top],
                }
                for token in piece.tokens
            ]
            logprobs = {"content": content, "refusal": None} if content else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        spelled = list(self.engine.token_bytes(token))
        return {"token": self.token_text(token), "logprob": logprob, "bytes": spelled}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        part = self.part(index, piece)
        delta, content = part.pop("delta"), part["logprobs"]
        message: dict[str, Any] = {"role": "assistant", "content": delta.get("content", ""), "refusal": None}
        if calls := delta.get("tool_calls"):
            message["content"] = message["content"] or None
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        if self.request.logprobs and content is None:
            part["logprobs"] = {"content": [], "refusal": None}
        return {**part, "message": message}


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """As templates take it: `content` is one text, the arguments of calls are objects."""
    content = message.get("content", "")
    if isinstance(content, list):
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
            raise Problem(400, "messages: this model reads text only", f"messages.{index}.content")
        content = "".join(part["text"] for part in content)
    for call in message.get("tool_calls") or []:
        try:
            called, arguments = call["function"]["name"], call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}")
            call["function"] = {"name": called, "arguments": arguments}  # in the order that models were trained on
        except (ValueError, TypeError, KeyError) as error:
            raise Problem(400, f"messages: not a call of a tool: {call!r}", f"messages.{index}.tool_calls") from error
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}
