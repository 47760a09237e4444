"""A simulated run of the job: shards pass through feature actors and GPUs that start, work and are lost.

    shards in order -> feature actors -> waiting features -> model actors -> committed

A discrete-event simulation. Knows nothing of Ray, storage or prices.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.pipeline import LOST_WORKER_RETRIES
from jobs.stages import TASKS_PER_ACTOR
from parakeet_core.errors import ConfigError


@dataclass(frozen=True)
class Fleet:
    """The machines of a run.

    Attributes:
        models: model actors, each on a node of its own that can be lost.
        model_rtfx: seconds of audio that a model actor processes per second.
        features: feature actors; with 0 the model actors do everything, and `model_rtfx` is for the whole chain.
        feature_rtfx: seconds of audio that a feature actor processes per second.
        shard_s: seconds of a shard that do not depend on its length.
        start_s: from requesting a node to a working actor, at the beginning and after each loss.
        losses_per_hour: of one model node.
        seed: for the random times of the losses.
    """

    models: int
    model_rtfx: float
    features: int = 0
    feature_rtfx: float = 1.0
    shard_s: float = 0.0
    start_s: float = 0.0
    losses_per_hour: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class FleetRun:
    """The result of a simulated run.

    Attributes:
        wall_s: from the beginning of the start-up to the last commit.
        model_hours, feature_hours: hours that are paid for: start-up, work and waiting.
        busy_hours: of the model actors, including work that was lost.
        idle_share: idle part of the time in which model actors were up.
        losses: nodes lost. lost_s: seconds of work lost with them.
        shards: committed by each model actor.
    """

    wall_s: float
    model_hours: float
    feature_hours: float
    busy_hours: float
    idle_share: float
    losses: int
    lost_s: float
    shards: tuple[int, ...]


def simulate_run(shard_audio_s: Sequence[float] | np.ndarray, fleet: Fleet) -> FleetRun:
    """Let a fleet process shards, in order.

    Raises:
        ConfigError: a shard is lost more often than the job allows.
    """
    simulation = _Simulation(np.asarray(shard_audio_s, np.float64), fleet)
    simulation.run()
    return simulation.result()


class _Simulation:
    def __init__(self, audio_s: np.ndarray, fleet: Fleet):
        self.fleet, self.rng = fleet, np.random.default_rng(fleet.seed)
        self.model_s = (audio_s / fleet.model_rtfx + fleet.shard_s).tolist()
        self.feature_s = (audio_s / fleet.feature_rtfx).tolist()
        self.now, self.committed = 0.0, 0
        self.order = itertools.count()
        self.events: list[tuple[float, int, Callable, int, int]] = []  # time, order, handler, model or shard, epoch
        self.to_prepare = deque(range(len(audio_s)) if fleet.features else ())
        self.waiting = deque(() if fleet.features else range(len(audio_s)))  # shards whose features are ready
        self.preparing, self.room = 0, TASKS_PER_ACTOR * fleet.models + fleet.features
        self.shard: list[int | None] = [None] * fleet.models
        self.began, self.epoch = [0.0] * fleet.models, [0] * fleet.models
        self.up_since: list[float | None] = [None] * fleet.models
        self.done, self.busy_s, self.up_s = [0] * fleet.models, 0.0, 0.0
        self.losses, self.lost_s, self.lost_shards = 0, 0.0, {}
        for model in range(fleet.models):
            self._at(fleet.start_s, self._model_starts, model)
        if fleet.features:
            self._at(fleet.start_s, self._features_start, 0)

    def run(self) -> None:
        while self.committed < len(self.model_s):
            self.now, _, handle, who, epoch = heapq.heappop(self.events)
            handle(who, epoch)

    def _at(self, time_s: float, handle: Callable, who: int, epoch: int = 0) -> None:
        heapq.heappush(self.events, (time_s, next(self.order), handle, who, epoch))

    def _features_start(self, _who: int, _epoch: int) -> None:
        """Give free feature actors their next shards, while there is room for their results."""
        while (
            self.to_prepare and self.preparing < self.fleet.features and self.preparing + len(self.waiting) < self.room
        ):
            shard = self.to_prepare.popleft()
            self.preparing += 1
            self._at(self.now + self.feature_s[shard], self._features_done, shard)

    def _features_done(self, shard: int, _epoch: int) -> None:
        self.preparing -= 1
        self.waiting.append(shard)
        self._feed_models()

    def _model_starts(self, model: int, _epoch: int) -> None:
        self.up_since[model] = self.now
        if self.fleet.losses_per_hour:
            self._at(self.now + self.rng.exponential(3600 / self.fleet.losses_per_hour), self._node_lost, model)
        self._feed(model)

    def _feed_models(self) -> None:
        for model in range(self.fleet.models):
            if not self.waiting:
                break
            if self.up_since[model] is not None and self.shard[model] is None:
                self._feed(model)
        self._features_start(0, 0)

    def _feed(self, model: int) -> None:
        if not self.waiting:
            return
        shard = self.waiting.popleft()
        self.shard[model], self.began[model] = shard, self.now
        self._at(self.now + self.model_s[shard], self._model_done, model, self.epoch[model])
        self._features_start(0, 0)

    def _model_done(self, model: int, epoch: int) -> None:
        if epoch != self.epoch[model]:
            return  # the node was lost in the meantime
        self.busy_s += self.now - self.began[model]
        self.shard[model] = None
        self.done[model] += 1
        self.committed += 1
        self._feed(model)

    def _node_lost(self, model: int, _epoch: int) -> None:
        self.losses += 1
        self.epoch[model] += 1
        self.up_s += self.now - self.up_since[model]
        self.up_since[model] = None
        shard, self.shard[model] = self.shard[model], None
        if shard is not None:
            self._shard_lost(shard, self.now - self.began[model])
        self._at(self.now + self.fleet.start_s, self._model_starts, model)

    def _shard_lost(self, shard: int, worked_s: float) -> None:
        self.busy_s += worked_s
        self.lost_s += worked_s
        self.lost_shards[shard] = self.lost_shards.get(shard, 0) + 1
        if self.lost_shards[shard] > LOST_WORKER_RETRIES:
            raise ConfigError(
                f"a shard of {self.model_s[shard]:,.0f} s of work is lost more than {LOST_WORKER_RETRIES} times at "
                f"{self.fleet.losses_per_hour:g} losses an hour, and the job would stop: use shorter shards"
            )
        self.waiting.appendleft(shard)
        self._feed_models()

    def result(self) -> FleetRun:
        up_s = self.up_s + sum(self.now - since for since in self.up_since if since is not None)
        starts = self.fleet.models + self.losses
        return FleetRun(
            wall_s=self.now,
            model_hours=(up_s + starts * self.fleet.start_s) / 3600,
            feature_hours=self.fleet.features * self.now / 3600,
            busy_hours=self.busy_s / 3600,
            idle_share=1 - self.busy_s / up_s if up_s else 0.0,
            losses=self.losses,
            lost_s=self.lost_s,
            shards=tuple(self.done),
        )
