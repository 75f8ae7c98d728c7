import errno
import os
import sys

import pytest

from specauf.errors import UserError, run_command, unknown_name
from tests.processes import forked


def test_user_error_is_one_line_and_status_2(capsys):
    def command():
        raise UserError("block_size is 1: give at least 2")

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: block_size is 1: give at least 2\n"


def test_unknown_name_suggests_and_lists():
    message = str(unknown_name("loss", "aufs", ["decay", "auf"]))
    assert message == "unknown loss 'aufs'. Did you mean auf? Known: auf, decay"


@pytest.mark.parametrize(("file", "where"), [(None, ""), ("a.json", "a.json: ")])
def test_a_full_disk_is_one_line_wherever_it_shows(capsys, file, where):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", file)

    assert run_command(write) == 2
    said = f"error: {where}writing failed (No space left on device): free some space and try again\n"
    assert capsys.readouterr().err == said


def say_to_nobody(lines: int) -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    sys.exit(run_command(lambda: [print("x" * 100) for _ in range(lines)]))


@pytest.mark.parametrize("lines", [1, 1000])
def test_a_reader_that_has_gone_is_no_error(lines):
    done = forked(say_to_nobody, lines)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is(capsys):
    def command():
        raise BrokenPipeError

    with capsys.disabled(), pytest.raises(BrokenPipeError):
        run_command(command)
