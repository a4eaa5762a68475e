"""Distils a diffusers pipeline with PeRFlow and writes the few-step student and its delta.

    python training/train_perflow.py --config training/configs/tryout.yaml output_dir=out
    accelerate launch --config_file training/configs/accelerate/ddp.yaml training/train_perflow.py --config ...

Every option of training/configs/reference.yaml can stand in the YAML file or as name=value after it.
"""

import perflow_training.quiet  # isort: skip  # first: what follows takes seconds to import

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from perflow_diffusers.families import sole_network
from perflow_training.config import ConfigError, TrainingConfig, load_config, reference, trackers
from perflow_training.data import DataError
from perflow_training.diagnostics import TrainingStopped
from perflow_training.export import open_base, write_products
from perflow_training.launch import make_accelerator, with_launcher
from perflow_training.loader import CachedLoader, EncodingLoader, Loader
from perflow_training.log import append_log
from perflow_training.objective import windows_of
from perflow_training.processes import by_main, check_number, claimed
from perflow_training.recipe import completed, spelt, watched
from perflow_training.rng import Draws
from perflow_training.run_folder import already_finished, choose_start, find_checkpoint, mark_finished, step_of, tidy
from perflow_training.solves import PipelineSolves, Solves
from perflow_training.stopping import Stopped, Stopping
from perflow_training.student import DTYPES
from perflow_training.teacher.backbone import teacher_of
from perflow_training.teacher.encode import Pipeline, latent_size
from perflow_training.teacher.load import folder_of, load_pipeline
from perflow_training.teacher.observed import is_flow
from perflow_training.trainer import Trainer
from perflow_training.trajectories import CachedSolves
from perflow_training.validation import ObservedValidation, Validation

logger = logging.getLogger("perflow_training.run")
EXPORT = Path(__file__).with_name("export_perflow.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="YAML file of options, for example training/configs/miniature.yaml"
    )
    parser.add_argument("--reference", action="store_true", help="print every option, its default and its meaning")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options that replace those of the file")
    args = parser.parse_args()
    if args.reference:
        print(reference(), end="")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    perflow_training.quiet.calm()
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        run(load_config(args.config, args.overrides))
    except (ConfigError, DataError, OSError) as error:
        parser.error(str(error))
    except TrainingStopped as error:
        sys.exit(f"stopped: {error}")
    except NotExported as error:
        sys.exit(str(error))
    except Stopped as stopped:
        sys.exit(stopped.code)


class NotExported(RuntimeError):
    """The training is done and its product could not be written; the message says where the weights are."""


def run(config: TrainingConfig) -> None:
    """Everything from the options to the files.

    Raises ConfigError or DataError for what cannot be used, TrainingStopped for a run that cannot become good, Stopped
    if a signal ended it, and NotExported if only the product could not be written.
    """
    config = with_launcher(config)
    find_checkpoint(config)  # a wrong name is refused before anything is loaded
    with Stopping() as stopping:
        try:
            accelerator = make_accelerator(config)
            check_number(accelerator)
            stopping.among(accelerator.num_processes, accelerator.process_index, accelerator.device)
            with claimed(accelerator, Path(config.output_dir)):
                _run(config, accelerator, stopping)
        except Stopped as stopped:
            if stopping.speaks:
                logger.warning("%s: the run has ended. %s", stopped.signal.name, stopped.kept)
            raise


def _run(config: TrainingConfig, accelerator: Accelerator, stopping: Stopping) -> None:
    if not accelerator.is_main_process:
        logging.getLogger("perflow_training").setLevel(logging.WARNING)
    out = Path(config.output_dir)
    by_main(accelerator, lambda: tidy(out))
    start = by_main(accelerator, lambda: choose_start(config))
    if start.finished:
        logger.info("%s", already_finished(out))
        return
    draws = Draws(config.seed, accelerator.process_index, accelerator.num_processes)
    set_seed(config.seed)  # for the LoRA's first factors, which are the same on every process
    trainer, loader = _trainer(config, accelerator, draws, stopping)
    set_seed(config.seed, device_specific=True)  # for dropout, which is not
    if trackers(config):
        flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.to_dict().items()}
        accelerator.init_trackers(config.tracker_project_name, config=flat)
    try:
        trainer.start(start.folder)
        on_log = append_log(out / "log.jsonl", trainer.step) if accelerator.is_main_process else None
        weights = trainer.train(on_log)
    except Stopped as stopped:
        stopped.kept = _kept(trainer, trainer.saved or start.folder)
        raise
    finally:
        loader.close()
        try:
            accelerator.end_training()
        except OSError as error:  # of a tracker; the product is still to be written
            logger.warning("The last lines of `report_to` could not be written (%s).", error)
    del loader  # with its encoders
    if accelerator.is_main_process:
        _export(trainer.config, trainer, weights, stopping)


def _export(config: TrainingConfig, trainer: Trainer, weights: Mapping[str, Tensor], stopping: Stopping) -> None:
    """Writes the product, after saying how it can be written again should this not come to its end."""
    out = Path(config.output_dir)
    if trainer.saved is not None and step_of(trainer.saved) == trainer.step:
        command = _export_command(trainer.saved, out, config.forms)
        again = f"Its weights are in {trainer.saved}; write the product with: {command}"
    else:
        again = f"Its last weights could not be saved; the newest checkpoint is {trainer.saved or 'none'}."
    logger.info("The training is done, and its product is written now. Should that fail: %s", again)
    try:
        if stopping.asked:  # too late for the processes to agree on it
            raise Stopped(stopping.asked)
        trainer.release()  # so that the product needs no more memory than the training did
        paths = write_products(config, weights, out, base=open_base(config, trainer.base))
        mark_finished(out, trainer.step)
    except Stopped as stopped:
        stopped.kept = f"The training is done, its product is not written. {again}"
        raise
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)):
            logger.exception("The product could not be written:")
        raise NotExported(f"The training is done, but its product could not be written ({error}). {again}") from error
    print("\n".join(f"{form}: {path}" for form, path in paths.items()))


def _export_command(checkpoint: Path, out: Path, forms: Sequence[str]) -> str:
    script = os.path.relpath(EXPORT) if EXPORT.is_relative_to(Path.cwd()) else str(EXPORT)
    return shlex.join(["python", script, str(checkpoint), "--out", str(out), "--form", *forms])


def _kept(trainer: Trainer, saved: Path | None) -> str:
    """What a signal has left, for its last message."""
    step = trainer.step
    if saved is None:
        return f"Nothing is saved: step {step}." if step else "Nothing is saved: no step had been taken."
    lost = step - step_of(saved)
    said = f"Saved: {saved}; the same command with resume_from_checkpoint=latest goes on from there."
    return f"{said} The last {lost} steps are lost." if lost > 0 else said


def _trainer(
    config: TrainingConfig, accelerator: Accelerator, draws: Draws, stopping: Stopping
) -> tuple[Trainer, Loader | Solves]:
    """The trainer with its material; from a cache, neither VAE nor text encoders are loaded."""
    cached = bool(config.train_cache_dir)
    if cached and config.validation_steps:
        raise ConfigError(
            "`validation_steps` needs the VAE and the text encoders, which `train_cache_dir` keeps out of memory. Set "
            "validation_steps=0, or train without the cache."
        )
    pipe: Pipeline = load_pipeline(config, encoders=not cached)
    config = completed(config, pipe)
    if is_flow(pipe):
        return _watched(config, pipe, accelerator, draws, stopping)
    teacher = teacher_of(pipe, config.rescale_betas_zero_snr)
    if cached:
        network: Any = teacher.network
        shape = (network.config.in_channels, *latent_size(network.config))
        loader: Loader = CachedLoader(shape, config, draws, accelerator.device)
    else:
        _place(pipe, accelerator, teacher.network)
        loader = EncodingLoader(pipe, config, draws, accelerator.device)
    validate = None
    if config.validation_steps:
        windows = windows_of(config, teacher.path.num_train_timesteps)
        validate = Validation(pipe, config, windows, accelerator, stopping)
    trainer = Trainer(config, teacher, loader, accelerator, draws, validate, stopping, folder_of(pipe))
    return trainer, loader


def _watched(
    config: TrainingConfig, pipe: Pipeline, accelerator: Accelerator, draws: Draws, stopping: Stopping
) -> tuple[Trainer, Solves]:
    """The trainer of a base that is learnt by watching its pipeline, whose own runs it is trained on."""
    network = sole_network(pipe, ConfigError)
    if config.train_cache_dir:
        cached = CachedSolves(config.train_cache_dir, config, draws, accelerator.device)
        config = spelt(config, cached.windows, network, cached.guidance_scale)
        logger.info("%r, from %d files of trajectories in %s.", cached.windows, len(cached.files), cached.folder)
        teacher = cached.backbone(network)
        return Trainer(config, teacher, cached, accelerator, draws, None, stopping, folder_of(pipe)), cached
    _place(pipe, accelerator, network)
    network.to(accelerator.device, DTYPES[accelerator.mixed_precision]).eval()
    config, observed, windows = watched(config, pipe)
    logger.info(
        "Watched %s: %s, replayed with a difference of %.2g.", type(pipe).__name__, observed.call, observed.residual
    )
    logger.info("%r, solved by %d steps of the pipeline each.", windows, config.solver_steps)
    if observed.guided.name is None:
        logger.warning(
            "%s is neither guided nor told a guidance scale. If its base was distilled for a few steps (schnell, "
            "turbo), there is nothing left to accelerate: train on the base that it was made from.",
            type(pipe).__name__,
        )
    solves = PipelineSolves(observed, config, windows, draws, accelerator.device)
    validate = None
    if config.validation_steps:
        validate = ObservedValidation(observed, config, windows, accelerator, stopping)
    teacher = observed.backbone()
    trainer = Trainer(config, teacher, solves, accelerator, draws, validate, stopping, folder_of(pipe))
    return trainer, solves


def _place(pipe: Pipeline, accelerator: Accelerator, network: Any) -> None:
    """Everything beside the network in its place, frozen: text encoders as coarse as the teacher, VAE in float32."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and part is not network:
            dtype = DTYPES[accelerator.mixed_precision] if name.startswith("text_encoder") else None
            part.to(accelerator.device, dtype).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
