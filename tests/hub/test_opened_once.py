"""What is loaded or merged is opened once and its names are made out once, however many rooms look at it."""

from collections import Counter
from pathlib import Path
from types import MappingProxyType

import pytest
import safetensors
from hub_pipes import make_pipe, make_unet
from loopback import LoopbackHub

from perflow_diffusers import compute_delta, extract_lora, merge_delta, open_weights, shrink_delta
from perflow_diffusers.hub import PeRFlowArtifact, describe, load_perflow
from perflow_diffusers.io import tensors
from perflow_diffusers.weights import convert_lora, merge_files
from perflow_diffusers.weights.read import keys


@pytest.fixture
def counted(monkeypatch):
    """How often each file was opened, by us or by diffusers, and how often the names of each source were made out."""
    opened, mapped = Counter(), Counter()
    real_open, real_map = safetensors.safe_open, keys.canonical_map

    def count_open(path, *args, **options):
        opened[Path(path).resolve().name] += 1
        return real_open(path, *args, **options)

    def count_map(names):
        mapped[tuple(names)] += isinstance(names, MappingProxyType)  # as sources hold them; a live model has a list
        return real_map(names)

    for module in (tensors, safetensors, safetensors.torch):
        monkeypatch.setattr(module, "safe_open", count_open)
    monkeypatch.setattr(keys, "canonical_map", count_map)
    return opened, mapped


def check(counted, *names):
    opened, mapped = counted
    assert {name: opened[name] for name in names} == dict.fromkeys(names, 1), opened
    assert set(mapped.values()) <= {0, 1}, [(count, names[0]) for names, count in mapped.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artefact with a delta and a LoRA with a residual, the same LoRA for kohya, and a packed delta."""
    work = tmp_path_factory.mktemp("made")
    base = make_unet("sd").state_dict()
    tuned = {name: weight + 0.01 for name, weight in base.items()}
    facts = {"prediction_type": "ddim_eps", "num_time_windows": "4"}
    delta = work / "delta.safetensors"
    compute_delta(base, tuned, delta, metadata=facts)
    extract_lora(delta, work / "lora.safetensors", rank=1)
    convert_lora(work / "lora.safetensors", work / "kohya.safetensors", "kohya")
    shrink_delta(delta, work / "int8.safetensors", "int8")
    artifact = PeRFlowArtifact.from_header(delta).with_files(lora=work / "lora.safetensors")
    artifact.save(work / "artifact", base=make_pipe("sd"))
    return work


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["artifact", "delta.safetensors", "int8.safetensors"])
def test_a_delta_is_opened_once(made, counted, name, strict):
    load_perflow(make_pipe("sd"), made / name, strict=strict)
    check(counted, "perflow.safetensors" if name == "artifact" else name)


@pytest.mark.parametrize("name", ["artifact", "lora.safetensors", "kohya.safetensors"])
@pytest.mark.parametrize("attached", [True, False])
def test_a_lora_and_its_residual_are_opened_once(made, counted, name, attached, monkeypatch):
    if not attached:
        monkeypatch.setattr("perflow_diffusers.hub.adapters.is_peft_available", lambda: False)
    load_perflow(make_pipe("sd"), made / name, "lora")
    files = {"artifact": "pytorch_lora_weights", "kohya.safetensors": "kohya"}.get(name, "lora")
    check(counted, f"{files}.safetensors", f"{files}.residual.safetensors")


def test_a_repository_is_opened_once(made, counted, tmp_path, monkeypatch):
    import huggingface_hub

    folder = made / "artifact"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with LoopbackHub() as hub:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.put("me/artifact", files, False, "main")
        load_perflow(make_pipe("sd"), "me/artifact")
    assert list(counted[0].values()) == [1], counted[0]
    check(counted)


def test_merging_and_making_open_once(made, counted, tmp_path):
    tuned = {name: weight + 0.02 for name, weight in make_unet("sd").state_dict().items()}
    unet = make_unet("sd")
    unet.save_pretrained(made / "base")
    counted[0].clear()
    merge_delta(unet, made / "lora.safetensors")
    check(counted, "lora.safetensors", "lora.residual.safetensors")
    for one in counted:
        one.clear()
    merge_files(made / "base", made / "delta.safetensors", tmp_path / "merged.safetensors")
    check(counted, "diffusion_pytorch_model.safetensors", "delta.safetensors")
    for one in counted:
        one.clear()
    compute_delta(open_weights(made / "base"), tuned, tmp_path / "new.safetensors")
    check(counted, "diffusion_pytorch_model.safetensors")
    for one in counted:
        one.clear()
    extract_lora(made / "delta.safetensors", tmp_path / "new-lora.safetensors", rank=1)
    check(counted, "delta.safetensors")


def test_describing_opens_once(made, counted):
    assert describe(made / "lora.safetensors").weights
    check(counted, "lora.safetensors")
