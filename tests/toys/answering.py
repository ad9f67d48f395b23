"""Ranks that answer a prompt with the number of its letters, or fail as the prompt says."""

import json
import os
import sys
from typing import Any


def tell(**told: Any) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    rank, ranks = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    print(f"rank {rank} of {ranks}", file=sys.stderr)
    if rank != "0":
        print("this is not told")
        sys.exit()
    answered = 0
    tell(ready=True)
    for line in sys.stdin:
        for prompt in json.loads(line):
            if prompt["prompt"] == "leave":
                sys.exit(9)
            if prompt["prompt"] == "refuse":
                tell(error="no answer to this", exit_code=3)
                sys.exit(3)
            tell(piece=prompt["prompt"])
            answered += 1
        tell(answers=[len(prompt["prompt"]) for prompt in json.loads(line)])
    tell(result={"answered": answered, "ranks": ranks, "on_cpu": json.loads(sys.argv[1])["on_cpu"]})
