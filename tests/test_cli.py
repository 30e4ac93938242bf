"""The command line: exit codes, one clear message for each failure, and torch alone."""

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

import attlas
from attlas import cli, demo

MAIN = "import sys; from attlas.cli import main; sys.exit(main(sys.argv[1:]))"


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of one command."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert isinstance(code, int)
    out, err = capsys.readouterr()
    return code, out, err


def test_info_names_versions_and_every_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, "info")
    assert (code, err) == (0, "")
    assert re.search(rf"^attlas +{re.escape(attlas.__version__)}$", out, re.MULTILINE)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^impl='reference' +on cpu: yes$", out, re.MULTILINE)
    assert re.search(r"^impl='auto' +on cpu: yes, chooses '\w+'$", out, re.MULTILINE)
    assert f"{torch.get_num_threads()} threads" in out
    assert torch.backends.cpu.get_cpu_capability() in out
    assert max(map(len, out.splitlines())) <= 80


def test_info_asks_for_the_implementations_that_attention_knows() -> None:
    query = torch.ones(1, 1)
    with pytest.raises(ValueError, match="impl must be ") as caught:
        attlas.attention(query, query, query, impl="?")
    known = re.findall(r"'(\w+)'", str(caught.value).partition(", got")[0])
    assert set(known) == {"auto", *cli.IMPLEMENTATIONS}


def test_info_gives_the_reason_where_an_implementation_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise NotImplementedError("impl must wait")

    monkeypatch.setattr(attlas, "attention", refuse)
    assert cli.availability("reference", "cpu") == "no: impl must wait"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys)
    assert (code, err) == (0, "")
    assert re.search(r"^ +demo +two textbook exercises", out, re.MULTILINE)
    assert re.search(r"^ +info +versions", out, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(capsys, "--version") == (0, f"attlas {attlas.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--layer", "two"], "--layer: invalid int value: 'two'"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
        (["demo", "--text"], "--text: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_code_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, out, err = run_cli(capsys, *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert re.fullmatch(r"attlas.*; see attlas( demo)? --help\n", err)


def test_a_failure_that_the_user_can_mend_is_its_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise demo.DemoError("--head must be small, got 9; choose another")

    monkeypatch.setattr(demo, "run", fail)
    message = "attlas: --head must be small, got 9; choose another\n"
    assert run_cli(capsys, "demo") == (1, "", message)


def test_an_unexpected_failure_is_one_line_and_has_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a message\nof two lines")

    monkeypatch.setattr(demo, "run", fail)
    code, out, err = run_cli(capsys, "demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("attlas: RuntimeError: a message of two lines; ")
    assert "--traceback" in err
    with pytest.raises(RuntimeError, match="of two lines"):
        cli.main(["--traceback", "demo"])


def test_an_interrupt_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert run_cli(capsys, "demo") == (130, "", "")


def test_a_reader_that_stops_reading_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", MAIN, "info"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_torch_is_enough_until_the_demo_needs_more() -> None:
    optional = ("matplotlib", "rich", "tokenizers", "transformers")
    block = f"import sys; sys.modules.update(dict.fromkeys({optional}))\n"
    report = f"print([name for name in {optional} if sys.modules[name]])\n"
    source = f"{block}import attlas.cli as cli\ncli.main(['info'])\n{report}"
    source += "sys.exit(cli.main(['demo']))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert "\n[]\n" in done.stdout
    assert "In [2]:" in done.stdout, "the exercises need torch only"
    assert done.stderr == (
        "attlas: transformers must be installed, got no package of that name; "
        'run: pip install "attlas[demo]"\n'
    )
    assert done.returncode == 1


def test_importing_attlas_leaves_the_command_line_and_its_packages_out() -> None:
    names = ("attlas.cli", "attlas.demo", "matplotlib", "rich", "tokenizers", "transformers")
    source = f"import sys, attlas; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attlas", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("attlas", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"attlas {attlas.__version__}\n"
