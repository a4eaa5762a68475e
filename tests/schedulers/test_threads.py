"""One scheduler in several threads: right numbers or an error, never another run's numbers."""

import threading
from itertools import pairwise

import pytest
import torch

from perflow_diffusers.flow import euler
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler

Z = torch.ones(1, 4, 2, 2)


def make():
    return PeRFlowScheduler(prediction_type="ddim_eps")


def elsewhere(function):
    """Run it in another thread to its end, and return its result or raise its error."""
    result = []

    def call():
        try:
            result.append((function(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def expected(n):
    """The end of an n-step run with the network sin, by the formula."""
    scheduler, z = make(), Z
    for t, t_next in pairwise([*scheduler.windows.grid(n)]):
        a, b = euler(scheduler.path, "ddim_eps", *scheduler.windows.of(t), t, t_next)
        z = a.float() * z + b.float() * z.sin()
    return z


def draw(scheduler, n, between=lambda: None):
    """What a pipeline does; `between` is called wherever another thread could get its turn."""
    scheduler.set_timesteps(n)
    between()
    z, timesteps = Z, scheduler.timesteps
    for t in timesteps:
        between()
        z = scheduler.step(z.sin(), t, z, return_dict=False)[0]
    return z


@pytest.mark.parametrize("other", [4, 8])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_run_that_another_thread_replaced_ends_with_an_error_and_the_other_is_right(other, done):
    scheduler = make()
    scheduler.set_timesteps(4)
    timesteps = list(scheduler.timesteps)
    for t in timesteps[:done]:
        scheduler.step(Z, t, Z)
    calls = [
        lambda: scheduler.step(Z, timesteps[done], Z),
        lambda: scheduler.step(Z, int(timesteps[done]), Z),
        lambda: scheduler.step(Z, timesteps[done].clone(), Z),
        lambda: scheduler.step(Z, scheduler.timesteps[0], Z),
        lambda: scheduler.step(Z, timesteps[done].repeat(2), Z.repeat(2, 1, 1, 1)),
        lambda: scheduler.add_noise(Z, Z, timesteps[done]),
        lambda: scheduler.set_begin_index(1),
    ]
    elsewhere(lambda: scheduler.set_timesteps(other))
    for call in calls:
        with pytest.raises(ValueError, match=r"Another thread.*one run at a time.*\*\*pipe.components, \"scheduler\""):
            call()
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert torch.allclose(draw(scheduler, 4), expected(4), rtol=1e-5)  # `set_timesteps` begins anew


def test_the_other_threads_run_is_not_disturbed():
    scheduler, errors = make(), []
    ready, go = threading.Event(), threading.Event()

    def first():
        scheduler.set_timesteps(4)
        ready.set()
        go.wait()
        try:
            scheduler.step(Z, scheduler.timesteps[0], Z)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    ready.wait()

    def between():
        go.set()
        thread.join()

    assert torch.allclose(draw(scheduler, 8, between), expected(8), rtol=1e-5)
    assert len(errors) == 1 and "Another thread" in errors[0]


def test_no_mixture_of_two_runs_is_ever_taken_for_a_result():
    scheduler, results = make(), []
    wanted = {n: expected(n) for n in (4, 8)}

    def work(n):
        for _ in range(60):
            try:
                z = draw(scheduler, n, lambda: threading.Event().wait(1e-5))
            except ValueError as error:
                results.append("Another thread" in str(error))
            else:
                results.append(torch.allclose(z, wanted[n], rtol=1e-5))

    threads = [threading.Thread(target=work, args=(n,)) for n in (4, 8, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 180 and all(results)


def test_a_thread_may_take_over_what_no_other_is_in_the_middle_of():
    scheduler = make()
    scheduler.set_timesteps(8)
    z, timesteps = Z, scheduler.timesteps
    for t in timesteps:  # set here, every step elsewhere
        z = elsewhere(lambda t=t, z=z: scheduler.step(z.sin(), t, z, return_dict=False)[0])
    assert torch.allclose(z, expected(8), rtol=1e-5)
    for n in (4, 8, 5):  # one after the other
        assert torch.allclose(elsewhere(lambda n=n: draw(scheduler, n)), expected(n), rtol=1e-5)
        assert torch.allclose(draw(scheduler, n), expected(n), rtol=1e-5)


def test_a_scheduler_a_thread_is_right():
    schedulers = {n: PeRFlowScheduler.from_config(make().config) for n in (4, 8)}
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: draw(schedulers[n], n, lambda: None)})) for n in (4, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(results[n], expected(n), rtol=1e-5) for n in (4, 8))


def test_timesteps_of_an_earlier_run_are_told_from_those_of_this_one():
    """Two runs that take turns in one thread, as generators and coroutines do."""
    scheduler = make()
    scheduler.set_timesteps(8)
    earlier = list(scheduler.timesteps)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep is from before the last `set_timesteps`.*one run at a time"):
        scheduler.step(Z, earlier[0], Z)
    scheduler.set_timesteps(8)
    kept = list(scheduler.timesteps)
    scheduler.set_timesteps(8)
    assert torch.equal(scheduler.step(Z, kept[2], Z).prev_sample, scheduler.step(Z, 750, Z).prev_sample)


def test_a_step_that_is_repeated_or_left_out_gets_its_own_numbers():
    scheduler = make()
    scheduler.set_timesteps(8)
    for form in (lambda t: t, torch.clone, int):
        for place in (0, 0, 5, 2, 6):
            t = scheduler.timesteps[place]
            step = scheduler.step(Z, form(t), Z, return_dict=False)[0]
            a, b = euler(scheduler.path, "ddim_eps", *scheduler.windows.of(int(t)), int(t), int(t) - 125)
            assert torch.allclose(step, (a + b).float() * Z, rtol=1e-5)
            assert scheduler.step_index == place + 1
