"""Signals: answered at once by the main thread, twice cancels the host kernels, handlers come back."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from kjax import _ext, checkpoint
from kjax.interrupt import Cancelled, Interrupts

pytestmark = pytest.mark.plain_xla


def wait_until(condition):
    while not condition():
        time.sleep(0.005)


def test_the_first_signal_is_answered_while_the_work_goes_on():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said, finish = [], threading.Event()

    def acknowledge(number):
        said.append((number, threading.current_thread() is threading.main_thread()))
        finish.set()

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        finish.wait()  # only the answer to the signal ends it
        return threading.current_thread() is threading.main_thread()

    with Interrupts(acknowledge) as interrupts:
        assert interrupts.requested is None
        assert interrupts.call(work) is False
        assert interrupts.requested == signal.SIGTERM and said == [(1, True)]
        assert interrupts.call(lambda: 7) == 7, "what is left to do, saving, still works"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_signal_cancels_the_host_kernels_until_the_end():
    said, asked = [], threading.Event()
    real, states = _ext.cancel, []

    def work():
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: said == [1])
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: said == [1, 2])
        asked.set()
        raise RuntimeError("cancelled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ext, "cancel", lambda on: (states.append(on), real(on)))
        with pytest.raises(Cancelled), Interrupts(said.append) as interrupts:
            interrupts.call(work)
    assert asked.is_set() and states == [True, False]


def test_after_the_third_signal_nothing_is_waited_for(monkeypatch):
    said, never, states = [], threading.Event(), []
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    monkeypatch.setattr(_ext, "cancel", states.append)

    def work():
        for count in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda count=count: len(said) == min(count + 1, 2))
        never.wait()

    with pytest.raises(KeyboardInterrupt), Interrupts(said.append) as interrupts:
        interrupts.call(work)
    assert signal.getsignal(signal.SIGINT) is before
    assert states == [True], "the work that nobody waits for must not go on"
    never.set()
    wait_until(lambda: states == [True, False])


def test_errors_keep_their_kind_and_origin():
    def fail():
        raise KeyError("where")

    with Interrupts(print) as interrupts:
        with pytest.raises(KeyError, match="where") as caught:
            interrupts.call(fail)
        assert caught.traceback[-1].name == "fail"
        assert interrupts.call(lambda: "goes on") == "goes on"


def test_outside_of_the_main_thread_there_are_no_handlers():
    before = signal.getsignal(signal.SIGINT)
    results: queue.Queue = queue.Queue()

    def use():
        with Interrupts(print) as interrupts:
            results.put((interrupts.call(threading.current_thread), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert results.get() == (thread, before)


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny
from kjax import _ext
from kjax.train import train
original = _ext.forward
def slow(*args):  # stands for experts that take their time
    print("experts at work", flush=True)
    time.sleep(0.3)
    return original(*args)
_ext.forward = slow
run = train(tiny.settings(Path({workshop!r}), train__steps=50, train__save_steps=2, data__val_size=0.0,
                          model__transport="pure_callback"))
print("status", run.status, flush=True)
sys.exit(run.exit_code)
"""


def test_ctrl_c_twice_stops_in_the_middle_of_a_step(tmp_path):
    tiny.settings(tmp_path)
    program = PROGRAM.format(tests=os.path.dirname(__file__), workshop=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as run:
        lines = []

        def read_until(start):
            for line in run.stdout:
                lines.append(line.strip())
                if line.startswith(start):
                    return
            raise AssertionError(f"ended without {start!r}: {lines}\n{run.stderr.read()}")

        read_until("saved step 2")
        read_until("experts at work")  # of step 3: a signal between two steps would start none
        run.send_signal(signal.SIGINT)
        read_until("finishing step 3/50, about")
        run.send_signal(signal.SIGINT)
        read_until("stopping now: step 3/50 is lost. The state of step 2 is in")
        read_until("status cancelled")
        assert run.wait(timeout=60) == 130
    assert not any(line.startswith("step 3/50") for line in lines)
    assert checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", 2).latest()[0] == 2
