"""benchmarks/precision_quality.py: its emulation of bf16, and a run on a few photographs."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import precision_quality

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('product', [
    lambda x, w: F.conv2d(x, w, padding=1), lambda x, w: F.conv_transpose2d(x, w, padding=1),
    lambda x, w: F.linear(x.flatten(1), w.flatten(1)[:, :6].repeat(1, 25))])
def test_emulated_products_equal_bf16(product):
    torch.manual_seed(0)
    values = torch.randn(4, 6, 5, 5), torch.randn(6, 6, 3, 3)

    def results():
        x, w = (value.clone().requires_grad_() for value in values)
        with torch.autocast('cpu', torch.bfloat16):
            result = product(x, w)
        result.float().square().sum().backward()
        return result, x.grad, w.grad

    expected = results()
    with precision_quality.RoundedProducts():
        found = results()
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=2 ** -7, atol=.02 * float(other.detach().abs().max()))


def test_both_precisions_are_trained_and_measured(birds):
    pytest.importorskip('efficientnet_lite_pytorch')
    done = subprocess.run([sys.executable, precision_quality.__file__, '--file', birds, '--steps', '2', '--seeds', '1',
                           '--batch_size', '2'], capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    rows = [line.split('|')[1:-1] for line in done.stdout.splitlines() if line.startswith('|')][2:]
    assert [row[0].strip() for row in rows] == ['fp32', 'bf16']
    assert all(float(number) > 0 for row in rows for number in row[1:]) and rows[0][1] != rows[1][1]
