"""Memory of a long run on a CPU; `make soak` measures a whole one."""

from __future__ import annotations

import subprocess
import sys

import pytest

GROWTH = """
import resource, sys
import torch
from popo_lite.fused import _float32_linear
from popo_lite.policy.device import pick_device

pick_device("cpu")
torch.set_num_threads(1)
weight = torch.zeros(512, 256)

def multiply(counts):
    for rows in counts:
        _float32_linear(torch.zeros(rows, 256), weight)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = multiply([*range(1, 100), 600])
print((multiply(range(100, 600)) - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_products_of_many_lengths_take_no_more_memory():
    # A new process: the caches get their size at the first product.
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 150  # MiB; 389 with 1,024 products each
