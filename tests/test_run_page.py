"""The page of a run, index.html: what it shows, when it is renewed, and that it stops no training."""
import json
import os
import re
import shlex
import shutil
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import char_cnn_rnn.main
import stackgan_v1.main
import stackgan_v2.main
import text2image.main
import word2vec.main
from common import run_page, runs
from common.errors import CannotWrite, run_command
from common.flags import ROOT
from common.history import KEPT, History
from common.log import CAPTIONS, Log
from common.pictures import grid, to_pil, with_captions
from common.progress import new_progress
from common.run_page import RunPage, frames
from tests.commands import DATA, Caller, newest

pytestmark = pytest.mark.usefixtures('one_thread')

main = word2vec.main  # of the fixture `call`: the cheapest training
NARROW = '--gf_dim 4 --df_dim 4 --batch_size 4 --workers 0 --z_dim 5 --precision fp32 --compile False'.split()
TYPED = {'text2image': ['--batch_size', 4],
         'stackgan_v1': [*NARROW, '--condition_dim', 6],
         'stackgan_v2': [*NARROW, '--embedding_dim', 6, '--branches', 2],
         'stackgan_v2 without text': [*NARROW, '--conditional', False, '--branches', 2],
         'char_cnn_rnn': ['--variant', 'birds_cvpr', '--image_encoder', 'scratch', '--batch_size', 4],
         'word2vec': ['--min_count', 1, '--batch_size', 16]}
MAINS = {'text2image': text2image.main, 'stackgan_v1': stackgan_v1.main, 'stackgan_v2': stackgan_v2.main,
         'char_cnn_rnn': char_cnn_rnn.main, 'word2vec': word2vec.main}
VOID = {'meta', 'img', 'br', 'path', 'polyline'}  # of those that a page may have, without or with / at the end


class Page(HTMLParser):
    """Read a page: its `text`, `images` {alt: src}, `cells` of tables and pieces of code. All elements must close."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding='utf-8')
        self.open, self.tags, self.text, self.images, self.cells = [], [], '', {}, []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        assert len(values) == len(attributes) and not {'href', 'style', 'srcset', 'onload'} & values.keys()
        assert values.get('src', 'data:').startswith('data:image/') or 'src' not in values
        if tag == 'img':
            assert values['alt']
            self.images[values['alt']] = values['src']
        if tag in ('td', 'th', 'code'):
            self.cells.append('')
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if 'style' not in self.open else ''
        if {'td', 'th', 'code'} & {*self.open}:
            self.cells[-1] += data

    def changed(self):
        """Return {flag: (value, default)} of the options that differ from their defaults."""
        table = re.search('<table[^>]*>\n<tr><th>changed.*?</table>', self.source, re.DOTALL)
        rows = re.findall('<code>--(.*?)</code></th><td>(.*?)</td><td>(.*?)</td>', table[0] if table else '')
        return {name: (value, default) for name, value, default in rows}


def page_of(run_dir):
    page = Page(run_dir / 'index.html')
    assert page.source.startswith('<!doctype html>\n<html lang="en"') and 'script' not in page.tags
    assert 'http' not in page.source and 'url(' not in page.source and '@import' not in page.source
    assert page.tags.count('h1') == page.tags.count('title') == 1
    return page


@pytest.fixture(scope='module')
def trained_once(folder, tmp_path_factory):
    """Return a run folder of text2image after two epochs of two steps."""
    out = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr('sys.argv', [text2image.main.__file__, '--train', *DATA, '--cuda', 'False', '--out_dir', str(out),
                                   '--epochs', '2', '--batch_size', '4', '--log_interval', '1', '--l1_coef', '7'])
        text2image.main.main()
    return newest(out, 'tiny_')


@pytest.fixture
def trained(trained_once, tmp_path):
    """Return a copy of a run of text2image, whose page names its new place."""
    copied = Path(shutil.copytree(trained_once, tmp_path / 'out' / trained_once.name))
    run_page.renew(copied)
    return copied


@pytest.fixture
def words(call, tmp_path):
    """Return a run folder of word2vec after two epochs."""
    call('--train', *DATA, '--out_dir', tmp_path, '--epochs', 2, '--log_interval', 1, *TYPED['word2vec'])
    return newest(tmp_path, 'tiny_')


@pytest.mark.parametrize('name', TYPED)
def test_every_section_writes_a_page(name, folder, tmp_path, monkeypatch, capsys):
    section = name.split()[0]
    call = Caller(MAINS[section], folder, monkeypatch, capsys)
    call('--train', *DATA, '--cuda', False, '--out_dir', tmp_path, '--epochs', 1, '--log_interval', 1, *TYPED[name])
    run_dir = newest(tmp_path, 'tiny')
    typed = {flag[2:] for flag in TYPED[name] if str(flag).startswith('--')} - {'compile'}
    for epochs in (1, 2):  # a resumed run has the same options, and other epochs
        page = page_of(run_dir)
        assert page.changed().keys() - {'precision', 'cuda'} == typed - {'precision'} | {
            'data_dir', 'dataset', 'epochs', 'log_interval'} | ({'compile'} if '--compile' in TYPED[name] else set())
        assert page.changed()['epochs'][0] == str(epochs)
        assert 'loss' in page.text and f'epoch {epochs} of {epochs}, ' in page.text
        if epochs == 1:
            call('--train', '--resume', run_dir, '--epochs', 2)
    has_samples, has_text = (section.startswith(('text2', 'stack')), name in ('text2image', *list(TYPED)[1:3]))
    assert [alt for alt in page.images if re.fullmatch(r'epoch \d', alt)] == ['epoch 1', 'epoch 2'] * has_samples
    captions = [alt for alt in page.images if re.match('epoch 2: (a small red bird|un oiseau coloré)', alt)]
    assert len(captions) == (4 if name.startswith('stack') else 8) * has_text
    assert (run_dir / CAPTIONS).exists() == has_text
    assert ('--train False' in page.text, '--text' in page.cells[-1]) == (has_samples, has_text)


def test_the_commands_on_the_page_work(trained, monkeypatch):
    continued, generated = [shlex.split(cell) for cell in page_of(trained).cells if cell.startswith('python ')]
    assert continued[1] == generated[1] == 'text2image/main.py' and continued[-2:] == ['--epochs', '4']
    monkeypatch.chdir(ROOT)
    for command in (continued, generated):
        monkeypatch.setattr('sys.argv', command[1:])
        run_command(text2image.main.main)
    assert torch.load(trained / 'text2image.pt', weights_only=True)['progress']['epoch'] == 4
    sheet = newest(trained.parent, 'text_') / 'captions.txt'
    assert sheet.read_text().startswith('001.png\ta small red bird, Auk_0')
    assert page_of(trained).cells[-2].endswith('--epochs 8')


def test_captions_stand_below_their_images(trained):
    legend, captions = run_page.read_captions(trained)
    assert legend == 'Above: the real image. Below: the image generated for its caption.' and len(captions) == 1
    sheet = Image.open(trained / 'samples' / 'epoch_0002.png').convert('RGB')
    for i, caption in enumerate(captions[0]):
        tile = sheet.crop((2 + 66 * i, 2, 66 + 66 * i, 132))
        assert run_page.picture(tile, f'epoch 2: {caption}', 'JPEG') in page_of(trained).source
    image = with_captions(to_pil(grid(torch.zeros(1, 3, 4, 4), 1)), [['a\tbird\n<b>', 'b']], 'what')
    assert image.info['captions'] == '# what\na bird <b>\tb\n'


def test_measuring_renews_the_page_and_keeps_what_it_shows(words):
    before = page_of(words)
    assert before.changed()['min_count'] == ('1', '5') and 'species' not in before.text
    (words / 'metrics.jsonl').write_text(''.join(
        json.dumps({'step': step, 'split': 'test', 'images': 50, 'species': step / 8, 'b<i>': float('nan')}) + '\n'
        for step in (1, 2)) + '{"step": 3')
    run_page.renew(words)
    after = page_of(words)
    assert after.changed() == before.changed() and after.cells[-2:] == before.cells[-2:]
    assert '<th>species</th><td>0.25</td>' in after.source and '<th>b&lt;i&gt;</th>' in after.source
    assert after.source.count('aria-label="species"') == 1 and 'nan,' not in after.source
    (words / 'index.html').unlink()
    run_page.renew(words)
    assert not (words / 'index.html').exists()


def test_whatever_a_folder_holds_is_shown_as_text(trained):
    hostile = '<script>alert(1)</script>\x1b[31m"\u202e&amp;\x85é'
    options = json.loads((trained / 'options.json').read_text())
    for name, value in options.items():
        options[name] = hostile if name not in ('train', 'seen_from_run') else value
    (trained / 'options.json').write_text(json.dumps(options | {hostile: ['\ud800', 1e400, [hostile]]}))
    (trained / CAPTIONS).write_text(f'# {hostile}\n' + '\t'.join([hostile] * 8) + '\n')
    (trained / 'metrics.jsonl').write_text(json.dumps({hostile: hostile, 'step': 10 ** 400, 'x': 1e300}) + '\n' +
                                           json.dumps({hostile: 5e-324, 'step': True}))
    with open(trained / 'log.txt', 'a') as log:
        log.write('epoch 1/1  step 9  <script> 1  loss_D 1e308  loss_G -1e308  1 images/s\nepoch \xff\n' + 'x' * 30_000)
    (trained / 'samples' / 'epoch_0003<b>.png').write_bytes(b'PNG')
    (trained / 'samples' / 'epoch_0004.png').write_bytes((trained / 'samples' / 'epoch_0002.png').read_bytes())
    run_page.write(trained, History(trained), {'script': hostile, 'ranks': hostile, 'defaults': {hostile: 1}})
    page = page_of(trained)
    assert '<script>alert(1)</script>[31m"&amp; é' in page.text and 'epoch 3<b>' in page.text
    assert '<script>alert(1)</script>[31m"&amp; é' in page.cells[-1] and 'cannot be read' in page.text
    assert not re.search('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]', page.source)


def test_damaged_and_missing_files_leave_a_page(tmp_path):
    (tmp_path / 'options.json').write_text('{}')
    run_page.write(tmp_path, History(tmp_path), {})
    assert 'None logged yet' in page_of(tmp_path).text
    for name in ('log.txt', 'metrics.jsonl', CAPTIONS):
        os.mkfifo(tmp_path / name)
    (tmp_path / 'samples').write_text('')
    run_page.write(tmp_path, History(tmp_path), {'defaults': []})
    assert 'None logged yet' in page_of(tmp_path).text
    (tmp_path / 'options.json').write_text('[]')
    with pytest.raises(CannotWrite, match=r'index.html: cannot be made \(UserError: .*not the options of a run'):
        run_page.write(tmp_path, History(tmp_path), {})


# --- when it is written, and what happens if it cannot be ----------------------------------------------------------

def test_a_foreign_file_is_not_replaced_and_a_page_is(words, call):
    (words / 'index.html').write_text('<!doctype html>mine')
    said = call('--train', '--resume', words, '--epochs', 4)
    assert (words / 'index.html').read_text() == '<!doctype html>mine' and 'done: ' in said
    log = (words / 'log.txt').read_text()
    assert log.count('index.html: was not written by this program, so it is kept') == 1
    run_page.renew(words)
    assert (words / 'index.html').read_text() == '<!doctype html>mine'


@pytest.mark.parametrize('error', [CannotWrite('index.html: disk full'), ZeroDivisionError('<b>')])
def test_a_page_that_cannot_be_written_stops_no_training(error, words, call, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(run_page, 'page', fail)
    said = call.error('--train', '--resume', words, '--epochs', 4)
    assert 'the training is done, but some files were not written: ' in said and 'index.html: ' in said
    assert torch.load(words / 'cbow.pt', weights_only=True)['progress']['epoch'] == 4
    lines = (words / 'log.txt').read_text().splitlines()
    assert len([line for line in lines if 'index.html: cannot be made' in line]) == 1
    monkeypatch.undo()
    assert 'epoch 2 of 2' in page_of(words).text  # that of before


def test_a_page_takes_little_of_the_time(words, monkeypatch):
    with Log(str(words), False, 0) as log:
        written, now = [], [1000.0]
        page = RunPage(str(words), log, new_progress(), 1)
        monkeypatch.setattr(run_page.time, 'monotonic', lambda: now[0])

        def write(*_):
            written.append(now[0])
            now[0] += 2

        monkeypatch.setattr(run_page, 'write', write)
        for _ in range(20_000):  # a sample every second
            page.renew()
            now[0] += 1
        assert 2 * len(written) < 0.01 * (now[0] - 1000) and len(written) > 20
        page.renew(at_once=True)
        assert written[-1] == now[0] - 2
        RunPage('', log, new_progress(), 1).renew(at_once=True)  # no folder: another rank, or no `out_dir`
        (words / 'options.json').unlink()
        count = len(written)
        page.renew(at_once=True)
        assert len(written) == count


def test_a_stopped_run_has_a_page(call, tmp_path, monkeypatch):
    train_step = main.Model.train_step

    def stopped(self, batch):
        if self.progress['epoch'] == 1:
            raise KeyboardInterrupt
        return train_step(self, batch)

    monkeypatch.setattr(main.Model, 'train_step', stopped)
    monkeypatch.setattr(run_page, 'SHARE', 10 ** 9)  # so that only the end renews it
    with pytest.raises(SystemExit):
        call('--train', *DATA, '--out_dir', tmp_path, '--epochs', 9, '--log_interval', 1, *TYPED['word2vec'])
    assert 'epoch 1 of 9' in page_of(newest(tmp_path, 'tiny_')).text


def test_a_page_says_what_is_done_also_of_epochs_without_a_line(call, tmp_path, monkeypatch):
    call('--train', *DATA, '--out_dir', tmp_path, '--epochs', 2, '--log_interval', 1000, *TYPED['word2vec'])
    run_dir = newest(tmp_path, 'tiny_')
    assert 'epoch 2 of 2, ' in page_of(run_dir).text and page_of(run_dir).cells[-1].endswith('--epochs 4')
    assert '  2/2  ' in '\n'.join(runs.lines(runs.find(str(run_dir))[0], None))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        train_step = main.Model.train_step

        def stopped(self, batch):
            if self.progress['batch'] == 2:
                raise KeyboardInterrupt
            return train_step(self, batch)

        patch.setattr(main.Model, 'train_step', stopped)
        call('--train', '--resume', run_dir, '--epochs', 3)
    assert 'epoch 3 of 3 (not done), ' in page_of(run_dir).text
    assert '--epochs' not in page_of(run_dir).cells[-1]  # the run has that number
    assert '  3/3 (not done)  ' in '\n'.join(runs.lines(runs.find(str(run_dir))[0], None))


def test_a_renamed_run_keeps_its_start(call, words, tmp_path):
    before = run_page.started(words)
    moved = shutil.copytree(words, tmp_path / 'renamed')
    (moved / 'events.out.tfevents.1262304000.mine').write_bytes(b'')
    call('--train', '--resume', moved, '--epochs', 3)
    assert run_page.started(moved) == time.strftime('%Y-%m-%d %H:%M', time.localtime(1262304000)) != before


def test_writing_a_page_draws_no_random_numbers(words):
    state = torch.get_rng_state()
    run_page.write(words, History(words), {})
    assert torch.equal(state, torch.get_rng_state())


# --- long runs -------------------------------------------------------------------------------------------------------

def test_long_logs_are_thinned_in_bounded_memory(tmp_path):
    steps = range(20, 1_200_001, 20)
    with open(tmp_path / 'log.txt', 'w') as log:
        log.writelines(f'epoch 1/2  step {step}  loss_D {step}  loss_G 2  3.1 images/s\n' for step in steps)
    tracemalloc.start()
    history = History(tmp_path).read()
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    points = history.curves()['loss_D']
    assert KEPT / 2 <= len(points) <= KEPT and points[-1] == (1_200_000, 1_200_000)
    assert all(step == value for step, value in points) and points == sorted(points)
    with open(tmp_path / 'log.txt', 'a') as log:
        log.write('epoch 2/2  step 1200000  loss_D 5  loss_G 2  3.1 images/s\nepoch 2/2  step 1200001  loss_D 6  3 im')
    assert history.read().curves()['loss_D'][-1] == (1_200_000, 5)  # of a step that was repeated, the last
    with open(tmp_path / 'log.txt', 'a') as log:
        log.write('ages/s\n')
    assert history.read().step == 1_200_001 and (history.epoch, history.epochs) == (2, 2)
    (tmp_path / 'options.json').write_text('{}')
    run_page.write(tmp_path, history, {})
    assert (tmp_path / 'index.html').stat().st_size < 50_000
    assert History(tmp_path).read(tail=1000).newest == {'loss_D': '6'}


def test_a_log_is_read_on_wherever_it_was_cut(tmp_path):
    content = b''.join(b'epoch 1/2  step %d  loss %d.5  3.1 words/s\r\n' % (step, step) for step in range(50))
    history = History(tmp_path)
    for end in range(0, len(content), 7):
        (tmp_path / 'log.txt').write_bytes(content[:end])
        history.read()
    (tmp_path / 'log.txt').write_bytes(content)
    assert history.read().curves() == History(tmp_path).read().curves() == {
        'loss': [(step, step + 0.5) for step in range(50)]}


def test_a_film_has_a_bounded_number_of_samples(tmp_path, monkeypatch):
    (tmp_path / 'samples').mkdir()
    opened = []
    monkeypatch.setattr(run_page, 'open_sample', lambda path: opened.append(path) or Image.new('RGB', (800, 400)))
    for epoch in (*range(1, 101), 10_000):
        (tmp_path / 'samples' / f'epoch_{epoch:04d}.png').write_bytes(b'')
    shown = re.findall('<figcaption>epoch (.*?)</figcaption>', ''.join(frames(tmp_path, 40, 340)))
    assert shown == [*map(str, range(1, 101, 4)), '10000'] and len(opened) == len(shown)
    (tmp_path / 'samples' / 'epoch_10001.png').write_bytes(b'')
    figures = list(frames(tmp_path, 40, 340))
    assert len(opened) == len(shown) + 1  # only the new one is decoded
    assert 'width="340" height="170"' in figures[0] and len(figures) <= 41
