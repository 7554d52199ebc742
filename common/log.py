"""What a training writes beside its checkpoints, and how it goes on where something cannot be written.

A disk that is full at night may have room in the morning, so nothing that is written ends a training that has begun.
"""
import contextlib
import os
import re
import socket
import time

from tqdm import tqdm

from common.errors import CannotWrite, UserError
from common.files import atomic_write, convert_os_errors


class Log:
    """Lines to log.txt, to the console where no progress bar shows them, and losses to TensorBoard.

    Without `out_dir` nothing is written. Raises CannotWrite where that folder or log.txt cannot be made at the start.
    """

    def __init__(self, out_dir, verbose, step, unit='images'):
        self.out_dir, self.verbose, self.unit = out_dir, verbose, unit
        self.failures = {}  # what cannot be written now, and why
        self.text = self.curves = None
        self.images, self.since = 0, time.monotonic()
        if out_dir:
            with convert_os_errors(out_dir):
                os.makedirs(out_dir, exist_ok=True)
            self.text = AppendedFile(os.path.join(out_dir, 'log.txt'))
            self.curves = self._open_curves(step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in filter(None, (self.text, self.curves)):
            file.close()

    def _open_curves(self, step):
        try:
            return Curves(self.out_dir, step)
        except CannotWrite:
            raise
        except UserError as error:
            self.line(str(error))

    @contextlib.contextmanager
    def attempt(self, what, meanwhile=''):
        """Go on where the block raises CannotWrite; say so, but not again while the reason stays (but for numbers)."""
        try:
            yield
        except CannotWrite as error:
            before, self.failures[what] = self.failures.get(what, ''), str(error)
            if re.sub(r'\d+', '', before) != re.sub(r'\d+', '', str(error)):
                self.line(f'{error}; the training goes on and tries again{meanwhile}')
        else:
            if self.failures.pop(what, None):
                self.line(f'{what} can be written again')

    def line(self, text, console=True):
        if self.text:
            with self.attempt('log.txt'):
                self.text.write(f'{text}\n'.encode(errors='backslashreplace'))
        if self.verbose and console:
            with contextlib.suppress(OSError):  # the terminal is gone, or what reads the pipe; log.txt has the line
                tqdm.write(text)

    def flush(self):
        """Try to write what waits for room."""
        for what, file in (('log.txt', self.text), ('the TensorBoard curves', self.curves)):
            if file:
                with self.attempt(what):
                    file.write(b'')

    def count(self, images):
        self.images += images

    def losses(self, progress, epochs, losses, bar):
        """A line and a point of the curves for a step's losses (a dict of floats), with the speed since the last."""
        speed = self.images / (time.monotonic() - self.since)
        self.images, self.since = 0, time.monotonic()
        text = '  '.join(f'{name} {value:.4f}' for name, value in losses.items())
        bar.set_postfix_str(text)
        self.line(f'epoch {progress["epoch"] + 1}/{epochs}  step {progress["step"]}  {text}  {speed:.3g} {self.unit}/s',
                  console=bar.disable)
        if self.curves:
            with self.attempt('the TensorBoard curves'):
                self.curves.add({**losses, f'{self.unit}_per_second': speed}, progress['step'])

    def sample(self, image, epoch):
        """Write a PIL image as samples/epoch_EPOCH.png, or say that it is lost: some are too large to be kept."""
        with self.attempt('the sample', ' after the next epoch; samples until then are lost'), atomic_write(
                os.path.join(self.out_dir, 'samples', f'epoch_{epoch:04d}.png')) as file:
            image.save(file, 'PNG')


class AppendedFile:
    """A file that bytes are added to; those that do not fit wait, in memory, for the next attempt."""

    def __init__(self, path):
        with convert_os_errors(path):
            self.path, self.file, self.waiting = path, open(path, 'ab', buffering=0), b''

    def write(self, data):
        """Raises CannotWrite where not all of it, and of what waits, can be written."""
        self.waiting += data
        with convert_os_errors(self.path):
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]

    def close(self):
        with contextlib.suppress(OSError, CannotWrite):  # which `write` has said
            self.write(b'')
            self.file.close()


class Curves(AppendedFile):
    """TensorBoard's file of curves, for the steps from `step` on.

    Not with PyTorch's SummaryWriter: it writes in a thread, which ends at the first error, with all that waits for it.
    Raises UserError where TensorBoard cannot be imported.
    """

    def __init__(self, out_dir, step):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except Exception as error:  # of packages that do not fit together there are as many kinds as there are packages
            raise UserError(f'no TensorBoard curves: it cannot be imported ({" ".join(str(error).split())[:200]}); '
                            'pip install tensorboard') from error
        super().__init__(os.path.join(
            out_dir, f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'))
        self.Event, self.Summary, self.records = event_pb2.Event, summary_pb2.Summary, RecordWriter(self)
        self._write(step + 1, file_version='brain.Event:2')
        # What a process wrote after the checkpoint that this one goes on from is not shown.
        self._write(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, values, step):
        """Add a point to the curve of every name in a dict of floats. Raises CannotWrite."""
        points = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self.Summary(value=points))

    def _write(self, step, **what):
        self.records.write(self.Event(wall_time=time.time(), step=step, **what).SerializeToString())
