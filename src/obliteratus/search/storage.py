"""The storage of a study: a journal file, or any database that Optuna supports. Calls are retried if it is down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note

T = TypeVar("T")
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError, OSError)
RETRY_WAITS = (1.0, 4.0, 15.0)  # seconds before each retry: a restarted server is back after about ten

# Seconds after which the lock of a process that was killed while it wrote is broken. A write takes milliseconds, so
# Optuna's 30 only keep the other workers waiting.
LOCK_GRACE = 10


def open_storage(location: str) -> BaseStorage:
    """Open a database URL (``postgresql://…``, ``sqlite:///…``), the journal file at a path, or memory for ``""``.

    Raises UserError if it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our own progress reports what a trial found
    logging.getLogger("optuna").propagate = False
    if not location:
        return InMemoryStorage()
    if "://" not in location:
        return with_retries(retry(lambda: _open_journal(location), location), location)
    try:
        # pool_pre_ping notices a connection that the server dropped before it is used.
        database = retry(lambda: RDBStorage(location, engine_kwargs={"pool_pre_ping": True}), location)
        return with_retries(get_storage(database), location)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise UserError(
            f"--storage {hide_password(location)}: cannot be opened ({error}); give a storage URL of Optuna"
        ) from error


def _open_journal(path: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(path, JournalFileSymlinkLock(path, grace_period=LOCK_GRACE)))


def retry(call: Callable[[], T], location: str) -> T:
    """Return the result of the call, retrying it if the storage does not answer.

    Raises StorageUnreachableError if the last try fails too. Finished trials are in the study by then.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return call()
        except (ArgumentError, NoSuchModuleError):
            raise
        except STORAGE_ERRORS as error:
            if wait is None:
                raise StorageUnreachableError(
                    f"--storage {hide_password(location)}: does not answer ({_first_line(error)}); finished trials are "
                    "safe in it, so run the same command again once it answers"
                ) from error
            note("storage", f"no answer, trying again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class StorageUnreachableError(UserError):
    """The storage does not answer any more."""


def with_retries(storage: BaseStorage, location: str) -> BaseStorage:
    """Return the same storage with each of its calls wrapped in `retry`."""
    for name in BaseStorage.__abstractmethods__:
        call = getattr(storage, name)
        setattr(storage, name, lambda *a, _call=call, **k: retry(lambda: _call(*a, **k), location))
    return storage


def hide_password(url: str) -> str:
    """Return a URL without its password."""
    scheme, sign, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{sign}{user.partition(':')[0]}{at}{host}" if at else url


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
