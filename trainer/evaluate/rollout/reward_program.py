"""The program of the process that has the reward: python -m trainer.evaluate.rollout.reward_program NAME

It reads a line of JSON, the lists by name, and answers by one: `rewards`, or why there are none.
"""

import json
import os
import sys

from trainer.evaluate.rollout.rewards import called, find_reward


def main() -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the function prints
    reward = None
    for line in sys.stdin:
        try:
            reward = reward or find_reward(sys.argv[1])
            answer = {"rewards": called(reward, json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=lines, flush=True)


if __name__ == "__main__":
    main()
