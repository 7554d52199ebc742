"""Keep a running average of a network's parameters (Polyak and Juditsky, 1992): its images are steadier."""
import itertools

import torch

from common import checkpoint


class RunningAverage:
    """The average a = d * a + (1 - d) * p of the parameters p of `net`, updated after each step of an optimizer.

    It begins as a copy of the parameters, or as `state_dict`, read from the file `path`. Raises UserError if that does
    not fit the network.
    """

    def __init__(self, net, state_dict=None, path=''):
        self.net = net
        self.parameters = [parameter.detach().clone() for parameter in net.parameters()]
        if state_dict is not None:
            buffers = dict(net.named_buffers())
            fitting = checkpoint.checked_weights(net, buffers | checkpoint.without_module(state_dict, path), path)
            for averaged, (name, _) in zip(self.parameters, net.named_parameters()):
                averaged.copy_(fitting[name])

    def follow(self, optimizer, decay, steps=0):
        """Update the average after every step of the network's optimizer, which has made `steps` steps already.

        d is `decay`, but (1 + n) / (10 + n) at step n where that is less, as in TensorFlow's averages. Otherwise, the
        average of a thousand steps would still be a third of the initial, random weights.
        """
        count = itertools.count(steps)

        @torch.no_grad()
        def update(*_):
            n = next(count)
            torch._foreach_lerp_(self.parameters, list(self.net.parameters()), 1 - min(decay, (1 + n) / (10 + n)))

        optimizer.register_step_post_hook(update)

    def state_dict(self):
        """Return {name of a parameter: its average}."""
        return {name: averaged for (name, _), averaged in zip(self.net.named_parameters(), self.parameters)}

    def __call__(self, *inputs):
        """Return what the network computes with the averages in place of its parameters."""
        return torch.func.functional_call(self.net, self.state_dict(), inputs)
