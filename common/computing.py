"""How networks compute in a training: `--accumulate`, `--precision` and `--compile`."""
from common import compiled, memory, precision


def prepare(options, device, generator, discriminators, heads=()):
    """Let networks, and `heads`, parts of discriminators that are called by themselves, compute as the options say.

    Raises UserError where that cannot be done here.
    """
    # From the inside out: what is computed again for a gradient has the first time's precision, and compiled is all.
    if vars(options).get('accumulate', 1) > 1:
        memory.prepare(options.accumulate, generator, *discriminators)
    called = generator, *discriminators, *heads
    precision.prepare(options, device, *called)
    compiled.prepare(options, device, *called)
