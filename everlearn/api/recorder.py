"""Records on their way into the store, behind the backs of the answers.

`add` takes microseconds and never waits: a thread packs what has come, and hands it to the store's writer in one piece, so that
many records share a commit. A store that can't be written is tried again until it can; meanwhile `backlog` names the reason, and
no further answer is begun once too much waits (everlearn/api/limiter.py), because an answer without its record is a broken promise.
`close` writes what is left.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial

from sqlalchemy.exc import InterfaceError, OperationalError

from everlearn.errors import Unavailable
from everlearn.store import records
from everlearn.store.db import Database
from everlearn.store.records import Packed, Record

log = logging.getLogger(__name__)

BATCH = 64  # records of one transaction: a longer one would keep the writer from others
MAX_WAITING = 20_000
MAX_WAITING_BYTES = 256 * 2**20
TOKEN_BYTES = 32  # what a waiting record holds for each token: the id, the log-probability, a share of the text
GATHER_SECONDS = 0.03  # a record waits this long for others: a commit costs ten times what one more record in it does
RETRY_SECONDS = 1.0


class Recorder:
    """`written` is called on the writing thread with the number of records of each commit, `lost` with those that can't be stored."""

    def __init__(self, db: Database, written: Callable[[int], object] = int, lost: Callable[[int], object] = int):
        self.db, self.written, self.lost = db, written, lost
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._waiting: dict[str, int] = {}  # ids that aren't durable yet, and about how many bytes each holds
        self._bytes = 0
        self._events: dict[str, asyncio.Event] = {}  # of those that somebody waits for
        self._problem = ""
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Call on the event loop that will call `add`."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def add(self, record: Record) -> None:
        """Takes a record; it is durable a moment later. Give a record once its answer is complete (or was cut off)."""
        size = TOKEN_BYTES * (record.prompt_tokens + record.completion_tokens)
        self._waiting[record.record_id] = size
        self._bytes += size
        self._queue.put(record)

    def __len__(self) -> int:
        """Records that aren't durable yet."""
        return len(self._waiting)

    def backlog(self) -> str:
        """Why no further answer should be begun; empty while all is well."""
        if len(self._waiting) < MAX_WAITING and self._bytes < MAX_WAITING_BYTES:
            return ""
        return f"{len(self._waiting)} answers wait to be recorded ({self._problem or 'the store is slow'})"

    async def settled(self, record_id: str, timeout: float = 10.0) -> None:
        """Returns when the record, if it was added here, can be read from the store."""
        if record_id not in self._waiting:
            return
        event = self._events.setdefault(record_id, asyncio.Event())
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            raise Unavailable(f"record {record_id} isn't in the store yet ({self._problem or 'it is slow'}); ask again") from None

    def close(self) -> None:
        """Writes what was added, and ends; a store that can't be written now is tried once more. Blocking."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._queue.put(None)
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            record = self._queue.get()
            self._closing.wait(GATHER_SECONDS)
            batch: list[Packed] = []
            while record is not None:
                try:
                    batch.append(records.pack(record))
                except Exception:  # one answer that can't be packed must not end the recording of all others
                    log.exception("record %s can't be packed", record.record_id)
                    self._gone([record.record_id], self.lost)
                if len(batch) >= BATCH:
                    break
                try:
                    record = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._store(batch)
            if record is None:
                return

    def _store(self, batch: list[Packed]) -> None:
        ids = [row.record_id for row, _ in batch]
        while True:
            last = self._closing.is_set()
            try:
                self.db.write(partial(records.write, packed=batch)).result()
                self._problem = ""
                return self._gone(ids, self.written)
            except (Unavailable, OperationalError, InterfaceError) as error:
                if not self._problem:
                    log.warning("%d records wait: %s", len(self._waiting), error)
                self._problem = str(error)[:300]
                if last:
                    log.error("%d records are lost: %s", len(ids), error)
                    return self._gone(ids, self.lost)
                self._closing.wait(RETRY_SECONDS)
            except Exception:  # not the store's state but something in the batch
                if len(batch) == 1:
                    log.exception("record %s can't be stored", ids[0])
                    return self._gone(ids, self.lost)
                for packed in batch:
                    self._store([packed])
                return None

    def _gone(self, ids: list[str], tell: Callable[[int], object]) -> None:
        tell(len(ids))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._forget, ids)

    def _forget(self, ids: list[str]) -> None:
        for record_id in ids:
            self._bytes -= self._waiting.pop(record_id, 0)
            if event := self._events.pop(record_id, None):
                event.set()
