"""Report errors that the user can fix in one line each."""
import argparse
import contextlib
import os
import signal
import sys
import time

from common import signals


class UserError(Exception):
    """An error message of one line for the user: which file or option, what is wrong with it, and what to do."""


class CannotWrite(UserError):
    """A file cannot be written because the disk is full or for another reason; a later attempt may succeed."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without argparse's list of all flags."""

    def error(self, message):
        self.exit(2, f'error: {" ".join(message.splitlines())} (--help lists the flags)\n')


def run_command(main):
    """Call `main()`. After a `UserError`, print it as one line on stderr and exit with 1; after Ctrl-C, exit with 130.

    SIGTERM (status 143) and SIGHUP (129) raise exceptions, so that partial files are removed. A closed pipe at standard
    output ends the process as SIGPIPE would (141).
    """
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # names that the terminal cannot show must raise no error
    try:
        with signals.as_exceptions():
            main()
            sys.stdout.flush()
    except UserError as error:
        ranks = sys.modules.get('common.ranks')  # imported only by commands that can run in several processes
        with contextlib.suppress(UserError):  # raised by `rank()` if the environment has no valid number
            if ranks and ranks.rank() > 0:
                time.sleep(5)  # if rank 0 ends with the same error, torchrun then ends this process without a message
        sys.exit(f'error: {" ".join(str(error).splitlines())}')  # a path may contain a line break
    except KeyboardInterrupt as error:
        sys.exit(128 + int(error.args[0] if error.args else signal.SIGINT))  # a training raises it with the number
    except (MemoryError, RuntimeError) as error:
        if 'torch' not in sys.modules:  # there may be no memory to import it
            if not isinstance(error, MemoryError) and "can't start new thread" not in str(error):
                raise
            sys.exit('error: out of memory; end other programs, or read smaller files')
        from common import torch_errors
        if not torch_errors.is_out_of_memory(error):
            raise
        sys.exit('error: out of memory; give a smaller --batch_size, or narrower networks')
    except OSError:
        _exit_if_stdout_fails()
        raise


def _replace_closed_streams():
    """Open the null device for streams that are closed at the start (`main.py >&-`), which Python sets to None."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))


def _exit_if_stdout_fails():
    """End the process if standard output, a pipe or a file, is what cannot be written."""
    try:
        print(flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        sys.exit(141 if isinstance(error, BrokenPipeError) else
                 f'error: standard output cannot be written ({error.strerror})')
