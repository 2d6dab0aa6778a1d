"""Edges from reads and writes, priorities, and the refusal of contradictions."""

import pytest

from aspec.errors import GraphError
from aspec.tasks.graph import Graph
from aspec.tasks.op import Op
from aspec.tasks.task import Access, Resource, Task

A, B, FREE = Resource("a", 1, domain="device"), Resource("b", 1, domain="device"), Resource("disk", 2)


def task(number, resource="a", reads=(), writes=(), priority=0):
    return Task(
        number,
        Op.LAYER,
        resource,
        priority,
        tuple(Access(*r.split("=")) for r in reads),
        tuple(Access(*w.split("=")) for w in writes),
    )


def graph_of(*tasks):
    graph = Graph([A, B, FREE])
    for t in tasks:
        graph.add(t)
    return graph


def test_read_after_write_waits_for_completion_across_domains():
    graph = graph_of(task(0, "disk", writes=["slot=1"]), task(1, "a", reads=["slot=1"]))
    read = graph.pop("disk")
    assert graph.pop("a") is None
    graph.issue(read)
    assert graph.pop("a") is None, "issue is not enough: the disk is in no domain"
    graph.complete(read)
    assert graph.pop("a").id == 1


def test_inside_a_domain_issue_is_enough_and_the_order_is_reported():
    graph = graph_of(task(0, "a", writes=["h=1"]), task(1, "b", reads=["h=1"]))
    first = graph.pop("a")
    assert graph.pop("b") is None
    assert graph.issue(first) == ()
    second = graph.pop("b")
    assert graph.issue(second) == (0,), "the backend must order the second behind the first"


def test_write_after_read_waits_for_every_reader():
    graph = graph_of(
        task(0, "disk", writes=["slot=1"]),
        task(1, "a", reads=["slot=1"]),
        task(2, "b", reads=["slot=1"]),
        task(3, "disk", writes=["slot=2"]),
    )
    graph.complete(_issue(graph, "disk"))
    first, second = _issue(graph, "a"), _issue(graph, "b")
    graph.complete(first)
    assert graph.pop("disk") is None, "one reader is still at work"
    graph.complete(second)
    assert graph.pop("disk").id == 3


def test_write_after_write_keeps_program_order():
    graph = graph_of(task(0, "disk", writes=["x=1"]), task(1, "disk", writes=["x=2"]))
    first = _issue(graph, "disk")
    assert graph.pop("disk") is None
    graph.complete(first)
    assert graph.pop("disk").id == 1


def test_a_slot_reused_too_early_is_refused():
    graph = graph_of(task(0, "disk", writes=["slot=load 0"]), task(1, "disk", writes=["slot=load 2"]))
    with pytest.raises(GraphError, match="expects 'load 0' in slot, which holds 'load 2'"):
        graph.add(task(2, "a", reads=["slot=load 0"]))


def test_ids_must_grow_and_resources_exist():
    graph = graph_of(task(1))
    with pytest.raises(GraphError):
        graph.add(task(1))
    with pytest.raises(GraphError):
        graph.add(task(2, "nowhere"))


def test_the_smallest_priority_runs_first_then_program_order():
    graph = graph_of(task(0, priority=5), task(1, priority=1), task(2, priority=1))
    assert [graph.pop("a").id for _ in range(3)] == [1, 2, 0]
    assert graph.pop("a") is None


def test_blocked_tells_why():
    graph = graph_of(task(0, "disk", writes=["slot=1"]), task(1, "a", reads=["slot=1"]))
    assert any("waits for" in line for line in graph.blocked())


def _issue(graph, resource):
    found = graph.pop(resource)
    graph.issue(found)
    return found
