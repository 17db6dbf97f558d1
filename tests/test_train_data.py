"""What is read, how it is split, and that a batch is a function of (seed, step, micro-batch, rank)."""

from pathlib import Path

import pytest
import torch

from commq.train.data import Corpus, load_corpus, train_batch, val_batches

CONTEXT = 16


def load(path: Path | None, *, max_mb: float = 1.0) -> Corpus:
    return load_corpus(path, max_mb=max_mb, context=CONTEXT)


def content(corpus: Corpus) -> bytes:
    return bytes(torch.cat([corpus.train, corpus.val]).tolist())


def test_a_file_is_split_into_nine_tenths_and_the_last_tenth(tmp_path):
    text = bytes(range(256)) * 4
    (tmp_path / "text").write_bytes(text)
    corpus = load(tmp_path / "text")
    assert content(corpus) == text
    assert len(corpus.val) == len(text) // 10


def test_a_folder_is_read_in_an_order_of_its_own(tmp_path):
    names = ["b.txt", "a.txt", "deep/c.bin", "deep/er/d"]
    for folder in ("one", "two"):
        for name in names if folder == "one" else reversed(names):
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode() * 50)
        (tmp_path / folder / ".hidden").write_bytes(folder.encode())
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert content(one) == content(two)
    assert one.digest == two.digest
    assert len(content(one)) == 50 * sum(map(len, names))


def test_no_more_is_read_than_asked_for(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 5000)
    assert len(content(load(tmp_path / "text", max_mb=0.003))) == 3000


def test_without_a_path_the_standard_library_is_read():
    corpus = load(None)
    assert len(content(corpus)) == 1_000_000
    assert b"def " in content(corpus)


def test_the_digest_changes_with_a_byte(tmp_path):
    digests = set()
    for text in (b"x" * 1000, b"x" * 999 + b"y"):
        (tmp_path / "text").write_bytes(text)
        digests.add(load(tmp_path / "text").digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: path.write_bytes(b"x" * 169), "has 169 bytes.* at least 170 are needed"),
    ],
    ids=["missing", "empty file", "empty folder", "too short"],
)
def test_data_that_cannot_be_used_is_an_error_that_says_why(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "data")


def test_the_shortest_data_works(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 170)
    corpus = load(tmp_path / "text")
    batch = train_batch(corpus.train, seed=0, step=1, micro=0, rank=0, rows=3, context=CONTEXT)
    (val,) = val_batches(corpus.val, count=3, rank=0, world_size=1, rows=8, context=CONTEXT)
    assert batch.shape == val.shape == (3, CONTEXT + 1)


def test_a_batch_depends_on_each_of_its_keys_and_on_nothing_else():
    tokens = torch.arange(100_000)
    keys = {"seed": 0, "step": 1, "micro": 0, "rank": 0}

    def batch(**changed: int) -> torch.Tensor:
        return train_batch(tokens, **(keys | changed), rows=4, context=CONTEXT)

    first = batch()
    assert torch.equal(first, first[:, :1] + torch.arange(CONTEXT + 1))
    assert len(set(first[:, 0].tolist())) == 4
    torch.rand(7)
    assert torch.equal(batch(), first)
    for key, value in keys.items():
        assert not torch.equal(batch(**{key: value + 1}), first), key


def test_ranks_share_the_validation_sequences():
    tokens = torch.arange(1000)

    def starts(rank: int, world_size: int) -> list[int]:
        batches = val_batches(tokens, count=50, rank=rank, world_size=world_size, rows=8, context=CONTEXT)
        return [start for batch in batches for start in batch[:, 0].tolist()]

    alone = starts(0, 1)
    assert (alone[0], alone[-1]) == (0, 1000 - CONTEXT - 1)
    assert len(alone) == 50
    assert sorted(starts(0, 3) + starts(1, 3) + starts(2, 3)) == alone
