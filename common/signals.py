"""Handle SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone): end the command, or wait for a safe moment.

Signals wait during a training step and while HDF5 writes a file. Commands import this module first, so it imports
almost nothing.
"""
import contextlib
import os
import signal
import sys
import threading
import time

PAIR_SECONDS = 2  # torchrun follows a terminal's SIGINT, which its processes get as well, by a SIGTERM to them

_held = None  # the signals that arrived during `hold`


def end_at_once():
    """Let signals end the process without a message from now on, with status 130, 143 or 129.

    Until `run_command` takes over, a command spends seconds importing PyTorch and has nothing to save or remove.
    """
    for number in _numbers():
        signal.signal(number, _exit)


@contextlib.contextmanager
def as_exceptions():
    """Let the first signal of the block raise KeyboardInterrupt or SystemExit, and end the block with SystemExit.

    A second signal ends the process at once. If the exception is lost in a destructor or in a callback of a C library,
    it is raised again; if it is replaced by another exception, it still ends the block.
    """
    received = []

    def act(number, frame):
        if not received:
            received.extend((number, time.monotonic()))
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if number == received[0] or time.monotonic() - received[1] > PAIR_SECONDS:
            _exit(number, frame)

    def raise_again(lost):
        if received and isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
            number = received[0]
            received.clear()
            threading.Timer(0.05, to_main_thread, [number]).start()  # when the callback has returned
        else:
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    with _handled(act):
        try:
            yield
        except BaseException:
            if received:
                sys.exit(128 + received[0])
            raise
        finally:
            sys.unraisablehook = hook


class SignalRecord(list):
    """A list of the signals that arrived. If `is_interruptible`, the next one raises KeyboardInterrupt."""
    is_interruptible = False

    def interrupt(self):
        """Raise KeyboardInterrupt with the number of the signal, which is unknown if only another rank got one."""
        raise KeyboardInterrupt(*self[:1])

    @contextlib.contextmanager
    def interruptible(self):
        """Raise KeyboardInterrupt in the block if a signal has arrived or arrives."""
        self.is_interruptible = True
        try:
            if self:
                self.interrupt()
            yield
        finally:
            self.is_interruptible = False


@contextlib.contextmanager
def recorded():
    """Yield a `SignalRecord`, empty until a signal arrives; a second signal of the same kind takes effect at once."""
    received = SignalRecord()

    def note(number, frame):
        received.append(number)
        signal.signal(number, previous[number])
        if received.is_interruptible:
            received.interrupt()

    with _handled(note) as previous:
        yield received


@contextlib.contextmanager
def hold():
    """Hold the first signal of the block until `deliver_held` is called, or until the end of the block.

    An exception from a signal may appear anywhere. In a callback of a library or in a destructor, it is lost, and the
    program continues as if there had been no signal.
    """
    global _held
    if _held is not None:  # nested: the outer block holds the signal
        yield
        return
    received = []
    try:
        with recorded() as received:
            _held = received
            yield
    finally:
        _held = None
        _act(received)


def deliver_held():
    """Deliver a signal that `hold` is holding, which usually raises an exception. Does nothing without one."""
    _act(_held)


def _act(received):
    if received:
        signal.raise_signal(received.pop(0))


def to_main_thread(number):
    """Send a signal to this process so that it interrupts what the main thread is waiting for."""
    if hasattr(signal, 'pthread_kill'):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def when_parent_ends(act):
    """Call `act()` in a new thread when the process that started this one has ended."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        act()

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _handled(handler):
    """Handle signals in the block, if in the main thread as Python requires; yield {number: previous handler}."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in _numbers()}
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _numbers():
    """Return the signals to handle: SIGHUP only if the system has it and `nohup` has not set it to be ignored."""
    hang_up = getattr(signal, 'SIGHUP', None)
    is_to_end = hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN
    return signal.SIGINT, signal.SIGTERM, *([hang_up] if is_to_end else [])


def _exit(number, frame):
    os._exit(128 + number)
