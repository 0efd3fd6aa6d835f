// What turning stored weights into operands costs on its own, for judging products against the machine's limit.
#pragma once
#include "kernels.h"

namespace kjax {

// Seconds per weight, all threads together, that the chosen kernels take to decode a strip that lies in L2: a product
// without rows. `across`: the layout of the backward pass.
double decode_cost(Format format, bool across);

}  // namespace kjax
