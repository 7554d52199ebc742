"""Write what a run produces beside its checkpoints, and keep training when a file cannot be written.

A disk that is full at night may have space in the morning, so no failed write ends a run that has begun.
"""
import contextlib
import html
import io
import os
import re
import socket
import stat
import time

import torch
from tqdm import tqdm

from common.contention import fewer_threads, seconds_without_core
from common.errors import CannotWrite, UserError
from common.files import atomic_write, convert_os_errors

LOG = 'log.txt'                   # file name of the log in a run folder
CAPTIONS = 'sample_captions.txt'  # and of the captions of its samples
WIDTH = 512                       # pixels of a sample in TensorBoard
WATCHED = 60                      # seconds between two looks at what other processes use


class Log:
    """Writes lines to log.txt and to the console, unless a progress bar shows them, and losses to TensorBoard.

    Without `out_dir`, no file is written. Raises CannotWrite if the folder or log.txt cannot be made at the start.
    """

    def __init__(self, out_dir, verbose, step, unit='images'):
        self.out_dir, self.verbose, self.unit = out_dir, verbose, unit
        self.failures = {}  # {what cannot be written at present: the error}
        self.text = self.curves = None
        self.images, self.since = 0, time.monotonic()
        self.watched, self.is_contention_reported = (self.since, seconds_without_core()), False
        if out_dir:
            with convert_os_errors(out_dir):
                os.makedirs(out_dir, exist_ok=True)
            self.open(step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in filter(None, (self.text, self.curves)):
            file.close()

    def open(self, step):
        """Open the log and the curves, and close earlier ones, which may be in a folder that was moved."""
        self.__exit__()
        self.text = AppendedFile(os.path.join(self.out_dir, LOG))
        with self.attempt('log.txt'), convert_os_errors(self.text.path):
            if ends_within_a_line(self.text.path):
                self.text.write(b'\n')
        self.curves = self._open_curves(step)

    def _open_curves(self, step):
        try:
            return Curves(self.out_dir, step)
        except CannotWrite:
            raise
        except UserError as error:
            self.line(str(error))

    @contextlib.contextmanager
    def attempt(self, what, meanwhile=''):
        """Continue if the block raises CannotWrite, and report it unless only the numbers in the error have changed."""
        try:
            yield
        except CannotWrite as error:
            before, self.failures[what] = self.failures.get(what, ''), str(error)
            if re.sub(r'\d+', '', before) != re.sub(r'\d+', '', str(error)):
                self.line(f'{error}; the training continues and tries again{meanwhile}')
        else:
            if self.failures.pop(what, None):
                self.line(f'{what} can be written again')

    def line(self, text, console=True):
        if self.text:
            with self.attempt('log.txt'):
                self.text.write(f'{text}\n'.encode(errors='backslashreplace'))
        if self.verbose and console:
            with contextlib.suppress(OSError):  # the terminal or the reader of the pipe is gone; log.txt has the line
                tqdm.write(text)

    def flush(self):
        """Try to write everything that earlier attempts could not."""
        for what, file in (('log.txt', self.text), ('the TensorBoard curves', self.curves)):
            if file:
                with self.attempt(what):
                    file.write(b'')

    def count(self, images):
        self.images += images

    def losses(self, progress, epochs, losses, bar):
        """Log a step's losses (a dict of floats) and the speed since the last call to log.txt and the curves."""
        speed = self.images / (time.monotonic() - self.since)
        self.images, self.since = 0, time.monotonic()
        text = '  '.join(f'{name} {value:.4f}' for name, value in losses.items())
        bar.set_postfix_str(text)
        self.line(f'epoch {progress["epoch"] + 1}/{epochs}  step {progress["step"]}  {text}  {speed:.3g} {self.unit}/s',
                  console=bar.disable)
        self._report_contention(torch.get_num_threads())
        if self.curves:
            with self.attempt('the TensorBoard curves'):
                self.curves.add({**losses, f'{self.unit}_per_second': speed}, progress['step'])

    def _report_contention(self, threads):
        """Say once that `threads` are too many if they had no core for much of a minute, and what to set."""
        (since, waited), now = self.watched, time.monotonic()
        if self.is_contention_reported or torch.cuda.is_initialized() or now - since < WATCHED:
            return
        self.watched = now, seconds_without_core()
        if fewer := fewer_threads(threads, (self.watched[1] - waited) / (now - since)):
            self.is_contention_reported = True
            self.line(f'other processes use the cores too, and the {threads} threads of this training wait for each '
                      f'other; with {fewer} it may be faster: press Ctrl-C, and resume it with OMP_NUM_THREADS='
                      f'{fewer} set')

    def sample(self, image, progress):
        """Write a PIL image as samples/epoch_EPOCH.png, and a small copy of it to TensorBoard.

        The first time, also write the captions that `common.pictures.with_captions` has noted in it, to a file and to
        TensorBoard. If the disk is full, the image is lost, which is reported; the copy waits like all curves.
        """
        with self.attempt('the sample', ' after the next epoch; samples until then are lost'), atomic_write(
                os.path.join(self.out_dir, 'samples', f'epoch_{progress["epoch"]:04d}.png'),
                follow_links=False) as file:
            image.save(file, 'PNG')
        captions = os.path.join(self.out_dir, CAPTIONS)
        if image.info.get('captions') and not os.path.lexists(captions):
            with self.attempt('the captions of the samples'), atomic_write(captions) as file:
                file.write(image.info['captions'].encode(errors='replace'))
        if self.curves:
            with self.attempt('the TensorBoard curves'):
                if not self.curves.has_captions and image.info.get('captions'):
                    self.curves.add_captions('sample_captions', image.info['captions'], progress['step'])
                self.curves.add_image('samples', image, progress['step'])


def ends_within_a_line(path):
    """Return whether a file, which may be empty, ends without a line feed: an editor or a killed process did that."""
    with open(path, 'rb') as file:
        file.seek(max(0, os.path.getsize(path) - 1))
        return file.read(1) not in (b'', b'\n')


class AppendedFile:
    """A file to append bytes to; bytes that cannot be written are kept in memory until the next attempt."""

    def __init__(self, path):
        with convert_os_errors(path):
            if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
                raise OSError('it is a pipe, so writing it would wait for a reader')
            self.path, self.file, self.waiting = path, open(path, 'ab', buffering=0), b''

    def write(self, data):
        """Write the bytes that are waiting, and `data`. Raises CannotWrite if some of them cannot be written."""
        self.waiting += data
        with convert_os_errors(self.path):
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]

    def close(self):
        with contextlib.suppress(OSError, CannotWrite):  # already reported by `write`
            self.write(b'')
            self.file.close()


class Curves(AppendedFile):
    """Writes TensorBoard's event file; with `step`, TensorBoard hides older files' points after that step.

    PyTorch's SummaryWriter is not used: its thread ends at the first error and loses everything it still has to write.
    Raises UserError if TensorBoard cannot be imported.
    """

    def __init__(self, out_dir, step=None):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except Exception as error:  # incompatible packages raise errors of any kind
            raise UserError(f'no TensorBoard curves: it cannot be imported ({" ".join(str(error).split())[:200]}); '
                            'pip install tensorboard') from error
        self.has_captions = False
        super().__init__(os.path.join(
            out_dir, f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'))
        self.Event, self.Summary, self.records = event_pb2.Event, summary_pb2.Summary, RecordWriter(self)
        self._write((step or 0) + 1, file_version='brain.Event:2')
        if step is not None:  # of the checkpoint that this run was resumed from
            self._write(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, values, step):
        """Add a point to the curve of each name in a dict of floats. Raises CannotWrite."""
        points = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self.Summary(value=points))

    def add_image(self, name, image, step):
        """Add a PIL image, reduced to WIDTH pixels, as hundreds of epochs would fill the disk. Raises CannotWrite."""
        small, code = image.convert('RGB'), io.BytesIO()
        small.thumbnail((WIDTH, 8 * WIDTH))
        small.save(code, 'JPEG', quality=85)
        added = self.Summary.Image(width=small.width, height=small.height, colorspace=3,
                                   encoded_image_string=code.getvalue())
        self._write(step, summary=self.Summary(value=[self.Summary.Value(tag=name, image=added)]))

    def add_captions(self, name, captions, step):
        """Add a string of `common.pictures.with_captions`, as a table in Markdown. Raises CannotWrite."""
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto
        captions = re.sub(r'[\\`*_\[|]', r'\\\g<0>', html.escape(captions, quote=False))  # not meant as Markdown
        what, *rows = [line.split('\t') for line in captions.splitlines()]
        columns = len(rows[0])
        table = [f'| {" | ".join(row)} |' for row in ([' '] * columns, ['---'] * columns, *rows)]
        text = make_tensor_proto('\n'.join([what[0].removeprefix('# '), '', *table]).encode(errors='replace'))
        metadata = create_summary_metadata(display_name=None, description='')
        self._write(step, summary=self.Summary(value=[self.Summary.Value(tag=name, tensor=text, metadata=metadata)]))
        self.has_captions = True

    def _write(self, step, **what):
        self.records.write(self.Event(wall_time=time.time(), step=step, **what).SerializeToString())
