"""The program that ends a family of processes whose head was killed: `trainer.processes.children.guarded` starts it.

    python -I -S guard.py VARIABLE=VALUE < pipe

It waits for the end of its input, which the head holds open. Unless the head has written a farewell, every process that has this
variable in its environment is killed once it has had a moment to end by itself.
"""

import os
import signal
import sys
import time

PATIENCE_SECONDS = 3.0


def family(*marks: bytes) -> list[int]:
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


if __name__ == "__main__":
    if not sys.stdin.buffer.read():
        time.sleep(PATIENCE_SECONDS)
        for process in family(os.fsencode(sys.argv[1])):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
