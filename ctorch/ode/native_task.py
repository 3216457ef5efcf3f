"""The struct in which a solve is handed to its compiled code: ``Task`` of csrc/native/task.h."""

from __future__ import annotations

import ctypes


class Task(ctypes.Structure):
    """See csrc/native/task.h, field by field."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "rows")],
        ("t", ctypes.c_void_p),
        ("t_stride", ctypes.c_int64),
        ("y0", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("out_sample", "out_row")],
        *[(name, ctypes.c_void_p) for name in ("own", "shared")],
        *[(name, ctypes.c_double) for name in ("rtol", "atol")],
        *[(name, ctypes.c_void_p) for name in ("rtols", "atols")],
        *[(name, ctypes.c_double) for name in ("p", "i", "d", "safety", "min_factor")],
        *[(name, ctypes.c_double) for name in ("max_factor", "never_shrinks", "first_step")],
        *[(name, ctypes.c_double) for name in ("min_step", "max_step", "max_steps")],
        *[(name, ctypes.c_int64) for name in ("overshoot", "patience")],
        *[(name, ctypes.c_void_p) for name in ("knots", "anchors")],
        *[(name, ctypes.c_int64) for name in ("knot_count", "perturb", "threads")],
        *[(name, ctypes.c_void_p) for name in ("counts", "status", "last", "tape")],
        *[(name, ctypes.c_void_p) for name in ("observation", "norm_shared")],
        ("has_event", ctypes.c_int64),
        ("worst", ctypes.c_void_p),
    ]


class Cotangents(ctypes.Structure):
    """See csrc/native/task.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("out", "y0", "own", "t")],
        ("times", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("shared", "sizes", "states", "slopes")],
        *[(name, ctypes.c_void_p) for name in ("starts", "lengths")],
    ]
