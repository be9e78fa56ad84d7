"""What the cache of the hub's models may serve, and when, against a stand-in server."""

from __future__ import annotations

import pytest
from stand_in_hub import NEW, OLD, PLAIN, REPO, SHARDS, UNWANTED, StandIn, go_offline, names, serve

from echelon.errors import EchelonWarning, ModelNotFound
from echelon.models.hub import resolve

server = pytest.fixture(serve)


def test_a_cached_copy_serves_offline(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, NEW, PLAIN | UNWANTED)
    first = resolve(REPO)
    server.stop()
    go_offline(monkeypatch)

    assert resolve(REPO) == first


def test_a_cached_copy_serves_with_a_warning_when_the_hub_is_gone(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    first = resolve(REPO)
    server.stop()

    with pytest.warns(EchelonWarning, match="bbbbbbbbbbbb.*HF_HUB_OFFLINE=1"):
        assert resolve(REPO) == first


def test_a_cached_copy_serves_with_a_warning_when_the_hub_fails(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    first = resolve(REPO)
    server.broken = True

    with pytest.warns(EchelonWarning, match="did not provide"):
        assert resolve(REPO) == first


@pytest.mark.parametrize("half", [False, True], ids=["nothing", "dangling link"])
@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_copy_does_not_serve(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, lost: str, *, half: bool
) -> None:
    files = {name: data for name, data in PLAIN.items() if name != "tokenizer_config.json"}
    server.add(REPO, NEW, files)
    link = resolve(REPO).path / lost
    (link.resolve() if half else link).unlink()
    go_offline(monkeypatch)

    with pytest.raises(ModelNotFound, match=r"not complete in the cache.*HF_HUB_OFFLINE"):
        resolve(REPO)


def test_offline_with_nothing_cached(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)

    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE forbids"):
        resolve(REPO)
    assert server.asked == []


def test_no_connection_and_nothing_cached(server: StandIn) -> None:
    server.stop()

    with pytest.raises(ModelNotFound, match=r"could not be fetched.*Check the connection"):
        resolve(REPO)


def test_a_commit_pins_the_content(server: StandIn) -> None:
    server.add(REPO, OLD, PLAIN | {"model.safetensors": b"old weights"})
    server.add(REPO, NEW, PLAIN)

    old, new = resolve(REPO, revision=OLD), resolve(REPO)

    assert (old.revision, new.revision) == (OLD, NEW)
    assert (old.path / "model.safetensors").read_bytes() == b"old weights"
    assert (new.path / "model.safetensors").read_bytes() == b"weights"


def test_a_cached_commit_asks_nothing(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    first = resolve(REPO, revision=NEW)
    server.asked.clear()

    assert resolve(REPO, revision=NEW) == first
    assert server.asked == []


def test_a_moved_branch_is_followed(server: StandIn) -> None:
    server.add(REPO, OLD, PLAIN | {"model.safetensors": b"old weights"})
    assert resolve(REPO, revision="main").revision == OLD
    server.add(REPO, NEW, PLAIN)

    found = resolve(REPO, revision="main")

    assert found.revision == NEW
    assert (found.path / "model.safetensors").read_bytes() == b"weights"


def test_a_broken_commit_in_the_cache_is_completed(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    folder = resolve(REPO, revision=NEW).path
    (folder / "model.safetensors").unlink()

    assert resolve(REPO, revision=NEW).path == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_missing_revision_is_not_replaced_by_the_cache(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    server.branches[REPO]["v9"] = NEW
    resolve(REPO, revision="v9")
    del server.branches[REPO]["v9"]

    with pytest.raises(ModelNotFound, match="has no revision 'v9'"):
        resolve(REPO, revision="v9")


def test_shards_are_fetched_and_a_lost_one_is_noticed(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"model.safetensors.index.json": b'{"weight_map": {}}'}
    config = {"config.json": b"{}", "tokenizer.json": b"{ }"}
    server.add(REPO, NEW, config | SHARDS | index)
    folder = resolve(REPO).path
    assert names(folder) == {*config, *SHARDS, *index}
    go_offline(monkeypatch)
    assert resolve(REPO).path == folder

    (folder / next(iter(SHARDS))).unlink()

    with pytest.raises(ModelNotFound, match="not complete"):
        resolve(REPO)
