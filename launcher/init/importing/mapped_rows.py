"""Finds out what a script's function makes of each row that it is mapped over, by its syntax tree and without running
it.

Notebooks write texts with a prompt of their own (`alpaca_prompt.format(instruction, input, output) + EOS_TOKEN`), or
render conversations (`tokenizer.apply_chat_template(convo, tokenize=False)`). Both become parts of a source here: its
format, its fields, and templates of `write`.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Path = tuple[str | int, ...]
Text = tuple["str | Path | _End", ...]
"""A sequence of texts, places in the row, and the tokenizer's end."""


class NotRead(Exception):
    """The function does something that this file cannot follow."""


class _End:
    """The token that ends a text."""


END = _End()


@dataclass(frozen=True)
class Rendered:
    """A conversation in the tokenizer's chat template: a place in the row, or (role, text) for each message."""

    messages: "Path | tuple[tuple[str, Text], ...]"
    tools: Path = ()


Value = Any  # Text, Rendered, a tuple of messages, or a dict of values
_PLAIN = {"tokenize": False, "add_generation_prompt": False, "continue_final_message": False}


@dataclass
class Rows:
    """Knows the rows of a script: for each field that the script has written, what it is made of."""

    written: dict[str, Value] = field(default_factory=dict[str, Value])

    def map(self, function: ast.FunctionDef | ast.Lambda, batched: bool, constants: Mapping[str, Any]) -> None:
        """Follow a function over the rows. Raises `NotRead`."""
        made = _Reader(self.written, batched, constants).result(function)
        if not made:
            raise NotRead
        self.written |= made

    def source(self, text_field: str) -> dict[str, Any]:
        """Return the parts of a source whose rows the trainer reads in `text_field`, as messages or as pairs.

        Raises `NotRead` if the script writes none of these.
        """
        if {"chosen", "rejected"} <= set(self.written):
            names = [name for name in ("prompt", "chosen", "rejected") if name in self.written]
            return {"format": "preference", "write": {name: _ended(self.written[name]) for name in names}}
        if text_field not in self.written:
            listed = [name for name in ("messages", "conversations") if name in self.written]
            if not listed:
                raise NotRead
            return _conversation(self.written[listed[0]])
        value = self.written[text_field]
        if isinstance(value, Rendered):
            tools = {"tools": str(value.tools[0])} if value.tools not in ((), ("tools",)) else {}
            found = _conversation(value.messages)
            return {**found, "fields": {**found.get("fields", {}), **tools}} if tools else found
        if not isinstance(value, tuple) or not value or value[-1] is not END:
            raise NotRead  # here every text ends with the tokenizer's end
        return {"format": "text", "write": {"text": _template(value[:-1])}}


def _conversation(given: Sequence[Any]) -> dict[str, Any]:
    messages: Sequence[Any] = given[0] if len(given) == 1 and _is_path(given[0]) else given
    if _is_path(messages):
        if len(messages) > 1:
            raise NotRead
        name = str(messages[0])
        return {} if name in ("messages", "conversations") else {"fields": {"messages": name}}
    forms = {
        ("user", "assistant"): ("question_answer", ("question", "answer")),
        ("system", "user", "assistant"): ("alpaca", ("system", "instruction", "output")),
    }
    if not _are_messages(messages):
        raise NotRead
    roles = tuple(role for role, _ in messages)
    if roles not in forms:
        raise NotRead
    form, names = forms[roles]
    return {"format": form, "write": {name: _template(text) for name, (_, text) in zip(names, messages, strict=True)}}


def _ended(text: Any) -> str:
    """Return the template of an answer or of a prompt. It includes the end after an answer."""
    if not isinstance(text, tuple):
        raise NotRead
    return _template(text[:-1] if text and text[-1] is END else text)


def _template(text: Sequence[Any]) -> str:
    parts = list[str]()
    for part in text:
        if isinstance(part, _End):
            raise NotRead
        parts.append(
            part.replace("{", "{{").replace("}", "}}") if isinstance(part, str) else f"{{{'.'.join(map(str, part))}}}"
        )
    return "".join(parts)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and bool(value)
        and all(isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], tuple) for part in value)
    )


def _is_path(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(part, str | int) for part in value)


@dataclass(frozen=True)
class _Place:
    """A place in the row."""

    path: Path


class _Reader:
    """Follows the statements of one function. In a batched one each field is a list, and one item of it is followed."""

    def __init__(self, written: Mapping[str, Value], batched: bool, constants: Mapping[str, Any]) -> None:
        self._written, self._batched, self._constants = written, batched, constants
        self._names: dict[str, Any] = {}
        self._row = ""

    def result(self, function: ast.FunctionDef | ast.Lambda) -> dict[str, Value]:
        self._row = function.args.args[0].arg if function.args.args else ""
        if isinstance(function, ast.Lambda):
            return self._fields(self._value(function.body))
        found = self._body(function.body)
        return self._fields(found) if found is not None else {}

    def _fields(self, value: Any) -> dict[str, Value]:
        if not isinstance(value, dict):
            raise NotRead
        return {name: self._outer(item) for name, item in value.items()}

    def _outer(self, value: Any) -> Value:
        if isinstance(value, _Place):
            return self._written.get(str(value.path[0]), (value.path,)) if len(value.path) == 1 else (value.path,)
        return value

    def _body(self, statements: Sequence[ast.stmt]) -> Any:
        for statement in statements:
            match statement:
                case ast.Return(value=ast.expr() as value):
                    return self._value(value)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._names[name] = self._value(value)
                case ast.Assign(targets=[ast.Subscript() as target], value=value):
                    self._store(target, self._value(value))
                case ast.For(target=target, iter=items, body=body):
                    self._bind(target, self._each(items))
                    if self._body(body) is not None:
                        raise NotRead
                case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[item])):
                    self._names[name] = self._value(item)
                case ast.Expr(value=ast.Constant()) | ast.Pass():
                    continue
                case _:
                    raise NotRead
        return None

    def _store(self, target: ast.Subscript, value: Any) -> None:
        of, key = target.value, target.slice
        if not (isinstance(of, ast.Name) and isinstance(key, ast.Constant) and isinstance(key.value, str)):
            raise NotRead
        if of.id == self._row:
            self._names.setdefault(of.id, {})
        kept = self._names.get(of.id)
        if not isinstance(kept, dict):
            raise NotRead
        kept[key.value] = value

    def _bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, list) and len(value) == len(target.elts):
            for one, item in zip(target.elts, value, strict=True):
                self._bind(one, item)
        else:
            raise NotRead

    def _each(self, items: ast.expr) -> Any:
        """Return the item of a list that is followed. A batch here has a single row."""
        if not self._batched:
            raise NotRead
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Name) and items.func.id == "zip":
            return [self._value(argument) for argument in items.args]
        return self._value(items)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() as text):
                return (text,) if text else ()
            case ast.Name(id=name) if name == self._row and isinstance(self._names.get(name), dict):
                return self._names[name]
            case ast.Name(id=name):
                return self._named(name)
            case ast.Attribute(attr="eos_token"):
                return (END,)
            case ast.Subscript():
                return self._inside(node)
            case ast.Dict(keys=names, values=values):
                if not all(isinstance(name, ast.Constant) and isinstance(name.value, str) for name in names):
                    raise NotRead
                given = zip(names, values, strict=True)
                return {name.value: self._value(value) for name, value in given if isinstance(name, ast.Constant)}
            case ast.List(elts=[only]) if not isinstance(only, ast.Dict):
                return self._value(only)
            case ast.List(elts=elements) if elements:
                return self._messages([self._value(element) for element in elements])
            case ast.List():
                return ()
            case ast.ListComp(elt=element, generators=[ast.comprehension(target=target, iter=items, ifs=[])]):
                self._bind(target, self._each(items))
                return self._value(element)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._text(self._value(left)) + self._text(self._value(right))
            case ast.JoinedStr(values=values):
                return tuple(part for value in values for part in self._text(self._value(value)))
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return self._value(value)
            case ast.Call():
                return self._call(node)
            case _:
                raise NotRead

    def _named(self, name: str) -> Any:
        if name in self._names:
            return self._names[name]
        if name.upper() == name and "EOS" in name and name not in self._constants:
            return (END,)
        if isinstance(given := self._constants.get(name), str):
            return (given,) if given else ()
        raise NotRead

    def _inside(self, node: ast.Subscript) -> Any:
        key = node.slice
        if isinstance(node.value, ast.Name) and node.value.id == self._row:
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                raise NotRead
            kept = self._names.get(self._row)
            return kept[key.value] if isinstance(kept, dict) and key.value in kept else self._field(key.value)
        of = self._value(node.value)
        if isinstance(of, _Place) and isinstance(key, ast.Constant) and isinstance(key.value, str | int):
            return _Place((*of.path, key.value))
        if isinstance(of, dict) and isinstance(key, ast.Constant) and key.value in of:
            return of[key.value]
        raise NotRead

    def _field(self, name: str) -> Any:
        found = self._written.get(name)
        return _Place((name,)) if found is None else found

    def _messages(self, given: Sequence[Any]) -> tuple[tuple[str, Text], ...]:
        found = list[tuple[str, Text]]()
        for message in given:
            role = message.get("role") if isinstance(message, dict) else None
            if not (isinstance(role, tuple) and len(role) == 1 and isinstance(role[0], str)):
                raise NotRead
            if set(message) != {"role", "content"}:
                raise NotRead
            found.append((role[0], self._text(message["content"])))
        return tuple(found)

    def _text(self, value: Any) -> Text:
        if isinstance(value, _Place):
            return (value.path,)
        if isinstance(value, tuple) and all(isinstance(part, str | tuple | _End) for part in value):
            return value
        raise NotRead

    def _call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Attribute):
            raise NotRead
        of, name, words = node.func.value, node.func.attr, {word.arg: word.value for word in node.keywords}
        if name == "apply_chat_template" and node.args:
            tools = self._value(words.pop("tools")) if "tools" in words else _Place(())
            others = {key for key in words if key not in _PLAIN}
            plain = all(isinstance(given, ast.Constant) and not given.value for given in words.values())
            if others or not plain or "tokenize" not in words or not isinstance(tools, _Place) or len(tools.path) > 1:
                raise NotRead
            value = self._value(node.args[0])
            if isinstance(value, _Place):
                return Rendered(value.path, tools.path)
            if not _are_messages(value):
                raise NotRead
            return Rendered(value)
        value = self._value(of)
        if name == "removeprefix" and isinstance(value, Rendered):
            return value  # the token that begins a text, which is written once here
        if name == "format" and not words and isinstance(value, tuple) and all(isinstance(part, str) for part in value):
            return self._formatted("".join(value), node.args)
        raise NotRead

    def _formatted(self, text: str, arguments: Sequence[ast.expr]) -> Text:
        pieces = text.replace("{{", "\0").replace("}}", "\1").split("{}")
        if len(pieces) != len(arguments) + 1 or any("{" in piece or "}" in piece for piece in pieces):
            raise NotRead
        values = [*map(self._text, map(self._value, arguments)), ()]
        restored = [piece.replace("\0", "{").replace("\1", "}") for piece in pieces]
        parts = [part for piece, value in zip(restored, values, strict=True) for part in (piece, *value)]
        return tuple(part for part in parts if part != "")
