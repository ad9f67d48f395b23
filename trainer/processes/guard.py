"""The two programs that see to it that no process outlives the one that needs it: `trainer.processes.children` starts
them.

    python -I -S guard.py tie PARENT COMMAND...
    python -I -S guard.py end VARIABLE=VALUE < pipe

The first ties itself to its parent and becomes the command: Linux kills it as soon as the process PARENT ends, however
that ends. Every child waits for this, so the file has next to no imports.

The second ends a family of processes whose head was killed. It waits for the end of its input, which the head holds
open. Unless the head has written a farewell, every process that has this variable in its environment, and what these
have started, is killed once it has had a moment to end by itself.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable

PATIENCE_SECONDS = 3.0
# So long processes may take to end once they are killed: one that waits for a disk is not waited for.
_KILLED_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def tie() -> None:
    """Make Linux kill this process when the thread that started it ends. An `exec` keeps this."""
    import ctypes  # the program that ends a family has no need of it

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def started_with(*marks: bytes) -> list[int]:
    """The processes that were started with all of `marks`, each a variable with its value."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as environment:
                if {*marks} <= {*environment.read().split(b"\0")}:
                    found.append(int(name))
        except OSError:  # another user's, or gone by now
            continue
    return found


def descendants(heads: list[int]) -> dict[int, str]:
    """`heads` and all that these and theirs have started, with the time at which each began."""
    every = _processes()
    found = {number: every[number][1] for number in heads if number in every}
    while more := {
        number: began for number, (parent, began) in every.items() if parent in found and number not in found
    }:
        found |= more
    return found


def _processes() -> dict[int, tuple[int, str]]:
    """Each process's parent, and the time at which it began in ticks since the machine did."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":  # It has ended, and waits for its parent to look.
            found[int(name)] = int(fields[1]), fields[19]
    return found


def end(mark: bytes, *asked: int, patience: float = PATIENCE_SECONDS) -> None:
    """End the family with this mark: processes that are `asked` get SIGTERM, and all that remain after `patience`
    seconds SIGKILL. What they start meanwhile belongs to the family.
    """
    known = descendants(started_with(mark))
    _signal(asked, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while True:
        # A process that renames itself, as Ray's agents and vLLM's engines do, may overwrite its environment. Its
        # parent identifies it, as long as the parent exists.
        known |= descendants([*started_with(mark), *_same(known)])
        left, over = _same(known), time.monotonic() - deadline
        if not left or over > _KILLED_SECONDS:
            return
        if over > 0:
            _signal(left, signal.SIGKILL)
        time.sleep(0.1)


def _same(known: dict[int, str]) -> list[int]:
    """The processes that still exist."""
    now = _processes()
    return [number for number, began in known.items() if number in now and now[number][1] == began]


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    if sys.argv[1] == "tie":
        parent, *command = sys.argv[2:]
        tie()
        if os.getppid() != int(parent):  # it ended before it could be tied to
            sys.exit(1)
        os.execvp(command[0], command)
    elif not sys.stdin.buffer.read():
        end(os.fsencode(sys.argv[2]))
