"""What one rank runs, whoever started it: Ray Train, torchrun, srun, or this process alone.

assemble: data -> base -> sharded model -> engine -> checkpoints      (this file)
train:    one generator over steps                                    (trainer/loop.py)
"""

import json
import os
import platform
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version

import torch

from trainer import run_layout
from trainer.attention import choose_attention
from trainer.base import Base, check_base, resolve_base
from trainer.checkpoint import Checkpoints, Identity
from trainer.config import Config
from trainer.data.dataset import open_dataset
from trainer.data.prepare import Datasets, train_order
from trainer.data.stream import Position, eval_stream, train_stream
from trainer.deepspeed_config import build_deepspeed_config
from trainer.engine import Engine
from trainer.errors import CapstanError, DoesNotFit, Stopped
from trainer.load import DTYPES, checksums, load_model
from trainer.loop import Training, train
from trainer.metrics import Metrics, StopSignal, claim_generation, peak_memory, rank_log
from trainer.ranks import Ranks, join
from trainer.store import Store, open_store

_VERSIONS = ("capstan-llm", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "ray", "obstore")


def run_rank(config: Config, datasets: Datasets | None, *, resume: bool) -> None:
    """Train `config`'s run as one rank, from its newest checkpoint or, unless `resume` demands one, from the start.

    `datasets` are in the store already; rank 0's count. Restores by itself, always: whoever restarts a rank calls this
    again.

    Raises:
        CapstanError: of the kind whose exit code the process should end with; `Stopped` when asked to stop.
    """
    base = resolve_base(config.model)
    check_base(base, config)
    ranks = join()
    torch.set_num_threads(
        config.cluster.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // ranks.ranks_per_node)
    )
    shared: Datasets = ranks.broadcast(datasets)
    store = open_store(config.run.store, retry_seconds=config.run.store_retry, request_seconds=config.run.store_timeout)
    run = store.sub(config.run.name)
    generation: int = ranks.broadcast(claim_generation(run) if ranks.rank == 0 else None)
    with rank_log(run, generation, ranks.rank, config.track.flush_seconds), ExitStack() as stack:
        metrics = Metrics(
            run,
            generation,
            writes=ranks.rank == 0,
            flush_seconds=config.track.flush_seconds,
            tensorboard=config.track.tensorboard,
        )
        stack.callback(metrics.close)
        stop = StopSignal(run, watches=ranks.rank == 0, seconds=min(5.0, config.track.flush_seconds))
        stack.callback(stop.close)
        stack.enter_context(_signals(stop))
        with _outcome(metrics):
            _train(config, shared, base, ranks, store, run, generation, metrics, stop, resume=resume)


def _train(
    config: Config,
    datasets: Datasets,
    base: Base,
    ranks: Ranks,
    store: Store,
    run: Store,
    generation: int,
    metrics: Metrics,
    stop: StopSignal,
    *,
    resume: bool,
) -> None:
    if ranks.rank == 0:
        run.put(run_layout.ENVIRONMENT, _environment(ranks))
    train_data = open_dataset(store, datasets.train)
    stream = train_stream(config, train_data, ranks.rank, ranks.world_size)
    held_out = None
    if datasets.eval:
        held_out = eval_stream(config, open_dataset(store, datasets.eval), ranks.rank, ranks.world_size)
    total_steps = config.train.steps or sum(-(-bins // config.train.global_batch) for bins in datasets.epoch_bins)
    deepspeed_config = build_deepspeed_config(
        config, world_size=ranks.world_size, accumulation=stream.accumulation, on_gpu=ranks.device.type == "cuda"
    )
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype])
    _log(ranks, f"attention: {attention.name} ({attention.why})")
    model, report = load_model(base, config, deepspeed_config, ranks, attention)
    engine = Engine(model, attention, config.optim, deepspeed_config, ranks)
    assert checksums(model) == report.checksums, "deepspeed.initialize changed packed weights"
    identity = Identity(
        dataset=datasets.train,
        base=_base_identity(config, base),
        adapter=config.tuning.model_dump(mode="json"),
        order=train_order(config, train_data.manifest).to_json(),
    )
    checkpoints = Checkpoints(run, ranks, generation, identity, config.checkpoint, _versions(), metrics.write_now)
    restored = checkpoints.restore(engine, required=resume, log=lambda text: print(text, flush=True))
    step, position = (restored.step, Position.from_json(restored.position)) if restored else (0, Position())
    processes = ranks.gather_objects((socket.gethostname(), os.getpid()))
    metrics.write(
        "start",
        generation=generation,
        world_size=ranks.world_size,
        step=step,
        total_steps=total_steps,
        host=processes[0][0],
        hosts=[host for host, _ in processes],
        pids=[pid for _, pid in processes],
        device=str(ranks.device),
        attention=attention.name,
        load_seconds=round(report.seconds, 3),
        read_bytes=report.read_bytes,
        kept_bytes=report.kept_bytes,
    )
    training = Training(config, ranks, engine, stream, held_out, checkpoints, metrics, stop, total_steps)
    for record in train(training, step, position):
        metrics.write("step", **record, **peak_memory(ranks.device))
    metrics.write("end", outcome="finished", step=total_steps, reason="")


def _base_identity(config: Config, base: Base) -> dict[str, object]:
    return {
        "path": str(base.directory),
        "fingerprint": base.fingerprint,
        "layers": config.model.layers,
        **{f"quant.{key}": value for key, value in config.quant.model_dump(mode="json").items()},
    }


def _environment(ranks: Ranks) -> bytes:
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": str(ranks.device),
        "world_size": ranks.world_size,
        "versions": _versions(),
    }
    return json.dumps(facts, indent=1).encode()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}


def _log(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)


@contextmanager
def _outcome(metrics: Metrics) -> Iterator[None]:
    """Leave the reason of an early end in the metrics and the rank's log, and pass it on."""
    try:
        yield
    except CapstanError as error:
        outcome = "stopped" if isinstance(error, Stopped) else "failed"
        print(f"{outcome}: {error}", file=sys.stderr, flush=True)
        metrics.write("end", outcome=outcome, step=None, reason=str(error))
        raise
    except torch.cuda.OutOfMemoryError as error:
        traceback.print_exc()
        short = DoesNotFit(
            f"out of GPU memory ({str(error).splitlines()[0]}). Lower data.sequence_length or train.micro_batch, set "
            "train.activation_checkpointing: true, or use more ranks; `capstan plan` shows the largest parts."
        )
        metrics.write("end", outcome="failed", step=None, reason=str(short))
        raise short from error
    except Exception as error:
        traceback.print_exc()
        metrics.write("end", outcome="failed", step=None, reason=f"{type(error).__name__}: {error}")
        raise


@contextmanager
def _signals(stop: StopSignal) -> Iterator[None]:
    """SIGTERM and SIGUSR1 ask for a stop. Only a main thread may say so; under Ray the driver gets the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.request()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
