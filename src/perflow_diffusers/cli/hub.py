"""Commands on artefacts and their repositories: info, push, pull."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from perflow_diffusers.cli.terminal import check_out, failing, note, replacing
from perflow_diffusers.cli.where import with_hub_options


@with_hub_options()
def info(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A .safetensors file, a folder, a short name (perflow-sd15-delta) or a Hub id."
        ),
    ],
    where: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: one JSON object.")] = False,
) -> None:
    """Say what weights are and how they are to be used.

    Type, windows, steps, guidance, base, licence and sizes of an artefact, bare weights or a pipeline. Reads headers
    only; of a Hub repository no weights are downloaded.

    Examples:

        perflow info perflow.safetensors

        perflow info my-perflow

        perflow info perflow-sd15-delta

        perflow info someone/perflow-sd15 --json
    """
    from perflow_diffusers.hub import describe

    with failing("info"):
        found = describe(source, **where)
        typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="An artefact: what PeRFlowArtifact.save or a training run wrote (of its folder, artifact/).",
        ),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub; created if it does not exist.")
    ],
    license: Annotated[
        str | None,
        typer.Option("--license", "--licence", help="Licence of the weights; default: the card's, or the base's."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository for yourself alone.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be checked and list what would be pushed.")
    ] = False,
) -> None:
    """Publish an artefact on the Hub, in one commit.

    Settings, weights, card and pictures. The token is the one of `hf auth login` (or HF_TOKEN).

    Examples:

        perflow push perflow-sd15 someone/perflow-sd15 --license creativeml-openrail-m

        perflow push perflow-sd15 someone/perflow-sd15 --create-pr --commit-message "Better eight steps"
    """
    from perflow_diffusers.hub import push_perflow
    from perflow_diffusers.hub.push import NO_TOKEN, plan_push

    with failing("push"):
        if dry_run:
            plan = plan_push(folder, repo_id, license=license, revision=revision)
            typer.echo(str(plan))
            if not plan.has_token:
                note("push", NO_TOKEN)
            typer.echo(f"Dry run: nothing was pushed to {plan.repo_id}.")
            return
        url = push_perflow(
            folder,
            repo_id,
            license=license,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        typer.echo(url)


@with_hub_options(without=("variant",))
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the copy goes.")],
    where: dict[str, Any],
    force: Annotated[bool, typer.Option("--force", help="Replace the folder that is there, as a whole.")] = False,
) -> None:
    """Copy an artefact from the Hub into a folder.

    `load_perflow(pipe, FOLDER)` then needs no network.

    Example:

        perflow pull someone/perflow-sd15 perflow-sd15
    """
    from perflow_diffusers.hub import pull as pull_artifact

    with failing("pull"):
        if force:
            check_out(folder, force, file=False, folder=True)
        with replacing(folder, dry_run=not force) as (place, _):
            artifact = pull_artifact(repo_id, place, overwrite=force, **where)
        typer.echo(f"{artifact.name}: {artifact.prediction_type}, {artifact.num_time_windows} windows: {folder}")
