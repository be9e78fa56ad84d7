"""Every documented route answers as the description says, whatever is sent (schemathesis)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import KEY, MODEL, Live

from echelon.server.openapi import describe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXCLUDED = [positive_data_acceptance, not_a_server_error]
"""A body of the right form may break a rule that OpenAPI cannot say: one of three fields, lists of
the same length. And 504 is the true answer to a time limit of a microsecond."""

EXAMPLES = 12
"""Requests of a route and kind; as the seed is fixed, they are the same in every run."""

ROUTES = {
    operation.label: operation
    for operation in (
        found.ok() for found in schemathesis.openapi.from_dict(describe()).get_all_operations()
    )
}
FIXED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(bert: Path) -> Iterator[Live]:
    with Live(bert, *MODEL, ECHELON_API_KEYS=KEY) as live:
        yield live


POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(route, POSITIVE) for route in ROUTES]
CASES += [(route, NEGATIVE) for route in ROUTES if route.startswith("POST")]  # GET has no input


@pytest.mark.parametrize(("route", "mode"), CASES)
def test_a_route_does_what_its_description_says(server, route, mode):
    @FIXED
    @given(case=ROUTES[route].as_strategy(generation_mode=mode))
    def check(case):
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = case.call_and_validate(
            base_url=server.url, headers=headers, timeout=60, excluded_checks=EXCLUDED
        )
        assert answer.status_code < 500 or answer.status_code == 504

    check()
