"""Lock files so that one process at a time can use them."""
import errno

from common.files import check_is_file, convert_os_errors


def lock_file(path, wait=False):
    """Open the file `path` and lock it until it is closed; return it, or None if another process has locked it.

    With `wait`, waits until the other process closes it. Windows and some network file systems have no such locks;
    there, the file is only opened. Raises CannotWrite if it cannot be made.
    """
    with convert_os_errors(path):
        check_is_file(path)
        file = open(path, 'a')  # which does not change one that is there
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
