"""The demo: a neural ODE fitted to the Hudson Bay lynx-hare record, judged by its forecast."""
