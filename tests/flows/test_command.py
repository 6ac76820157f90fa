"""The command line, as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import config
from flows import command as cli
from flows.retrain import retrain
from flows.upgrade import upgrade
from tests.conftest import PLAIN, make_base
from tests.flows.conftest import Command, settings_in

MODEL = "by-hand"
servers = [pytest.mark.integration, pytest.mark.xdist_group("servers-of-commands")]


@pytest.mark.parametrize("name", sorted(path.stem for path in config.PRESETS.glob("*.yaml")))
def test_every_preset_is_valid_and_opens_with_its_command(name: str) -> None:
    path = config.preset(name)
    flow = "fuse" if config.load(path).adapter.fusion else "retrain"
    assert path.read_text().startswith(f"# python -m flows.{flow} --preset {name}\n")


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nope"], "expected a preset among"),
        (["--config", "/no/such.yaml"], "expected a readable YAML file"),
        (["--preset", "tweets", "--set", "gate.margn=1"], "unknown key (did you mean margin?)"),
        (["--preset", "tweets", "--set", "adapter.bottleneck.reduction_factor=0"], "greater than 0, found 0"),
        (["--preset", "tweets", "--set", "gate"], "expected --set KEY=VALUE"),
    ],
)
def test_wrong_parameters_are_one_line_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(retrain, arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected ")
    assert message in line


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all-from", "production"], "expected --base NEW with --all-from; found none"),
        (["--preset", "tweets", "--base", "other"], "expected --all-from with --base"),
        (["--preset", "tweets", "--list"], "expected --all-from with --base"),
    ],
)
def test_half_an_upgrade_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(retrain, arguments, upgrade=upgrade) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


Written = Callable[..., str]


@pytest.fixture(scope="module")
def written(workspace: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Writes a configuration of model `by-hand`; the name of the file."""
    folder = tmp_path_factory.mktemp("by-hand")
    make = settings_in(folder, workspace, tiny_base)

    def write(**changes: Any) -> str:
        settings = make(MODEL, report__examples=["a lovely word1", "an awful word2"], **changes)
        path = folder / "configuration.yaml"
        path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        return str(path)

    return write


@pytest.fixture(scope="module")
def first(written: Written, servers: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The retrain that registers the model, started as a user does: nothing is imported yet."""
    command = [sys.executable, "-m", "flows.retrain", "--config", written()]
    return subprocess.run(command, env={**os.environ, **servers}, capture_output=True, text=True, check=False)


@pytest.mark.slow
class TestExitCodes:
    """0 registered or up to date, 1 an error; of a gate that does not pass: tests/flows/test_retrain.py."""

    pytestmark = servers

    def test_registered(self, first: subprocess.CompletedProcess[str]) -> None:
        assert first.returncode == 0, first.stderr
        assert "verdict: PASS" in first.stdout
        assert f"registered version 1 of {MODEL} as candidate" in first.stdout
        assert "s3://adapterline/" in first.stdout
        assert f"models:/{MODEL}/1" in first.stdout
        assert "a lovely word1" in first.stdout.split("prediction of the registered version")[1]
        assert "Traceback" not in first.stderr
        told = first.stdout.split("prediction of the registered version")[0] + first.stderr
        assert not [word for word in ("lovely", "awful", "word17") if word in told], "no text of any row is shown"

    @pytest.mark.usefixtures("first")
    def test_up_to_date(self, command: Command, written: Written) -> None:
        second = command("flows.retrain", "--config", written())
        assert second.returncode == 0, second.stderr
        assert f"up to date: version 1 of {MODEL}" in second.stdout

    def test_an_error_has_no_traceback(self, command: Command, written: Written) -> None:
        done = command("flows.retrain", "--config", written(data__source="nothing.csv"))
        assert done.returncode == 1
        assert done.stderr == "error: expected a file at nothing.csv; found nothing there; correct data.source\n"


@pytest.mark.slow
@pytest.mark.usefixtures("first")
class TestServing:
    pytestmark = servers

    def test_a_fresh_process_loads_the_candidate_and_predicts(self) -> None:
        texts = [
            f"{words} {' '.join(PLAIN[:8])}" for words in ("lovely great", "awful sad")
        ]  # as those it learned from
        script = (
            f"import mlflow; model = mlflow.pyfunc.load_model('models:/{MODEL}@candidate'); "
            f"print(list(model.predict({texts})['label']))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "['good', 'bad']", done.stderr

    def test_the_command_line_answers_says_nothing_else_and_leaves_nothing(
        self, command: Command, tmp_path: Path
    ) -> None:
        done = command(
            "components.serving.score", f"models:/{MODEL}@candidate", "--text", "lovely great", TMPDIR=str(tmp_path)
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] == "label"
        assert done.stderr == ""
        assert list(tmp_path.iterdir()) == []

    def test_another_base_is_refused(self, command: Command, tmp_path: Path) -> None:
        other = make_base(tmp_path / "other", initializer_range=0.2)
        done = command(
            "components.serving.score", f"models:/{MODEL}@candidate", "--text", "lovely", ADAPTERLINE_BASE=str(other)
        )
        assert done.returncode == 1
        assert "with weights digest" in done.stderr.splitlines()[-1]
