// The solvers that generated code instantiates (ctorch/ode/native_source.py).
#pragma once

#include "evaluate.h"
#include "fixed.h"
#include "joint.h"
#include "owned.h"
#include "pending.h"
#include "queue.h"
#include "sweep.h"
