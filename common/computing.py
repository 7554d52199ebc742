"""How networks compute in a training: `--accumulate`, `--precision` and `--compile`."""
from common import compiled, memory, precision
from common.errors import UserError


def prepare(options, device, generator, discriminators, heads=()):
    """Let networks, and `heads`, parts of discriminators that are called by themselves, compute as the options say.

    Raises UserError where that cannot be done here.
    """
    called = generator, *discriminators, *heads
    is_accumulated = getattr(options, 'accumulate', 1) > 1  # text2image has no such flag
    if is_accumulated and options.accumulate > options.batch_size:
        raise UserError(f'--accumulate {options.accumulate}: more parts than pictures; with --batch_size '
                        f'{options.batch_size} give {options.batch_size} or less')
    if is_accumulated and options.compile is True:
        raise UserError('--compile True and --accumulate: give one of them')
    # From the inside out: what is computed again for a gradient has the first time's precision, and compiled is all.
    if is_accumulated:
        memory.prepare(options.accumulate, generator, *discriminators)
    if device.type == 'cpu':
        what_is_freed = memory.give_back_what_is_freed if is_accumulated else memory.keep_what_is_freed
        what_is_freed()
    precision.prepare(options, device, *called)
    if not is_accumulated:  # a compiler does not take to what is computed again
        compiled.prepare(options, device, *called)
