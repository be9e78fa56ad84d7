"""The score cache over HTTP: told to callers, counted, charged to no key, and a setting."""

from __future__ import annotations

import httpx
import pytest
from served import ASKED, DOCUMENTS, MODEL, QUERY, Live, metric, run_app

from echelon.engine.score_cache import ENTRY_BYTES, ScoreCache
from echelon.errors import InvalidInput
from echelon.server.auth import Access, read_keys
from echelon.server.dashboard import dashboard_data
from echelon.server.settings import complete, split


def cache(entries=100):
    return ScoreCache(entries * ENTRY_BYTES)


async def rank(client, documents=DOCUMENTS, **more):
    body = {"query": QUERY, "documents": documents, "explain": True, **more}
    answer = await client.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_an_answer_tells_how_many_scores_were_cached():
    async def main(client, context):
        first = await rank(client)
        again = await rank(client, [*DOCUMENTS, "another"])
        assert first.json()["echelon"]["cached_documents"] == 0
        assert again.json()["echelon"]["cached_documents"] == len(DOCUMENTS)
        whole = await rank(client)
        assert whole.json()["results"] == first.json()["results"]
        assert whole.json()["echelon"]["batch_sizes"] == []
        assert whole.headers["X-Echelon-Tokens"] == first.headers["X-Echelon-Tokens"]
        assert whole.headers["X-Echelon-Batch-Size"] == "0"

    run_app(main, cache=cache())


def test_metrics_and_dashboard_count_hits_misses_and_memory():
    async def main(client, context):
        for _ in range(3):
            await rank(client)
        documents = len(DOCUMENTS)
        assert metric(context, "echelon_score_cache_hits_total") == 2 * documents
        assert metric(context, "echelon_score_cache_misses_total") == documents
        assert metric(context, "echelon_score_cache_entries") == documents
        assert metric(context, "echelon_score_cache_bytes") == documents * ENTRY_BYTES
        assert metric(context, "echelon_score_cache_max_bytes") == 100 * ENTRY_BYTES
        assert metric(context, "echelon_documents_total") == 3 * documents
        counts = context.stats._slices[-1].counts + context.stats._slices[0].counts
        assert counts["cache", "misses"] in {documents, 2 * documents}
        assert counts["cache", "hits"] >= 2 * documents
        assert dashboard_data(context.stats.view(), "m", None, None)["model"] == "m"

    run_app(main, cache=cache(), slice_s=60.0)


def test_without_a_cache_nothing_is_sought():
    async def main(client, context):
        for _ in range(2):
            assert (await rank(client)).json()["echelon"]["cached_documents"] == 0
        assert metric(context, "echelon_score_cache_misses_total") == 0
        assert metric(context, "echelon_score_cache_max_bytes") == 0

    run_app(main)


def test_cached_documents_are_charged_to_no_key(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-secret-key name=shop rate=1/h burst=10\n")
    keys.chmod(0o600)

    async def main(client, context):
        client.headers["X-Api-Key"] = "a-secret-key"
        for _ in range(5):
            await rank(client)  # five documents: half of what the key may send
        await rank(client, [f"other {i}" for i in range(5)])
        refused = await client.post("/v1/rerank", json=ASKED | {"documents": ["and one"]})
        assert refused.status_code == 429

    run_app(main, access=Access(read_keys(str(keys), None)), cache=cache())


@pytest.mark.parametrize(
    ("given", "size"),
    [("64MB", 64_000_000), ("1 GiB", 2**30), ("0", 0), (5000, 5000), ("1.5kb", 1500)],
)
def test_the_setting_is_a_size(given, size):
    _, options = split({**settings(), "score_cache": given})
    assert options.score_cache_bytes == size


@pytest.mark.parametrize("given", ["64", "many", "-1MB", "1TBs", 5, True, 0.5])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(InvalidInput, match=r"score_cache: .*Give (one|a size) such as 256MB, or 0"):
        split({**settings(), "score_cache": given})


def settings():
    values = complete({})
    for name in ("ray", "max_workers", "worker_cpus", "worker_gpus", "max_delay_s", "ingresses"):
        values.pop(name, None)
    return values


def test_a_server_caches_64_megabytes_by_default():
    assert split(settings())[1].score_cache_bytes == 64_000_000


def test_serve_caches_unless_told_otherwise(bert):
    for flags, found in (([], 5), (["--score-cache", "0"], 0)):
        with Live(bert, *MODEL, *flags) as live:
            url, body = f"{live.url}/v1/rerank", ASKED | {"explain": True}
            told = [httpx.post(url, json=body).json()["echelon"] for _ in range(2)]
            assert [answer["cached_documents"] for answer in told] == [0, found]
