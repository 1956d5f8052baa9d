"""One database, one writer.

Every change goes through one thread that takes all waiting functions, runs each in a savepoint of one transaction (one that is
alone needs none), and commits once. A future resolves only after that commit, so what was acknowledged is on the disk, and the cost
of the fsync is shared by all who wait (group commit). Reads run on the caller's thread with a pooled connection and never wait for
the writer.

Functions given to `write` may run twice: when PostgreSQL drops the connection during the commit, nobody can know whether it took
effect. Everything in this package is therefore idempotent.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Transaction
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from everlearn.config import masked
from everlearn.errors import InvalidRequest, Unavailable
from everlearn.faultpoints import reach

T = TypeVar("T")
Job = tuple[Callable[[Connection], Any], "Future[Any]", bool]

BUSY_SECONDS = 30
UNSCRUBBED = "what was forgotten is deleted, but its last bytes wait to be overwritten: try again"
BATCH_LIMIT = 256
RETRIES = 3
CLAIM_SECONDS = 5.0
SERVER_LOCK = 0x65766C6E  # an arbitrary number that means "the server of this database" among PostgreSQL's advisory locks
MIGRATION_LOCK = SERVER_LOCK + 1
WRITES = {"everlearn_writes": True}


class Database:
    """An open, migrated database. Thread-safe. `write` for changes, `read` for everything else."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.dialect = engine.dialect.name
        # PostgreSQL's default gives each statement a state of its own; SQLite's transactions see one anyway.
        self._reader = engine if self.dialect == "sqlite" else engine.execution_options(isolation_level="REPEATABLE READ")
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._claim: Any = None
        self._connection: Connection | None = None  # the writer thread's; `_flushes`: whether its commits wait for the disk
        self._flushes = True
        self._copying = threading.Lock()  # held while the file is written anew, and by a transaction of the writer's
        self._writer = threading.Thread(target=self._write_loop, name="store-writer", daemon=True)
        self._writer.start()

    def write(self, fn: Callable[[Connection], T], flush: bool = True) -> Future[T]:
        """Runs `fn(conn)` on the writer thread; the future holds its value once the commit is durable. What `fn` raises undoes
        that function's own changes only. Fails with Unavailable when the database can't be written.

        `flush=False` is for what can be asked for again (a sample and its answer): its commit survives the death of this process
        but, until the next flushed one, not that of the machine."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("the store is closed; this server is shutting down")
            self._jobs.put((fn, future, flush))
        return future

    def read(self, fn: Callable[[Connection], T]) -> T:
        """Runs `fn(conn)` here, in a transaction that sees one state of the database and is rolled back after it."""
        with self._reader.connect() as conn:
            return fn(conn)

    def scrub(self, tables: Sequence[str]) -> None:
        """Takes the last bytes of deleted rows of `tables` from the disk; blocks for as long as copying takes, on SQLite of the whole file.
        Writes wait meanwhile. (PostgreSQL's write-ahead files keep older pages until it recycles them.)"""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            driver: Any = conn.connection.driver_connection
            try:
                if self.dialect == "sqlite":
                    with self._copying:
                        for statement in ("PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                            self._patiently(driver, statement)
                else:
                    for table in tables:
                        driver.execute(f"VACUUM FULL {table}")
            except self.engine.dialect.dbapi.Error as error:  # type: ignore[union-attr]
                raise Unavailable(f"the store can't be written anew ({error}); {UNSCRUBBED}") from None

    def _patiently(self, driver: Any, statement: str) -> None:
        """A checkpoint that a reader kept from ending says so in its answer, and is begun again."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            row = driver.execute(statement).fetchone()
            if row is None or row[0] == 0:
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"the store is busy; {UNSCRUBBED}")
            time.sleep(0.05)

    def claim_server(self) -> None:
        """Makes this process the server of the database until it ends; refuses when another one is. Commands that only look
        or change single rows (key create, run list) need no claim."""
        self._claim = _claim_file(self.engine) if self.dialect == "sqlite" else _claim_advisory(self.engine)

    def close(self) -> None:
        """Writes what is queued, then closes. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._writer.join()
        if self._connection is not None:
            self._connection.close()
        if self._claim is not None:
            self._claim.close()
        self.engine.dispose()

    def _write_loop(self) -> None:
        running = True
        while running:
            batch: list[Job] = []
            job = self._jobs.get()
            while job is not None:
                batch.append(job)
                if len(batch) >= BATCH_LIMIT:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            running = job is not None
            live = [job for job in batch if job[1].set_running_or_notify_cancel()]
            if live:
                self._commit(live)

    def _commit(self, batch: list[Job]) -> None:
        for attempt in range(RETRIES):
            try:
                outcomes = self._run(batch)
                break
            except DBAPIError as error:
                if error.connection_invalidated and attempt + 1 < RETRIES:
                    time.sleep(0.2 * 4**attempt)
                    continue
                return _fail(batch, error)
            except Exception as error:  # noqa: BLE001  # a dead writer thread would leave every caller waiting for ever
                return _fail(batch, error)
        for (_, future, _), (value, raised) in zip(batch, outcomes, strict=True):
            if raised is None:
                future.set_result(value)
            else:
                future.set_exception(_told(raised))

    def _run(self, batch: list[Job]) -> list[tuple[Any, BaseException | None]]:
        outcomes: list[tuple[Any, BaseException | None]] = []
        with self._copying, self._writing(any(flush for _, _, flush in batch)) as conn:
            for fn, _, _ in batch:
                savepoint = conn.begin_nested() if len(batch) > 1 else conn.get_transaction()
                assert savepoint is not None
                try:
                    value = fn(conn)
                    if len(batch) > 1:
                        savepoint.commit()
                    outcomes.append((value, None))
                except Exception as error:  # noqa: BLE001  # it belongs to whoever waits on the future, not to this thread
                    if isinstance(error, DBAPIError):
                        _undo_or_raise(conn, savepoint, error)
                    else:
                        savepoint.rollback()
                    outcomes.append((None, error))
            reach("store.commit.before")
        reach("store.commit.after")
        return outcomes

    @contextmanager
    def _writing(self, flush: bool) -> Iterator[Connection]:
        """A transaction of the writer's own connection, whose commit waits for the disk, or only for the operating system. After an
        error that isn't the database's own, or that lost the connection, the next one gets another connection."""
        if self._connection is None:
            self._connection, self._flushes = self.engine.connect().execution_options(**WRITES), True
        conn = self._connection
        try:
            if conn.dialect.name == "sqlite" and flush != self._flushes:
                driver: Any = conn.connection.driver_connection
                driver.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")  # takes effect outside of transactions only
                self._flushes = flush
            with conn.begin():
                if conn.dialect.name == "postgresql" and not flush:
                    conn.exec_driver_sql("SET LOCAL synchronous_commit = off")
                yield conn
        except BaseException as error:
            if not isinstance(error, DBAPIError) or error.connection_invalidated:
                self._connection = None
                conn.invalidate()
                conn.close()
            raise


def open_database(url: str) -> Database:
    """Opens the database at an SQLAlchemy URL (`sqlite:////path/file.db`, `postgresql+psycopg://...`), brings its schema to the
    newest version, and returns it. An SQLite file and its folder are made when absent."""
    engine = make_engine(url)
    try:
        migrate(engine)
    except DBAPIError as error:
        engine.dispose()
        raise Unavailable(f"can't open the database {engine.url!r}: {error.orig}; check store.url and that the server runs") from error
    return Database(engine)


def make_engine(url: str) -> Engine:
    """An engine with the durability settings of its dialect; creates no tables."""
    try:
        parsed = sa.make_url(url)
    except (SQLAlchemyError, ValueError):  # what they say may hold the password
        way_out = "write it like sqlite:////path/file.db or postgresql+psycopg://user:password@host:5432/database"
        raise InvalidRequest(f"store.url {masked(url)!r} is not an SQLAlchemy URL; {way_out}", param="store.url") from None
    dialect = parsed.get_backend_name()
    if dialect == "postgresql":
        return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_size=8, max_overflow=24, pool_pre_ping=True)
    if dialect != "sqlite" or parsed.database in (None, "", ":memory:"):
        way_out = "use sqlite:////path/file.db or postgresql+psycopg://..."
        raise InvalidRequest(f"store.url {masked(url)!r} names no durable database; {way_out}", param="store.url")
    Path(parsed.database).expanduser().parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=8, max_overflow=24)
    sa.event.listen(engine, "connect", _sqlite_connect)
    sa.event.listen(engine, "begin", _sqlite_begin)
    return engine


def migrate(engine: Engine, down_to: str | None = None) -> None:
    """Brings the schema to the newest revision (or down to an older one: `base` is nothing), in one transaction that other
    processes wait for."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.connect().execution_options(**WRITES) as conn, conn.begin():
        if engine.dialect.name == "postgresql":
            conn.execute(sa.text("SELECT pg_advisory_xact_lock(:id)"), {"id": MIGRATION_LOCK})
        config.attributes["connection"] = conn
        if down_to is None:
            command.upgrade(config, "head")
        else:
            command.downgrade(config, down_to)


def _sqlite_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not guessed by the driver
    cursor = connection.cursor()
    if cursor.execute("PRAGMA page_count").fetchone()[0] == 0:  # only counts for a new file, and would wait for a writer on any other
        cursor.execute("PRAGMA auto_vacuum = INCREMENTAL")  # lets the log give space back
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_size_limit = 67108864")
    cursor.close()


def _sqlite_begin(conn: Connection) -> None:
    # A deferred transaction that reads and then writes fails when another process wrote in between; IMMEDIATE waits instead.
    conn.exec_driver_sql("BEGIN IMMEDIATE" if conn.get_execution_options().get("everlearn_writes") else "BEGIN")


def _undo_or_raise(conn: Connection, savepoint: Transaction, error: DBAPIError) -> None:
    """Some failures (a full disk, a lost connection) take the whole transaction with them: then the batch failed, by that error."""
    if error.connection_invalidated:
        raise error
    driver: Any = conn.connection.driver_connection
    if conn.dialect.name == "sqlite" and not driver.in_transaction:
        raise error
    try:
        savepoint.rollback()
    except DBAPIError:
        raise error from None


def _fail(batch: list[Job], error: Exception) -> None:
    reason = getattr(error, "orig", None) or error
    for _, future, _ in batch:
        future.set_exception(Unavailable(f"the store can't be written ({reason}); nothing was accepted, try again"))


def _told(error: BaseException) -> BaseException:
    """What whoever waits for a function is told of its failure. A full disk, a database that restarts or two that block each other say
    nothing about the request: it may come again. (SQLite's general error is a mistake in the statement.)"""
    if isinstance(error, OperationalError | InterfaceError) and getattr(error.orig, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:
        return Unavailable(f"the store can't be written ({error.orig}); nothing was accepted, try again")
    if isinstance(error, OSError):
        return Unavailable(f"the store can't be written ({error}); nothing was accepted, try again")
    return error


def _claim_file(engine: Engine) -> Any:
    import fcntl

    path = Path(str(engine.url.database)).expanduser()
    file = path.with_name(path.name + ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise Unavailable(f"another everlearn server uses {path}; stop it, or give this one its own home folder") from error
    return file


def _claim_advisory(engine: Engine) -> Connection:
    conn = engine.connect().execution_options(isolation_level="AUTOCOMMIT")  # no transaction stays open, the lock is the session's
    deadline = time.monotonic() + CLAIM_SECONDS  # PostgreSQL may take a moment to notice that the server before us was killed
    while not conn.execute(sa.text("SELECT pg_try_advisory_lock(:id)"), {"id": SERVER_LOCK}).scalar():
        if time.monotonic() > deadline:
            conn.close()
            raise Unavailable(f"another everlearn server uses database {engine.url.database!r}; stop it, or give this one its own database")
        time.sleep(0.1)
    conn.detach()  # back in the pool, the lock would outlive the claim
    return conn
