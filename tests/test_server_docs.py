"""docs/server.md is true: its commands and its Python run against a server, and its tables are those of the code."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from server_fakes import Served
from tiny_served import served_package

from edgeq.runtime.server.app import PATHS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
BLOCKS = [[line[4:] for line in block.splitlines()] for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE)]
COMMAND, PYTHON, CURL = (
    next([line for line in block if line] for block in BLOCKS if block[1].startswith(word)) for word in ("edgeq ", "import ", "curl ")
)
ADDRESS = "http://127.0.0.1:8080/v1"


def test_the_examples_run(tmp_path):
    served_package(tmp_path / "my-package")
    [command] = COMMAND
    arguments = [*shlex.split(command)[1:], "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "edgeq.cli", *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stdout.readline().strip()
            url = line.split()[-1]
            assert f"`{line.replace(url, ADDRESS)}`" in PAGE
            code = "\n".join(PYTHON).replace(ADDRESS, url)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert len(done.stdout) > 2
            if shutil.which("curl"):
                done = subprocess.run(shlex.split(CURL[0].replace(ADDRESS, url)), capture_output=True, text=True)
                assert '"object":"text_completion"' in done.stdout
        finally:
            server.terminate()
        _, said = server.communicate(timeout=30)
    assert (server.returncode, said) == (0, "Stopped.\n")


def rows(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]


def test_the_table_of_errors_has_every_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime" / "server").glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source)) | set(re.findall(r'code = "(\w+)" if .* else "(\w+)"', source)[0])
    assert {code for row in rows("Errors") for code in re.findall(r"`(\w+)`", row[1])} == codes


def test_the_table_of_metrics_has_every_name():
    served = Served()
    served.chat()
    names = set(re.findall(r"^# TYPE (\w+)", served.call("GET", "/metrics").text, re.MULTILINE))
    assert {name for row in rows("Metrics") for name in re.findall(r"`(\w+)`", row[0])} == names


def test_the_table_of_endpoints_has_every_path():
    written = {path for row in rows("Endpoints") for path in re.findall(r"`(?:GET|POST) ([^`]+)`", row[0])}
    assert written == {*PATHS, "/v1/models/NAME"}


@pytest.mark.parametrize("option", re.findall(r"`(--[a-z-]+)", PAGE))
def test_every_option_exists(option):
    from edgeq.cli_serve import serve

    assert option in {name for parameter in serve.params for name in parameter.opts}
