"""Notice that other processes use the cores on which a training's threads wait for each other."""
import glob
import math

WAITING = 0.5  # threads without a core, on average, from which on fewer threads are faster (docs/runs.md)


def seconds_without_core():
    """Return for how long the threads of this process could have run but had no core, in total; 0 if not known.

    Linux counts it for each thread: https://docs.kernel.org/scheduler/sched-stats.html
    """
    return 1e-9 * sum(map(_nanoseconds, glob.glob('/proc/self/task/*/schedstat')))


def _nanoseconds(file):
    try:
        with open(file) as numbers:
            return int(numbers.read().split()[1])
    except (OSError, IndexError):  # the thread has ended
        return 0


def fewer_threads(threads, waiting):
    """Return how many of `threads` have a core each if `waiting` of them, on average, have none; None if all have."""
    if threads == 1 or waiting < WAITING:
        return None
    return max(1, threads - math.ceil(waiting))
