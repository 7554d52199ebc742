"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone): how they end a command, and where they must wait.

They wait within a training step, or while HDF5 writes a file. This imports next to nothing, for it comes first.
"""
import contextlib
import os
import signal
import sys
import threading
import time

PAIR_SECONDS = 2  # seconds: torchrun hands a terminal's SIGINT, which its processes get, too, on to them as a SIGTERM

_held = None  # the signals that came while `hold` holds them


def end_at_once():
    """From here on, let a signal end the process without a word, with status 130, 143 or 129.

    Until `run_command` takes over there is nothing to save or to remove: a command is importing PyTorch, for seconds.
    """
    for number in _numbers():
        signal.signal(number, _exit)


@contextlib.contextmanager
def as_exceptions():
    """Let the first signal of the block raise KeyboardInterrupt or SystemExit, and end the block with SystemExit.

    A second one ends the process at once. Where the exception gets lost on its way (in a destructor, or in a callback
    of a C library, whose caller cannot pass it on), it is raised again; where it becomes another one, it still counts.
    """
    came = []

    def act(number, frame):
        if not came:
            came.extend((number, time.monotonic()))
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if number == came[0] or time.monotonic() - came[1] > PAIR_SECONDS:
            _exit(number, frame)

    def raise_again(lost):
        if came and isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
            number = came[0]
            came.clear()
            threading.Timer(0.05, to_main_thread, [number]).start()  # once the callback is over
        else:
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    with _handled(act):
        try:
            yield
        except BaseException:
            if came:
                sys.exit(128 + came[0])
            raise
        finally:
            sys.unraisablehook = hook


class SignalRecord(list):
    """The signals that came; `raised` says whether the next one raises KeyboardInterrupt."""
    is_interruptible = False

    def interrupt(self):
        """Raise KeyboardInterrupt, with the number of the signal that came; another rank's is not known here."""
        raise KeyboardInterrupt(*self[:1])

    @contextlib.contextmanager
    def interruptible(self):
        """Raise KeyboardInterrupt in the block where a signal has come or comes."""
        self.is_interruptible = True
        try:
            if self:
                self.interrupt()
            yield
        finally:
            self.is_interruptible = False


@contextlib.contextmanager
def recorded():
    """Yield a list (`SignalRecord`) that is empty until a signal comes; a second signal of that kind acts at once."""
    came = SignalRecord()

    def note(number, frame):
        came.append(number)
        signal.signal(number, previous[number])
        if came.is_interruptible:
            came.interrupt()

    with _handled(note) as previous:
        yield came


@contextlib.contextmanager
def hold():
    """Let the first signal of the block act where it calls `deliver_held`, or at its end.

    A signal's exception may appear anywhere. Within a callback of a library, or a destructor, it gets lost, and the
    program goes on as if nobody had wanted to stop it.
    """
    global _held
    if _held is not None:  # a block within such a block, in which signals act, too
        yield
        return
    came = []
    try:
        with recorded() as came:
            _held = came
            yield
    finally:
        _held = None
        _act(came)


def deliver_held():
    """Let a signal that `hold` holds back act now, mostly by an exception; without one, do nothing."""
    _act(_held)


def _act(came):
    if came:  # which None is not
        signal.raise_signal(came.pop(0))


def to_main_thread(number):
    """Send a signal as from outside, and so that it interrupts what the main thread waits for."""
    if hasattr(signal, 'pthread_kill'):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def when_parent_ends(act):
    """Call `act()` in a thread of its own once the process that started this one is gone."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        act()

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _handled(handler):
    """Have `handler` called for signals in the block. Yields what was before, {number: handler}.

    Python handles signals in its main thread alone; in another nothing happens.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in _numbers()}
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _numbers():
    """The signals to handle: SIGHUP, which Windows does not have, only where `nohup` has not said to ignore it."""
    hang_up = getattr(signal, 'SIGHUP', None)
    is_to_end = hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN
    return signal.SIGINT, signal.SIGTERM, *([hang_up] if is_to_end else [])


def _exit(number, frame):
    os._exit(128 + number)
