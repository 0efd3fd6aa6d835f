"""Signals while a run works: the main thread answers them, a second thread does the work."""

import queue
import signal
import threading
from collections.abc import Callable

from kjax import _ext

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The system may hand a signal to any thread, and one that another thread took does not wake a waiting main thread.
LOOK_SECONDS = 0.1


class Cancelled(Exception):
    """A second signal stopped the work: what was running is lost, what was saved is not."""


class Interrupts:
    """Runs work in a thread while the main thread waits for it and answers SIGINT and SIGTERM at once.

    Python delivers signals to the main thread between two bytecodes; a main thread inside a compiled step would answer
    after the step, which can take minutes. The first signal sets `requested` and is acknowledged; the second makes the
    host kernels return an error between tasks; after the third nothing is waited for. Used outside of the main thread
    it installs no handlers, and the work runs in place.
    """

    def __init__(self, acknowledge: Callable[[int], None]):
        """acknowledge(n) tells the user what signal number n (1, 2) does; it runs in the main thread."""
        self.requested: int | None = None  # the first signal's number
        self.cancelled = self._abandoned = False
        self._acknowledge = acknowledge
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # reentrant: a handler may interrupt a put
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._saved: dict[int, object] = {}
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupts":
        if self._main:
            self._thread = threading.Thread(target=self._serve, name="kjax-run", daemon=True)
            self._thread.start()
            for number in SIGNALS:
                self._saved[number] = signal.getsignal(number)
                signal.signal(number, lambda number, _: self._inbox.put(("signal", number)))
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._saved.clear()
        self._work.put(None)
        if self._main and not self._abandoned:
            self._thread.join()

    def call(self, function: Callable, *args):
        """function(*args), answering signals while it runs.

        Raises what it raises; Cancelled where a second signal was the reason.
        """
        if not self._main:
            return function(*args)
        self._work.put((function, args))
        while True:
            try:
                kind, value = self._inbox.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if kind == "signal":
                self._answer(value)
            elif kind == "error":
                if self.cancelled:
                    raise Cancelled from value
                raise value
            else:
                return value

    def poll(self) -> None:
        """Answer the signals that came between two calls."""
        while not self._inbox.empty():
            self._answer(self._inbox.get()[1])

    def _answer(self, number: int) -> None:
        if self.requested is None:
            self.requested = number
            self._acknowledge(1)
        elif not self.cancelled:
            self.cancelled = True
            _ext.cancel(True)
            self._acknowledge(2)
        else:
            self._abandoned = True
            raise KeyboardInterrupt

    def _serve(self) -> None:
        while (task := self._work.get()) is not None:
            function, args = task
            try:
                self._inbox.put(("result", function(*args)))
            except BaseException as error:  # carried to the main thread, whatever it is
                self._inbox.put(("error", error))
        if self.cancelled:  # here, after the last task: one that nobody waits for must not go on
            _ext.cancel(False)
