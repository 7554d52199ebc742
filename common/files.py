"""Files that appear whole or not at all, whatever ends the process, and what a killed process left of them."""
import contextlib
import errno
import glob
import os
import shutil
import tempfile

from common.errors import CannotWrite

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OPENED = ('/dev/stdin', '/dev/fd/')  # by the shell, as in <(command), which writes there: reading has an end


def check_is_file(path):
    """Raise OSError where reading `path` may never end: a named pipe, which waits for a writer, or a device."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path) and not path.startswith(OPENED):
        raise OSError('it is a pipe or a device, not a file')


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that takes the name `path` once the block ends without an error and all is on the disk.

    Raises CannotWrite, which says `disk full` where it is, if the file cannot be written; what `path` held before is
    then still there.
    """
    with partial_file(path) as partial, convert_os_errors(path), open(partial, 'r+b') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def partial_file(path):
    """Yield the name of an empty file beside `path`, which takes the name `path` once the block ends without an error.

    For writers that open files themselves, such as HDF5. Where `path` is a link, that is of what it points to. Removes
    first what killed processes left of earlier attempts. Raises CannotWrite as `atomic_write` does.
    """
    target = _target(path)
    with convert_os_errors(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        remove_leftovers(target)
        file = _new_partial(target)
    try:
        yield file.name
        with convert_os_errors(path):
            _lock(file, shared=True)  # so that a reader with a lock of its own, such as HDF5, can open `path` at once
            if os.name == 'nt':
                file.close()  # Windows does not rename a file that is open
            os.replace(file.name, target)
    finally:
        file.close()
        with contextlib.suppress(OSError):
            os.remove(file.name)


def check_can_write(path):
    """Raise CannotWrite where no file could take the name `path`. Makes none: what is tried out has no name."""
    _target(path)
    with convert_os_errors(path):
        tempfile.TemporaryFile(dir=_folder_above(path)).close()


def _target(path):
    """What is written where a file is to have the name `path`: where that is a link, what it points to."""
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise CannotWrite(f'{path}: cannot be written, as it is a folder, a device, a pipe, or a link in a circle; '
                          'remove it, or give another name')
    return target


def _folder_above(path):
    """The folder that `path` is in, or will be made in."""
    folder = os.path.realpath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def remove_leftovers(path):
    """Remove what killed processes left of attempts to write the file `path`: every PATH.partial-* that none locks."""
    for partial in filter(os.path.isfile, glob.glob(f'{glob.escape(path)}.partial-*')):
        with contextlib.suppress(OSError):  # gone meanwhile, another user's, or (on Windows) open in another process
            with open(partial, 'rb') as file:
                is_left = os.name == 'nt' or _lock(file)
            if is_left:
                os.remove(partial)


def check_space(path, needed):
    """Raise CannotWrite where the disk of the file or folder `path` has less than `needed` bytes left."""
    free = shutil.disk_usage(_folder_above(path)).free
    if needed > free:
        raise CannotWrite(f'{path}: disk full: about {needed / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} MB are '
                        'free; make room, or write to another disk')


@contextlib.contextmanager
def convert_os_errors(path):
    """Raise CannotWrite in place of an OSError of the block, which writes `path`."""
    try:
        yield
    except BrokenPipeError:
        raise  # of standard output, of which the block may speak: no file has it
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path, error):
    """The CannotWrite about `path`, which cannot be written because of the OSError `error`."""
    if error.errno in NO_SPACE:
        return CannotWrite(f'{path}: disk full, so it cannot be written; make room, or write to another disk')
    return CannotWrite(f'{path}: cannot be written ({error.strerror or " ".join(str(error).split())})')


def _new_partial(path):
    """A new file beside `path`, open and locked, with the permissions that an ordinary new file has."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f'{os.path.basename(path)}.partial-',
                                        dir=os.path.dirname(os.path.abspath(path)))
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())
        file = open(name, 'r+b')
        if _lock(file) is not False and os.path.exists(name):  # nobody took it for a leftover before it was locked
            return file
        file.close()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lock(file, shared=False):
    """Lock an open file until it is closed. False where another has it locked, None where there are no locks."""
    try:
        import fcntl
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True
