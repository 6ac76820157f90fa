"""The local stack: a real store that is private, shared, restarted and never lost."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from components import storage
from components.errors import StorageError, StorageUnavailable
from infra import local, store

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("stack")]

OBJECT = f"s3://{local.BUCKET}/folder/object"


def is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_objects_survive_a_restart(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        with local.stack(tmp_path) as stack, local.exported(stack.environment):
            if content == b"second":
                assert storage.read(OBJECT) == b"first"
            assert storage.write(OBJECT, content)
    assert not is_up(stack.port)


def test_objects_survive_kill_9_of_the_store(tmp_path: Path) -> None:
    with local.stack(tmp_path) as stack, local.exported(stack.environment):
        storage.write(OBJECT, b"kept")
        os.kill(int(store._state(tmp_path)["pid"]), signal.SIGKILL)  # type: ignore[index]
        with pytest.raises(StorageUnavailable, match="an S3 server that answers"):
            storage.read(OBJECT)
    with local.stack(tmp_path) as stack, local.exported(stack.environment):
        assert storage.read(OBJECT) == b"kept"


def test_two_users_share_one_store_and_the_last_one_stops_it(tmp_path: Path) -> None:
    with local.stack(tmp_path) as first:
        with local.stack(tmp_path) as second:
            assert second.port == first.port
        assert is_up(first.port)
    assert not is_up(first.port)


def test_a_store_whose_owner_was_killed_is_taken_over(tmp_path: Path) -> None:
    script = "print('up', flush=True); import time; time.sleep(10)"
    command = [
        sys.executable,
        "-m",
        "infra.local",
        "--folder",
        str(tmp_path),
        "run",
        "--",
        sys.executable,
        "-c",
        script,
    ]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    port = store._state(tmp_path)["port"]  # type: ignore[index]
    owner.kill()
    owner.wait()
    with local.stack(tmp_path) as stack:
        assert stack.port == port
    assert not is_up(stack.port)


def test_only_the_keys_open_it_and_only_on_loopback(tmp_path: Path) -> None:
    with local.stack(tmp_path) as stack:
        wrong = {**stack.environment, "AWS_ACCESS_KEY_ID": "guessed", "AWS_SECRET_ACCESS_KEY": "guessed"}
        with local.exported(wrong), pytest.raises(StorageError, match="S3 said"):
            storage.read(OBJECT)
        listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
        ports = {
            line.split()[1].split(":")[1]: line.split()[1].split(":")[0]
            for line in listening
            if line.split()[3] == "0A"
        }
        assert ports[f"{stack.port:04X}"] == "0100007F"
    assert stat.S_IMODE((tmp_path / "credentials.json").stat().st_mode) == 0o600


def test_one_of_many_racing_writers_wins(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with local.stack(tmp_path) as stack, local.exported(stack.environment), ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.write(OBJECT, b"%d" % n, if_absent=True), range(16)))
    assert sum(won) == 1


def test_missing_objects_and_buckets_are_told_apart(tmp_path: Path) -> None:
    with local.stack(tmp_path) as stack, local.exported(stack.environment):
        with pytest.raises(StorageError, match="no such key"):
            storage.read(f"s3://{local.BUCKET}/nothing")
        with pytest.raises(StorageError, match="no such bucket"):
            storage.read("s3://no-such-bucket/nothing")
        assert not storage.exists(f"s3://{local.BUCKET}/nothing")


def test_folders_travel_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_bytes(b"a" * 10)
    (source / "last.json").write_bytes(b"{}")
    with local.stack(tmp_path / "stack") as stack, local.exported(stack.environment):
        storage.upload_folder(source, f"s3://{local.BUCKET}/copy", last="last.json")
        assert storage.names(f"s3://{local.BUCKET}/copy") == ["deep/a", "last.json"]
        back = storage.download_folder(f"s3://{local.BUCKET}/copy", tmp_path / "back")
    assert (back / "deep" / "a").read_bytes() == b"a" * 10


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_line_runs_a_command_with_the_environment(tmp_path: Path) -> None:
    script = "import os; print(os.environ['AWS_ENDPOINT_URL_S3'][:17])"
    done = command("--folder", str(tmp_path), "run", "--", sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, "http://127.0.0.1:\n")
    assert command("--folder", str(tmp_path), "run", "--", "false").returncode == 1


def test_secrets_are_not_printed(tmp_path: Path) -> None:
    shown = command("--folder", str(tmp_path), "env").stdout
    assert "AWS_SECRET_ACCESS_KEY=…" in shown
    with local.stack(tmp_path) as stack:
        assert stack.environment["AWS_SECRET_ACCESS_KEY"] not in shown
    logs = (tmp_path / "s3.log").read_text()
    assert stack.environment["AWS_SECRET_ACCESS_KEY"] not in logs


def test_an_unknown_program_is_one_line(tmp_path: Path) -> None:
    done = command("--folder", str(tmp_path), "run", "--", "no-such-program")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("expected a program; found 'no-such-program'")
