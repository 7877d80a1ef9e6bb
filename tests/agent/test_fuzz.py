"""schemathesis against a running agent: its OpenAPI is true, and nothing sent to it breaks it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from weightsync.errors import all_errors

TOKEN = "token-" + "t" * 26
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
#: an endless answer
LEFT_OUT = {"/events"}
EXAMPLES = 8
BUDGET_S = 30.0
CODES = {e.code for e in all_errors()} - {"weightsync_error"}


def fuzz(url: str, mode: GenerationMode) -> Counter[int]:
    """Call everything; the statuses that came back."""
    description = requests.get(f"{url}/openapi.json", headers=HEADERS, timeout=5).json()
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=url)
    statuses: Counter[int] = Counter()
    deadline = time.monotonic() + BUDGET_S
    checks = [response_schema_conformance, status_code_conformance, content_type_conformance]
    if mode is GenerationMode.NEGATIVE:
        checks.append(negative_data_rejection)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in LEFT_OUT or (mode is GenerationMode.NEGATIVE and not operation.body):
            continue

        @with_seed(20260727)
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case) -> None:
            if time.monotonic() > deadline:
                return
            response = case.call(headers=HEADERS, timeout=10)
            statuses[response.status_code] += 1
            if response.status_code >= 500:  # the engine's fault, told as such; never a bug of ours
                assert response.json()["code"] in CODES, response.text
            case.validate_response(response, checks=checks)

        call()
    return statuses


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
async def test_an_agent_answers_whatever_comes_as_its_openapi_says(make_agent, engine, mode):
    agent = await make_agent(engine.url, token=TOKEN)
    statuses = await asyncio.to_thread(fuzz, agent.url, mode)
    assert 500 not in statuses
    assert statuses.total() > 50
    assert (await agent.http.get("/healthz")).status_code == 200
    assert (await agent.status())["state"] in {"ready", "paused"}
