"""Write files whole or not at all, however the process ends, and remove what killed processes left behind."""
import contextlib
import errno
import glob
import os
import re
import shutil
import stat
import tempfile

from common.errors import CannotWrite

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
LEFT = re.compile(r'\.partial-[a-z0-9_]{8}$')  # what `_new_partial` appends to a name
OPENED = ('/dev/stdin', '/dev/fd/')  # opened by the shell, as in <(command): reading these ends with the command


def check_is_file(path):
    """Raise OSError if reading `path` might never end: it is a named pipe, which waits for a writer, or a device."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path) and not path.startswith(OPENED):
        raise OSError('it is a pipe or a device, not a file')


@contextlib.contextmanager
def atomic_write(path, follow_links=True):
    """Yield a binary file that takes the name `path` once the block ends without an error and all is on the disk.

    `follow_links` is as in `partial_file`. Raises CannotWrite, with `disk full` in its text if that is the reason; a
    previous file at `path` then remains.
    """
    with partial_file(path, follow_links) as partial, convert_os_errors(path), open(partial, 'r+b') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def partial_file(path, follow_links=True):
    """Yield the name of an empty file beside `path`, which takes the name `path` once the block ends without an error.

    This is for writers that open files themselves, such as HDF5. If `path` is a link, its target is replaced, or
    without `follow_links` the link itself. Files that killed processes left are removed first. Raises CannotWrite as
    `atomic_write` does.
    """
    is_kept = not follow_links and os.path.islink(path)  # the target of the link
    target = os.path.abspath(path) if is_kept else _target(path)
    with convert_os_errors(path):
        new_folders = _make_folders(os.path.dirname(target))
        remove_leftovers(target)
        file = _new_partial(target)
        if os.path.isfile(target) and not is_kept:
            os.chmod(file.name, stat.S_IMODE(os.stat(target).st_mode))
    try:
        yield file.name
        with convert_os_errors(path):
            _lock(file, shared=True)  # so that readers that lock files, such as HDF5, can open `path` at once
            if os.name == 'nt':
                file.close()  # Windows cannot rename an open file
            os.replace(file.name, target)
    finally:
        file.close()
        with contextlib.suppress(OSError):
            os.remove(file.name)
        with contextlib.suppress(OSError):  # those that hold a file now stay
            for folder in new_folders:
                os.rmdir(folder)


def _make_folders(folder):
    """Create a folder and those above it. Returns the ones that are new, the deepest first."""
    above, new = _folder_above(folder), []
    os.makedirs(folder, exist_ok=True)
    while folder != above:
        new.append(folder)
        folder = os.path.dirname(folder)
    return new


def check_can_write(path):
    """Raise CannotWrite unless a file could be written to `path`. The test writes only an unnamed temporary file."""
    _target(path)
    with convert_os_errors(path):
        tempfile.TemporaryFile(dir=_folder_above(path)).close()


def _target(path):
    """Return the file to write for `path`: the target if it is a link.

    Raises CannotWrite if it is no file or write-protected.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise CannotWrite(f'{path}: cannot be written, as it is a folder, a device, a pipe, or a link in a circle; '
                          'remove it, or give another name')
    if os.path.isfile(target) and not os.access(target, os.W_OK):  # a rename would replace it all the same
        raise CannotWrite(f'{path}: is write-protected; allow writing it (chmod u+w), or give another name')
    return target


def _folder_above(path):
    """Return the nearest existing folder above `path`."""
    folder = os.path.realpath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def remove_leftovers(path):
    """Remove the files PATH.partial-XXXXXXXX that no process has locked, which killed processes left."""
    for partial in filter(LEFT.search, glob.glob(f'{glob.escape(path)}.partial-*')):
        with contextlib.suppress(OSError):  # it is gone, another user's, or (on Windows) open in another process
            check_is_file(partial)
            with open(partial, 'rb') as file:
                is_left = os.name == 'nt' or _lock(file)
            if is_left:
                os.remove(partial)


def check_space(path, needed):
    """Raise CannotWrite if the disk of the file or folder `path` has less than `needed` bytes left."""
    free = shutil.disk_usage(_folder_above(path)).free
    if needed > free:
        raise CannotWrite(f'{path}: disk full: about {needed / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} MB are '
                        'free; make room, or write to another disk')


def free_space(path):
    """Return (number of the disk of the file or folder `path`, which need not exist; its free bytes)."""
    folder = _folder_above(path)
    return os.stat(folder).st_dev, shutil.disk_usage(folder).free


@contextlib.contextmanager
def convert_os_errors(path):
    """Raise CannotWrite in place of an OSError of the block, which writes `path`."""
    try:
        yield
    except BrokenPipeError:
        raise  # raised when the block prints to a closed pipe, never for a file
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path, error):
    """Return the CannotWrite for `path`, which cannot be written because of the OSError `error`."""
    if error.errno in NO_SPACE:
        return CannotWrite(f'{path}: disk full, so it cannot be written; make room, or write to another disk')
    return CannotWrite(f'{path}: cannot be written ({error.strerror or " ".join(str(error).split())})')


def _new_partial(path):
    """Return a new file beside `path`, open and locked, with the permissions of an ordinary new file."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f'{os.path.basename(path)}.partial-',
                                        dir=os.path.dirname(os.path.abspath(path)))
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())
        file = open(name, 'r+b')
        if _lock(file) is not False and os.path.exists(name):  # not removed as a leftover before it was locked
            return file
        file.close()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lock(file, shared=False):
    """Lock an open file until it is closed; return False if another process has locked it, None without locks."""
    try:
        import fcntl
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True
