"""The background worker: latest wins, cancellation, errors, closing."""

import threading

import pytest

from ktlab.notebook.worker import Worker


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.close()


def test_runs_off_the_callers_thread(worker):
    where = []
    worker.submit(lambda cancel: where.append(threading.current_thread()))
    assert worker.wait(5)
    assert where and where[0] is not threading.current_thread()


def test_the_latest_request_wins(worker):
    started, shown = threading.Event(), []

    def slow(cancel):
        started.set()
        assert cancel.wait(5)
        worker.publish(cancel, lambda: shown.append("slow"))

    first = worker.submit(slow)
    assert started.wait(5)
    worker.submit(lambda cancel: shown.append("never runs"))
    last = worker.submit(lambda cancel: worker.publish(cancel, lambda: shown.append("last")))
    assert worker.wait(5)
    assert shown == ["last"]
    assert last > first


def test_cancel_stops_what_runs(worker):
    started, told = threading.Event(), []

    def job(cancel):
        started.set()
        told.append(cancel.wait(5))

    worker.submit(job)
    assert started.wait(5) and worker.busy
    worker.cancel()
    assert worker.wait(5) and not worker.busy
    assert told == [True]


def test_errors_and_busy_are_told_and_the_worker_lives_on():
    errors: list[Exception] = []
    busy: list[bool] = []
    done: list[int] = []
    worker = Worker(on_error=errors.append, on_busy=busy.append)

    def fail(cancel):
        raise ValueError("bad text")

    worker.submit(fail)
    assert worker.wait(5)
    worker.submit(lambda cancel: done.append(1))
    assert worker.wait(5)
    assert [str(error) for error in errors] == ["bad text"]
    assert done == [1] and busy == [True, False, True, False]
    worker.close()


def test_the_error_of_a_replaced_job_is_dropped():
    errors: list[Exception] = []
    started = threading.Event()
    worker = Worker(on_error=errors.append)

    def fail_late(cancel):
        started.set()
        cancel.wait(5)
        raise ValueError("nobody asked any more")

    worker.submit(fail_late)
    assert started.wait(5)
    worker.submit(lambda cancel: None)
    assert worker.wait(5)
    assert errors == []
    worker.close()


def test_closing_ends_the_thread_and_refuses_more(worker):
    worker.submit(lambda cancel: cancel.wait(5) and None)
    worker.close()
    worker.close()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(lambda cancel: None)
