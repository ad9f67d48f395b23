"""`capstan generate` on one rank: answers of the checkpoint and, on request, those of its base beside them.

For a run with a head it returns the class of a text, or its reward, instead of an answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.render.numbered import ClassifiedRenderer, TaggedRenderer
from trainer.errors import ConfigError, DataError
from trainer.evaluate.generation import Opening, Sampling, Told, continued
from trainer.evaluate.models import OpenedRun, ServedModel, open_model
from trainer.evaluate.program import Ask, Tell
from trainer.evaluate.prompts import Prompt, Prompter, Question, asked
from trainer.model.micro_batch import MicroBatch
from trainer.run.folder import run_config
from trainer.servers import CompletionsServer, refuse_head
from trainer.store.store import open_store
from trainer.tuning.head import WithHead, head_of, outputs


def generate(ask: Ask, prompts: Iterable[list[Prompt]], tell: Tell) -> dict[str, Any]:
    """Answer lists of prompts, one after the other, until there are no more. Returns all answers. Collective.

    An empty list asks nothing: it ends the other ranks' wait before their group's time limit does. If a server answers
    (`ask.server`), this process alone asks it, and loads no model.

    `tell` gets each piece of an answer of rank 0 as it is written, and the whole answers to a list when they are there.

    Raises:
        ConfigError: the base is asked for beside the adapter, but the method trains the base itself: the base is gone
            when the checkpoint is loaded.
    """
    if ask.server:
        return _by_server(ask, prompts, tell)
    opened = open_model(
        open_store(ask.run), ask.step, ask.overrides, base_alone=False, log=lambda text: tell({"log": text})
    )
    assert opened.manifest is not None
    if ask.base and opened.resolved.method.trains_base:
        raise ConfigError(
            f"--base: tuning.method: {opened.resolved.config.tuning.method} has changed the base itself, so it cannot"
            " answer beside the checkpoint. Leave --base out."
        )
    if (head := head_of(opened.resolved.method)) is not None:
        refuse_writing(ask, opened.resolved.config)
    step = opened.load(or_newer=ask.step is None).step
    tell({"ready": step, "chats": opened.ranks.on_first(lambda: opened.words.prompter.chats)})
    sampling, waiting, every = Sampling(**ask.sampling), iter(prompts), list[dict[str, Any]]()
    while (given := opened.ranks.on_first(lambda: next(waiting, None))) is not None:
        if not given:  # nobody has asked anything for a while, and the other ranks wait no longer than this
            continue
        sides = dict[str, list[str]]()
        if head is not None:
            sides["adapter"] = classes_of(opened, head, given)
            for number, said in enumerate(sides["adapter"]):
                tell({"piece": said, "number": number, "side": "adapter"})
        else:
            questions = opened.ranks.on_first(
                lambda given=given: opened.words.prompter.fitting(given, opened.resolved.longest)
            )
            if ask.base:
                with opened.as_base() as base:
                    sides["base"] = _answers(base, questions, sampling, "base", tell)
            sides["adapter"] = _answers(opened, questions, sampling, "adapter", tell)
        every += _tell(given, sides, tell)
    return {"step": step, "answers": every}


def _by_server(ask: Ask, prompts: Iterable[list[Prompt]], tell: Tell) -> dict[str, Any]:
    """Answer with what a server has of the run, which the server calls by the run's name."""
    config = run_config(open_store(ask.run), ask.overrides)
    refuse_head(config)
    base, sampling = resolve_base(config.model), Sampling(**ask.sampling)
    server = CompletionsServer.find("--server", ask.server, config.run.name)
    prompter = Prompter(load_tokenizer(base), as_trained(config), base.directory)
    model = ServedModel(server, sorted(prompter.stops))
    tell({"log": f"answers are those of {server.model} at {server.url}"})
    tell({"ready": None, "chats": prompter.chats})
    every = list[dict[str, Any]]()
    for given in filter(None, prompts):
        questions = list(map(prompter.served, given))
        drawing = replace(sampling, seed=sampling.seed + len(every))
        told, one_at_a_time = _pieces(prompter, "adapter", tell), Lock()

        def heard(number: int, token: int, told: Told = told, lock: Lock = one_at_a_time) -> None:
            with lock:  # a thread waits for each answer
                told(number, token)

        texts = [prompter.text(answer) for answer in model.written(questions, drawing, heard)]
        every += _tell(given, {"adapter": texts}, tell)
    return {"step": None, "server": f"{server.url}#{server.model}", "answers": every}


def _tell(given: list[Prompt], sides: dict[str, list[str]], tell: Tell) -> list[dict[str, Any]]:
    rows = [
        {"prompt": asked(prompt), **{side: texts[number] for side, texts in sides.items()}}
        for number, prompt in enumerate(given)
    ]
    tell({"answers": rows})
    return rows


def _answers(opened: OpenedRun, questions: list[Question], sampling: Sampling, side: str, tell: Tell) -> list[str]:
    prompter = opened.words.prompter
    openings = [Opening(question.tokens, prompter.ended, question.inputs) for question in questions]
    told = _pieces(prompter, side, tell)
    written = continued(
        opened.engine, openings, sampling, keeps=opened.keeps, longest=opened.resolved.longest, told=told
    )
    return [prompter.text(answer) for answer in written]


def _pieces(prompter: Prompter, side: str, tell: Tell) -> Told:
    """Report the new characters of an answer once they are whole: several tokens may make one character."""
    written, shown = dict[int, list[int]](), dict[int, int]()

    def told(number: int, token: int) -> None:
        written.setdefault(number, []).append(token)
        text = prompter.text(written[number])
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > shown.get(number, 0):
            tell({"piece": text[shown.get(number, 0) :], "number": number, "side": side})
            shown[number] = len(text)

    return told


_ANY = "any"  # stands for the class of a text that has none


def refuse_writing(ask: Ask, config: Config) -> None:
    """Raise `ConfigError` for an option that is only useful with a model that writes."""
    if ask.base:
        raise ConfigError(f"--base: the base has no head for objective.name: {config.objective.name}. Leave it out.")
    if ask.sampling.get("temperature"):
        raise ConfigError(
            f"--temperature: objective.name: {config.objective.name} draws no tokens, so it has no effect. Leave it"
            " out."
        )


class _Asked(NamedTuple):
    """The tokens of a text, and the places in it whose outputs are asked for.

    If words have classes, it also has the words that begin at these places. `inputs` are what the class takes of its
    pictures.
    """

    tokens: list[int]
    places: Sequence[int]
    words: Sequence[str] = ()
    inputs: Mapping[str, Tensor] | None = None


def classes_of(opened: OpenedRun, head: WithHead, prompts: Sequence[Prompt]) -> list[str]:
    """Return the class of each text or conversation and its probability, its reward, or the tags of its words.

    Collective.
    """
    read = _words if head.head.per_token else _text
    asked = opened.ranks.on_first(lambda: [read(opened, head, prompt) for prompt in prompts])
    engine = opened.engine
    with engine.evaluating():
        found = [
            engine.look(
                partial(outputs, places=torch.tensor(text.places)),
                MicroBatch.of_text(torch.tensor([text.tokens]), text.inputs),
            )
            for text in asked
        ]
    return [_in_words(head, text, values.float().cpu()) for text, values in zip(asked, found, strict=True)]


def _in_words(head: WithHead, asked: _Asked, values: Tensor) -> str:
    if not head.labels:
        return f"{float(values[0]):.4f}"
    if head.head.several:
        shares = zip(head.labels, values[0].sigmoid().tolist(), strict=True)
        return " ".join(f"{label} ({share:.3f})" for label, share in shares if share > 0.5) or "none"
    best = values.argmax(-1).tolist()
    if asked.words:
        return " ".join(f"{word}/{head.labels[number]}" for word, number in zip(asked.words, best, strict=True))
    return f"{head.labels[best[0]]} ({float(values[0].softmax(-1)[best[0]]):.3f})"


def _words(opened: OpenedRun, head: WithHead, prompt: Prompt) -> _Asked:
    """Tokenize the words of a text (split at white space) like rows of words.

    Raises `ConfigError` if that cannot be done.
    """
    words = str(prompt.get("prompt", "")).split()
    data = opened.resolved.config.data.model_copy(update={"format": "tagged", "fields": {}})
    (found,) = TaggedRenderer(opened.words.tokenizer, data).encode(
        [{"words": words, "tags": [head.labels[0]] * len(words)}]
    )
    if isinstance(found, DataError) or not found.teaches:
        raise ConfigError("a prompt cannot be read: give a text with words in the field prompt.")
    return _Asked(found.text.tolist(), found.places, words)


def _text(opened: OpenedRun, head: WithHead, prompt: Prompt) -> _Asked:
    """Tokenize a text like rows of texts. Raises `ConfigError` if that cannot be done."""
    if ROW_KINDS[opened.resolved.config.data.kind].sees:
        tokens, inputs = opened.words.prompter.judged(prompt)
        return _Asked(tokens, [len(tokens) - 1], inputs=inputs)
    names = list(head.labels) or [_ANY]
    data = opened.resolved.config.data.model_copy(update={"format": "classified", "fields": {}, "labels": names})
    row = {"messages" if name == "messages" else "text": given for name, given in prompt.items()}
    (found,) = ClassifiedRenderer(opened.words.tokenizer, data).encode([{**row, "label": names[0]}])
    if isinstance(found, DataError) or not found.teaches:
        raise ConfigError(f"a prompt cannot be read: {found if isinstance(found, DataError) else 'it is empty'}.")
    tokens = found.text.tolist()
    return _Asked(tokens, [len(tokens) - 1])
