"""SIGINT (Ctrl-C) and SIGTERM where they must wait: within a training step, or while HDF5 writes a file."""
import contextlib
import signal
import threading

_held = None  # the signals that came while `hold` holds them


@contextlib.contextmanager
def noted():
    """Yield a list that is empty until SIGINT or SIGTERM comes; a second signal acts at once."""
    stop = []

    def note(number, frame):
        stop.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold():
    """Let the first SIGINT or SIGTERM of the block act where it calls `let_act`, or at its end.

    A signal's exception may appear anywhere. Within a callback of a library, or a destructor, it gets lost, and the
    program goes on as if nobody had wanted to stop it.
    """
    global _held
    if _held is not None:  # a block within such a block
        yield
        return
    came = []
    try:
        with noted() as came:
            _held = came
            yield
    finally:
        _held = None
        _act(came)


def let_act():
    """Let a signal that `hold` holds back act now, mostly by an exception; without one, do nothing."""
    _act(_held)


def _act(came):
    if came:  # which None is not
        signal.raise_signal(came.pop(0))
