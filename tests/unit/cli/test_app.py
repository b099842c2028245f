"""The command line, called with arguments of any sequence."""

import pytest

from offramp.cli import main


@pytest.mark.parametrize("arguments", [(), [], ("help",)])
def test_no_arguments_print_the_list_of_commands(capsys, arguments):
    main(arguments)
    assert "calibrate" in capsys.readouterr().out


def test_arguments_may_be_a_tuple(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(("--versoin",))
    assert stopped.value.code == 2
    assert "Did you mean --version?" in capsys.readouterr().err
