"""The command line, as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components import config
from flows import command as cli
from flows.retrain import retrain
from flows.upgrade import upgrade
from tests.conftest import PLAIN, make_base
from tests.flows.conftest import Settings

Run = Callable[..., subprocess.CompletedProcess[str]]
servers = [pytest.mark.integration, pytest.mark.xdist_group("servers-of-commands")]


def save(settings: config.RetrainConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in config.PRESETS.glob("*.yaml")))
def test_every_preset_is_valid_and_opens_with_its_command(name: str) -> None:
    path = config.preset(name)
    flow = "fuse" if config.load(path).adapter.fusion else "retrain"
    assert path.read_text().startswith(f"# python -m flows.{flow} --preset {name}\n")


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


@pytest.mark.slow
class TestExitCodes:
    """0 registered or up to date, 1 an error, 2 the gate failed, 3 it cannot tell."""

    pytestmark = servers

    def test_registered_and_up_to_date(self, settings: Settings, command: Run, tmp_path: Path) -> None:
        path = save(settings("by-hand", report__examples=["a lovely word1", "an awful word2"]), tmp_path / "c.yaml")
        first = command("flows.retrain", "--config", path)
        assert first.returncode == 0, first.stderr
        assert "verdict: PASS" in first.stdout
        assert "registered version 1 of by-hand as candidate" in first.stdout
        assert "s3://adapterline/" in first.stdout
        assert "models:/by-hand/1" in first.stdout
        assert "a lovely word1" in first.stdout.split("prediction of the registered version")[1]
        assert "Traceback" not in first.stderr
        told = first.stdout.split("prediction of the registered version")[0] + first.stderr
        assert not [word for word in ("lovely", "awful", "word17") if word in told], "no text of any row is shown"
        second = command("flows.retrain", "--config", path)
        assert second.returncode == 0
        assert "up to date: version 1 of by-hand" in second.stdout

    def test_failed_and_inconclusive(self, settings: Settings, command: Run, tmp_path: Path) -> None:
        rates = {"body": 1e-9, "layer_norm": 1e-9, "head": 1e-9}
        bad = settings("by-hand-2", adapter__schedule={"epochs": 1, "learning_rates": rates})
        failed = command("flows.retrain", "--config", save(bad, tmp_path / "bad.yaml"))
        assert (failed.returncode, "verdict: FAIL" in failed.stdout) == (2, True), failed.stderr
        unsure = settings("by-hand-2", gate__margin=0.0001, gate__confidence=0.9999)
        inconclusive = command("flows.retrain", "--config", save(unsure, tmp_path / "unsure.yaml"))
        assert (inconclusive.returncode, "verdict: INCONCLUSIVE" in inconclusive.stdout) == (3, True)
        assert inconclusive.stderr.count("\n") == 1

    def test_an_error_has_no_traceback(self, settings: Settings, command: Run, tmp_path: Path) -> None:
        path = save(settings("none", data__source="nothing.csv"), tmp_path / "c.yaml")
        done = command("flows.retrain", "--config", path)
        assert done.returncode == 1
        assert done.stderr == "error: expected a file at nothing.csv; found nothing there; correct data.source\n"


@pytest.mark.slow
class TestServing:
    pytestmark = servers

    def test_a_fresh_process_loads_the_candidate_and_predicts(self, settings: Settings, command: Run) -> None:
        retrain(settings("served"))
        texts = [
            f"{words} {' '.join(PLAIN[:8])}" for words in ("lovely great", "awful sad")
        ]  # as those it learned from
        script = (
            "import mlflow; model = mlflow.pyfunc.load_model('models:/served@candidate'); "
            f"print(list(model.predict({texts})['label']))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "['good', 'bad']", done.stderr

    def test_another_base_is_refused(self, settings: Settings, command: Run, tmp_path: Path) -> None:
        retrain(settings("served"))
        other = make_base(tmp_path / "other", initializer_range=0.2)
        done = command(
            "components.serving.score", "models:/served@candidate", "--text", "lovely", ADAPTERLINE_BASE=str(other)
        )
        assert done.returncode == 1
        assert "with weights digest" in done.stderr.splitlines()[-1]
