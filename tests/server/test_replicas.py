"""Each replica is shown: at /health, at /metrics and on the page."""

from __future__ import annotations

from omni_sp.async_omni import ReplicaStats
from tests.server.fakes import FakeOmni
from tests.server.serving import serving


def test_each_replica_is_shown() -> None:
    omni = FakeOmni()
    with serving(omni) as served:
        assert served.get("/health").json() == {"status": "ready"}
        omni.force_replicas = (
            ReplicaStats(status="ready", running=1, calls=3),
            ReplicaStats(status="restarting", restarts=2),
        )
        assert served.get("/health").json() == {"status": "ready", "replicas": ["ready", "restarting"]}
        replicas = served.get("/v1/info").json()["replicas"]
        assert replicas[1] == {"status": "restarting", "running": 0, "calls": 0, "restarts": 2}
        lines = served.get("/metrics").text.splitlines()
    for line in (
        'omni_sp_replica_ready{replica="0"} 1.0',
        'omni_sp_replica_ready{replica="1"} 0.0',
        'omni_sp_replica_running{replica="0"} 1.0',
        'omni_sp_replica_calls_total{replica="0"} 3.0',
        'omni_sp_replica_restarts_total{replica="1"} 2.0',
    ):
        assert line in lines
