"""Rates of a reaction from its progress curve: fit an ODE's parameters, with error bars.

    python examples/enzyme_kinetics.py [--quick]

Michaelis and Menten (1913) followed how invertase splits sucrose, for several initial
concentrations. The data here are made from their rate law with noise, so that the fit can be
compared with the truth. The curves of all experiments are solved as one batch; Gauss-Newton steps
use the exact Jacobian through the solver (forward mode), whose inverse gives the error bars.
"""

import argparse

import torch

import ctorch

torch.set_default_dtype(torch.float64)
TRUTH = torch.tensor([0.8, 2.0])  # largest rate, Michaelis constant
TIMES = torch.linspace(0.0, 10.0, 21)
START = torch.tensor([1.0, 2.0, 4.0, 8.0])


def substrate(rates):
    """Substrate left [T, experiments] for the rates (largest rate, Michaelis constant)."""

    def decay(t, s):
        return -rates[0] * s / (rates[1] + s)

    return ctorch.solve_ode(decay, START, TIMES, rtol=1e-8, atol=1e-10).y


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    rounds = 6 if parser.parse_args().quick else 12

    generator = torch.Generator().manual_seed(0)
    clean = substrate(TRUTH)
    noise = 0.05
    observed = clean + noise * torch.randn(clean.shape, generator=generator)

    log_rates = torch.zeros(2)  # both rates are positive
    for k in range(rounds):
        residual = (substrate(log_rates.exp()) - observed).reshape(-1)
        columns = [
            torch.func.jvp(lambda p: substrate(p.exp()), (log_rates,), (unit,))[1].reshape(-1)
            for unit in torch.eye(2)
        ]
        jacobian = torch.stack(columns, 1)
        shown = ", ".join(f"{rate:.6f}" for rate in log_rates.exp())
        print(f"{k}: rates {shown}   misfit {residual.square().mean().sqrt():.5f}")
        log_rates = log_rates - torch.linalg.lstsq(jacobian, residual[:, None]).solution[:, 0]

    rates = log_rates.exp()
    spread = noise * rates * torch.linalg.inv(jacobian.T @ jacobian).diagonal().sqrt()
    for name, value, error, true in zip(
        ("largest rate", "Michaelis constant"), rates, spread, TRUTH, strict=True
    ):
        print(f"{name:20}{value:.4f} +- {error:.4f}   (truth {true:.4f})")
    assert ((rates - TRUTH).abs() < 4 * spread).all()


if __name__ == "__main__":
    main()
