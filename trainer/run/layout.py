"""The only file that knows the names of keys.

A run's keys are relative to `<store>/<run>/`, the same on every store. Numbers are padded with zeros, so the
lexicographic order of a listing is the numeric order.
"""

import re

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
SNAPSHOT = "snapshot.tar.zst"
STOP = "STOP"
RESTART = "RESTART"
NO_MORE_DATA = "NO-MORE-DATA"
OWNERS = "owners/"
PREPARING = "PREPARING"
CLOCK = "CLOCK"
SUBMITTED = "submitted.yaml"
REPORT = "report.html"
RANKS_BEGUN = "RANKS-BEGUN"
SETTINGS = "settings/"
METRICS = "metrics/"
LOGS = "logs/"
ROLLOUTS = "rollouts/"
SERVERS = "servers/"
DRIVER_LOG = "logs/driver.log"
CHECKPOINTS = "checkpoints/"
EVALUATIONS = "evaluations/"
SAMPLES = "samples/"
PROFILES = "profiles/"
ADAPTER = "adapter"
ROLLOUT_ADAPTERS = "adapters/"
TENSORBOARD = "tensorboard/"
TRACKERS = "trackers/"
TEXT = "text/"
BASE_HASHES = "base.json"
SWEEP = "sweep.json"
SLURM_JOB = "slurm/job.json"
SLURM_SCRIPT = "slurm/run.sbatch"
SLURM_ATTEMPTS = "slurm/attempts/"

_STEP_FOLDER = re.compile(r"step-(\d{9})")
_ATTEMPT = re.compile(r"checkpoints/step-\d{9}/(\d{6,}-\d{6,})/.+")
_SHARD = re.compile(r"checkpoints/step-(\d{9})/[\w-]+/shard-\d{5,}\.safetensors")
_GENERATION = re.compile(r"metrics/(\d{6})\.jsonl")
_PUBLISHED = re.compile(r"adapters/step-(\d{9})/PUBLISHED")
_OWNER = re.compile(r"owners/(\d{6})\.json")
_RESULT = re.compile(r"(?:evaluations|samples)/step-(\d{9})\.jsonl?")
_RECORDS = re.compile(r"metrics/(\d{6})\.jsonl(\.added-.+)?")


def _number(pattern: re.Pattern[str], key: str) -> int | None:
    match = pattern.fullmatch(key)
    return int(match[1]) if match else None


def metrics(generation: int) -> str:
    """Return the stream (trainer/run/segments.py) of the records of a start, one JSON object a line.

    `generation` counts the starts of a run, from 1. A start claims its number by creating this key.
    """
    return f"{METRICS}{generation:06d}.jsonl"


def generation_of(key: str) -> int | None:
    """Return the generation that `key` claims, or None for any other key. Each generation has one such key."""
    return _number(_GENERATION, key)


def added_record(generation: int, name: str) -> str:
    """Return the key of a record that somebody other than the generation's rank 0 adds.

    `name` is unique and sorts by time.
    """
    return f"{metrics(generation)}.added-{name}"


def records_of(stream: str) -> int | None:
    """Return the generation that the records of a stream belong to, or None for a stream of something else."""
    return _number(_RECORDS, stream)


def rank_log(generation: int, rank: int) -> str:
    """Return the stream (trainer/run/segments.py) of everything that a rank's process printed."""
    return f"{LOGS}{generation:06d}/rank-{rank:05d}.log"


def sidecar_log(generation: int, name: str) -> str:
    """Return the stream that a process beside the ranks prints.

    Its name is `rollout` (it has servers sample), or `server-1` and so on. It begins before this start's ranks.
    """
    return f"{LOGS}{generation:06d}/{name}.log"


def server(name: str) -> str:
    """Return the key of a server of the run: it holds the server's URL and the server's name in the run."""
    return f"{SERVERS}{name}"


def owner(number: int) -> str:
    """Return the key that a start of the run creates to take the run. `number` counts from 1 how often it was taken."""
    return f"{OWNERS}{number:06d}.json"


def owner_of(key: str) -> int | None:
    """Return the number of the owner that `key` belongs to, or None for any other key."""
    return _number(_OWNER, key)


def settings(generation: int) -> str:
    """Return the key of the whole configuration that a start of the run trained with."""
    return f"{SETTINGS}{generation:06d}.yaml"


def slurm_attempt(number: int) -> str:
    """Return the key of the record of one start of a Slurm job. `number` counts the starts from 1."""
    return f"{SLURM_ATTEMPTS}{number:06d}.json"


def tracker(name: str) -> str:
    """Return the key of the state of the tracker called `name`.

    The state says by which id a service knows the run, and how far its curves are.
    """
    return f"{TRACKERS}{name}.json"


def checkpoint(step: int) -> str:
    return f"{CHECKPOINTS}step-{step:09d}/"


def step_of_folder(name: str) -> int | None:
    """Return the step whose folder among the checkpoints is `name`, or None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def attempt(generation: int, save: int) -> str:
    """Return a name unique to the `save`-th save of a start, which all ranks know without asking each other."""
    return f"{generation:06d}-{save:06d}"


def attempt_of(key: str) -> str | None:
    """Return the attempt at a save that has written `key`, or None for any other key."""
    match = _ATTEMPT.fullmatch(key)
    return match[1] if match else None


def shard(step: int, attempt: str, rank: int) -> str:
    """Return the key of a shard.

    `attempt` is unique to one save, so a dead save is never taken for a part of a later one.
    """
    return f"{checkpoint(step)}{attempt}/shard-{rank:05d}.safetensors"


def shard_step(key: str) -> int | None:
    """Return the step whose checkpoint has the shard `key`, or None for any other key."""
    return _number(_SHARD, key)


def manifest(step: int) -> str:
    """Return the key of a manifest. It is the commit point of a checkpoint: written last, with a create-only PUT."""
    return f"{checkpoint(step)}manifest.json"


def adapter(step: int) -> str:
    """Return the folder of the adapter that is exported beside a checkpoint, and removed with it."""
    return f"{checkpoint(step)}{ADAPTER}"


def rollouts(key: str) -> str:
    """Return the folder of sampled answers, and of the adapters for the servers that sample.

    `key` stands for everything that decides the answers except what was learnt.
    """
    return f"{ROLLOUTS}{key}"


def chapter_of_rollouts(number: int) -> str:
    """Return the name of a chapter of answers, as a data set in the folder of the rollouts."""
    return f"chapter-{number:09d}"


def rollout_adapter(step: int) -> str:
    """Return the folder of the adapter after `step` updates, inside the folder of the rollouts."""
    return f"{ROLLOUT_ADAPTERS}step-{step:09d}/"


def published(step: int) -> str:
    """Return the key that is written last in that folder."""
    return f"{rollout_adapter(step)}PUBLISHED"


def published_step(key: str) -> int | None:
    """Return the step whose adapter is complete according to `key`, or None for any other key."""
    return _number(_PUBLISHED, key)


def damaged_manifest(step: int, generation: int) -> str:
    """Return the key to which `generation` moves the manifest of a damaged checkpoint.

    It then commits the step again.
    """
    return f"{checkpoint(step)}manifest.damaged-{generation:06d}.json"


def doubt(step: int, generation: int) -> str:
    """Return the key of the reason why the checkpoint that `generation` wrote after `step` updates is in doubt."""
    return f"{checkpoint(step)}doubt-{generation:06d}.json"


def evaluation(step: int) -> str:
    """Return the key of the findings of `capstan evaluate` on the state after `step` updates and on its base.

    They are one JSON object.
    """
    return f"{EVALUATIONS}step-{step:09d}.json"


def samples(step: int) -> str:
    """Return the key of the answers to `eval.prompts` by the state after `step` updates, as JSON lines."""
    return f"{SAMPLES}step-{step:09d}.jsonl"


def profile(step: int) -> str:
    """Return the key of the trace of some steps of rank 0, in Chrome's format, compressed.

    The first of these steps is the update that makes `step`.
    """
    return f"{PROFILES}step-{step:09d}.json.gz"


def kept_text(sha256: str) -> str:
    """Return the key of a file of the run's tokenizer, or of its chat template, by the hash of its content."""
    return f"{TEXT}{sha256}"


def step_of_result(key: str) -> int | None:
    """Return the step whose evaluation or samples `key` holds, or None for any other key."""
    return _number(_RESULT, key)


def bases(fingerprint: str) -> str:
    """Return the folder of a quantized base, relative to the store's root: runs share it."""
    return f"bases/{fingerprint}"


def features(name: str) -> str:
    """Return the folder of features of pictures, relative to the store's root: runs share it."""
    return f"bases/features-{name}"


def pictures(number: int) -> str:
    """Return the key of an object with many pictures, or with their names, in the folder of a compiled data set."""
    return f"pictures/{number:016x}"


def dataset(fingerprint: str) -> str:
    """Return the folder of a compiled data set, relative to the store's root: runs share it.

    Rollouts lie in the same way in a folder of their own.
    """
    return f"data/{fingerprint}/"


def environment(name: str) -> str:
    """Return the description of a Python environment's archive, relative to the store's root: runs share it."""
    return f"environments/{name}.json"


def environment_archive(name: str, writer: str) -> str:
    """Return the archive itself. `writer` tells those of several that pack the same environment at once apart."""
    return f"environments/{name}-{writer}.tar.zst"
