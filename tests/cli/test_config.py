"""Options and the profile that fills in what they leave open."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from helpers import offer
from hypothesis import given
from hypothesis import strategies as st

from echelon import EchelonWarning, InvalidInput, ProfileError, Reranker
from echelon.models.base import DeviceOutOfMemory
from echelon.options import Options
from echelon.profile import (
    SCHEMA,
    Profile,
    ProfileKey,
    TunedSettings,
    apply_profile,
    library_versions,
)

COUNTS = ["max_length", "max_query_tokens", "token_budget", "batch_size", "threads"]


# Options


def test_the_names_of_options_are_pinned():
    assert [field.name for field in fields(Options)] == [
        "device",
        "precision",
        "max_length",
        "truncation",
        "max_query_tokens",
        "token_budget",
        "batch_size",
        "threads",
        "profile",
        "revision",
        "label",
        "instruction",
        "allow",
        "score_cache",
        "progress",
    ]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, True, False, 1.5, "8", [8], float("inf")])
def test_counts_are_positive_whole_numbers(name, value):
    with pytest.raises(InvalidInput, match="is not a positive whole number") as caught:
        Options.of(**{name: value})
    assert (caught.value.field, caught.value.remedy) == (name, "Give 1 or more.")


@pytest.mark.parametrize("name", COUNTS)
@given(value=st.none() | st.integers(1, 10**9))
def test_counts_that_are_right(name, value):
    assert getattr(Options.of(**{name: value}), name) == value


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:17"])
def test_devices(device):
    assert Options.of(device=device).device == device


@pytest.mark.parametrize(
    "device", ["gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:٣", "", None, 0, ["cpu"]]
)
def test_unknown_devices(device):
    with pytest.raises(InvalidInput, match=r"Use auto, cpu, cuda, cuda:N or mps\."):
        Options.of(device=device)


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("precision", "fp4", "auto, fp32, bf16, fp16"),
        ("precision", None, "auto, fp32, bf16, fp16"),
        ("precision", ["fp32"], "auto, fp32, bf16, fp16"),
        ("truncation", "only_first", "longest_first, only_second"),
        ("truncation", True, "longest_first, only_second"),
        ("allow", "batch", "precision, max_length"),
        ("allow", ["precision", 3], "precision, max_length"),
        ("allow", 5, "precision, max_length"),
        ("allow", None, "precision, max_length"),
    ],
)
def test_choices(name, value, choices):
    with pytest.raises(InvalidInput, match=f"Use {choices}") as caught:
        Options.of(**{name: value})
    assert caught.value.field == name


def test_allow_is_always_a_tuple():
    assert Options.of(allow="precision").allow == ("precision",)
    assert Options.of(allow=["max_length", "precision"]).allow == ("max_length", "precision")
    assert Options().allow == ()


@pytest.mark.parametrize(("name", "value"), [("profile", 3), ("revision", 3), ("revision", b"a")])
def test_paths_and_revisions(name, value):
    with pytest.raises(InvalidInput) as caught:
        Options.of(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batchsize", "Did you mean 'batch_size'?"),
        ("dtype", "Known: device, precision"),
        ("max_len", "Did you mean 'max_length'?"),
        ("token_budgets", "Did you mean 'token_budget'?"),
    ],
)
def test_unknown_options(name, hint):
    with pytest.raises(InvalidInput, match="unknown option") as caught:
        Options.of(**{name: 1})
    assert caught.value.field == name
    assert caught.value.remedy.startswith(hint)


def test_options_cannot_change():
    with pytest.raises(AttributeError):
        Options().batch_size = 3


def test_options_are_plain_data():
    plain = Options.of(profile=Path("p.json"), allow="precision").as_dict()
    assert plain["profile"] == "p.json"
    assert json.loads(json.dumps(plain))["allow"] == ["precision"]


# Profiles


EPYC = ProfileKey("m", "r", "cpu", "AMD EPYC", "int8", {}, ["avx512_vnni", "avx2"], 48, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"features": None, "cores": None, "usable_cpus": None}, ""),
        (
            {"device_name": "Intel Core", "features": ["avx2"], "cores": 4},
            (
                "the machine was AMD EPYC with AVX-512 VNNI, AVX2 and 48 physical cores, is Intel "
                "Core with AVX2 only and 4 physical cores"
            ),
        ),
        (
            {"usable_cpus": 2},
            "the machine was AMD EPYC with 8 usable CPUs, is AMD EPYC with 2 usable CPUs",
        ),
        (
            {"features": ["amx_int8", "avx2"]},
            "the machine was AMD EPYC with AVX-512 VNNI, AVX2, is AMD EPYC with AMX int8, AVX2",
        ),
    ],
)
def test_a_profile_knows_its_machine(changes, words):
    """What one side does not know, as profiles of older versions, is no difference."""
    assert "; ".join(EPYC.differences(replace(EPYC, **changes))) == words
    assert bool(replace(EPYC, **changes).differences(EPYC)) == bool(words)


def test_a_profile_serves_any_card_of_its_kind():
    measured = ProfileKey("m", "r", "cuda:0", "NVIDIA H200", "fp16", {})
    assert measured.differences(replace(measured, device="cuda:1")) == []
    assert measured.differences(replace(measured, device="cpu")) == [
        "the device was cuda:0, is cpu"
    ]
    other = replace(measured, device="cuda:1", device_name="Tesla T4")
    assert measured.differences(other) == ["the machine was NVIDIA H200, is Tesla T4"]


def test_a_profile_of_an_older_version_is_read(fresh):
    content = json.loads(fresh.read_text())
    for name in ("features", "cores", "usable_cpus"):
        del content["key"][name]
    assert Profile.from_dict(content, fresh).key.features is None


def test_a_precision_that_is_not_there_gives_way_to_one_that_passed(bert, fresh, monkeypatch):
    """The machine had int8 and this one does not: the fastest that passed is used."""
    content = json.loads(fresh.read_text())
    rows = [{"precision": name, "passed": True} for name in ("fp32", "bf16", "int8")]
    content |= {"precisions": rows, "settings": content["settings"] | {"precision": "int8"}}
    offer(monkeypatch, "fp32", "bf16")
    for rows[1]["passed"], used in ((True, "bf16"), (False, "fp32")):
        fresh.write_text(json.dumps(content))
        with pytest.warns(EchelonWarning) as caught:
            assert Reranker(bert, profile=fresh).facts.precision == used
        fallback, machine = (str(warning.message) for warning in caught)
        assert "the precision was" not in machine
        assert fallback == (
            f"{fresh} chooses int8, but this machine has no fast int8. {used} is used. "
            "Run `echelon tune` again to measure this machine."
        )


def test_a_precision_that_the_user_asks_for_is_never_replaced(bert, fresh, monkeypatch):
    monkeypatch.setenv("ECHELON_CPU", "avx2")
    with pytest.raises(InvalidInput, match="no int8 instructions"):
        Reranker(bert, device="cpu", profile=fresh, precision="int8")


def profile_for(reranker: Reranker, **settings) -> Profile:
    facts = reranker.facts
    return Profile(
        key=ProfileKey(
            reranker.model.name,
            reranker.model.revision,
            facts.device,
            facts.device_name,
            facts.precision,
            library_versions(),
        ),
        settings=TunedSettings(
            **{
                "precision": "fp32",
                "token_budget": 333,
                "batch_size": None,
                "threads": 1,
                "max_length": 77,
                **settings,
            }
        ),
        created="2026-01-01T00:00:00Z",
    )


@pytest.fixture
def fresh(bert, tmp_path):
    """A profile file that fits the toy BERT on this machine."""
    with Reranker(bert, device="cpu", precision="fp32", threads=1) as reranker:
        profile_for(reranker).save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_a_fresh_profile_fills_in_what_is_open(bert, fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reranker = Reranker(bert, device="cpu", profile=fresh)
    assert (reranker.token_budget, reranker.max_length) == (333, 77)
    assert (reranker.facts.precision, reranker.facts.threads) == ("fp32", 1)


def test_the_users_own_options_win(bert, fresh):
    reranker = Reranker(bert, device="cpu", profile=str(fresh), token_budget=500, max_length=50)
    assert (reranker.token_budget, reranker.max_length) == (500, 50)
    by_pairs = Reranker(bert, device="cpu", profile=fresh, batch_size=3)
    assert by_pairs.options.token_budget is None
    assert by_pairs.options.batch_size == 3


@pytest.mark.parametrize(("learned", "budget"), [(None, 333), (50, 50), (9999, 333)])
def test_a_learned_budget_only_lowers_the_profiles_budget(bert, fresh, learned, budget):
    content = json.loads(fresh.read_text())
    profile = Profile.from_dict({**content, "learned_token_budget": learned}, fresh)
    assert apply_profile(Options(), profile).token_budget == budget


def test_memory_pressure_is_written_into_the_profile(bert, fresh, monkeypatch):
    reranker = Reranker(bert, device="cpu", profile=fresh)
    score = reranker._engine._scorer.score

    def small(batch):
        if batch.lengths.sum() > 60:
            raise DeviceOutOfMemory("planned")
        return score(batch)

    monkeypatch.setattr(reranker._engine._scorer, "score", small)
    reranker.score([("rain", f"window {i}") for i in range(30)])
    learned = Profile.load(fresh).learned_token_budget
    assert learned == reranker.token_budget <= 60
    assert Reranker(bert, device="cpu", profile=fresh).token_budget == learned


def test_a_profile_that_cannot_be_kept_is_a_warning(bert, fresh, monkeypatch):
    reranker = Reranker(bert, device="cpu", profile=fresh)
    score = reranker._engine._scorer.score

    def small(batch):
        if len(batch) > 1:
            raise DeviceOutOfMemory("planned")
        return score(batch)

    monkeypatch.setattr(reranker._engine._scorer, "score", small)
    fresh.unlink()
    with pytest.warns(EchelonWarning, match="could not be stored"):
        assert len(reranker.score([("rain", "window"), ("rain", "tea")])) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "another"}, "model was another, is bert"),
        ({"revision": "abc"}, "revision was abc"),
        ({"device": "cuda:0"}, "device was cuda:0, is cpu"),
        ({"device_name": "abacus"}, "was measured on abacus; this machine is "),
        ({"usable_cpus": 3000}, "with 3000 usable CPUs; this machine is .* usable CPUs"),
        ({"precision": "bf16"}, "precision was bf16, is fp32"),
        ({"versions": {"torch": "0.1"}}, "torch was 0.1, is "),
    ],
)
def test_a_stale_profile_is_a_warning_with_the_remedy(bert, fresh, changes, words):
    content = json.loads(fresh.read_text())
    content["key"] |= changes
    fresh.write_text(json.dumps(content))
    with pytest.warns(EchelonWarning, match=words) as caught:
        reranker = Reranker(bert, device="cpu", profile=fresh)
    assert "echelon tune" in str(caught[0].message)
    assert str(fresh) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert reranker.token_budget == 333


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "not an Echelon profile"),
        ("{}", "not an Echelon profile"),
        ('{"schema": 99}', "profile version 99, this Echelon reads 1"),
        ('{"schema": "1"}', "profile version '1'"),
        ('{"schema": 1}', "incomplete profile"),
        ('{"schema": 1, "key": {}, "settings": {}}', "incomplete profile"),
        ('{"schema": 1, "key": [], "settings": 3}', "incomplete profile"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_damaged_profile(bert, tmp_path, content, words):
    file = tmp_path / "profile.json"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ProfileError, match=words) as caught:
        Reranker(bert, profile=file)
    assert "echelon tune" in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": "many"},
        {"precision": "fp9"},
        {"threads": 0},
        {"batch_size": -3},
        {"max_length": 1.5},
    ],
)
def test_a_profile_with_wrong_settings(bert, fresh, settings):
    content = json.loads(fresh.read_text())
    content["settings"] |= settings
    fresh.write_text(json.dumps(content))
    with pytest.raises((ProfileError, InvalidInput), match=next(iter(settings))):
        Reranker(bert, device="cpu", profile=fresh)


def test_no_such_profile(bert, tmp_path):
    with pytest.raises(ProfileError, match=r"no such profile\. Make one with `echelon tune"):
        Reranker(bert, profile=tmp_path / "none.json")


def test_a_folder_is_no_profile(bert, tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        Reranker(bert, profile=tmp_path)


def test_a_profile_survives_the_round_trip(fresh):
    profile = Profile.load(fresh)
    assert Profile.from_dict(profile.as_dict(), fresh) == profile
    assert json.loads(fresh.read_text())["schema"] == SCHEMA
    assert asdict(profile)["settings"]["token_budget"] == 333
