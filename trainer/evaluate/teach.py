"""`capstan teach` on one rank: it stores a teacher's log-probabilities of a run's data beside the data, before the run.

The teacher is sharded over the ranks as a run's base is. Each rank computes blocks of the data by itself and writes
each block as soon as it is whole. So nothing is gathered, and existing blocks are not computed again, whatever number
of ranks wrote them. A vLLM server may be the teacher instead: then one process asks it for its likeliest tokens of
several documents at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.base.base import Base
from trainer.base.find.check import content_of
from trainer.base.find.locate import resolve_base, resolve_base_alike
from trainer.config import Config, assignment, override, parse_config
from trainer.data.compile.prepare import load_tokenizer, prepare
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, Dataset, open_dataset
from trainer.data.dataset.taught import (
    Likeliest,
    TeacherRecord,
    begin_teacher,
    finish_teacher,
    teacher_folder,
    write_block,
    written_blocks,
)
from trainer.data.order.settings import Order, eval_order
from trainer.data.order.stream import block_stream
from trainer.errors import ConfigError, NonFiniteLoss, shown
from trainer.evaluate.models import open_model
from trainer.evaluate.program import Ask, Tell
from trainer.model.divergence import TopK
from trainer.model.head import IGNORE
from trainer.model.micro_batch import MicroBatch, Role
from trainer.model.packed import PackedModel
from trainer.plan.assemble import assemble, attention_of, check_same_base, choose_sharding, join_run
from trainer.plan.beginning import beginning_place
from trainer.plan.resolve import Resolved, resolve
from trainer.processes.ranks import Team
from trainer.run import layout
from trainer.servers import CompletionsServer
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.state.zero.engine import Engine
from trainer.store.json_text import digest_of
from trainer.store.store import Store, open_run_store
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.teacher import Teacher, teacher_of

_PROBE = "The 1234 words, don't_you?\n\n\tfor (i = 0; i < 10; i++) { naïve; 速い }  ÀÉ é ﬁ Ω 👍🏽\r\n"
"""A text in which tokenizers of one vocabulary may differ."""


def teach(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Have the teacher of `ask.config` write what the store lacks. Collective.

    Raises:
        ConfigError: the teacher has another tokenizer than the run's base, or another one has written under its name.
        NonFiniteLoss: the teacher gives a token no finite log-probability.
        CapstanError: data, bases or runs cannot be opened.
    """
    config = parse_config(ask.config, name="the run's settings")
    teacher = teacher_of(find_objective(config))
    assert teacher is not None, "the launcher refuses other objectives"
    if teacher.is_server:
        return teach_by_server(config, teacher, tell)
    store, base = open_run_store(config), resolve_base(config.model)
    model = open_teacher(config, base, teacher, tell)
    ranks = model.ranks
    key = ranks.on_first(lambda: prepare(config, base, store).train)
    vocabulary = min(base.architecture.vocabulary, model.resolved.base.architecture.vocabulary)
    dataset = open_dataset(store, key)
    folder = teacher_folder(store.sub(layout.dataset(key)), teacher.to_json())
    record = ranks.on_first(
        lambda: begin_teacher(folder, teacher, {**model.facts(), "vocabulary": vocabulary}, vocabulary)
    )
    order = replace(eval_order(config, dataset.manifest), reserved=model.resolved.method.virtual.reserved)
    with model.computing():
        written = TeacherPass(model, dataset, folder, record, order, config.train.micro_batch, teacher, tell).run()
    return ranks.on_first(lambda: finished(folder, record, teacher, dataset, written))


@dataclass(frozen=True)
class TeacherModel:
    """The teacher on this rank, with the resolved settings that it computes under.

    If the teacher is a run, it also has the checkpoint that was loaded.
    """

    resolved: Resolved
    ranks: Team
    engine: Engine
    manifest: CheckpointManifest | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, it computes as the base alone, or with what the run has learnt, and without dropout."""
        as_it_is = nullcontext() if self.manifest else self.resolved.method.switched_off(self.engine.model)
        with as_it_is, self.engine.evaluating():
            yield

    def facts(self) -> dict[str, Any]:
        """Return everything that decides the values, beside the settings. Reads samples of the base's weights."""
        config, base = self.resolved.config, self.resolved.base
        quant = config.quant
        return {
            "base": base.fingerprint,
            "weights": content_of(base),
            "dtype": config.model.dtype,
            "quant": {"type": quant.type, "block_size": quant.block_size, "double": quant.double},
            **(_learnt(self.manifest) if self.manifest else {}),
        }


def _learnt(manifest: CheckpointManifest) -> dict[str, Any]:
    """Return the facts that decide the values of a run's checkpoint: another run may have its name by now."""
    shards = digest_of([shard.sha256 for shard in manifest.shards])
    return {"step": manifest.step, "dataset": manifest.dataset, "shards": shards}


def open_teacher(config: Config, base: Base, teacher: Teacher, tell: Tell) -> TeacherModel:
    """Open the teacher, sharded over these ranks, for a run over `base`. Collective.

    Raises `ConfigError` if its tokenizer is another.
    """
    opened = partial(_open_run, store=open_run_store(config)) if teacher.is_run else _open_base
    model = opened(config, teacher, log=lambda text: tell({"log": text}))
    model.ranks.on_first(lambda: _check_tokenizer(teacher, model.resolved.base, base))
    return model


def _open_base(config: Config, teacher: Teacher, log: Callable[[str], None]) -> TeacherModel:
    """Open the teacher's base, under the run's other settings, with an adapter that stays off."""
    quant = {} if teacher.quant is None else {"type": teacher.quant}
    config = override(
        config,
        assignment("objective", {}),
        assignment("rollout", {}),
        assignment("tuning", {"rank": 1}),
        assignment("model", {"base": teacher.name, "dtype": config.model.dtype, "attention": config.model.attention}),
        assignment("sharding.sequence_parallel", 1),
        *(assignment(f"quant.{name}", value) for name, value in quant.items()),
    )
    ranks = join_run(config)
    base = resolve_base_alike(config.model, ranks)
    with ranks.agreeing():
        resolved = resolve(config, base)
    check_same_base(resolved.base, ranks.world)
    attention = attention_of(resolved, ranks.device)
    engine, _ = assemble(resolved, ranks, attention, choose_sharding(resolved, ranks, accumulation=1), log)
    return TeacherModel(resolved, ranks, engine)


def _open_run(config: Config, teacher: Teacher, store: Store, log: Callable[[str], None]) -> TeacherModel:
    """Open the run at the requested checkpoint, or at the newest."""
    run, step = beginning_place(store, teacher.name, teacher.setting)
    # The teacher may be somebody else's run, whose settings must not put a copy of a base of this machine into their
    # store.
    ours = [assignment("cluster", config.cluster.model_dump(mode="json")), assignment("quant.cache", False)]
    opened = open_model(run, step, ours, base_alone=False, log=log)
    opened.load()
    return TeacherModel(opened.resolved, opened.ranks, opened.engine, opened.manifest)


def _check_tokenizer(teacher: Teacher, theirs: Base, ours: Base) -> None:
    tokenizers = [load_tokenizer(base) for base in (theirs, ours)]
    there, here = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if there == here:
        ids = [tokenizer.encode(_PROBE, add_special_tokens=False) for tokenizer in tokenizers]
        if _merges(tokenizers[0]) == _merges(tokenizers[1]) and ids[0] == ids[1]:
            return
        raise ConfigError(
            f"{teacher.setting}: {shown(teacher.name)} has the vocabulary of model.base: {ours.name}, and makes other"
            " tokens of a text with it. Give a teacher with the same tokenizer."
        )
    token = next(token for token in sorted(there.keys() | here.keys()) if there.get(token) != here.get(token))
    raise ConfigError(
        f"{teacher.setting}: {shown(teacher.name)} has another tokenizer than model.base: {ours.name}: {token!r} is"
        f" {_number(there.get(token))} there and {_number(here.get(token))} here. Give a teacher with the same"
        " tokenizer."
    )


def _merges(tokenizer: Any) -> Any:
    """Return the pairs that a tokenizer joins, in their order.

    None means that it joins none, or has no file of its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")


def _number(token: int | None) -> str:
    return "no token" if token is None else f"token {token}"


def by_document(batch: MicroBatch, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return the values (targets, ...) of each document, which is one segment."""
    trained = (batch.labels[0] != IGNORE).numpy()
    ends = np.concatenate([[0], np.cumsum(trained)])[batch.input.segments.borders]
    return [values[ends[segment] : ends[segment + 1]] for segment in batch.input.segments.of(Role.DOCUMENT)]


@dataclass(frozen=True)
class TeacherPass:
    """The teacher's pass over the blocks of `dataset` that `folder` lacks, in rows of `order`, on this rank."""

    model: TeacherModel
    dataset: Dataset
    folder: Store
    record: TeacherRecord
    order: Order
    micro_batch: int
    teacher: Teacher
    tell: Tell

    def run(self) -> int:
        """Write all these blocks. Returns how many there were. Collective."""
        ranks, blocks = self.model.ranks, len(self.dataset.blocks) - 1
        there = ranks.on_first(lambda: written_blocks(self.folder))
        missing = [block for block in range(blocks) if block not in there]
        for first in range(0, len(missing), ranks.world_size):
            turn = missing[first : first + ranks.world_size]
            mine = turn[ranks.rank] if ranks.rank < len(turn) else None
            documents = self._compute(mine)
            ranks.together(partial(self._write, mine, documents))
            done = blocks - len(missing) + first + len(turn)
            self.tell({"progress": "blocks of the data", "done": done, "total": blocks})
        return len(missing)

    def _compute(self, block: int | None) -> list[Likeliest]:
        """Compute the teacher's output for each document of a block, while the other ranks pass as many rows.

        Collective.
        """
        rows, padding = list[MicroBatch](), None
        stream = block_stream(self.dataset, 0 if block is None else block, self.order, self.micro_batch)
        if block is not None:
            rows = [batch for step in stream.epoch(0) for batch in step]
        most = int(max(count for (count,) in self.model.ranks.gather(float(len(rows)))))
        found = dict[int, Likeliest]()
        for number in range(most):
            if number < len(rows):
                batch = rows[number]
            else:
                batch = padding = padding or stream.padding()
            values = self.model.engine.look(self._look, batch).cpu().numpy()
            found.update(zip(batch.documents, map(self._likeliest, by_document(batch, values)), strict=True))
        return [found[number] for number in sorted(found)]

    def _look(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """Return (targets, 2k + 1), see `LossHead`."""
        asked = TopK(self.record.k, self.record.vocabulary, self.teacher.temperature)
        return model.head(model.hidden(batch.input), batch.labels, batch.places, top=asked)

    def _likeliest(self, values: NDArray[np.float32]) -> Likeliest:
        return Likeliest(values[:, : self.record.k].astype(np.int64), values[:, self.record.k :])

    def _write(self, block: int | None, documents: Sequence[Likeliest]) -> None:
        if block is None:
            return
        # Only the tail may be nothing, when the whole vocabulary is stored.
        if any(not np.isfinite(log_p[:, :-1]).all() for _, log_p in documents):
            raise NonFiniteLoss(
                f"{self.teacher.setting}: {shown(self.teacher.name)} gives a token of block {block} of the data no"
                " finite log-probability, so it cannot teach. Try model.dtype: bf16, or another teacher."
            )
        write_block(self.folder, self.record, block, documents)


_AT_ONCE = 16
_LEAST_TAIL = 1e-9
_MOST_PROBABILITY = 1.01  # of the likeliest together; each one is rounded
_PROBE_TOKENS = 64


def teach_by_server(config: Config, teacher: Teacher, tell: Tell) -> dict[str, Any]:
    """Have the server write what the store lacks.

    Raises:
        ConfigError: it does not answer, has another tokenizer, or another teacher has written under its name.
        CapstanError: it answers with an error, or without log-probabilities.
    """
    store, base = open_run_store(config), resolve_base(config.model)
    server = CompletionsServer.find(teacher.setting, teacher.name)
    key = prepare(config, base, store).train
    dataset = open_dataset(store, key)
    check_tokenizer(server, base, (dataset.documents(0)[0] & ID_BITS).tolist())
    folder = teacher_folder(store.sub(layout.dataset(key)), teacher.to_json())
    vocabulary = base.architecture.vocabulary
    record, blocks = begin_teacher(folder, teacher, {"model": server.model}, vocabulary), len(dataset.blocks) - 1
    missing = sorted(set(range(blocks)) - written_blocks(folder))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, block in enumerate(missing, 1):
            documents = list(pool.map(partial(_said, server, record.k, vocabulary), dataset.documents(block)))
            write_block(folder, record, block, documents)
            tell({"progress": "blocks of the data", "done": blocks - len(missing) + number, "total": blocks})
    return finished(folder, record, teacher, dataset, len(missing))


def finished(folder: Store, record: TeacherRecord, teacher: Teacher, dataset: Dataset, written: int) -> dict[str, Any]:
    """Report that everything is stored. Returns what `capstan teach` prints.

    `written` is the number of blocks that were written now.
    """
    whole = finish_teacher(folder, record, dataset.blocks.tolist(), dataset.manifest.targets)
    return {
        "teacher": teacher.name,
        "folder": folder.uri,
        "data": dataset.manifest.fingerprint,
        "documents": dataset.manifest.documents,
        "targets": whole.targets,
        "top_k": record.k,
        "bytes": whole.bytes,
        "written": written,
    }


def _said(server: CompletionsServer, k: int, vocabulary: int, stored: NDArray[np.uint32]) -> Likeliest:
    """Ask the server for its likeliest tokens at a document's targets."""
    places = np.flatnonzero(stored[1:] & TARGET_BIT).tolist()
    found = server.likeliest((stored & ID_BITS).tolist(), k) if places else []
    if any(len(found[place]) < k for place in places):
        raise ConfigError(
            f"{server.setting}: {server.url} gives fewer than the {k} likeliest tokens that objective.top_k asks for."
            f" Start it with --max-logprobs {k}, or lower objective.top_k."
        )
    if any(not 0 <= token < vocabulary for place in places for token in found[place]):
        raise ConfigError(
            f"{server.setting}: {server.url} gives tokens that model.base lacks, which has {vocabulary:,}. Give a"
            " teacher with the same tokenizer."
        )
    if any(sum(map(math.exp, found[place].values())) > _MOST_PROBABILITY for place in places):
        raise ConfigError(
            f"{server.setting}: {server.url} gives probabilities that add up to more than 1. Start it with"
            " --logprobs-mode raw_logprobs."
        )
    ids, log_p = np.zeros((len(places), k), np.int64), np.zeros((len(places), k + 1), np.float32)
    for row, place in enumerate(places):
        values = list(found[place].values())
        ids[row], log_p[row, :-1] = list(found[place]), values
        log_p[row, -1] = math.log(max(_LEAST_TAIL, 1 - sum(map(math.exp, values))))
    return Likeliest(ids, log_p)


def check_tokenizer(server: CompletionsServer, base: Base, tokens: list[int]) -> None:
    """Compare the tokenizers by the text of these tokens, because the server does not give its vocabulary.

    Raises `ConfigError` if the server's is another.
    """
    tokenizer = load_tokenizer(base)
    text: Any = tokenizer.decode(tokens[:_PROBE_TOKENS])
    if tokenizer.encode(text, add_special_tokens=False) != server.tokens_of(text):
        raise ConfigError(
            f"{server.setting}: {server.url} has another tokenizer than model.base: {base.name}: a text of the data"
            " becomes other tokens there. Give a teacher with the same tokenizer."
        )
