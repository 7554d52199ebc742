"""Reads a split of an HDF5 file for `data.cache`, in a process of its own, which does nothing else.

    python data/read_split.py FILE SPLIT

Whatever is wrong in a file, libhdf5 may find it, or loop for ever, take all memory, or crash. Here that costs nobody
anything. To stdout go a line of JSON ({'index': ..., 'encoder': ..., 'has_embeddings': ..., 'bad_embeddings': what is
wrong with them, or None}, or {'error': ...}), then the embeddings' bytes; it writes no file, so that one whose parent
is gone leaves none.
"""
import json
import os
import signal
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from common.errors import UserError  # noqa: E402
from data import layout, plain_hdf5  # noqa: E402


def read(path, split):
    """(the first line, embeddings float32 [captions, 1024] or None) of a split; the process is limited from then on."""
    plain_hdf5.limit_resources(os.path.getsize(path))
    try:
        file = layout.open_file(path)  # never closed: libhdf5 can stumble over that, too
        encoder, index, embeddings, bad = layout.read_encoder(file), layout.read_index(file, split), None, None
        try:
            if layout.has_embeddings(file, split):
                embeddings = layout.read_embeddings(file, split, index.keys)
        except layout.BadEmbeddings as error:  # not everybody needs them, least of all what writes them anew
            bad = str(error)
        answer = {'index': vars(index), 'encoder': encoder, 'has_embeddings': embeddings is not None,
                  'bad_embeddings': bad}
        return json.dumps(answer), embeddings
    except UserError as error:
        return json.dumps({'error': str(error)}), None
    except MemoryError:
        return json.dumps({'error': str(layout.cannot_be_read(path, split, 'it would take too much memory'))}), None


def main():
    if hasattr(signal, 'SIGPIPE'):  # where the parent is gone, nobody is to be told so
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    line, embeddings = read(*sys.argv[1:])
    sys.stdout.buffer.write(line.encode() + b'\n')
    if embeddings is not None:
        sys.stdout.buffer.write(embeddings)
    sys.stdout.buffer.flush()
    os._exit(0)  # without libhdf5's own end


if __name__ == '__main__':
    main()
