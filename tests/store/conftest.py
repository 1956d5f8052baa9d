"""A store on each of the two databases, and small ways to put things into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from everlearn.store import tables
from everlearn.store.db import Database, open_database
from tests.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'everlearn.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(scope="session")
def emptied_url(postgres_server: Path) -> str:
    """One PostgreSQL database for all tests that only need empty tables: making and migrating one takes a second."""
    with psycopg.connect(host=str(postgres_server), user="everlearn", dbname="postgres", autocommit=True) as admin:
        admin.execute("CREATE DATABASE emptied")
    return f"postgresql+psycopg://everlearn@/emptied?host={postgres_server}"


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        database = open_database(f"sqlite:///{tmp_path / 'everlearn.db'}")
    else:
        database = open_database(request.getfixturevalue("emptied_url"))
        names = ", ".join(tables.metadata.tables)
        database.write(lambda conn: conn.execute(sa.text(f"TRUNCATE {names}"))).result(30)
    yield database
    database.close()
