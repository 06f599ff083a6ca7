"""Worker processes that end with the process that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from prelar.utils.errors import UserError

CANCELLED = 1


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` freshly started processes.

    When the block fails, what has not started is cancelled, and what runs is ended. Ctrl-C is left to the
    parent, and a worker whose parent is killed ends itself. Raises `UserError` where a worker dies.
    """
    clean = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(count, mp_context=clean, initializer=follow_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for want of memory; make room and run again"
        ) from None
    except BaseException:
        for worker in list((pool._processes or {}).values()):
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent(*others: signal.Signals) -> None:
    """Leave Ctrl-C and `others` to the parent, and end this worker as soon as its parent has ended."""
    for number in (signal.SIGINT, *others):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(CANCELLED)

    threading.Thread(target=watch, daemon=True).start()
