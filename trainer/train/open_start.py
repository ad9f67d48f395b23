"""Opens what a start does beside its steps: it logs, writes records, listens for requests and shows that it is
alive.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from trainer.export.write.checkpoint_adapters import adapters_beside
from trainer.run.log import rank_log
from trainer.run.metrics import Metrics, open_trackers
from trainer.run.requests import StopSignal
from trainer.train.end_record import last_words
from trainer.train.heartbeat.heartbeat import Heart
from trainer.train.start import ClaimedStart, Start


@contextmanager
def opened(claimed: ClaimedStart) -> Iterator[Start]:
    """The start with its log, adapters, records, requests and heartbeat, nested so that each may still write to the
    earlier ones.
    """
    resolved, ranks, folder, generation = claimed.resolved, claimed.ranks, claimed.folder, claimed.generation
    config, first = claimed.config, ranks.rank == 0
    with (
        rank_log(folder, generation, ranks.rank, ranks.world_size, config.track.flush_seconds) as flush_log,
        # Its wait for the last adapter is not watched by the search for hanging ranks.
        adapters_beside(folder, resolved, partial(print, flush=True), writes=first) as after_commit,
        ExitStack() as stack,
    ):
        metrics = Metrics(open_trackers(folder, generation, config) if first else ())
        stack.callback(metrics.close)
        metrics.write("phase", phase="load")
        seconds = min(5.0, config.track.flush_seconds)
        stop = StopSignal(folder, watches=first, seconds=seconds, preempted=claimed.starter.preempted)
        stack.callback(stop.close)
        stack.enter_context(stop.on_signals())
        heart = Heart(ranks.world, config.timeouts, last_words(folder, generation, metrics, flush_log))
        stack.callback(heart.close)
        yield Start(**vars(claimed), metrics=metrics, stop=stop, pulse=heart, after_commit=after_commit)
