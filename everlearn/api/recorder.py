"""Records on their way into the store, behind the backs of the answers.

`add` takes microseconds and never waits. It appends the record to the spool (everlearn/store/spool.py), so that kill -9 of this process
takes none along whose `add` has returned; the next process takes up what is left there. A thread packs what has come, and hands it to the
store's writer in one piece, so that many records share a commit; then the spool lets them go. A store that can't be written is tried again
until it can; meanwhile `backlog` names the reason, and no further answer is begun once too much waits (everlearn/api/limiter.py), because
an answer without its record is a broken promise. That bounds the spool too. `close` writes what is left.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence

from sqlalchemy.engine import Connection
from sqlalchemy.exc import InterfaceError, OperationalError

from everlearn.errors import Unavailable
from everlearn.store import records
from everlearn.store.db import Database
from everlearn.store.records import Packed, Record
from everlearn.store.spool import Spool

log = logging.getLogger(__name__)

BATCH = 64  # records of one transaction: a longer one would keep the writer from others
MAX_WAITING = 20_000
MAX_WAITING_BYTES = 256 * 2**20
GATHER_SECONDS = 0.03  # a record waits this long for others: a commit costs ten times what one more record in it does
RETRY_SECONDS = 1.0


class Recorder:
    """Owns the spool. `written` is called with the number of records of each commit, `lost` with those that can't be stored. `keep` is what
    the store's writer does with a batch."""

    def __init__(
        self,
        db: Database,
        spool: Spool,
        written: Callable[[int], object] = int,
        lost: Callable[[int], object] = int,
        keep: Callable[[Connection, Sequence[Packed]], object] = records.write,
    ):
        self.db, self.spool, self.written, self.lost, self.keep = db, spool, written, lost, keep
        self._queue: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()  # ids and drafts
        self._waiting: dict[str, int] = {}  # ids that aren't in the database yet, and how many bytes each holds
        self._bytes = 0
        self._bare: set[str] = set()  # of those, the ones that the spool couldn't take
        self._events: dict[str, asyncio.Event] = {}  # of those that somebody waits for
        self._problem = ""
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Call on the event loop that will call `add`. What an earlier process left in the spool comes first."""
        self._loop = asyncio.get_running_loop()
        if left := self.spool.left():
            log.info("%d records of answers were left by a process that was killed; they are being stored", len(left))
        for record_id, draft in left:
            self._take(record_id, draft)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Takes a record; it outlives this process from here on. Give a record once its answer is complete (or was cut off), and before
        the last of the answer leaves."""
        record_id = record.record_id
        try:
            draft = records.draft(record)
        except Exception:  # one answer that can't be encoded must not end as an error for who asked
            log.exception("record %s can't be encoded", record_id)
            self.lost(1)
            return
        try:
            self.spool.put(record_id, draft)
        except OSError as error:
            log.warning("record %s waits in memory alone: %s", record_id, error)
            self._bare.add(record_id)
        self._take(record_id, draft)

    async def safe(self, record_id: str) -> None:
        """Returns once a record that was added outlives this process: at once, but where the spool couldn't take it. Raises Unavailable
        if the database doesn't take it either."""
        if record_id in self._bare:
            await self.settled(record_id)

    def _take(self, record_id: str, draft: bytes) -> None:
        self._waiting[record_id] = len(draft)
        self._bytes += len(draft)
        self._queue.put((record_id, draft))

    def __len__(self) -> int:
        """Records that aren't in the database yet."""
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
        """Writes what was added, and ends; a store that can't be written now is tried once more. Blocking. May be called twice."""
        if self._thread.is_alive():
            self._closing.set()
            self._queue.put(None)
            self._thread.join()
        self.spool.close()

    # -- the thread --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            self._closing.wait(GATHER_SECONDS)
            batch: list[Packed] = []
            while item is not None:
                record_id, draft = item
                try:
                    batch.append(records.pack(draft))
                except Exception:  # one answer that can't be packed must not end the recording of all others
                    log.exception("record %s can't be packed", record_id)
                    self._gone([record_id], self.lost)
                if len(batch) >= BATCH:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._store(batch)
            if item is None:
                return

    def _store(self, batch: list[Packed]) -> None:
        ids = [one.row.record_id for one in batch]
        while True:
            last = self._closing.is_set()
            try:
                self.db.write(lambda conn: self.keep(conn, batch)).result()
                self._problem = ""
                return self._gone(ids, self.written)
            except (Unavailable, OperationalError, InterfaceError) as error:
                if not self._problem:
                    log.warning("%d records wait: %s", len(self._waiting), error)
                self._problem = str(error)[:300]
                if last:
                    return self._left(ids, error)
                self._closing.wait(RETRY_SECONDS)
            except Exception:  # not the store's state but something in the batch
                if len(batch) == 1:
                    log.exception("record %s can't be stored", ids[0])
                    return self._gone(ids, self.lost)
                for packed in batch:
                    self._store([packed])
                return None

    def _left(self, ids: list[str], error: Exception) -> None:
        """The end, and the store can't be written."""
        bare = [record_id for record_id in ids if record_id in self._bare]
        log.error("%d records wait in the spool for the next start: %s", len(ids) - len(bare), error)
        if bare:
            log.error("%d records are lost: neither the spool nor the database took them", len(bare))
            self._gone(bare, self.lost)

    def _gone(self, ids: list[str], tell: Callable[[int], object]) -> None:
        self.spool.drop(ids)  # before anybody hears of it: one that is deleted now must not come back from the spool
        tell(len(ids))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._forget, ids)

    def _forget(self, ids: list[str]) -> None:
        for record_id in ids:
            self._bytes -= self._waiting.pop(record_id, 0)
            self._bare.discard(record_id)
            if event := self._events.pop(record_id, None):
                event.set()
