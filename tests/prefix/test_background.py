"""Work in the background: bounded, in order, and left alone at the end."""

import threading

import pytest

from kvcache.prefix.background import Background
from kvcache.prefix.costs import CostGate
from kvcache.stores import Deadline

from .. import peek

LATER = Deadline.after(600)


def test_jobs_run_in_their_order():
    queue, done = Background(1, 10), []
    for number in range(5):
        assert queue.submit(lambda number=number: done.append(number), 1)
    assert queue.drain(LATER)
    assert done == list(range(5))
    queue.stop()


def test_what_exceeds_the_limit_is_refused():
    queue, opened = Background(1, 10), threading.Event()
    assert queue.submit(opened.wait, 6)
    assert not queue.has_room(5)
    assert not queue.submit(pytest.fail, 5)
    assert queue.submit(int, 4)
    assert not queue.drain(Deadline.after(0))
    opened.set()
    assert queue.drain(LATER)
    assert queue.has_room(10)
    queue.stop()


def test_a_job_that_hangs_holds_up_no_others():
    queue, opened, ran = Background(2, 10), threading.Event(), threading.Event()
    assert queue.submit(opened.wait, 1)
    assert queue.submit(ran.set, 1)
    assert ran.wait(600)
    opened.set()
    queue.stop()


def test_what_is_queued_is_done_after_the_stop():
    queue, opened, done = Background(1, 10), threading.Event(), []
    queue.submit(opened.wait, 1)
    queue.submit(lambda: done.append(1), 1)
    queue.stop()
    assert not queue.submit(pytest.fail, 1)
    opened.set()
    assert queue.drain(LATER)
    assert done == [1]


def test_idle_threads_end_with_the_stop():
    queue, both = Background(2, 10), threading.Barrier(3)
    before = set(threading.enumerate())
    for _ in range(2):
        assert queue.submit(both.wait, 1)
    both.wait(600)
    assert queue.drain(LATER)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    queue.stop()
    for worker in workers:
        worker.join(600)
        assert not worker.is_alive()


def test_threads_end_however_often_they_are_stopped():
    """Closed by its user, and stopped again when it is dropped: no thread looks on for ever."""
    queue, opened, both = Background(2, 10), threading.Event(), threading.Barrier(3)
    before = set(threading.enumerate())
    done = []
    for _ in range(2):
        assert queue.submit(lambda: (both.wait(600), opened.wait(600)), 1)
    both.wait(600)
    threads = set(threading.enumerate()) - before
    queue.stop()
    peek.jobs_of(queue).put((lambda: done.append(1), 0))  # of a call that had seen no stop yet
    queue.stop()
    queue.stop()
    opened.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert done == [1]


def test_a_thread_serves_one_job_after_the_other():
    queue, names = Background(4, 10), set()
    for _ in range(5):
        assert queue.submit(lambda: names.add(threading.current_thread().name), 1)
        assert queue.drain(LATER)
    assert len(names) == 1
    queue.stop()


def test_what_is_not_measured_is_tried():
    gate = CostGate()
    assert gate.pays(1, 1000, 1)
    gate.note_transfer(100, 1e9)
    assert gate.pays(1, 1000, 1)
    assert gate.pages_within(0.0, 7) == 7
    gate.note_computed(10, 1.0)
    gate.note_sizes(100, state=False)
    assert not gate.pays(1, 1000, 0)
    assert gate.pays(1, 1000, 1), "the size of a state is not known"
    assert gate.pages_within(1e9, 7) == 1
    assert gate.costs.bytes_per_second == pytest.approx(1e-7)


def test_the_speed_of_a_store_is_measured_again():
    gate = CostGate()
    gate.note_transfer(100, 1e9)
    gate.note_computed(10, 1.0)
    gate.note_sizes(100, state=False)
    assert not gate.pays(1, 1, 0)
    peek.make_older(gate, 31)
    assert gate.pays(1, 1, 0)
