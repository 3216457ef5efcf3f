"""How hard must a ball be thrown to land a given time later? Gradients through an event's time.

    python examples/bouncing_ball.py [--quick]

The solve ends where the height crosses zero. The time of that event is differentiable, so Newton's
method finds the speed for which the flight takes as long as wanted, drag included, where no formula
is known.
"""

import argparse

import torch

import ctorch

GRAVITY, DRAG = 9.81, 0.05


def fly(t, state):
    """A ball in air: height and speed, with quadratic drag."""
    _, speed = state
    return torch.stack((speed, -GRAVITY - DRAG * speed * speed.abs()))


def height(t, state):
    """The event: it fires where this changes its sign."""
    return state[0]


def flight_time(speed):
    """Seconds until a ball thrown upwards from 1 m comes down."""
    start = torch.stack((torch.ones_like(speed), speed))
    horizon = torch.tensor([0.0, 100.0], dtype=torch.float64)
    sol = ctorch.solve_ode(fly, start, horizon, events=height, rtol=1e-9, atol=1e-9)
    return sol.event.t


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    rounds = 5 if parser.parse_args().quick else 8

    wanted = 2.0
    speed = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for k in range(rounds):
        time = flight_time(speed)
        (slope,) = torch.autograd.grad(time, speed)
        numbers = f"speed {speed.item():9.6f} m/s   flight {time.item():9.6f} s"
        print(f"{k}: {numbers}   slope {slope.item():.6f}")
        with torch.no_grad():
            speed += (wanted - time) / slope
    miss = abs(flight_time(speed).item() - wanted)
    print(f"thrown at {speed.item():.6f} m/s the ball lands after {wanted} s (within {miss:.1e} s)")
    assert miss < 1e-6


if __name__ == "__main__":
    main()
