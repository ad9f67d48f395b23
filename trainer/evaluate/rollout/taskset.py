"""`rollout.reward: verifiers:TASKSET`: the tasks of a verifiers 0.4 environment are the reward.

See pypi.org/project/verifiers.

A row has the prompt of a task and, as the answer, its number in the taskset, by which the task is found again. The
reward of an answer is what verifiers makes of a saved conversation (verifiers/v1/cli/replay.py). No torch: any Python
that has verifiers runs this file.
"""

import asyncio
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from itertools import islice
from typing import Any


def reward_of(name: str) -> Callable[..., list[float]]:
    """Return the reward of the taskset called `name`.

    Raises `TypeError` for an environment that judges something other than one answer.
    """
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
    from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports]
    from verifiers.v1.types import AssistantMessage, UserMessage  # pyright: ignore[reportMissingImports]
    from verifiers.v1.utils import loaders  # pyright: ignore[reportMissingImports]

    if not issubclass(loaders.environment_class(name), vf.SingleAgentEnv):
        raise TypeError(f"the environment {name} has several agents, and an answer is one's alone")
    kind, tasks = loaders.task_type(name), list[Any]()
    coming = iter(loaders.load_taskset(loaders.taskset_config_type(name)(id=name)))
    trace_of = vf.Trace[kind.data_type(), state_cls(kind), vf.AgentConfig]

    def task_of(number: int) -> Any:
        tasks.extend(islice(coming, max(0, number + 1 - len(tasks))))
        return tasks[number]

    async def worth(prompt: str, said: str, number: str) -> float:
        task = task_of(int(number))
        for judge in task.hooks("reward"):
            runtime = signature(judge).parameters.get("runtime")
            if runtime is not None and runtime.default is Parameter.empty:
                raise TypeError(f"{judge.__name__} of {name} judges what a sandbox has become, and an answer has none")
        asked = vf.MessageNode(message=UserMessage(content=task.data.prompt_text or prompt))
        answered = vf.MessageNode(message=AssistantMessage(content=said), parent=0, sampled=True)
        about = vf.TraceTask(type=type(task).__name__, data=task.data)
        trace = trace_of(task=about, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=[asked, answered], ok=True)
        await task.score(trace)
        return trace.reward

    def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
        async def every() -> list[float]:
            return await asyncio.gather(*map(worth, prompts, completions, answer))

        return asyncio.run(every())

    return reward
