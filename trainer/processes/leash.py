"""The program that `trainer.processes.children` puts before every command: it ties itself to its parent, and becomes
the command.

    python -I -S leash.py PARENT COMMAND...

Linux kills the command as soon as the process PARENT ends, however that ends. A file of its own, with next to no
imports, as every child waits for it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def tie() -> None:
    """Make Linux kill this process when the thread that started it ends. An `exec` keeps this."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    tie()
    if os.getppid() != int(parent):  # it ended before it could be tied to
        sys.exit(1)
    os.execvp(command[0], command)
