// All loops for one instruction set; part of levels.h.
// clang-format off: each builds on those before
#include "values.h"
#include "../mlp/arith.h"
#include "arith.h"
#include "products.h"
#include "passes.h"
#include "blocks.h"
// clang-format on
