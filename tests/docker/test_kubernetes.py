"""The example for Kubernetes: what its files name exists, and their numbers fit each other. Schemas: `make check`."""

import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import create_app
from service.settings import GatewaySettings
from tests.docker.test_containers import IMAGES, ROOT
from worker.settings import WorkerSettings

FOLDER = ROOT / "docker/kubernetes"
# Read from the environment where no settings object is yet.
BESIDE_SETTINGS = {"SAFEGRAFT_WORKER_NAME"}
PEPPER = "0123456789abcdef"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


FILES = {path.name: documents(path) for path in sorted(FOLDER.glob("*.yaml"))}
KUSTOMIZATION = FILES.pop("kustomization.yaml")[0]
ALL = [document for found in FILES.values() for document in found]
SCALED_OBJECT = documents(FOLDER / "keda/scaledobject.yaml")[0]


def one(kind: str, name: str) -> dict[str, Any]:
    [found] = [item for item in ALL if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def pod(name: str) -> dict[str, Any]:
    found: dict[str, Any] = one("Deployment", f"safegraft-{name}")["spec"]["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    [found] = pod(name)["containers"]
    return dict(found)


def environment(name: str) -> dict[str, str]:
    """What a pod's container finds, with the example's Secret; later sources win."""
    found: dict[str, str] = {}
    for source in container(name)["envFrom"]:
        if "configMapRef" in source:
            found |= one("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            found |= one("Secret", source["secretRef"]["name"])["stringData"]
    for variable in container(name).get("env", []):
        found[variable["name"]] = variable.get("value", "from the pod")
    return found


def size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": 2**30, "Mi": 2**20}[unit]


def test_the_files_are_those_that_are_applied() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted(set(FILES) - {"secret.example.yaml"})
    readme = (FOLDER / "README.md").read_text()
    for name in FILES:
        assert f"`{name}`" in readme
    kinds = {(item["apiVersion"], item["kind"]) for item in ALL}
    assert kinds == {
        ("v1", "Namespace"), ("v1", "Secret"), ("v1", "ConfigMap"), ("v1", "Service"), ("apps/v1", "Deployment"),
        ("policy/v1", "PodDisruptionBudget"), ("networking.k8s.io/v1", "Ingress"),
        ("networking.k8s.io/v1", "NetworkPolicy"), ("autoscaling/v2", "HorizontalPodAutoscaler"),
    }  # fmt: skip
    for item in [*ALL, SCALED_OBJECT]:
        assert item["metadata"].get("namespace", "safegraft") == "safegraft"
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "safegraft"


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_every_variable_is_a_setting_and_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = GatewaySettings if name == "gateway" else WorkerSettings
    given = {key: value for key, value in environment(name).items() if key.startswith("SAFEGRAFT_")}
    settings = {f"SAFEGRAFT_{field.upper()}" for field in kind.model_fields}
    unknown = set(given) - settings - BESIDE_SETTINGS
    assert not unknown, f"docker/kubernetes gives {name} what is no setting: {sorted(unknown)}"
    worker = "".join(path.read_text() for path in (ROOT / "worker").glob("*.py"))
    assert all(f'"{variable}"' in worker for variable in BESIDE_SETTINGS & set(given))
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    # The example itself starts nothing: its pepper would be known to everybody.
    with pytest.raises(ValueError, match="pepper"):
        kind()
    monkeypatch.setenv("SAFEGRAFT_KEY_PEPPER", PEPPER)
    read = kind()
    assert read.database.startswith("postgresql+psycopg://")
    assert read.storage_url.startswith("s3://")
    assert read.redis_url.startswith("rediss://")
    assert "SAFEGRAFT_DEV" not in given


def test_both_hear_the_same_of_what_they_share() -> None:
    shared = one("ConfigMap", "safegraft")["data"]
    for name in ("SAFEGRAFT_LEASE_SECONDS", "SAFEGRAFT_MAX_ATTEMPTS", "SAFEGRAFT_STORAGE_URL"):
        assert name in shared
    secret = one("Secret", "safegraft")["stringData"]
    assert {"SAFEGRAFT_KEY_PEPPER", "SAFEGRAFT_DATABASE_URL", "SAFEGRAFT_REDIS_URL"} <= set(secret)
    for item in ALL:
        if item["kind"] == "ConfigMap":
            assert not set(item["data"]) & set(secret), "no secret stands in a ConfigMap, none is overruled by one"


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_pods_have_no_rights_and_write_nowhere_but_in_scratch(name: str) -> None:
    assert pod(name)["automountServiceAccountToken"] is False
    assert pod(name)["enableServiceLinks"] is False
    user, _, group = IMAGES[name].all("USER")[-1].partition(":")
    context = pod(name)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (str(context["runAsUser"]), str(context["runAsGroup"]), str(context["fsGroup"])) == (user, group, group)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}
    assert mounts == {"data": IMAGES[name].environment["SAFEGRAFT_DATA"], "tmp": "/tmp"}
    assert {volume["name"] for volume in pod(name)["volumes"] if "emptyDir" in volume} == set(mounts)


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_scratch_fits_into_what_a_pod_may_take(name: str) -> None:
    sizes = {volume["name"]: size(volume["emptyDir"]["sizeLimit"]) for volume in pod(name)["volumes"]}
    limits = container(name)["resources"]["limits"]
    assert sum(sizes.values()) <= size(limits["ephemeral-storage"])
    if name == "gateway":
        data = one("ConfigMap", "safegraft-gateway")["data"]
        arriving = int(data["SAFEGRAFT_MAX_UPLOAD_BYTES"]) * int(data["SAFEGRAFT_MAX_ACTIVE_UPLOADS"])
        assert arriving < sizes["data"]


def test_probes_ask_what_the_gateway_answers() -> None:
    paths = set(create_app(GatewaySettings(dev=True)).openapi()["paths"])
    found = container("gateway")
    [port] = found["ports"]
    assert str(port["containerPort"]) == IMAGES["gateway"].all("EXPOSE")[-1]
    probes = {kind: found[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz?ignore=worker",
    }
    assert {probe["path"].partition("?")[0] for probe in probes.values()} <= paths
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    worker = container("worker")["livenessProbe"]
    assert worker["exec"]["command"] == IMAGES["worker"].healthcheck
    assert worker["timeoutSeconds"] > 10


def test_pods_have_the_time_to_end_what_they_do() -> None:
    seconds = int(environment("worker")["SAFEGRAFT_JOB_SECONDS"])
    assert pod("worker")["terminationGracePeriodSeconds"] >= seconds + 60 + 60  # the hard limit is a minute later
    graceful = int(IMAGES["gateway"].environment["UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN"])
    waits = int(container("gateway")["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod("gateway")["terminationGracePeriodSeconds"] > waits + graceful + 10


def test_each_worker_has_one_gpu_and_nobody_calls_it() -> None:
    assert container("worker")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "ports" not in container("worker")
    assert environment("worker")["SAFEGRAFT_DEVICE"] == "cuda"
    assert [item["metadata"]["name"] for item in ALL if item["kind"] == "Service"] == ["safegraft-gateway"]
    [name] = [item for item in container("worker")["env"] if item["name"] == "SAFEGRAFT_WORKER_NAME"]
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_selectors_find_their_pods() -> None:
    for name in ("gateway", "worker"):
        spec = one("Deployment", f"safegraft-{name}")["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        assert labels["app.kubernetes.io/component"] == name
        policy = one("NetworkPolicy", f"safegraft-{name}")["spec"]
        assert policy["podSelector"]["matchLabels"] == labels
        scaler = one("HorizontalPodAutoscaler", f"safegraft-{name}")["spec"]
        assert scaler["scaleTargetRef"]["name"] == f"safegraft-{name}"
    labels = one("Deployment", "safegraft-gateway")["spec"]["template"]["metadata"]["labels"]
    service = one("Service", "safegraft-gateway")["spec"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] == container("gateway")["ports"][0]["name"]
    assert one("PodDisruptionBudget", "safegraft-gateway")["spec"]["selector"]["matchLabels"] == labels
    assert one("HorizontalPodAutoscaler", "safegraft-gateway")["spec"]["minReplicas"] == 2
    for rule in one("Ingress", "safegraft")["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            assert path["backend"]["service"] == {"name": "safegraft-gateway", "port": {"name": "http"}}
            assert path["path"] in ("/v1", "/docs", "/openapi.json")


def test_workers_reach_database_broker_and_bucket_alone() -> None:
    assert one("NetworkPolicy", "nothing")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    policy = one("NetworkPolicy", "safegraft-worker")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == []
    names, stores = policy["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert {port["port"] for port in stores["ports"]} == {5432, 6379, 443}
    for place in stores["to"]:
        assert ipaddress.ip_network(place["ipBlock"]["cidr"]).is_private
    gateway = one("NetworkPolicy", "safegraft-gateway")["spec"]
    assert gateway["egress"][:2] == policy["egress"]
    for rule in gateway["egress"][2:]:
        for place in rule["to"]:
            whole = ipaddress.ip_network(place["ipBlock"]["cidr"])
            left = [ipaddress.ip_network(text) for text in place["ipBlock"]["except"]]
            assert all(part.subnet_of(whole) for part in left)  # type: ignore[arg-type]
            assert any(ipaddress.ip_address("169.254.169.254") in part for part in left), "a cloud's own address"


def test_images_are_those_of_kustomization() -> None:
    renamed = {image["name"] for image in KUSTOMIZATION["images"]}
    assert {container(name)["image"] for name in ("gateway", "worker")} == renamed


def test_workers_are_scaled_by_the_metric_that_gateways_tell() -> None:
    [metric] = one("HorizontalPodAutoscaler", "safegraft-worker")["spec"]["metrics"]
    name = metric["external"]["metric"]["name"]
    spec = SCALED_OBJECT["spec"]
    assert spec["triggers"][0]["metadata"]["query"] == f"max({name})"
    assert spec["scaleTargetRef"]["name"] == "safegraft-worker"
    assert spec["triggers"][0]["metadata"]["threshold"] == metric["external"]["target"]["value"]
    assert f"`{name}`" in (FOLDER / "README.md").read_text()
    told = ROOT / "service/metrics.py"
    if told.exists():
        assert f'"{name}"' in told.read_text(), f"docker/kubernetes scales by {name}, which no gateway tells"
