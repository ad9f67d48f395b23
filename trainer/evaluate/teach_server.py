"""A vLLM server as the teacher: one process asks it for its likeliest tokens of several documents at a time."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Base
from trainer.base.find.locate import resolve_base
from trainer.config import Config
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
from trainer.errors import ConfigError
from trainer.evaluate.request import Tell
from trainer.run import layout
from trainer.servers.completions import CompletionsServer
from trainer.store.store import Store, open_run_store
from trainer.tuning.objective.teacher import Teacher

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
