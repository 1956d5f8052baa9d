"""Playing that goes on while others train: a thread with an event loop of its own, which keeps groups in play and hands them over.

A group is played by one version: the newest at its first sample. How many groups may be out (in play, or played and not yet given back)
is bounded, so that nothing gets old by waiting. What goes wrong in an episode stays in it, as everywhere; what goes wrong with the
thread (a dataset that raises, an environment that computes without ever awaiting) is raised to whoever takes groups, who never waits
for what can't come.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import tinker

from everlearn.errors import Unavailable
from everlearn.rl.env import Dataset, EnvGroup, StopCondition
from everlearn.rl.policy import TinkerPolicy, seed_of
from everlearn.rl.rollouts import GRACE_SECONDS, Limits, end_loop, play_group
from everlearn.rl.trajectory import Action, TrajectoryGroup

POLL_SECONDS = 0.2


class Played(NamedTuple):
    """`version` played it; None if it failed before its first sample."""

    group: TrajectoryGroup
    version: int | None


class Players:
    """Plays batches of `dataset` in order, from batch `first` on, at most `room` groups at a time. A context: leaving it cancels all."""

    def __init__(self, dataset: Dataset, limits: Limits, room: int, seed: int, first: int = 0):
        self.dataset, self.limits, self.seed, self.first = dataset, limits, seed, first
        self._newest: tuple[TinkerPolicy, int] | None = None
        self._played: queue.SimpleQueue[Played | BaseException] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(room)
        self._beat = 0.0
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="everlearn-players", daemon=True)

    def __enter__(self) -> Players:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._thread.is_alive():
            if self._newest is None:  # it never began
                self._loop.close()
            return
        self._tell(self._cancel)
        self._thread.join(3 * GRACE_SECONDS)  # a thread that computes without end is left behind; it ends with the process

    def publish(self, sampler: tinker.SamplingClient, max_tokens: int, version: int) -> None:
        """From now on groups begin with this version. The first one starts the playing."""
        begins = self._newest is None
        self._newest = (TinkerPolicy(sampler, max_tokens), version)
        if begins:
            self._thread.start()

    def give_back(self, number: int) -> None:
        """So many of the groups that were taken are done with: as many more may be played."""
        for _ in range(number):
            self._tell(self._places.release)

    def take(self) -> Played:
        """The next group that was played, as soon as there is one. Raises what ended the playing, and Unavailable when it stands still."""
        silent, beat = 0.0, self._beat
        while True:
            try:
                found = self._played.get(timeout=POLL_SECONDS)
            except queue.Empty:
                silent, beat = (silent + POLL_SECONDS if beat == self._beat else 0.0), self._beat
                if not self._thread.is_alive():
                    raise Unavailable("nobody plays any more: the thread that plays has ended; continue the run") from None
                if silent > self.limits.seconds + GRACE_SECONDS:
                    raise Unavailable(
                        f"playing has stood still for {silent:.0f} s, out of reach of the time limit: an environment computes without "
                        "awaiting; let such work run in asyncio.to_thread or in a process"
                    ) from None
                continue
            if isinstance(found, BaseException):
                raise found
            return found

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._play())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by who takes groups
            self._played.put(error)
        finally:
            self._ending = True  # end_loop cancels by itself, and must not be cancelled
            end_loop(self._loop)

    async def _play(self) -> None:
        beats = asyncio.ensure_future(self._keep_beating())
        room = asyncio.Semaphore(self.limits.episodes_at_once)
        tasks: set[asyncio.Task[None]] = {beats}
        for group, seed in self._groups():
            await self._places.acquire()
            task = asyncio.ensure_future(self._one(group, seed, room))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _one(self, group: EnvGroup, seed: int, room: asyncio.Semaphore) -> None:
        policy = _Newest(self)
        try:
            played = await play_group(group, policy, self.limits, seed, room)
        except Exception as error:  # noqa: BLE001 - play_group raises nothing of the group's; whatever this is, someone must hear it
            self._played.put(error)
            return
        self._played.put(Played(played, policy.version))

    def _groups(self) -> Iterator[tuple[EnvGroup, int]]:
        """The dataset's groups and their seeds, which are those of the synchronous loop; after its last batch comes its first again."""
        index = self.first
        while True:
            for place, group in enumerate(self.dataset.get_batch(index % len(self.dataset))):
                yield group, seed_of(seed_of(self.seed, "train", index), place)
            index += 1

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(POLL_SECONDS / 2)

    def _cancel(self) -> None:
        for task in () if self._ending else asyncio.all_tasks(self._loop):
            task.cancel()

    def _tell(self, act: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(act)
        except RuntimeError:
            pass  # the loop has ended, and nothing is left to tell

    def newest(self) -> tuple[TinkerPolicy, int]:
        assert self._newest is not None, "playing begins with the first version"
        return self._newest


class _Newest:
    """A policy that is decided at the first sample, and stays: all members of a group are played by one version."""

    def __init__(self, players: Players):
        self.players = players
        self.policy: TinkerPolicy | None = None
        self.version: int | None = None

    async def __call__(self, observation: tinker.ModelInput, stop: StopCondition, seed: int | None) -> Action:
        if self.policy is None:
            self.policy, self.version = self.players.newest()
        return await self.policy(observation, stop, seed)
