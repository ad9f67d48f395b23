"""The mistakes in a configuration, one sentence for each setting: its name, the value, what is allowed, an example."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.section import Section
from trainer.config.tree import fields, sections_in
from trainer.errors import shown

_MOST_SENTENCES = 20

# pydantic speaks of Python's types, but users write YAML: type of error -> the words about YAML.
_EXPECTED = {
    "model_type": "Input should be a section of settings",
    "dict_type": "Input should be a section of names and values",
    "list_type": "Input should be a list",
    "string_type": "Input should be text",
}

# Settings of earlier releases by their places, each with what its values are now. Its other values are the default.
_RETIRED = {"data.loss_on": {"all": "data.train_on.roles: all", "last_assistant": "data.train_on.turns: last"}}


def without_retired(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` without retired settings that are null, as the configurations of earlier releases have them."""
    found = dict[str, Any]()
    for section, given in tree.items():
        inside = given.items() if isinstance(given, dict) else ()
        kept = {name: value for name, value in inside if value is not None or f"{section}.{name}" not in _RETIRED}
        found[section] = kept if isinstance(given, dict) else given
    return found


def listed(sentences: Sequence[str]) -> str:
    """The sentences, a line each, as far as somebody would read them."""
    rest = len(sentences) - _MOST_SENTENCES
    return "\n".join([*sentences[:_MOST_SENTENCES], *([f"... and {rest} more like these."] if rest > 0 else [])])


def unknown_keys(tree: Any, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Keys of `tree` that `model` does not know, each with the nearest name or what is allowed there."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None and (now := _RETIRED.get(f"{prefix}{key}")) is not None:
            instead = now.get(str(value))
            yield (
                f"{prefix}{key}: {shown(value)} is said by data.train_on now."
                f" {f'Write {instead}.' if instead else 'Remove it, or choose by data.train_on.roles.'}"
            )
            continue
        if field is None:
            hint = _hint(str(key), model)
            yield f"{prefix}{shown(key)[1:-1] if isinstance(key, str) else shown(key)}: unknown setting. {hint}"
            continue
        for child in sections_in(field.annotation):
            for place, item in _places(value, field.annotation):
                yield from unknown_keys(item, child, f"{prefix}{key}{place}.")


def _hint(key: str, model: type[BaseModel]) -> str:
    """The words to write instead: what another tool's name is here, a name of the section that is all but equal, the
    same name elsewhere, why a name of another tool is none here, or one of the section that is near."""
    # Most configurations have no name that is unknown here, and none needs the names of other tools then.
    from trainer.config.peers.names import NONE_HERE, SETTINGS_HERE, said_of

    elsewhere = [path for path, _ in fields() if path.rpartition(".")[2] == key]  # a setting put into the wrong section
    if not elsewhere and (known := said_of(key, SETTINGS_HERE)):
        return known
    near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.8) or elsewhere
    if not near and (known := said_of(key, NONE_HERE)):
        return known
    near = near or difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed here: {', '.join(model.model_fields)}."


def _places(value: Any, annotation: Any) -> list[tuple[str, Any]]:
    """The sections in a setting's value, each with its place: those of a list, those that have names, or the value
    itself.
    """
    if isinstance(value, list):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if get_origin(annotation) is dict:
        return [(f".{name}", item) for name, item in value.items()] if isinstance(value, dict) else []
    return [("", value)]


def explained(errors: Sequence[Any], model: type[BaseModel]) -> Iterator[str]:
    """One sentence for each wrong setting of `model`: its name, the value, what is allowed, an example.

    pydantic reports every branch of a union under a tag such as `list[str]`: the branch that got deepest is the one
    that was meant, and branches that got equally far are alternatives.
    """
    unions: dict[tuple[Any, ...], list[Any]] = {}
    for item in errors:
        location = item["loc"]
        tag = next((i for i, part in enumerate(location) if _is_union_tag(part)), len(location))
        unions.setdefault(location[:tag], []).append(item)
    for items in unions.values():
        depth = max(len(item["loc"]) for item in items)
        settings: dict[tuple[Any, ...], list[Any]] = {}
        for item in items:
            if len(item["loc"]) == depth:
                settings.setdefault(tuple(part for part in item["loc"] if not _is_union_tag(part)), []).append(item)
        yield from (_sentence(path, same, model) for path, same in settings.items())


def _sentence(path: tuple[Any, ...], errors: Sequence[Any], model: type[BaseModel]) -> str:
    first = errors[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    field = _field_at(model, [part for part in path if not isinstance(part, int)])
    example = ""
    if first["type"] == "model_type" and field is not None and "[" not in name:
        example = _section_example(name, field)
    elif field is not None and field.examples:
        example = (
            " Example:"
            f" {yaml.safe_dump(field.examples[0], default_flow_style=True).strip().removesuffix('...').strip()}."
        )
    if first["type"] == "missing":
        return f"{name}: missing, and it has no default.{example}"
    messages = [_EXPECTED.get(item["type"]) or str(item["msg"]).removesuffix(".") for item in errors]
    allowed = " or ".join([messages[0], *(message.removeprefix("Input should be ") for message in messages[1:])])
    return f"{name}: {shown(first['input'])} is not allowed. {allowed}.{example}"


def _section_example(name: str, field: FieldInfo) -> str:
    """The words that a section is given by its settings, with the first of them that has an example."""
    inside = next(sections_in(field.annotation), Section).model_fields
    found = next(((key, known.examples[0]) for key, known in inside.items() if known.examples), None)
    return f" Give its settings one by one. Example: {name}.{found[0]}={found[1]}." if found else ""


def _is_union_tag(part: Any) -> bool:
    """pydantic adds the branch of a union to a location, such as `literal['all-linear']` or `list[str]`."""
    return isinstance(part, str) and "[" in part


def _field_at(model: type[BaseModel], path: list[Any]) -> FieldInfo | None:
    field = None
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = next(sections_in(field.annotation), Section)
    return field
