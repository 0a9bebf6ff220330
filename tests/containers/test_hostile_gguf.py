"""Whole models in damaged GGUF files: opened and loaded, or refused by name; never anything else, never much memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits import containers
from fewbits.containers import gguf_file
from fewbits.containers.gguf import Gguf
from fewbits.errors import FewbitsError
from tests.containers.hostile_gguf import HOSTILE

ROOM = 2 << 30  # bytes of address space: the interpreter, the libraries and a little
SECONDS = 60  # for the whole corpus in one process
OPEN = """
import resource, sys
from pathlib import Path
from fewbits import containers
from fewbits.errors import FewbitsError
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        containers.open(path)
    except FewbitsError as error:
        assert path.name in str(error), (path, error)
    else:
        raise AssertionError(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    containers.write(Gguf(), path, containers.open(tiny))
    return path.read_bytes()


def test_the_corpus_is_refused_in_little_time_and_memory(tmp_path):
    for i, (raw, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{i:03}.gguf").write_bytes(raw)
    done = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path), str(ROOM)], capture_output=True, text=True,
                          timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # this process has the libraries too
    largest = max(len(raw) for raw, _ in HOSTILE.values())
    assert int(done.stdout) * 1024 < base * 1024 + 4 * largest


def _edited(draw: st.DrawFn, raw: bytes, end: int) -> bytes:
    """Some bytes of the first `end` flipped, put in or taken out, or the rest cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at, how = draw(st.integers(0, end)), draw(st.sampled_from(["flip", "insert", "remove", "cut"]))
        some = draw(st.binary(min_size=1, max_size=9))
        raw = {"flip": raw[:at] + some + raw[at + len(some):], "insert": raw[:at] + some + raw[at:],
               "remove": raw[:at] + raw[at + len(some):], "cut": raw[:at]}[how]
    return raw


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_model_opens_or_is_refused_and_nothing_else(good, tmp_path, data):
    path = tmp_path / "damaged.gguf"
    (tmp_path / "good.gguf").write_bytes(good)
    end = gguf_file.read(tmp_path / "good.gguf").start
    path.write_bytes(data.draw(st.composite(_edited)(good, end)))
    try:
        found = containers.open(path)
        for name in found.files:
            found.files[name]
        for entry in found.entries.values():
            assert entry.load().shape == entry.shape
    except FewbitsError as error:
        assert str(path) in str(error)


def test_every_truncation_of_a_model_is_refused(good, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(good)
    start = gguf_file.read(path).start
    for size in (*range(0, 200), *range(200, start, 97), *range(start, len(good) - 32, 10_007)):
        path.write_bytes(good[:size])
        with pytest.raises(FewbitsError, match="cut.gguf|not a GGUF file"):
            containers.open(Path(path))
