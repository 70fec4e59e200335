"""What is started dies with what started it, however that ends."""

import subprocess
import sys

import psutil
import pytest

from tests.support.processes import survivors

PARENT = """
import multiprocessing, os, signal, sys, time
from megatron_spin.processes import forks_die_with_us
for _ in range({calls}):
    forks_die_with_us()
context = multiprocessing.get_context("fork")
ready = context.Event()
child = context.Process(target=lambda: (ready.set(), time.sleep(60)))
child.start()
ready.wait()
print(child.pid, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("calls", [0, 2])
def test_a_fork_dies_with_its_parent(calls: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(calls=calls)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        fork = psutil.Process(int(parent.stdout.readline()))
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.wait(timeout=60)
    alive = survivors([fork], seconds=10 if calls else 0.5)
    for process in alive:
        process.kill()
    assert bool(alive) == (calls == 0)


def test_a_fork_whose_parent_is_gone_already_ends_at_once() -> None:
    script = """
import os, time
from megatron_spin import processes
processes.forks_die_with_us()
processes.die_with_parent = lambda: time.sleep(0.5)  # the parent ends in the meantime
if os.fork():
    os._exit(0)
print("went on")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "" and ran.stderr == ""
