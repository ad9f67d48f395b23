"""Small data for a first try: one file for each kind of rows, made from a glossary of words of sailing.

The rows are the same on every machine and at every time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer.errors import ConfigError

FOLDER = "sample-data"

_QUESTIONS = (
    "What does the word “{term}” mean on board?",
    "I am new to sailing. Please explain “{term}”.",
    "Which word of sailing is this: {meaning}?",
)
_CREWS, _LINES, _HOURS = range(2, 12), (3, 5, 7, 9), range(2, 8)


class Entry(NamedTuple):
    """A word, what it is about, and its meaning."""

    topic: str
    term: str
    meaning: str

    @property
    def sentence(self) -> str:
        return f"On board, “{self.term}” means {self.meaning}."


def glossary() -> list[Entry]:
    topics = yaml.safe_load(Path(__file__).with_name("glossary.yaml").read_text(encoding="utf-8"))
    return [Entry(topic, term, meaning) for topic, words in topics.items() for term, meaning in words.items()]


def write_data(folder: Path, *, force: bool) -> list[str]:
    """Write the files into `folder`, and return a line about each.

    Raises:
        ConfigError: one of them is there already, unless `force`, or they cannot be written.
    """
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and not force:
        raise ConfigError(f"--data: {folder / taken[0]} exists already. Give another folder, or --force to replace it.")
    told = list[str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (about, rows) in FILES.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
            (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            told.append(f"{folder / name}: {len(lines)} rows, {about}")
    except OSError as error:
        raise ConfigError(f"--data: {folder} cannot be written: {error}.") from error
    return told


def _asked(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield questions about a word, each with its answer."""
    answers = (entry.sentence, entry.sentence, f"It is “{entry.term}”.")
    for question, answer in zip(_QUESTIONS, answers, strict=True):
        yield question.format(term=entry.term, meaning=entry.meaning), answer


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _chat() -> Iterator[Any]:
    for entry in glossary():
        for question, answer in _asked(entry):
            yield {"messages": [_message("user", question), _message("assistant", answer)]}


def _completions() -> Iterator[Any]:
    for entry in glossary():
        yield {"prompt": f"{entry.term}: ", "completion": f"{entry.meaning}\n"}
        yield {"prompt": f"Topic of “{entry.term}”: ", "completion": f"{entry.topic}\n"}


def _pairs() -> Iterator[Any]:
    """Yield pairs of answers: the right one, and one that talks around it or is another word's."""
    every = glossary()
    for number, entry in enumerate(every):
        other = every[(number + 7) % len(every)]
        wrong = (
            f"Good question! There is much to say about “{entry.term}”, and it depends on whom you ask. In short, it is"
            " a word of sailing.",
            f"On board, “{entry.term}” means {other.meaning}.",
        )
        for question, rejected in zip(_QUESTIONS[:2], wrong, strict=True):
            yield {
                "prompt": [_message("user", question.format(term=entry.term, meaning=entry.meaning))],
                "chosen": [_message("assistant", entry.sentence)],
                "rejected": [_message("assistant", rejected)],
            }


def _classes() -> Iterator[Any]:
    for entry in glossary():
        yield {"text": entry.sentence, "label": entry.topic}
        yield {"text": f"{entry.term}: {entry.meaning}", "label": entry.topic}


def _tasks() -> Iterator[Any]:
    """Yield sums in words, whose answers a program can check."""
    for crew in _CREWS:
        for lines in _LINES:
            yield _task(f"A crew of {crew} hauls {lines} lines each. How many lines is that?", crew * lines)
        for hours in _HOURS:
            yield _task(f"A boat makes {crew} knots for {hours} hours. How many miles is that?", crew * hours)


def _task(question: str, number: int) -> dict[str, Any]:
    asked = f"{question} Answer with the number alone."
    return {"messages": [_message("user", asked), _message("assistant", str(number))]}


def _long() -> Iterator[Any]:
    """Yield whole texts, one about each topic, and one about all of them."""
    texts: dict[str, list[str]] = {}
    for entry in glossary():
        texts.setdefault(entry.topic, []).append(entry.sentence)
    chapters = [f"About the {topic}. {' '.join(sentences)}" for topic, sentences in texts.items()]
    for text in (*chapters, "\n\n".join(chapters)):
        yield {"text": text}


FILES: dict[str, tuple[str, Callable[[], Iterator[Any]]]] = {
    "chat.jsonl": ("conversations about words of sailing", _chat),
    "completion.jsonl": ("prompts with their completions", _completions),
    "pairs.jsonl": ("prompts with a chosen and a rejected answer", _pairs),
    "classes.jsonl": ("texts with the topic that they are about", _classes),
    "tasks.jsonl": ("sums whose answers can be checked", _tasks),
    "long.jsonl": ("whole texts", _long),
}
"""File -> what its rows are, and a function that yields them."""
