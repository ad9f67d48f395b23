"""Likelihoods, losses and answers of packed rows are what the model says of each text alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.material import byte_tokenizer
from tests.unit.model.test_decoding import packed as packed_model
from trainer.config import Data, parse_config
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate.generate import _Asked, _in_words, _pieces, _text
from trainer.evaluate.generation import Opening, Sampling, continued
from trainer.evaluate.losses import Continued, _row, document_losses, likelihoods, mean_loss, objective_means, packed
from trainer.evaluate.models import OpenText, ServedModel, _continued_by
from trainer.model.micro_batch import IGNORE
from trainer.model.packed import PackedModel
from trainer.tuning.objective import find_objective, sums_of

LENGTHS = (3, 11, 6, 2, 9)


@pytest.fixture(scope="module")
def model() -> PackedModel:
    return packed_model("llama")


def engine_of(model: PackedModel, rank: int = 0, others: dict[int, Any] | None = None) -> Any:
    """An engine of one process: `others` are what the second rank has, if there is one."""
    ranks = SimpleNamespace(
        rank=rank,
        world_size=1 if others is None else 2,
        gather=lambda *values: [values],
        gather_items=lambda mine: {**mine, **(others or {})},
    )
    return SimpleNamespace(ranks=ranks, evaluating=nullcontext, look=lambda of, *given: of(model, *given))


@torch.no_grad()
def test_likelihoods_are_those_of_each_text_alone_on_whichever_rank(model: PackedModel) -> None:
    draw = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 200, (length,), generator=draw).tolist() for length in LENGTHS]
    for number in (0, 3):  # with an end that the model itself would write
        texts[number][-1] = int(model.logits(torch.tensor([texts[number]]))[0, -2].argmax())
    firsts = [0, 4, 1, 1, 7]
    given = [Continued(text, first) for text, first in zip(texts, firsts, strict=True)]
    wanted, greedy = list[float](), list[bool]()
    for text, first in zip(texts, firsts, strict=True):
        begin, log_p = max(1, first), model.logits(torch.tensor([text]))[0].float().log_softmax(-1)
        wanted.append(sum(float(log_p[place - 1, text[place]]) for place in range(begin, len(text))))
        greedy.append(all(int(log_p[place - 1].argmax()) == text[place] for place in range(begin, len(text))))
    told = list[int]()
    found = likelihoods(engine_of(model), given, 12, reserved=0, told=told.append)
    assert [one.log_p for one in found] == pytest.approx(wanted, abs=1e-4)
    assert [one.greedy for one in found] == greedy
    assert True in greedy
    assert False in greedy
    assert told == [1, 2, 5], "rows of 10, of 8, and of 5, 2 and 1 tokens"
    of_first: dict[int, Any] = {number: found[number] for number in (1, 0, 2, 3)}
    assert likelihoods(engine_of(model, 1, of_first), given, 12, reserved=0, told=told.append) == found


def test_a_row_has_as_many_texts_as_fit_and_a_longer_one_alone() -> None:
    assert list(packed([3, 9, 5, 4, 12], 9)) == [[4], [1], [2, 3], [0]]
    assert list(packed([], 9)) == []


def test_a_row_holds_each_text_behind_what_is_reserved_and_without_its_last_token() -> None:
    row = _row([Continued([5, 6, 7, 8], 2), Continued([9, 4], 0)], 2)
    assert row.input.input_ids.tolist() == [[0, 0, 5, 6, 7, 0, 0, 9]]
    assert row.labels.tolist() == [[IGNORE, IGNORE, IGNORE, 7, 8, IGNORE, IGNORE, 4]]
    assert row.input.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert (row.tokens, row.targets, row.lengths) == (4, 3, (5, 3))


def test_a_loss_is_of_the_tokens_of_all_ranks_and_not_of_their_means(model: PackedModel) -> None:
    engine = engine_of(model)
    engine.look = lambda _look, _row: torch.tensor([[6.0, 3.0], [2.0, 1.0]])
    engine.ranks.gather = lambda nats, tokens: [(nats, tokens), (42.0, 7.0)]
    stream: Any = SimpleNamespace(epoch=lambda _number: iter([[SimpleNamespace(documents=(0, 1))]]))
    assert mean_loss(engine, stream, lambda done: None) == ((9 + 42) / (3 + 7), 10)


def test_a_rank_without_rows_has_no_losses_and_waits_for_no_row(model: PackedModel) -> None:
    nothing: Any = SimpleNamespace(epoch=lambda _number: iter([]))
    found = document_losses(engine_of(model), nothing, lambda done: None)
    assert (found.numbers.shape, found.nats.shape, found.tokens.shape) == ((0,),) * 3
    assert (found.numbers.dtype, found.nats.dtype) == (torch.int64, torch.float64)


def test_an_answer_is_shown_by_whole_characters() -> None:
    prompter: Any = SimpleNamespace(text=lambda tokens: bytes(tokens).decode(errors="replace").removesuffix("."))
    shown = list[Any]()
    told = _pieces(prompter, "adapter", shown.append)
    for number, tokens in ((0, "aé"), (1, "b"), (0, ".!")):
        for token in tokens.encode():
            told(number, token)
    pieces = [(one["number"], one["piece"], one["side"]) for one in shown]
    assert pieces == [(0, "a", "adapter"), (0, "é", "adapter"), (1, "b", "adapter"), (0, ".!", "adapter")]


@torch.no_grad()
def test_an_answer_ends_where_the_longest_text_does(model: PackedModel) -> None:
    tokens = torch.randint(3, 200, (20,), generator=torch.Generator().manual_seed(3)).tolist()

    def never(written: Sequence[int]) -> bool:
        return False

    def said(ended: Callable[[Sequence[int]], bool] = never, **limits: Any) -> list[int]:
        (answer,) = continued(engine_of(model), [Opening(tokens, ended)], Sampling(max_tokens=8), **limits)
        return answer

    whole = list(tokens)
    for _ in range(8):
        whole.append(int(model.logits(torch.tensor([whole]))[0, -1].argmax()))
    assert said() == said(longest=99) == whole[20:]
    assert said(longest=23) == whole[20:23]
    assert said(lambda written: len(written) == 2) == whole[20:22]


def test_each_text_of_each_seed_has_its_own_draws() -> None:
    def drawn(seed: int, number: int) -> tuple[int, ...]:
        choose = Sampling(temperature=1.0, seed=seed).chooser(number)
        return tuple(choose(torch.zeros(500)) for _ in range(4))

    every = {(seed, number): drawn(seed, number) for seed in range(3) for number in range(3)}
    assert len(set(every.values())) == 9
    assert drawn(2, 1) == every[2, 1]


def test_a_temperature_below_1_draws_and_makes_the_likeliest_likelier() -> None:
    """Of e to 1 it makes e**2 to 1: 88 % of the draws instead of 73 %. Half of the probability is the likeliest's."""
    for sampling, low, high in (
        (Sampling(temperature=0.5), 830, 930),
        (Sampling(temperature=1, top_p=0.5), 1000, 1000),
    ):
        choose = sampling.chooser(0)
        assert low <= sum(choose(torch.tensor([0.0, 1.0])) for _ in range(1000)) <= high


def test_a_class_is_said_with_its_share_and_several_are_those_that_are_likelier_than_not() -> None:
    def said(logits: list[list[float]], labels: tuple[str, ...] = (), words: Sequence[str] = (), **of: Any) -> str:
        head: Any = SimpleNamespace(labels=labels, head=SimpleNamespace(**{"several": False, **of}))
        return _in_words(head, _Asked([], (), list(words)), torch.tensor(logits))

    names, weights = ("bad", "good", "so-so"), torch.tensor([1.0, 3.0, 4.0]).log().tolist()
    assert said([weights], names) == "so-so (0.500)"
    assert said([weights[::-1]], names) == "bad (0.500)"
    assert said([weights], names, several=True) == "good (0.750) so-so (0.800)", "even odds are not likelier"
    assert said([[-1.0, -2.0, -0.5]], names, several=True) == "none"
    assert said([[-1.23456]]) == "-1.2346"
    assert said([weights, weights[::-1]], names, ["ant", "bee"]) == "ant/so-so bee/bad"


@torch.no_grad()
def test_an_answer_to_a_task_ends_at_a_token_or_at_a_string(model: PackedModel) -> None:
    told, prompts = list[int](), [[5, 9, 3], [7, 20, 8, 30]]

    def written(stops: Sequence[int] = (), until: Sequence[str] = (), longest: int | None = None) -> list[list[int]]:
        prompter = SimpleNamespace(
            ended=lambda tokens: tokens[-1] in stops, text=lambda tokens: ",".join(map(str, tokens))
        )
        opened: Any = SimpleNamespace(
            engine=engine_of(model),
            ranks=SimpleNamespace(world_size=3),
            words=SimpleNamespace(prompter=prompter),
            resolved=SimpleNamespace(longest=longest),
            keeps=True,
        )
        texts = [OpenText(prompts[0], until), OpenText(prompts[1])]
        told.clear()
        return _continued_by(opened, texts, Sampling(max_tokens=6), told=told.append)

    first, second = written()
    assert (len(first), len(second)) == (6, 6)
    assert told == [3] * 6 + [6] * 6, "the other ranks are as far"
    assert written(stops=[first[1]])[0] == first[: first.index(first[1]) + 1]
    both = f"{first[1]},{first[2]}"
    assert written(until=["none", both]) == [first[:3], second]
    assert written(longest=6) == [first[:3], second[:2]]


def test_a_server_says_how_likely_a_text_is_behind_its_first_tokens() -> None:
    asked = list[list[int]]()

    def ranked(tokens: list[int]) -> list[tuple[float, bool]]:
        asked.append(tokens)
        return [(-float(token), token != 7) for token in tokens[1:]]

    told, served = list[int](), ServedModel(SimpleNamespace(ranked=ranked), [2])  # type: ignore[arg-type]
    given = [Continued([5, 7, 4, 6], 2), Continued((5, 3, 7), 0), Continued([9, 8, 7], 1)]
    assert served.likelihoods(given, told.append) == [(-10.0, True), (-10.0, False), (-15.0, False)]
    assert told == [1, 2, 3]
    assert sorted(asked) == [[5, 3, 7], [5, 7, 4, 6], [9, 8, 7]]


def test_a_server_continues_texts_until_their_strings_each_by_its_own_seed() -> None:
    asked = list[dict[str, Any]]()

    def written(model: str, prompt: list[int], **given: Any) -> Iterator[list[int]]:
        asked.append({"model": model, "prompt": prompt, **given})
        yield from ([prompt[0], 1], [2])

    server: Any = SimpleNamespace(model="m", written=written)
    told, heard = list[int](), list[tuple[int, int]]()
    served = ServedModel(server, [9, 2])
    sampling = Sampling(5, 0.5, 0.9, seed=2**31 - 1)
    texts = [OpenText([10, 11], ["x"]), OpenText([20])]
    assert served.continued(texts, sampling, told.append) == [[10, 1, 2], [20, 1, 2]]
    assert told == [1, 2]
    of = {tuple(one["prompt"]): one for one in asked}
    assert [of[10, 11]["seed"], of[20,]["seed"]] == [2**31 - 1, 0]
    assert [of[10, 11]["stop"], of[20,]["stop"]] == [["x"], []]
    assert (of[20,]["max_tokens"], of[20,]["temperature"], of[20,]["top_p"]) == (5, 0.5, 0.9)
    assert of[20,]["stop_token_ids"] == [2, 9]
    served.written([[10, 11]], sampling, lambda number, token: heard.append((number, token)))
    assert heard == [(0, 10), (0, 1), (0, 2)]

    def fails(model: str, prompt: list[int], **_: Any) -> Iterator[list[int]]:
        raise CapstanError("it is gone")

    server.written = fails
    with pytest.raises(CapstanError, match="it is gone"):
        served.continued(texts, sampling, told.append)


@pytest.mark.parametrize(("name", "count"), [("sft", 7 + 5 + 2), ("dpo", 2 + 1 + 3)])
def test_the_means_of_an_evaluation_are_over_the_targets_or_the_pairs_of_all_ranks(name: str, count: int) -> None:
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: a}]}\ntrain: {steps: 1}\n"
    objective = find_objective(parse_config(text, [f"objective.name={name}"]))
    rows: Any = [SimpleNamespace(documents=(0, 1), targets=7), SimpleNamespace(documents=(2,), targets=5)]
    other = (2 if name == "sft" else 3), (1.5,) * (1 + sums_of(objective))
    ranks: Any = SimpleNamespace(
        device="cpu", gather=lambda weight, sums: [(weight, *sums.tolist()), (other[0], *other[1])]
    )
    means, total = objective_means(
        ranks, objective, rows, lambda row: torch.full((1 + sums_of(objective),), row.targets / 2)
    )
    assert total == count
    assert means == pytest.approx({name: (3.5 + 2.5 + 1.5) / count for name in ("loss", *objective.measures)})


def test_what_a_head_is_asked_of_a_text_with_pictures_is_its_end() -> None:
    """The tokens and pictures are those that the run's own renderer makes of the prompt."""
    inputs = {"pixels": torch.ones(3)}
    prompter = SimpleNamespace(judged=lambda prompt: (prompt["tokens"], {prompt["image"]: inputs["pixels"]}))
    resolved = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(kind="pictures")))
    opened: Any = SimpleNamespace(resolved=resolved, words=SimpleNamespace(prompter=prompter))
    head: Any = None
    prompt: Any = {"tokens": [5, 7, 7, 9], "image": "pixels"}
    assert _text(opened, head, prompt) == _Asked([5, 7, 7, 9], [3], (), inputs)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [({"prompt": "a bee"}, "a bee"), ({"prompt": ""}, None), ({"prompt": 5}, None)],
    ids=str,
)
def test_what_a_head_is_asked_of_a_text_is_as_in_its_rows(prompt: Any, read: str | None) -> None:
    tokenizer = byte_tokenizer()
    data = Data.model_validate({"train": [{"path": "x"}], "format": "classified", "labels": ["bad", "good"]})
    resolved = SimpleNamespace(config=SimpleNamespace(data=data))
    opened: Any = SimpleNamespace(resolved=resolved, words=SimpleNamespace(tokenizer=tokenizer))
    for labels in (("bad", "good"), ()):
        head: Any = SimpleNamespace(labels=labels)
        if read is None:
            with pytest.raises(ConfigError, match="a prompt cannot be read: "):
                _text(opened, head, prompt)
            continue
        asked = _text(opened, head, prompt)
        assert tokenizer.decode(asked.tokens, skip_special_tokens=True) == read
        assert (asked.places, asked.words, asked.inputs) == ([len(asked.tokens) - 1], (), None)
