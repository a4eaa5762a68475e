"""The command: options in, a cache out that training reads."""

import json

import pytest
import torch
from tiny_pictures import make_folder

import precompute
from perflow_diffusers.miniature import miniature_folder
from perflow_training.data import DataOptions
from perflow_training.data.cached import CachedStream
from perflow_training.data.identity import model_identity

MODEL = str(miniature_folder() / "avatars")


def test_the_command_writes_a_cache_at_the_networks_own_size(tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures", 5, ((40, 32),), missing=(1,))
    words = [f"pretrained_model_name_or_path={MODEL}", f"train_data_dir={folder}", f"train_cache_dir={tmp_path / 'c'}"]
    precompute.main(["--shard-size", "2", "--device", "cpu", *words])
    assert "4 of 5 examples, left out: 1 missing_captions" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert [entry["groups"] for entry in manifest["shards"]] == [{"32x32": 1}, {"32x32": 2}, {"32x32": 1}]
    assert (manifest["model"], manifest["dtype"]) == (model_identity(MODEL), "float16")
    options = DataOptions(train_cache_dir=str(tmp_path / "c"), dataloader_num_workers=0)
    batch = CachedStream(options, seed=0, with_images=True, model=model_identity(MODEL)).batch(4)
    assert (batch.latents.shape, batch.latents.dtype) == ((4, 4, 8, 8), torch.float32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_captions=x.txt"], "train_cache_dir"),
        (["train_cache_dir=c", "train_captions=/no/such.txt"], "/no/such.txt"),
        (["train_cache_dir=c", "train_captions=x", "--shard-size", "0"], "--shard-size 0"),
        (["nonsense=1"], "nonsense"),
    ],
)
def test_wrong_options_end_with_a_message_and_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        precompute.main([f"pretrained_model_name_or_path={MODEL}", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
