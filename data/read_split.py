"""Read a split of an HDF5 file for `data.cache`, in a separate process.

    python data/read_split.py FILE SPLIT

A damaged file may make libhdf5 loop forever, take all memory, or crash; in this process, that does no harm. It writes
to stdout a line of JSON ({'index': ..., 'encoder': ..., 'width': of the embeddings or None, 'bad_embeddings': what is
wrong with them, or None}, or {'error': ...}), then the bytes of the embeddings. It writes no file, so it leaves none
behind if it is killed.
"""
import json
import os
import signal
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), '..'))
from common.errors import UserError  # noqa: E402
from data import layout, plain_hdf5  # noqa: E402


def read(path, split):
    """Limit this process's resources; return (the line of JSON, embeddings float32 [captions, D] or None)."""
    plain_hdf5.limit_resources(os.path.getsize(path))
    try:
        file = layout.open_file(path)  # never closed: for a damaged file, closing can fail, too
        encoder, index, embeddings, bad = layout.read_encoder(file), layout.read_index(file, split), None, None
        try:
            if layout.has_embeddings(file, split):
                embeddings = layout.read_embeddings(file, split, index.keys)
        except layout.BadEmbeddings as error:  # the captions are needed to write new embeddings
            bad = str(error)
        width = None if embeddings is None else embeddings.shape[1]
        answer = {'index': vars(index), 'encoder': encoder, 'width': width, 'bad_embeddings': bad}
        return json.dumps(answer), embeddings
    except UserError as error:
        return json.dumps({'error': str(error)}), None
    except MemoryError:
        return json.dumps({'error': str(layout.cannot_be_read(path, split, 'it would need too much memory'))}), None


def main():
    if hasattr(signal, 'SIGPIPE'):  # if the parent is gone, end without a message
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    line, embeddings = read(*sys.argv[1:])
    sys.stdout.buffer.write(line.encode() + b'\n')
    if embeddings is not None:
        sys.stdout.buffer.write(embeddings)
    sys.stdout.buffer.flush()
    os._exit(0)  # skips libhdf5's exit handlers


if __name__ == '__main__':
    main()
