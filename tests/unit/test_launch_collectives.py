"""What times of all-reduces say about ranks and groups; planted times, without a network."""

from __future__ import annotations

from megatron_emo.launch.collectives import GroupTime, summarise


def world(*milliseconds):
    ranks = list(range(len(milliseconds)))
    return [[GroupTime("world", ranks, value)] for value in milliseconds]


def test_a_rank_that_waits_least_is_the_slow_one():
    report = summarise(world(51.0, 50.0, 1.0, 52.0))
    assert report.slow_ranks == [2]
    assert report.lines == [
        "world (4 ranks): 1.00 ms",
        "slowest rank 2: others in its world group waited 51.0 ms, which stands out",
    ]


def test_even_times_accuse_nobody_and_still_name_the_slowest():
    report = summarise(world(1.2, 1.0, 1.1))
    assert report.slow_ranks == []
    assert report.lines[-1] == "slowest rank 1: others in its world group waited 0.2 ms"


def test_differences_below_a_millisecond_are_no_news():
    assert summarise(world(0.1, 0.9)).slow_ranks == []


def test_a_slow_link_is_seen_as_a_slow_group():
    times = []
    for rank in range(6):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        times.append([GroupTime("tp", pair, 40.0 if pair == [2, 3] else 1.0)])
    report = summarise(times)
    assert report.slow_ranks == [2, 3]
    assert report.lines[0] == (
        "tp (3 groups of 2): median 1.00 ms, slowest ranks 2-3: 40.00 ms, which stands out"
    )
