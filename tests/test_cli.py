import subprocess
import sys

import pytest

from specauf.cli import COMMANDS, expand_names, main
from specauf.configs import config_root, find_config, known_configs
from specauf.errors import UserError


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_unknown_command_is_one_line_and_status_2(capsys):
    assert main(["fitt"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: unknown command 'fitt'. Did you mean fit?")
    assert err.count("\n") == 1


def test_bare_names_become_the_shipped_files():
    loss = str(config_root() / "loss" / "auf.yaml")
    assert expand_names(["fit", "--model.loss=auf", "--trainer.max_steps=3"])[1] == f"--model.loss={loss}"
    assert expand_names(["fit", "--model.loss", "auf"])[2] == loss


def test_class_paths_and_json_pass_through():
    words = ["--model.loss=specauf.objectives.Objective", '--model.loss={"class_path": "x"}']
    assert expand_names(words) == words


def test_unknown_loss_lists_the_losses_there_are():
    with pytest.raises(UserError, match="unknown loss 'nosuch'") as caught:
        expand_names(["fit", "--model.loss=configs/loss/nosuch.yaml"])
    assert all(name in str(caught.value) for name in known_configs("loss"))


def test_a_config_of_ones_own_is_found_by_path(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("class_path: x\n")
    assert find_config("loss", str(own)) == own


@pytest.mark.parametrize(
    "run",
    [
        "from specauf.cli import main; main(['--help'])",
        "from cache_builder.cli import main; main(['--help'])",
        "import specauf.evaluation.report_cli",
    ],
)
def test_help_and_reports_do_not_import_torch(run):
    code = f"import sys; {run}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
