from specauf.errors import UserError, run_command, unknown_name


def test_user_error_is_one_line_and_status_2(capsys):
    def command():
        raise UserError("block_size is 1: give at least 2")

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: block_size is 1: give at least 2\n"


def test_unknown_name_suggests_and_lists():
    message = str(unknown_name("loss", "aufs", ["decay", "auf"]))
    assert message == "unknown loss 'aufs'. Did you mean auf? Known: auf, decay"
