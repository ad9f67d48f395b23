"""`capstan generate` on one rank: answers of the checkpoint, and beside them on request those of its base."""

from collections.abc import Iterable
from typing import Any

from trainer.errors import ConfigError
from trainer.evaluate.classes import classes_of, refuse_writing
from trainer.evaluate.measure.generation import Opening, Sampling, Told, continued
from trainer.evaluate.measure.prompts import Prompt, asked
from trainer.evaluate.request import Ask, Tell
from trainer.evaluate.sharded_model import OpenedRun, open_run
from trainer.store.store import open_store
from trainer.tuning.head import head_of


def generate(ask: Ask, prompts: Iterable[list[Prompt]], tell: Tell) -> dict[str, Any]:
    """Answer lists of prompts, one after the other, until there are no more; returns the answers to all of them. Collective.
    An empty list asks nothing: it ends the other ranks' wait before the time-out of their group does.

    `tell` gets each piece of an answer of rank 0 as it is written, and the whole answers to a list when they are there.

    Raises:
        ConfigError: the base beside the adapter of a method that trains the base itself: the base is gone when the checkpoint is there.
    """
    opened = open_run(
        open_store(ask.run), ask.step, ask.overrides, base_alone=False, log=lambda text: tell({"log": text})
    )
    assert opened.manifest is not None
    if ask.base and opened.resolved.method.trains_base:
        raise ConfigError(
            f"--base: tuning.method: {opened.resolved.config.tuning.method} has changed the base itself, so it cannot answer beside the "
            "checkpoint. Leave --base out."
        )
    if (head := head_of(opened.resolved.method)) is not None:
        refuse_writing(ask, opened.resolved.config)
    opened.load()
    tell({"ready": opened.manifest.step, "chats": opened.ranks.on_first(lambda: opened.prompter.chats)})
    sampling, waiting, every = Sampling(**ask.sampling), iter(prompts), list[dict[str, Any]]()
    while (given := opened.ranks.on_first(lambda: next(waiting, None))) is not None:
        if not given:  # nobody has asked anything for a while; the other ranks wait for so long at most
            continue
        sides = dict[str, list[str]]()
        if head is not None:
            sides["adapter"] = classes_of(opened, head, given)
            for number, said in enumerate(sides["adapter"]):
                tell({"piece": said, "number": number, "side": "adapter"})
            every += _tell(given, sides, tell)
            continue
        openings = opened.ranks.on_first(lambda given=given: opened.prompter.fitting(given, opened.longest))
        if ask.base:
            with opened.as_base() as base:
                sides["base"] = _answers(base, openings, sampling, "base", tell)
        sides["adapter"] = _answers(opened, openings, sampling, "adapter", tell)
        every += _tell(given, sides, tell)
    return {"step": opened.manifest.step, "answers": every}


def _tell(given: list[Prompt], sides: dict[str, list[str]], tell: Tell) -> list[dict[str, Any]]:
    rows = [
        {"prompt": asked(prompt), **{side: texts[number] for side, texts in sides.items()}}
        for number, prompt in enumerate(given)
    ]
    tell({"answers": rows})
    return rows


def _answers(opened: OpenedRun, tokens: list[list[int]], sampling: Sampling, side: str, tell: Tell) -> list[str]:
    prompter = opened.prompter
    openings = [Opening(prompt, prompter.ended) for prompt in tokens]
    told = _pieces(opened, side, tell)
    written = continued(opened.engine, openings, sampling, keeps=opened.keeps, longest=opened.longest, told=told)
    return [prompter.text(answer) for answer in written]


def _pieces(opened: OpenedRun, side: str, tell: Tell) -> Told:
    """Tells the new characters of an answer once they are whole: a character may be of several tokens."""
    written, shown = dict[int, list[int]](), dict[int, int]()

    def told(number: int, token: int) -> None:
        written.setdefault(number, []).append(token)
        text = opened.prompter.text(written[number])
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > shown.get(number, 0):
            tell({"piece": text[shown.get(number, 0) :], "number": number, "side": side})
            shown[number] = len(text)

    return told
