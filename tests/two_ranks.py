"""Train in two processes, with torchrun's environment or by torchrun itself, which then starts this file.

Each process writes its record to a file in its folder.
"""
import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.utils.tensorboard  # noqa: F401 - imported once, for all the processes that are forked from here
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from common import checkpoint
from common.errors import run_command

CHAPTERS = ('text2image', 'stackgan_v1', 'stackgan_v2')
PATIENCE = 240  # seconds, for a machine that is busy with other things


def train(folder, chapter, *args, at_step=None):
    """Run a section's main.py in `folder` as two ranks. Returns (exit status, record of `_watch`) for each.

    `at_step(rank, step, losses)`, if given, is called before the first step and after every step, and may change its
    losses.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, *(f'{name}.main' for name in CHAPTERS)])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    both = [context.Process(target=_be, args=(rank, port, str(folder), chapter, args, at_step)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(PATIENCE)
        process.kill()
        process.join()
    return [(process.exitcode, torch.load(folder / f'rank_{rank}.pt')) for rank, process in enumerate(both)]


@contextlib.contextmanager
def torchrun(folder, *args):
    """Start StackGAN++'s main.py with torchrun in two processes, each of which writes its id to `folder`/pid_RANK.

    Afterwards, both are killed if they are still running.
    """
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', __file__]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    for file in folder.glob('pid_*'):
        file.unlink()
    with subprocess.Popen([*command, *map(str, args)], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as started:
        try:
            yield started
        finally:
            started.kill()
            for file in folder.glob('pid_*'):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.read_text()), signal.SIGKILL)


def _be(rank, port, folder, chapter, args, at_step):
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'CUDA_VISIBLE_DEVICES': '',
                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    os.chdir(folder)
    torch.set_num_threads(1)
    main = importlib.import_module(f'{chapter}.main')
    seen = _watch(main.Model, rank, at_step)
    sys.argv = [os.path.abspath(main.__file__), *map(str, args)]
    with open(f'said_{rank}.txt', 'w', encoding='utf-8') as sys.stdout, \
            open(f'error_{rank}.txt', 'w', encoding='utf-8') as sys.stderr:
        try:
            run_command(main.main)
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            sys.exit(end.code if isinstance(end.code, int) else 1)
        finally:
            seen |= {'weights': seen.pop('parameters')(), 'ended': time.time()}
            torch.save(seen, f'rank_{rank}.pt')


def _watch(Model, rank, at_step):
    """A dict that a training fills: `items`, `noise` and `losses` of every step, and of the first, for each optimizer,
    `gradients` and their `means`. In the end, `_be` adds all `weights` and the time.

    Rank 1 begins with other weights.
    """
    seen = {'items': [], 'noise': [], 'losses': [], 'gradients': [], 'means': [], 'parameters': list}
    randn, create_optim, train_step = torch.randn, Model.create_optim, Model.train_step

    def drawn(*args, **kwargs):
        seen['last_noise'] = randn(*args, **kwargs)
        seen.setdefault('first_noise', seen['last_noise'])
        return seen['last_noise']

    def started(model, lr):
        nets = [model.netG, *(model.netsD if hasattr(model, 'netsD') else [model.netD])]
        with torch.no_grad():
            for net in nets:
                next(net.parameters()).add_(rank)
        seen['parameters'] = lambda: [parameter.detach() for net in nets for parameter in net.parameters()]
        if at_step:
            at_step(rank, 0, {})
        create_optim(model, lr)

    def watched(model, batch):
        seen.pop('first_noise', None)
        torch.randn = drawn
        losses = train_step(model, batch)
        torch.randn = randn
        seen['items'].append((model.progress['epoch'], batch.get('name') or batch['txt']))
        seen['noise'].append(seen.pop('first_noise'))
        seen['losses'].append(float(losses['loss_G']))
        if at_step:
            at_step(rank, model.progress['step'] + 1, losses)
        return losses

    def note(name):
        def noted(optimizer, *_):
            if not seen['items']:
                seen[name].append([parameter.grad.clone() for parameter in optimizer.param_groups[0]['params']
                                   if parameter.grad is not None])
        return noted

    Model.create_optim, Model.train_step = started, watched
    register_optimizer_step_pre_hook(note('gradients'))
    register_optimizer_step_post_hook(note('means'))
    return seen


def stop_second(rank, step, losses):
    """Send a signal to the second process alone during its third step."""
    if rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if rank == 0 and step == 3:
        save = checkpoint.save
        checkpoint.save = lambda *args, **how: time.sleep(1) or save(*args, **how)  # on a slow disk


def diverge_second(rank, step, losses):
    """Make the loss of the second process's third step NaN."""
    if rank == 1 and step == 3:
        losses['loss_G'] = torch.tensor(torch.nan)


def end_second(rank, step, losses, at=3):
    """End the second process without a message in its third step, or at step `at`."""
    if rank == 1 and step == at:
        os._exit(9)


def end_second_at_once(rank, step, losses):
    """End the second process without a message before it receives the first one's weights."""
    end_second(rank, step, losses, at=0)


if __name__ == '__main__':
    from stackgan_v2 import main

    with open(f'pid_{os.environ["RANK"]}', 'w', encoding='utf-8') as file:
        file.write(str(os.getpid()))
    run_command(main.main)
