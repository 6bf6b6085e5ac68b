"""What is deployed: the image's recipe, the composition, the manifest; against each other and against the settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import create_app
from service.settings import Settings
from tests.deploy.recipe import instructions

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]

# Read by the engine or the command, and no settings of the service.
OTHER_VARIABLES = {"SUBPAGE_KERNEL_CACHE", "SUBPAGE_CONFIG"}


FINAL = instructions(DOCKERFILE)[[name for name, _ in instructions(DOCKERFILE)].index("FROM", 1) :]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not published for this platform")
def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_image_is_locked_down() -> None:
    names = [name for name, _ in instructions(DOCKERFILE)]
    assert names.count("FROM") == 2
    last_user = [arguments for name, arguments in FINAL if name == "USER"][-1]
    assert last_user.isdigit() and int(last_user) >= 10000
    assert "pip install" not in DOCKERFILE and "ADD" not in names, "deploy/install.py installs, from the lock"
    assert [name for name, _ in FINAL].index("USER") < next(
        position for position, (_, arguments) in enumerate(FINAL) if "engine.warm" in arguments
    )
    assert any(name == "HEALTHCHECK" and "/livez" in arguments for name, arguments in FINAL)
    for name, arguments in FINAL:
        if name in ("CMD", "ENTRYPOINT"):
            assert arguments.startswith("["), "a shell would not hand signals on"
    for _, arguments in instructions(DOCKERFILE):
        assert not re.search(r"SUBPAGE_TOKEN=|PASSWORD=", arguments), "a secret in a layer is no secret"


def test_base_images_are_pinned_by_digest() -> None:
    """A tag is somebody's to move; what is built here has the image's own name, and its stages theirs."""
    bases = [arguments.split()[0] for name, arguments in instructions(DOCKERFILE) if name == "FROM"]
    pulled = [service["image"] for service in COMPOSE["services"].values() if "build" not in service]
    assert len(bases) == 2 and len(set(bases)) == 1 and pulled
    for image in (*bases, *pulled):
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_what_is_copied_exists_and_is_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name, arguments in instructions(DOCKERFILE):
        if name == "COPY" and "--from=" not in arguments:
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored, source


def variables() -> dict[str, list[str]]:
    image = re.findall(r"(SUBPAGE_[A-Z_]+)=", " ".join(arguments for name, arguments in FINAL if name == "ENV"))
    return {
        "image": image,
        "compose": [name for name in COMPOSE["services"]["subpage"]["environment"] if name.startswith("SUBPAGE_")],
        "kubernetes": [item["name"] for item in CONTAINER["env"]],
    }


@pytest.mark.parametrize("place", ["image", "compose", "kubernetes"])
def test_variables_are_settings(place: str) -> None:
    settings = {f"SUBPAGE_{name.upper()}" for name in Settings.model_fields}
    assert variables()[place] and set(variables()[place]) <= settings | OTHER_VARIABLES


def test_the_composition() -> None:
    subpage: dict[str, Any] = COMPOSE["services"]["subpage"]
    assert subpage["read_only"] is True and subpage["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in subpage["ports"])
    assert subpage["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert "healthcheck" in COMPOSE["services"]["postgres"]
    used = {
        volume.partition(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])
    }
    assert used == set(COMPOSE["volumes"])
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            assert not re.search(r"TOKEN|PASSWORD", name) or value.startswith("${"), "secrets come from outside"
    timeout = int(subpage["environment"]["SUBPAGE_SHUTDOWN_TIMEOUT"])
    assert timeout < int(subpage["stop_grace_period"].removesuffix("s"))


def test_the_manifest() -> None:
    assert DEPLOYMENT["spec"]["replicas"] == 1 and DEPLOYMENT["spec"]["strategy"]["type"] == "Recreate"
    assert POD["securityContext"]["runAsNonRoot"] and str(POD["securityContext"]["runAsUser"]) in DOCKERFILE
    for container in (*POD["initContainers"], CONTAINER):
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] and not locked["allowPrivilegeEscalation"]
        assert locked["capabilities"]["drop"] == ["ALL"] and "memory" in container["resources"]["limits"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"]
    assert SERVICE["spec"]["selector"].items() <= DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    assert SERVICE["spec"]["ports"][0]["targetPort"] in {port["name"] for port in CONTAINER["ports"]}
    given = {item["name"]: item.get("value") for item in CONTAINER["env"]}
    ending = float(given["SUBPAGE_DRAIN_SECONDS"]) + float(given["SUBPAGE_SHUTDOWN_TIMEOUT"])
    assert ending < POD["terminationGracePeriodSeconds"]
    assert all(given[name] is None for name in ("SUBPAGE_TOKEN", "SUBPAGE_STORE")), "secrets come from secrets"


def test_probes_ask_what_needs_no_token() -> None:
    public = {route.path for route in create_app(Settings()).routes if getattr(route, "permission", "") == "public"}
    for kind, path in (("livenessProbe", "/livez"), ("startupProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert CONTAINER[kind]["httpGet"]["path"] == path and path in public
    assert CONTAINER["ports"][0]["containerPort"] == 8000


def test_what_is_written_is_mounted() -> None:
    """The root file system is read-only: each place the image names for writing has a volume."""
    written = {"/tmp", "/var/lib/subpage", "/var/cache/subpage"}
    assert {mount["mountPath"] for mount in CONTAINER["volumeMounts"]} == written
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    subpage = COMPOSE["services"]["subpage"]
    mounted = {volume.split(":")[1] for volume in subpage["volumes"]}
    assert mounted | {place.split(":")[0] for place in subpage["tmpfs"]} == written
    (volumes,) = [arguments for name, arguments in FINAL if name == "VOLUME"]
    assert set(yaml.safe_load(volumes)) | {"/tmp"} == written
