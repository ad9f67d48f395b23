"""Ray's worker processes, forked from a server that has imported what they import: a start takes tenths of a second
instead of seconds.

A raylet starts this file in the place of Ray's own setup_worker.py, where a cluster is told so. It hands what it was
given to the server, and stays as long as the worker does, with which it ends. It imports little, as it is started for
every worker.
"""

import json
import os
import socket
import sys

OF_SETUP = ("--serialized-runtime-env-context", "--language")


def main(file: str, arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith(OF_SETUP))
    arguments = [argument for argument in arguments if not argument.startswith(OF_SETUP)]
    context = json.loads(given.get(OF_SETUP[0], "{}"))
    environment = {**os.environ, **context.get("env_vars", {})}
    start = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": environment}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"{os.path.dirname(file)}/socket")  # a link to this file lies beside it
        socket.send_fds(server, [len(start).to_bytes(8, "big")], [1, 2])
        server.sendall(start)
        server.recv(1)  # until the worker has ended


if __name__ == "__main__":
    main(sys.argv[0], sys.argv[1:])
