"""Workloads: the same seed gives the same traffic, and the traffic is what was asked for."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.cli.flags import parse_trace
from echelon.errors import InvalidInput
from echelon.simulation.workload import (
    ArrivalRecord,
    ConstantArrivals,
    FixedSize,
    LognormalSize,
    ObservedSize,
    PoissonArrivals,
    ReplayedArrivals,
    UniformSize,
    Workload,
    sizes_of,
)

seeds = st.integers(0, 2**32)
rates = st.floats(0.01, 10_000)
counts = st.integers(1, 60)
sizes = st.one_of(
    st.builds(FixedSize, counts),
    st.tuples(counts, counts).map(sorted).map(lambda pair: UniformSize(*pair)),
    st.builds(LognormalSize, st.floats(1, 500), st.floats(0, 2), st.integers(1, 512)),
    st.lists(counts, min_size=1, max_size=9).map(ObservedSize),
)
records = st.lists(
    st.tuples(st.floats(-1e9, 1e9), counts, st.none() | st.integers(1, 512)), min_size=1
).map(lambda rows: [ArrivalRecord(*row) for row in sorted(rows, key=lambda row: row[0])])
arrivals = (
    st.builds(PoissonArrivals, rates)
    | st.builds(ConstantArrivals, rates)
    | st.builds(ReplayedArrivals, records)
)
workloads = st.builds(Workload, arrivals, sizes, st.none() | sizes, seeds)


def generator(seed=0):
    return np.random.default_rng(seed)


@given(workloads)
def test_the_same_workload_gives_the_same_requests(workload):
    first, second = (list(islice(workload.requests(), 50)) for _ in range(2))
    assert first == second
    assert first


@given(workloads)
def test_times_never_go_down_and_lengths_belong_to_documents(workload):
    requests = list(islice(workload.requests(), 50))
    assert requests[0].at_s >= 0
    assert all(a.at_s <= b.at_s for a, b in pairwise(requests))
    for request in requests:
        assert request.documents >= 1
        assert len(request.lengths) in {0, request.documents}
        assert all(length >= 1 for length in request.lengths)
    if workload.tokens is not None:
        assert all(request.lengths for request in requests)


@given(st.builds(Workload, arrivals, sizes, sizes, seeds), st.floats(0.001, 5))
def test_a_duration_cuts_and_changes_nothing_before(workload, duration_s):
    cut = list(islice(workload.requests(duration_s), 200))
    assert all(request.at_s < duration_s for request in cut)
    whole = list(islice(workload.requests(), len(cut) + 1))
    assert whole[: len(cut)] == cut
    if len(cut) < min(200, len(whole)):
        assert whole[len(cut)].at_s >= duration_s


@given(rates, sizes, sizes, sizes, seeds)
def test_other_documents_or_lengths_do_not_move_the_arrivals(rate, one, other, tokens, seed):
    times = [
        [r.at_s for r in islice(Workload(PoissonArrivals(rate), d, t, seed).requests(), 30)]
        for d, t in ((one, None), (other, None), (other, tokens))
    ]
    assert times[0] == times[1] == times[2]


@given(sizes, seeds, st.integers(0, 40))
def test_sizes_are_positive_and_as_many_as_asked(drawn_from, seed, count):
    drawn = drawn_from.draw(generator(seed), count)
    assert len(drawn) == count
    assert all(isinstance(number, int) and number >= 1 for number in drawn)


def test_ranges_reach_both_ends_and_nothing_else():
    assert set(UniformSize(3, 6).draw(generator(), 500)) == {3, 4, 5, 6}
    assert FixedSize(7).draw(generator(), 3) == [7, 7, 7]
    assert set(ObservedSize([2, 2, 9]).draw(generator(), 200)) == {2, 9}


def test_observed_numbers_keep_their_shares():
    drawn = ObservedSize([1, 1, 1, 5]).draw(generator(), 4000)
    assert np.mean(drawn) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("sigma", [0.3, 0.8])
def test_the_lognormal_has_the_mean_that_is_named(sigma):
    drawn = np.array(LognormalSize(120, sigma, 10**6).draw(generator(), 20_000))
    assert drawn.mean() == pytest.approx(120, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(sigma, rel=0.05)


def test_the_lognormal_is_cut_at_its_maximum():
    drawn = LognormalSize(120, 1.0, 200).draw(generator(), 1000)
    assert max(drawn) == 200
    assert LognormalSize(120, 0, 512).draw(generator(), 3) == [120, 120, 120]


def test_poisson_has_its_rate_and_the_spread_of_chance():
    times = [
        r.at_s for r in islice(Workload(PoissonArrivals(50.0), FixedSize(1)).requests(), 20_000)
    ]
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


@given(rates)
def test_constant_does_not_drift(rate):
    number = 3_001
    late = next(islice(Workload(ConstantArrivals(rate), FixedSize(1)).requests(), number, None))
    assert late.at_s == number / rate


def test_a_long_stream_needs_no_memory():
    stream = Workload(
        PoissonArrivals(1000.0), UniformSize(5, 50), LognormalSize(100, 0.5, 512)
    ).requests()
    next(stream)
    tracemalloc.start()
    for _ in islice(stream, 5000):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18


@given(records, st.floats(0.1, 10))
def test_a_replay_keeps_what_was_recorded(recorded, speed):
    requests = list(Workload(ReplayedArrivals(recorded, speed), FixedSize(3), None).requests())
    assert [r.documents for r in requests] == [k.documents for k in recorded]
    assert [r.lengths for r in requests] == [
        () if k.tokens is None else (k.tokens,) * k.documents for k in recorded
    ]
    for request, known in zip(requests, recorded, strict=True):
        assert request.at_s == pytest.approx((known.at_s - recorded[0].at_s) / speed)


@given(records, st.booleans())
def test_a_trace_that_was_written_is_read_back(recorded, lengths_too):
    columns = 3 if lengths_too else 2
    lines = [",".join(["timestamp", "documents", "tokens"][:columns])]
    lines += [
        ",".join([repr(k.at_s), str(k.documents), str(k.tokens or 1)][:columns]) for k in recorded
    ]
    expected = [
        ArrivalRecord(k.at_s, k.documents, (k.tokens or 1) if lengths_too else None)
        for k in recorded
    ]
    assert list(parse_trace(lines)) == expected


def test_a_trace_may_come_from_a_spreadsheet():
    lines = ["\ufeffDocuments, Timestamp ,host\r\n", '"3",17.5,"a, b"\r\n', "\r\n", "4,18,c\r\n"]
    assert list(parse_trace(lines)) == [ArrivalRecord(17.5, 3), ArrivalRecord(18.0, 4)]


def test_a_trace_is_read_as_it_is_needed():
    endless = itertools.chain(["timestamp,documents"], (f"{i},2" for i in itertools.count()))
    assert next(parse_trace(endless)) == ArrivalRecord(0.0, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 names no column 'timestamp'"),
        ("0.5,3\n1,4", "line 1 names no column 'timestamp'"),
        ("timestamp,tokens\n0,3", "line 1 names no column 'documents'"),
        ("timestamp,documents,documents\n0,3,4", "line 1 names 'documents' twice"),
        ("timestamp,documents\n", "there is no request in it"),
        ("timestamp,documents\n0,3\nsoon,3", "line 3, column timestamp: 'soon'"),
        ("timestamp,documents\n0,3\nnan,3", "line 3, column timestamp: 'nan'"),
        ("timestamp,documents\n5,3\n4,3", "line 3, column timestamp: 4.0 is before 5.0"),
        ("timestamp,documents\n0,0", "line 2, column documents: '0'"),
        ("timestamp,documents\n0,-1", "line 2, column documents: '-1'"),
        ("timestamp,documents\n0,5000000000", "line 2, column documents: '5000000000'"),
        ("timestamp,documents\n0,2.5", "line 2, column documents: '2.5'"),
        ("timestamp,documents\n0", "line 2, column documents: ''"),
        ("timestamp,documents,tokens\n0,2,", "line 2, column tokens: ''"),
        ('timestamp,documents\n0,"2', "line 2: unexpected end of data"),
    ],
)
def test_a_wrong_trace_names_line_and_column(text, words):
    with pytest.raises(InvalidInput) as raised:
        list(parse_trace(text.splitlines(keepends=True)))
    assert str(raised.value).startswith(f"trace: {words}")
    assert "A trace is CSV with a header" in str(raised.value)


def test_sizes_as_people_write_them():
    assert sizes_of("10", "--documents") == FixedSize(10)
    assert sizes_of(" 5-50 ", "--documents") == UniformSize(5, 50)


@pytest.mark.parametrize("text", ["", "ten", "0", "-3", "5-", "5-2", "0-4", "1.5", "1-2-3"])
def test_sizes_that_are_none_name_the_option(text):
    with pytest.raises(InvalidInput, match=r"--documents: .* Give one such as 10 or 5-50"):
        sizes_of(text, "--documents")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: PoissonArrivals(0), "rate"),
        (lambda: PoissonArrivals(math.nan), "rate"),
        (lambda: ConstantArrivals(math.inf), "rate"),
        (lambda: ReplayedArrivals([], 0), "speed"),
        (lambda: FixedSize(0), "value"),
        (lambda: UniformSize(0, 3), "low"),
        (lambda: UniformSize(4, 3), "high"),
        (lambda: LognormalSize(0.5, 1, 9), "mean"),
        (lambda: LognormalSize(9, -1, 9), "sigma"),
        (lambda: LognormalSize(9, 1, 0), "maximum"),
        (lambda: ObservedSize([]), "values"),
        (lambda: ObservedSize([3, 0]), "values"),
    ],
)
def test_what_cannot_be_is_refused(make, field):
    with pytest.raises(InvalidInput) as raised:
        make()
    assert raised.value.field == field
