"""Guarantees of starting or joining Ray: local ears only, a folder that serves, refusals in words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import launch.cluster
from htnet.errors import InputError, StartError
from launch.cluster import LONGEST_FOLDER, Needs, Nodes, _not_connected, _session_folder, check_fits, usable_cpus


@pytest.fixture
def no_tmpdir(monkeypatch, tmp_path):
    """Neither variable is set, and in place of /tmp is a folder of the test's with a short path."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        monkeypatch.setattr(launch.cluster, "_LAST_RESORT", folder)
        yield Path(folder)


def test_ray_is_given_the_folder_that_a_user_names(no_tmpdir, monkeypatch, caplog):
    assert _session_folder() == f"{no_tmpdir}/ray"
    named = no_tmpdir / ("x" * (LONGEST_FOLDER - len(str(no_tmpdir)) - 1))
    monkeypatch.setenv("TMPDIR", str(named))
    assert _session_folder() == f"{named}/ray"
    monkeypatch.setenv("RAY_TMPDIR", f"{no_tmpdir}/first")
    assert _session_folder() == f"{no_tmpdir}/first/ray"
    monkeypatch.chdir(no_tmpdir)
    monkeypatch.setenv("RAY_TMPDIR", "relative")
    assert _session_folder() == f"{no_tmpdir}/relative/ray"
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, "")
    assert _session_folder() == f"{no_tmpdir}/ray"
    assert not caplog.records


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize(
    ("below", "rule"),
    [
        ("x" * 200, f"a shorter path is needed, of at most {LONGEST_FOLDER} bytes, got "),
        ("ä" * 20, f"a shorter path is needed, of at most {LONGEST_FOLDER} bytes, got "),
        ("file", "cannot be written to: Not a directory"),
        ("file/below", "cannot be written to: Not a directory"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_named(no_tmpdir, monkeypatch, caplog, name, below, rule):
    (no_tmpdir / "file").touch()
    monkeypatch.setenv(name, f"{no_tmpdir}/{below}")
    assert _session_folder() == f"{no_tmpdir}/ray"
    [record] = caplog.records
    assert record.getMessage().startswith(f"{name}={no_tmpdir}/{below}: {rule}")
    assert record.getMessage().endswith(f"; Ray's sockets and logs are in {no_tmpdir}/ray instead")
    monkeypatch.setattr(launch.cluster, "_LAST_RESORT", "/proc")
    with pytest.raises(StartError) as caught:
        _session_folder()
    assert f"{name}={no_tmpdir}/{below}: {rule}" in str(caught.value)
    assert str(caught.value).endswith(
        "/proc: cannot be written to: No such file or directory; set TMPDIR to a folder that can be written to, "
        f"with a path of at most {LONGEST_FOLDER} bytes"
    )


def test_patience_is_advised_only_where_it_can_help():
    slow = Exception("The current node timed out during startup. This could happen because\n...")
    assert "; try again when it is less busy; Ray's logs are in /x/session_latest/logs" in str(
        _not_connected(None, slow, "/x")
    )
    assert "busy" not in str(_not_connected(None, OSError(28, "No space left on device"), "/x"))


def needs(cpus: float = 1.0, gpus: float = 0.0) -> Needs:
    return Needs(task="fold", cpus=cpus, gpus=gpus, cpus_key="resources.cpus_per_fold", gpus_key="gpus_key")


def test_a_fold_must_fit_into_one_node():
    def node(cpus, gpus, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 9.0} | ({"GPU": gpus} if gpus else {})}

    nodes = [node(8.0, 0), node(2.0, 1.0), node(64.0, 8.0, alive=False)]
    cluster = SimpleNamespace(nodes=lambda: nodes)
    check_fits(cluster, needs(cpus=8.0))
    check_fits(cluster, needs(cpus=2.0, gpus=1.0))
    with pytest.raises(InputError, match=r"resources\.cpus_per_fold=9: no node has more than 8 CPU\(s\): no fold can"):
        check_fits(cluster, needs(cpus=9.0))
    with pytest.raises(InputError, match=r"gpus_key=2: no node has more than 1 GPU\(s\): no fold can"):
        check_fits(cluster, needs(gpus=2.0))
    with pytest.raises(InputError, match=r"cpus_per_fold=4, gpus_key=0\.5: no single node has as many of both"):
        check_fits(cluster, needs(cpus=4.0, gpus=0.5))


@pytest.mark.parametrize(
    ("quotas", "group", "expected"),
    [
        ({}, "0::/\n", 8),
        ({"": "max 100000"}, "0::/\n", 8),
        ({"": "250000 100000"}, "0::/\n", 2),
        ({"": "50000 100000"}, "0::/\n", 1),
        ({"": "max 100000", "job": "600000 100000", "job/step": "max 100000"}, "0::/job/step\n", 6),
        ({"": "300000 100000"}, "12:cpu:/somewhere\n", 3),
        ({"": "1600000 100000"}, "0::/\n", 8),
        ({"": "nonsense"}, "0::/../elsewhere\n", 8),
    ],
)
def test_usable_cpus_follow_affinity_and_quotas(tmp_path, monkeypatch, quotas, group, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for folder, text in quotas.items():
        (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / folder / "cpu.max").write_text(text)
    (tmp_path / "own").write_text(group)
    assert usable_cpus(tmp_path / "cgroup", tmp_path / "own") == expected
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == 8


def machine_program(body: str, home: Path, *options: str) -> list[str]:
    """Write a program that joins a Ray of this machine and then does ``body``; return its command line."""
    path = home / "program.py"
    path.write_text(
        "import os, sys, time\n"
        "from launch.cluster import ray_cluster, terminable\n"
        "with terminable():\n"
        "  print('begins', flush=True)\n"
        "  with ray_cluster(None) as ray:\n" + body
    )
    return [sys.executable, str(path), *options]


def private_environment(home: Path, **more: str) -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return plain | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more


_EARS = """
    ray.get(ray.remote(lambda: None).remote())
    pids = {os.getpid()}
    for _ in range(5):  # the processes of this Ray are descendants of this one
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            pids |= {pid} if parent in pids else set()
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:  # listens
                print("ear", columns[1].partition(":")[0], flush=True)
"""
# 127.0.0.1 as /proc/net/tcp writes it, and mapped into IPv6
_LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


@pytest.mark.slow
def test_a_local_ray_listens_on_loopback_only(tmp_path):
    """Whoever reaches a Ray can run code in it; its token is for its owner's eyes."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    command = machine_program("    from pathlib import Path" + _EARS, tmp_path)
    done = subprocess.run(
        command, env=private_environment(tmp_path), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    ears = re.findall(r"ear (\w+)", done.stdout)
    assert len(ears) >= 3  # of the head, of the node, of a worker
    assert set(ears) <= _LOOPBACK
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0, 3.0])
def test_sigterm_while_ray_starts_is_an_interrupt(tmp_path, seconds):
    """Ray's own handler ended the process with exit code 15, before any summary was written."""
    body = "    print('started', flush=True)\n    time.sleep(250)\n"
    with subprocess.Popen(
        machine_program(body, tmp_path), env=private_environment(tmp_path), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "begins\n"
        time.sleep(seconds)
        process.terminate()
        try:
            err = process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:  # it came while Python ran a finaliser, whose exceptions it ignores
            process.terminate()
            err = process.communicate(timeout=120)[1]
    assert process.returncode in (1, -signal.SIGINT), err
    assert err.splitlines()[-1] == "KeyboardInterrupt"


def test_only_cluster_py_starts_or_joins_ray():
    calls = re.compile(r"\bray\.init\(")
    rooms = ("htnet", "kernels", "launch", "dali_pipelines")
    found = [path for room in rooms for path in (ROOT / room).rglob("*.py") if calls.search(path.read_text())]
    assert found == [ROOT / "launch" / "cluster.py"]


def test_a_task_goes_nowhere_when_all_able_nodes_are_avoided():
    nodes = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": cpus}}
        for name, cpus in (("a", 4.0), ("b", 4.0), ("c", 1.0))
    ]
    context = SimpleNamespace(gcs_address="127.0.0.1:1")  # nobody listens: its silence is no sign of death
    seen = Nodes(SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda: context))
    assert seen.places(2.0, 0.0) == 4
    assert seen.places(1.0, 1.0) == 1  # none now; one may come
    assert seen.any_fit(2.0, 0.0, {"a"})
    assert not seen.any_fit(2.0, 0.0, {"a", "b"})
    assert seen.any_fit(1.0, 0.0, {"a", "b"})
    assert seen.any_fit(9.0, 0.0, {"a", "b"})  # no node is able: the task waits for one
