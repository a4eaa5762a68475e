"""What stands in `output_dir`: its checkpoints in the order in which they were written, and what a kill left there."""

import contextlib
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from perflow_diffusers.io.atomic import write_whole
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.manifest import MANIFEST, damage, read_manifest

logger = logging.getLogger(__name__)
STATE, FINISHED = "trainer_state.json", "finished.json"
PREFIX, ASIDE = "checkpoint-", "abandoned-"
OWN = tuple(f".{name}" for name in (PREFIX, ASIDE, FINISHED, "log", "perflow-"))  # temporary names, and the writer's


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint's `folder` (None: at the teacher), or not at all since it is `finished`."""

    folder: Path | None
    finished: bool = False


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the one that was written first first; damaged ones are among them."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted((path for path in found if is_checkpoint(path)), key=_written)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one, damaged or not: a missing file does not make it an unfinished one."""
    return (folder / MANIFEST).is_file() or (folder / STATE).is_file()


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step}"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))["step"]


def _written(folder: Path) -> tuple[float, int]:
    """When it was written; those of earlier versions have no manifest to say so."""
    number = folder.name.removeprefix(PREFIX)
    manifest, step = read_manifest(folder), int(number) if number.isdigit() else 0
    if manifest is not None:
        return manifest["written"], step
    state = folder / STATE
    return (state if state.is_file() else folder).stat().st_mtime, step


def write_time(output_dir: Path) -> float:
    """The time to write into a new checkpoint: now, but after that of all others, whatever the clock says."""
    others = checkpoints(output_dir)
    return max(time.time(), _written(others[-1])[0] + 1e-3) if others else time.time()


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None for a good one, and for one of before manifests."""
    if not (folder / MANIFEST).is_file():
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return f"{MANIFEST} is missing" if state.get("manifest") else None
        except (OSError, ValueError, AttributeError):
            return f"{STATE} is missing or damaged"
    return damage(folder)


def newest_good(found: list[Path]) -> Path | None:
    """The last of `found` that is undamaged; a warning names the damage of each later one."""
    for folder in reversed(found):
        problem = checkpoint_damage(folder)
        if problem is None:
            return folder
        logger.warning("%s is damaged: %s. The one before it is taken.", folder, problem)
    return None


def checked(folder: Path) -> Path:
    """`folder`, or ConfigError naming the damaged file and the newest good checkpoint beside it."""
    problem = checkpoint_damage(folder)
    if problem is None:
        return folder
    others = [path for path in checkpoints(folder.parent) if path.name != folder.name]
    earlier = [path for path in others if _written(path) < _written(folder)]
    good = next((path for path in reversed(earlier or others) if checkpoint_damage(path) is None), None)
    way_out = f"The newest good one before it is {good}: take that." if good else "There is no good one before it."
    raise ConfigError(f"The checkpoint {folder} is damaged: {problem}. {way_out}")


def find_checkpoint(config: TrainingConfig) -> list[Path]:
    """The checkpoints that `resume_from_checkpoint` can mean, best last; none for a fresh start. Reads no weights.

    Raises ConfigError for a name that is none, and for a fresh start over what an earlier run has left.
    """
    asked, out = config.resume_from_checkpoint, Path(config.output_dir)
    there = checkpoints(out)
    if not asked:
        _refuse_to_overwrite(out, there)
        return []
    if asked == "latest":
        return there
    for path in (Path(asked), out / asked):
        if is_checkpoint(path):
            return [path]
    have = ", ".join(path.name for path in there) or "none"
    raise ConfigError(f"`resume_from_checkpoint={asked}` is no checkpoint. In {config.output_dir} there are: {have}.")


def choose_start(config: TrainingConfig) -> Start:
    """Where this run begins, after reading all of the checkpoint; `latest` falls back from a damaged one and says so.

    Raises ConfigError for what `find_checkpoint` refuses, and for a damaged checkpoint.
    """
    found = find_checkpoint(config)
    if not found:
        return Start(None)
    folder = newest_good(found) if config.resume_from_checkpoint == "latest" else checked(found[0])
    if folder is None:
        raise ConfigError(
            f"All checkpoints in {config.output_dir} are damaged ({', '.join(path.name for path in found)}). Begin "
            "anew in another `output_dir`."
        )
    done = finished(config.output_dir)
    return Start(folder, done is not None and done["step"] == step_of(folder) >= config.max_train_steps)


def _refuse_to_overwrite(out: Path, there: list[Path]) -> None:
    done = finished(out)
    if done is not None:
        raise ConfigError(already_finished(out))
    if there:
        raise ConfigError(
            f"{out} holds {there[-1].name} of an earlier run. Go on with resume_from_checkpoint=latest, "
            "choose another `output_dir`, or delete the old one."
        )
    product = next(
        (name for name in ("perflow.safetensors", "unet", "lora", "artifact") if (out / name).exists()), None
    )
    if product:
        raise ConfigError(
            f"{out} holds `{product}` of an earlier run, which this one would overwrite. Choose another `output_dir`, "
            "or delete the old one."
        )


def already_finished(out: Path) -> str:
    """What is said when a finished run is started again."""
    return (
        f"{out} holds a finished run; nothing was done. Write its product anew or in other forms with: python "
        f"training/export_perflow.py {out}. Train it further with resume_from_checkpoint=latest and a larger "
        "`max_train_steps`. For a new run choose another `output_dir`."
    )


def finished(output_dir: str | Path) -> dict | None:
    """{step} of a run whose product is complete, else None."""
    try:
        content = json.loads((Path(output_dir) / FINISHED).read_text(encoding="utf-8"))
        return content if isinstance(content["step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark_finished(output_dir: str | Path, step: int) -> None:
    """Says that the product of `step` is complete."""
    write_whole(Path(output_dir) / FINISHED, json.dumps({"step": step}))


def begin_branch(output_dir: str | Path, step: int) -> None:
    """Moves the checkpoints of later steps than `step` aside: the run goes on from there on another branch."""
    out = Path(output_dir)
    (out / FINISHED).unlink(missing_ok=True)
    for later in [path for path in checkpoints(out) if int(path.name[len(PREFIX) :]) > step]:
        logger.warning(
            "%s is of a later step than %d, where this run begins: it is now %s.", later, step, aside(later)
        )


def aside(folder: Path) -> Path:
    """Renames a checkpoint so that it is none of the run's any more, and can still be named; returns its new name."""
    target, number = folder.with_name(f"{ASIDE}{folder.name}"), 2
    while target.exists():
        target, number = folder.with_name(f"{ASIDE}{folder.name}-{number}"), number + 1
    os.replace(folder, target)
    return target


def put_in_place(temporary: Path, folder: Path) -> None:
    """Renames a complete checkpoint to its name; one of the same step stays visible until the new one is there."""
    old = aside(folder) if folder.exists() else None
    os.replace(temporary, folder)
    if old is not None:
        remove(old)


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """Deletes all but the `limit` checkpoints that were written last."""
    for old in checkpoints(output_dir)[:-limit] if limit else []:
        remove(old)


def remove(folder: Path) -> None:
    """Deletes a folder that counts for nothing from the first moment; what cannot be deleted stays with a warning."""
    doomed = folder.with_name(f".{folder.name}.deleted.tmp")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("%s could not be deleted (%s): delete it by hand.", folder, error)


def tidy(output_dir: Path) -> None:
    """Cleans up after a kill: a checkpoint that was complete gets its place, anything half-written goes.

    Only for a run that has `output_dir` for itself.
    """
    for path in sorted(output_dir.glob(".*.tmp")):
        if not path.name.startswith(OWN):
            continue
        name = path.name.removeprefix(".").removesuffix(".tmp").removesuffix(".old")
        whole = name.startswith(PREFIX) and name[len(PREFIX) :].isdigit() and is_checkpoint(path)
        # without a manifest only the copies that earlier versions moved away are known to be complete
        whole = whole and ((path / MANIFEST).is_file() or path.name.endswith(".old.tmp"))
        if whole and not (output_dir / name).exists() and checkpoint_damage(path) is None:
            os.replace(path, output_dir / name)
            logger.info("%s was complete when the last run was killed: it is kept.", output_dir / name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
