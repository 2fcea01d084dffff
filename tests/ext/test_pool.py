"""The pool as Python sees it: fork, more threads than cpus, idle threads, several callers, exit."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLS, TOKENS = 512, 512, 8  # enough work that the other threads are woken

SETUP = f"""
import os, sys, threading, time
import numpy as np
from ktlab_ext import _native as native
rng = np.random.default_rng(3)
weights_NK = rng.standard_normal(({ROWS}, {COLS})).astype(np.float32)
raw = weights_NK.view(np.uint8).reshape(-1)
matrix = native.Matrix(raw, "f32", "ggml_blocks", 1, {ROWS}, {COLS})
x_TK = rng.standard_normal(({TOKENS}, {COLS})).astype(np.float32)
def linear(pool):
    y_TN = np.full(({TOKENS}, {ROWS}), np.nan, np.float32)
    native.linear(pool, "serial", 4, matrix, 0, x_TK, y_TN)
    return y_TN
expected_TN = linear(native.Pool(1))
"""


def fresh_process(code: str) -> str:
    """Runs code after SETUP where nothing else has threads; a hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def linear(native: ModuleType):
    space: dict = {}
    exec(SETUP, space)
    return space["linear"]


def test_threads_change_no_bit(native: ModuleType, linear) -> None:
    """Also with more threads than there are cpus, and with one cpu for all of them."""
    expected_TN = linear(native.Pool(1))
    for pool in (native.Pool(2), native.Pool(4 * (os.cpu_count() or 1)), native.Pool(3, cpus=[0])):
        for _ in range(5):
            assert np.array_equal(linear(pool), expected_TN), pool


def test_several_callers_share_a_pool(native: ModuleType, linear) -> None:
    pool, wrong = native.Pool(2), []
    expected_TN = linear(pool)

    def call() -> None:
        for _ in range(20):
            if not np.array_equal(linear(pool), expected_TN):
                wrong.append(threading.current_thread().name)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


def test_fork(native: ModuleType) -> None:
    """A child computes the same with its own workers, and its child too; the parent goes on."""
    fresh_process("""
pool = native.Pool(3)
for _ in range(5):
    assert np.array_equal(linear(pool), expected_TN)
    child = os.fork()
    if child == 0:
        before = threading.active_count(), len(os.listdir("/proc/self/task"))
        same = np.array_equal(linear(pool), expected_TN)
        grown = len(os.listdir("/proc/self/task"))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if np.array_equal(linear(pool), expected_TN) else 3)
        status = os.waitpid(grandchild, 0)[1]
        os._exit(0 if same and grown == 3 and status == 0 else 4)
    assert os.waitpid(child, 0)[1] == 0
""")


def test_fork_while_another_thread_computes(native: ModuleType) -> None:
    fresh_process("""
pool = native.Pool(2)
stop = threading.Event()
def compute():
    while not stop.is_set():
        linear(pool)
thread = threading.Thread(target=compute)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(linear(pool), expected_TN) else 3)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
""")


def test_idle_threads_burn_nothing(native: ModuleType, linear) -> None:
    pool = native.Pool(2)
    linear(pool)
    time.sleep(0.01)
    begin_cpu_s, idle_s = time.process_time(), 0.5
    time.sleep(idle_s)
    used_s = time.process_time() - begin_cpu_s
    print(f"cpu time while idle: {1e6 * used_s / idle_s:.0f} us a second")
    assert used_s < 0.02 * idle_s


def test_pools_come_and_go(native: ModuleType, linear) -> None:
    """Workers end with their pool, also when a pool was never used."""
    before = len(os.listdir("/proc/self/task"))
    for used in (True, False) * 10:
        pool = native.Pool(4)
        if used:
            linear(pool)
    del pool
    assert len(os.listdir("/proc/self/task")) <= before


def test_workers_stay_on_their_cpus(native: ModuleType) -> None:
    cpu = sorted(os.sched_getaffinity(0))[-1]
    printed = fresh_process(f"""
caller = os.sched_getaffinity(0)
pool = native.Pool(3, cpus=[{cpu}])
linear(pool)
def pinned():
    workers = [int(task) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    return [task for task in workers if os.sched_getaffinity(task) == {{{cpu}}}]
end = time.monotonic() + 20  # a worker pins itself when it is first scheduled
while len(pinned()) < 2 and time.monotonic() < end:
    time.sleep(0.01)
assert os.sched_getaffinity(0) == caller
print(len(pinned()))
""")
    assert int(printed) == 2


def test_exit_with_a_pool_alive(native: ModuleType) -> None:
    assert fresh_process("pool = native.Pool(3)\nlinear(pool)\nprint('end')").strip() == "end"
