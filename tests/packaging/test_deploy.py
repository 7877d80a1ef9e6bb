"""What lies in deploy/ is valid to its own tools, and names what the code has."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from weightsync_server.agent.auth import OPEN_PATHS
from weightsync_server.agent.journal import default_path
from weightsync_server.agent.settings import ENV_PREFIX, AgentSettings, _parser, load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sysconfig.get_path("scripts"))
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SCRIPTS = sorted({*DEPLOY.rglob("*.sbatch"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"})
FILES = [p for p in sorted(DEPLOY.rglob("*")) if p.is_file() and "grafana" not in p.parts]
AGENT_PORT = AgentSettings.model_fields["port"].default
TOKEN = "t" * 32


def tool(name: str) -> str:
    """The program, or the test is skipped."""
    found = BIN / name if (BIN / name).exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return str(found)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d is not None]


# ---------------------------------------------------------------- valid to their own tools


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing_in(path):
    done = run(tool("shellcheck"), path)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_containerfile():
    done = run(tool("hadolint"), DEPLOY / "container" / "Containerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_kubernetes_schemas_hold(path):
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        if document["kind"] != "Kustomization":
            validate.validate(document, "1.37", strict=True)


def test_kustomize_puts_the_fleet_together():
    done = run(tool("kubectl"), "kustomize", DEPLOY / "kubernetes")
    if "unknown command" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr
    kinds = sorted(d["kind"] for d in yaml.safe_load_all(done.stdout))
    assert kinds == ["NetworkPolicy", "Service", "Service", "StatefulSet"]


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_systemd_takes_the_unit(path, tmp_path):
    unit = tmp_path / path.name
    # the program need not be installed here
    unit.write_text(re.sub(r"/opt/weightsync/bin/\S+", "/bin/true", path.read_text()))
    done = run(tool("systemd-analyze"), "verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_agents_unit_is_hardened(tmp_path):
    source = DEPLOY / "systemd" / "weightsync-agent.service"
    unit = tmp_path / source.name
    unit.write_text(source.read_text().replace("/opt/weightsync/bin/weightsync-agent", "/bin/true"))
    done = run(tool("systemd-analyze"), "security", "--offline=true", "--threshold=20", unit)
    if "offline" in done.stderr:
        pytest.skip("this systemd looks at no file")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_compose_is_valid_to_the_compose_specification():
    schema = json.loads((Path(__file__).parent / "compose_spec" / "schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    (made,) = documents(DEPLOY / "container" / "compose.yaml")
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(made)] == []
    made["services"]["agent"]["cap_dropped"] = ["ALL"]
    assert not validator.is_valid(made), "the schema takes anything"


def test_compose_is_taken_by_docker():
    done = run(tool("docker"), "compose", "version")
    if done.returncode:
        pytest.skip("this docker has no compose")
    done = run("docker", "compose", "-f", DEPLOY / "container" / "compose.yaml", "config", "-q")
    assert done.returncode == 0, done.stderr


def test_prometheus_takes_the_alerts():
    done = run(tool("promtool"), "check", "rules", DEPLOY / "prometheus" / "alerts.yaml")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- names that the code has


def test_every_variable_is_one_that_the_code_reads():
    source = "".join(
        p.read_text()
        for top in ("weightsync", "server", "client")
        for p in (ROOT / top).rglob("*.py")
    )
    known = set(re.findall(r"WEIGHTSYNC_[A-Z_]+[A-Z]", source))
    known |= {ENV_PREFIX + name.upper() for name in AgentSettings.model_fields}
    known |= {f"WEIGHTSYNC_{what}_FILE" for what in ("CA", "CERT", "KEY")}
    known -= {ENV_PREFIX + "TOKEN"}
    known |= {"WEIGHTSYNC_AGENTS"}  # of the Slurm script itself, for the user's train.py
    for path in FILES:
        told = set(re.findall(r"WEIGHTSYNC_[A-Z_]*[A-Z]", path.read_text()))
        assert told <= known, path


def test_every_flag_of_the_agent_is_one_that_it_has():
    flags = set(_parser()._option_string_actions)
    commands = []
    for path in FILES:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        commands += re.findall(r"(?<![\w/.-])weightsync-agent (--[^&\n]*)", text)
        commands += re.findall(r"/bin/weightsync-agent (--[^&\n]*)", text)
    assert commands
    for command in commands:
        assert set(re.findall(r"--[a-z-]+", command)) <= flags, command


def test_every_file_that_starts_vllm_gives_it_our_two_options():
    named = [p for p in FILES if "worker-extension-cls" in p.read_text()]
    assert len(named) >= 4
    for path in named:
        text = path.read_text()
        for option in ("worker-extension-cls", "middleware"):
            (dotted,) = re.findall(rf"--{option}[= ]([\w.]+)", text)
            module, _, name = dotted.rpartition(".")
            assert hasattr(importlib.import_module(module), name), dotted


def containers(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    yield from pod.get("containers", [])


def agents() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    found = []
    for path in KUBERNETES:
        for document in documents(path):
            pod = document.get("spec", {}).get("template", {}).get("spec", {})
            found += [
                (path.name, pod, c)
                for c in containers(document)
                if c["image"] == "weightsync-agent"
            ]
    return found


def test_probes_ask_paths_and_ports_that_the_agent_has():
    assert [name for name, *_ in agents()] == ["daemonset.yaml", "engine.yaml"]
    for _, _, agent in agents():
        ports = {p["name"]: p["containerPort"] for p in agent["ports"]}
        asked = {}
        for kind in ("livenessProbe", "readinessProbe"):
            get = agent[kind]["httpGet"]
            assert ports[get["port"]] == AGENT_PORT
            assert get["scheme"] == "HTTPS"
            asked[kind] = get["path"]
        assert asked == {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}
        assert set(asked.values()) <= OPEN_PATHS


def test_volumes_and_ports_that_are_named_are_there():
    for path in KUBERNETES:
        for document in documents(path):
            pod = document.get("spec", {}).get("template", {}).get("spec", {})
            volumes = {v["name"] for v in pod.get("volumes", [])}
            for container in containers(document):
                assert {m["name"] for m in container["volumeMounts"]} <= volumes
                mounts = [m["mountPath"] for m in container["volumeMounts"]]
                for variable in container["env"]:
                    if variable["value"].startswith("/"):
                        assert any(variable["value"].startswith(m + "/") for m in mounts)
    ports = {p["name"] for d in documents(DEPLOY / "kubernetes" / "engine.yaml")
             for c in containers(d) for p in c["ports"]}  # fmt: skip
    services = {
        s["metadata"]["name"]: s for s in documents(DEPLOY / "kubernetes" / "services.yaml")
    }
    assert {p["targetPort"] for s in services.values() for p in s["spec"]["ports"]} == ports
    fleet = services["weightsync-fleet"]["spec"]
    assert fleet["clusterIP"] == "None"
    assert fleet["publishNotReadyAddresses"], (
        "a torn engine's agent is the one that a push must find"
    )
    assert not services["vllm"]["spec"].get("publishNotReadyAddresses")


def test_agents_run_without_rights_and_write_to_their_state_alone():
    for _, pod, agent in agents():
        context = agent["securityContext"]
        assert context["runAsNonRoot"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not pod["automountServiceAccountToken"]
        writable = [m["mountPath"] for m in agent["volumeMounts"] if not m.get("readOnly")]
        assert writable == ["/var/lib/weightsync"]


def environments() -> dict[str, dict[str, str]]:
    """What the agent is told in each kind of deployment."""
    made = {name: {e["name"]: e["value"] for e in a["env"]} for name, _, a in agents()}
    compose = documents(DEPLOY / "container" / "compose.yaml")[0]["services"]["agent"]
    made["compose.yaml"] = compose["environment"]
    containerfile = (DEPLOY / "container" / "Containerfile").read_text()
    image = dict(re.findall(r"(WEIGHTSYNC_\w+)=(\S+)", containerfile))
    made = {name: image | env for name, env in made.items()}
    env = (DEPLOY / "systemd" / "agent.env").read_text()
    made["agent.env"] = dict(re.findall(r"^(\w+)=(.*)$", env, flags=re.MULTILINE))
    return made


@pytest.mark.parametrize("name", ["daemonset.yaml", "engine.yaml", "compose.yaml", "agent.env"])
def test_an_agent_would_start_with_the_settings_of(name, tmp_path):
    env = environments()[name]
    token = tmp_path / "token"
    token.write_text(TOKEN)
    assert env["WEIGHTSYNC_AGENT_TOKEN_FILE"].endswith("agent.token")
    settings = load_settings([], env | {"WEIGHTSYNC_AGENT_TOKEN_FILE": str(token)})
    assert settings.engine_url == ("http://127.0.0.1:8000",)
    assert (settings.host, settings.port) == ("0.0.0.0", AGENT_PORT)
    assert settings.tls_cert is not None
    assert "WEIGHTSYNC_ENGINE_SECRET_FILE" in env


def test_journals_lie_where_agents_may_write():
    containerfile = (DEPLOY / "container" / "Containerfile").read_text()
    unit = (DEPLOY / "systemd" / "weightsync-agent.service").read_text()
    assert "XDG_STATE_HOME=/var/lib " in containerfile
    assert "Environment=XDG_STATE_HOME=%S\nStateDirectory=weightsync\n" in unit
    journal = default_path(("http://127.0.0.1:8000",), {"XDG_STATE_HOME": "/var/lib"})
    assert journal.parent == Path("/var/lib/weightsync")
    for _, _, agent in agents():
        assert "/var/lib/weightsync" in [m["mountPath"] for m in agent["volumeMounts"]]


def test_compose_names_the_secrets_and_images_that_it_makes():
    made = documents(DEPLOY / "container" / "compose.yaml")[0]
    containerfile = (DEPLOY / "container" / "Containerfile").read_text()
    for service in made["services"].values():
        assert set(service["secrets"]) <= set(made["secrets"])
        assert f" AS {service['build']['target']}\n" in containerfile
        root = DEPLOY / "container" / service["build"]["context"]
        assert (root / service["build"]["dockerfile"]).is_file()
        for value in service["environment"].values():
            if value.startswith("/run/secrets/"):
                assert value.removeprefix("/run/secrets/") in service["secrets"]


# ---------------------------------------------------------------- the agent's image


def test_images_are_pinned_and_the_agent_is_nobody():
    text = (DEPLOY / "container" / "Containerfile").read_text()
    for image in re.findall(r"^ARG \w+_IMAGE=(\S+)$", text, flags=re.MULTILINE):
        assert re.search(r":v?\d+\.\d+\.\d+[\w.-]*$", image), image
    agent = text.partition(" AS agent\n")[2].partition("\nFROM ")[0]
    assert re.search(r"^USER 65532:65532$", agent, flags=re.MULTILINE)
    assert "HEALTHCHECK" in agent
    assert f"EXPOSE {AGENT_PORT}\n" in agent
    for source in re.findall(r"^COPY (?!--)(.+) \S+$", text, flags=re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source


def pinned(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    return dict(line.lower().split("==") for line in lines)


def test_the_images_packages_are_those_of_the_constraints_and_want_no_others():
    agent = pinned(ROOT / "requirements" / "agent.txt")
    constraints = pinned(ROOT / "requirements" / "constraints.txt")
    constraints = {re.sub(r"[-_.]+", "-", name): version for name, version in constraints.items()}
    assert agent == {name: constraints[name] for name in agent}
    for name in agent:
        for text in importlib.metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert re.sub(r"[-_.]+", "-", wanted.name).lower() in agent, f"{name}: {text}"


def test_the_agent_runs_with_nothing_but_what_its_image_has():
    owners = importlib.metadata.packages_distributions()
    agent = pinned(ROOT / "requirements" / "agent.txt")
    lacking = {
        module
        for module, names in owners.items()
        if not {n.lower().replace("_", "-") for n in names} & {*agent, "weightsync"}
    }
    script = f"""
import sys
lacking = {sorted(lacking)!r}
class Image:
    def find_spec(self, name, path=None, target=None):
        if path is None and name in lacking:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Image())
from weightsync_server.agent.app import Agent
from weightsync_server.agent.cli import AgentServer
from weightsync_server.agent.settings import AgentSettings
agent = Agent(AgentSettings(engine_url="http://127.0.0.1:9"), "s" * 20)
AgentServer(agent).config.load()
assert agent.app.openapi()
"""
    roots = ":".join(str(ROOT / folder) for folder in (".", "server", "client"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False,
        env={"PYTHONPATH": roots},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
