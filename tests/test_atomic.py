import contextlib
import os
import stat
import tempfile
from pathlib import Path

import pytest

from hf_minigpt.atomic import atomic_file, atomic_folder, follow_umask
from hf_minigpt.classification.data import write_texts
from hf_minigpt.data.corpora import load_documents, stream_documents
from hf_minigpt.data.streaming import prepare_stream
from hf_minigpt.pretraining.data import prepare_data
from hf_minigpt.training.arguments import DataArguments, ModelArguments


UMASKS = [0o022, 0o002, 0o077]


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def assert_modes_of_new_files(path, mask):
    for each in [path, *path.rglob("*")]:
        assert stat.S_IMODE(each.stat().st_mode) == (0o777 if each.is_dir() else 0o666) & ~mask, each


def private_file(folder):
    """Create a file as libraries do that write through `tempfile`."""
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    return Path(name)


@pytest.mark.parametrize("mask", UMASKS)
def test_folder_gets_the_permissions_of_new_files(mask, tmp_path):
    with umask(mask), atomic_folder(tmp_path / "cache" / "store") as work:
        private_file(work)
        private_file(tempfile.mkdtemp(dir=work))
        assert not (tmp_path / "cache" / "store").exists()
    assert_modes_of_new_files(tmp_path / "cache" / "store", mask)
    assert len(list((tmp_path / "cache").rglob("*"))) == 4


@pytest.mark.parametrize("mask", UMASKS)
def test_file_gets_the_permissions_of_new_files_and_is_replaced_atomically(mask, tmp_path):
    path = tmp_path / "figures.jsonl"
    for text in ("old", "new"):
        before = path.read_text() if path.exists() else None
        with umask(mask), atomic_file(path) as work:
            assert work.suffix == path.suffix
            private_file(tmp_path).replace(work)
            work.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert_modes_of_new_files(path, mask)
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="disk on fire"), atomic_file(path) as work:
        work.write_text("half")
        raise OSError("disk on fire")
    with pytest.raises(OSError, match="disk on fire"), atomic_folder(tmp_path / "folder") as work:
        (work / "half").write_text("half")
        raise OSError("disk on fire")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_folder_of_the_first_of_two_writers_is_kept(tmp_path):
    with atomic_folder(tmp_path / "store") as second:
        (second / "by").write_text("second")
        with atomic_folder(tmp_path / "store") as first:
            (first / "by").write_text("first")
    assert (tmp_path / "store" / "by").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


def test_executables_stay_executable_and_links_are_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    program = tmp_path / "folder" / "program"
    program.write_text("")
    program.chmod(0o700)
    outside = private_file(tmp_path)
    (tmp_path / "folder" / "link").symlink_to(outside)
    with umask(0o022):
        follow_umask(tmp_path / "folder")
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600


@pytest.mark.parametrize("mask", UMASKS)
def test_cached_files_are_readable_by_other_users(mask, tmp_path):
    model_args = ModelArguments(preset="minigpt-pico", vocab_size=320)
    data_args = DataArguments(dataset=None, max_examples=20, cache_dir=str(tmp_path / "cache"))
    texts = [f"{number}: {text}" for number, text in enumerate(["some text"] * 20)]
    with umask(mask):
        documents = load_documents(max_examples=20)
        tokenizer, _ = prepare_data(model_args, data_args, documents)
        write_texts(texts, tmp_path / "cache" / "texts.parquet")
        shards = stream_documents(tmp_path / "cache" / "texts.parquet")
        prepare_stream(shards, tokenizer, tmp_path / "cache", num_sampled=20, validation_fraction=0.5)
    names = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert {"tokenizer.json", "tokens.bin", "offsets.npy", "manifest.json", "texts.parquet"} <= names
    assert_modes_of_new_files(tmp_path / "cache", mask)
