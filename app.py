"""Show in the browser what runs generate for your sentences.

    python app.py              the newest run of each GAN, or the pretrained weights if there is none
    python app.py RUN RUN      these runs, side by side

The page is served to this machine only, and loads nothing from others. It needs Gradio: pip install -r
requirements-app.txt
"""
import os

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import errno
import socket
import threading

import torch

from common import flags, run
from common.errors import UserError, run_command
from evaluation.browsed_runs import BrowsedRun
from evaluation.trained_runs import SECTIONS

PRETRAINED = os.path.join(flags.ROOT, 'pretrained')
PORT = 7860                     # the first one that is tried
HOST = '127.0.0.1'
# Even if a version of Gradio asked for fonts or scripts of other servers, the browser would not fetch them.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"


def main():
    """Load the runs, and serve the page until Ctrl-C."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', type=flags.path, metavar='RUN', help='run folders of the three GANs')
    parser.add_argument('--encoder', type=flags.path, metavar='FILE',
                        help='sentence encoder (default: the one in the run folder, or the one beside the data)')
    parser.add_argument('--port', type=flags.up_to(65535), metavar='N',
                        help=f'port of the page (default: {PORT}, or the next free one)')
    flags.add_boolean(parser, '--share', False, 'also make a public address, on a server of Gradio, from which '
                      'everybody who knows it sees the page, photographs of the data included')
    options = parser.parse_args()
    browser_page = import_page()
    device = flags.choose_device(torch.cuda.is_available())
    runs = [BrowsedRun(path, device, options.encoder) for path in options.runs] or newest(device, options.encoder)
    for one in runs:
        print(browser_page.title(one))
        for line in filter(None, (one.remark, one.no_captions)):
            print(f'  {line}')
    serve(browser_page, runs, options.port, options.share)


def import_page():
    """Return the module of the page. Raises UserError if Gradio is not installed."""
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    # Gradio imports Hugging Face's library, which reads these then: an encoder must not look for files on the hub.
    os.environ.update(HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    try:
        from evaluation import browser_page
    except ModuleNotFoundError as error:
        raise UserError(f'the page needs {error.name}, which is not installed: pip install -r requirements-app.txt'
                        ) from error
    return browser_page


def newest(device, encoder):
    """Return the newest run of each GAN, or the pretrained ones if there is none. Raises UserError without any."""
    found = []
    for section, *_ in SECTIONS.values():
        try:
            found.append(BrowsedRun(run.find_run(os.path.join(flags.ROOT, section, 'output'), f'{section}.pt'), device,
                                    encoder))
        except run.NoRun:
            continue
        except UserError as error:  # it was not asked for, so the others are shown
            print(f'not shown: {error}')
    if found:
        return found
    pretrained = [os.path.join(PRETRAINED, section) for section, *_ in SECTIONS.values()]
    if not any(map(os.path.isdir, pretrained)):
        raise UserError('no run yet; train one first (python text2image/main.py --train), or give the folder of one')
    why = run.no_run_yet(os.path.join(flags.ROOT, 'text2image', 'output'), 'text2image')
    print(f'{why}: generating with the pretrained weights in {PRETRAINED}')
    return [BrowsedRun(folder, device, encoder) for folder in filter(os.path.isdir, pretrained)]


def why_not(port):
    """Return why the page cannot be served from a port: Gradio only says that it cannot."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        return 'is in use' if error.errno == errno.EADDRINUSE else f'cannot be used ({error.strerror})'
    return 'cannot be used'


class WithPolicy:
    """An ASGI middleware that tells browsers to load nothing from other servers."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message['type'] == 'http.response.start':
                message['headers'] = [*message['headers'], (b'content-security-policy', POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(browser_page, runs, port, share):
    """Serve the page until a signal. Raises UserError if the port cannot be used."""
    from starlette.middleware import Middleware
    not_proxied = os.environ.get('no_proxy') or os.environ.get('NO_PROXY')
    os.environ['no_proxy'] = f'{not_proxied},{HOST}' if not_proxied else HOST  # Gradio asks its own server first
    page = browser_page.build(runs)
    try:
        page.launch(server_name=HOST, server_port=port, share=share, prevent_thread_lock=True, quiet=True,
                    theme=browser_page.THEME, css=browser_page.STYLE, footer_links=[], run_history=False,
                    ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, max_file_size=1,
                    app_kwargs={'middleware': [Middleware(WithPolicy)]})
    except OSError as error:
        raise UserError(f'--port {port or PORT}: {why_not(port or PORT)}; give another one, or leave it out') from error
    try:
        if page.server_port != (port or PORT):
            print(f'port {PORT} is in use, so the page has the next free one')
        print(f'open {page.local_url} in a browser; Ctrl-C ends this program', flush=True)
        if not share:
            signals.end_at_once()  # there is nothing to save, and PyTorch takes long to free its memory
        threading.Event().wait()
    finally:
        page.close(verbose=False)


if __name__ == '__main__':
    run_command(main)
