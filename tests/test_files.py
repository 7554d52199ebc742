"""Atomic writes: files appear whole or not at all."""
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest

from common.errors import CannotWrite
from common.files import atomic_write, check_can_write, check_space, convert_os_errors, remove_leftovers
from tests.errors import one_line

WRITER = '''
import sys, time
from common.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b'half')
    file.flush()
    print('writing', flush=True)
    time.sleep(60)
'''


def write(path, contents):
    with atomic_write(str(path)) as file:
        file.write(contents)


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / 'new' / 'a'
    write(path, b'first')
    with pytest.raises(KeyboardInterrupt), atomic_write(str(path)) as file:
        file.write(b'second')
        raise KeyboardInterrupt
    assert path.read_bytes() == b'first' and os.listdir(path.parent) == ['a']
    write(path, b'third')
    assert path.read_bytes() == b'third' and os.listdir(path.parent) == ['a']
    (tmp_path / 'plain').touch()
    assert path.stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    path = tmp_path / 'a'
    (tmp_path / 'a.partial-12345678').write_bytes(b'of an earlier version')
    writer = subprocess.Popen([sys.executable, '-c', WRITER, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == 'writing\n'
    living = [name for name in os.listdir(tmp_path) if name != 'a.partial-12345678']
    remove_leftovers(str(path))
    assert os.listdir(tmp_path) == living and len(living) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert os.listdir(tmp_path) == living
    write(path, b'whole')
    assert os.listdir(tmp_path) == ['a']


def test_a_failed_write_is_a_one_line_error(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    assert 'cannot be written' in one_line(write, tmp_path / 'file' / 'a', b'')
    assert 'disk full' in one_line(check_space, str(tmp_path / 'new' / 'a'), 2 ** 60)
    check_space(str(tmp_path / 'new' / 'a'), 1)


def test_other_peoples_files_are_no_leftovers(tmp_path):
    for name in ('a.partial-copy', 'a.partial-Of2025_1', 'a.partial-12345678.txt'):
        (tmp_path / name).write_bytes(b'mine')
    os.mkfifo(tmp_path / 'a.partial-abcdefgh')
    write(tmp_path / 'a', b'new')
    assert len(os.listdir(tmp_path)) == 5


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / 'a'
    path.write_bytes(b'old')
    access = os.access

    def as_an_ordinary_user(file, mode):
        return access(file, mode) and (mode != os.W_OK or bool(os.stat(file).st_mode & 0o200))

    monkeypatch.setattr(os, 'access', as_an_ordinary_user)
    path.chmod(0o444)
    for attempt in (lambda: write(path, b'new'), lambda: check_can_write(str(path))):
        with pytest.raises(CannotWrite, match='write-protected'):
            attempt()
    assert os.listdir(tmp_path) == ['a'] and path.read_bytes() == b'old'
    path.chmod(0o600)
    write(path, b'new')
    assert path.read_bytes() == b'new' and path.stat().st_mode & 0o777 == 0o600


def test_writing_follows_symbolic_links(tmp_path, monkeypatch):
    for name in ('there', 'elsewhere/absent'):
        (tmp_path / 'link').symlink_to(name)
        (tmp_path / 'there').write_bytes(b'before')
        check_can_write(str(tmp_path / 'link'))
        write(tmp_path / 'link', b'new')
        assert os.readlink(tmp_path / 'link') == name and (tmp_path / name).read_bytes() == b'new'
        (tmp_path / 'link').unlink()
    assert sorted(os.listdir(tmp_path)) == ['elsewhere', 'there']
    (tmp_path / 'link').symlink_to('elsewhere/more')
    asked = []
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: asked.append(path) or types.SimpleNamespace(free=9))
    check_space(str(tmp_path / 'link'), 9)
    assert asked == [str(tmp_path / 'elsewhere')]


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'circle').symlink_to('circle')
    for path in (tmp_path / 'pipe', tmp_path / 'circle', tmp_path, os.devnull):
        for attempt in (check_can_write, lambda path: write(path, b'')):
            assert f'{path}: cannot be written, as it is a folder, a device,' in one_line(attempt, str(path))
    assert sorted(os.listdir(tmp_path)) == ['circle', 'pipe']


def test_writability_is_tested_without_a_file(tmp_path):
    check_can_write(str(tmp_path / 'new' / 'a'))
    assert os.listdir(tmp_path) == []
    if os.path.isdir('/proc/self'):
        assert '/proc/x.hdf5: cannot be written (' in one_line(check_can_write, '/proc/x.hdf5')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='the system has no /dev/full')
def test_a_full_disk_is_reported():
    with pytest.raises(CannotWrite, match='disk full'), convert_os_errors('a'), \
            open('/dev/full', 'wb', buffering=0) as file:
        file.write(b'1')
