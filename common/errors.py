"""Errors that the person at the keyboard can mend."""
import argparse
import contextlib
import os
import signal
import sys
import time

from common import signals


class UserError(Exception):
    """One line for the user: which file or option, what is wrong with it, what to do."""


class CannotWrite(UserError):
    """A file that cannot be written, the disk being full or for another reason; a later attempt may succeed."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, where argparse shows all flags first."""

    def error(self, message):
        self.exit(2, f'error: {" ".join(message.splitlines())} (--help lists the flags)\n')


def run_command(main):
    """Call `main()`; turn a `UserError` into one line on stderr and exit status 1, Ctrl-C into status 130.

    SIGTERM (status 143) and SIGHUP (129) end the process as an exception would, so that what is half written is
    removed. A reader of standard output that is gone ends it as SIGPIPE would (141).
    """
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # a name that the terminal cannot show must not stop anything
    try:
        with signals.as_exceptions():
            main()
            sys.stdout.flush()
    except UserError as error:
        ranks = sys.modules.get('common.ranks')  # which raises UserErrors itself; a command of one process has it not
        with contextlib.suppress(UserError):  # that the environment has no number of this process
            if ranks and ranks.rank() > 0:
                time.sleep(5)  # meanwhile torchrun ends this process, if rank 0 has ended with the same error
        sys.exit(f'error: {" ".join(str(error).splitlines())}')  # a path may hold the end of a line
    except KeyboardInterrupt as error:
        sys.exit(128 + int(error.args[0] if error.args else signal.SIGINT))  # what a training waited for has a number
    except (MemoryError, RuntimeError) as error:
        if 'torch' not in sys.modules:  # for whose import there may be no memory
            if not isinstance(error, MemoryError) and "can't start new thread" not in str(error):
                raise
            sys.exit('error: this takes more memory than there is; end other programs, or read smaller files')
        from common import torch_errors
        if not torch_errors.is_out_of_memory(error):
            raise
        sys.exit('error: this takes more memory than there is; give a smaller --batch_size, or narrower networks')
    except OSError:
        _exit_if_stdout_fails()
        raise


def _replace_closed_streams():
    """Python has None for a stream that is closed when it starts (`main.py >&-`)."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))


def _exit_if_stdout_fails():
    """End the process where standard output, a pipe or a file, is what cannot be written."""
    try:
        print(flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        sys.exit(141 if isinstance(error, BrokenPipeError) else
                 f'error: standard output cannot be written ({error.strerror})')
