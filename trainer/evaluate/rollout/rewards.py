"""The built-in rewards, those of verifiers' tasks, and the process that runs one.

A reward is found by its name: `exact`, `module:function` of the user's, or `verifiers:TASKSET`. It is called as TRL
calls a reward: with lists, by name, of the prompts, of the model's answers to them (`completions`), and of the answers
that the data has (`answer`). It returns a number for each. No torch, because a Python of another environment may run
this file.

    python -m trainer.evaluate.rollout.rewards NAME [find]

The process reads a line of JSON, the lists by name, and answers with one: `rewards`, or why there are none. `Scoring`
starts it and asks it: the function is the user's, and may fail or never end. With `find` the process only says what
`why_missing` returns.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec, PathFinder
from inspect import Parameter, signature
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trainer.errors import CapstanError, ConfigError
from trainer.processes import children

if TYPE_CHECKING:
    from trainer.config.objective import RolloutSettings

Reward = Callable[..., Sequence[float]]


def exact(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for the data's answer and nothing else, apart from spaces around it."""
    return [float(said.strip() == wanted.strip()) for said, wanted in zip(completions, answer, strict=True)]


def regex(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 if the regular expression that is the data's answer is found in the model's."""
    return [
        float(re.search(wanted.strip(), said) is not None) for said, wanted in zip(completions, answer, strict=True)
    ]


def json_schema(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for JSON with the schema that is the data's answer, 0.1 for other JSON."""
    from jsonschema import validators

    def value(said: str, wanted: str) -> float:
        schema = json.loads(wanted)
        try:
            found = json.loads(said)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validators.validator_for(schema)(schema).is_valid(found) else 0.1

    return [value(said, wanted) for said, wanted in zip(completions, answer, strict=True)]


def length(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for an answer with no more characters than the data's, and less the longer it is."""
    return [min(1.0, max(1, len(wanted)) / max(1, len(said))) for said, wanted in zip(completions, answer, strict=True)]


def math(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for an answer that is equal to the data's as mathematics, by math-verify: 0.5 and \\frac{1}{2}.

    If an answer has several values, the last one counts.
    """
    from math_verify import parse, verify

    def value(said: str, wanted: str) -> float:
        # An answer by itself has no dollar signs. Without them the last number in a formula would be taken for the
        # formula.
        right = parse(wanted if "$" in wanted or "\\boxed" in wanted else f"${wanted}$")
        return float(verify(right, parse(said)))

    return [value(said, wanted) for said, wanted in zip(completions, answer, strict=True)]


BUILT_IN: dict[str, Reward] = {
    "exact": exact,
    "regex": regex,
    "math": math,
    "json_schema": json_schema,
    "length": length,
}


def find_reward(name: str) -> Reward:
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, function = name.partition(":")
    # The user's own module, or tasks, may lie in the current folder. This folder is searched last, so no file there
    # replaces a library.
    sys.path.append(os.getcwd())
    if module == "verifiers":
        return reward_of(function)
    return getattr(import_module(module), function)


_NEEDS = {"math": "math_verify", "json_schema": "jsonschema"}
"""Built-in rewards that import a package."""
# A module in whose source one of these words occurs may have names that are not written there.
_DYNAMIC = re.compile(r"import \*|__getattr__|__path__|__dict__|\b(?:globals|locals|vars|setattr|exec|sys\.modules)\b")


def why_missing(name: str) -> str | None:
    """Return a clause that says why `find_reward` cannot find the reward `name`; None if nothing speaks against it.

    The files of the modules are read, and none of their code is run. So what the user's module itself cannot import
    shows only when it is called.
    """
    module, _, function = name.partition(":")
    if name in BUILT_IN and name not in _NEEDS:
        return None
    if name in BUILT_IN or module == "verifiers":
        module, function = _NEEDS.get(name, "verifiers.v1"), ""
    folders, source, part = None, "", ""
    for word in module.split("."):
        part = f"{part}.{word}" if part else word
        spec = _spec(part, folders)
        if spec is None:
            where = f"in {os.getcwd()} nor among the packages of {sys.executable}"
            return None if _DYNAMIC.search(source) else f"there is no module {part!r} {where}"
        try:
            source = _source(spec)
        except (ImportError, SyntaxError, ValueError) as error:
            return f"the module {part!r} cannot be read ({error})"
        folders = spec.submodule_search_locations or []
    return None if function in source or _DYNAMIC.search(source) else f"the module {module!r} has no {function!r}"


def _spec(module: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """Return where `import_module` finds the module, which is in these folders of its package.

    `folders` is None for a module of no package.
    """
    finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))  # as an import leaves out older ones
    found = filter(None, (finder.find_spec(module, folders) for finder in finders))
    return next(found, None) or (PathFinder.find_spec(module, [os.getcwd()]) if folders is None else None)


def _source(spec: ModuleSpec) -> str:
    """Return the module's source, or "__dict__" if it has none, as a compiled one may have any names.

    A folder without an `__init__.py` has no names but its modules'. Raises what its import would raise for a damaged
    file.
    """
    if spec.loader is None:
        return ""
    source = spec.loader.get_source(spec.name) if isinstance(spec.loader, InspectLoader) else None
    if source is None:
        return "__dict__"
    with warnings.catch_warnings(action="ignore"):
        compile(source, spec.origin or spec.name, "exec", dont_inherit=True)
    return source


def called(reward: Reward, given: dict[str, list[str]]) -> list[float]:
    """Call the reward. The function may not take all the arguments that there are."""
    parameters = inspect.signature(reward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    found = reward(**{name: values for name, values in given.items() if takes_all or name in parameters})
    return [float(value) for value in found]


def reward_of(name: str) -> Callable[..., list[float]]:
    """Return the reward that the tasks of a verifiers 0.4 environment give (pypi.org/project/verifiers).

    `name` is the taskset's. A row has the prompt of a task and, as the answer, its number in the taskset, by which the
    task is found again. The reward of an answer is what verifiers makes of a saved conversation
    (verifiers/v1/cli/replay.py).

    Raises `TypeError` for an environment that judges something other than one answer.
    """
    import asyncio

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


ATTEMPTS = 3
_LONGEST_REASON = 300
_PROGRAM = "trainer.evaluate.rollout.rewards"
# A Python of another environment gets the package `trainer`, and nothing that lies beside it.
_ELSEWHERE = f"""
import sys
sys.path[:] = filter(None, sys.path)
import runpy, types
trainer = sys.modules["trainer"] = types.ModuleType("trainer")
trainer.__path__ = [{str(Path(__file__).parents[2])!r}]
runpy.run_module({_PROGRAM!r}, run_name="__main__")
"""


class RewardFailed(CapstanError):
    """The reward gives no numbers, and would not if it were asked again."""


class Scoring:
    """The reward called `name`, which may take so many `seconds` for the answers of a step.

    The process begins with the first answers, and is then reused. It runs under the interpreter `python`, if one is
    named.
    """

    def __init__(self, name: str, seconds: float, python: str | None = None) -> None:
        self._name, self._seconds, self._python = name, seconds, python
        self._process: subprocess.Popen[bytes] | None = None

    def rewards(self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the reward of each completion.

        Raises:
            RewardFailed: three times the function fails, hangs, or returns something other than a finite number for
                each.
        """
        given = {"prompts": [*prompts], "completions": [*completions], "answer": [*answers]}
        for _ in range(ATTEMPTS):
            found = self._asked(json.dumps(given).encode() + b"\n")
            wrong = found if isinstance(found, str) else _wrong(found, len(completions))
            if wrong is None and not isinstance(found, str):
                return found
            self.close()
        raise RewardFailed(
            f"rollout.reward: {self._name} {wrong}, {ATTEMPTS} times. Nothing of this step is kept; correct it, and"
            " `capstan resume` goes on."
        )

    def close(self) -> None:
        """End the process and what it has forked. A worker that hangs would keep the pipes open."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _asked(self, line: bytes) -> list[float] | str:
        """Return the numbers, or a phrase that says why there are none."""
        if self._process is None:
            program = [self._python, "-c", _ELSEWHERE] if self._python else [sys.executable, "-m", _PROGRAM]
            try:
                self._process = children.start(
                    [*program, self._name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            except OSError as error:
                return f"cannot be run ({error}; rollout.reward_python)"
        process, deadline = self._process, time.monotonic() + self._seconds
        assert process.stdin is not None
        assert process.stdout is not None
        # A function that hangs at import reads nothing, and a pipe takes no more than 64 KiB.
        threading.Thread(target=_write, args=(process.stdin, line), daemon=True).start()
        said = b""
        while not said.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return f"has not answered within {self._seconds:g} s (rollout.reward_seconds)"
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                return "ended its process"
            said += part
        found = json.loads(said)
        return found["rewards"] if "rewards" in found else f"failed ({found['error'][:_LONGEST_REASON]})"


def _write(pipe: IO[bytes], line: bytes) -> None:
    with suppress(OSError):  # the process has ended, as its reader will find
        pipe.write(line)
        pipe.flush()


def _wrong(found: Sequence[float], wanted: int) -> str | None:
    if len(found) != wanted:
        return f"gave {len(found)} numbers for {wanted} answers"
    return None if all(map(isfinite, found)) else "gave a number that is not finite"


def check_reward(rollout: RolloutSettings) -> None:
    """Raise `ConfigError` if a process on this machine, in the current folder, cannot find the run's reward."""
    name, python = rollout.reward, rollout.reward_python
    if name is None:
        return
    missing = why_missing(name) if python is None else _why_missing_to(python, name)
    if missing is not None:
        raise ConfigError(
            f"rollout.reward: {name} is not found on {socket.gethostname()}: {missing}. Correct the name, start from"
            " the folder that has the module, or install the module."
        )


def _why_missing_to(python: str, name: str) -> str | None:
    try:
        done = children.run([python, "-c", _ELSEWHERE, name, "find"], capture_output=True, text=True)
    except OSError as error:
        return f"{python} cannot be run ({error}; rollout.reward_python)"
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"{python} cannot look for it ({said[-1]}; rollout.reward_python)"
    return json.loads(done.stdout)


def main() -> None:
    if sys.argv[2:] == ["find"]:
        print(json.dumps(why_missing(sys.argv[1])))
        return
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # this catches whatever the function prints
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
