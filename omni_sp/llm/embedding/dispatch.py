"""A request's way through the replicas: cut into parts, each answered by a replica, or by another if that is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from omni_sp.errors import EngineClosedError, EngineError, InvalidInputError, QueueFullError
from omni_sp.llm.embedding.balance import Part, cost_of, split
from omni_sp.llm.embedding.connections import Answer, ConnectionLostError
from omni_sp.llm.embedding.replicas import JSON, PATH, Replica, Replicas

_MOST_LOSSES = 2
"""A request that ended so many replicas is not tried on a further one."""


class RequestTimedOutError(EngineError):
    """The replicas did not answer in time."""


class Dispatcher:
    """Sends requests to replicas.

    Attributes:
        inputs: texts under way, over all requests.
        requests: requests under way.
        is_draining: nothing new is taken on.
    """

    def __init__(self, replicas: Replicas) -> None:
        self.inputs = self.requests = 0
        self.is_draining = False
        self._replicas, self._turns = replicas, itertools.count()

    async def embed(self, fields: Mapping[str, Any], inputs: Sequence[str | list[int]]) -> list[tuple[Part, Answer]]:
        """Embed the inputs of one request.

        Args:
            fields: of the request to vLLM, without ``input``.
            inputs: texts, or lists of token ids; at least one.

        Returns:
            Each part with its answer, in the order of the inputs: all with status 200; or one with vLLM's error.

        Raises:
            QueueFullError: too much is under way.
            InvalidInputError: more inputs than may ever be under way.
            EngineClosedError: no replica is ready.
            RequestTimedOutError: no answer came in time.
            EngineError: the replicas that had it in turn have ended.
        """
        with _Admitted(self, len(inputs)):
            ready = self._ready()
            costs = [cost_of(entry) for entry in inputs]
            loads = [replica.tokens for replica in ready]
            parts = split(costs, loads, self._replicas.settings.policy, next(self._turns))
            until = time.monotonic() + self._replicas.settings.request_timeout_s

            async def answer_of(part: Part) -> tuple[Part, Answer]:
                # A replica refuses two requests of one id, and a client may send it twice.
                own = {**fields, "input": inputs[part.start : part.end], "request_id": uuid.uuid4().hex}
                body = json.dumps(own).encode()
                first, count = ready[part.replica], part.end - part.start
                return part, await self._send(body, JSON, first, inputs=count, tokens=part.cost, until=until)

            tasks = [asyncio.create_task(answer_of(part)) for part in parts]
            answered = []
            try:
                for finished in asyncio.as_completed(tasks):
                    part, answer = await finished
                    if answer.status != 200:
                        return [(part, answer)]
                    answered.append((part, answer))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return sorted(answered, key=lambda one: one[0].start)

    async def forward(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a request to one replica as it is, and return its answer; raises what embed() raises."""
        with _Admitted(self, 1):
            loads = [replica.tokens for replica in self._ready()]
            tokens = cost_of(body.decode("latin-1"))
            first = self._ready()[split([tokens], loads, self._replicas.settings.policy, next(self._turns))[0].replica]
            until = time.monotonic() + self._replicas.settings.request_timeout_s
            return await self._send(body, headers, first, inputs=1, tokens=tokens, until=until)

    async def get(self, path: str) -> Answer:
        """Ask any replica for something; raises what embed() raises."""
        timeout_s, lost = self._replicas.settings.request_timeout_s, set[tuple[int, int]]()
        until = time.monotonic() + timeout_s
        self._ready()
        while True:
            replica = await self._replicas.wait_for_other(lost, until - time.monotonic())
            try:
                return await replica.get(path, max(0.001, until - time.monotonic()))
            except ConnectionLostError:
                lost.add((replica.number, replica.generation))
            except TimeoutError as error:
                raise RequestTimedOutError(f"no answer within {timeout_s:g} s") from error

    async def drain(self, seconds: float) -> None:
        """Take on nothing new, and wait until nothing is under way, or so long."""
        self.is_draining = True
        until = time.monotonic() + seconds
        while self.requests and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def _ready(self) -> list[Replica]:
        if self.is_draining:
            raise EngineClosedError("this server is ending; it takes on nothing new")
        ready = self._replicas.ready
        if not ready:
            raise EngineClosedError(f"no replica is ready: {self._replicas.status}")
        return ready

    async def _send(
        self, body: bytes, headers: Mapping[str, str], replica: Replica, *, inputs: int, tokens: int, until: float
    ) -> Answer:
        """A replica's answer, of any status; of another replica where this one is lost."""
        losses, lost = 0, set[tuple[int, int]]()
        while True:
            generation = replica.generation
            try:
                left_s = max(0.001, until - time.monotonic())
                answer = await replica.post(PATH, body, headers, inputs=inputs, tokens=tokens, timeout_s=left_s)
                if answer.status < 500 or await replica.is_healthy():
                    return answer
                losses += 1
            except ConnectionLostError as error:
                losses += error.was_sent
            except TimeoutError as error:
                seconds = self._replicas.settings.request_timeout_s
                raise RequestTimedOutError(f"no answer within {seconds:g} s (--request-timeout)") from error
            replica.lost += 1
            lost.add((replica.number, generation))
            if losses == _MOST_LOSSES:
                raise EngineError(f"{losses} replicas ended one after the other while they had this request")
            replica = await self._replicas.wait_for_other(lost, until - time.monotonic())


class _Admitted:
    """While it is entered, so many inputs count as under way; QueueFullError where these are too many."""

    def __init__(self, dispatcher: Dispatcher, count: int) -> None:
        self._dispatcher, self._count = dispatcher, count

    def __enter__(self) -> None:
        bound = self._dispatcher._replicas.settings.max_inputs
        if self._count > bound:
            raise InvalidInputError(f"{self._count} inputs in one request: at most {bound} here (--max-inputs)")
        if self._dispatcher.inputs + self._count > bound:
            raise QueueFullError(
                f"{self._dispatcher.inputs} inputs are under way, and {self._count} more would be over the {bound} "
                "that may be (--max-inputs); try again later"
            )
        self._dispatcher.inputs += self._count
        self._dispatcher.requests += 1

    def __exit__(self, *_: object) -> None:
        self._dispatcher.inputs -= self._count
        self._dispatcher.requests -= 1
