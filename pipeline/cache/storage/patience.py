"""An end for calls that have none of their own.

One idea: a blocking call runs in a thread of its own and is left behind there when its time is
over; the thread ends with the call or with the process. It retries nothing.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")


def within(seconds: float, work: Callable[[], Answer]) -> Answer:
    """What a blocking call gives, or its error.

    Raises:
        TimeoutError: it took longer.
    """
    done: Future[Answer] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)
