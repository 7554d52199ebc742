"""Run a main.py from the command line or in this process, and inspect the files it writes."""
import os
import subprocess
import sys

import pytest

from common.errors import run_command
from data.cache import load_split

DATA = ['--data_dir', 'data', '--dataset', 'tiny']  # of the fixture `folder`

class Caller:
    """Run the main.py of the module `main` in `folder`, but in this process, which saves seconds of startup."""

    def __init__(self, main, folder, patch, capsys):
        self.main, self.folder, self.patch, self.capsys = main, folder, patch, capsys

    def __call__(self, *args):
        """What it prints. A run among the user's own would be the newest one that commands then generate with."""
        self._type(args)
        own = os.path.join(os.path.dirname(self.main.__file__), 'output')
        before = set(os.listdir(own)) if os.path.isdir(own) else set()
        try:
            run_command(self.main.main)
        finally:
            written = (set(os.listdir(own)) if os.path.isdir(own) else set()) - before
            assert not written, f'{own}: {written} should be in a temporary folder; give --out_dir'
        return self.capsys.readouterr().out

    def error(self, *args):
        """Run with invalid arguments and return the one line on stderr."""
        with pytest.raises(SystemExit) as caught:
            self(*args)
        assert isinstance(caught.value.code, str) and '\n' not in caught.value.code
        return caught.value.code

    def options(self, *args):
        """Return the parsed options, with the printed text as `said`."""
        self._type(args)
        options, _ = self.main.parse_flags()
        options.said = self.capsys.readouterr().out
        return options

    def _type(self, args):
        self.patch.chdir(self.folder)
        self.patch.setattr(sys, 'argv', [os.path.abspath(self.main.__file__), *map(str, args)])


def run_in(folder, script, *args):
    """Run a main.py in a process of its own, on one thread, without a GPU; assert success and return its output."""
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, script, *args], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout


def newest(folder, prefix):
    return max((path for path in folder.iterdir() if path.name.startswith(prefix)), key=os.path.getmtime)


def files_below(folder):
    return sorted(os.path.relpath(os.path.join(place, name), folder)
                  for place, _, names in os.walk(folder) for name in names)


def captions_of(folder):
    """Return (CLASS/NAME, K) of every held-out caption of folder/data/tiny.hdf5."""
    index = load_split(str(folder / 'data' / 'tiny.hdf5'), 'test').index
    return [(f'{class_name}/{name}', k) for class_name, name, k in map(index.sentence, range(len(index.captions)))]
