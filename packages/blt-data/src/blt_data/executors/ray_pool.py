"""The actors of one run on a Ray cluster, from the driver's side."""

from __future__ import annotations

import enum
import logging
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Self

from blt_data.errors import InputError
from blt_data.executors import ray_worker
from blt_data.executors.attempt import Outcome
from blt_data.executors.base import Amounts, describe
from blt_data.executors.ray_cluster import death_in_words, resources_in_words
from blt_data.executors.schedule import Schedule
from blt_data.executors.slots import Slots

log = logging.getLogger(__name__)

#: Seconds between two looks at the clock, while no worker says anything.
_TICK: Final = 1.0

#: Answers a second that all workers together give about their progress, at most.
_LOOKS_PER_SECOND: Final = 50.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorNeeds:
    """What each actor reserves."""

    num_cpus: float
    num_gpus: float
    memory: int | None
    """Bytes."""

    def __str__(self) -> str:
        memory = f" and {self.memory:,} bytes of memory" if self.memory is not None else ""
        return f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs{memory}"

    def fitting(self, resources: Mapping[str, float]) -> int:
        """Return for how many actors there is room, at least 1.

        Args:
            resources: what the cluster has, by Ray's names.
        """
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory or 0}
        return max(1, min(int(resources.get(name, 0) // need) for name, need in needs.items() if need))


@dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """What a worker is asked before it gets anything to do."""

    packages: Mapping[str, str]
    """Distribution to the version that it must have."""
    token: str | None
    """Absolute path of a file that it must see, or None."""
    content: bytes
    """What is in the file."""
    environment: Mapping[str, str]
    """Variables that it sets, unless they are set."""

    def check(self, answer: Mapping[str, Any]) -> None:
        """Check a worker's answer.

        Raises:
            InputError: it cannot take part.
        """
        node = answer["node"]
        python = ".".join(platform.python_version_tuple()[:2])
        if answer["python"] != python:
            raise InputError(
                f"node {node} of the Ray cluster runs Python {answer['python']}, this command {python}; "
                "use the same version for both"
            )
        for package, version in self.packages.items():
            there = answer["packages"][package]
            if there is None:
                raise InputError(
                    f"node {node} of the Ray cluster has no {package}; install {package}=={version} there, "
                    f"or give the runtime environment {{'pip': ['{package}=={version}']}}"
                )
            if there != version:
                raise InputError(
                    f"node {node} of the Ray cluster has {package} {there}, this command {version}; "
                    "install the same version on both"
                )
        if not answer["sees"]:
            folder = str(self.token).rpartition("/")[0]
            raise InputError(
                f"node {node} of the Ray cluster does not see {folder}; "
                "write to a directory that all nodes mount under the same path"
            )


class _State(enum.Enum):
    PLACING = enum.auto()
    SETTING_UP = enum.auto()
    IDLE = enum.auto()
    BUSY = enum.auto()


class _Actor:
    """An actor, as seen from the driver."""

    def __init__(self, number: int, handle: Any, call: Any, *, kept: bool) -> None:
        self.number, self.handle, self.kept = number, handle, kept
        self.state = _State.PLACING
        self.call: Any = call
        """The call that it is working on, or None."""
        self.look: Any = None
        """The call that asks how far it is, or None."""
        self.node = ""
        self.task = -1
        self.attempt = -1
        self.told: tuple[Amounts, int] = ((0, 0, 0), 0)
        self.sign_of_life = 0.0


class ActorPool:
    """Creates actors, gives them tasks and replaces those that are lost.

    Args:
        ray: the module, connected.
        setup: the pickled `Setup`.
        size: the most actors.
        name: the job's name.
        needs: what each actor reserves.
        greeting: what each is asked first.
        kept: actors that an earlier run of the same needs has left.
        attempts: how often in a row a place for an actor may fail until it is given up.
        place_timeout: see `RayExecutor`.
        hang_timeout: see `RayExecutor`.
    """

    def __init__(
        self,
        ray: Any,
        setup: bytes,
        *,
        size: int,
        name: str,
        needs: ActorNeeds,
        greeting: Greeting,
        kept: list[Any],
        attempts: int,
        place_timeout: float,
        hang_timeout: float,
    ) -> None:
        self._ray, self._name, self._needs, self._greeting = ray, name, needs, greeting
        self._place_timeout, self._hang_timeout = place_timeout, hang_timeout
        self._slots = Slots(size, attempts)
        import_module("ray.cloudpickle").register_pickle_by_value(ray_worker)
        # The thread that answers how far a task is must not wait for the task.
        ray.method(concurrency_group="watch")(ray_worker.RayWorker.look)
        self._class = ray.remote(concurrency_groups={"watch": 1})(ray_worker.RayWorker)
        self._setup = ray.put(setup)
        self._actors: dict[int, _Actor] = {}
        self.kept = kept
        self._handed_out = 0
        self._nobody_since: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the actors that have nothing to do for another run, in `kept`; end the others, after an error all."""
        for actor in list(self._actors.values()):
            if kind is None and actor.state is _State.IDLE:
                self.kept.append(actor.handle)
            else:
                self._end(actor)
        if kind is not None:
            while self.kept:
                self._kill(self.kept.pop())

    def run(self, load_task: Callable[[int], bytes], schedule: Schedule[Any]) -> None:
        """Run until no task is unfinished.

        Args:
            load_task: returns a pickled task.
            schedule: knows which is next.
        """
        while schedule.unfinished:
            now = time.monotonic()
            self._hand_out(load_task, schedule, now)
            self._create(schedule, now)
            self._check_places(now)
            self._check_signs_of_life(schedule, now)
            for actor, call in self._answers(schedule.seconds_to_next(now)):
                # An earlier answer of this round may have ended the actor.
                if self._actors.get(actor.number) is actor:
                    self._hear(actor, call, schedule)

    def _hand_out(self, load_task: Callable[[int], bytes], schedule: Schedule[Any], now: float) -> None:
        idle = [actor for actor in self._actors.values() if actor.state is _State.IDLE]
        for actor in sorted(idle, key=lambda actor: actor.number):
            if (index := schedule.take(now)) is None:
                return
            self._handed_out += 1
            actor.state, actor.task, actor.attempt = _State.BUSY, index, self._handed_out
            actor.told, actor.sign_of_life = ((0, 0, 0), 0), now
            actor.call = actor.handle.run.remote(actor.attempt, load_task(index))
            self._ask(actor)

    def _create(self, schedule: Schedule[Any], now: float) -> None:
        """Create as many actors as there are more tasks, and end those that were not placed and are needed no more."""
        placing = [actor for actor in self._actors.values() if actor.state is _State.PLACING]
        starting = len(placing) + sum(actor.state is _State.SETTING_UP for actor in self._actors.values())
        surplus = starting - schedule.startable(now)
        if surplus > 0 and schedule.seconds_to_next(now) is None:
            for actor in placing[-surplus:]:
                self._end(actor)
        for number in self._slots.free(set(self._actors))[: max(0, -surplus)]:
            kept = bool(self.kept)
            handle = self.kept.pop() if kept else self._new_handle()
            greeting = self._greeting
            call = handle.greet.remote(
                list(greeting.packages), greeting.token, greeting.content, dict(greeting.environment)
            )
            self._actors[number] = _Actor(number, handle, call, kept=kept)

    def _new_handle(self) -> Any:
        return self._class.options(
            name=f"{self._name} {secrets.token_hex(3)}",
            num_cpus=self._needs.num_cpus,
            num_gpus=self._needs.num_gpus,
            memory=self._needs.memory,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        ).remote()

    def _ask(self, actor: _Actor) -> None:
        busy = sum(other.state is _State.BUSY for other in self._actors.values())
        seconds = max(1.0, busy / _LOOKS_PER_SECOND)
        actor.look = actor.handle.look.remote(seconds)

    def _answers(self, seconds_to_next: float | None) -> list[tuple[_Actor, Any]]:
        """Return the calls that have been answered: those about tasks first, then those about progress."""
        timeout = _TICK if seconds_to_next is None else min(_TICK, seconds_to_next)
        calls = {actor.call: actor for actor in self._actors.values() if actor.call is not None}
        looks = {actor.look: actor for actor in self._actors.values() if actor.look is not None}
        waiting = [*calls, *looks]
        if not waiting:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        return sorted(((calls.get(ref) or looks[ref], ref) for ref in ready), key=lambda pair: pair[1] in looks)

    def _hear(self, actor: _Actor, call: Any, schedule: Schedule[Any]) -> None:
        """Act on an answer."""
        try:
            answer = self._ray.get(call)
        except Exception as error:  # Ray raises its own errors, or what went wrong while an answer was sent
            log.debug("worker %d of the Ray cluster: %s", actor.number, error)
            self._lost(actor, self._loss_in_words(actor, error), schedule)
            return
        if call is actor.look:
            actor.look = None
            self._hear_look(actor, answer, schedule)
            return
        actor.call = None
        actor.sign_of_life = time.monotonic()
        if actor.state is _State.PLACING:
            self._greeting.check(answer)
            actor.node, actor.state = f"{answer['node']}", _State.SETTING_UP
            actor.call = actor.handle.set_up.remote(self._setup)
        elif actor.state is _State.SETTING_UP:
            self._hear_setup(actor, answer)
        else:
            self._hear_outcome(actor, answer, schedule)

    def _hear_setup(self, actor: _Actor, problem: Any) -> None:
        if problem is None:
            actor.state = _State.IDLE
            self._slots.set_up()
            return
        self._end(actor)
        message = f"{problem.message} (on node {actor.node})"
        if problem.input_at_fault:
            raise InputError(message)
        self._slots.false_start(actor.number, message, trace=problem.trace)

    def _hear_look(self, actor: _Actor, answer: Any, schedule: Schedule[Any]) -> None:
        if actor.state is not _State.BUSY:
            return
        if answer is not None and answer[0] == actor.attempt:
            self._count(actor, answer[1], answer[2], schedule)
        self._ask(actor)

    def _count(self, actor: _Actor, amounts: Amounts, calls: int, schedule: Schedule[Any]) -> None:
        before, calls_before = actor.told
        actor.told = (amounts, calls)
        if calls != calls_before:
            actor.sign_of_life = time.monotonic()
        more = (amounts[0] - before[0], amounts[1] - before[1], amounts[2] - before[2])
        schedule.progress(actor.task, more)

    def _hear_outcome(self, actor: _Actor, outcome: Outcome, schedule: Schedule[Any]) -> None:
        self._count(actor, outcome.amounts, actor.told[1], schedule)
        actor.state = _State.IDLE
        self._slots.worked(actor.number)
        if outcome.problem is None:
            schedule.succeed(actor.task, outcome.result)
            return
        log.debug("task %d on node %s: %s", actor.task, actor.node, outcome.problem.trace)
        again = not outcome.problem.input_at_fault
        schedule.fail(actor.task, outcome.problem.message, again=again, now=time.monotonic())

    def _loss_in_words(self, actor: _Actor, error: Exception) -> str:
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return describe(error.cause) if error.cause is not None else f"its worker failed on node {actor.node}"
        return death_in_words(error, actor.node)

    def _lost(self, actor: _Actor, how: str, schedule: Schedule[Any]) -> None:
        """Clear up after an actor that is lost; another one takes its place when there is a task for it."""
        self._end(actor)
        if actor.state is _State.BUSY:
            schedule.fail(actor.task, how, again=True, now=time.monotonic())
        elif not actor.kept:
            self._slots.false_start(actor.number, how)

    def _end(self, actor: _Actor) -> None:
        del self._actors[actor.number]
        self._kill(actor.handle)

    def _kill(self, handle: Any) -> None:
        with suppress(Exception):  # it may be dead, or its node, or the cluster
            self._ray.kill(handle, no_restart=True)

    def _check_places(self, now: float) -> None:
        """Check that there is at least one worker, or has been within the timeout.

        Raises:
            InputError: there is none.
        """
        placed = [actor for actor in self._actors.values() if actor.state is not _State.PLACING]
        if placed or not self._actors:
            self._nobody_since = None
            return
        if self._nobody_since is None:
            self._nobody_since = now
        if now - self._nobody_since >= self._place_timeout:
            raise InputError(
                f"the Ray cluster had no place for a worker for {self._place_timeout:g} s: each needs {self._needs}, "
                f"the cluster has {resources_in_words(self._ray)}, perhaps used by other jobs; "
                "ask for less, wait, or raise --ray-timeout"
            )

    def _check_signs_of_life(self, schedule: Schedule[Any], now: float) -> None:
        for actor in list(self._actors.values()):
            waiting = actor.state in (_State.SETTING_UP, _State.BUSY)
            if waiting and now - actor.sign_of_life >= self._hang_timeout:
                how = f"it gave no sign of life for {self._hang_timeout:g} s on node {actor.node}"
                self._lost(actor, how, schedule)
