"""One background thread for a live view: the latest request wins, what it replaces is cancelled.

A widget's callback must return at once (a kernel that computes answers nothing else), and may run
concurrently with another callback (JupyterLab's subshells). So callbacks only `submit`. A job sets
widget traits, through `publish`; it never prints or displays, because output of other threads goes
nowhere sensible.
"""

import atexit
import threading
import weakref
from collections.abc import Callable

from ktlab.memory import trim

Job = Callable[[threading.Event], None]

_open: "weakref.WeakSet[Worker]" = weakref.WeakSet()


class Worker:
    """Runs one job at a time on a thread of its own, started with the first `submit`.

    `on_error(exception)` and `on_busy(bool)` are called on the worker's thread, under `lock`, and
    never for a job that has been replaced (its errors are nobody's concern any more).
    """

    def __init__(
        self,
        *,
        on_error: Callable[[Exception], None] | None = None,
        on_busy: Callable[[bool], None] | None = None,
        name: str = "ktlab-worker",
    ) -> None:
        self.generation = 0  # of the latest request; cancelling counts as one
        self.lock = threading.RLock()  # held by publish: what is shown changes under it only
        self._on_error = on_error
        self._on_busy = on_busy
        self._name = name
        self._changed = threading.Condition(self.lock)
        self._pending: tuple[Job, threading.Event] | None = None
        self._running: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        _open.add(self)

    @property
    def busy(self) -> bool:
        """Whether a job is running or waiting."""
        with self.lock:
            return self._pending is not None or self._running is not None

    def submit(self, job: Job) -> int:
        """Run `job(cancel)` as soon as possible, instead of everything asked for before.

        Returns the request's generation number. `job` looks at `cancel` often and returns early.
        """
        with self.lock:
            if self._closed:
                raise RuntimeError("this worker is closed; make a new one")
            self._drop()
            self._pending = (job, threading.Event())
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return self.generation

    def cancel(self) -> None:
        """Drop what waits and ask what runs to stop; returns at once."""
        with self.lock:
            self._drop()
            self._changed.notify_all()

    def publish(self, cancel: threading.Event, write: Callable[[], None]) -> bool:
        """Call `write()` unless the job was replaced; no later request can slip in between.

        Returns whether it was called: False tells the job to stop.
        """
        with self.lock:
            if cancel.is_set():
                return False
            write()
            return True

    def wait(self, timeout: float | None = None) -> bool:
        """Block until nothing runs or waits; False after `timeout` seconds. Not for callbacks."""
        with self.lock:
            return self._changed.wait_for(
                lambda: self._pending is None and self._running is None, timeout
            )

    def close(self, timeout: float = 2.0) -> None:
        """Cancel, end the thread and wait for it (unless called from it). Idempotent."""
        with self.lock:
            self._closed = True
            self._drop()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _drop(self) -> None:
        self.generation += 1
        self._pending = None
        if self._running is not None:
            self._running.set()

    def _loop(self) -> None:
        while True:
            with self.lock:
                self._changed.wait_for(lambda: self._pending is not None or self._closed)
                if self._pending is None:
                    return
                (job, cancel), self._pending = self._pending, None
                self._running = cancel
                self._tell(True)
            try:
                job(cancel)
            except Exception as error:  # shown by the view: a thread has nobody to raise to
                self._fail(error, cancel)
            del job  # and all that it holds
            if self._pending is None:  # a press does not wait for it
                trim()  # caches and copies of a large model: the C library would keep a gigabyte
            with self.lock:
                self._running = None
                if self._pending is None:
                    self._tell(False)
                self._changed.notify_all()

    def _tell(self, busy: bool) -> None:
        if self._on_busy is not None:
            self._on_busy(busy)

    def _fail(self, error: Exception, cancel: threading.Event) -> None:
        with self.lock:
            if self._on_error is not None and not cancel.is_set():
                self._on_error(error)


@atexit.register
def _close_all() -> None:
    # A daemon thread inside torch while the interpreter goes down ends in a crash report.
    for worker in list(_open):
        worker.close()
