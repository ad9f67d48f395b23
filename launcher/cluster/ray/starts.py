"""Several starts of a run's ranks in one group of Ray's workers.

A worker whose rank is forked by a keeper only waits for the rank's end, so it can have another one forked. A rank that
dies therefore does not end the group, whose own end and beginning take several times as long as those of the ranks. An
actor near the driver stands between the two sides:

    driver     begins a start, asks which ranks have ended, gives up those that are left, and at last closes
    worker     tells how its rank has ended, and rank 0's also where the ranks can meet again, and waits for a start

A worker that dies ends the group, as one without a keeper does. Its rank ends with it, because the keeper kills that.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from signal import SIGKILL
from typing import Any

from launcher.cluster.ray.keepers import on_node, this_node
from launcher.policy import retry
from launcher.start.local_ranks import GivenUp

_LOOK_SECONDS = 0.1
_ANSWER_SECONDS = 30.0
"""A worker that does not say within this time that the rank is gone which it was to kill is itself gone."""

Task = Mapping[str, Any]


def each_start(
    starts: Any, rank: int, task: Task, be_rank: Callable[[Task, Callable[[], bool]], Exception | None]
) -> None:
    """In a worker: be the rank of this number in one start after another, the first of which has this task.

    `starts` is the actor. `be_rank` gets a start's task, and a function that tells whether the rank is given up. It
    returns what ended the rank, if this worker can have another one. This returns once no other start follows, or
    raises what ended the rank of the last one. It raises at once what `be_rank` does; MASTER_ADDR and MASTER_PORT are
    then those of its start.
    """
    import ray

    from launcher.cluster.ray.group import meeting

    for number in count(1):
        over = starts.given_up.remote(number)

        def given_up(over: Any = over) -> bool:
            return bool(ray.wait([over], timeout=0)[0])

        error = be_rank(task, given_up)
        ray.get(starts.tell_end.remote(number, rank, error))
        following = ray.get(starts.following.remote(number, meeting() if rank == 0 else None))
        if following is None:
            if error is not None:
                raise error
            return
        task, (address, port) = following
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def starts_on_ray(workers: int) -> Any:
    """Return the actor for a group of so many workers. It ends with this process."""
    import ray

    # Each worker has a question open while its rank works, and asks another one when that has ended.
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 3 * workers + 10}
    return ray.remote(StartsOfWorkers).options(scheduling_strategy=on_node(this_node()), **options).remote()


class Starts:
    """The driver's side of the `actor`: the starts in one group of so many workers, whose first start begins with this.

    `fit` is done when the group has ended; it is assigned once Ray makes the group.
    """

    def __init__(self, actor: Any, workers: int) -> None:
        self.actor, self.workers = actor, workers
        self.fit = Future[Any]()
        self._ended = dict[int, BaseException | None]()
        self._number, self._question = 1, None

    def begin(self, task: Task) -> None:
        """Begin another start."""
        import ray

        self._ended, self._number, self._question = {}, self._number + 1, None
        ray.get(self.actor.begin.remote(dict(task)))

    def look(self) -> None:
        """Take in which ranks have ended. An actor that does not answer is gone, and the workers notice that, too."""
        import ray
        from ray.exceptions import RayError

        if self._question is None:
            self._question = self.actor.ends.remote(self._number, len(self._ended))
        if ray.wait([self._question], timeout=0)[0]:
            with suppress(RayError):
                self._ended.update(ray.get(self._question))
            self._question = None

    def ranks(self) -> Sequence["StartedRank"]:
        return [StartedRank(self, rank) for rank in range(self.workers)]

    def all_told(self) -> bool:
        """Whether all workers have told the end of their rank."""
        return len(self._ended) == self.workers

    def errors(self) -> dict[int, BaseException]:
        """Return why ranks have ended by themselves, in that order."""
        return {
            rank: error for rank, error in self._ended.items() if error is not None and not isinstance(error, GivenUp)
        }

    def code(self, rank: int) -> int | None:
        """Return how a rank has ended, as `Popen.poll` does. All ranks end with the group."""
        if rank in self._ended:
            error = self._ended[rank]
            return -SIGKILL if isinstance(error, retry.RankDied) and error.killed else int(error is not None)
        return 1 if self.fit.done() else None

    def give_up(self) -> None:
        self.actor.give_up.remote()

    def close(self) -> None:
        """Let the workers return, or raise what ended their ranks. Ranks that are left are killed."""
        self.actor.close.remote()

    def end(self) -> None:
        """End the actor. Workers that still ask it end, too."""
        import ray

        ray.kill(self.actor)


class StartedRank:
    """A rank, as `end_together` sees processes."""

    def __init__(self, starts: Starts, rank: int) -> None:
        self._starts, self._rank = starts, rank

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._starts.code(self._rank)

    def kill(self) -> None:
        """Have the worker kill it, as it does with all that are left of this start."""
        self._starts.give_up()

    def wait(self) -> int:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self._starts.close()  # the others raise what ended their ranks, which ends the group
            time.sleep(_LOOK_SECONDS)
            self._starts.look()
        return code


class StartsOfWorkers:
    """The actor. The first start has begun with it."""

    def __init__(self) -> None:
        self._number = 1
        self._task: dict[str, Any] = {}
        self._places = dict[int, tuple[str, int]]()
        """Where the ranks of the start after that of this number meet."""
        self._ends = list[tuple[int, BaseException | None]]()
        self._given_up = self._closed = False
        self._changed = asyncio.Condition()

    async def _change(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or holds())

    async def begin(self, task: dict[str, Any]) -> None:
        self._number, self._task, self._ends, self._given_up = self._number + 1, task, [], False
        await self._change()

    async def ends(self, number: int, after: int) -> list[tuple[int, BaseException | None]]:
        """Return the ranks of this start that have ended, with what ended each, but not the first `after` ones.

        Returns once there are any.
        """
        await self._until(lambda: self._number > number or len(self._ends) > after)
        return self._ends[after:] if self._number == number else []

    async def give_up(self) -> None:
        self._given_up = True
        await self._change()

    async def close(self) -> None:
        self._closed = True
        await self._change()

    async def tell_end(self, number: int, rank: int, error: BaseException | None) -> None:
        if number == self._number:
            self._ends.append((rank, error))
            await self._change()

    async def given_up(self, number: int) -> None:
        """Return once the ranks that are left of this start are to be killed."""
        await self._until(lambda: self._given_up or self._number > number)

    async def following(
        self, number: int, place: tuple[str, int] | None
    ) -> tuple[dict[str, Any], tuple[str, int]] | None:
        """Return the task of the start after this one and the place where its ranks meet, which rank 0 has given.

        None: no other start follows.
        """
        if place is not None:
            self._places[number] = place
            await self._change()
        await self._until(lambda: self._number > number and number in self._places)
        return None if self._closed else (self._task, self._places[number])
