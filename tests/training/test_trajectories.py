"""Trajectories on disk: the same whoever makes which part of them, and all that training needs beside the network."""

import pytest
import torch
from run_log import logged
from safetensors.torch import load_file

import precompute
from perflow_diffusers import load_miniature
from perflow_training.config import TrainingConfig
from perflow_training.data import DataError
from perflow_training.recipe import completed, windowed
from perflow_training.rng import Draws
from perflow_training.solves import PipelineSolves
from perflow_training.teacher.observed import watch
from perflow_training.trajectories import CachedSolves

DEVICE = torch.device("cpu")


@pytest.fixture
def teacher(tmp_path):
    load_miniature("flow").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def options(words, teacher):
    def give(cache, *more):
        return words(f"pretrained_model_name_or_path={teacher}", f"train_cache_dir={cache}", "solve_guidance=5", *more)

    return give


def config_of(options, teacher, captions, cache):
    return TrainingConfig(
        pretrained_model_name_or_path=str(teacher), train_captions=str(captions), train_cache_dir=str(cache),
        solve_batch_size=2, solver_steps=2, solve_guidance=5.0, dataloader_num_workers=0, prediction_type="velocity",
    )  # fmt: skip


def test_the_windows_on_disk_are_those_that_the_pipeline_solves(options, teacher, captions, tmp_path):
    """Made at once, by two processes, and by one that was killed: the same bytes, and the pipeline's own states."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    precompute.main([*options(whole), "--trajectories", "3", "--dtype", "float32"])
    for part in ("0/2", "1/2"):
        precompute.main([*options(parts), "--trajectories", "3", "--dtype", "float32", "--part", part])
    files = sorted(path.name for path in whole.glob("solve-*"))
    assert files == [f"solve-{n:06d}.safetensors" for n in range(3)]
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    wanted = (parts / files[1]).read_bytes()
    (parts / files[1]).unlink()
    precompute.main([*options(parts), "--trajectories", "3", "--dtype", "float32"])
    assert (parts / files[1]).read_bytes() == wanted

    pipe = load_miniature("flow")
    config = config_of(options, teacher, captions, whole)
    observed = watch(pipe, scale=5.0)
    config, windows = windowed(completed(config, pipe), observed)
    online = PipelineSolves(observed, config, windows, Draws(0), DEVICE)
    solved = [online.solve(number) for number in range(3)]
    online.close()
    cached = CachedSolves(whole, config, Draws(0), DEVICE)
    assert cached.windows == windows and cached.call == observed.call
    read = [cached.solve(number) for number in range(3)]
    for one in read:
        (same,) = [other for other in solved if torch.equal(other.z_start, one.z_start)]
        assert torch.equal(same.z_end, one.z_end) and torch.equal(same.start, one.start)
        assert same.names == one.names
        for name, rows in same.cond.rows.items():
            assert torch.equal(rows, one.cond.rows[name])
    assert len({one.z_start.flatten()[0].item() for one in read}) == 3  # an epoch: each once
    two = [CachedSolves(whole, config, Draws(0, rank, 2), DEVICE).solve(0).names for rank in range(2)]
    assert [one.names for one in read[:2]] == two


@pytest.mark.parametrize("rank", [0, 4])
def test_training_from_trajectories_needs_no_encoders_and_no_second_network(run, options, tmp_path, monkeypatch, rank):
    cache = tmp_path / "cache"
    precompute.main([*options(cache), "--trajectories", "4"])
    loaded = []
    original = torch.nn.Module.__init__
    monkeypatch.setattr(
        torch.nn.Module,
        "__init__",
        lambda self, *a, **k: loaded.append(type(self).__name__) or original(self, *a, **k),
    )
    out = run(
        *options(cache), "max_train_steps=30", f"lora_rank={rank}", "learning_rate=1e-3", "lr_warmup_steps=0",
        "reuse=8", "buffer_size=64", "logging_steps=5",
    )  # fmt: skip
    assert not {name for name in loaded if "CLIP" in name or "Autoencoder" in name}
    first, *_, last = (sum(filter(None, line["loss"])) for line in logged(out))
    assert last < first
    file = out / "lora" / "pytorch_lora_weights.safetensors" if rank else out / "perflow.safetensors"
    assert all(value.isfinite().all() for value in load_file(file).values())


def test_what_does_not_fit_is_refused(options, teacher, captions, tmp_path, capsys):
    cache = tmp_path / "cache"
    precompute.main([*options(cache), "--trajectories", "1"])
    with pytest.raises(SystemExit):
        precompute.main([*options(cache, "solver_steps=3"), "--trajectories", "1"])
    assert "made with other options (solver_steps)" in capsys.readouterr().err
    config = config_of(options, teacher, captions, tmp_path)
    with pytest.raises(DataError, match="holds no trajectories"):
        CachedSolves(tmp_path, config, Draws(0), DEVICE)
    other = TrainingConfig(**{**config.to_dict(), "solve_batch_size": 4})
    with pytest.raises(DataError, match="have `solve_batch_size=2` and the options 4"):
        CachedSolves(cache, other, Draws(0), DEVICE)
    pipe = load_miniature("flow")
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(1.0)
    pipe.save_pretrained(teacher)
    with pytest.raises(DataError, match="are of another teacher"):
        CachedSolves(cache, config, Draws(0), DEVICE)
    with pytest.raises(SystemExit):
        precompute.main([*options(cache), "--trajectories", "1", "--part", "2/2"])
    assert "--part 2/2 be i/n, i < n" in capsys.readouterr().err
