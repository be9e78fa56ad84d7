"""Rates: a token bucket that keeps its promises, and key files that say what each key may have."""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import ASKED, metric, run_app

from echelon.errors import InvalidInput, RateLimited, Unauthorised
from echelon.scheduling.admission import AdmissionLimits
from echelon.server.auth import Access, Keys, RateLimit, TokenBucket, limit_of, read_keys
from echelon.server.protocols import PROTOCOLS
from echelon.server.routes import retry_after

limits = st.builds(RateLimit, st.floats(0.01, 1000), st.integers(1, 500).map(float))
comings = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 2000)), min_size=1, max_size=60)


def let_in(bucket, documents, now) -> float | None:
    """None, or how long to wait."""
    try:
        bucket.take(documents, now)
    except RateLimited as refused:
        return refused.retry_after_s
    return None


@given(limits, comings)
def test_never_more_than_burst_and_rate_and_one_request_beyond(limit, comings):
    bucket, now, taken = TokenBucket(limit), 0.0, []
    for pause, documents in comings:
        now += pause
        if let_in(bucket, documents, now) is None:
            taken.append((now, documents))
    for first, (since, _) in enumerate(taken):
        for last in range(first, len(taken)):
            until, final = taken[last]
            total = sum(documents for _, documents in taken[first : last + 1])
            beyond = max(0.0, final - limit.burst)
            allowed = limit.burst + limit.rate * (until - since) + beyond
            assert total <= allowed * (1 + 1e-9) + 1e-6


@given(limits, comings)
def test_a_request_is_admitted_after_its_retry_after_and_not_before(limit, comings):
    bucket, now = TokenBucket(limit), 0.0
    for pause, documents in comings:
        now += pause
        wait = let_in(bucket, documents, now)
        if wait is None:
            continue
        assert 0 < wait < math.inf
        early = let_in(bucket, documents, now + wait * 0.9)
        assert early == pytest.approx(wait * 0.1, rel=1e-6, abs=1e-6)
        now += int(retry_after(wait))
        assert let_in(bucket, documents, now) is None


@given(limits, st.integers(1, 2000))
def test_a_request_larger_than_the_burst_is_admitted(limit, documents):
    bucket = TokenBucket(limit)
    assert let_in(bucket, documents, 0.0) is None
    owed = documents - limit.burst + min(documents, limit.burst)
    wait = let_in(bucket, documents, 0.0) or 0.0
    assert wait == pytest.approx(max(0.0, owed / limit.rate), rel=1e-6, abs=1e-9)


@given(limits, st.floats(0, 100), st.floats(0, 100))
def test_a_clock_that_stands_still_or_goes_back_gives_nothing(limit, then, before):
    bucket = TokenBucket(limit)
    assert let_in(bucket, int(limit.burst), then) is None
    assert let_in(bucket, 1, min(before, then)) == pytest.approx(1 / limit.rate, rel=1e-6)


def test_what_is_given_back_can_be_taken_again():
    bucket = TokenBucket(RateLimit(1.0, 10.0))
    assert let_in(bucket, 30, 0.0) is None
    bucket.give_back(30)
    assert let_in(bucket, 10, 0.0) is None
    bucket.give_back(1000)
    assert let_in(bucket, 10, 0.0) is None
    assert let_in(bucket, 1, 0.0) is not None


@pytest.mark.parametrize(
    ("words", "rate", "burst"),
    [
        (("50/s",), 50, 50),
        (("0.5/s",), 0.5, 1),
        (("900/min",), 15, 15),
        (("7200/h", "300"), 2, 300),
    ],
)
def test_rates_as_they_are_written(words, rate, burst):
    limit = limit_of("rate", *words)
    assert (limit, str(limit)) == (RateLimit(rate, burst), words[0])


@pytest.mark.parametrize(
    "words", [("50",), ("0/s",), ("-1/s",), ("x/s",), ("5/d",), ("5/s", "0"), ("5/s", "x")]
)
def test_texts_that_are_no_rate(words):
    with pytest.raises(InvalidInput, match="--rate-limit"):
        limit_of("--rate-limit", *words)


# Key files.


def keys_of(tmp_path, *lines, rate=None) -> Keys:
    (tmp_path / "keys").write_text("\n".join(lines), "utf-8")
    return read_keys(tmp_path / "keys", rate)


def of(keys, key):
    return keys.authenticate({"authorization": f"Bearer {key}"})


def test_names_and_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHELON_API_KEYS", "from-outside")
    keys = keys_of(
        tmp_path,
        "# ours",
        "aaa name=shop rate=50/s burst=200  # the web shop",
        "bbb  rate=none",
        "ccc name=team.b",
        "old name=twice rate=3/s",
        "new name=twice rate=3/s",
        rate="10/s",
    )
    assert len(keys) == 6
    assert (of(keys, "aaa").name, of(keys, "aaa").bucket.limit) == ("shop", RateLimit(50, 200))
    assert (of(keys, "bbb").name, of(keys, "bbb").bucket) == ("line-3", None)
    assert (of(keys, "ccc").name, of(keys, "ccc").bucket.limit) == ("team.b", RateLimit(10, 10))
    assert of(keys, "from-outside").name == "env-1"
    assert of(keys, "old") is of(keys, "new")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("secret extra", "line 1: the words after the key are not understood"),
        ("secret name=a name=b", "line 1: the words after the key are not understood"),
        ("secret name=", "line 1: the words after the key are not understood"),
        ("secret colour=red", "line 1: the words after the key are not understood"),
        ("secret name=a/b", "line 1: the name is not allowed"),
        ("secret rate=fast", "line 1: 'fast' is no rate"),
        ("secret burst=5", "a burst without a rate"),
        ("secret rate=none burst=5", "a burst without a rate"),
        ("secret name=a rate=1/s\nother name=a", "name a have different limits"),
        ("secret name=a\nother name=a rate=1/s", "name a have different limits"),
        ("name=secret", "line 1: has no key"),
        ("# ours\n\nrate=5/s secret", "line 3: has no key"),
        ("first\nsecret,other", "line 2: the key has characters that are not allowed"),
        ('"secret"', "line 1: the key has characters that are not allowed"),
        ("sécret", "line 1: the key has characters that are not allowed"),
        ("secret\x00", "line 1: the key has characters that are not allowed"),
        ("secret\x7f", "line 1: the key has characters that are not allowed"),
        ("a\u2028secret", "line 1: the words after the key are not understood"),
        ("a\nsecret\nb\nsecret", "line-2 and line-4 are the same key"),
        ("secret name=a\nsecret name=b", "a and b are the same key"),
        ("# nothing but secrets", "the file holds no key"),
    ],
)
def test_lines_that_are_wrong_are_named_without_the_key(tmp_path, line, words):
    with pytest.raises(InvalidInput) as caught:
        keys_of(tmp_path, line)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_comment_begins_after_a_space_and_never_within_a_key(tmp_path):
    keys = keys_of(tmp_path, "beta#key-222 name=a\t# ours", "# é", "c# #d", "#e", "f  #", "g#")
    assert [of(keys, key).name for key in ("beta#key-222", "c#", "f", "g#")] == [
        "a",
        "line-3",
        "line-5",
        "line-6",
    ]
    for part in ("beta", "#e", "c", "g"):
        with pytest.raises(Unauthorised):
            of(keys, part)


def test_files_of_other_systems(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfaaa name=a\r\nbbb\r\n")  # a byte-order mark, and CR LF
    keys = read_keys(file)
    assert (of(keys, "aaa").name, of(keys, "bbb").name) == ("a", "line-2")
    for content, line in ((b"aaa\nb\xe9b", 2), ("aaa\n".encode("utf-16"), 1)):
        file.write_bytes(content)
        with pytest.raises(InvalidInput, match=f"--api-keys: line {line}: is no text in UTF-8"):
            read_keys(file)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (",", "holds no key"),
        ("a, name=secret", "key 2: has no key"),
        ("sécret", "key 1: the key has"),
        ("a,secret\nb", "key 2: the key has"),
        ("\udcffsecret", "key 1: the key has"),
        ("secret,a,secret", "env-1 and env-3 are the same key"),
    ],
)
def test_keys_of_the_environment_are_checked_alike(monkeypatch, value, words):
    monkeypatch.setenv("ECHELON_API_KEYS", value)
    with pytest.raises(InvalidInput) as caught:
        read_keys(None)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("secret", ["sk-secret-123", "sk-secret" * 99, "sk-secret\0", "-----BEGIN"])
def test_a_key_in_place_of_the_file_is_not_shown(secret):
    with pytest.raises(InvalidInput, match=r"--api-keys: cannot be read \(") as caught:
        read_keys(secret)
    assert secret[:9] not in str(caught.value)
    assert "ECHELON_API_KEYS" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no file modes here")
def test_key_files_that_others_may_read_are_warned_about(tmp_path, caplog, monkeypatch):
    def warned(mode, owner=None):
        caplog.clear()
        monkeypatch.setattr(os, "geteuid", lambda: owner)
        file.chmod(mode)
        read_keys(file)
        assert "aaa" not in caplog.text
        return [(r.levelname, r.getMessage().partition(" the API")[0][-8:]) for r in caplog.records]

    file = tmp_path / "keys"
    file.write_text("aaa\n", "utf-8")
    owner = file.stat().st_uid
    for mode in (0o600, 0o400, 0o700):
        assert warned(mode, owner) == []
    for mode in (0o640, 0o604, 0o444):
        assert warned(mode, owner) == [("WARNING", "may read")]
    for mode in (0o620, 0o602, 0o666):
        assert warned(mode, owner) == [("ERROR", "d change")]
    if owner == 0:  # mounted for a server that is not root
        assert warned(0o440, 10001) == []
        assert warned(0o444, 10001) == [("WARNING", "may read")]
        assert warned(0o660, 10001) == [("ERROR", "d change")]


def test_a_key_is_never_shown(tmp_path):
    assert "aaa" not in repr(vars(keys_of(tmp_path, "aaa name=shop rate=5/s")))


# Over HTTP.


def test_each_key_has_its_own_limit_in_every_protocol(tmp_path):
    keys = keys_of(tmp_path, "aaa name=slow rate=1/h burst=5", "bbb name=fast rate=9000/s")

    async def main(client, server):
        slow, fast = ({"Authorization": f"Bearer {key}"} for key in ("aaa", "bbb"))
        assert (await client.post("/v1/rerank", json=ASKED, headers=slow)).status_code == 200
        for protocol in PROTOCOLS:
            path = protocol.own_paths[0]
            body = dict(protocol.example)
            refused = await client.post(path, json=body, headers=slow)
            assert refused.status_code == 429, protocol.name
            assert 3500 < int(refused.headers["Retry-After"]) <= 3600
            assert "The key's limit of 1/h documents is used up" in refused.text
            assert (await client.post(path, json=body, headers=fast)).status_code == 200
        assert metric(server, 'echelon_rate_limited_total{key="slow"}') == len(PROTOCOLS)
        assert metric(server, 'echelon_rate_limited_total{key="fast"}') == 0
        assert metric(server, 'echelon_key_documents_total{key="slow"}') == 5
        assert metric(server, 'echelon_key_documents_total{key="fast"}') >= 2 * len(PROTOCOLS)
        assert "aaa" not in server.metrics.text().decode()

    run_app(main, access=Access(keys))


def test_what_is_refused_unread_costs_nothing(tmp_path):
    keys = keys_of(tmp_path, "aaa rate=1/h burst=5")

    async def main(client, server):
        headers = {"Authorization": "aaa"}
        wrong = {**ASKED, "max_tokens_per_doc": -5}
        refused = await client.post("/v1/rerank", json=wrong, headers=headers)
        assert refused.status_code == 422
        many = {**ASKED, "documents": ["d"] * 7}
        refused = await client.post("/v1/rerank", json=many, headers=headers)
        assert refused.status_code == 413
        assert (await client.post("/v1/rerank", json=ASKED, headers=headers)).status_code == 200
        refused = await client.post("/v1/rerank", json=ASKED, headers=headers)
        assert refused.status_code == 429
        unread = await client.post("/v1/rerank", content=b"{", headers=headers)
        assert unread.status_code == 429  # before the body is looked at

    run_app(main, access=Access(keys), bounds=AdmissionLimits(max_documents=6))


def test_what_was_tokenised_costs_also_if_it_is_refused(tmp_path):
    keys = keys_of(tmp_path, "aaa rate=1/h burst=10")

    async def main(client, server):
        long = {"query": "q", "texts": ["d" * 600] * 5, "truncate": False}
        statuses = [
            (await client.post("/rerank", json=long, headers={"Authorization": "aaa"})).status_code
            for _ in range(4)
        ]
        assert statuses == [422, 422, 429, 429]

    run_app(main, access=Access(keys))


def test_without_keys_all_clients_share_the_limit():
    keys = Keys(common=limit_of("--rate-limit", "1/h", "5"))

    async def main(client, server):
        assert (await client.post("/v1/rerank", json=ASKED)).status_code == 200
        assert (await client.post("/v1/rerank", json=ASKED)).status_code == 429
        assert metric(server, 'echelon_rate_limited_total{key="anybody"}') == 1
        assert server.stats._slices[-1].counts["limited", "requests"] == 1

    run_app(main, access=Access(keys))
