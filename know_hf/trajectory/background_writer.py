"""One piece of writing at a time, beside the training."""

import threading
from collections.abc import Callable

from transformers.utils import logging

logger = logging.get_logger(__name__)


class BackgroundWriter:
    """Runs one job at a time in a thread; an error is raised by the next [`submit`], [`check`] or [`wait`], once.

    The thread is not a daemon: the interpreter ends only when the job has.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        # Thread.join takes a thread for ended once Ctrl-C interrupted it; an event can be waited for again
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Starts a job as soon as the one before has ended."""
        self.wait()
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, args=(job,), name="know_hf-writer")
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a job that has ended; doesn't wait."""
        if self._ended.is_set():
            self.wait()

    def join(self) -> None:
        """Waits for the job; its error stays to be raised."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._ended.wait()
            self._thread = None

    def wait(self) -> None:
        """Waits for the job, and raises its error."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            logger.error(f"A state was not recorded: {error}")  # said at once, raised when the training comes back
            self._error = error
        finally:
            self._ended.set()
