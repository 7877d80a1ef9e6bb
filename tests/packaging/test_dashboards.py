"""The dashboard and the alert rules ask for nothing that an agent does not tell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from weightsync.errors import all_errors
from weightsync.state import Phase
from weightsync_server.agent.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "weightsync.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
#: what Prometheus itself puts on every series
SCRAPED = {"job", "instance", "le"}


def series() -> dict[str, set[str]]:
    """Each name that can be asked for, and its labels."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    found: dict[str, set[str]] = {"up": set()}
    for collector in Metrics().registry._collector_to_names:
        (metric,) = collector.describe()
        for suffix in suffixes.get(metric.type, [""]):
            found[metric.name + suffix] = set(collector._labelnames)
    return found


def queries() -> dict[str, str]:
    asked = {rule["alert"]: rule["expr"] for rule in RULES}
    for panel in DASHBOARD["panels"]:
        asked |= {f"{panel['title']} {t['refId']}": t["expr"] for t in panel["targets"]}
    asked |= {
        f"variable {v['name']}": v["query"]["query"]
        for v in DASHBOARD["templating"]["list"]
        if v["type"] == "query"
    }
    return asked


@pytest.mark.parametrize("name", sorted(queries()))
def test_every_series_and_label_that_is_asked_for_exists(name):
    query, known = queries()[name], series()
    names = set(re.findall(r"\b(?:weightsync_\w+|up\b)", query))
    assert names, query
    assert names <= set(known)
    labels = set(SCRAPED).union(*(known[n] for n in names))
    matched = {k for part in re.findall(r"\{([^}]*)\}", query) for k in re.findall(r"(\w+)=", part)}
    grouped = {
        label.strip()
        for part in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
        for label in part.split(",")
    }
    assert matched | grouped <= labels, query
    assert query.count("(") == query.count(")")
    assert query.count("{") == query.count("}")


@pytest.mark.parametrize("name", sorted(queries()))
def test_prometheus_understands_the_query(name):
    promql = pytest.importorskip("promql_parser")
    query = queries()[name]
    if name.startswith("variable"):
        # of Grafana's own: label_values(series, label)
        query = re.fullmatch(r"label_values\((.+), \w+\)", query)[1]
    promql.parse(re.sub(r"\$\w+", "5m", query))


def test_states_outcomes_and_codes_that_are_matched_exist():
    text = " ".join(queries().values())
    states = {s for m in re.findall(r'\bstate=~?"([^"]*)"', text) for s in m.split("|")}
    assert states <= set(get_args(Phase))
    assert {"torn", "detached", "ready"} <= states
    assert set(re.findall(r'\bcode="([^"]*)"', text)) <= {e.code for e in all_errors()}
    told = (DEPLOY.parent / "docs" / "observability.md").read_text()
    (row,) = re.findall(r"^\| `weightsync_pushes_total` .*$", told, flags=re.MULTILINE)
    outcomes = {o for m in re.findall(r'outcome=~"([^"]*)"', text) for o in m.split("|")}
    assert outcomes == {"aborted", "torn", "engine_lost"}, "rolled back by hand is no failure"
    assert all(f"`{outcome}`" in row for outcome in outcomes)


def test_every_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on():
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}
        assert notes["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_dashboard_is_one_that_grafana_can_import():
    panels = DASHBOARD["panels"]
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= set(DASHBOARD)
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not taken & cells, f"{panel['title']} lies on another panel"
        taken |= cells
        assert panel["description"]
        assert panel["targets"]
    variables = {f"${v['name']}" for v in DASHBOARD["templating"]["list"]} | {"$__rate_interval"}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\w+", text)) - {"$__all"} <= variables
    assert re.findall(r"https?://", text) == []
