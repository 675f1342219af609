"""Connections whose heads must arrive in time, and be heads: a client that sends half of one, or nothing, does not keep its place."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from omni_jax.serve.guards import refused


class PromptHeads(H11Protocol):
    """uvicorn's protocol, which waits for the rest of a head for ever; here it has as long as an idle connection (`timeout_keep_alive`).

    Bodies have their own limit (`guards.Rules.max_seconds`).
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in the form of all other refusals."""
        answer = refused(400, msg, {"connection": "close"})
        for event in (h11.Response(status_code=400, headers=answer.raw_headers), h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect(self) -> None:
        """Starts the time of a head that is awaited; ends it where the head has arrived."""
        if self.conn.their_state is not h11.IDLE and self._late is not None:
            self._late.cancel()
            self._late = None
        elif self.conn.their_state is h11.IDLE and self._late is None:
            self._late = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
