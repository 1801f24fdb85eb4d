// mgt_w4a8_linear and its workspace query.
#include "int4_linear.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return fuzz::fuzz_linear<true>(data, size); }
