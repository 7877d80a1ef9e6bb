"""docs/runbook.md tells what to do at each alarm, and what it tells is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from weightsync.errors import all_errors
from weightsync_client.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]


def test_every_alarm_has_a_section_and_every_section_an_alarm():
    assert list(SECTIONS) == [alert["alert"] for alert in alerts()]


@pytest.mark.parametrize("alert", alerts(), ids=lambda a: a["alert"])
def test_the_section_says_what_it_means_how_to_see_it_what_to_do_and_whom_to_wake(alert):
    section = SECTIONS[alert["alert"]]
    assert re.findall(r"^\*\*([\w ]+)\.?\*\*", section, flags=re.MULTILINE) == [
        "Means", "See", "Do", "Wake somebody",
    ]  # fmt: skip
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert page == "docs/runbook.md"
    assert anchor == alert["alert"].lower()


def test_the_codes_in_it_are_those_of_the_error_tree():
    codes = {e.code for e in all_errors()}
    rows = re.findall(r"^\| (`.*?`) \|", TEXT, flags=re.MULTILINE)
    told = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}
    assert len(told) > 10
    assert told <= codes


def test_the_metrics_in_it_are_those_of_the_agent():
    observability = (ROOT / "docs" / "observability.md").read_text()
    for metric in set(re.findall(r"`(weightsync_[a-z_]+)`", TEXT)):
        assert f"`{metric}`" in observability, metric


def test_the_commands_in_it_are_those_of_the_command_line():
    commands = set(vars(typer.main.get_command(app))["commands"])
    named = set(re.findall(r"`weightsync ([a-z]+)[` ]", TEXT))
    assert len(named) >= 5
    assert named <= commands
