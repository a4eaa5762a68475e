"""Every door to the Hub takes revision, variant, subfolder, token and the cache's options, and opens the right file.

The repositories hold the same names at two revisions and in two folders; a number, which is in every tensor and every
settings file, says which one was read.
"""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_pipes import make_pipe, make_unet
from loopback import TOKEN, LoopbackHub
from safetensors import safe_open
from safetensors.torch import save
from typer.testing import CliRunner

from perflow_diffusers import compute_delta, convert_lora, extract_lora, merge_delta, open_weights, shrink_delta
from perflow_diffusers.cli import app
from perflow_diffusers.hub import PeRFlowArtifact, describe, load_perflow, pull, set_scheduler
from perflow_diffusers.hub.state import companion
from perflow_diffusers.weights import describe_weights, merge_files

PLACES = [("main", ""), ("main", "sub/"), ("v2", ""), ("v2", "sub/")]
NUMBER = {place: number for number, place in enumerate(PLACES, start=1)}
UNET = "diffusion_pytorch_model{}.safetensors"
FACTS = {"prediction_type": "ddim_eps", "num_time_windows": "4"}
BIAS = "conv_in.bias"


def shifted(number):
    """The weights of the tiny UNet, each 0.01 * number higher."""
    return {name: weight + 0.01 * number for name, weight in make_unet("sd").state_dict().items()}


def number_of(source, base=None):
    """Which file this is: of weights with `base`, of a delta without."""
    value = source[BIAS].float() - (0 if base is None else make_unet("sd").state_dict()[BIAS])
    return round(value.mean().item() * 100)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Complete UNets (with a variant), bare deltas, artefacts and exported pipelines; `private/...` are the same."""
    work = tmp_path_factory.mktemp("repositories")
    make_unet("sd").save_config(work)
    config = (work / "config.json").read_bytes()
    with LoopbackHub() as hub:
        for (branch, folder), number in NUMBER.items():
            unets = {f"{folder}config.json": config}
            for variant, more in (("", 0), (".fp16", 4)):
                unets[folder + UNET.format(variant)] = save(shifted(number + more), {"licence": str(number + more)})
            facts = {**FACTS, "recommended_steps": f"[{number}]", "licence": "mit"}
            delta = work / f"{number}.safetensors"
            compute_delta(make_unet("sd").state_dict(), shifted(number), delta, metadata=facts)
            PeRFlowArtifact.from_header(delta).save(work / str(number), base=make_pipe("sd"))
            artifact = {
                folder + path.relative_to(work / str(number)).as_posix(): path.read_bytes()
                for path in sorted((work / str(number)).rglob("*"))
                if path.is_file()
            }
            scheduler = json.loads((work / str(number) / "scheduler" / "scheduler_config.json").read_text())
            settings = json.dumps({**scheduler, "num_time_windows": number}).encode()
            exported = {"model_index.json": b"{}", "perflow_scheduler_config.json": settings}
            for owner in ("me", "private"):
                private = owner == "private"
                hub.put(f"{owner}/unets", unets, private, branch)
                hub.put(f"{owner}/deltas", {f"{folder}delta.safetensors": delta.read_bytes()}, private, branch)
                hub.put(f"{owner}/artifacts", artifact, private, branch)
                if not folder:
                    hub.put(f"{owner}/exported", exported, private, branch)
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The client speaks to the server, with an empty cache and no token."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return server


def run(*words, **where):
    """The command with `where` as options, which raises what it says."""
    options = [
        word
        for name, value in where.items()
        for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]
    result = CliRunner().invoke(app, [*words, *options])
    if result.exit_code:
        raise ValueError(result.output)
    return result.stdout


def fresh(suffix=".safetensors"):
    """A name that is free in the working folder."""
    return f"out-{len(list(Path().iterdir()))}{suffix}"


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def loaded(owner, **where):
    pipe = make_pipe("sd")
    artifact = load_perflow(pipe, f"{owner}/artifacts", **where)
    assert artifact.steps == number_of(pipe.unet.state_dict(), "base")
    return artifact.steps


def rescheduled(owner, **where):
    pipe = make_pipe("sd")
    set_scheduler(pipe, f"{owner}/artifacts", **where)
    return companion(pipe).artifact.steps


def recognised(owner, **where):
    pipe = make_pipe("sd")
    pipe.register_to_config(_name_or_path=f"{owner}/exported")
    return set_scheduler(pipe, **where).config["num_time_windows"]


def pulled(owner, **where):
    folder = fresh("")
    pull(f"{owner}/artifacts", folder, **where)
    return PeRFlowArtifact.from_folder(folder).steps


def pulled_by_command(owner, **where):
    folder = fresh("")
    run("pull", f"{owner}/artifacts", folder, **where)
    return PeRFlowArtifact.from_folder(folder).steps


def merged_live(owner, **where):
    unet = make_unet("sd")
    merge_delta(unet, open_weights(f"{owner}/deltas", **where))
    return number_of(unet.state_dict(), "base")


def merged_files(owner, **where):
    out = fresh()
    base = {key: value for key, value in where.items() if key not in ("revision", "variant", "subfolder")}
    merge_files(open_weights("me/unets", **base), open_weights(f"{owner}/deltas", **where), out)
    return number_of(open_weights(out), "base") - 1


def made(writer, *arguments):
    """A door that writes a file from an opened delta."""

    def door(owner, **where):
        out = fresh()
        writer(open_weights(f"{owner}/deltas", **where), out, *arguments)
        residual = Path(out).with_suffix(".residual.safetensors")
        return number_of(open_weights(residual if residual.exists() else out))

    return door


def differences(owner, **where):
    base = make_unet("sd").state_dict()
    return number_of(compute_delta(base, open_weights(f"{owner}/unets", **where)))


def converted(owner, **where):
    out, lora = fresh(), fresh("-lora.safetensors")
    extract_lora(open_weights(f"{owner}/deltas", **where), lora, rank=1, residual=False)
    convert_lora(open_weights(lora), out, "kohya")
    return json.loads(header_of(out)["recommended_steps"])[0]


def command(name, *options, repository="deltas"):
    def door(owner, **where):
        out = fresh()
        run(name, f"{owner}/{repository}", out, *options, **where)
        residual = Path(out).with_suffix(".residual.safetensors")
        return number_of(open_weights(residual if residual.exists() else out))

    return door


def prefixed(where, name):
    own = ("revision", "variant", "subfolder")
    return {f"{name}_{key}" if key in own else key: value for key, value in where.items()}


def diff_command(owner, **where):
    out = fresh()
    base = "private/unets" if owner == "private" else "me/unets"
    run("diff", base, f"{owner}/unets", out, **prefixed(where, "tuned"))
    return number_of(open_weights(out)) + 1


def diff_command_base(owner, **where):
    out = fresh()
    run("diff", f"{owner}/unets", f"{owner}/unets", out, **prefixed(where, "base"), tuned_variant="fp16")
    return 5 - number_of(open_weights(out))


def told_by_command(owner, **where):
    return json.loads(run("info", f"{owner}/artifacts", "--json", **where))["settings"]["recommended_steps"][0]


def merge_command(owner, **where):
    out = fresh("")
    run("merge", f"{owner}/unets", f"{owner}/deltas", out, base_variant="fp16", **prefixed(where, "delta"))
    return number_of(open_weights(out), "base") - 5


def merge_command_base(owner, **where):
    out = fresh("")
    run("merge", f"{owner}/unets", f"{owner}/deltas", out, **prefixed(where, "base"))
    return number_of(open_weights(out), "base") - 1


DOORS = {
    "open_weights": lambda owner, **where: number_of(open_weights(f"{owner}/unets", **where), "base"),
    "describe_weights": lambda owner, **where: describe_weights(f"{owner}/unets", **where).settings["licence"],
    "compute_delta": differences,
    "merge_delta": merged_live,
    "merge_files": merged_files,
    "extract_lora": made(lambda source, out: extract_lora(source, out, rank=1)),
    "shrink_delta": made(shrink_delta, "float16"),
    "convert_lora": converted,
    "from_pretrained": lambda owner, **where: PeRFlowArtifact.from_pretrained(f"{owner}/artifacts", **where).steps,
    "load_perflow": loaded,
    "set_scheduler": rescheduled,
    "describe": lambda owner, **where: describe(f"{owner}/artifacts", **where).artifact.steps,
    "describe of bare weights": lambda owner, **where: max(describe(f"{owner}/unets", **where).sizes.values()) > 0,
    "pull": pulled,
    "perflow info": told_by_command,
    "perflow pull": pulled_by_command,
    "perflow diff TUNED": diff_command,
    "perflow diff BASE": diff_command_base,
    "perflow merge DELTA": merge_command,
    "perflow merge BASE": merge_command_base,
    "perflow extract-lora": command("extract-lora", "--rank", "1"),
    "perflow convert": command("convert", "--to", "float16"),
}
NUMBERED = [name for name in DOORS if name != "describe of bare weights"]


@pytest.mark.parametrize("name", NUMBERED)
def test_revision_and_subfolder_choose_the_file(hub, name):
    for (branch, folder), number in NUMBER.items():
        where = {"revision": branch} if branch != "main" else {}
        where.update({"subfolder": folder.strip("/")} if folder else {})
        assert int(DOORS[name]("me", **where)) == number, where


@pytest.mark.parametrize("name", DOORS)
def test_a_private_repository_opens_with_its_token_alone(hub, name):
    with pytest.raises(ValueError, match="'private/"):
        DOORS[name]("private")
    assert int(DOORS[name]("private", token=TOKEN)) == 1


@pytest.mark.parametrize("name", DOORS)
def test_the_cache_can_be_chosen_used_alone_and_filled_again(hub, name):
    where = {"cache_dir": Path("elsewhere").absolute()}
    assert int(DOORS[name]("me", **where)) == 1
    assert any(Path("elsewhere").rglob("snapshots")) or "describe" in name
    assert not Path("cache").exists()
    if name.startswith("describe of") or name in ("describe", "perflow info", "pull", "perflow pull"):
        return  # of these repositories not all files that are listed are in the cache
    before = len(hub.requests)
    assert int(DOORS[name]("me", local_files_only=True, **where)) == 1
    assert len(hub.requests) == before
    DOORS[name]("me", force_download=True, **where)
    assert any(method == "GET" and path.endswith((".safetensors", ".json")) for method, path in hub.requests[before:])


@pytest.mark.parametrize("start", ["https://huggingface.co/", "hf.co/"])
@pytest.mark.parametrize("name", NUMBERED)
def test_every_door_takes_an_address_out_of_a_browser(hub, name, start):
    assert int(DOORS[name](f"{start}me")) == 1
    assert int(DOORS[name](f"{start}me", revision="v2")) == 3


@pytest.mark.parametrize("name", ["open_weights", "describe_weights", "compute_delta"])
def test_a_variant_is_taken_from_its_revision_and_folder(hub, name):
    for (branch, folder), number in NUMBER.items():
        where = {"revision": branch, "subfolder": folder, "variant": "fp16"}
        assert int(DOORS[name]("me", **where)) == number + 4


def test_a_pipeline_is_recognised_at_its_revision(hub):
    for owner, token in (("me", None), ("private", TOKEN)):
        assert recognised(owner, token=token) == 1
        assert recognised(owner, token=token, revision="v2") == 3


def test_what_is_not_there_is_named(hub):
    with pytest.raises(
        ValueError, match=r"'me/artifacts' \(revision v2\) has no subfolder 'nowhere'. Its folders: .*sub"
    ):
        load_perflow(make_pipe("sd"), "me/artifacts", revision="v2", subfolder="nowhere")
    with pytest.raises(ValueError, match=r"has no subfolder 'nowhere'"):
        open_weights("me/unets", subfolder="nowhere")
    with pytest.raises(ValueError, match=r"revision v9"):
        open_weights("me/unets", revision="v9")
    with pytest.raises(ValueError, match=r"me/artifacts is an artefact .* no variant 'fp16'"):
        PeRFlowArtifact.from_pretrained("me/artifacts", variant="fp16")
    with pytest.raises(ValueError, match="no weights of variant 'bf16'"):
        describe("me/unets", variant="bf16")
    with pytest.raises(ValueError, match="leads out of the repository"):
        open_weights("me/unets", subfolder="../other")
    with pytest.raises(ValueError, match="Pass one of them"):
        open_weights("me/unets", local_files_only=True, force_download=True)


def test_a_folder_is_merged_wherever_the_unet_of_a_repository_lies(hub):
    """Its config comes from beside the weights, of the same revision."""
    from diffusers import UNet2DConditionModel

    for where in ({}, {"subfolder": "sub", "revision": "v2"}):
        out = fresh("")
        merge_files(open_weights("me/unets", **where), open_weights("me/deltas"), out)
        unet = UNet2DConditionModel.from_pretrained(out)
        wanted = shifted(NUMBER[where.get("revision", "main"), "sub/" if where else ""] + 1)
        assert torch.allclose(unet.state_dict()[BIAS], wanted[BIAS], atol=1e-6)
