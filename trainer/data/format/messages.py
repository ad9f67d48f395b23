"""Reads the messages and tools of a row, in OpenAI's or ShareGPT's form, and converts them for a chat template."""

import re
from itertools import accumulate
from typing import Any

from trainer.data.format.spans import Span, joined, without
from trainer.errors import DataError
from trainer.store import json_text

_ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of the roles. Its files also use OpenAI's names, and older ones chatgpt.
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in _ROLES},
    "chatgpt": "assistant",
}
_CALLS = "function_call"
# Either key says whether a message, or a part of its content, is trained. axolotl's files have the second.
FLAGS = ("weight", "train")
# Axolotl's list of character ranges of a content. Each says whether it is trained; characters in no range are not.
DETAIL = "train_detail"
MASKS = (*FLAGS, DETAIL)
"""The keys by which rows say what is trained of them."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys of what an assistant thought before it answered."""
UNTRAINED = "untrained"
"""The key, here alone, of the ranges of a content's characters that are not trained: sorted, disjoint and not empty."""
_SURROGATE = re.compile("[\ud800-\udfff]")
# Longer texts are refused. The limit is far above the longest sequence; such a text takes minutes and gigabytes.
LONGEST_TEXT = 16 * 2**20

Message = dict[str, Any]
"""Return one message as `role`, `content` and everything else that the template may use. It has `weight: 0` if it is
not trained, and `train: true` if it is trained although it is not the assistant's."""


def read_messages(value: Any) -> list[Message]:
    """The messages of a conversation. Raises `DataError` with the number of the turn, from 1, if it is none."""
    if not isinstance(value, list) or not value:
        raise DataError(f"the messages are {_kind(value)}, and not a list with at least one message")
    return [_message(message, turn) for turn, message in enumerate(value, 1)]


def _message(message: Any, turn: int) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"turn {turn} is {_kind(message)}, and not an object with role and content")
    flags = _flags(message, turn)
    if _is_sharegpts(message):
        given, content, rest = message["from"], message.get("value"), {}
        role, names = _role_of(given), tuple(_SHAREGPT)
        if given == _CALLS:
            rest, content = {"tool_calls": _written_calls(content, turn)}, ""
    else:
        given, content = message.get("role"), message.get("content")
        rest = {key: value for key, value in message.items() if value is not None and key not in MASKS}
        rest |= {key: _joined(rest[key], turn, key)[0] for key in THOUGHTS if key in rest}
        role, names = given, _ROLES
        if rest.get("tool_calls"):
            rest["tool_calls"] = _tool_calls(rest["tool_calls"], turn)
            content = content or ""  # a message with a call needs no content
    if role not in _ROLES:
        raise DataError(f"turn {turn} has the role {given!r}; allowed are {', '.join(names)}")
    content, silent = _joined(content, turn, "content")
    content = text_of(content, f"content of turn {turn}")
    if message.get(DETAIL) is not None:
        silent = _not_in_detail(message[DETAIL], len(content), turn)
    if flags.get("train") and role == "assistant":
        del flags["train"]  # it only repeats the default
    return {**rest, **flags, **({UNTRAINED: silent} if silent else {}), "role": role, "content": content}


def _joined(content: Any, turn: int, key: str) -> tuple[Any, list[Span]]:
    """A content as text, and its untrained spans. OpenAI's form may give the content in parts.

    Servers join parts by line breaks (vLLM's chat_utils.py). Parts that say whether they are trained are joined without
    them, as pieces of one text.
    """
    if not isinstance(content, list) or not content:
        return content, []
    texts, trained = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"turn {turn} has a part of type {kind!r}; only parts of type 'text' can be trained on")
        texts.append(text_of(part.get("text"), f"text of a part of turn {turn}"))
        flags = _flags(part, turn)
        trained.append(None if not flags else flags.get("weight") != 0)
    if trained.count(None) == len(trained):
        return "\n".join(texts), []
    if key != "content":
        raise DataError(f"turn {turn} has parts of its {key} with a flag, which only parts of a content may have")
    ends = list(accumulate(map(len, texts)))
    pieces = zip(texts, ends, trained, strict=True)
    return "".join(texts), joined((end - len(text), end) for text, end, told in pieces if told is False and text)


def _not_in_detail(detail: Any, length: int, turn: int) -> list[Span]:
    """The ranges of a content that `train_detail` leaves untrained.

    Its offsets count characters, and the end offset is part of the range.
    """
    spans = list[Span]()
    for part in detail if isinstance(detail, list) else [detail]:
        given = part if isinstance(part, dict) else {}
        begin, end, told = (given.get(key) for key in ("begin_offset", "end_offset", "train"))
        if not (type(begin) is int and type(end) is int and isinstance(told, bool) and 0 <= begin <= end < length):
            raise DataError(
                f"turn {turn} has a {DETAIL} that is no list of begin_offset, end_offset and train with offsets in its"
                " content"
            )
        if told:
            spans.append((begin, end + 1))
    return without([(0, length)], joined(spans))


def _written_calls(content: Any, turn: int) -> list[Any]:
    """ShareGPT's tool calls: JSON of one call with name and arguments, or of a list of calls."""
    calls = _json(text_of(content, f"content of turn {turn}"), f"calls of turn {turn}")
    named = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return _tool_calls(named, turn)


def _is_sharegpts(message: Message) -> bool:
    return message.get("from") is not None and message.get("role") is None


def without_system(messages: list[Message]) -> list[Message]:
    """The messages without the system message at the beginning. Raises `DataError` if none are left."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) == 1:
        raise DataError("its only message is the system's, which data.drop_system leaves out")
    return messages[1:]


def with_default_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages, with a system message at the beginning if they have none there and `system` is given."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def own_keys(message: Message) -> set[str]:
    """The keys of a message that have a meaning in its form. The template may know further keys."""
    return {*MASKS, *(("from", "value") if _is_sharegpts(message) else ("role", "content", "tool_calls"))}


def is_trained(message: Message) -> bool:
    """Whether a message is trained according to OpenAI's `weight`."""
    return message.get("weight") != 0


def untrained(message: Any) -> Any:
    """The message as a part of a prompt."""
    if not isinstance(message, dict):
        return message
    is_assistants = "assistant" in (message.get("role"), _role_of(message.get("from")))
    return {**message, "weight": 0} if is_assistants else {**message, "train": None}


def _role_of(given: Any) -> str | None:
    return _SHAREGPT.get(given) if isinstance(given, str) else None


def _flags(message: Message, turn: int) -> Message:
    """The `weight` of a message or of a part, from whichever key it has, and whether the row asks to train it."""
    for flag in FLAGS:
        if message.get(flag) not in (None, 0, 1):
            raise DataError(f"turn {turn} has the {flag} {message[flag]!r}; allowed are 0, which is not trained, and 1")
    given = [message[flag] for flag in FLAGS if message.get(flag) is not None]
    weight = {"weight": min(given)} if given else {}
    return {**weight, "train": True} if weight.get("weight") and message.get("train") else weight


def _tool_calls(calls: Any, turn: int) -> list[Any]:
    """Calls in the form of templates. OpenAI writes the arguments as JSON in a string; this parses them."""
    if not isinstance(calls, list):
        raise DataError(f"the tool calls of turn {turn} are {_kind(calls)}, and not a list")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise DataError(f"turn {turn} has a tool call that is {_kind(call)}, and not an object with a function")
    return [
        {**call, "function": {**call["function"], "arguments": _arguments(call["function"].get("arguments"), turn)}}
        for call in calls
    ]


def _arguments(arguments: Any, turn: int) -> Any:
    return _json(arguments, f"arguments of a call in turn {turn}") if isinstance(arguments, str) else arguments


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions that a conversation may call, given as objects or as JSON."""
    tools = _json(value, "tools") if isinstance(value, str) and value else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"the tools are {_kind(tools)}, and not a list of objects")
    return tools


def _json(text: str, name: str) -> Any:
    try:
        return json_text.loads(text)
    except json_text.TwiceNamed as error:
        raise DataError(f"in the {name}, which are JSON, {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the {name} are given as text that is not JSON ({error})") from error


def text_of(value: Any, name: str) -> str:
    """`value`, if it is a string that can be tokenized. Otherwise raises `DataError`, which calls it `name`."""
    if not isinstance(value, str):
        raise DataError(f"the {name} is {_kind(value)}, and not a string")
    if len(value) > LONGEST_TEXT:
        raise DataError(f"the {name} has {len(value):,} characters; at most {LONGEST_TEXT:,} are allowed")
    if not value.isascii() and _SURROGATE.search(value):
        raise DataError(f"the {name} has half of a surrogate pair in it, which is no character")
    return value


def _kind(value: Any) -> str:
    return {"NoneType": "null", "list": "an empty list" if not value else "a list", "dict": "an object"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )
