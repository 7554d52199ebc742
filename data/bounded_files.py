"""List and read files from others: bounded in size, never a pipe, in UTF-8, with one-line errors that name the file."""
import json
import os
import unicodedata

from common.errors import UserError
from common.files import check_is_file
from common.letters import CONTROL

LIST_BYTES = 64 << 20  # of a list that is read
FEW = 5  # names that are printed
SLOW = 50_000_000  # letters of a JSON file, above which reading takes seconds


def normalized(name):
    """Return a name with composed letters (é, not e and an accent): macOS stores file names decomposed."""
    return unicodedata.normalize('NFC', name)


def is_plain(name):
    """Return whether a name has no control characters and can be written as UTF-8."""
    return shown(name) == name


def shown(name):
    """Return a name as it can be printed: without control characters, and without bytes that are not UTF-8."""
    return CONTROL.sub('?', name).encode('utf-8', 'backslashreplace').decode()


def files_in(folder, again=None):
    """Yield the paths of all files in a folder, relative to it and with /, in alphabetical order.

    Links to folders that are read anyway are not followed, but added to the list `again`.
    """
    path_of = {os.path.realpath(place): place for place, _, _ in _walk(folder, False)}  # no link takes their place
    for place, folders, names in _walk(folder, True):
        if path_of.setdefault(os.path.realpath(place), place) != place:
            folders.clear()
            if again is not None:
                again.append(os.path.relpath(place, folder).replace(os.sep, '/'))
            continue
        for name in sorted(names):
            if not name.startswith('.'):
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, '/')


def _walk(folder, follow_links):
    """Yield what `os.walk` does, without hidden folders, in alphabetical order. Raises UserError."""
    for place, folders, names in os.walk(folder, followlinks=follow_links, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield place, folders, names


def _refuse(error):
    raise UserError(f'{shown(error.filename)}: cannot be listed ({error.strerror}); make it readable') from error


def some(names):
    """Return the first few of a set of names in one line, without control characters."""
    names = sorted(names)
    return shown(', '.join(names[:FEW])) + ', ...' * bool(names[FEW:])


def contents(path, what, most):
    """Return the bytes of a file. Raises ValueError, beginning with `what`, if it has more than `most` bytes."""
    if not os.path.isfile(path):
        raise ValueError(f'{what} missing')
    try:
        with open(path, 'rb') as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise ValueError(f'{what} too large ({size:,} bytes; at most {most:,} are read)')
            return file.read()
    except OSError as error:
        raise ValueError(f'{what} unreadable ({error.strerror})') from error


def read_text(path, advice, most=LIST_BYTES):
    """Return the text of a UTF-8 file. Raises UserError with `advice` if it cannot be read or is too large."""
    try:
        check_is_file(path)
        if os.path.getsize(path) > most:
            raise OSError(f'it has {os.path.getsize(path):,} bytes; the limit is {most:,}')
        with open(path, encoding='utf-8-sig') as file:
            return file.read()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}); {advice}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: is not a UTF-8 text file; {advice}') from error


def read_lines(path, advice):
    """Return the lines of a UTF-8 text file, with any line ends, without blank ones. Raises UserError with `advice`."""
    return [line.strip() for line in read_text(path, advice).split('\n') if line.strip()]


def read_numbered(path, advice):
    """Return (image number, value) pairs from the lines of one of CUB's files. Raises UserError with `advice`."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path}: is not a file; {advice}')
    pairs = [line.split(None, 1) for line in read_lines(path, advice)]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f'{path}: the line {pair[0][:60]!r} does not have a number and a value; {advice}')
    return [(number.lstrip('0') or number[-1:], value) for number, value in pairs]  # 001 is 1


def read_json(path, advice, most):
    """Return what a JSON file holds. Raises UserError with `advice` if it is not JSON or has more than `most` bytes."""
    try:
        text = read_text(path, advice, most)
        if len(text) > SLOW:
            print(f'reading {path} ...', flush=True)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: is not a JSON file ({" ".join(str(error).split())[:100]}); {advice}') from error
