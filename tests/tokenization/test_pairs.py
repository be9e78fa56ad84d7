"""Rules of joining a query and a document, against the ``tokenizers`` library itself."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from echelon.tokenization.pairs import Template, TruncationImpossible, encode_pairs, truncate

LIBRARY = Tokenizer(models.WordLevel({"q": 1, "d": 2, "?": 0}, unk_token="?"))
LIBRARY.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

modes = st.sampled_from(["longest_first", "only_second"])
sides = st.sampled_from(["left", "right"])


def library_truncates(query: int, document: int, room: int, mode: str) -> tuple[int, int] | None:
    """Tokens that the library keeps of each text; None where it raises."""
    LIBRARY.enable_truncation(room, strategy=mode)
    try:
        ids = LIBRARY.encode("q " * query, "d " * document).ids
    except Exception as error:
        if "too short" not in str(error):
            raise
        return None
    return ids.count(1), ids.count(2)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60), modes)
@example(10, 10, 5, "longest_first")
@example(3, 50, 4, "only_second")
@example(4, 50, 4, "only_second")
@example(0, 9, 4, "only_second")
def test_truncate_keeps_what_the_library_keeps(query, document, room, mode):
    expected = library_truncates(query, document, room, mode)
    assert truncate(query, document, room, mode) == expected


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 300), modes)
def test_truncate_never_invents_nor_wastes(query, document, room, mode):
    kept = truncate(query, document, room, mode)
    if kept is None:
        assert mode == "only_second"
        assert query >= room
        return
    assert 0 <= kept[0] <= query
    assert 0 <= kept[1] <= document
    assert sum(kept) == min(query + document, room)
    if mode == "only_second" and room:
        assert kept[0] == query


def ids(count: int, first: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


TYPED = Template((1,), (2, 2), (3,), ((0,), 0, (0, 0), 1, (1,)))
UNTYPED = Template((1,), (2, 2), (3,), None)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=6),
    st.integers(4, 40),
    st.randoms(use_true_random=False),
    st.sampled_from([TYPED, UNTYPED]),
    sides,
)
def test_batch_joins_the_chosen_pairs_in_order(sizes, max_length, chance, template, side):
    template = Template(
        template.before, template.between, template.after, template.types, side=side
    )
    queries = [ids(q, 100) for q, _ in sizes]
    documents = [ids(d, 1000) for _, d in sizes]
    encoded = encode_pairs(template, queries, documents, max_length, "longest_first")
    chosen = chance.choices(range(len(sizes)), k=chance.randint(1, 8))
    batch = encoded.batch(chosen)
    assert len(batch) == len(chosen)
    for place, index in enumerate(chosen):
        start, end = batch.offsets[place : place + 2]
        query, document = (
            (part[len(part) - keep :] if side == "left" else part[:keep]).tolist()
            for part, keep in zip(
                (queries[index], documents[index]), encoded.kept[index], strict=True
            )
        )
        assert batch.ids[start:end].tolist() == [1, *query, 2, 2, *document, 3]
        if template.types is None:
            assert batch.type_ids is None
        else:
            expected = [0] * (len(query) + 3) + [1] * (len(document) + 1)
            assert batch.type_ids[start:end].tolist() == expected
    assert batch.lengths.tolist() == [encoded.lengths[i] for i in chosen]
    assert batch.ids.dtype == batch.offsets.dtype == np.int32


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), min_size=1, max_size=6),
    st.integers(4, 70),
    st.integers(4, 70),
    modes,
)
def test_cutting_shorter_later_is_cutting_once(sizes, first, second, mode):
    queries = [ids(q, 100) for q, _ in sizes]
    documents = [ids(d, 1000) for _, d in sizes]

    def cut(limit: int) -> list[list[int]] | int:
        try:
            return encode_pairs(UNTYPED, queries, documents, limit, mode).kept.tolist()
        except TruncationImpossible as error:
            return error.index

    if isinstance(cut(first), int):
        return
    longer = encode_pairs(UNTYPED, queries, documents, first, mode)
    try:
        shorter: list[list[int]] | int = longer.shortened(second, range(len(sizes))).kept.tolist()
    except TruncationImpossible as error:
        shorter = error.index
    assert shorter == cut(second)


def test_shortening_some_pairs_leaves_the_others():
    encoded = encode_pairs(UNTYPED, [ids(20, 100)] * 3, [ids(50, 1000)] * 3, 60, "only_second")
    shorter = encoded.shortened(40, [1])
    assert shorter.kept.tolist() == [[20, 36], [20, 16], [20, 36]]
    assert shorter.lengths.tolist() == [60, 40, 60]
    assert shorter.truncated_tokens.tolist() == [14, 34, 14]


def test_a_pair_that_need_not_be_cut_shorter_may_have_any_query():
    encoded = encode_pairs(UNTYPED, [ids(50, 0), ids(3, 0)], [ids(50, 0)] * 2, 104, "only_second")
    assert encoded.shortened(40, [1]).kept.tolist() == [[50, 50], [3, 33]]
    with pytest.raises(TruncationImpossible) as caught:
        encoded.shortened(40, [0, 1])
    assert (caught.value.index, caught.value.query_tokens, caught.value.room) == (0, 50, 36)


def test_truncated_tokens_count_both_texts():
    encoded = encode_pairs(UNTYPED, [ids(10, 0)] * 2, [ids(30, 0), ids(1, 0)], 20, "longest_first")
    assert encoded.kept.tolist() == [[8, 8], [10, 1]]
    assert encoded.truncated_tokens.tolist() == [24, 0]


def test_no_pairs_are_an_empty_batch():
    encoded = encode_pairs(TYPED, [], [], 20, "longest_first")
    batch = encoded.batch([])
    assert (len(encoded), len(batch), batch.ids.tolist()) == (0, 0, [])
    assert encoded.truncated_tokens.tolist() == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_kept_end_follows_the_side(side: Literal["left", "right"]):
    template = Template((1,), (2,), (3,), None, side=side)
    encoded = encode_pairs(template, [ids(2, 10)], [ids(9, 20)], 8, "only_second")
    document = [26, 27, 28] if side == "left" else [20, 21, 22]
    assert encoded.batch([0]).ids.tolist() == [1, 10, 11, 2, *document, 3]
