"""Samples that make a step no number: named, left out if asked for, and met again as before by a resumed run."""

import logging

import pytest
import torch
from run_log import logged
from safetensors.torch import load_file, save_file
from test_distributed import launch

import precompute
from perflow_diffusers.miniature import miniature_folder
from perflow_training import loader
from perflow_training.data.order import permutation
from perflow_training.trainer import Trainer

#: a solve has two trajectories of four windows and serves two steps, which draw from both; the buffer keeps one solve
OPTIONS = ("reuse=1", "buffer_size=8", "max_train_steps=6", "lr_warmup_steps=0", "caption_dropout=0")
TEXTS = [f"a person with {thing}" for thing in ("hats", "hair", "eyes", "a dog", "a cat", "glasses", "ears", "rings")]


@pytest.fixture
def bad(captions, monkeypatch):
    """The third caption in the order, of the second solve, for steps 3 and 4: its embeddings are no numbers."""
    captions.write_text("\n".join(TEXTS))
    number = int(permutation(0, 0, len(TEXTS))[2])
    encode = loader.encode_prompts

    def encoded(pipe, prompts, *args, **kwargs):
        cond = encode(pipe, prompts, *args, **kwargs)
        cond.rows["encoder_hidden_states"][[prompt == TEXTS[number] for prompt in prompts]] = float("nan")
        return cond

    monkeypatch.setattr(loader, "encode_prompts", encoded)
    return f"'{TEXTS[number]}' (captions.txt, caption {number + 1})"


def weights(out):
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("logging_steps", [1, 6])
def test_the_diagnosis_names_the_step_and_the_sample(run, bad, logging_steps):
    """Also where losses are looked at long after; the other samples of the batch are not blamed."""
    with pytest.raises(SystemExit) as stop:
        run(*OPTIONS, f"logging_steps={logging_steps}")
    said = str(stop.value)
    assert f"not finite at step {max(3, logging_steps)}" in said
    assert f"The first such step is 3, of these samples: {bad}. A resumed run meets them again" in said
    assert "`skip_nonfinite=20`" in said
    assert not any(text in said for text in TEXTS if text not in bad)


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_that_are_left_out_change_no_weight(run, bad, tmp_path, monkeypatch, caplog, parts):
    """Bit for bit a run in which nobody takes these steps, whose losses are in no sum; also with accumulation."""
    more = (f"gradient_accumulation_steps={parts}", f"train_batch_size={4 // parts}", "logging_steps=2")
    with caplog.at_level(logging.WARNING):
        out = run(*OPTIONS, *more, "skip_nonfinite=2")
    told = [record.message for record in caplog.records if "is left out" in record.message]
    assert [message.split(" is left out")[0] for message in told] == ["step 3", "step 4"]
    assert all(message.endswith(f"Its samples: {bad}") for message in told)
    lines = logged(out)
    assert [line["skipped_steps"] for line in lines] == [0, 2, 2]
    assert lines[1]["loss"] == [None] * 4
    assert lines[1]["grad_norm"] is None
    step = Trainer._step

    def not_taken(self, log):
        if self.step not in (2, 3):
            return step(self, log)
        for part in range(parts):
            self.buffer.batch(self.config.train_batch_size, self.step * parts + part)
        self.schedule.step()
        self.step += 1
        return None

    monkeypatch.setattr(Trainer, "_step", not_taken)
    other = tmp_path / "other"
    run(*OPTIONS, *more, f"output_dir={other}")
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(out).items())


def test_a_resumed_run_leaves_out_the_same_steps_and_counts_on(run, bad, tmp_path):
    """The window that is no number comes from the checkpoint, with the name of its sample."""
    out = run(*OPTIONS, "skip_nonfinite=2", "checkpointing_steps=3")
    whole = weights(out)
    resumed = (*OPTIONS, f"resume_from_checkpoint={out / 'checkpoint-3'}")
    again = tmp_path / "again"
    run(*resumed, f"output_dir={again}", "skip_nonfinite=2")
    assert all(torch.equal(value, whole[name]) for name, value in weights(again).items())
    assert [line["skipped_steps"] for line in logged(again)] == [2, 2, 2]
    with pytest.raises(SystemExit, match="The first such step is 4, of these samples: ") as stop:
        run(*resumed, f"output_dir={tmp_path / 'strict'}")
    assert bad in str(stop.value)


def test_more_than_the_limit_end_the_run(run, bad):
    with pytest.raises(SystemExit, match=r"Step 4 has .*1 others were left out before \(`skip_nonfinite=1`\)") as stop:
        run(*OPTIONS, "skip_nonfinite=1")
    assert bad in str(stop.value)


def test_a_bad_sample_in_the_first_solve_is_named_before_the_first_step(run, bad):
    """With solves of four, the third example is in the first one."""
    with pytest.raises(SystemExit, match="Before the first step the teacher's own answer") as stop:
        run(*OPTIONS, "solve_batch_size=4", "train_batch_size=16", "buffer_size=16")
    assert f"It is so for {bad} alone" in str(stop.value)


def test_two_processes_leave_out_a_step_that_one_of_them_cannot_take(run, words, captions, tmp_path):
    """A cache with one damaged row, in the second process's share: both are as one process with their global batch."""
    captions.write_text("\n".join(TEXTS))
    cache = tmp_path / "cache"
    model = f"pretrained_model_name_or_path={miniature_folder() / 'avatars'}"
    precompute.main(["--prompts-only", "--device", "cpu", "--dtype", "float32", model, f"train_captions={captions}",
                     f"train_cache_dir={cache}"])  # fmt: skip
    tensors = load_file(cache / "shard-00000.safetensors")
    second = int(permutation(0, 0, len(TEXTS))[7])  # of four trajectories the last two are the second process's
    tensors["prompts/prompt_embeds"][second] = float("nan")
    save_file(tensors, cache / "shard-00000.safetensors", {"format": "pt"})
    options = (*OPTIONS, f"train_cache_dir={cache}", "train_captions=", "verify_cache=false", "skip_nonfinite=4")
    one, two = tmp_path / "one", tmp_path / "out"
    run(*options, f"output_dir={one}", "solve_batch_size=4", "train_batch_size=8", "buffer_size=16")
    half = ("solve_batch_size=2", "train_batch_size=4", "buffer_size=8")
    ended = launch(words(*options, *half), 2)
    assert [code for _, code in ended] == [0, 0], ended[0][0][-3000:]
    assert f"Its samples: row {second} of prompts in shard-00000.safetensors" in ended[0][0]
    assert [line["skipped_steps"] for line in logged(two)] == [line["skipped_steps"] for line in logged(one)]
    assert logged(one)[-1]["skipped_steps"] > 0
    first, other = weights(one), weights(two)
    # a step of Adam moves a weight by the learning rate, 5e-4, and near a gradient of zero rounding decides how far
    apart = torch.cat([(value - other[name]).abs().flatten() for name, value in first.items()])
    assert apart.max() < 1e-4
    assert apart.mean() < 1e-7
