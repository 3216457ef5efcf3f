// The solver that generated code instantiates: see ctorch/ode/native_source.py.
#pragma once

#include "samples.h"
