"""The answers of a step: what is asked for, what is kept of it, who judges it, and how the ranks wait for it."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import commit as commit_checkpoint
from tests.material import Workshop
from tests.unit.evaluate.test_passes import engine_of
from tests.unit.evaluate.test_rollouts import choices
from tests.unit.export.test_served import stub
from tests.unit.model.test_decoding import packed as packed_model
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.config.objective import RolloutSettings
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, open_dataset
from trainer.data.dataset.rollouts import Rollout, Rollouts, chapter_figures, commit, is_committed, is_judged
from trainer.errors import ConfigError, NonFiniteLoss, NotFound, Stopped
from trainer.evaluate.generation import Sampling
from trainer.evaluate.program import Ask
from trainer.evaluate.rollout import making, serving
from trainer.evaluate.rollout.making import Asked, Drawn, Making, OwnSampler, Request, ServerSampler
from trainer.evaluate.rollout.published import adapter_named, published, served_name
from trainer.model.micro_batch import IGNORE, MicroBatch
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.run.records import add_record, claim_generation
from trainer.store.store import open_store
from trainer.train import supply
from trainer.tuning.method import ExportedFiles
from trainer.tuning.objective import find_objective

GRPO = ("objective.name=grpo", "rollout.reward=length", "rollout.max_tokens=8", "rollout.answers=2")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("making"))


class One:
    """The ranks of a process alone."""

    rank, world_size = 0, 1

    def on_first(self, action: Any) -> Any:
        return action()

    def agreeing(self) -> Any:
        return nullcontext()

    def gather(self, *values: Any) -> list[Any]:
        return [values]

    def gather_items(self, mine: dict[int, Any]) -> dict[int, Any]:
        return mine


def made(workshop: Workshop, name: str, *overrides: str) -> tuple[Making, Config]:
    config = workshop.config(name, *GRPO, *overrides)
    resolved, keys = resolve(config, resolve_base(config.model)), workshop.prepare(config)
    return Making.of(resolved, workshop.store.sub(name), keys.train, keys.eval), config


def asking(making: Making, lengths: Sequence[int], longest: int | None, **of: Any) -> Making:
    """The same, where every step has prompts of these lengths, over a base with positions for `longest` tokens."""
    asked = [Asked([7] * length, [9]) for length in lengths]
    resolved: Any = SimpleNamespace(config=making.resolved.config, longest=longest)
    return replace(making, resolved=resolved, prompts=SimpleNamespace(of=lambda step: asked), **of)


def test_answers_are_asked_for_as_far_as_a_row_and_the_base_have_room(workshop: Workshop) -> None:
    making, _ = made(workshop, "rooms", "rollout.temperature=0.5")
    lengths = [10, 60, 63, 64, 70, 35]
    for longest, rooms in ((None, [8, 4, 1, 8]), (256, [8, 4, 1, 8]), (40, [8, 5])):
        (wanted,) = asking(making, lengths, longest).wanted(0)
        assert wanted.request.room == rooms
        kept = [length for length in lengths if length < min(64, longest or 64)]
        assert [len(prompt) for prompt in wanted.request.prompts] == kept
        assert [one.prompt for one in wanted.asked] == wanted.request.prompts
        assert (wanted.request.answers, wanted.request.temperature) == (2, 0.5)
        assert wanted.request.stops == making.prompter.stops
    seeds = [asking(making, lengths, None).wanted(chapter)[0].request.seed for chapter in range(40)]
    assert len(set(seeds)) == 40
    assert 2**30 < max(seeds) < 2**31


@pytest.mark.parametrize(
    ("trained", "prompt", "reference"),
    [
        ([1, 2], [4], [5, 6]),
        ([3], [4, 5, 6], [7]),
        ([1, 3, 4], [4, 5, 6], [7, 8]),
        ([0, 1, 2], [4], [5, 6]),
    ],
    ids=["the middle", "the end", "the last of two answers", "all"],
)
def test_a_prompt_is_what_stands_before_the_last_answer(
    trained: list[int], prompt: list[int], reference: list[int]
) -> None:
    stored = np.arange(4, 9, dtype=np.uint32)
    stored[trained] |= TARGET_BIT
    assert making._asked(stored) == Asked(prompt, reference)


def test_held_out_prompts_are_answered_by_the_likeliest_tokens_where_an_evaluation_is_due(workshop: Workshop) -> None:
    making, config = made(
        workshop, "due", "data.held_out=0.2", "rollout.held_out=3", "rollout.updates=2", "eval.every=3"
    )
    held_out = workshop.prepare(config).eval
    assert held_out is not None
    (stored,) = [open_dataset(workshop.store, held_out).documents(block) for block in range(1)]
    documents = [(row & ID_BITS).tolist() for row in stored]
    assert len(making.held_out) == 3 < len(documents)
    assert all([*one.prompt, *one.reference] in documents for one in making.held_out)
    found = [asking(making, [5], None, held_out=making.held_out).wanted(chapter) for chapter in range(6)]
    assert [len(wanted) for wanted in found] == [2, 2, 1, 2, 2, 1], "of the updates after 0, 3, 6 and 9"
    request = found[0][1].request
    assert (request.answers, request.temperature, len(request.prompts)) == (1, 0.0, 3)
    assert made(workshop, "never", "data.held_out=0.2", "eval.every=3")[0].held_out == ()
    every = made(workshop, "every", "data.held_out=0.2", "rollout.held_out=500", "eval.every=3")[0].held_out
    assert sorted([*one.prompt, *one.reference] for one in every) == sorted(documents), "each of them once"


def test_answers_of_other_settings_or_data_lie_elsewhere(workshop: Workshop) -> None:
    """Else a run that is begun anew would learn from answers to other prompts, or by another reward."""

    def folder(*overrides: str, dataset: str = "d") -> str:
        config = workshop.config("where", *GRPO, *overrides)
        resolved = resolve(config, resolve_base(config.model))
        return making.rollouts_of(resolved, workshop.store.sub("where"), dataset).uri

    others = ["run.seed=9", "train.global_batch=8", "model.dtype=fp32", "quant.type=int8", "tuning.rank=4"]
    others += ["rollout.reward=exact", "rollout.temperature=0.5", "objective.clip_high=0.3"]
    assert len({folder(), folder(dataset="e"), *map(folder, others)}) == 2 + len(others)
    assert folder("train.steps=99", "optim.lr=1") == folder()


DRAWN = [
    [Drawn([9, 9, 2], [-0.5, -0.25, -1.0]), Drawn([9] * 4, [-1.0] * 4)],
    [Drawn([2], [-2.0]), Drawn([9, 2], [-0.5, -0.5])],
]


def test_a_chapter_has_the_rewards_and_the_figures_of_its_answers(workshop: Workshop) -> None:
    whole, _ = made(workshop, "chapter")
    rewards, seen = iter(([1.0, 0.0, 0.5, 0.25], [0.75])), list[Any]()

    def judged(*texts: Any) -> list[float]:
        seen.append(texts)
        return next(rewards)

    making = replace(whole, scoring=SimpleNamespace(rewards=judged))  # type: ignore[arg-type]
    trained = making.wanted(0)[0]
    asked = trained.asked[:2]
    wanted = trained._replace(asked=asked)
    held_out = wanted._replace(asked=asked[:1], request=wanted.request._replace(answers=1))
    assert making.commit(5, 3, [wanted, held_out], [DRAWN, [DRAWN[0][:1]]], time.monotonic() - 50)
    text = making.prompter.text
    (prompts, said, references), (one, _, _) = seen
    assert prompts == [text(asked[0].prompt)] * 2 + [text(asked[1].prompt)] * 2
    assert references == [text(asked[0].reference)] * 2 + [text(asked[1].reference)] * 2
    assert said == [text(drawn.tokens) for answers in DRAWN for drawn in answers]
    assert one == [text(asked[0].prompt)]
    figures = chapter_figures(making.place, 5)
    assert 50 <= figures.pop("sampling_seconds") < 80
    assert 0 <= figures.pop("reward_seconds") < 60
    assert figures == pytest.approx(
        {
            "adapter": 3,
            "reward": 1.75 / 4,
            "reward_spread": (0.5 + 0.125) / 2,
            "answer_tokens": 2.5,
            "cut": 1 / 4,
            "held_out_reward": 0.75,
        }
    )
    rollouts = Rollouts(making.place, 6)
    columns = rollouts.read([5 * 2**32 + number for number in range(4)])
    objective: Any = making.resolved.objective
    advantages = objective.advantages(np.array([[1.0, 0.0], [0.5, 0.25]]), None)
    assert columns[:, 0].tolist() == [log_p for answers in DRAWN for one in answers for log_p in one.log_p]
    assert columns[:, 1] == pytest.approx(np.repeat(advantages, [3, 4, 1, 2]))
    tokens = [
        (row & ID_BITS).tolist() for row in open_dataset(making.place, layout.chapter_of_rollouts(5)).documents(0)
    ]
    assert tokens[1] == [*asked[0].prompt, *DRAWN[0][1].tokens]
    assert tokens[2] == [*asked[1].prompt, *DRAWN[1][0].tokens]
    rewards = iter([[0.0] * 4])
    assert not making.commit(5, 3, [wanted], [DRAWN], 0.0), "another process was faster"


def test_only_a_server_judges_before_answers_are_committed(workshop: Workshop) -> None:
    for teacher, asked in (
        ("teacher: /models/big", False),
        ("teacher_run: big", False),
        ("teacher: 'http://no:1'", True),
    ):
        config = workshop.config("judge", f"objective={{name: opd, {teacher}}}", *GRPO[1:])
        resolved: Any = SimpleNamespace(objective=find_objective(config), base=None)
        with pytest.raises(ConfigError, match="objective.teacher") if asked else nullcontext():
            assert making.judge_of(resolved, Asked([7], [9])) is None


def test_the_figures_of_a_chapter_say_how_far_the_model_is_from_its_judge(workshop: Workshop) -> None:
    def judge(body: dict[str, Any]) -> Any:
        places = [None, *({str(token): {"logprob": -0.5}} for token in body["prompt"][1:])]
        return {"choices": [{"prompt_logprobs": places, "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}]}

    whole, _ = made(workshop, "judged")
    with stub(judge, "big") as url:
        opd = ("objective={name: opd, teacher: 'http://teacher:8000#big'}", *GRPO[1:])
        config = workshop.config("judged", *opd)
        resolved = resolve(config, resolve_base(config.model))
        scoring: Any = SimpleNamespace(rewards=lambda *_: [0.0] * 4)
        server = making.CompletionsServer.find("objective.teacher", f"{url}#big")
        judged = replace(whole, resolved=resolved, scoring=scoring, judge=server)
        wanted = judged.wanted(0)[0]
        judged.commit(0, 0, [wanted._replace(asked=wanted.asked[:2])], [DRAWN], 0.0)
    log_p = np.array([log_p for answers in DRAWN for one in answers for log_p in one.log_p])
    assert chapter_figures(judged.place, 0)["divergence"] == pytest.approx((log_p + 0.5).mean())
    assert Rollouts(judged.place, 1).read(range(4))[:, 1] == pytest.approx(-0.5 - log_p)


@torch.no_grad()
def test_ranks_sample_by_seed_and_number_and_note_what_the_model_thinks_of_each_token() -> None:
    model, begun = packed_model("llama"), list[int]()
    prompts, rooms, longest = [[5, 9, 3], [7, 20, 8, 30, 11]], [3, 5], 9

    def expected(stops: frozenset[int]) -> list[list[Drawn]]:
        found = list[list[Drawn]]()
        for first, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            found.append([])
            for number in (2 * first, 2 * first + 1):
                choose, one = Sampling(temperature=0.7, seed=11).chooser(number), Drawn([], [])
                while len(one.tokens) < min(room, longest - len(prompt)) and not stops & set(one.tokens[-1:]):
                    logits = model.logits(torch.tensor([[*prompt, *one.tokens]]))[0, -1].float()
                    one.tokens.append(choose(logits))
                    one.log_p.append(float(logits.log_softmax(-1)[one.tokens[-1]]))
                found[-1].append(one)
        return found

    stop = expected(frozenset())[1][1].tokens[1]
    for stops in (frozenset[int](), frozenset({stop})):
        request, wanted = Request(prompts, 2, rooms, 0.7, 11, stops), expected(stops)
        begun.clear()
        found = OwnSampler(engine_of(model), longest, lambda: begun.append(1)).sample(request)
        assert [[one.tokens for one in answers] for answers in found] == [
            [one.tokens for one in answers] for answers in wanted
        ]
        for ours, theirs in zip(found, wanted, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.log_p == pytest.approx(other.log_p, abs=1e-4)
        assert len(begun) == sum(len(one.tokens) for answers in wanted for one in answers)


def test_servers_answer_until_the_run_has_ended(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chapters by the adapter before the first update; the third wants a newer one, which never comes."""
    told, closed, run = list[str](), list[int](), workshop.store.sub("served")
    load, removed = ServerSampler.load, iter([True])

    def load_once_more(self: ServerSampler, step: int) -> None:
        if next(removed, False):
            raise NotFound("the adapter has been removed meanwhile")
        load(self, step)

    monkeypatch.setattr(ServerSampler, "load", load_once_more)
    monkeypatch.setattr(making.Scoring, "rewards", lambda self, prompts, said, wanted: [0.5] * len(said))
    monkeypatch.setattr(making.Scoring, "close", lambda self: closed.append(1))
    monkeypatch.setattr(serving, "_SAY_SECONDS", 0.0)
    monkeypatch.setattr(serving, "_LOOK_SECONDS", 0.0)
    waits = "the answers of step 3 wait for a newer adapter"

    def tell(said: dict[str, Any]) -> None:
        told.append(said["log"])
        if told.count(waits) == 2:
            add_record(run, claim_generation(run), "end", outcome="finished", reason="", step=2)

    def answer(body: dict[str, Any]) -> Any:
        return 404 if isinstance(body.get("prompt"), str) else choices(body)  # it finds no adapter by its name

    with stub(answer) as url:
        config = workshop.config("served", *GRPO, f"rollout.engine=[{url}]", "train.steps=3")
        run.put(layout.CONFIG, dump_config(config).encode())
        resolved, keys = resolve(config, resolve_base(config.model)), workshop.prepare(config)
        place = making.rollouts_of(resolved, run, keys.train)
        for name in ("adapter_config.json", "PUBLISHED"):
            place.put(f"adapters/step-000000000/{name}", b"{}")
        found = serving.roll_out(Ask("rollout", run.uri), tell)
    assert (found, closed) == ({"steps": 2, "made": 2}, [1])
    assert adapter_named(served_name(place, 0, "0" * 8)) is not None, "a server finds it by the name of its folder"
    assert [is_committed(place, chapter) for chapter in range(3)] == [True, True, False]
    assert told == [
        "the answers of step 1 are there, by the adapter of step 0",
        "the answers of step 2 are there, by the adapter of step 0",
        *[waits] * 2,
    ]
    assert chapter_figures(place, 1)["adapter"] == 0


def test_a_start_that_failed_is_no_end_of_the_run(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    assert not serving.has_finished(run)
    for outcome in ("failed", "stopped", "finished"):
        add_record(run, claim_generation(run), "end", outcome=outcome, reason="")
        assert serving.has_finished(run) is (outcome == "finished")
    claim_generation(run)
    assert not serving.has_finished(run), "it has begun again"


def test_answers_are_made_from_the_oldest_checkpoint_on(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    assert serving.oldest(run) == 0
    for step in (4, 2, 6):
        commit_checkpoint(run, step)
    assert serving.oldest(run) == 2


class Judging:
    """A teacher of one rank that gives every target of document n the log p -n - 1."""

    def __init__(self, resolved: Any) -> None:
        self.resolved, self.ranks = resolved, One()
        self.engine = SimpleNamespace(
            look=lambda _look, batch: (
                -1.0 - (torch.tensor(batch.documents) % 2**32).repeat_interleave(targets_of(batch))
            )
        )

    def computing(self) -> Any:
        return nullcontext()

    def facts(self) -> dict[str, Any]:
        return {"base": "big"}


def targets_of(batch: Any) -> torch.Tensor:
    """The number of targets of each document of a row."""
    borders = batch.input.segments.borders
    trained = batch.labels[0] >= 0
    return torch.tensor([int(trained[borders[n] : borders[n + 1]].sum()) for n in range(len(batch.documents))])


@pytest.mark.parametrize("finite", [True, False])
def test_a_teacher_judges_every_chapter_until_the_run_has_finished(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, finite: bool
) -> None:
    name, told = f"teacher-{finite}", list[str]()
    config = workshop.config(name, "objective={name: opd, teacher: /models/big}", *GRPO[1:], "train.steps=4")
    resolved, run = resolve(config, resolve_base(config.model)), workshop.store.sub(name)
    teacher = Judging(resolved)
    if not finite:
        teacher.engine.look = lambda _look, batch: torch.tensor([math.nan, *[-1.0] * (batch.targets - 1)])
    monkeypatch.setattr(serving, "open_teacher", lambda *_: teacher)
    place = making.rollouts_of(resolved, run, workshop.prepare(config).train)
    for chapter in range(2):
        commit(
            place, chapter, [Rollout([7, 5], [9, 2], [-0.5, -0.75], 0.0, {}), Rollout([7], [4], [-1.0], 0.0, {})], {}
        )
    add_record(run, claim_generation(run), "end", outcome="finished", reason="", step=4)
    ask = Ask("judge", "", config=dump_config(config))
    if not finite:
        with pytest.raises(NonFiniteLoss, match="gives an answer of step 1 no finite log-probability"):
            serving.judge_answers(ask, lambda said: None)
        return
    assert serving.judge_answers(ask, lambda said: told.append(said["log"])) == {"steps": 2, "made": 2}
    assert [is_judged(place, chapter) for chapter in range(2)] == [True, True]
    judged = Rollouts(place, 2, judged=True)
    assert judged.read([0, 1])[:, 1].tolist() == [-0.5, -0.25, -1.0]
    assert judged.figures(1)["divergence"] == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert told[1:] == [
        *(f"the answers of step {step} are judged" for step in (1, 2)),
        "the answers of step 3 are not there yet",
    ]
    assert serving.judge_answers(ask, lambda said: None) == {"steps": 2, "made": 0}


@torch.no_grad()
def test_a_teacher_gives_the_log_probability_of_each_target(workshop: Workshop) -> None:
    model, tokens = packed_model("llama"), torch.tensor([[7, 5, 9, 2, 4]])
    labels = torch.tensor([[IGNORE, 9, 2, IGNORE, IGNORE]])
    found = serving._log_p(model, replace(MicroBatch.of_text(tokens), labels=labels, targets=2))
    log_p = model.logits(tokens)[0].float().log_softmax(-1)
    assert found.tolist() == pytest.approx([float(log_p[1, 9]), float(log_p[2, 2])], abs=1e-4)


def waiting(folder: Any, rollout: RolloutSettings, ranks: Any = None, **of: Any) -> Any:
    """A start whose ranks wait for answers."""
    return SimpleNamespace(
        ranks=ranks or One(),
        folder=folder,
        config=SimpleNamespace(rollout=rollout),
        stop=SimpleNamespace(requested=0),
        **of,
    )


def test_only_the_first_update_of_a_chapter_records_what_sampling_it_took(tmp_path: Path) -> None:
    run, looked = open_store(str(tmp_path)), list[int]()
    figures = {"adapter": 1, "reward": 0.5, "sampling_seconds": 2.0, "reward_seconds": 1.0, "held_out_reward": 0.25}
    commit(run, 1, [Rollout([7], [4], [-1.0], 0.0, {})], figures)
    rollouts: Any = Rollouts(run, 2)
    rollouts.chapters.look = lambda: looked.append(1)
    start = waiting(run, RolloutSettings(updates=2))
    rest = {name: value for name, value in figures.items() if name != "adapter"}
    assert supply._ready(start, rollouts, 2) == {**rest, "lag": 1}
    assert supply._ready(start, rollouts, 3) == {"reward": 0.5, "lag": 2}
    assert looked == [1, 1], "what a rank has not seen before is there now"


def test_ranks_that_wait_say_so_and_end_when_any_of_them_is_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, pulses = list[Any](), list[Any]()
    monkeypatch.setattr(supply, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(supply, "_SAY_SECONDS", 0.0)
    ranks: Any = One()
    ranks.gather = lambda there, stop: [(there, stop), (False, len(told) == 2)]
    metrics = SimpleNamespace(write=lambda kind, **of: told.append((kind, of)))
    start = waiting(
        open_store(str(tmp_path)),
        RolloutSettings(updates=2),
        ranks,
        pulse=lambda *of: pulses.append(of),
        metrics=metrics,
    )
    with pytest.raises(Stopped, match="stopped at step 4, while answers were waited for"):
        supply._ready(start, SimpleNamespace(is_ready=lambda chapter: chapter != 2), 4)  # type: ignore[arg-type]
    assert told == [("waiting", {"step": 4, "what": "answers"})] * 2
    assert pulses == [("compile", 5)] * 2


def test_ranks_sample_a_chapter_once_and_the_first_commits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done, pulses = open_store(str(tmp_path)), list[Any](), list[Any]()

    def sampler(engine: Any, longest: int, begin: Any) -> Any:
        begin()
        return SimpleNamespace(sample=lambda request: (engine, longest, request))

    monkeypatch.setattr(supply, "OwnSampler", sampler)

    class Stub:
        def wanted(self, chapter: int) -> list[Any]:
            return [SimpleNamespace(request=f"{kind} of {chapter}") for kind in ("train", "held-out")]

        def commit(self, chapter: int, adapter: int, wanted: Any, drawn: Any, began: float) -> None:
            done.append((chapter, adapter, len(wanted), drawn))
            commit(run, chapter, [Rollout([7], [4], [-1.0], 0.0, {})], {"adapter": adapter})

    start = waiting(
        run, RolloutSettings(updates=2), resolved=SimpleNamespace(longest=40), pulse=lambda *of: pulses.append(of)
    )
    rollouts, stub_of_making, engine = Rollouts(run, 3), Stub(), object()
    found = [supply._by_ranks(start, rollouts, stub_of_making, engine, step) for step in (2, 3, 4)]  # type: ignore[arg-type]
    assert found == [{"lag": 0}, {"lag": 1}, {"lag": 0}]
    assert done == [
        (chapter, step, 2, [(engine, 40, f"train of {chapter}"), (engine, 40, f"held-out of {chapter}")])
        for chapter, step in ((1, 2), (2, 4))
    ]
    assert pulses == [("evaluate", 0)] * 2


def test_the_first_rank_has_what_chapters_are_made_of_unless_servers_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply.Making, "of", lambda *of: of)
    datasets: Any = SimpleNamespace(train="data", eval="held")
    first, second = One(), One()
    second.rank = 1
    for ranks, wanted in ((first, ("resolved", "run", "data", "held")), (second, None)):
        start = waiting("run", RolloutSettings(), ranks, resolved="resolved")
        found: Any = supply.supply_of(start, datasets, "rollouts")  # type: ignore[arg-type]
        assert (found.func, found.args) == (supply._by_ranks, (start, "rollouts", wanted))
    start = waiting("run", RolloutSettings(engine=["http://a:1"]))
    found = supply.supply_of(start, datasets, "rollouts")  # type: ignore[arg-type]
    assert (found.func, found.args) == (supply._by_servers, (start, "rollouts"))


def learning(values: torch.Tensor, borders: Sequence[int]) -> Any:
    """The first of two ranks that have parts of a parameter (2, 3), the second one from `borders[1]` on."""
    begin, middle, end = borders
    size = max(middle - begin, end - middle)
    parts = [torch.nn.functional.pad(part, (0, size - len(part))) for part in (values[:middle], values[middle:])]

    class Two(One):
        world_size, device = 2, torch.device("cpu")

        def gather(self, *own: Any) -> list[Any]:
            assert own == (begin, middle)
            return [own, (middle, end)]

        def gather_tensor(self, mine: torch.Tensor) -> torch.Tensor:
            assert torch.equal(mine, parts[self.rank])
            return torch.stack(parts)

    part = SimpleNamespace(name="a", begin=begin, end=middle, shape=(2, 3), states={"master": values[:middle]})
    return SimpleNamespace(ranks=Two(), partitions=lambda: [part])


@pytest.mark.parametrize("borders", [(0, 2, 6), (0, 5, 6)])
def test_an_adapter_is_published_whole_and_those_that_are_too_old_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, borders: tuple[int, int, int]
) -> None:
    place, values, per_expert = open_store(str(tmp_path)), torch.arange(6.0) / 3, list[int]()
    described = iter([b"{}", b'{"target_parameters": ["x"]}'] + [b"{}"] * 9)

    def export(weights: dict[str, torch.Tensor], model: Any) -> ExportedFiles:
        assert model == "the model" or model.dtype == "bf16"
        assert torch.equal(weights["a"], values.view(2, 3).bfloat16())
        return ExportedFiles("peft", "", {"adapter_model.safetensors": b"a", "adapter_config.json": next(described)})

    monkeypatch.setattr(supply, "for_whole_class", lambda files, model: files)
    monkeypatch.setattr(supply, "per_expert_files", lambda files, model: per_expert.append(1) or files)
    model = SimpleNamespace(dtype="bf16")
    config = SimpleNamespace(model=model, rollout=RolloutSettings(engine=["http://a:1"], max_lag=1))
    resolved: Any = SimpleNamespace(config=config, method=SimpleNamespace(export=export))
    engine = learning(values, borders)
    for step in range(5):
        supply.publish(place, engine, resolved, step)
    assert published(place) == [2, 3, 4], "the next chapter may use one that is an update older, and so may the last"
    assert place.get("adapters/step-000000004/adapter_model.safetensors") == b"a"
    assert len(per_expert) == 1
    start = waiting(place, config.rollout, resolved=resolved)
    ready: Any = SimpleNamespace(
        place=place,
        is_ready=lambda chapter: True,
        figures=lambda chapter: {"adapter": 4},
        chapters=SimpleNamespace(look=lambda: None),
    )
    assert supply._by_servers(start, ready, engine, 5) == {"lag": 1}
    assert published(place) == [3, 4, 5], "servers get the adapter of the update that waits"
    engine.partitions = None
    supply.publish(place, engine, resolved, 5)
