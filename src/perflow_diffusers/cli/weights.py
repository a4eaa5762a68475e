"""Commands on weight files: diff, merge, extract-lora, combine, convert."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from perflow_diffusers.cli.terminal import check_free, check_out, failing, note, progress_bar, replacing
from perflow_diffusers.cli.where import with_hub_options

ANYTHING = "A .safetensors file, a model or pipeline folder, a short name or a Hub id."
Force = Annotated[bool, typer.Option("--force", help="Replace what is at OUT, a folder as a whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]

StoredDtype = Literal["float16", "bfloat16", "float32"]
Form = Literal["diffusers", "kohya", "float16", "bfloat16", "int8", "comfy"]
BaseEma = Annotated[bool, typer.Option("--base-ema", help="Of BASE, an original-format checkpoint, the EMA weights.")]
PerflowType = Literal["ddim_eps", "diff_eps", "velocity"]


@with_hub_options("base", "tuned")
def diff(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model before: file, folder, pipeline folder, Hub id.")
    ],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model after: the few-step student.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The delta: a .safetensors file, or a folder with --shard-size.")
    ],
    base_where: dict[str, Any],
    tuned_where: dict[str, Any],
    dtype: Annotated[StoredDtype | None, typer.Option(help="Stored as; default: the wider one of the two.")] = None,
    prediction_type: Annotated[PerflowType | None, typer.Option(help="How the student was trained.")] = None,
    num_time_windows: Annotated[int | None, typer.Option(min=1, help="How many windows it was trained with.")] = None,
    recommended_steps: Annotated[
        list[int] | None, typer.Option(help="Steps it is good at; repeat for several.")
    ] = None,
    recommended_guidance_scale: Annotated[float | None, typer.Option(help="Guidance to sample with.")] = None,
    drop_identical: Annotated[
        bool, typer.Option("--drop-identical", help="Leave tensors out that are equal in both.")
    ] = False,
    round_base: Annotated[
        bool,
        typer.Option("--round-base", help="Round a base of a finer dtype (float32) to that of TUNED (float16) first."),
    ] = False,
    base_ema: BaseEma = False,
    tuned_ema: Annotated[
        bool, typer.Option("--tuned-ema", help="Of TUNED, an original-format checkpoint, the EMA weights.")
    ] = False,
    shard_size: Annotated[float | None, typer.Option(help="Write shards of at most this many GB.")] = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Make a delta: TUNED minus BASE, tensor by tensor.

    What the options say of the training travels in the header, so that loading the delta can set the scheduler.

    Examples:

        perflow diff sd15-unet out/unet perflow.safetensors --prediction-type ddim_eps --num-time-windows 4

        perflow diff v1-5-pruned.safetensors civitai-turbo.safetensors turbo.safetensors --dtype float16
    """
    import torch

    from perflow_diffusers.weights import check_delta, compute_delta, open_weights

    metadata: dict[str, Any] = {
        "prediction_type": prediction_type if prediction_type else None,
        "num_time_windows": num_time_windows,
        "recommended_steps": recommended_steps,
        "recommended_guidance_scale": recommended_guidance_scale,
    }
    with failing("diff"):
        if shard_size is None and out.suffix == "":
            raise ValueError(f"{out} has no ending: a delta is one .safetensors file, or a folder with --shard-size.")
        check_out(out, force, file=shard_size is None, folder=shard_size is not None)
        first = open_weights(base, extract_ema=base_ema, **base_where)
        second = open_weights(tuned, extract_ema=tuned_ema, **tuned_where)
        if dry_run:
            typer.echo(f"{check_delta(first, second, round_base=round_base)}\nDry run: {out} was not written.")
            return
        with progress_bar("diff") as progress, replacing(out) as (place, told):
            delta = compute_delta(
                first,
                second,
                place,
                dtype=getattr(torch, dtype) if dtype else None,
                metadata={key: value for key, value in metadata.items() if value is not None},
                drop_identical=drop_identical,
                round_base=round_base,
                max_shard_size=int(shard_size * 1e9) if shard_size else None,
                overwrite=force,
                progress=progress,
            )
        typer.echo(told(delta))
        if len(delta.identical) == len(delta):
            note("diff", f"nothing differs between {base} and {tuned}: the delta changes no weight.")
        elif prediction_type is None:
            note("diff", "a scheduler will ask how the student was trained. Say it in the header: --prediction-type.")


@with_hub_options("base", "delta")
def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model: file, UNet folder, pipeline folder, Hub id.")
    ],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="What is added: a delta or a LoRA, of any form.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors file, or a folder that UNet2DConditionModel loads.")
    ],
    base_where: dict[str, Any],
    delta_where: dict[str, Any],
    scale: Annotated[
        str,
        typer.Option(help="Strength; 1 is the full delta. By block: 'down=0.8,mid=1', 'up_blocks.1=0.5', or JSON."),
    ] = "1",
    conv_in: Annotated[
        Literal["pad", "skip"], typer.Option(help="A wider conv_in (inpainting): pad or skip it.")
    ] = "pad",
    base_ema: BaseEma = False,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Write BASE + scale x DELTA as a new UNet, from file to file.

    In a running pipeline use `merge_delta` instead: it needs no file, and can be undone.

    Examples:

        perflow merge Lykon/dreamshaper-8 perflow-sd15-delta dreamshaper-perflow-unet

        perflow merge owner/sd15 owner/turbo merged --base-variant fp16 --delta-revision v2

        perflow merge unet.safetensors style-lora.safetensors merged.safetensors --scale 0.8

        perflow merge unet.safetensors style-lora.safetensors merged.safetensors --scale down=0.5,mid=1,IN00=0
    """
    from perflow_diffusers.weights import merge_files, open_weights
    from perflow_diffusers.weights.scales import parse_scale

    with failing("merge"):
        check_out(out, force, folder=True)
        with progress_bar("merge") as progress, replacing(out, dry_run) as (place, told):
            report = merge_files(
                open_weights(base, extract_ema=base_ema, **base_where),
                open_weights(delta, **delta_where),
                place,
                scale=parse_scale(scale),
                conv_in=conv_in,
                overwrite=force,
                dry_run=dry_run,
                progress=progress,
            )
    typer.echo(told(report))
    if dry_run:
        typer.echo(f"Dry run: {out} was not written.")


@with_hub_options()
def extract_lora(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help=ANYTHING)],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors file, or a folder that load_lora_weights reads.")
    ],
    where: dict[str, Any],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The same rank for every layer; default: 64, if --energy is not given either."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Per layer the smallest rank that keeps this share of its energy (at most --rank, if given).",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0.0, help="alpha of every layer; default: its rank. The change stays the same.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Full singular value decomposition instead of the randomised one.")
    ] = False,
    residual: Annotated[
        bool, typer.Option(help="Keep biases and norms, which a LoRA cannot carry, in a small file beside it.")
    ] = True,
    dtype: Annotated[StoredDtype, typer.Option(help="Stored as.")] = "float16",
    report: Annotated[Path | None, typer.Option(help="Write the report, layer by layer, to this JSON file.")] = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Turn a delta into a LoRA that plain diffusers loads.

    ComfyUI and others load it, too.

    Examples:

        perflow extract-lora perflow.safetensors perflow-lora --rank 64

        perflow extract-lora perflow.safetensors perflow-lora.safetensors --energy 0.9 --report report.json
    """
    import torch

    from perflow_diffusers.io.writer import write_text
    from perflow_diffusers.weights import check_extract, extract_lora, open_weights

    with failing("extract-lora"):
        check_out(out, force, folder=True)
        if report is not None:
            check_free(report, force)
        source = open_weights(delta, **where)
        if dry_run:
            said = check_extract(source, rank=rank, energy=energy, alpha=alpha)
            typer.echo(f"{said}\nDry run: {out} was not written.")
            return
        with progress_bar("extract-lora") as progress, replacing(out) as (place, told):
            result = extract_lora(
                source,
                place,
                rank=rank,
                energy=energy,
                alpha=alpha,
                exact=exact,
                residual=residual,
                dtype=getattr(torch, dtype),
                overwrite=force,
                progress=progress,
            )
        if report is not None:
            write_text(report, told(json.dumps(result.to_dict(), indent=2)), overwrite=force)
        typer.echo(told(result))
        if result.nbytes + result.residual_nbytes > result.delta_nbytes:
            note("extract-lora", "this LoRA is larger than its delta. Take a smaller --rank, or publish the delta.")


@with_hub_options(without=("revision", "variant", "subfolder"))
def combine(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCES", help="LoRAs or deltas of any form, two or more.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A .safetensors file, or for LoRAs a folder that load_lora_weights reads."),
    ],
    where: dict[str, Any],
    scale: Annotated[
        list[float] | None, typer.Option(help="Strength of a source; repeat for each, in order. Default: 1 for all.")
    ] = None,
    dtype: Annotated[StoredDtype | None, typer.Option(help="Stored as; default: no rounding.")] = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Write the sum of several LoRAs or deltas as one file.

    Each counts times its scale. LoRAs become one LoRA, exactly: the ranks of a layer add up. Anything else becomes a
    delta.

    Examples:

        perflow combine perflow-lora style.safetensors both.safetensors --scale 1 --scale 0.8

        perflow combine perflow-sd15-delta style.safetensors styled-delta.safetensors --dtype float16
    """
    import torch

    from perflow_diffusers.weights import combine as combine_weights
    from perflow_diffusers.weights import open_weights

    with failing("combine"):
        check_out(out, force, folder=True)
        with progress_bar("combine") as progress, replacing(out, dry_run) as (place, told):
            report = combine_weights(
                [open_weights(source, **where) for source in sources],
                place,
                scale,
                dtype=getattr(torch, dtype) if dtype else None,
                overwrite=force,
                dry_run=dry_run,
                progress=progress,
            )
    typer.echo(told(report))
    if dry_run:
        typer.echo(f"Dry run: {out} was not written.")


@with_hub_options()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=ANYTHING)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    to: Annotated[Form, typer.Option(help="A LoRA: diffusers, kohya. A delta: float16, bfloat16, int8, comfy.")],
    where: dict[str, Any],
    unet: Annotated[
        str | None,
        typer.Option(help="The UNet a LoRA is for, where its own layers do not show how blocks are counted."),
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Write a LoRA in another tool's layout, or a smaller delta.

    LoRA layouts are converted without loss, both ways. int8 has one scale per output channel; the loader reads it like
    any delta. comfy writes a delta for ComfyUI's stock LoRA loader, exactly (a LoRA for ComfyUI: kohya).

    Examples:

        perflow convert pytorch_lora_weights.safetensors comfy.safetensors --to kohya

        perflow convert perflow.safetensors perflow-int8.safetensors --to int8

        perflow convert perflow.safetensors ComfyUI/models/loras/perflow.safetensors --to comfy
    """
    from perflow_diffusers.weights import (
        check_comfy,
        check_convert,
        check_shrink,
        convert_lora,
        open_weights,
        shrink_delta,
    )
    from perflow_diffusers.weights import delta_for_comfy as for_comfy

    with failing("convert"):
        check_out(out, force)
        given = open_weights(source, **where)
        if dry_run:
            if to == "diffusers" or to == "kohya":
                typer.echo(check_convert(given, to, unet=unet))
            elif to == "comfy":
                typer.echo(check_comfy(given))
            else:
                typer.echo(check_shrink(given, to))
            typer.echo(f"Dry run: {out} was not written.")
        elif to == "diffusers" or to == "kohya":
            typer.echo(f"{convert_lora(given, out, to, unet=unet, overwrite=force)}")
        elif to == "comfy":
            with progress_bar("convert") as progress:
                typer.echo(f"{for_comfy(given, out, overwrite=force, progress=progress)}")
        else:
            with progress_bar("convert") as progress:
                typer.echo(str(shrink_delta(given, out, to, overwrite=force, progress=progress)))
