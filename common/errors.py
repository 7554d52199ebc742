"""Errors that the person at the keyboard can mend."""
import signal
import sys
import time


class UserError(Exception):
    """One line for the user: which file or option, what is wrong with it, what to do."""


class CannotWrite(UserError):
    """A file that cannot be written, the disk being full or for another reason; a later attempt may succeed."""


def run_command(main):
    """Call `main()`; turn a `UserError` into one line on stderr and exit status 1, Ctrl-C into status 130.

    SIGTERM ends the process as an exception would, so that what is half written is removed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # a name that the terminal cannot show must not stop anything
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except UserError as error:
        from common import ranks  # which raises UserErrors itself
        if ranks.rank() > 0:
            time.sleep(5)  # meanwhile torchrun ends this process, if rank 0 has ended with the same error
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
