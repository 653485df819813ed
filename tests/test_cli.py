"""The command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recbole_holo import cli

ROOT = Path(__file__).resolve().parent.parent


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def test_the_command_trains_and_prints_the_table(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """In a process of its own, away from the checkout, with the progress bar on."""
    settings = {**tiny, "show_progress": True, "item_attributes": ["genre"], "epochs": 1}
    command = [sys.executable, str(ROOT / "run_recbole_holo.py"), "--model=HoloMambaRec", f"--dataset={cyclic_dataset}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words(settings)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for text in (
        "HoloMambaRec on cycle",
        "ndcg@5",
        "without item tables",
        "seconds per epoch",
        "mamba_block: ",
    ):
        assert text in done.stdout
    assert "Train     0" in done.stderr  # the progress bar
    assert "Warning" not in done.stderr  # RecBole's and pandas': dozens of lines of FutureWarning


def test_config_files_and_flags(cyclic_dataset: str, tiny: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("seed: 5\nepochs: 1\n")
    argv = ["--model=RecMamba", f"--dataset={cyclic_dataset}", f"--config_files={extra}", *words({**tiny, "epochs": 1})]
    assert cli.main(argv) == 0
    assert "RecMamba on cycle, seed 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model=HoloMamba"], "did you mean HoloMambaRec"),
        (["--dataset=nowhere"], "'nowhere' is not on disk"),
        (["--config_files=absent.yaml"], "no such file or preset"),
        (["--search_space=absent.yaml"], "absent.yaml"),
        (["--resume=absent.pth", "--epochs=1"], "absent.pth"),
        (["--loss_type=XE"], "loss_type: 'XE'"),
        (["--ssm_init=xavir"], "ssm_init: 'xavir'"),
        (["--d_conv=9"], "d_conv: 9"),
        (["--topk=[2000]", "--valid_metric=NDCG@2000"], "topk: 2000"),
        (["--backend=cuda"], "backend: 'cuda'"),
    ],
)
def test_bad_input_is_an_error_message_and_not_a_traceback(argv: list[str], message: str, capsys: Any) -> None:
    argv = ["--dataset=ml-100k", *argv] if not argv[0].startswith("--dataset") else argv
    assert cli.main([*argv, "--state=ERROR", "--show_progress=False"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_installed_package_data_is_found_outside_the_checkout() -> None:
    from recbole_holo.bridge import resources

    assert resources.presets().keys() >= {"HoloMambaRec", "HoloMambaRec_paper", "Hydra", "RecMamba", "Mamba4Rec"}
    assert resources.dataset_config("ml-1m").is_file()


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recbole_holo", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "--search_space" in done.stdout


def test_the_command_tunes(cyclic_dataset: str, tiny: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "space.yaml").write_text("choice:\n  learning_rate: [0.001, 0.01]\n")
    argv = ["--model=RecMamba", f"--dataset={cyclic_dataset}", "--search_space=space.yaml", "--search_algo=exhaustive"]
    assert cli.main([*argv, *words({**tiny, "epochs": 1})]) == 0
    printed = capsys.readouterr().out
    assert "2 trials" in printed
    assert "best by validation: learning_rate" in printed
