"""Whatever happens while a checkpoint is written or after it, what is there to be seen is whole, or refused by name."""

from __future__ import annotations

import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_ted.checkpoint import directory
from lightning_ted.checkpoint.directory import MANIFEST, Manifest
from lightning_ted.checkpoint.distributed import Source
from lightning_ted.checkpoint.files import check_file, read_file
from lightning_ted.errors import CheckpointError
from tests.distributed.test_resuming_exactly import Module
from tests.support.mortals import Mortals, answers
from tests.support.runs import Toy, assert_same_everywhere, loader, trainer, whole_weights
from tests.support.strikes import Strike, Watch

SEED = 20
RANKS, LAYOUT, STEPS = 2, "ep2", 5
FORMS = ["directory", "replacing", "background", "file", "file replacing"]


# -- killed ----------------------------------------------------------------------------------------------------------------


class _Notes(Callback):
    """Notes which steps training begins and ends with."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begin = trainer.global_step


def _fit(folder: str, form: str, strike: Strike | None = None, path: str | None = None) -> dict[str, Any]:
    """A step more than an epoch, with two checkpoints behind each: one replaces `last.ckpt`, one the one of the step before."""
    if "replacing" in form:  # a system that cannot exchange two directories
        directory._exchange = lambda *_: False
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    callbacks = [watch := Watch(strike), notes := _Notes(), saver]
    options = {"max_steps": STEPS, "max_epochs": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
    run = trainer(f"{LAYOUT} file" if "file" in form else LAYOUT, callbacks=callbacks, **options)
    run.strategy._async_save = form == "background"
    _note_saves(run, f"{folder}.saved", behind=int(form == "background"))
    run.fit(Module(stateful=True), ckpt_path=path)
    return {"weights": whole_weights(run), "begin": notes.begin, "counts": watch.counts, "steps": run.global_step}


def _note_saves(run: Any, path: str, behind: int) -> None:
    """Write down the step of each checkpoint that is known to be written: in the background, of the one before."""
    save, saved = run.strategy.save_checkpoint, []

    def noted(checkpoint: dict[str, Any], filepath: str, **options: Any) -> None:
        save(checkpoint, filepath, **options)
        saved.append(f"{Path(filepath).name.partition('=')[0]} {checkpoint['global_step']}\n")
        if run.is_global_zero and len(saved) > behind:
            with open(path, "a") as file:
                file.write(saved[-1 - behind])

    run.strategy.save_checkpoint = noted


@dataclass
class Uninterrupted:
    """What a run does that is not killed.

    Attributes:
        weights: In the end.
        counts: How often which rank did what, by form.

    """

    weights: dict[str, Tensor]
    counts: dict[str, list[dict[str, int]]]


@pytest.fixture(scope="module")
def uninterrupted(mortals: Mortals, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    counts, weights = {}, {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        found = answers(mortals.run(RANKS, _fit, str(folder), form))
        counts[form] = [answer["counts"] for answer in found]
        weights[form] = found[0]["weights"]
        assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=5.ckpt"]
        assert found[0]["steps"] == STEPS
    assert_same_everywhere(list(weights.values()))
    return Uninterrupted(weights["directory"], counts)


#: Of each form, at what it is killed: a part of what a save does.
INSIDE = [
    ("directory", "within write"),
    ("directory", "fsync"),
    ("directory", "manifest"),
    ("directory", "exchange"),
    ("directory", "unlink"),
    ("replacing", "rename"),
    ("replacing", "rmdir"),
    ("background", "gather_object"),
    ("background", "publish"),
    ("file", "write"),
    ("file replacing", "rename"),
]
OUTSIDE = [
    ("directory", "on_after_backward"),
    ("directory", "on_before_optimizer_step"),
    ("background", "on_train_batch_start"),
    ("background", "on_train_batch_end"),
    ("file", "on_train_epoch_end"),
    *((form, "time") for form in FORMS),
]


MOMENTS = [(number, *moment) for number, moment in enumerate(INSIDE + OUTSIDE)]


@pytest.mark.parametrize(("number", "form", "event"), MOMENTS)
def test_a_run_that_was_killed_goes_on_from_a_whole_checkpoint_to_the_same_bits(
    mortals: Mortals, uninterrupted: Uninterrupted, tmp_path: Path, number: int, form: str, event: str
) -> None:
    strike = _chosen(random.Random(f"{SEED} {number}"), uninterrupted.counts[form], event)
    folder = tmp_path / "run"
    ends = mortals.run(RANKS, _fit, str(folder), form, strike, timeout=30)
    codes = [end.code for end in ends]
    assert codes[strike.rank] == -9 and codes[1 - strike.rank] == 1, f"{strike} (seed {SEED}): {ends}"

    saved = _saved(Path(f"{folder}.saved"))
    steps = {path.name: _step_if_whole(path) for path in folder.glob("[!.]*")} if folder.exists() else {}
    assert max(steps.values(), default=0) >= max(saved.values(), default=0), f"{strike} (seed {SEED})"
    resumed = answers(mortals.run(RANKS, _fit, str(folder), form, None, "last"))
    assert all(answer["begin"] >= saved.get("last.ckpt", 0) for answer in resumed), f"{strike} (seed {SEED})"
    assert_same_everywhere([uninterrupted.weights, *(answer["weights"] for answer in resumed)])
    left = {path.name for path in folder.iterdir()} - steps.keys()
    assert left <= {"last.ckpt", "step=5.ckpt", "step=5-v1.ckpt"}, f"{strike} (seed {SEED})"


def _chosen(chance: random.Random, counts: list[dict[str, int]], event: str) -> Strike:
    """A random one of the events of that kind, on a random rank."""
    if event == "time":
        return Strike(chance.randrange(RANKS), event, chance.randrange(600))
    found = [
        (rank, name, counts[rank][name]) for rank in range(RANKS) for name in sorted(counts[rank]) if event in name
    ]
    rank, name, count = chance.choice(found)
    return Strike(rank, name, chance.randint(1, count))


def _saved(notes: Path) -> dict[str, int]:
    """The last step of which a checkpoint is known to have been written, by the name."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    return {name: int(step) for name, _, step in (line.rpartition(" ") for line in lines)}


def _step_if_whole(path: Path) -> int:
    if path.is_dir():
        manifest = Manifest.read(path)
        manifest.check(path)
        return manifest.info["global_step"]
    check_file(path)
    return read_file(path, True)["global_step"]


# -- damaged ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(mortals: Mortals, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each form."""
    folder = tmp_path_factory.mktemp("written")
    for form in ("directory", "file"):
        answers(mortals.run(RANKS, _write, form, str(folder / form)))
    return {form: folder / form for form in ("directory", "file")}


def _write(form: str, path: str) -> None:
    run = trainer("tp2 file" if form == "file" else "tp2", max_steps=1)
    run.fit(Toy(), loader())
    run.save_checkpoint(path)


def _told(value: Any) -> Any:
    """Something that equals another one if two values hold the same."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, _told(item)) for key, item in value.items()]
    return [_told(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(path: Path) -> Any:
    """All that a checkpoint holds, in the way in which the strategy reads it."""
    if path.is_dir():
        source = Source(path, None)
        parts = (source.model, source.training)
        tensors = [{name: part.whole(name) for name in part.shapes} for part in parts if part is not None]
        return _told([tensors, source.state, source.ranks, dict(source.manifest.info)])
    if zipfile.is_zipfile(path):
        check_file(path)
    return _told(read_file(path, True))


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice((0, 1, len(data) // 2, len(data) - 1, chance.randrange(len(data))))]


def _flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _zero(data: bytes, chance: random.Random) -> bytes:
    """A block that was never written."""
    at = chance.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]


def _lengthen(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randint(1, 100))


def _is_refused(path: Path, want: Any, file: Path, damaged: bytes | None, what: str) -> bool:
    """Whether a checkpoint is refused one of whose files is damaged, or missing; if not, it has to hold what it did."""
    good = file.read_bytes()
    try:
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert _read(path) == want, what
    except CheckpointError as error:
        assert str(file) in str(error) or (damaged is None and str(path) in str(error)), f"{what}: {error}"
        return True
    finally:
        file.write_bytes(good)
    return False


@pytest.mark.parametrize("form", ["directory", "file"])
def test_damage_anywhere_is_refused_by_the_name_of_the_file(written: dict[str, Path], form: str) -> None:
    path, chance = written[form], random.Random(SEED)
    want = _read(path)
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    for number in range(120):
        file, damage = files[number % len(files)], chance.choice((_truncate, _flip, _flip, _zero, _lengthen))
        data = file.read_bytes()
        damaged = damage(data, chance)
        what = f"{damage.__name__} {file} (damage {number} of seed {SEED})"
        if damaged != data and not _is_refused(path, want, file, damaged, what):
            assert form == "file" or file.name == MANIFEST, what  # padding, white space
