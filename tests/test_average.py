"""The running average of text2image's generator (--average)."""
import copy

import pytest
import torch

from common.average import RunningAverage
from tests.errors import one_line
from tests.test_text2image import batch_of, filled_model
from text2image.build_gan import Model

pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_average_follows_every_step():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    average, expected = RunningAverage(net), [parameter.detach().clone() for parameter in net.parameters()]
    average.follow(optimizer, 0.75, steps=20)
    for decay in (21 / 30, 22 / 31, 23 / 32, 24 / 33, 25 / 34, 26 / 35, 0.75, 0.75):
        net(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
        expected = [decay * mean + (1 - decay) * parameter.detach()
                    for mean, parameter in zip(expected, net.parameters())]
    assert list(average.state_dict()) == [name for name, _ in net.named_parameters()]
    for found, wanted in zip(average.state_dict().values(), expected):
        torch.testing.assert_close(found, wanted)
    averaged = copy.deepcopy(net).eval()
    averaged.load_state_dict(net.state_dict() | average.state_dict())
    net.eval()
    inputs = torch.randn(4, 2)
    assert torch.equal(average(inputs), averaged(inputs)) and not torch.equal(average(inputs), net(inputs))


def test_images_are_generated_with_it_and_it_is_saved(tmp_path):
    model, embed = filled_model(), torch.randn(2, 1024)
    plain = filled_model()
    model.keep_average(0.9)
    for step in range(2):
        torch.manual_seed(step)
        model.train_step(batch_of(step))
        torch.manual_seed(step)
        plain.train_step(batch_of(step))
    assert all(torch.equal(a, b) for a, b in zip(model.netG.parameters(), plain.netG.parameters()))
    image = model.generate(embed)
    assert not torch.equal(image, plain.generate(embed))
    model.progress['step'] = 2  # as `TrainingRun` counts
    model.save_to(str(tmp_path), verbose=False)

    read = Model('text2image', 'cpu', None, 3, 0, 0)
    read.load_from(str(tmp_path), verbose=False)
    torch.testing.assert_close(read.generate(embed), image)
    resumed = filled_model()
    resumed.load_from(str(tmp_path), verbose=False)
    resumed.keep_average(0.9)
    for one in (model, resumed):
        torch.manual_seed(2)
        one.train_step(batch_of(2))
    assert all(torch.equal(value, model.average_G.state_dict()[name])
               for name, value in resumed.average_G.state_dict().items())
    resumed.keep_average(0)  # what no step follows any more is not used
    assert torch.equal(resumed.generate(embed), _without_average(model, embed))

    plain.save_to(str(tmp_path), 'plain', verbose=False)
    assert 'average_G' not in torch.load(tmp_path / 'plain.pt', weights_only=True)


def _without_average(model, embed):
    model.keep_average(0)
    return model.generate(embed)


@pytest.mark.parametrize('damage', [
    lambda average: average.popitem(), lambda average: average.clear(),
    lambda average: average.update(more=torch.ones(1)),
    lambda average: average.update({next(iter(average)): torch.ones(2)}),
    lambda average: average.update({next(iter(average)): 'weights'}),
    lambda average: next(iter(average.values())).fill_(torch.nan)])
def test_a_damaged_average_is_refused(tmp_path, damage):
    model, read = filled_model(), Model('text2image', 'cpu', None, 3, 0, 0)
    model.keep_average(0.9)
    model.save_to(str(tmp_path), verbose=False)
    contents = torch.load(tmp_path / 'text2image.pt', weights_only=True)
    damage(contents['average_G'])
    before = [parameter.clone() for parameter in read.netG.parameters()]
    for broken in (contents, contents | {'average_G': [1]}):
        torch.save(broken, tmp_path / 'broken.pt')
        assert 'broken.pt: its average_G' in one_line(read.load_from, str(tmp_path / 'broken.pt'))
    assert all(torch.equal(a, b) for a, b in zip(before, read.netG.parameters()))
