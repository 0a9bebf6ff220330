"""Tuned configurations: what counts for which product, what files say, what is taken without any."""

from __future__ import annotations

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fewbits.errors import FewbitsError
from fewbits.runtime.triton import configs
from fewbits.runtime.triton.configs import Config, Entry, Key, Tuned

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
LISTED = (Entry(Key("matvec", 4, 32, 1, 4096, 14336), Config(8, 2), 31.0),
          Entry(Key("matvec", 4, 128, 1, 4096, 4096), Config(32, split=2), 12.5),
          Entry(Key("tile", 4, 128, 16, 4096, 4096), Config(64, 16, 4, 8, 2), 20.0))


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    """A GPU by name, an empty folder of packaged files, an empty cache."""
    monkeypatch.setattr(configs, "name_of", lambda device: "Make & Model 80GB" if device.type == "cuda" else "none")
    monkeypatch.setattr(configs, "_processors", lambda device: 132)
    monkeypatch.setattr(configs, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "packaged").mkdir()
    configs.forget()
    yield
    configs.forget()


def test_the_users_file_comes_before_the_packaged_one_and_both_before_defaults():
    asked = ("matvec", 4, 128, 1, 4096, 4096, GPU)
    without = configs.lookup(*asked)
    packaged = configs.PACKAGED / "make-model-80gb.json"
    configs.write(packaged, Tuned("Make & Model 80GB", "3.6.0", LISTED))
    assert configs.lookup(*asked) == LISTED[1].config != without
    own = LISTED[1]._replace(config=Config(64, 4))
    configs.write(configs.own_file("Make & Model 80GB"), Tuned("Make & Model 80GB", "3.6.0", (own,)))
    assert configs.lookup(*asked) == Config(64, 4)
    assert configs.lookup("tile", 4, 128, 16, 4096, 4096, GPU) == LISTED[2].config  # not in the user's
    assert configs.lookup("matvec", 4, 128, 1, 4096, 4096, CPU) == configs.default(Key(*asked[:-1]), 1)


@pytest.mark.parametrize("asked, which", [
    (("matvec", 4, 128, 1, 6144, 4096), 1),  # half as high again
    (("matvec", 4, 128, 1, 4096, 11008), 0),  # of other groups, but 4096 columns are too far
    (("matvec", 4, 64, 1, 4096, 8192), 0),  # of groups both as far: the nearer shape
    (("matvec", 4, 128, 1, 4096, 8192), 1),  # and not where a group is the same
    (("tile", 4, 128, 13, 4096, 4096), 2),  # rows go up to the next power of two
    (("tile", 4, 128, 2, 4096, 4096), 2),  # which is 16 at least
    (("tile", 4, 128, 17, 4096, 4096), None),
    (("matvec", 3, 128, 1, 4096, 4096), None),
    (("tile", 4, 128, 1, 4096, 4096), None),
    (("matvec", 4, 128, 1, 4096, 1024), None),  # too far
    (("matvec", 4, 128, 1, 28672, 14336), None),
])
def test_the_nearest_product_of_the_same_kind_counts(asked, which):
    configs.write(configs.own_file("Make & Model 80GB"), Tuned("Make & Model 80GB", "3.6.0", LISTED))
    found = configs.lookup(*asked, GPU)
    assert found == (configs.default(Key(*asked)._replace(rows=configs.bucket(asked[3])), 132) if which is None
                     else LISTED[which].config)


def test_from_how_many_rows_a_weight_is_decoded():
    assert configs.dense(4, 128, 4096, 4096, GPU) == configs.DENSE_ROWS
    key = Key("dense", 4, 128, 96, 4096, 4096)
    configs.write(configs.own_file("Make & Model 80GB"), Tuned("Make & Model 80GB", "3.6.0", (), (key,)))
    assert configs.dense(4, 128, 4096, 4096, GPU) == configs.dense(4, 32, 4096, 6144, GPU) == 96
    assert configs.dense(8, 128, 4096, 4096, GPU) == configs.dense(4, 128, 512, 4096, GPU) == configs.DENSE_ROWS


def test_files_hold_what_was_written_a_product_a_line(tmp_path):
    dense = (Key("dense", 4, 128, 96, 4096, 4096),)
    configs.write(tmp_path / "x.json", Tuned("GPU", "3.6.0", LISTED, dense))
    assert configs.read(tmp_path / "x.json") == Tuned("GPU", "3.6.0", LISTED, dense)
    first, *lines = (tmp_path / "x.json").read_text().splitlines()
    assert sum('"kernel"' in line for line in lines) == 4
    entry = json.loads((tmp_path / "x.json").read_text())["entries"][0]
    assert entry == {"kernel": "matvec", "bits": 4, "group": 32, "rows": 1, "out": 4096, "in": 14336,
                     "config": {"n": 8, "m": 2, "split": 1, "warps": 4, "stages": 3}, "microseconds": 31.0}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "x", "triton": "3", "entries": [{}], "dense": []}',
                                  '{"device": "x", "triton": "3", "entries": [1], "dense": []}'])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FewbitsError, match="x.json"):
        configs.read(tmp_path / "x.json")


def test_what_is_tried_counts_within_and_not_after():
    before = configs.lookup("matvec", 4, 128, 1, 64, 64, CPU), configs.dense(4, 128, 64, 64, CPU)
    with configs.trying({"matvec": Config(2, 4)}, dense=7) as asked:
        with configs.trying({"matvec": Config(8, 8)}):
            assert configs.lookup("matvec", 4, 128, 1, 64, 64, CPU) == Config(8, 8)
        assert configs.lookup("matvec", 4, 128, 1, 64, 64, CPU) == Config(2, 4)
        assert configs.lookup("tile", 4, 128, 8, 64, 64, CPU).n != 2
        assert configs.dense(4, 128, 64, 64, CPU) == 7
    assert [(key.kernel, key.rows) for key in asked] == [("matvec", 1), ("tile", 16), ("dense", 0)]
    assert (configs.lookup("matvec", 4, 128, 1, 64, 64, CPU), configs.dense(4, 128, 64, 64, CPU)) == before


@pytest.mark.parametrize("kernel", list(configs.DEFAULTS))
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 64, 256])
def test_defaults_are_blocks_of_powers_of_two_that_fill_a_gpu(kernel, rows):
    for out, columns in (4096, 14336), (1024, 4096), (28672, 8192), (64, 64), (1, 1):
        config = configs.default(Key(kernel, 4, 128, rows, out, columns), 132)
        for number in (config.n, config.m, config.split, config.warps):
            assert number & (number - 1) == 0 < number
        assert config.split == 1 or config.split * configs.LEAST_COLUMNS <= columns
        if kernel in ("matvec", "tile") and rows < 64 and out * columns > 1 << 20:
            assert -(-out // config.n) * -(-rows // config.m) * config.split > 132 / 2


def test_programs_too_large_for_a_gpu_become_smaller_once() -> None:
    asked: list[Config] = []

    def launch(config: Config) -> None:
        asked.append(config)
        if config.n * config.stages > 128:
            raise OutOfResources(config.n * config.stages, 128, "shared memory")

    configs.fitting("matvec", Config(256, stages=2), launch)
    assert asked == [Config(256, stages=2), Config(256, stages=1), Config(128, stages=1)]
    asked.clear()
    configs.fitting("matvec", Config(256, stages=2), launch)
    assert asked == [Config(128, stages=1)]
    with configs.trying({"matvec": Config(512)}), pytest.raises(OutOfResources):
        configs.fitting("matvec", Config(512), launch)
