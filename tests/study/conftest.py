"""Studies in tests write to SQLite without waiting for the disk: a killed process loses nothing by that."""

from __future__ import annotations

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine


@pytest.fixture(autouse=True)
def _sqlite_does_not_wait_for_the_disk():
    def relax(connection, record):
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)
