"""What is started dies with what started it, however that ends."""

import subprocess
import sys

import psutil
import pytest

from tests.support.processes import survivors

PARENT = """
import multiprocessing, os, signal, time
from megatron_spin.processes import forks_die_with_us
for _ in range({calls}):
    forks_die_with_us()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("calls", [0, 2])
def test_a_fork_dies_with_its_parent(calls: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(calls=calls)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    fork = psutil.Process(int(parent.stdout.readline()))
    parent.wait(timeout=60)
    parent.stdout.close()
    alive = survivors([fork], seconds=10 if calls else 0.5)
    for process in alive:
        process.kill()
    assert bool(alive) == (calls == 0)
