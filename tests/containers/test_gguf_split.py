"""Split GGUF: what is written is read back whole, from any of the files; what does not belong together is refused."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest

from fewbits import containers, inspection
from fewbits.containers import gguf_file, gguf_split
from fewbits.containers.gguf import Gguf, SplitGguf
from fewbits.containers.gguf_file import Value
from fewbits.errors import FewbitsError

LIMIT = 200_000


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    containers.write(Gguf(), path, containers.open(tiny))
    return path


@pytest.fixture
def folder(whole, tmp_path):
    containers.write(SplitGguf(most_bytes=LIMIT), tmp_path / "split", containers.open(whole))
    return tmp_path / "split"


def parts(folder):
    return sorted(folder.iterdir())


def test_split_files_hold_the_same_bytes_as_one(whole, folder):
    files = parts(folder)
    assert len(files) > 2 and max(f.stat().st_size for f in files) <= LIMIT
    assert files[1].name == f"model-00002-of-{len(files):05}.gguf"
    one, several = gguf_file.read(whole), gguf_split.read(files[0])
    assert several.metadata.keys() == one.metadata.keys()
    assert list(several.tensors) == list(one.tensors)
    for name, spec in one.tensors.items():
        assert np.array_equal(several.data(several.tensors[name]), one.data(spec)), name


def test_any_file_and_the_folder_open_the_model(whole, folder, tmp_path):
    sizes = {inspection.inspect(p).nbytes for p in (folder, *parts(folder))}
    assert sizes == {sum(f.stat().st_size for f in parts(folder))}
    for i, path in enumerate((folder, parts(folder)[0], parts(folder)[-1])):
        containers.write(Gguf(), tmp_path / f"{i}.gguf", containers.open(path))
        assert (tmp_path / f"{i}.gguf").read_bytes() == whole.read_bytes()


def test_the_gguf_package_reads_each(folder, whole):
    files = parts(folder)
    names = []
    for i, file in enumerate(files):
        reader = gguf.GGUFReader(file)
        assert [reader.get_field(k).contents() for k in gguf_split.KEYS] == [i, len(files), 20]
        names += [t.name for t in reader.tensors]
        assert (reader.get_field("general.architecture") is None) == (i > 0)
    assert names == [t.name for t in gguf.GGUFReader(whole).tensors]


def test_files_of_so_many_tensors(whole, tmp_path):
    containers.write(SplitGguf(most_tensors=7), tmp_path / "split", containers.open(whole))
    assert [len(gguf_file.read(f).tensors) for f in parts(tmp_path / "split")] == [7, 7, 6]


def test_one_file_may_be_enough(whole, tmp_path):
    found = containers.write(SplitGguf(most_bytes=10**9), tmp_path / "split", containers.open(whole))
    assert [f.name for f in parts(tmp_path / "split")] == ["model-00001-of-00001.gguf"]
    assert found.path == tmp_path / "split" and len(found.entries) == 20


def test_metadata_may_fill_the_first_file_alone(whole, tmp_path):
    source = containers.open(whole)
    metadata = dict(gguf_file.read(whole).metadata)
    specs = list(gguf_file.read(whole).tensors.values())
    head = len(gguf_file.header(metadata | gguf_split.keys(0, 1, 20), []))
    largest = max(s.nbytes for s in specs)
    metadata["padding"] = Value("STRING", "x" * (largest + 4096 - head))
    source.facts["metadata"] = metadata
    containers.write(SplitGguf(most_bytes=largest + 4300), tmp_path / "split", source)
    assert [len(gguf_file.read(f).tensors) for f in parts(tmp_path / "split")][0] == 0
    assert len(containers.open(tmp_path / "split").entries) == 20


@pytest.mark.parametrize("limit, message", [(100, "the metadata take"), (30_000, "token_embd.weight takes 100608")])
def test_files_that_are_too_small_are_refused(whole, tmp_path, limit, message):
    with pytest.raises(FewbitsError, match=message):
        containers.write(SplitGguf(most_bytes=limit), tmp_path / "split", containers.open(whole))
    assert not list(tmp_path.iterdir())


def test_no_limit_is_refused():
    for limits in ((None, None), (0, None), (None, -1)):
        with pytest.raises(FewbitsError, match="no limit"):
            SplitGguf(*limits)


def changed(path, **values):
    """The same file with other split keys."""
    file = gguf_file.read(path)
    data = [file.data(s).copy() for s in file.tensors.values()]
    metadata = dict(file.metadata) | {f"split.{k.replace('_', '.')}": v for k, v in values.items()}
    gguf_file.write(path, metadata, list(file.tensors.values()), data)


def test_a_missing_file_is_named(folder):
    parts(folder)[1].unlink()
    for start in (folder, parts(folder)[-1]):
        with pytest.raises(FewbitsError, match="model-00002-of-0000..gguf: is missing, one of the . files"):
            containers.open(start)


def test_files_that_do_not_belong_together_are_refused(folder, whole):
    files = parts(folder)
    kept = files[1].read_bytes()
    shutil.copyfile(files[2], files[1])
    with pytest.raises(FewbitsError, match=rf"{files[1].name}: says it is file 2 of .*1 of {len(files)} is"):
        containers.open(files[0])
    files[1].write_bytes(kept)
    changed(files[1], count=Value("UINT16", 9))
    with pytest.raises(FewbitsError, match=f"{files[1].name}: says it is file 1 of 9"):
        containers.open(files[0])
    shutil.copyfile(whole, files[1])
    with pytest.raises(FewbitsError, match=f"{files[1].name}: says it is file None of None"):
        containers.open(files[0])


def test_duplicate_and_lost_tensors_are_refused(folder):
    files = parts(folder)
    kept = files[1].read_bytes()
    shutil.copyfile(files[0], files[1])
    changed(files[1], no=Value("UINT16", 1))
    with pytest.raises(FewbitsError, match=f"{files[1].name}: tensor 'token_embd.weight' is in another file"):
        containers.open(folder)
    files[1].write_bytes(kept)
    changed(files[1], tensors_count=Value("INT32", 21))
    with pytest.raises(FewbitsError, match=f"{files[1].name}: split.tensors.count is 21, and the . files have 20"):
        containers.open(folder)


@pytest.mark.parametrize("value", [Value("STRING", "2"), Value("INT32", -1), Value("UINT32", 70_000)])
def test_a_wrong_count_is_refused(folder, value):
    first = parts(folder)[0]
    changed(first, count=value)
    with pytest.raises(FewbitsError, match=rf"{first.name}: split.count is"):
        containers.open(first)


def test_a_file_with_another_name_is_refused(folder):
    other = parts(folder)[0].rename(folder / "renamed.gguf")
    with pytest.raises(FewbitsError, match="renamed.gguf: is file 1 of the . of a split model, and not called so"):
        containers.open(other)


def test_a_folder_of_two_models_needs_a_choice(folder):
    shutil.copyfile(parts(folder)[0], folder / "other-00001-of-00002.gguf")
    with pytest.raises(FewbitsError, match="there are model-00001-.*, other-00001"):
        containers.open(folder)
