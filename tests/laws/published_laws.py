"""The laws as published, naive twins of `retain.laws.forms`; runs as the paper's, and fits without warnings."""

from __future__ import annotations

import math
import warnings

import numpy as np

from retain import fit_forgetting_law
from retain.laws.fit import LawWarning
from retain.laws.forms import Array, Number
from retain.laws.law import ForgettingLaw


def linear_forgetting(L_ft: Number, *, c_fft: Number, s_fft: Number) -> Array:
    """L_f = -c_fft·L_ft + s_fft: the more learned, the more forgotten."""
    return s_fft - c_fft * np.asarray(L_ft)


def shifted_power(
    P: Number, N: Number, *, a: Number, alpha: Number, b: Number, beta: Number, rho: Number, c: Number, s: Number
) -> Array:
    """L_ft = c·[(a/P)^α + (b/N)^β]^ρ + s: new-task loss over tuned parameters and steps."""
    P, N = np.asarray(P, dtype=np.float64), np.asarray(N, dtype=np.float64)
    return c * ((a / P) ** alpha + (b / N) ** beta) ** rho + s


def joint_forgetting(P: Number, N: Number, *, c_fft: Number, s_fft: Number, **of_power: Number) -> Array:
    """L_f = -c_fft·(c_ft·[(a_f/P)^α_f + (b_f/N)^β_f]^ρ + s_ft) + s_fft, c_ft, s_ft and ρ being those of L_ft."""
    return linear_forgetting(shifted_power(P, N, **of_power), c_fft=c_fft, s_fft=s_fft)


def injection(
    P: Number, D: Number, p: Number, *, A: Number, B: Number, alpha: Number, beta: Number, s: Number
) -> Array:
    """L_f = s + A·D^β / ((1 + B·p)·P)^α: a share p of old data acts like (1 + B·p) times the parameters."""
    D, P, p = (np.asarray(value, dtype=np.float64) for value in (D, P, p))
    return s + A * D**beta / ((1 + B * p) * P) ** alpha


def size(P: Number, *, c: Number, alpha: Number) -> Array:
    """L_f = c·P^-α: forgetting at equal learning over model size, a description of the table in."""
    return c * np.asarray(P, dtype=np.float64) ** -alpha


def saturation(T: Number, *, c: Number, gamma: Number, s: Number) -> Array:
    """L_f = s - c·T^-γ: forgetting over pretraining tokens per parameter, a description of the table in."""
    return s - c * np.asarray(T, dtype=np.float64) ** -gamma


def quadratic(K: Number, *, c: Number, q: Number, s: Number) -> Array:
    """L_f = s + c·K + q·K²: forgetting over the divergence on the new task."""
    K = np.asarray(K, dtype=np.float64)
    return s + c * K + q * K**2


# Published coefficients (papers.md, C). P per LoRA rank of Llama 2 7B.
PER_RANK = 2_498_560
OPENORCA = {
    "a_f": 0.0388e7, "a_ft": 0.0007e7, "b_f": 23.6418, "b_ft": 72.9186, "c_ft": 0.0020, "c_fft": 1.7334,
    "s_ft": 0.6126, "s_fft": 2.0481, "alpha_f": 0.0351, "alpha_ft": 0.0424, "beta_f": 0.1468, "beta_ft": 0.1219,
    "rho": 7.6885,
}  # fmt: skip
NEWS = {
    "a_f": 0.0011e7, "a_ft": 0.0022e7, "b_f": 97.8466, "b_ft": 54.8678, "c_ft": 0.0028, "c_fft": 1.0615,
    "s_ft": 1.9253, "s_fft": 3.1285, "alpha_f": 0.0458, "alpha_ft": 0.0383, "beta_f": 0.1044, "beta_ft": 0.1161,
    "rho": 7.5996,
}  # fmt: skip
RANKS = (8, 16, 32, 64, 128, 256)
BOTH = ("finetuning_loss", "forgetting_loss")


def power_of(coefficients: dict, of: str) -> dict:
    return {name: coefficients[f"{name}_{of}"] for name in ("a", "alpha", "b", "beta")} | {
        "rho": coefficients["rho"],
        "c": coefficients["c_ft"],
        "s": coefficients["s_ft"],
    }


def truth(coefficients: dict, P, N) -> np.ndarray:
    line = {name: coefficients[name] for name in ("c_fft", "s_fft")}
    learned = shifted_power(P, N, **power_of(coefficients, "ft"))
    return np.stack([learned, joint_forgetting(P, N, **line, **power_of(coefficients, "f"))])


def autocorrelated(rng: np.random.Generator, runs: int, length: int, phi: float = 0.9) -> np.ndarray:
    """Noise of unit variance that moves slowly within a run: what makes points of a run dependent."""
    noise = rng.normal(size=(runs, length))
    for step in range(1, length):
        noise[:, step] = phi * noise[:, step - 1] + math.sqrt(1 - phi**2) * noise[:, step]
    return noise.reshape(-1)


def paper_design(
    coefficients: dict = OPENORCA, noise: float = 0.2, seed: int = 0, steps: int = 22, ranks: tuple = RANKS
) -> dict[str, np.ndarray]:
    """6 ranks, steps 50 … 260; noise 0.2 of each output's spread gives R² about .96."""
    rng = np.random.default_rng(seed)
    P = np.repeat(PER_RANK * np.array(ranks, dtype=float), steps)
    N = np.tile(np.linspace(50, 260, steps).round(), len(ranks))
    values = truth(coefficients, P, N)
    values = values + noise * values.std(axis=1, keepdims=True) * np.stack(
        [autocorrelated(rng, len(ranks), steps) for _ in range(2)]
    )
    run = np.repeat([f"r{rank}" for rank in ranks], steps)
    return {"run": run, "num_params": P, "num_steps": N, **dict(zip(BOTH, values, strict=True))}


def quiet_fit(*args, **kwargs) -> ForgettingLaw:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        return fit_forgetting_law(*args, **kwargs)
