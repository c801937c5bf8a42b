import math

import torch

from examples.decoder.text import TextDataModule, Windows, documents, split, unigram_entropy


def test_the_text_is_the_same_every_time() -> None:
    assert split(500_000) == split(500_000)


def test_training_and_validation_share_no_document() -> None:
    train, validation = split(10**9)
    assert len(train) + len(validation) + 1 == sum(len(text) + 1 for text in documents().values()) - 1
    longest = max(documents().values(), key=len)
    assert (longest in train) != (longest in validation)
    assert len(validation) > 100_000


def test_limits_are_kept() -> None:
    train, validation = split(100_000)
    assert (len(train), len(validation)) == (100_000, 10_000)


def test_entropy_of_even_bytes_is_the_logarithm_of_their_number() -> None:
    assert math.isclose(unigram_entropy(b"abcd" * 10), math.log(4))
    assert unigram_entropy(b"aaaa") == 0.0


def test_targets_are_the_tokens_one_byte_later() -> None:
    windows = Windows(b"abcdefghi", 4)
    assert len(windows) == 2
    tokens, targets = windows[1]
    assert (bytes(tokens.tolist()), bytes(targets.tolist())) == (b"efgh", b"fghi")
    assert tokens.dtype == torch.int64


def test_batches_have_the_asked_shape() -> None:
    data = TextDataModule(sequence_length=16, batch_size=4, num_bytes=20_000)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        tokens, targets = next(iter(loader))
        assert tokens.shape == targets.shape == (4, 16)
