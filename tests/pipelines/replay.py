"""What a pipeline did, recorded at its networks, and the same run done again in plain Python float64 numbers.

The formulas are those of the paper (arXiv 2405.07510), written out per type; no arithmetic of the package is used.
"""

import math
from contextlib import contextmanager
from itertools import accumulate, pairwise

from builders import STOCK

from perflow_diffusers import PeRFlowScheduler


def signal_levels():
    """alphas_cumprod of the stock schedule, as a list of floats; [0] stands for both timestep 0 and 1."""
    n = STOCK["num_train_timesteps"]
    low, high = math.sqrt(STOCK["beta_start"]), math.sqrt(STOCK["beta_end"])
    kept = [1 - (low + (high - low) * i / (n - 1)) ** 2 for i in range(n)]
    products = list(accumulate(kept, lambda a, b: a * b))
    return [products[0], *products]


LEVELS = signal_levels()
BOUNDARIES = (1000, 750, 500, 250, 0)


def window(t, t_next):
    """The four windows' piece that a step from t to t_next follows."""
    return min(b for b in BOUNDARIES if b >= t), max(b for b in BOUNDARIES if b <= t_next)


def line(kind, s, e):
    """(lambda, eta) with z_e = lambda z_s + eta out."""
    abar_s, abar_e = LEVELS[s], LEVELS[e]
    if kind == "ddim_eps":
        lam = math.sqrt(abar_e / abar_s)
        return lam, math.sqrt(1 - abar_e) - lam * math.sqrt(1 - abar_s)
    if kind == "diff_eps":
        g = math.sqrt(abar_s / abar_e)
        return 1 / g, -math.sqrt(1 - g * g) / g
    return 1.0, (e - s) / 1000


def step_numbers(kind, t, t_next):
    """(a, b) with z' = a z + b out: from z_t = (1 - u) z_s + u z_e and z_e above, z_s eliminated."""
    s, e = window(t, t_next)
    lam, eta = line(kind, s, e)
    u, u_next = (s - t) / (s - e), (s - t_next) / (s - e)
    # z_t = (1 - u + u lam) z_s + u eta out, the same for z_t', hence z_t' from z_t.
    a = (1 - u_next + u_next * lam) / (1 - u + u * lam)
    return a, u_next * eta - a * u * eta


def on_the_chord(x0, noise, t, t_next):
    """Data and noise at timestep t: between their mixtures at both ends of the window."""
    s, e = window(t, t_next)
    u = (s - t) / (s - e)
    c_x0 = (1 - u) * math.sqrt(LEVELS[s]) + u * math.sqrt(LEVELS[e])
    c_noise = (1 - u) * math.sqrt(1 - LEVELS[s]) + u * math.sqrt(1 - LEVELS[e])
    return c_x0 * x0.double() + c_noise * noise.double()


class Recording:
    """`inputs`, `timesteps`, `outputs` of each call of a network; `noised`: (x0, noise, timestep) of each noising."""

    def __init__(self):
        self.inputs, self.timesteps, self.outputs, self.noised = [], [], [], []


@contextmanager
def recorded(*networks):
    """Record every call of the networks, in order, and of every PeRFlowScheduler's `add_noise`."""
    seen = Recording()
    original = PeRFlowScheduler.add_noise

    def on_call(module, args, kwargs, output):
        seen.inputs.append(args[0])
        seen.timesteps.append(float(args[1]))
        seen.outputs.append(output[0].detach())

    def add_noise(scheduler, original_samples, noise, timesteps):
        seen.noised.append((original_samples, noise, float(timesteps.reshape(-1)[0])))
        return original(scheduler, original_samples, noise, timesteps)

    handles = [network.register_forward_hook(on_call, with_kwargs=True) for network in networks]
    PeRFlowScheduler.add_noise = add_noise
    try:
        yield seen
    finally:
        PeRFlowScheduler.add_noise = original
        for handle in handles:
            handle.remove()


def guided(chunks, guidance):
    """Classifier-free guidance over [without prompt, with prompt]."""
    plain, told = chunks
    return plain + guidance * (told - plain)


def states(seen, kind, points, guide, batch, keep):
    """The state before every step and the final one, by float64 arithmetic from the recorded outputs and first input.

    `points`: the timesteps and the end; `guide`: the double outputs, one a chunk of `batch`, to the guided one;
    `keep`: (B, 1, H, W), 1 where the noised original replaces the state after every step (inpainting).
    """
    z = seen.inputs[0][:batch, :4].double()
    yield z
    steps = list(pairwise(points))
    for i, ((t, t_next), output) in enumerate(zip(steps, seen.outputs, strict=True)):
        a, b = step_numbers(kind, t, t_next)
        z = a * z + b * guide(output.double().split(batch))
        if keep.any():
            x0, noise, _ = seen.noised[-1]
            original = on_the_chord(x0, noise, *steps[i + 1]) if i + 1 < len(steps) else x0.double()
            z = keep * original + (1 - keep) * z
        yield z


def replayed(*arguments):
    """The final one of `states`."""
    return list(states(*arguments))[-1]


def close(given, expected, tolerance=1e-5):
    """Whether the largest difference is within `tolerance` of the largest number."""
    return (given.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()
