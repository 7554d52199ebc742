"""Files that one process at a time has to itself."""
import errno

from common.files import check_is_file, convert_os_errors


def lock_file(path, wait=False):
    """The open file `path`, locked for this process until it is closed, or None where another process has it.

    With `wait`, waits for that one to close it. Windows has no such locks, nor have some network file systems: there
    the file is only opened. Raises CannotWrite where it cannot be made.
    """
    with convert_os_errors(path):
        check_is_file(path)
        file = open(path, 'w')
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except ImportError:
        pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
    return file
