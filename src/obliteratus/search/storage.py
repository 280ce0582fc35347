"""Where a study lives: a journal file, or any database that Optuna knows. It may answer late, or no more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note

T = TypeVar("T")
TROUBLE = (StorageInternalError, SQLAlchemyError, OSError)
WAITS = (1.0, 4.0, 15.0)  # seconds before each new try: a restarted server is back within some ten


def open_storage(where: str) -> BaseStorage:
    """The storage behind a URL (``postgresql://…``, ``sqlite:///…``), the journal file at a path, or memory for ``""``.

    Raises UserError where it cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our own progress says what a trial found
    logging.getLogger("optuna").propagate = False
    if not where:
        return InMemoryStorage()
    if "://" not in where:
        return with_retries(retry(lambda: JournalStorage(JournalFileBackend(str(Path(where)))), where), where)
    try:
        # A connection that the server dropped is noticed before it is used.
        made = retry(lambda: RDBStorage(where, engine_kwargs={"pool_pre_ping": True}), where)
        return with_retries(get_storage(made), where)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise UserError(
            f"--storage {hide_password(where)}: cannot be opened ({error}); see optuna's storage URLs"
        ) from error


def retry(call: Callable[[], T], where: str) -> T:
    """What the call gives, tried again where the storage does not answer.

    Raises SilentStorageError when it still does not: what trials have found until then is in the study.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except (ArgumentError, NoSuchModuleError):
            raise
        except TROUBLE as error:
            if wait is None:
                raise SilentStorageError(
                    f"--storage {hide_password(where)}: does not answer ({_first_line(error)}); finished trials are safe in "
                    "it: run the same command again when it does"
                ) from error
            note("storage", f"no answer, trying again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class SilentStorageError(UserError):
    """The storage answers no more."""


def with_retries(storage: BaseStorage, where: str) -> BaseStorage:
    """The same storage, each of its calls tried again where it does not answer."""
    for name in BaseStorage.__abstractmethods__:
        call = getattr(storage, name)
        setattr(storage, name, lambda *a, _call=call, **k: retry(lambda: _call(*a, **k), where))
    return storage


def hide_password(where: str) -> str:
    """A URL without its password."""
    scheme, sign, rest = where.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{sign}{user.partition(':')[0]}{at}{host}" if at else where


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
