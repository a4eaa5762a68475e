"""Addresses that people copy out of a browser, as the Hub's own client takes them apart."""

import pytest
from huggingface_hub import hf_hub_url

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.hub import describe
from perflow_diffusers.io.names import Where, pasted
from perflow_diffusers.weights import open_weights

ID = "someone/perflow-sd15"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"https://huggingface.co/{ID}", Where()),
        (f"http://hf.co/{ID}/", Where()),
        (f"huggingface.co/{ID}?library=diffusers#usage", Where()),
        (f"https://huggingface.co/{ID}/tree/main", Where(revision="main")),
        (f"https://huggingface.co/{ID}/tree/refs%2Fpr%2F3", Where(revision="refs/pr/3")),
        (f"https://huggingface.co/{ID}/tree/v2/a/unet", Where(revision="v2", subfolder="a/unet")),
        (
            f"https://huggingface.co/{ID}/blob/main/unet/diffusion_pytorch_model.fp16.safetensors",
            Where(revision="main", subfolder="unet", variant="fp16"),
        ),
        (hf_hub_url(ID, "pytorch_lora_weights.safetensors", subfolder="lora", revision="v2"),
         Where(revision="v2", subfolder="lora")),
    ],
)  # fmt: skip
def test_an_address_is_its_id_and_what_else_it_says(address, expected):
    assert pasted(address, Where()) == (ID, expected)


@pytest.mark.parametrize("name", [ID, "miniature", "folder/x.safetensors", "https://example.com/a/b", "C:\\models\\x"])
def test_other_names_come_back_as_they_are(name):
    where = Where(variant="fp16")
    assert pasted(name, where) == (name, where)


@pytest.mark.parametrize(
    ("address", "options", "said"),
    [
        ("https://huggingface.co/datasets/a/b", {}, "not the address of a model"),
        ("https://huggingface.co/someone", {}, "OWNER/NAME"),
        (f"https://huggingface.co/{ID}/blob/main/own-name.safetensors", {}, f"hf download {ID} own-name.safetensors"),
        (f"https://huggingface.co/{ID}/tree/v1", {"revision": "v2"}, "Say it once"),
    ],
)
def test_what_cannot_be_meant_is_said(address, options, said):
    with pytest.raises(WeightSourceError, match=said):
        pasted(address, Where(**options))


def test_every_door_asks_for_the_id():
    """Nobody answers here; the sentence names what was asked for."""
    for door in (open_weights, describe):
        with pytest.raises(ValueError) as failed:
            door(f"https://huggingface.co/{ID}/tree/v2", local_files_only=True)
        assert ID in str(failed.value) and "huggingface.co/someone" not in str(failed.value)
