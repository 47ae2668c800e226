"""docs/session.md is true: its examples run."""

import re
import subprocess
import sys
from pathlib import Path

from tiny_elastic import write_tiny_elastic

PAGE = (Path(__file__).parent.parent / "docs" / "session.md").read_text(encoding="utf-8")
BLOCKS = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)]


def test_examples_run(tmp_path):
    write_tiny_elastic(tmp_path / "my-model-pi")
    assert len(BLOCKS) == 3
    script = "\n".join(BLOCKS)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r'\{ *"colour": *"(red|blue)" *\}', done.stdout)
