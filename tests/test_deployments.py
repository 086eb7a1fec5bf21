"""The manifests for Kubernetes and the script for Slurm: valid, and their numbers and commands fit together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.snippets import parsed

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = sorted((ROOT / "examples/kubernetes").glob("*.yaml"))
KUBERNETES = "1.32"  # from which on pods have the label apps.kubernetes.io/pod-index for certain
TORCHRUN_KILLS_AFTER_S = 30


def objects_of(manifest: Path) -> dict[str, dict[str, Any]]:
    """The objects of a manifest as "kind/name"."""
    found = list(yaml.safe_load_all(manifest.read_text()))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def ranks_of(options: Any) -> int:
    return int(options.ulysses_degree * options.ring_degree * options.cfg_parallel_size * options.data_parallel_size)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_follow_the_schemas_of_kubernetes(manifest: Path) -> None:
    for name, one in objects_of(manifest).items():
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
        assert name.startswith(("Secret/", "Service/", "PersistentVolumeClaim/", "Deployment/", "StatefulSet/"))


def test_a_misspelt_field_is_found() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"slector": {"app": "a"}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_the_parts_of_a_manifest_fit_together(manifest: Path) -> None:
    objects = objects_of(manifest)
    [workload] = [one for name, one in objects.items() if name.startswith(("Deployment/", "StatefulSet/"))]
    spec = workload["spec"]["template"]["spec"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    [container] = spec["containers"]
    assert workload["spec"]["selector"]["matchLabels"] == labels

    options = parsed(served_by(container["command"]))
    assert options is not None
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert ranks_of(options) == workload["spec"]["replicas"] * gpus
    assert options.drain_timeout < spec["terminationGracePeriodSeconds"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": options.port}
    assert objects["Service/omni-sp"]["spec"]["ports"][0]["targetPort"] == "http"

    claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
    for volume in spec["volumes"]:
        claims.add(volume["name"])
        if "persistentVolumeClaim" in volume:
            assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in objects
    assert {mount["name"] for mount in container["volumeMounts"]} == claims
    [key] = [mount for mount in container["volumeMounts"] if mount["name"] == "key"]
    [secret] = [volume["secret"]["secretName"] for volume in spec["volumes"] if volume["name"] == "key"]
    files = {f"{key['mountPath']}/{name}" for name in objects[f"Secret/{secret}"]["stringData"]}
    assert files == {str(options.api_key_file)}


def served_by(command: list[str]) -> list[str]:
    """The command of the server itself, as its own parser reads it."""
    if command[0] != "torchrun":
        return command
    return ["torchrun", *command[command.index("-m") :]]


def test_the_pods_of_several_machines_find_each_other() -> None:
    objects = objects_of(ROOT / "examples/kubernetes/several-machines.yaml")
    pods = objects["StatefulSet/omni-sp"]["spec"]
    [container] = pods["template"]["spec"]["containers"]
    words = dict(word.removeprefix("--").split("=", 1) for word in container["command"] if word.startswith("--"))
    assert int(words["nnodes"]) == pods["replicas"]
    assert words["nproc-per-node"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert float(words["drain-timeout"]) < TORCHRUN_KILLS_AFTER_S
    assert words["node-rank"] == "$(POD_INDEX)"
    assert "POD_INDEX" in {variable["name"] for variable in container["env"]}
    # Its pods have names in the headless service, also before they are ready; all start at once.
    names = objects[f"Service/{pods['serviceName']}"]["spec"]
    assert words["master-addr"] == f"omni-sp-0.{pods['serviceName']}"
    assert names["clusterIP"] == "None"
    assert names["publishNotReadyAddresses"] is True
    assert names["selector"].items() <= pods["template"]["metadata"]["labels"].items()
    assert pods["podManagementPolicy"] == "Parallel"
    assert objects["Service/omni-sp"]["spec"]["selector"] == {"statefulset.kubernetes.io/pod-name": "omni-sp-0"}


def test_the_script_for_slurm_starts_torchrun_on_each_node(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, and a torchrun that only writes down what it is called with."""
    stand_ins = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "torchrun": f'{json.dumps(sys.executable)} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    script = ROOT / "examples/slurm/several-machines.sbatch"
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True, timeout=60)
    first, *calls = told.stdout.splitlines()
    assert first == "the server will be http://node-a:8091"
    lines = script.read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert [asked["nodes"], asked["ntasks-per-node"]] == ["2", "1"]
    for node, call in enumerate(map(json.loads, calls)):
        place = call.index("-m")
        words = dict(zip(call[:place:2], call[1:place:2], strict=True))
        assert words == {
            "--nnodes": "2",
            "--nproc-per-node": asked["gpus-per-node"],
            "--node-rank": str(node),
            "--master-addr": "node-a",
            "--master-port": "22345",
        }
        options = parsed(["python", *call[place:]])
        assert options is not None
        assert ranks_of(options) == 2 * int(asked["gpus-per-node"])
        assert options.drain_timeout < TORCHRUN_KILLS_AFTER_S
    assert len(calls) == 2
